#include "csrc/ops.h"

namespace fastconv {

namespace {

Tensor run(const char* op, const Tensor& x, const Tensor& taps, const Tensor& bias, const Ints& stride, const Ints& padding,
           Activation activation, Output output) {
  const Image in(x);
  const int64_t kernel = taps.size(0) == 9 ? 3 : 5;
  const int64_t out_height = output_size(op, "height", in.h, kernel, stride[0], padding[0]);
  const int64_t out_width = output_size(op, "width", in.w, kernel, stride[1], padding[1]);
  Result out(in.n, in.c, out_height, out_width, x, output);
  const Depthwise image{in.data,    in.c,      in.w * in.c,     in.h,       in.h,       in.w,       in.c,       out_width,
                        kernel,     stride[0], stride[1],       padding[0], padding[1], data(taps), data(bias), activation,
                        out.data(), in.c,      out_width * in.c};
  run_depthwise(image, in.n, out_height, parallel());
  return out.done();
}

}  // namespace

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
  return run(op, x, pack_taps(weight), bias_or_zeros(bias, x.size(1)), stride, padding, parsed, Output::like_input);
}

Tensor depthwise_packed(Tensor x, Tensor taps, Tensor bias, Ints stride, Ints padding, OptionalString activation) {
  const char* op = "depthwise";
  check_packed_image(op, x);
  check(taps.dim() == 2, op, "taps must be (K * K, C), got ", shape_of{taps});
  check_channels(op, x, taps.size(1));
  check_taps(op, taps, bias, x.size(1), stride, padding);
  return run(op, x, taps, bias, stride, padding, parse_activation(op, "activation", activation), Output::channels_last);
}

}  // namespace fastconv
