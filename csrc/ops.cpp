// The operator table: every schema, and the CPU implementation behind it.
#include "csrc/ops.h"

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
  in_parallel(step.multiply_adds(in, out), [&](const Parallel& parallel) {
    step.run({image.data, in, in.c, direct}, channels_last(added ? added->data : nullptr, out), channels_last(result.data(), out),
             parallel);
  });
  return result.done();
}

}  // namespace fastconv

STABLE_TORCH_LIBRARY(fastconv, m) {
#define SCHEMA(text) m.def(text);
#include "fastconv/schemas.inc"
#undef SCHEMA
}

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) {
  m.impl("depthwise", TORCH_BOX(&fastconv::depthwise));
  m.impl("pointwise", TORCH_BOX(&fastconv::pointwise));
  m.impl("fire_expand", TORCH_BOX(&fastconv::fire_expand));
  m.impl("fire", TORCH_BOX(&fastconv::fire));
  m.impl("separable", TORCH_BOX(&fastconv::separable));
  m.impl("inverted_residual", TORCH_BOX(&fastconv::inverted_residual));
  m.impl("stem", TORCH_BOX(&fastconv::stem));
  m.impl("max_pool", TORCH_BOX(&fastconv::max_pool));
  m.impl("global_avg_pool", TORCH_BOX(&fastconv::global_avg_pool));
  m.impl("depthwise_backward_input", TORCH_BOX(&fastconv::depthwise_backward_input));
  m.impl("depthwise_backward_weight", TORCH_BOX(&fastconv::depthwise_backward_weight));
  m.impl("pack_panels", TORCH_BOX(static_cast<fastconv::Tensor (*)(const fastconv::Tensor&)>(&fastconv::pack_panels)));
  m.impl("pack_winograd", TORCH_BOX(static_cast<fastconv::Tensor (*)(const fastconv::Tensor&)>(&fastconv::pack_winograd)));
  m.impl("pack_taps", TORCH_BOX(static_cast<fastconv::Tensor (*)(const fastconv::Tensor&)>(&fastconv::pack_taps)));
  m.impl("depthwise_packed", TORCH_BOX(&fastconv::depthwise_packed));
  m.impl("pointwise_packed", TORCH_BOX(&fastconv::pointwise_packed));
  m.impl("fire_expand_packed", TORCH_BOX(&fastconv::fire_expand_packed));
  m.impl("fire_packed", TORCH_BOX(&fastconv::fire_packed));
  m.impl("inverted_residual_packed", TORCH_BOX(&fastconv::inverted_residual_packed));
  m.impl("stem_packed", TORCH_BOX(&fastconv::stem_packed));
  m.impl("network", TORCH_BOX(&fastconv::network));
  m.impl("program_run", TORCH_BOX(&fastconv::program_run));
  m.impl("training_conv", TORCH_BOX(&fastconv::training_conv));
  m.impl("training_activated", TORCH_BOX(&fastconv::training_activated));
  m.impl("training_means", TORCH_BOX(&fastconv::training_means));
  m.impl("training_gradient_sums", TORCH_BOX(&fastconv::training_gradient_sums));
  m.impl("training_max_pool_backward", TORCH_BOX(&fastconv::training_max_pool_backward));
  m.impl("training_fire", TORCH_BOX(&fastconv::training_fire));
  m.impl("training_fire_backward", TORCH_BOX(&fastconv::training_fire_backward));
  m.impl("training_conv_backward", TORCH_BOX(&fastconv::training_conv_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fastconv, CompositeExplicitAutograd, m) {  // no tensor to choose a device by
  m.impl("program_new", TORCH_BOX(&fastconv::program_new));
}
