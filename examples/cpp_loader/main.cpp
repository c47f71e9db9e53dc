// Runs a model that AOTInductor compiled (export_model.py) in a C++ program, without Python:
//   loader model.pt2 input.bin output.bin N C H W
// input.bin: N * C * H * W float32, NCHW; output.bin: the first output's float32, dense. Prints the output's shape and the time of a call.
// The program is linked with libfastconv.so, which registers fastconv's operators when it is loaded.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <stdexcept>

int main(int argc, char** argv) try {
  if (argc != 8) throw std::runtime_error("usage: loader model.pt2 input.bin output.bin N C H W");
  const c10::InferenceMode inference;
  std::vector<int64_t> shape;
  for (int i = 4; i < 8; ++i) shape.push_back(std::atoll(argv[i]));
  at::Tensor x = torch::empty(shape);
  std::ifstream input(argv[2], std::ios::binary);
  if (!input.read(static_cast<char*>(x.data_ptr()), x.nbytes()))
    throw std::runtime_error(std::string("cannot read the input from ") + argv[2]);

  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  at::Tensor y = model.run({x}).at(0).contiguous();
  constexpr int CALLS = 20;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < CALLS; ++i) model.run({x});
  const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - start;

  std::ofstream output(argv[3], std::ios::binary);
  if (!output.write(static_cast<const char*>(y.const_data_ptr()), y.nbytes()))
    throw std::runtime_error(std::string("cannot write the output to ") + argv[3]);
  std::cout << y.sizes() << " in " << taken.count() / CALLS << " ms\n";
} catch (const std::exception& problem) {
  std::cerr << "loader: " << problem.what() << "\n";
  return 1;
}
