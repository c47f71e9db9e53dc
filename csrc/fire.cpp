// fire_expand and fire: both expands write their slices of the concatenated output.
#include "csrc/ops.h"

namespace fastconv {

namespace {

void check_expand3x3(const char* op, const Tensor& weight, int64_t squeezed, const Tensor& x) {
  const bool fits = weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) == squeezed && weight.size(2) == 3 && weight.size(3) == 3;
  check(fits, op, "weight3x3 must be (Cout, ", squeezed, ", 3, 3), got ", shape_of{weight});
  check_like(op, "weight3x3", weight, x);
}

Tensor aten_expand(const Tensor& x, const Tensor& weight1x1, const OptionalTensor& bias1x1, const Tensor& weight3x3,
                   const OptionalTensor& bias3x3) {
  return aten::cat_channels(aten::conv_act(x, weight1x1, bias1x1, {1, 1}, {0, 0}, 1, "relu"),
                            aten::conv_act(x, weight3x3, bias3x3, {1, 1}, {1, 1}, 1, "relu"));
}

class FireExpandStep : public Step {
 public:
  FireExpandStep(Tensor panels1x1, Tensor bias1x1, Tensor panels3x3, Tensor bias3x3)
      : panels1x1_(std::move(panels1x1)), bias1x1_(std::move(bias1x1)), panels3x3_(std::move(panels3x3)), bias3x3_(std::move(bias3x3)) {
    check(panels1x1_.dim() == 3, op(), "panels1x1 must be (G, Cin, 16), got ", shape_of{panels1x1_});
    in_channels_ = panels1x1_.size(1);
    out1_ = check_panels(op(), "panels1x1", panels1x1_, bias1x1_, in_channels_);
    out3_ = check_panels(op(), "panels3x3", panels3x3_, bias3x3_, in_channels_ * 9);
    zeros_ = zeros(in_channels_);
  }
  const char* op() const override { return "fire_expand"; }
  Shape output(const Shape& in) const override {
    check_channels(op(), in, in_channels_);
    check_some_pixels(op(), in);
    return {in.n, out1_ + out3_, in.h, in.w};
  }
  int64_t multiply_adds(const Shape& in, const Shape&) const override { return in.n * in.image() * (out1_ + 9 * out3_); }
  bool reads_blocks() const override { return false; }
  bool writes_blocks() const override { return out1_ % PANEL == 0; }
  void run(const Pixels& x, const Pixels&, const Target& out, const Parallel& parallel) const override {
    const auto [n, c, h, w] = x.shape;
    run_pointwise({x.data, c, c, out1_, data(panels1x1_), {data(bias1x1_), nullptr, 0, Activation::relu}, out.data, out.strides}, n * h * w,
                  parallel);
    const Epilogue epilogue{data(bias3x3_), nullptr, 0, Activation::relu};
    float* const second = out.data + out.strides.at(0, out1_);
    run_conv({x.data, c, h, w, c, out3_, h, w, 3, 3, 1, 1, 1, 1, data(panels3x3_), data(zeros_), epilogue, second, out.strides}, n,
             parallel);
  }

 private:
  Tensor panels1x1_, bias1x1_, panels3x3_, bias3x3_, zeros_;
  int64_t in_channels_, out1_, out3_;
};

class FireStep : public Step {
 public:
  FireStep(Tensor squeeze_panels, Tensor squeeze_bias, Tensor panels1x1, Tensor bias1x1, Tensor panels3x3, Tensor bias3x3,
           OptionalTensor winograd3x3)
      : squeeze_panels_(std::move(squeeze_panels)),
        squeeze_bias_(std::move(squeeze_bias)),
        panels1x1_(std::move(panels1x1)),
        bias1x1_(std::move(bias1x1)),
        panels3x3_(std::move(panels3x3)),
        bias3x3_(std::move(bias3x3)),
        winograd3x3_(std::move(winograd3x3)) {
    call_.squeeze = check_pointwise(op(), "squeeze_panels", squeeze_panels_, squeeze_bias_, 0, Activation::relu);
    squeezed_ = call_.squeeze.out_channels;
    call_.expand1x1 = check_pointwise(op(), "panels1x1", panels1x1_, bias1x1_, squeezed_, Activation::relu);
    out1_ = call_.expand1x1.out_channels;
    for (const PackedPointwise* weights : {&call_.squeeze, &call_.expand1x1})
      check(weights->packing != Packing::strassen, op(), "its panels cannot be packed for Strassen's algorithm");
    out3_ = check_panels(op(), "panels3x3", panels3x3_, bias3x3_, squeezed_ * 9);
    if (winograd3x3_) check_panels(op(), "winograd3x3", *winograd3x3_, bias3x3_, squeezed_ * 36);
    call_.panels3x3 = data(panels3x3_);
    call_.winograd3x3 = winograd3x3_ ? data(*winograd3x3_) : nullptr;
    call_.bias3x3 = data(bias3x3_);
    call_.expand3x3_channels = out3_;
  }
  const char* op() const override { return "fire"; }
  Shape output(const Shape& in) const override {
    check_channels(op(), in, call_.squeeze.in_channels);
    check_some_pixels(op(), in);
    return {in.n, out1_ + out3_, in.h, in.w};
  }
  int64_t multiply_adds(const Shape& in, const Shape&) const override {
    return in.n * in.h * in.w * squeezed_ * (in.c + out1_ + 9 * out3_);
  }
  bool writes_blocks() const override { return out1_ % PANEL == 0; }
  void run(const Pixels& x, const Pixels&, const Target& out, const Parallel& parallel) const override {
    Fire call = call_;
    call.x = x.data, call.x_strides = x.strides;
    call.batch = x.shape.n, call.height = x.shape.h, call.width = x.shape.w;
    call.out = out.data, call.out_strides = out.strides;
    run_fire(call, parallel);
  }

 private:
  Tensor squeeze_panels_, squeeze_bias_, panels1x1_, bias1x1_, panels3x3_, bias3x3_;
  OptionalTensor winograd3x3_;
  Fire call_{};  // all of it that does not depend on the image
  int64_t squeezed_, out1_, out3_;
};

}  // namespace

StepPointer fire_expand_step(Tensor panels1x1, Tensor bias1x1, Tensor panels3x3, Tensor bias3x3) {
  return std::make_unique<FireExpandStep>(std::move(panels1x1), std::move(bias1x1), std::move(panels3x3), std::move(bias3x3));
}
StepPointer fire_step(Tensor squeeze_panels, Tensor squeeze_bias, Tensor panels1x1, Tensor bias1x1, Tensor panels3x3, Tensor bias3x3,
                      OptionalTensor winograd3x3) {
  return std::make_unique<FireStep>(std::move(squeeze_panels), std::move(squeeze_bias), std::move(panels1x1), std::move(bias1x1),
                                    std::move(panels3x3), std::move(bias3x3), std::move(winograd3x3));
}

Tensor fire_expand(Tensor x, Tensor weight1x1, OptionalTensor bias1x1, Tensor weight3x3, OptionalTensor bias3x3) {
  const char* op = "fire_expand";
  check_image(op, x);
  check_pointwise_weight(op, "weight1x1", weight1x1, x.size(1), x);
  check_bias(op, "bias1x1", bias1x1, weight1x1.size(0), x);
  check_expand3x3(op, weight3x3, x.size(1), x);
  check_bias(op, "bias3x3", bias3x3, weight3x3.size(0), x);
  check_some_pixels(op, shape_like(x));
  if (!covered(op, x)) return aten::formatted_like(aten_expand(x, weight1x1, bias1x1, weight3x3, bias3x3), x);
  return run_step(FireExpandStep(pack_panels(weight1x1), bias_or_zeros(bias1x1, weight1x1.size(0)), pack_panels(weight3x3),
                                 bias_or_zeros(bias3x3, weight3x3.size(0))),
                  x, std::nullopt, Output::like_input);
}

Tensor fire_expand_packed(Tensor x, Tensor panels1x1, Tensor bias1x1, Tensor panels3x3, Tensor bias3x3) {
  return run_step(FireExpandStep(panels1x1, bias1x1, panels3x3, bias3x3), x, std::nullopt, Output::channels_last);
}

Tensor fire(Tensor x, Tensor squeeze_weight, OptionalTensor squeeze_bias, Tensor weight1x1, OptionalTensor bias1x1, Tensor weight3x3,
            OptionalTensor bias3x3) {
  const char* op = "fire";
  check_image(op, x);
  check_pointwise_weight(op, "squeeze_weight", squeeze_weight, x.size(1), x);
  const int64_t squeezed = squeeze_weight.size(0);
  check_bias(op, "squeeze_bias", squeeze_bias, squeezed, x);
  check_pointwise_weight(op, "weight1x1", weight1x1, squeezed, x);
  check_bias(op, "bias1x1", bias1x1, weight1x1.size(0), x);
  check_expand3x3(op, weight3x3, squeezed, x);
  check_bias(op, "bias3x3", bias3x3, weight3x3.size(0), x);
  check_some_pixels(op, shape_like(x));
  if (!covered(op, x)) {
    const Tensor squeeze = aten::conv_act(x, squeeze_weight, squeeze_bias, {1, 1}, {0, 0}, 1, "relu");
    return aten::formatted_like(aten_expand(squeeze, weight1x1, bias1x1, weight3x3, bias3x3), x);
  }
  return run_step(
      FireStep(pack_panels(squeeze_weight), bias_or_zeros(squeeze_bias, squeezed), pack_panels(weight1x1),
               bias_or_zeros(bias1x1, weight1x1.size(0)), pack_panels(weight3x3), bias_or_zeros(bias3x3, weight3x3.size(0)), std::nullopt),
      x, std::nullopt, Output::like_input);
}

Tensor fire_packed(Tensor x, Tensor squeeze_panels, Tensor squeeze_bias, Tensor panels1x1, Tensor bias1x1, Tensor panels3x3, Tensor bias3x3,
                   OptionalTensor winograd3x3) {
  return run_step(FireStep(squeeze_panels, squeeze_bias, panels1x1, bias1x1, panels3x3, bias3x3, winograd3x3), x, std::nullopt,
                  Output::channels_last);
}

}  // namespace fastconv
