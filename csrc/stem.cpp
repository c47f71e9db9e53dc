#include "csrc/ops.h"

namespace fastconv {

namespace {

// A 1x1 convolution is not a stem: its panels are packed for the pointwise kernel.
bool covers(int64_t in_channels, int64_t kernel_h, int64_t kernel_w, const Ints& padding) {
  return in_channels > 0 && in_channels <= 4 && kernel_h <= 7 && kernel_w <= 7 && kernel_h * kernel_w > 1 && padding[0] < kernel_h &&
         padding[1] < kernel_w;
}

class StemStep : public Step {
 public:
  StemStep(Tensor panels, Tensor bias, Ints kernel, Ints stride, Ints padding, Activation activation,
           OptionalTensor winograd = std::nullopt)
      : panels_(std::move(panels)),
        bias_(std::move(bias)),
        kernel_(std::move(kernel)),
        stride_(std::move(stride)),
        padding_(std::move(padding)),
        activation_(activation),
        winograd_(std::move(winograd)) {
    check_pair(op(), "kernel_size", kernel_, 1);
    check_pair(op(), "stride", stride_, 1);
    check_pair(op(), "padding", padding_, 0);
    check(panels_.dim() == 3, op(), "panels must be (G, KH * KW * Cin, 16), got ", shape_of{panels_});
    in_channels_ = panels_.size(1) / (kernel_[0] * kernel_[1]);
    out_channels_ = check_panels(op(), "panels", panels_, bias_, kernel_[0] * kernel_[1] * in_channels_);
    if (!winograd_) return;
    check(in_channels_ == 3 && kernel_[1] == 7 && stride_[1] == 2, op(),
          "winograd goes with 3 channels, a kernel 7 wide and stride 2, got ", in_channels_, ", ", kernel_[1], " and ", stride_[1]);
    check_panels(op(), "winograd", *winograd_, bias_, STEM_POINTS * kernel_[0] * STEM_PLANES);
  }
  const char* op() const override { return "stem"; }
  Shape output(const Shape& in) const override {
    check_channels(op(), in, in_channels_);
    check(covers(in.c, kernel_[0], kernel_[1], padding_), op(),
          "x must have 1 to 4 channels, kernel_size be 2 to 7 and padding be below it, got ", in, ", (", kernel_[0], ", ", kernel_[1],
          ") and (", padding_[0], ", ", padding_[1], ")");
    return {in.n, out_channels_, output_size(op(), "height", in.h, kernel_[0], stride_[0], padding_[0]),
            output_size(op(), "width", in.w, kernel_[1], stride_[1], padding_[1])};
  }
  int64_t multiply_adds(const Shape& in, const Shape& out) const override { return kernel_[0] * kernel_[1] * in.c * out.n * out.image(); }
  bool reads_nchw() const override { return true; }
  bool makes_rows() const override { return true; }
  std::unique_ptr<RowSource> source(const Pixels& x, const Shape& shape, int64_t threads) const override {
    return std::make_unique<StemRows>(image(x, {nullptr, shape, 0}), x.shape.image(), threads);
  }
  bool reads_blocks() const override { return false; }
  void run(const Pixels& x, const Pixels&, const Target& out, const Parallel& parallel) const override {
    run_stem(image(x, out), x.shape.n, x.shape.image(), parallel);
  }

 private:
  Stem image(const Pixels& x, const Target& out) const {
    const Shape &in = x.shape, &shape = out.shape;
    const bool last = !x.nchw;
    return {x.data,
            last ? 1 : in.h * in.w,
            last ? in.w * in.c : in.w,
            last ? in.c : 1,
            in.h,
            in.w,
            in.c,
            shape.c,
            shape.h,
            shape.w,
            kernel_[0],
            kernel_[1],
            stride_[0],
            stride_[1],
            padding_[0],
            padding_[1],
            data(panels_),
            {data(bias_), nullptr, 0, activation_},
            out.data,
            out.strides,
            winograd_ ? data(*winograd_) : nullptr};
  }

  Tensor panels_, bias_;
  Ints kernel_, stride_, padding_;
  Activation activation_;
  OptionalTensor winograd_;
  int64_t in_channels_, out_channels_;
};

}  // namespace

StepPointer stem_step(Tensor panels, Tensor bias, Ints kernel_size, Ints stride, Ints padding, Activation activation,
                      OptionalTensor winograd) {
  return std::make_unique<StemStep>(std::move(panels), std::move(bias), std::move(kernel_size), std::move(stride), std::move(padding),
                                    activation, std::move(winograd));
}

Tensor stem(Tensor x, Tensor weight, OptionalTensor bias, Ints stride, Ints padding, OptionalString activation) {
  const char* op = "stem";
  check_image(op, x);
  check(weight.dim() == 4 && weight.size(1) == x.size(1) && weight.numel() > 0, op, "weight must be (Cout, ", x.size(1), ", KH, KW), got ",
        shape_of{weight});
  check_like(op, "weight", weight, x);
  check_bias(op, "bias", bias, weight.size(0), x);
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  const Activation parsed = parse_activation(op, "activation", activation);
  output_size(op, "height", x.size(2), weight.size(2), stride[0], padding[0]);
  output_size(op, "width", x.size(3), weight.size(3), stride[1], padding[1]);
  if (!covered(op, x) || !covers(x.size(1), weight.size(2), weight.size(3), padding))
    return aten::formatted_like(aten::conv_act(x, weight, bias, stride, padding, 1, activation), x);
  return run_step(
      StemStep(pack_panels(weight), bias_or_zeros(bias, weight.size(0)), {weight.size(2), weight.size(3)}, stride, padding, parsed), x,
      std::nullopt, Output::like_input);
}

Tensor stem_packed(Tensor x, Tensor panels, Tensor bias, Ints kernel_size, Ints stride, Ints padding, OptionalString activation,
                   OptionalTensor winograd) {
  return run_step(StemStep(panels, bias, kernel_size, stride, padding, parse_activation("stem", "activation", activation), winograd), x,
                  std::nullopt, Output::channels_last);
}

}  // namespace fastconv
