#include "csrc/ops.h"

namespace fastconv {

namespace {

class DepthwiseStep : public Step {
 public:
  DepthwiseStep(Tensor taps, Tensor bias, Ints stride, Ints padding, Activation activation)
      : taps_(std::move(taps)), bias_(std::move(bias)), stride_(std::move(stride)), padding_(std::move(padding)), activation_(activation) {
    check(taps_.dim() == 2, op(), "taps must be (K * K, C), got ", shape_of{taps_});
    check_taps(op(), taps_, bias_, taps_.size(1), stride_, padding_);
    kernel_ = taps_.size(0) == 9 ? 3 : 5;
  }
  const char* op() const override { return "depthwise"; }
  Shape output(const Shape& in) const override {
    check_channels(op(), in, taps_.size(1));
    return {in.n, in.c, output_size(op(), "height", in.h, kernel_, stride_[0], padding_[0]),
            output_size(op(), "width", in.w, kernel_, stride_[1], padding_[1])};
  }
  int64_t multiply_adds(const Shape&, const Shape& out) const override { return kernel_ * kernel_ * out.n * out.image(); }
  void run(const Pixels& x, const Pixels&, const Target& out, const Parallel& parallel) const override {
    const Shape &in = x.shape, &shape = out.shape;
    const Depthwise image{x.data,
                          x.strides,
                          in.w * x.strides.pixel,
                          in.h,
                          in.h,
                          in.w,
                          in.c,
                          shape.w,
                          kernel_,
                          stride_[0],
                          stride_[1],
                          padding_[0],
                          padding_[1],
                          data(taps_),
                          data(bias_),
                          activation_,
                          out.data,
                          out.strides,
                          shape.w * out.strides.pixel};
    run_depthwise(image, in.n, shape.h, parallel);
  }

 private:
  Tensor taps_, bias_;
  Ints stride_, padding_;
  Activation activation_;
  int64_t kernel_;
};

}  // namespace

StepPointer depthwise_step(Tensor taps, Tensor bias, Ints stride, Ints padding, Activation activation) {
  return std::make_unique<DepthwiseStep>(std::move(taps), std::move(bias), std::move(stride), std::move(padding), activation);
}

bool depthwise_covers(int64_t kernel, const Ints& stride, const Ints& padding) {
  return stride[1] <= 2 && padding[0] < kernel && padding[1] < kernel;
}

Tensor depthwise(Tensor x, Tensor weight, OptionalTensor bias, Ints stride, Ints padding, OptionalString activation) {
  const char* op = "depthwise";
  check_image(op, x);
  check_depthwise_weight(op, "weight", weight, x.size(1), x);
  check_bias(op, "bias", bias, x.size(1), x);
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  const Activation parsed = parse_activation(op, "activation", activation);
  output_size(op, "height", x.size(2), weight.size(2), stride[0], padding[0]);
  output_size(op, "width", x.size(3), weight.size(3), stride[1], padding[1]);
  if (!covered(op, x) || !depthwise_covers(weight.size(2), stride, padding))
    return aten::formatted_like(aten::conv_act(x, weight, bias, stride, padding, x.size(1), activation), x);
  return run_step(DepthwiseStep(pack_taps(weight), bias_or_zeros(bias, x.size(1)), stride, padding, parsed), x, std::nullopt,
                  Output::like_input);
}

Tensor depthwise_packed(Tensor x, Tensor taps, Tensor bias, Ints stride, Ints padding, OptionalString activation) {
  return run_step(DepthwiseStep(taps, bias, stride, padding, parse_activation("depthwise", "activation", activation)), x, std::nullopt,
                  Output::channels_last);
}

}  // namespace fastconv
