// Whole blocks, built from the micro-kernels: pointwise over threads, fire, and the inverted residual (with or without its expansion
// and squeeze-excitation, so depthwise-separable blocks too). ISA-independent: they call the active kernel table.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/parallel.h"

namespace fastconv {

// A range of rows counted through a batch, image by image: f(image, rows within it). (Or pixels, with an image's pixels for its height.)
template <class F>
void for_each_image(Range rows, int64_t height, const F& f) {
  for (int64_t row = rows.begin; row < rows.end;) {
    const int64_t n = row / height, end = std::min(rows.end, (n + 1) * height);
    f(n, Range{row - n * height, end - n * height});
    row = end;
  }
}

struct PackedPointwise {
  const float* panels;
  const float* bias;
  int64_t in_channels, out_channels;
  Activation activation;
  Packing packing = Packing::panels;
  int64_t floats() const {
    if (packing == Packing::strassen) return StrassenWeights{panels, in_channels, out_channels}.floats();
    if (packing == Packing::digits) return DigitWeights{panels, in_channels, out_channels}.floats();
    return in_channels * panels_for(out_channels) * PANEL;
  }
};

// A blocked image of so many pixels: its blocks of 16 channels stand whole cache lines apart, and never a multiple of 512 bytes, whose
// pixels would fall in the same cache sets.
inline Strides blocked(int64_t pixels) { return {PANEL, (pixels % 8 == 0 ? pixels + 1 : pixels) * PANEL}; }
inline int64_t blocked_floats(int64_t pixels, int64_t channels) { return panels_for(channels) * blocked(pixels).block; }

// Images are (batch, height, width) pixels; a batch's pixels follow each other.
struct Fire {
  const float* x;
  Strides x_strides;
  int64_t batch, height, width;
  PackedPointwise squeeze, expand1x1;
  const float* panels3x3;
  const float* winograd3x3;  // pack_winograd's panels, or null: direct sums only
  const float* bias3x3;
  int64_t expand3x3_channels;
  float* out;  // expand1x1's channels, then expand3x3's; where out is blocked, expand1x1's are a multiple of 16
  Strides out_strides;
  float* squeezed = nullptr;  // where the squeezed image is kept, pixels dense, if it is
};

struct SqueezeExcite {
  PackedPointwise reduce, expand;  // activations: squeeze's and the gate's
};

// Makes rows of an image just before they are used, so that it never stands in memory: a stem's, or a block's.
class RowSource {
 public:
  virtual ~RowSource() = default;
  // Rows of one of the batch's images to `to`. A worker is a thread of the team; going on where the same worker stopped costs least.
  virtual void rows(int64_t image, Range rows, float* to, Strides strides, int64_t worker) const = 0;
};

class StemRows : public RowSource {
 public:
  StemRows(const Stem& image, int64_t image_stride, int64_t threads) : image_(image), image_stride_(image_stride), rings_(threads) {}
  void rows(int64_t image, Range rows, float* to, Strides strides, int64_t worker) const override;

 private:
  Stem image_;  // its `out` is not used
  int64_t image_stride_;
  mutable std::vector<StemRing> rings_;  // one a worker
};

struct InvertedResidual {
  const float* x;  // or null, where `source` makes the input
  Strides x_strides;
  const RowSource* source;  // or null
  int64_t batch, height, width, in_channels;
  PackedPointwise expand;  // panels null: none
  const float* taps;
  const float* depthwise_bias;
  int64_t channels;  // of the depthwise convolution
  int64_t kernel, stride_h, stride_w, pad_h, pad_w;
  Activation depthwise_activation;
  SqueezeExcite squeeze_excite;  // reduce.panels null: none
  PackedPointwise project;
  const float* residual;  // or null; of the output's shape
  Strides residual_strides;
  bool residual_is_source;  // what the source makes is added; without expand only
  int64_t out_height, out_width;
  float* out;
  Strides out_strides;
  bool expands() const { return expand.panels != nullptr; }
  bool gates() const { return squeeze_excite.reduce.panels != nullptr; }
};

// Whether rows made on demand are worth their halos, which every thread makes anew where its rows begin.
bool worth_chaining(const InvertedResidual& block, int64_t threads);
bool worth_chaining(int64_t pool_out_height, int64_t threads);
// The rows of a block's output, for what comes after it. level: distinct among sources that are in use at a time, from 0 to 7.
std::unique_ptr<RowSource> block_rows(const InvertedResidual& block, int64_t threads, int level);

// Has products of `work` multiply-adds fetch weights that are read once, after them: at most a float for 14 multiply-adds, more than which
// memory does not bring beside the products' own. Where that is not enough, none are fetched.
inline bool fetchable(const PackedPointwise& weights, int64_t work) { return work >= 14 * weights.floats(); }
void fetch_ahead(const PackedPointwise& weights, int64_t work, bool urgent, const Parallel& parallel);

// Among how many pixels of an image Strassen's algorithm finds pairs (Pointwise::pairs_within), where a call may be for a part that is a
// multiple of so many.
int64_t pairs_within(int64_t image, int64_t part);

void run_pointwise(const Pointwise& op, int64_t pixels, const Parallel& parallel);
void run_conv(const Conv& image, int64_t batch, const Parallel& parallel);
void run_depthwise(const Depthwise& image, int64_t batch, int64_t out_height, const Parallel& parallel);
void run_stem(const Stem& image, int64_t batch, int64_t image_stride, const Parallel& parallel);
// source: makes the rows of image.x, which is null then; or null.
void run_max_pool(const MaxPool& image, int64_t batch, int64_t out_height, const RowSource* source, const Parallel& parallel);
void run_global_avg_pool(const float* x, Strides x_strides, int64_t batch, int64_t pixels, int64_t channels, float* out,
                         Strides out_strides, const Parallel& parallel);
void run_fire(const Fire& op, const Parallel& parallel);
void run_inverted_residual(const InvertedResidual& op, const Parallel& parallel);

}  // namespace fastconv
