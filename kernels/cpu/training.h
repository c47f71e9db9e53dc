// Training: a convolution with the statistics of its sums, and its gradients, where images are never stored normalised or activated: they
// are made again from a layer's sums, a strip of pixels or a ring of rows at a time, wherever a product reads them. ISA-independent.
//
// Work is cut by the shapes alone, partial sums are added in a fixed order: the same bits for any number of threads.
#pragma once

#include <cstdint>

#include "kernels/cpu/blocks.h"

namespace fastconv {

// Sums of a batch's pixels, a channel each: their mean and variance (biased), or null where nobody asks.
struct Statistics {
  float *mean, *variance;
};

// What a product over pixels reads: rows of `depth` inputs.
class InputRows {
 public:
  virtual ~InputRows() = default;
  virtual int64_t depth() const = 0;
  // Pixels counted through the batch; `to` reaches to whole vectors.
  virtual void rows(Range pixels, float* to, Strides to_strides) const = 0;
  // Where they stand already, or null.
  virtual const float* in_place(int64_t& /*stride*/) const { return nullptr; }
};

// An image's pixels as a 1x1 convolution reads them.
class PixelRows : public InputRows {
 public:
  PixelRows(const Activated& image, int64_t image_pixels) : image_(image), image_pixels_(image_pixels) {}
  int64_t depth() const override { return image_.channels; }
  void rows(Range pixels, float* to, Strides to_strides) const override;
  const float* in_place(int64_t& stride) const override;

 private:
  Activated image_;  // gate: (batch, channels) or null
  int64_t image_pixels_;
};

// The windows of a dense KxK convolution, taps outside the image as zeros, (tap, channel). Pixels are dense.
struct Windows {
  const float* x;
  int64_t height, width, channels;
  int64_t out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
};
class WindowRows : public InputRows {
 public:
  explicit WindowRows(const Windows& windows) : windows_(windows) {}
  int64_t depth() const override { return windows_.kernel_h * windows_.kernel_w * windows_.channels; }
  void rows(Range pixels, float* to, Strides to_strides) const override;

 private:
  Windows windows_;
};

// y = input * weights + bias; y's pixels are dense.
void run_training_product(const InputRows& input, int64_t pixels, const PackedPointwise& weights, float* y, const Statistics& statistics,
                          const Parallel& parallel);

// What becomes of an input gradient: nothing more, the input's activation with the sums that its norm's gradient needs, or its gate.
struct Through {
  enum Kind { nothing, activation, gate } kind;
  Activated image;    // gate: (batch, channels)
  const float* mean;  // activation: of the image's sums, or null
  float* sums;        // activation: of dz' and of dz' * (y - mean), (2, channels); gate: of dz * z, (batch, channels)
};

struct ProductBackward {
  int64_t batch, image_pixels;
  Gradient gradient;               // of the output; add: (batch, channels) or null
  const InputRows* input;          // for the weights' gradient
  float* dweight;                  // (outputs, inputs), or null
  float* dbias;                    // (outputs,), or null
  const float* transposed_panels;  // of (inputs, outputs), or null: no input gradient
  const float* zeros;              // inputs
  const float* residual;           // added to the input's gradient, or null; pixels dense
  float* dx;                       // pixels dense
  int64_t inputs;
  Through through;
};
void run_product_backward(const ProductBackward& op, const Parallel& parallel);

// The gradients of a first convolution with its activation (none, relu or relu6) that a 3x3 max-pool follows. Its rows are made again, a
// band of them at a time, and neither they nor their gradient stand in memory.
struct StemPoolBackward {
  int64_t batch, image_stride;  // floats between images
  Stem stem;                    // out is not used
  Windows windows;              // the convolution's
  MaxPoolGradient pool;         // dy: of all images, pixels dense; x and dx are not used
  float* dweight;               // (outputs, taps * channels)
  float* dbias;                 // outputs
};
void run_stem_pool_backward(const StemPoolBackward& op, const Parallel& parallel);

// The input gradient of a 3x3 convolution with padding 1: a convolution of dy, zeros around it, with the taps flipped.
struct WindowBackward {
  int64_t batch, height, width;
  Gradient gradient;               // of the output
  const float *panels, *winograd;  // of the flipped weight (inputs, outputs, 3, 3), outputs up to a multiple of 16 with zeros
  const float* zeros;              // inputs
  float* dx;                       // pixels dense
  int64_t inputs;
};
void run_window_backward(const WindowBackward& op, const Parallel& parallel);

// The weights' gradient of the same convolution, by Winograd's tiles; where a number is infinite, NaN or huge, directly.
struct WindowGradient {
  int64_t batch, height, width;
  Gradient gradient;  // of the output; of a layer without norm
  const float* z;     // the input; pixels dense
  int64_t inputs;
  float* dweight;  // (outputs, inputs, 3, 3)
  float* dbias;    // outputs
};
void run_window_gradient(const WindowGradient& op, const Parallel& parallel);

// image: as the convolution reads it, gate null; geometry: taps, bias, sizes and out (pixels dense); x and its strides are not used.
void run_training_depthwise(const Activated& image, const Depthwise& geometry, int64_t batch, int64_t out_height,
                            const Statistics& statistics, const Parallel& parallel);

struct DepthwiseBackward {
  int64_t batch, height, width, channels, out_height, out_width;
  int64_t kernel, stride_h, stride_w, pad_h, pad_w;
  Gradient gradient;          // of the output
  Activated image;            // the input; y null: no gradient of the weights is wanted
  float* dweight;             // (K * K, channels), or null
  const float* flipped_taps;  // or null: no input gradient
  const float* zeros;         // channels
  float* dx;                  // pixels dense
  Through through;            // nothing or activation
};
void run_depthwise_backward(const DepthwiseBackward& op, const Parallel& parallel);

// z = activation(scale * y + shift) + residual; all dense.
void run_activated(const Activated& image, int64_t pixels, const float* residual, float* z, const Parallel& parallel);
// Mean of z over each image: (batch, channels).
void run_activated_means(const Activated& image, int64_t batch, int64_t image_pixels, float* means, const Parallel& parallel);
// Sums of dz' and of dz' * (y - mean): (2, channels).
void run_gradient_sums(const Gradient& gradient, int64_t batch, int64_t image_pixels, const float* mean, float* sums,
                       const Parallel& parallel);

}  // namespace fastconv
