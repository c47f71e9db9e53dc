// Whole blocks, built from the micro-kernels: pointwise over threads, fire, and the inverted residual (with or without its expansion
// and squeeze-excitation, so depthwise-separable blocks too). ISA-independent: they call the active kernel table.
#pragma once

#include <cstdint>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/parallel.h"

namespace fastconv {

struct PackedPointwise {
  const float* panels;
  const float* bias;
  int64_t in_channels, out_channels;
  Activation activation;
};

// Images are (batch, height, width, channels), dense.
struct Fire {
  const float* x;
  int64_t batch, height, width;
  PackedPointwise squeeze, expand1x1;
  const float* panels3x3;
  const float* winograd3x3;  // pack_winograd's panels, or null: direct sums only
  const float* bias3x3;
  int64_t expand3x3_channels;
  float* out;  // (batch, height, width, expand1x1 + expand3x3 channels)
};

struct SqueezeExcite {
  PackedPointwise reduce, expand;  // activations: squeeze's and the gate's
};

// A stem whose rows are used as they are made: they stand in a ring, and its whole output never in memory. `image.out` is not used.
struct StemSource {
  Stem image;
  int64_t image_stride;  // floats between the batch's images
};

struct InvertedResidual {
  const float* x;           // or null, where `stem` makes the input
  const StemSource* stem;   // or null; only without expand
  int64_t batch, height, width, in_channels;
  const PackedPointwise* expand;  // or null
  const float* taps;
  const float* depthwise_bias;
  int64_t channels;  // of the depthwise convolution
  int64_t kernel, stride_h, stride_w, pad_h, pad_w;
  Activation depthwise_activation;
  const SqueezeExcite* squeeze_excite;  // or null
  PackedPointwise project;
  const float* residual;  // or null; (batch, out_height, out_width, out channels)
  bool residual_is_stem;  // the stem's output is added
  int64_t out_height, out_width;
  float* out;
};

void run_pointwise(const Pointwise& op, int64_t pixels, const Parallel& parallel);
void run_conv(const Conv& image, int64_t batch, const Parallel& parallel);
void run_depthwise(const Depthwise& image, int64_t batch, int64_t out_height, const Parallel& parallel);
void run_stem(const Stem& image, int64_t batch, int64_t image_stride, const Parallel& parallel);
// stem: makes the rows of image.x, which is null then.
void run_max_pool(const MaxPool& image, int64_t batch, int64_t out_height, const StemSource* stem, const Parallel& parallel);
void run_global_avg_pool(const float* x, int64_t batch, int64_t pixels, int64_t channels, float* out, const Parallel& parallel);
void run_fire(const Fire& op, const Parallel& parallel);
void run_inverted_residual(const InvertedResidual& op, const Parallel& parallel);

}  // namespace fastconv
