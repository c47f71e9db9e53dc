// Every operator's CPU implementation, in the order of fastconv/schemas.inc, and the checks they share.
#pragma once

#include <tuple>

#include "csrc/aten.h"
#include "csrc/steps.h"
#include "csrc/tensor.h"

namespace fastconv {

Tensor depthwise(Tensor x, Tensor weight, OptionalTensor bias, Ints stride, Ints padding, OptionalString activation);
Tensor pointwise(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor residual, OptionalString activation);
Tensor fire_expand(Tensor x, Tensor weight1x1, OptionalTensor bias1x1, Tensor weight3x3, OptionalTensor bias3x3);
Tensor fire(Tensor x, Tensor squeeze_weight, OptionalTensor squeeze_bias, Tensor weight1x1, OptionalTensor bias1x1, Tensor weight3x3,
            OptionalTensor bias3x3);
Tensor separable(Tensor x, Tensor depthwise_weight, OptionalTensor depthwise_bias, Tensor pointwise_weight, OptionalTensor pointwise_bias,
                 Ints stride, Ints padding, OptionalString depthwise_activation, OptionalString activation, OptionalTensor residual);
Tensor inverted_residual(Tensor x, Tensor expand_weight, OptionalTensor expand_bias, Tensor depthwise_weight, OptionalTensor depthwise_bias,
                         Tensor project_weight, OptionalTensor project_bias, Ints stride, Ints padding, OptionalString activation,
                         bool residual);
Tensor stem(Tensor x, Tensor weight, OptionalTensor bias, Ints stride, Ints padding, OptionalString activation);
Tensor max_pool(Tensor x, Ints stride, Ints padding, bool ceil_mode);
Tensor global_avg_pool(Tensor x);
Tensor depthwise_backward_input(Tensor grad, Tensor weight, Ints input_size, Ints stride, Ints padding);
Tensor depthwise_backward_weight(Tensor grad, Tensor x, Ints kernel_size, Ints stride, Ints padding);

Tensor depthwise_packed(Tensor x, Tensor taps, Tensor bias, Ints stride, Ints padding, OptionalString activation);
Tensor pointwise_packed(Tensor x, Tensor panels, Tensor bias, OptionalTensor residual, OptionalString activation);
Tensor fire_expand_packed(Tensor x, Tensor panels1x1, Tensor bias1x1, Tensor panels3x3, Tensor bias3x3);
Tensor fire_packed(Tensor x, Tensor squeeze_panels, Tensor squeeze_bias, Tensor panels1x1, Tensor bias1x1, Tensor panels3x3, Tensor bias3x3,
                   OptionalTensor winograd3x3);
Tensor inverted_residual_packed(Tensor x, OptionalTensor expand_panels, OptionalTensor expand_bias, Tensor taps, Tensor depthwise_bias,
                                std::vector<Tensor> squeeze_excite, Tensor project_panels, Tensor project_bias, OptionalTensor residual,
                                Ints stride, Ints padding, OptionalString expand_activation, OptionalString depthwise_activation,
                                OptionalString squeeze_activation, OptionalString gate_activation, OptionalString activation);
Tensor stem_packed(Tensor x, Tensor panels, Tensor bias, Ints kernel_size, Ints stride, Ints padding, OptionalString activation,
                   OptionalTensor winograd);

// Whole networks (program.cpp): by their weights and text, or compiled once and called by number.
Tensor network(Tensor x, std::vector<Tensor> weights, std::string program);
int64_t program_new(std::vector<Tensor> weights, std::string program);
Tensor program_run(Tensor x, int64_t program, bool flat);
Tensor program_times(Tensor x, int64_t program);
void program_free(int64_t program);

// Training (training.cpp).
std::tuple<Tensor, Tensor> training_conv(Tensor x, OptionalTensor input_norm, OptionalTensor gate, OptionalString input_activation,
                                         Tensor weight, OptionalTensor bias, OptionalString activation, int64_t norm, OptionalTensor gamma,
                                         OptionalTensor beta, OptionalTensor running_mean, OptionalTensor running_var, double momentum,
                                         double eps, Ints stride, Ints padding, OptionalTensor out);
Tensor training_activated(Tensor y, Tensor norm, OptionalString activation, OptionalTensor residual, OptionalTensor out);
Tensor training_means(Tensor y, Tensor norm, OptionalString activation);
Tensor training_gradient_sums(Tensor dz, OptionalTensor add, Tensor y, OptionalTensor norm, OptionalString activation);
std::tuple<Tensor, Tensor, Tensor, Tensor> training_conv_backward(Tensor dz, OptionalTensor add, Tensor y, OptionalTensor norm,
                                                                  OptionalTensor sums, OptionalString activation, Tensor x,
                                                                  OptionalTensor input_norm, OptionalTensor gate,
                                                                  OptionalString input_activation, Tensor weight, OptionalTensor residual,
                                                                  Ints stride, Ints padding, bool needs_input, bool needs_weight,
                                                                  bool needs_bias, OptionalTensor out);
Tensor training_fire(Tensor x, Tensor squeeze_weight, OptionalTensor squeeze_bias, Tensor weight1x1, OptionalTensor bias1x1,
                     Tensor weight3x3, OptionalTensor bias3x3, OptionalTensor squeezed, OptionalTensor out);
Tensor training_max_pool(Tensor x, Ints stride, Ints padding, bool ceil_mode, OptionalTensor out);
Tensor training_max_pool_backward(Tensor dz, Tensor x, Ints stride, Ints padding, OptionalTensor out);
Tensor training_stem_pool(Tensor x, Tensor weight, OptionalTensor bias, OptionalString activation, Ints stride, Ints padding,
                          Ints pool_stride, Ints pool_padding, bool ceil_mode, OptionalTensor out);
std::tuple<Tensor, Tensor> training_stem_pool_backward(Tensor dz, Tensor x, Tensor weight, OptionalTensor bias, OptionalString activation,
                                                       Ints stride, Ints padding, Ints pool_stride, Ints pool_padding);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> training_fire_backward(Tensor dz, Tensor z, Tensor x, Tensor squeezed,
                                                                                          Tensor squeeze_weight, Tensor weight1x1,
                                                                                          Tensor weight3x3, bool needs_input,
                                                                                          OptionalTensor out);

// The kernels' depthwise convolution: stride along the width 1 or 2, padding below the kernel.
bool depthwise_covers(int64_t kernel, const Ints& stride, const Ints& padding);

Tensor flip_taps(const Tensor& taps);    // (K * K, C), turned by half: those of the input gradient
Tensor unpack_taps(const Tensor& taps);  // (K * K, C) -> (C, 1, K, K)

void check_packed_image(const char* op, const Tensor& x);  // check_image, and float32
// x has the channels that weights packed before were packed for. (Messages of packed operators bear the public operator's name.)
void check_channels(const char* op, const Shape& x, int64_t channels);
void check_some_pixels(const char* op, const Shape& x);
// Panels (ceil(Cout / 16), depth, 16) with a bias (Cout,); returns Cout.
int64_t check_panels(const char* op, const char* argument, const Tensor& panels, const Tensor& bias, int64_t depth);
// The same of a 1x1 convolution, whose panels may be packed for Strassen's algorithm (one dimension) or as digits (two) and tell its inputs
// then; 0: any.
PackedPointwise check_pointwise(const char* op, const char* argument, const Tensor& panels, const Tensor& bias, int64_t in_channels,
                                Activation activation);
void check_taps(const char* op, const Tensor& taps, const Tensor& bias, int64_t channels, const Ints& stride, const Ints& padding);
void check_residual(const char* op, const Tensor& residual, const Tensor& x, int64_t n, int64_t c, int64_t h, int64_t w);

}  // namespace fastconv
