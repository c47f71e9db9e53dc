// What every binding needs: checks that name the op and the argument, channels-innermost images, allocation, activation names.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <functional>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/cpu/blocks.h"

namespace fastconv {

using torch::headeronly::Layout;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using OptionalTensor = std::optional<Tensor>;
using OptionalString = std::optional<std::string>;

// Throws "op: message" unless the condition holds.
template <class... Parts>
void check(bool condition, const char* op, const Parts&... parts) {
  if (condition) [[likely]]
    return;
  std::ostringstream text;
  text << op << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// A tensor's shape in a message, "(1, 3, 224, 224)": written only when the check has failed.
struct shape_of {
  const Tensor& tensor;
};
std::ostream& operator<<(std::ostream& text, shape_of shape);
const char* dtype_name(ScalarType dtype);

Activation parse_activation(const char* op, const char* argument, const OptionalString& name);

// int[2] arguments: both within [least, ...].
void check_pair(const char* op, const char* argument, const Ints& pair, int64_t least);
void check_image(const char* op, const Tensor& x, const char* argument = "x");                 // 4-D, dense, on the CPU
void check_like(const char* op, const char* argument, const Tensor& tensor, const Tensor& x);  // same dtype and device
void check_bias(const char* op, const char* argument, const OptionalTensor& bias, int64_t channels, const Tensor& x);
// Weight (Cout, Cin, 1, 1) for inputs of Cin channels.
void check_pointwise_weight(const char* op, const char* argument, const Tensor& weight, int64_t in_channels, const Tensor& x);
void check_depthwise_weight(const char* op, const char* argument, const Tensor& weight, int64_t channels, const Tensor& x);
// Output size of a convolution or pooling window along one axis; throws if no output pixel is left.
int64_t output_size(const char* op, const char* axis, int64_t size, int64_t kernel, int64_t stride, int64_t padding);

// fp32 is what the kernels serve; any other dtype goes through ATen, or is an error under FASTCONV_BACKEND=cpu.
bool covered(const char* op, const Tensor& x);

bool is_channels_last(const Tensor& x);

// A dense image with channels innermost, or, `direct`, as it is; owns a converted copy if x is not one already.
struct Image {
  Tensor tensor;
  const float* data;
  explicit Image(const Tensor& x, bool direct = false);
};

enum class Output { like_input, channels_last };

// For large blocks: a fresh output of 73 MB (SqueezeNet 1.0's stem, batch 16) costs 18 thousand page faults on small pages.
void advise_huge_pages(uintptr_t begin, uintptr_t bytes);
void return_free_memory();                              // what the allocator keeps, to the system
void collapse_pages(uintptr_t begin, uintptr_t bytes);  // the same for memory that is in use

// A block that keeps its memory from one call to the next and grows to the largest need seen.
class Arena {
 public:
  float* floats(int64_t count);

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t capacity_ = 0;
};

// The kernels write channels innermost; done() returns the result in the asked memory format: the input's for public operators, always
// channels_last for packed ones.
class Result {
 public:
  Result(int64_t n, int64_t c, int64_t h, int64_t w, const Tensor& x, Output output);
  float* data() { return static_cast<float*>(tensor_.mutable_data_ptr()); }
  Tensor done() const;

 private:
  Tensor tensor_;
  bool convert_;
};

// torch's own, for arguments that were checked: what can still go wrong is memory, and std::bad_alloc is thrown.
// Uninitialised fp32. Not torch::stable::empty, which finds its operator by name: 7 to 16 us a call whose caches are cold.
Tensor empty(const Ints& shape, MemoryFormat format = MemoryFormat::Contiguous, ScalarType type = ScalarType::Float);
Tensor to_contiguous(const Tensor& x, MemoryFormat format = MemoryFormat::Contiguous);
inline Tensor floats(const Ints& shape) { return empty(shape); }
Tensor zeros(int64_t count);
inline const float* data(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

// Weights packed for one call, or views of ones packed before.
Tensor pack_panels(const Tensor& weight);
Tensor pack_strassen(const Tensor& weight);
Tensor pack_digits(const Tensor& weight);
double relative_power_at(uintptr_t weight, int64_t out_channels, int64_t in_channels);  // what tells whether digits suit
Tensor pack_winograd(const Tensor& weight);
Tensor pack_stem_winograd(const Tensor& weight);
Tensor pack_taps(const Tensor& weight);
Tensor bias_or_zeros(const OptionalTensor& bias, int64_t channels);

// Runs f once, with a team of torch's threads to share its loops, or without where so little work, in multiply-adds, is faster alone.
void in_parallel(int64_t work, const std::function<void(const Parallel&)>& f);

}  // namespace fastconv
