// The operator table: every schema, and the CPU implementation behind it.
#include "csrc/ops.h"

#include <cstring>
#include <new>

namespace fastconv {

namespace {

bool dense_floats(const Tensor& tensor) { return tensor.is_cpu() && tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous(); }

}  // namespace

void check_packed_image(const char* op, const Tensor& x) {
  check_image(op, x);
  check(x.scalar_type() == ScalarType::Float, op, "x must be float32, got ", dtype_name(x.scalar_type()));
}

void check_channels(const char* op, const Shape& x, int64_t channels) {
  check(x.c == channels, op, "x must have ", channels, " channels, got ", x);
}

void check_some_pixels(const char* op, const Shape& x) { check(x.h > 0 && x.w > 0, op, "x has no output pixels: ", x); }

int64_t check_panels(const char* op, const char* argument, const Tensor& panels, const Tensor& bias, int64_t depth) {
  check(dense_floats(bias) && bias.dim() == 1 && bias.size(0) > 0, op, "the bias of ", argument, " must be a dense float32 (Cout,), got ",
        shape_of{bias});
  const int64_t out_channels = bias.size(0);
  const bool fits = dense_floats(panels) && panels.dim() == 3 && panels.size(0) == panels_for(out_channels) && panels.size(1) == depth &&
                    panels.size(2) == PANEL;
  check(fits, op, argument, " must be dense float32 (", panels_for(out_channels), ", ", depth, ", ", PANEL, "), got ", shape_of{panels});
  return out_channels;
}

PackedPointwise check_pointwise(const char* op, const char* argument, const Tensor& panels, const Tensor& bias, int64_t in_channels,
                                Activation activation) {
  const int64_t dimensions = panels.dim();
  check(dimensions >= 1 && dimensions <= 3, op, argument,
        " must be (G, Cin, 16), or two dimensions as digits, or one for Strassen's algorithm, got ", shape_of{panels});
  if (dimensions == 3) {
    if (in_channels == 0) in_channels = panels.size(1);
    const int64_t out_channels = check_panels(op, argument, panels, bias, in_channels);
    return {data(panels), data(bias), in_channels, out_channels, activation};
  }
  check(dense_floats(bias) && bias.dim() == 1 && bias.size(0) > 0, op, "the bias of ", argument, " must be a dense float32 (Cout,), got ",
        shape_of{bias});
  const std::string wanted = " of " + std::to_string(bias.size(0)) + " outputs" +
                             (in_channels ? " and " + std::to_string(in_channels) + " inputs" : std::string()) + ", got ";
  if (dimensions == 2) {
    int32_t packed_for = 0;
    const bool dense = panels.is_cpu() && panels.scalar_type() == ScalarType::Int && panels.is_contiguous();
    if (dense && panels.numel() > 0) std::memcpy(&packed_for, data(panels), sizeof packed_for);
    const DigitWeights weights{nullptr, packed_for, bias.size(0)};
    check(
        packed_for > 0 && panels.size(1) == PANEL && weights.floats() == panels.numel() && (in_channels == 0 || packed_for == in_channels),
        op, argument, " must be dense int32, packed as digits,", wanted, shape_of{panels});
    return {data(panels), data(bias), packed_for, bias.size(0), activation, Packing::digits};
  }
  // Floats grow by as much with every step of 32 inputs.
  const auto floats = [&](int64_t inputs) { return StrassenWeights{nullptr, inputs, bias.size(0)}.floats(); };
  const int64_t step = floats(StrassenWeights::GROUP) - floats(0);
  const int64_t inputs = (panels.numel() - floats(0)) / step * StrassenWeights::GROUP;
  check(dense_floats(panels) && inputs > 0 && floats(inputs) == panels.numel() && (in_channels == 0 || inputs == in_channels), op, argument,
        " must be dense float32, packed for Strassen's algorithm,", wanted, shape_of{panels});
  return {data(panels), data(bias), inputs, bias.size(0), activation, Packing::strassen};
}

void check_taps(const char* op, const Tensor& taps, const Tensor& bias, int64_t channels, const Ints& stride, const Ints& padding) {
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  const bool fits = dense_floats(taps) && taps.dim() == 2 && (taps.size(0) == 9 || taps.size(0) == 25) && taps.size(1) == channels;
  check(fits, op, "taps must be dense float32 (9 or 25, ", channels, "), got ", shape_of{taps});
  check(dense_floats(bias) && bias.dim() == 1 && bias.size(0) == channels, op, "the depthwise bias must be dense float32 (", channels,
        ",), got ", shape_of{bias});
  check(depthwise_covers(taps.size(0) == 9 ? 3 : 5, stride, padding), op,
        "stride must be 1 or 2 along the width and padding below the kernel, got stride (", stride[0], ", ", stride[1], ") and padding (",
        padding[0], ", ", padding[1], ")");
}

void check_residual(const char* op, const Tensor& residual, const Tensor& x, int64_t n, int64_t c, int64_t h, int64_t w) {
  const bool fits = residual.dim() == 4 && residual.size(0) == n && residual.size(1) == c && residual.size(2) == h && residual.size(3) == w;
  check(fits, op, "residual must have the output's shape (", n, ", ", c, ", ", h, ", ", w, "), got ", shape_of{residual});
  check_like(op, "residual", residual, x);
}

std::ostream& operator<<(std::ostream& text, const Shape& x) {
  return text << "(" << x.n << ", " << x.c << ", " << x.h << ", " << x.w << ")";
}

Target run_whole(const Step& step, const Pixels& x, Scratch& scratch, const Parallel& parallel) {
  const Shape shape = step.output(x.shape);
  const int64_t pixels = shape.n * shape.h * shape.w;
  const Target whole{scratch.floats(blocked_floats(pixels, shape.c)), shape, blocked(pixels)};
  step.run(x, {}, whole, parallel);
  return whole;
}

Tensor run_step(const Step& step, const Tensor& x, const OptionalTensor& residual, Output output) {
  const char* op = step.op();
  check_packed_image(op, x);
  const Shape in = shape_like(x), out = step.output(in);
  const bool direct = step.reads_nchw() && x.is_contiguous() && !is_channels_last(x);
  const Image image(x, direct);
  std::optional<Image> added;
  if (residual) {
    check_residual(op, *residual, x, out.n, out.c, out.h, out.w);
    added.emplace(*residual);
  }
  Result result(out.n, out.c, out.h, out.w, x, output);
  if (in.n == 0) return result.done();  // no images, and no memory for steps to point into
  in_parallel(step.multiply_adds(in, out), [&](const Parallel& parallel) {
    step.run({image.data, in, in.c, direct}, channels_last(added ? added->data : nullptr, out), channels_last(result.data(), out),
             parallel);
  });
  return result.done();
}

namespace {

// Memory ran out: MemoryError in Python. Holds a literal, for there is no memory to make a message with.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(const char* text) : text_(text) {}
  const char* what() const noexcept override { return text_; }

 private:
  const char* text_;
};

}  // namespace

}  // namespace fastconv

// Says whose memory it was.
#define IMPLEMENT(name, function)                                               \
  m.impl(#name, [](StableIValue* stack, uint64_t arguments, uint64_t results) { \
    try {                                                                       \
      TORCH_BOX(function)(stack, arguments, results);                           \
    } catch (const std::bad_alloc&) {                                           \
      throw fastconv::OutOfMemory(#name ": out of memory");                     \
    }                                                                           \
  })
#define KERNEL(name) IMPLEMENT(name, &fastconv::name)
#define PACKING(name) IMPLEMENT(name, static_cast<fastconv::Tensor (*)(const fastconv::Tensor&)>(&fastconv::name))

STABLE_TORCH_LIBRARY(fastconv, m) {
#define SCHEMA(text) m.def(text);
#include "fastconv/schemas.inc"
#undef SCHEMA
}

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) {
  KERNEL(depthwise);
  KERNEL(pointwise);
  KERNEL(fire_expand);
  KERNEL(fire);
  KERNEL(separable);
  KERNEL(inverted_residual);
  KERNEL(stem);
  KERNEL(max_pool);
  KERNEL(global_avg_pool);
  KERNEL(depthwise_backward_input);
  KERNEL(depthwise_backward_weight);
  PACKING(pack_panels);
  PACKING(pack_strassen);
  PACKING(pack_digits);
  PACKING(pack_winograd);
  PACKING(pack_stem_winograd);
  PACKING(pack_taps);
  KERNEL(depthwise_packed);
  KERNEL(pointwise_packed);
  KERNEL(fire_expand_packed);
  KERNEL(fire_packed);
  KERNEL(inverted_residual_packed);
  KERNEL(stem_packed);
  KERNEL(network);
  KERNEL(program_run);
  KERNEL(program_times);
  KERNEL(training_conv);
  KERNEL(training_activated);
  KERNEL(training_means);
  KERNEL(training_gradient_sums);
  KERNEL(training_max_pool);
  KERNEL(training_max_pool_backward);
  KERNEL(training_stem_pool);
  KERNEL(training_stem_pool_backward);
  KERNEL(training_fire);
  KERNEL(training_fire_backward);
  KERNEL(training_conv_backward);
}

STABLE_TORCH_LIBRARY_IMPL(fastconv, CompositeExplicitAutograd, m) {  // no tensor to choose a device by
  KERNEL(program_new);
}
