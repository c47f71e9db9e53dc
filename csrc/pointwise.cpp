#include "csrc/ops.h"

namespace fastconv {

Tensor pointwise_packed(Tensor x, Tensor panels, Tensor bias, OptionalTensor residual, OptionalString activation) {
  const char* op = "pointwise";
  return run_pointwise(op, x, panels, bias, residual, parse_activation(op, "activation", activation), Output::channels_last);
}

Tensor run_pointwise(const char* op, const Tensor& x, const Tensor& panels, const Tensor& bias, const OptionalTensor& residual,
                     Activation activation, Output output) {
  check_packed_image(op, x);
  check(panels.dim() == 3, op, "panels must be (G, Cin, 16), got ", shape_of{panels});
  check_channels(op, x, panels.size(1));
  const int64_t out_channels = check_panels(op, "panels", panels, bias, x.size(1));
  const Image in(x);
  std::optional<Image> added;
  if (residual) {
    check_residual(op, *residual, x, in.n, out_channels, in.h, in.w);
    added.emplace(*residual);
  }
  Result out(in.n, out_channels, in.h, in.w, x, output);
  const Pointwise call{in.data,      in.c,         in.c,
                       out_channels, data(panels), {data(bias), added ? added->data : nullptr, out_channels, activation},
                       out.data(),   out_channels};
  run_pointwise(call, in.n * in.h * in.w, parallel());
  return out.done();
}

Tensor pointwise(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor residual, OptionalString activation) {
  const char* op = "pointwise";
  check_image(op, x);
  check_pointwise_weight(op, "weight", weight, x.size(1), x);
  check_bias(op, "bias", bias, weight.size(0), x);
  if (residual) check_residual(op, *residual, x, x.size(0), weight.size(0), x.size(2), x.size(3));
  const Activation parsed = parse_activation(op, "activation", activation);
  if (!covered(op, x)) return aten::formatted_like(aten::conv_act(x, weight, bias, {1, 1}, {0, 0}, 1, activation, residual), x);
  return run_pointwise(op, x, pack_panels(weight), bias_or_zeros(bias, weight.size(0)), residual, parsed, Output::like_input);
}

}  // namespace fastconv
