#include "csrc/ops.h"

namespace fastconv {

namespace {

Tensor run(const char* op, const Tensor& x, const Tensor& panels, const Tensor& bias, const Ints& kernel, const Ints& stride,
           const Ints& padding, Activation activation, Output output) {
  check_packed_image(op, x);
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  const int64_t out_channels = check_panels(op, "panels", panels, bias, kernel[0] * kernel[1] * c);
  const int64_t out_height = output_size(op, "height", h, kernel[0], stride[0], padding[0]);
  const int64_t out_width = output_size(op, "width", w, kernel[1], stride[1], padding[1]);
  const bool direct = is_channels_last(x) || x.is_contiguous();  // both orders are read as they are
  const Tensor in = direct ? x : torch::stable::contiguous(x);
  const bool channels_last = is_channels_last(in);
  Result out(n, out_channels, out_height, out_width, x, output);
  const Stem image{data(in),
                   channels_last ? 1 : h * w,
                   channels_last ? w * c : w,
                   channels_last ? c : 1,
                   h,
                   w,
                   c,
                   out_channels,
                   out_height,
                   out_width,
                   kernel[0],
                   kernel[1],
                   stride[0],
                   stride[1],
                   padding[0],
                   padding[1],
                   data(panels),
                   {data(bias), nullptr, 0, activation},
                   out.data(),
                   out_channels};
  run_stem(image, n, c * h * w, parallel());
  return out.done();
}

// A 1x1 convolution is not a stem: its panels are packed for the pointwise kernel.
bool covers(int64_t in_channels, int64_t kernel_h, int64_t kernel_w) {
  return in_channels > 0 && in_channels <= 4 && kernel_h <= 7 && kernel_w <= 7 && kernel_h * kernel_w > 1;
}

}  // namespace

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
  if (!covered(op, x) || !covers(x.size(1), weight.size(2), weight.size(3)))
    return aten::formatted_like(aten::conv_act(x, weight, bias, stride, padding, 1, activation), x);
  return run(op, x, pack_panels(weight), bias_or_zeros(bias, weight.size(0)), {weight.size(2), weight.size(3)}, stride, padding, parsed,
             Output::like_input);
}

Tensor stem_packed(Tensor x, Tensor panels, Tensor bias, Ints kernel_size, Ints stride, Ints padding, OptionalString activation) {
  const char* op = "stem";
  check_image(op, x);
  check_pair(op, "kernel_size", kernel_size, 1);
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check(panels.dim() == 3, op, "panels must be (G, KH * KW * Cin, 16), got ", shape_of{panels});
  check_channels(op, x, panels.size(1) / (kernel_size[0] * kernel_size[1]));
  check(covers(x.size(1), kernel_size[0], kernel_size[1]), op, "x must have 1 to 4 channels and kernel_size be 2 to 7, got ", shape_of{x},
        " and (", kernel_size[0], ", ", kernel_size[1], ")");
  return run(op, x, panels, bias, kernel_size, stride, padding, parse_activation(op, "activation", activation), Output::channels_last);
}

}  // namespace fastconv
