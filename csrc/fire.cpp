// fire_expand and fire: both expands write their slices of the concatenated output.
#include "csrc/ops.h"

namespace fastconv {

namespace {

void check_expand3x3(const char* op, const Tensor& weight, int64_t squeezed, const Tensor& x) {
  const bool fits = weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) == squeezed && weight.size(2) == 3 && weight.size(3) == 3;
  check(fits, op, "weight3x3 must be (Cout, ", squeezed, ", 3, 3), got ", shape_of{weight});
  check_like(op, "weight3x3", weight, x);
}

void check_some_pixels(const char* op, const Tensor& x) {
  check(x.size(2) > 0 && x.size(3) > 0, op, "x has no output pixels: ", shape_of{x});
}

Tensor aten_expand(const Tensor& x, const Tensor& weight1x1, const OptionalTensor& bias1x1, const Tensor& weight3x3,
                   const OptionalTensor& bias3x3) {
  return aten::cat_channels(aten::conv_act(x, weight1x1, bias1x1, {1, 1}, {0, 0}, 1, "relu"),
                            aten::conv_act(x, weight3x3, bias3x3, {1, 1}, {1, 1}, 1, "relu"));
}

Tensor run_expand(const char* op, const Tensor& x, const Tensor& panels1x1, const Tensor& bias1x1, const Tensor& panels3x3,
                  const Tensor& bias3x3, Output output) {
  check_packed_image(op, x);
  check(panels1x1.dim() == 3, op, "panels1x1 must be (G, Cin, 16), got ", shape_of{panels1x1});
  check_channels(op, x, panels1x1.size(1));
  check_some_pixels(op, x);
  const int64_t out1 = check_panels(op, "panels1x1", panels1x1, bias1x1, x.size(1)),
                out3 = check_panels(op, "panels3x3", panels3x3, bias3x3, x.size(1) * 9);
  const Image in(x);
  Result out(in.n, out1 + out3, in.h, in.w, x, output);
  const Tensor zero = zeros(in.c);
  const int64_t stride = out1 + out3;
  run_pointwise(Pointwise{in.data, in.c, in.c, out1, data(panels1x1), {data(bias1x1), nullptr, 0, Activation::relu}, out.data(), stride},
                in.n * in.h * in.w, parallel());
  const Conv image{in.data,
                   in.c,
                   in.h,
                   in.w,
                   in.c,
                   out3,
                   in.h,
                   in.w,
                   3,
                   3,
                   1,
                   1,
                   1,
                   1,
                   data(panels3x3),
                   data(zero),
                   {data(bias3x3), nullptr, 0, Activation::relu},
                   out.data() + out1,
                   stride};
  run_conv(image, in.n, parallel());
  return out.done();
}

Tensor run(const char* op, const Tensor& x, const Tensor& squeeze_panels, const Tensor& squeeze_bias, const Tensor& panels1x1,
           const Tensor& bias1x1, const Tensor& panels3x3, const Tensor& bias3x3, const OptionalTensor& winograd3x3, Output output) {
  check_packed_image(op, x);
  check(squeeze_panels.dim() == 3, op, "squeeze_panels must be (G, Cin, 16), got ", shape_of{squeeze_panels});
  check_channels(op, x, squeeze_panels.size(1));
  check_some_pixels(op, x);
  const int64_t squeezed = check_panels(op, "squeeze_panels", squeeze_panels, squeeze_bias, x.size(1));
  const int64_t out1 = check_panels(op, "panels1x1", panels1x1, bias1x1, squeezed),
                out3 = check_panels(op, "panels3x3", panels3x3, bias3x3, squeezed * 9);
  if (winograd3x3) check_panels(op, "winograd3x3", *winograd3x3, bias3x3, squeezed * 36);
  const Image in(x);
  Result out(in.n, out1 + out3, in.h, in.w, x, output);
  const Fire call{in.data,
                  in.n,
                  in.h,
                  in.w,
                  {data(squeeze_panels), data(squeeze_bias), in.c, squeezed, Activation::relu},
                  {data(panels1x1), data(bias1x1), squeezed, out1, Activation::relu},
                  data(panels3x3),
                  winograd3x3 ? data(*winograd3x3) : nullptr,
                  data(bias3x3),
                  out3,
                  out.data()};
  run_fire(call, parallel());
  return out.done();
}

}  // namespace

Tensor fire_expand(Tensor x, Tensor weight1x1, OptionalTensor bias1x1, Tensor weight3x3, OptionalTensor bias3x3) {
  const char* op = "fire_expand";
  check_image(op, x);
  check_pointwise_weight(op, "weight1x1", weight1x1, x.size(1), x);
  check_bias(op, "bias1x1", bias1x1, weight1x1.size(0), x);
  check_expand3x3(op, weight3x3, x.size(1), x);
  check_bias(op, "bias3x3", bias3x3, weight3x3.size(0), x);
  check_some_pixels(op, x);
  if (!covered(op, x)) return aten::formatted_like(aten_expand(x, weight1x1, bias1x1, weight3x3, bias3x3), x);
  return run_expand(op, x, pack_panels(weight1x1), bias_or_zeros(bias1x1, weight1x1.size(0)), pack_panels(weight3x3),
                    bias_or_zeros(bias3x3, weight3x3.size(0)), Output::like_input);
}

Tensor fire_expand_packed(Tensor x, Tensor panels1x1, Tensor bias1x1, Tensor panels3x3, Tensor bias3x3) {
  return run_expand("fire_expand", x, panels1x1, bias1x1, panels3x3, bias3x3, Output::channels_last);
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
  check_some_pixels(op, x);
  if (!covered(op, x)) {
    const Tensor squeeze = aten::conv_act(x, squeeze_weight, squeeze_bias, {1, 1}, {0, 0}, 1, "relu");
    return aten::formatted_like(aten_expand(squeeze, weight1x1, bias1x1, weight3x3, bias3x3), x);
  }
  return run(op, x, pack_panels(squeeze_weight), bias_or_zeros(squeeze_bias, squeezed), pack_panels(weight1x1),
             bias_or_zeros(bias1x1, weight1x1.size(0)), pack_panels(weight3x3), bias_or_zeros(bias3x3, weight3x3.size(0)), std::nullopt,
             Output::like_input);
}

Tensor fire_packed(Tensor x, Tensor squeeze_panels, Tensor squeeze_bias, Tensor panels1x1, Tensor bias1x1, Tensor panels3x3, Tensor bias3x3,
                   OptionalTensor winograd3x3) {
  return run("fire", x, squeeze_panels, squeeze_bias, panels1x1, bias1x1, panels3x3, bias3x3, winograd3x3, Output::channels_last);
}

}  // namespace fastconv
