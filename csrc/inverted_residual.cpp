// inverted_residual, and separable: the same block without its expansion.
#include "csrc/ops.h"

namespace fastconv {

namespace {

struct Weights {
  OptionalTensor expand_panels, expand_bias;
  Tensor taps, depthwise_bias;
  std::vector<Tensor> squeeze_excite;
  Tensor project_panels, project_bias;
};

struct Activations {
  Activation expand, depthwise, squeeze, gate, project;
};

Tensor run(const char* op, const Tensor& x, const Weights& weights, const Activations& activations, const OptionalTensor& residual,
           const Ints& stride, const Ints& padding, Output output) {
  check_packed_image(op, x);
  const int64_t channels = weights.depthwise_bias.numel();
  check_taps(op, weights.taps, weights.depthwise_bias, channels, stride, padding);
  PackedPointwise expand{};
  if (weights.expand_panels) {
    check(weights.expand_bias.has_value(), op, "expand_bias must be given with expand_panels");
    check(weights.expand_panels->dim() == 3, op, "expand_panels must be (G, Cin, 16), got ", shape_of{*weights.expand_panels});
    check_channels(op, x, weights.expand_panels->size(1));
    const int64_t expanded = check_panels(op, "expand_panels", *weights.expand_panels, *weights.expand_bias, x.size(1));
    check(expanded == channels, op, "expand_panels must give the depthwise convolution's ", channels, " channels, got ", expanded);
    expand = {data(*weights.expand_panels), data(*weights.expand_bias), x.size(1), channels, activations.expand};
  } else {
    check_channels(op, x, channels);
  }
  const int64_t out_channels = check_panels(op, "project_panels", weights.project_panels, weights.project_bias, channels);
  SqueezeExcite gate{};
  if (!weights.squeeze_excite.empty()) {
    const std::vector<Tensor>& se = weights.squeeze_excite;
    check(se.size() == 4, op, "squeeze_excite must be empty or [reduce_panels, reduce_bias, expand_panels, expand_bias], got ", se.size(),
          " tensors");
    const int64_t reduced = check_panels(op, "squeeze_excite[0]", se[0], se[1], channels);
    check(check_panels(op, "squeeze_excite[2]", se[2], se[3], reduced) == channels, op, "squeeze_excite[2] must give ", channels,
          " channels");
    gate = {{data(se[0]), data(se[1]), channels, reduced, activations.squeeze},
            {data(se[2]), data(se[3]), reduced, channels, activations.gate}};
  }
  const Image in(x);
  const int64_t kernel = weights.taps.size(0) == 9 ? 3 : 5;
  const int64_t out_height = output_size(op, "height", in.h, kernel, stride[0], padding[0]);
  const int64_t out_width = output_size(op, "width", in.w, kernel, stride[1], padding[1]);
  std::optional<Image> added;
  if (residual) {
    check_residual(op, *residual, x, in.n, out_channels, out_height, out_width);
    added.emplace(*residual);
  }
  Result out(in.n, out_channels, out_height, out_width, x, output);
  const InvertedResidual block{in.data,
                               in.n,
                               in.h,
                               in.w,
                               in.c,
                               weights.expand_panels ? &expand : nullptr,
                               data(weights.taps),
                               data(weights.depthwise_bias),
                               channels,
                               kernel,
                               stride[0],
                               stride[1],
                               padding[0],
                               padding[1],
                               activations.depthwise,
                               weights.squeeze_excite.empty() ? nullptr : &gate,
                               {data(weights.project_panels), data(weights.project_bias), channels, out_channels, activations.project},
                               added ? added->data : nullptr,
                               out_height,
                               out_width,
                               out.data()};
  run_inverted_residual(block, parallel());
  return out.done();
}

void check_block(const char* op, const Tensor& x, const Tensor& depthwise_weight, const OptionalTensor& depthwise_bias, const char* last,
                 const Tensor& weight, const OptionalTensor& bias, const char* bias_name, int64_t channels, const Ints& stride,
                 const Ints& padding) {
  check_depthwise_weight(op, "depthwise_weight", depthwise_weight, channels, x);
  check_bias(op, "depthwise_bias", depthwise_bias, channels, x);
  check_pointwise_weight(op, last, weight, channels, x);
  check_bias(op, bias_name, bias, weight.size(0), x);
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  output_size(op, "height", x.size(2), depthwise_weight.size(2), stride[0], padding[0]);
  output_size(op, "width", x.size(3), depthwise_weight.size(3), stride[1], padding[1]);
}

}  // namespace

Tensor separable(Tensor x, Tensor depthwise_weight, OptionalTensor depthwise_bias, Tensor pointwise_weight, OptionalTensor pointwise_bias,
                 Ints stride, Ints padding, OptionalString depthwise_activation, OptionalString activation, OptionalTensor residual) {
  const char* op = "separable";
  check_image(op, x);
  check_block(op, x, depthwise_weight, depthwise_bias, "pointwise_weight", pointwise_weight, pointwise_bias, "pointwise_bias", x.size(1),
              stride, padding);
  const Activations activations{
      {}, parse_activation(op, "depthwise_activation", depthwise_activation), {}, {}, parse_activation(op, "activation", activation)};
  if (residual) {
    const int64_t kernel = depthwise_weight.size(2);
    check_residual(op, *residual, x, x.size(0), pointwise_weight.size(0),
                   output_size(op, "height", x.size(2), kernel, stride[0], padding[0]),
                   output_size(op, "width", x.size(3), kernel, stride[1], padding[1]));
  }
  if (!covered(op, x) || !depthwise_covers(depthwise_weight.size(2), stride, padding)) {
    const Tensor middle = aten::conv_act(x, depthwise_weight, depthwise_bias, stride, padding, x.size(1), depthwise_activation);
    return aten::formatted_like(aten::conv_act(middle, pointwise_weight, pointwise_bias, {1, 1}, {0, 0}, 1, activation, residual), x);
  }
  const Weights weights{std::nullopt,
                        std::nullopt,
                        pack_taps(depthwise_weight),
                        bias_or_zeros(depthwise_bias, x.size(1)),
                        {},
                        pack_panels(pointwise_weight),
                        bias_or_zeros(pointwise_bias, pointwise_weight.size(0))};
  return run(op, x, weights, activations, residual, stride, padding, Output::like_input);
}

Tensor inverted_residual(Tensor x, Tensor expand_weight, OptionalTensor expand_bias, Tensor depthwise_weight, OptionalTensor depthwise_bias,
                         Tensor project_weight, OptionalTensor project_bias, Ints stride, Ints padding, OptionalString activation,
                         bool residual) {
  const char* op = "inverted_residual";
  check_image(op, x);
  check_pointwise_weight(op, "expand_weight", expand_weight, x.size(1), x);
  const int64_t channels = expand_weight.size(0);
  check_bias(op, "expand_bias", expand_bias, channels, x);
  check_block(op, x, depthwise_weight, depthwise_bias, "project_weight", project_weight, project_bias, "project_bias", channels, stride,
              padding);
  const Activation parsed = parse_activation(op, "activation", activation);
  OptionalTensor added;
  if (residual) {
    const int64_t kernel = depthwise_weight.size(2);
    const int64_t out_height = output_size(op, "height", x.size(2), kernel, stride[0], padding[0]),
                  out_width = output_size(op, "width", x.size(3), kernel, stride[1], padding[1]);
    check(project_weight.size(0) == x.size(1) && out_height == x.size(2) && out_width == x.size(3), op,
          "residual needs an output of x's shape ", shape_of{x}, ", got (", x.size(0), ", ", project_weight.size(0), ", ", out_height, ", ",
          out_width, ")");
    added = x;
  }
  if (!covered(op, x) || !depthwise_covers(depthwise_weight.size(2), stride, padding)) {
    const Tensor expanded = aten::conv_act(x, expand_weight, expand_bias, {1, 1}, {0, 0}, 1, activation);
    const Tensor middle = aten::conv_act(expanded, depthwise_weight, depthwise_bias, stride, padding, channels, activation);
    return aten::formatted_like(aten::conv_act(middle, project_weight, project_bias, {1, 1}, {0, 0}, 1, std::nullopt, added), x);
  }
  const Weights weights{pack_panels(expand_weight),
                        bias_or_zeros(expand_bias, channels),
                        pack_taps(depthwise_weight),
                        bias_or_zeros(depthwise_bias, channels),
                        {},
                        pack_panels(project_weight),
                        bias_or_zeros(project_bias, project_weight.size(0))};
  return run(op, x, weights, {parsed, parsed, {}, {}, Activation::none}, added, stride, padding, Output::like_input);
}

Tensor inverted_residual_packed(Tensor x, OptionalTensor expand_panels, OptionalTensor expand_bias, Tensor taps, Tensor depthwise_bias,
                                std::vector<Tensor> squeeze_excite, Tensor project_panels, Tensor project_bias, OptionalTensor residual,
                                Ints stride, Ints padding, OptionalString expand_activation, OptionalString depthwise_activation,
                                OptionalString squeeze_activation, OptionalString gate_activation, OptionalString activation) {
  const char* op = "inverted_residual";
  const Activations activations{parse_activation(op, "expand_activation", expand_activation),
                                parse_activation(op, "depthwise_activation", depthwise_activation),
                                parse_activation(op, "squeeze_activation", squeeze_activation),
                                parse_activation(op, "gate_activation", gate_activation), parse_activation(op, "activation", activation)};
  return run(op, x, {expand_panels, expand_bias, taps, depthwise_bias, squeeze_excite, project_panels, project_bias}, activations, residual,
             stride, padding, Output::channels_last);
}

}  // namespace fastconv
