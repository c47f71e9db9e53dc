// What the kernels do not cover runs through ATen: the same functions, composed of ATen's operators, for any dtype.
#pragma once

#include "csrc/tensor.h"

namespace fastconv::aten {

Tensor conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Ints& stride, const Ints& padding, int64_t groups);
enum class ConvGradient { input, weight };
Tensor conv_backward(ConvGradient which, const Tensor& grad, const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding,
                     int64_t groups);
Tensor activate(const Tensor& x, const OptionalString& activation);
Tensor add(const Tensor& x, const Tensor& y);
Tensor cat_channels(const Tensor& x, const Tensor& y);
Tensor max_pool(const Tensor& x, const Ints& stride, const Ints& padding, bool ceil_mode);
Tensor global_avg_pool(const Tensor& x);
Tensor formatted_like(const Tensor& result, const Tensor& x);  // in x's memory format

// activation(conv(x) + bias + residual)
Tensor conv_act(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Ints& stride, const Ints& padding, int64_t groups,
                const OptionalString& activation, const OptionalTensor& residual = std::nullopt);

}  // namespace fastconv::aten
