#include "csrc/tensor.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#include "kernels/cpu/pack.h"

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace fastconv {

std::ostream& operator<<(std::ostream& text, shape_of shape) {
  text << "(";
  for (int64_t i = 0; i < shape.tensor.dim(); ++i) text << (i ? ", " : "") << shape.tensor.size(i);
  return text << (shape.tensor.dim() == 1 ? ",)" : ")");
}

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

Activation parse_activation(const char* op, const char* argument, const OptionalString& name) {
  if (!name) return Activation::none;
  if (*name == "relu") return Activation::relu;
  if (*name == "relu6") return Activation::relu6;
  if (*name == "hardswish") return Activation::hardswish;
  if (*name == "hardsigmoid") return Activation::hardsigmoid;
  if (*name == "silu") return Activation::silu;
  if (*name == "sigmoid" && std::strcmp(argument, "gate_activation") == 0) return Activation::sigmoid;
  check(false, op, argument, " must be None, 'relu', 'relu6', 'hardswish', 'hardsigmoid' or 'silu', got '", *name, "'");
  return Activation::none;
}

void check_pair(const char* op, const char* argument, const Ints& pair, int64_t least) {
  check(pair.size() == 2, op, argument, " must be an int or a pair, got ", pair.size(), " numbers");
  check(pair[0] >= least && pair[1] >= least, op, argument, " must be at least ", least, ", got (", pair[0], ", ", pair[1], ")");
  constexpr int64_t most = int64_t{1} << 31;
  check(pair[0] < most && pair[1] < most, op, argument, " must be below 2^31, got (", pair[0], ", ", pair[1], ")");
}

void check_image(const char* op, const Tensor& x, const char* argument) {
  check(x.dim() == 4, op, argument, " must be (N, C, H, W), got ", shape_of{x});
  check(x.is_cpu(), op, argument, " must be on the CPU");
  check(x.layout() == Layout::Strided, op, argument, " must be a dense tensor");
  check(x.size(1) > 0, op, argument, " must have channels, got ", shape_of{x});  // without, 2^62 images take no memory but time
}

void check_like(const char* op, const char* argument, const Tensor& tensor, const Tensor& x) {
  check(tensor.scalar_type() == x.scalar_type(), op, argument, " must be ", dtype_name(x.scalar_type()), " like x, got ",
        dtype_name(tensor.scalar_type()));
  check(tensor.is_cpu(), op, argument, " must be on the CPU like x");
}

void check_bias(const char* op, const char* argument, const OptionalTensor& bias, int64_t channels, const Tensor& x) {
  if (!bias) return;
  check(bias->dim() == 1 && bias->size(0) == channels, op, argument, " must be (", channels, ",), got ", shape_of{*bias});
  check_like(op, argument, *bias, x);
}

void check_pointwise_weight(const char* op, const char* argument, const Tensor& weight, int64_t in_channels, const Tensor& x) {
  const bool fits = weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) == in_channels && weight.size(2) == 1 && weight.size(3) == 1;
  check(fits, op, argument, " must be (Cout, ", in_channels, ", 1, 1), got ", shape_of{weight});
  check_like(op, argument, weight, x);
}

void check_depthwise_weight(const char* op, const char* argument, const Tensor& weight, int64_t channels, const Tensor& x) {
  const bool fits =
      weight.dim() == 4 && weight.size(1) == 1 && weight.size(2) == weight.size(3) && (weight.size(2) == 3 || weight.size(2) == 5);
  check(fits, op, argument, " must be (C, 1, 3, 3) or (C, 1, 5, 5), got ", shape_of{weight});
  check(weight.size(0) == channels, op, argument, " must have x's ", channels, " channels, got ", shape_of{weight});
  check_like(op, argument, weight, x);
}

int64_t output_size(const char* op, const char* axis, int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
  check(size + 2 * padding >= kernel, op, "x has no output pixels: ", axis, " ", size, " with padding ", padding, " is below the kernel's ",
        kernel);
  return (size + 2 * padding - kernel) / stride + 1;
}

namespace {

bool forced() {
  const char* backend = std::getenv("FASTCONV_BACKEND");
  return backend && std::string(backend) == "cpu";
}

const bool FORCED = forced();  // read once: the environment is the process's, not the call's

}  // namespace

bool covered(const char* op, const Tensor& x) {
  const bool fits = x.scalar_type() == ScalarType::Float;
  check(fits || !FORCED, op, "FASTCONV_BACKEND=cpu does not cover ", dtype_name(x.scalar_type()), " on cpu");
  return fits;
}

bool is_channels_last(const Tensor& x) {
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (x.size(d) != 1 && x.stride(d) != expected) return x.numel() == 0;
    expected *= x.size(d);
  }
  return true;
}

namespace {

// The stable ABI makes every error one of its own and prints what it was.
template <class F>
Tensor or_out_of_memory(const F& f) {
  try {
    return f();
  } catch (const std::runtime_error&) {
    throw std::bad_alloc();
  }
}

// OpenMP's threads do not survive a fork, and GNU's runtime then waits for them in its next loop, forever: a forked child works alone.
std::atomic<bool> forked{false};
[[maybe_unused]] const int watched = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// torch's copy, which is parallel where the image is large.
Tensor reordered(const Tensor& x, MemoryFormat format) {
  if (!forked) return to_contiguous(x, format);
  Tensor copy = empty({x.size(0), x.size(1), x.size(2), x.size(3)}, format);
  const float* const from = data(x);
  float* const to = static_cast<float*>(copy.mutable_data_ptr());
  for (int64_t n = 0; n < x.size(0); ++n)
    for (int64_t c = 0; c < x.size(1); ++c)
      for (int64_t h = 0; h < x.size(2); ++h)
        for (int64_t w = 0; w < x.size(3); ++w)
          to[n * copy.stride(0) + c * copy.stride(1) + h * copy.stride(2) + w * copy.stride(3)] =
              from[n * x.stride(0) + c * x.stride(1) + h * x.stride(2) + w * x.stride(3)];
  return copy;
}

}  // namespace

Tensor empty(const Ints& shape, MemoryFormat format, ScalarType type) {
  Ints strides(shape.size());
  int64_t stride = 1;
  const bool channels_last = format == MemoryFormat::ChannelsLast;
  const auto next = [&](size_t d) {
    strides[d] = stride;
    // Without elements the two formats' strides differ, as torch's own do.
    if (__builtin_mul_overflow(stride, channels_last ? shape[d] : std::max<int64_t>(shape[d], 1), &stride)) throw std::bad_alloc();
  };
  if (channels_last)
    for (const size_t d : {1, 3, 2, 0}) next(d);
  else
    for (size_t d = shape.size(); d-- > 0;) next(d);
  return or_out_of_memory([&] {
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                           type == ScalarType::Int ? aoti_torch_dtype_int32() : aoti_torch_dtype_float32(),
                                                           aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
  });
}

Tensor to_contiguous(const Tensor& x, MemoryFormat format) {
  return or_out_of_memory([&] { return torch::stable::contiguous(x, format); });
}

Image::Image(const Tensor& x, bool direct)
    : tensor(direct || is_channels_last(x) ? x : reordered(x, MemoryFormat::ChannelsLast)), data(fastconv::data(tensor)) {}

void advise_huge_pages(uintptr_t begin, uintptr_t bytes) {
#ifdef __linux__
  constexpr uintptr_t HUGE_PAGE = uintptr_t{2} << 20;
  const uintptr_t first = (begin + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE, last = (begin + bytes) / HUGE_PAGE * HUGE_PAGE;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#endif
}

void return_free_memory() {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
}

void collapse_pages(uintptr_t begin, uintptr_t bytes) {
  advise_huge_pages(begin, bytes);  // before Linux 6.1, and where one fails, they come in the background
#ifdef __linux__
  constexpr int COLLAPSE = 25;  // MADV_COLLAPSE, which older headers lack
  constexpr uintptr_t HUGE_PAGE = uintptr_t{2} << 20;
  for (uintptr_t page = (begin + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE; page + HUGE_PAGE <= begin + bytes; page += HUGE_PAGE)
    if (madvise(reinterpret_cast<void*>(page), HUGE_PAGE, COLLAPSE) != 0) return;
#endif
}

float* Arena::floats(int64_t count) {
  if (count > capacity_) {
    // On a huge page's boundary where there is one to fill.
    const size_t alignment = count * sizeof(float) >= size_t{1} << 20 ? size_t{2} << 20 : 64;
    const size_t bytes = (count * sizeof(float) + alignment - 1) / alignment * alignment;
    capacity_ = 0;
    data_.reset();
    data_.reset(static_cast<float*>(std::aligned_alloc(alignment, bytes)));
    if (!data_) throw std::bad_alloc();
    capacity_ = static_cast<int64_t>(bytes / sizeof(float));
    advise_huge_pages(reinterpret_cast<uintptr_t>(data_.get()), bytes);
  }
  return data_.get();
}

Result::Result(int64_t n, int64_t c, int64_t h, int64_t w, const Tensor& x, Output output) : tensor_(x), convert_(false) {
  const bool channels_last = output == Output::channels_last || (is_channels_last(x) && !x.is_contiguous());
  const bool same_order = c == 1 || h * w == 1 || n == 0;  // both formats are one order in memory
  convert_ = !channels_last && !same_order;
  const Ints shape{n, c, h, w};
  tensor_ = empty(shape, channels_last || convert_ ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  advise_huge_pages(reinterpret_cast<uintptr_t>(data()), tensor_.numel() * sizeof(float));
}

Tensor Result::done() const { return convert_ ? reordered(tensor_, MemoryFormat::Contiguous) : tensor_; }

Tensor zeros(int64_t count) {
  Tensor tensor = floats({count});
  std::memset(tensor.mutable_data_ptr(), 0, count * sizeof(float));
  return tensor;
}

static Tensor dense_weight(const char* op, const Tensor& weight) {
  check(weight.is_cpu() && weight.scalar_type() == ScalarType::Float, op, "weight must be float32 on the CPU");
  return to_contiguous(weight);
}

Tensor pack_panels(const Tensor& weight) {
  check(weight.dim() == 4 && weight.numel() > 0, "pack_panels", "weight must be (Cout, Cin, KH, KW), got ", shape_of{weight});
  const Tensor dense = dense_weight("pack_panels", weight);
  const int64_t out_channels = weight.size(0), in_channels = weight.size(1), taps = weight.size(2) * weight.size(3);
  Tensor panels = floats({panels_for(out_channels), taps * in_channels, PANEL});
  pack_panels(data(dense), out_channels, in_channels, taps, static_cast<float*>(panels.mutable_data_ptr()));
  return panels;
}

Tensor pack_strassen(const Tensor& weight) {
  check(weight.dim() == 4 && weight.size(2) == 1 && weight.size(3) == 1 && weight.size(0) > 0 && weight.size(1) > 0 &&
            weight.size(1) % StrassenWeights::GROUP == 0,
        "pack_strassen", "weight must be (Cout, Cin, 1, 1) with a multiple of ", StrassenWeights::GROUP, " inputs, got ", shape_of{weight});
  const Tensor dense = dense_weight("pack_strassen", weight);
  Tensor packed = floats({StrassenWeights{nullptr, weight.size(1), weight.size(0)}.floats()});
  pack_strassen(data(dense), weight.size(0), weight.size(1), static_cast<float*>(packed.mutable_data_ptr()));
  return packed;
}

Tensor pack_digits(const Tensor& weight) {
  check(weight.dim() == 4 && weight.size(2) == 1 && weight.size(3) == 1 && weight.numel() > 0, "pack_digits",
        "weight must be (Cout, Cin, 1, 1), got ", shape_of{weight});
  check(weight.size(1) <= DigitWeights::MOST_INPUTS, "pack_digits", "weight must have at most ", DigitWeights::MOST_INPUTS, " inputs, got ",
        weight.size(1));
  const Tensor dense = dense_weight("pack_digits", weight);
  check(std::all_of(data(dense), data(dense) + dense.numel(), [](float w) { return std::isfinite(w); }), "pack_digits",
        "weight must be finite");
  const int64_t words = DigitWeights{nullptr, weight.size(1), weight.size(0)}.floats();
  Tensor packed = empty({words / PANEL, PANEL}, MemoryFormat::Contiguous, ScalarType::Int);
  pack_digits(data(dense), weight.size(0), weight.size(1), static_cast<float*>(packed.mutable_data_ptr()));
  return packed;
}

double relative_power_at(uintptr_t weight, int64_t out_channels, int64_t in_channels) {
  return relative_power(reinterpret_cast<const float*>(weight), out_channels, in_channels);
}

Tensor pack_winograd(const Tensor& weight) {
  check(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 && weight.numel() > 0, "pack_winograd",
        "weight must be (Cout, Cin, 3, 3), got ", shape_of{weight});
  const Tensor dense = dense_weight("pack_winograd", weight);
  const int64_t out_channels = weight.size(0), in_channels = weight.size(1);
  Tensor panels = floats({panels_for(out_channels), 36 * in_channels, PANEL});
  pack_winograd(data(dense), out_channels, in_channels, static_cast<float*>(panels.mutable_data_ptr()));
  return panels;
}

Tensor pack_stem_winograd(const Tensor& weight) {
  check(weight.dim() == 4 && weight.size(1) == 3 && weight.size(3) == 7 && weight.numel() > 0, "pack_stem_winograd",
        "weight must be (Cout, 3, KH, 7), got ", shape_of{weight});
  const Tensor dense = dense_weight("pack_stem_winograd", weight);
  const int64_t out_channels = weight.size(0), kernel_h = weight.size(2);
  Tensor panels = floats({panels_for(out_channels), STEM_POINTS * kernel_h * STEM_PLANES, PANEL});
  pack_stem_winograd(data(dense), out_channels, kernel_h, static_cast<float*>(panels.mutable_data_ptr()));
  return panels;
}

Tensor pack_taps(const Tensor& weight) {
  check(weight.dim() == 4 && weight.size(1) == 1 && weight.numel() > 0, "pack_taps", "weight must be (C, 1, K, K), got ", shape_of{weight});
  const Tensor dense = dense_weight("pack_taps", weight);
  const int64_t channels = weight.size(0), taps = weight.size(2) * weight.size(3);
  Tensor packed = floats({taps, channels});
  pack_taps(data(dense), channels, taps, static_cast<float*>(packed.mutable_data_ptr()));
  return packed;
}

Tensor bias_or_zeros(const OptionalTensor& bias, int64_t channels) { return bias ? to_contiguous(*bias) : zeros(channels); }

void in_parallel(int64_t work, const std::function<void(const Parallel&)>& f) {
  constexpr int64_t ALONE = 512 * 1024;  // about 4 us; waking a team takes 2 us
  const int64_t threads = torch::stable::get_num_threads();
  if (threads <= 1 || work < ALONE || forked) return f(Parallel{});
  Team team(threads);
  std::exception_ptr failure;  // torch's loop is a C function to the stable ABI: nothing may be thrown through it
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    if (begin != 0) return team.help(begin);  // the caller's own piece is the first
    try {
      f(Parallel{&team});
    } catch (...) {
      failure = std::current_exception();
    }
    team.finish();
  });
  if (failure) std::rethrow_exception(failure);
}

}  // namespace fastconv
