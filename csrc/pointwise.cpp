#include "csrc/ops.h"

namespace fastconv {

namespace {

class PointwiseStep : public Step {
 public:
  PointwiseStep(Tensor panels, Tensor bias, Activation activation) : panels_(std::move(panels)), bias_(std::move(bias)) {
    weights_ = check_pointwise(op(), "panels", panels_, bias_, 0, activation);
  }
  const char* op() const override { return "pointwise"; }
  Shape output(const Shape& in) const override {
    check_channels(op(), in, weights_.in_channels);
    check_some_pixels(op(), in);
    return {in.n, weights_.out_channels, in.h, in.w};
  }
  int64_t multiply_adds(const Shape& in, const Shape& out) const override { return in.c * out.n * out.image(); }
  const PackedPointwise* streams(const Shape& in) const override { return in.h * in.w == 1 ? &weights_ : nullptr; }
  void run(const Pixels& x, const Pixels& residual, const Target& out, const Parallel& parallel) const override {
    const Epilogue epilogue{weights_.bias, residual.data, residual.strides, weights_.activation};
    Pointwise call{x.data, x.strides, x.shape.c, weights_.out_channels, weights_.panels, epilogue, out.data, out.strides};
    call.packing = weights_.packing;
    call.pairs_within = pairs_within(out.shape.h * out.shape.w, out.shape.h * out.shape.w);
    run_pointwise(call, out.shape.n * out.shape.h * out.shape.w, parallel);
  }

 private:
  Tensor panels_, bias_;
  PackedPointwise weights_;
};

}  // namespace

StepPointer pointwise_step(Tensor panels, Tensor bias, Activation activation) {
  return std::make_unique<PointwiseStep>(std::move(panels), std::move(bias), activation);
}

Tensor pointwise_packed(Tensor x, Tensor panels, Tensor bias, OptionalTensor residual, OptionalString activation) {
  return run_step(PointwiseStep(panels, bias, parse_activation("pointwise", "activation", activation)), x, residual, Output::channels_last);
}

Tensor pointwise(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor residual, OptionalString activation) {
  const char* op = "pointwise";
  check_image(op, x);
  check_pointwise_weight(op, "weight", weight, x.size(1), x);
  check_bias(op, "bias", bias, weight.size(0), x);
  if (residual) check_residual(op, *residual, x, x.size(0), weight.size(0), x.size(2), x.size(3));
  const Activation parsed = parse_activation(op, "activation", activation);
  if (!covered(op, x)) return aten::formatted_like(aten::conv_act(x, weight, bias, {1, 1}, {0, 0}, 1, activation, residual), x);
  return run_step(PointwiseStep(pack_panels(weight), bias_or_zeros(bias, weight.size(0)), parsed), x, residual, Output::like_input);
}

}  // namespace fastconv
