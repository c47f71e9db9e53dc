// Bytes to a call of an operator, any of them, with whatever arguments: for libFuzzer, under the address sanitizer (make fuzz).
//
// Whatever is wrong with the arguments has to end as an exception that says so; what is right has to stay within its tensors, each of
// which is a block of memory of its own. The choices below favour what lies near a boundary of some check.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <tuple>
#include <vector>

#include "csrc/ops.h"

namespace fastconv {

namespace {

constexpr int64_t SIZES[] = {0,
                             1,
                             2,
                             3,
                             4,
                             5,
                             6,
                             7,
                             8,
                             9,
                             15,
                             16,
                             17,
                             24,
                             31,
                             32,
                             33,
                             36,
                             40,
                             48,
                             64,
                             72,
                             100,
                             144,
                             225,
                             288,
                             400,
                             1 << 16,
                             int64_t{1} << 31,
                             int64_t{1} << 33,
                             int64_t{1} << 62,
                             1};
constexpr int64_t NUMBERS[] = {0,         1,        2, 3, 4, 5, 6, 7, -1, -2, 1 << 15, 1 << 16, (int64_t{1} << 31) - 1, int64_t{1} << 31,
                               INT64_MAX, INT64_MIN};
constexpr const char* NAMES[] = {nullptr, "relu", "relu6", "hardswish", "hardsigmoid", "silu", "sigmoid", "", "RELU"};
constexpr const char* WORDS[] = {"fastconv 2",
                                 ";",
                                 " ",
                                 "stem_packed",
                                 "pointwise_packed",
                                 "depthwise_packed",
                                 "fire_expand_packed",
                                 "fire_packed",
                                 "inverted_residual_packed",
                                 "max_pool",
                                 "global_avg_pool",
                                 "none",
                                 "relu",
                                 "relu6",
                                 "hardswish",
                                 "sigmoid",
                                 "0",
                                 "1",
                                 "2",
                                 "3",
                                 "4",
                                 "5",
                                 "-1",
                                 "0 -1",
                                 "1 -1",
                                 "2 -1",
                                 "3 -1",
                                 "1 0",
                                 "2 1",
                                 "3 3",
                                 "1 1",
                                 "2 2",
                                 "0 0",
                                 "9223372036854775807",
                                 "-9223372036854775808",
                                 "99999999999999999999"};
constexpr ScalarType DTYPES[] = {ScalarType::Float,    ScalarType::Double, ScalarType::Half,
                                 ScalarType::BFloat16, ScalarType::Long,   ScalarType::Bool};
constexpr int64_t MOST = 1 << 15;  // elements in memory; more are one that is repeated

template <class T, size_t N>
const T& pick(const T (&table)[N], size_t choice) {
  return table[choice % N];
}

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), end_(data + size) {}
  uint8_t next() { return data_ == end_ ? 0 : *data_++; }

  void read(int64_t& value) { value = pick(NUMBERS, next()); }
  void read(bool& value) { value = next() % 2; }
  void read(double& value) { value = std::array{0.0, 0.1, 1e-5, 1.0, -1.0, 1e300, 0.0 / 0.0, 1.0 / 0.0}[next() % 8]; }
  void read(Ints& value) {  // mostly pairs
    constexpr int64_t lengths[] = {2, 2, 2, 2, 2, 2, 0, 1, 3};
    value.resize(pick(lengths, next()));
    for (int64_t& number : value) read(number);
  }
  void read(std::string& value) {
    for (int count = next() % 64; count > 0; --count) {
      const size_t word = next();
      if (word < std::size(WORDS))
        value += WORDS[word];
      else
        value += static_cast<char>(word);
    }
  }
  void read(OptionalString& value) {
    if (const char* name = pick(NAMES, next())) value = name;
  }
  void read(OptionalTensor& value) {
    if (next() % 4) value = tensor();
  }
  void read(std::vector<Tensor>& value) {
    for (int count = next() % 12; count > 0; --count) value.push_back(tensor());
  }

  // Rank, order in memory, dtype, sizes.
  Tensor tensor() {
    const size_t rank = next() % 7, order = next() % 6;
    const size_t dtype = next() % 16;
    Ints sizes(rank), strides(rank, 0);
    int64_t count = 1;
    for (int64_t& size : sizes) {
      size = pick(SIZES, next());
      if (__builtin_mul_overflow(count, std::max<int64_t>(size, 1), &count)) size = 1, count = INT64_MAX;  // torch makes no such tensor
    }
    const bool small = count <= MOST;
    count = 1;
    for (const int64_t size : sizes) count = small ? count * size : MOST;
    if (small && order != 3) {  // 3: one element for all
      int64_t stride = 1;
      for (size_t i = 0; i < rank; ++i) {
        size_t axis = rank - 1 - i;  // contiguous
        if (order == 1 && rank == 4) axis = std::array{1, 3, 2, 0}[i];
        if (order == 2) axis = i;
        strides[axis] = order == 4 ? 1 : stride;  // overlapping
        stride *= std::max<int64_t>(sizes[axis], 1);
      }
    }
    int64_t last = 0;
    for (size_t i = 0; i < rank; ++i)
      if (strides[i]) last += strides[i] * std::max<int64_t>(sizes[i] - 1, 0);
    const int64_t offset = order == 5;  // not where a block begins
    const size_t bytes = (last + 1 + offset) * 8;
    const ScalarType type = small && dtype < std::size(DTYPES) ? DTYPES[dtype] : ScalarType::Float;
    const size_t width = type == ScalarType::Double || type == ScalarType::Long ? 8
                         : type == ScalarType::Float                            ? 4
                         : type == ScalarType::Bool                             ? 1
                                                                                : 2;
    const size_t used = small && count == 0 ? 0 : bytes / 8 * width;
    blocks_.emplace_back(static_cast<char*>(std::calloc(used ? used : 1, 1)), &std::free);
    char* const block = blocks_.back().get();
    if (type == ScalarType::Float)
      for (size_t i = 0; i < used / 4; ++i) reinterpret_cast<float*>(block)[i] = static_cast<float>(i % 7) - 3;
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    return torch::stable::from_blob(block, sizes, strides, cpu, type, used ? offset : 0);
  }

 private:
  const uint8_t *data_, *end_;
  std::vector<std::unique_ptr<char, void (*)(void*)>> blocks_;
};

template <class T>
T read(Bytes& bytes) {
  if constexpr (std::is_same_v<T, Tensor>)
    return bytes.tensor();  // which has no default
  else {
    T value{};
    bytes.read(value);
    return value;
  }
}

template <class Result, class... Arguments>
void call(Result (*f)(Arguments...), Bytes& bytes) {
  std::tuple<std::decay_t<Arguments>...> arguments{read<std::decay_t<Arguments>>(bytes)...};
  std::apply(f, std::move(arguments));
}

void compiled(Tensor x, std::vector<Tensor> weights, std::string program) {
  const int64_t number = program_new(std::move(weights), std::move(program));
  try {
    program_run(x, number, false);
    program_times(x, number);
  } catch (...) {
    program_free(number);
    throw;
  }
  program_free(number);
}

void run(Bytes& bytes) {
  using Packing = Tensor (*)(const Tensor&);
  switch (bytes.next() % 35) {
      // clang-format off
    case 0: return call(&depthwise, bytes);
    case 1: return call(&pointwise, bytes);
    case 2: return call(&fire_expand, bytes);
    case 3: return call(&fire, bytes);
    case 4: return call(&separable, bytes);
    case 5: return call(&inverted_residual, bytes);
    case 6: return call(&stem, bytes);
    case 7: return call(&max_pool, bytes);
    case 8: return call(&global_avg_pool, bytes);
    case 9: return call(&depthwise_backward_input, bytes);
    case 10: return call(&depthwise_backward_weight, bytes);
    case 11: return call(static_cast<Packing>(&pack_panels), bytes);
    case 12: return call(static_cast<Packing>(&pack_winograd), bytes);
    case 13: return call(static_cast<Packing>(&pack_taps), bytes);
    case 14: return call(&depthwise_packed, bytes);
    case 15: return call(&pointwise_packed, bytes);
    case 16: return call(&fire_expand_packed, bytes);
    case 17: return call(&fire_packed, bytes);
    case 18: return call(&inverted_residual_packed, bytes);
    case 19: return call(&stem_packed, bytes);
    case 20: return call(&network, bytes);
    case 21: return call(&compiled, bytes);
    case 22: return call(&training_conv, bytes);
    case 23: return call(&training_activated, bytes);
    case 24: return call(&training_means, bytes);
    case 25: return call(&training_gradient_sums, bytes);
    case 26: return call(&training_conv_backward, bytes);
    case 27: return call(&training_fire, bytes);
    case 28: return call(&training_fire_backward, bytes);
    case 29: return call(&training_max_pool_backward, bytes);
    case 30: return call(&training_stem_pool, bytes);
    case 31: return call(static_cast<Packing>(&pack_stem_winograd), bytes);
    case 32: return call(static_cast<Packing>(&pack_strassen), bytes);
    case 33: return call(static_cast<Packing>(&pack_digits), bytes);
    default: return call(&training_stem_pool_backward, bytes);
      // clang-format on
  }
}

// "operator: what is wrong", or what torch says of a call of its own.
bool tells(const std::string& text) {
  const size_t colon = text.find(": ");
  return text.find("torch_") != std::string::npos || (colon != std::string::npos && colon + 2 < text.size());
}

}  // namespace

}  // namespace fastconv

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fastconv::Bytes bytes(data, size);
  try {
    fastconv::run(bytes);
  } catch (const std::bad_alloc&) {  // no memory for it, and none for a message
  } catch (const std::exception& error) {
    if (!fastconv::tells(error.what())) {
      std::fprintf(stderr, "an error that says nothing: %s\n", error.what());
      std::abort();
    }
  }
  return 0;
}
