// The contract of the micro-kernels: plain structs and a table of function pointers, one table per ISA.
//
// All tensors are fp32. A "pixel" is one spatial position; Strides says where its channels stand. Nothing outside the named elements is
// read or written, except that the unused lanes of a blocked image's last block may be. Every output element is accumulated in the same
// order whatever range it is computed in, so results do not depend on how the ranges are split among threads.
//
// Weights come packed (pack.h): "panels" hold 16 output channels each, (panel, tap * in_channels + c, 16); "taps" are (K*K, channels).
// A pointwise convolution whose last panel holds at most 8 channels has that panel "paired": two inputs by 8 channels a vector.
#pragma once

#include <cstdint>

#include "kernels/cpu/activation.h"

namespace fastconv {

constexpr int64_t PANEL = 16;  // output channels in a panel, on every ISA

// always_inline: shared by every ISA's source, so none of them may emit a copy that another one could end up calling.
#define FASTCONV_SHARED [[gnu::always_inline]]
FASTCONV_SHARED constexpr inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTCONV_SHARED constexpr inline int64_t panels_for(int64_t channels) { return ceil_div(channels, PANEL); }

// Of a stem's Winograd, F(4, 4): points, and planes of input, one a channel and parity of columns.
constexpr int STEM_POINTS = 7, STEM_PLANES = 6;

constexpr int64_t PAIRED = PANEL / 2;  // most channels of a paired panel
FASTCONV_SHARED constexpr inline bool last_panel_is_paired(int64_t channels) { return channels % PANEL != 0 && channels % PANEL <= PAIRED; }

// Channel c of pixel p stands at p * pixel + c / PANEL * block + c % PANEL. Channels innermost: pixel >= channels (a slice of a wider
// tensor is fine), block = PANEL. Blocked: pixel = PANEL, and neighbouring pixels of 16 channels are neighbouring cache lines.
struct Strides {
  int64_t pixel, block;
  FASTCONV_SHARED constexpr Strides(int64_t pixel = 0, int64_t block = PANEL) : pixel(pixel), block(block) {}
  FASTCONV_SHARED bool innermost() const { return block == PANEL; }
  FASTCONV_SHARED int64_t at(int64_t p, int64_t c) const { return p * pixel + c / PANEL * block + c % PANEL; }
};

struct Range {
  int64_t begin, end;
  FASTCONV_SHARED int64_t size() const { return end - begin; }
};

// What every product kernel does with its sums: out = activation(sum + bias + residual).
struct Epilogue {
  const float* bias;                // (out_channels)
  const float* residual = nullptr;  // pixels as in the output, or none
  Strides residual_strides = 0;
  Activation activation = Activation::none;
};

// Memory that is read soon, to be fetched into L2 meanwhile.
struct Fetch {
  const float *begin = nullptr, *end = nullptr;
  FASTCONV_SHARED int64_t size() const { return end - begin; }
  FASTCONV_SHARED Fetch part(Range r, int64_t of) const { return {begin + size() * r.begin / of, begin + size() * r.end / of}; }
};

// What a thread's products fetch beside their own weights: those that a later step reads once, each for itself, and would wait for. Ranges
// are fetched in turn, so many floats for every step of a tile (Kernels::step_work).
class Stream {
 public:
  FASTCONV_SHARED bool empty() const { return count_ == 0; }
  // urgent: before what is there. Where there is no room, the last is not fetched.
  FASTCONV_SHARED void push(Fetch weights, int64_t floats_a_step, bool urgent) {
    if (weights.size() <= 0 || (!urgent && count_ == MOST)) return;
    if (count_ < MOST) ++count_;
    int64_t at = count_ - 1;
    for (; urgent && at > 0; --at) ranges_[at] = ranges_[at - 1];
    ranges_[at] = {weights, floats_a_step};
  }
  // The next, at most what so many steps are to fetch for all of them.
  FASTCONV_SHARED Fetch take(int64_t steps) {
    int64_t floats = 0;
    for (int64_t i = 0; i < count_; ++i) floats += steps * ranges_[i].floats_a_step;
    Fetch& first = ranges_[0].left;
    const Fetch part{first.begin, floats < first.size() ? first.begin + floats : first.end};
    first.begin = part.end;
    if (first.size() == 0) {
      --count_;
      for (int64_t i = 0; i < count_; ++i) ranges_[i] = ranges_[i + 1];
    }
    return part;
  }

 private:
  static constexpr int64_t MOST = 4;
  struct {
    Fetch left;
    int64_t floats_a_step;
  } ranges_[MOST] = {};
  int64_t count_ = 0;
};
inline thread_local Stream* stream = nullptr;  // the calling thread's, or none

// Packed for Strassen's algorithm (strassen.h): scales of the inputs; of every group of 32 outputs its scales and the factors of seven
// products, (7, in_channels / 2, 16); and the panels of what outputs are left. in_channels: a multiple of 32.
struct StrassenWeights {
  const float* data;
  int64_t in_channels, out_channels;
  static constexpr int64_t GROUP = 2 * PANEL;  // channels, in and out
  FASTCONV_SHARED int64_t groups() const { return out_channels / GROUP; }
  FASTCONV_SHARED int64_t group_floats() const { return GROUP + 7 * in_channels / 2 * PANEL; }
  FASTCONV_SHARED const float* input_scales() const { return data; }
  FASTCONV_SHARED const float* group(int64_t g) const { return data + in_channels + g * group_floats(); }  // its scales
  FASTCONV_SHARED const float* products(int64_t g) const { return group(g) + GROUP; }
  FASTCONV_SHARED const float* rest() const { return group(groups()); }
  FASTCONV_SHARED int64_t floats() const {
    return in_channels + groups() * group_floats() + panels_for(out_channels % GROUP) * in_channels * PANEL;
  }
};

// Packed for a matrix unit (digits.h): every weight as three signed bytes. A header of 16 words that begins with in_channels; what each
// output's sum is multiplied by; and of every panel, chunks of 64 inputs by three digits, the largest first, by 16 x 16 words, of which
// word (i, n) holds inputs 4 i to 4 i + 3 of the chunk.
struct DigitWeights {
  const float* data;
  int64_t in_channels, out_channels;
  static constexpr int64_t HEADER = 16, CHUNK = 64, TILE = PANEL * PANEL, DIGITS = 3;  // floats, but for CHUNK's inputs
  static constexpr int64_t MOST_INPUTS = 1 << 15;                                      // whose sums of three products each fit 32 bits
  static constexpr int UNITS = 16;  // sums of products of the largest digits count 2^32; half of that in this scale, half in the pixel's
  FASTCONV_SHARED int64_t chunks() const { return ceil_div(in_channels, CHUNK); }
  FASTCONV_SHARED int64_t panel_floats() const { return chunks() * DIGITS * TILE; }
  FASTCONV_SHARED const float* scales() const { return data + HEADER; }
  FASTCONV_SHARED const float* panel(int64_t g) const { return scales() + panels_for(out_channels) * PANEL + g * panel_floats(); }
  FASTCONV_SHARED int64_t floats() const { return panel(panels_for(out_channels)) - data; }
};
enum class Packing { panels, strassen, digits };

// 1x1 convolution: a matrix product over pixels.
struct Pointwise {
  const float* x;
  Strides x_strides;
  int64_t in_channels, out_channels;
  const float* panels;
  Epilogue epilogue;
  float* out;
  Strides out_strides;
  int64_t more_pixels = 0;            // of x, beyond those of the call, that the same thread reads next
  Fetch soon = {};                    // what is read after this product
  Packing packing = Packing::panels;  // of `panels`
  int64_t pairs_within = 2;           // Strassen's: pixels in so many are paired from the first on, an odd last one stays alone; 1: all do
  int64_t input_id = 0;               // products of one number, but for 0, read the same inputs: what is made of them serves again
  FASTCONV_SHARED StrassenWeights strassen() const { return {panels, in_channels, out_channels}; }
  FASTCONV_SHARED DigitWeights digits() const { return {panels, in_channels, out_channels}; }
  // Of pixels from a pair's first on, up to a pair's end.
  FASTCONV_SHARED Range pairs(Range pixels) const {
    const auto before = [&](int64_t pixel) { return pixel / pairs_within * ceil_div(pairs_within, 2) + ceil_div(pixel % pairs_within, 2); };
    return {before(pixels.begin), before(pixels.end)};
  }
};

// Pixels as digits, 16 to a tile: (tile, chunk of 64 inputs, digit, 16 x 64 bytes); what each pixel's sums are multiplied by; and, a byte
// each, which pixels are not ordinary.
struct DigitPixels {
  float* data;
  int64_t in_channels, pixels;
  static constexpr int64_t ROWS = 16;
  FASTCONV_SHARED int64_t tiles() const { return ceil_div(pixels, ROWS); }
  FASTCONV_SHARED int64_t tile_floats() const { return DigitWeights{nullptr, in_channels, 0}.panel_floats(); }
  FASTCONV_SHARED float* tile(int64_t t) const { return data + t * tile_floats(); }
  FASTCONV_SHARED float* scales() const { return tile(tiles()); }
  FASTCONV_SHARED char* extraordinary() const { return reinterpret_cast<char*>(scales() + tiles() * ROWS); }
  FASTCONV_SHARED int64_t floats() const { return tiles() * (tile_floats() + 2 * ROWS); }
};

// Dense KxK convolution of one image, channels innermost. Taps that fall outside the image read `zeros`, so no padded copy is made.
struct Conv {
  const float* x;
  int64_t x_stride;  // floats between pixels
  int64_t height, width, in_channels, out_channels;
  int64_t out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  const float* panels;
  const float* zeros;  // in_channels zeros
  Epilogue epilogue;
  float* out;
  Strides out_strides;
};

// The same when the image already stands in a buffer with its zero border: x points at the tap (0, 0) of output pixel (0, 0).
struct PaddedConv {
  const float* x;
  int64_t x_stride, x_row_stride;  // floats between pixels and between rows
  int64_t in_channels, out_channels;
  int64_t out_height, out_width;
  int64_t kernel_h, kernel_w;  // stride 1
  const float* panels;
  Epilogue epilogue;
  float* out;
  Strides out_strides;
};

// First layer: KxK over at most 4 channels, NCHW or channels_last, through a row buffer that carries the zero border.
struct Stem {
  const float* x;
  int64_t channel_stride, row_stride, pixel_stride;
  int64_t height, width, in_channels, out_channels;
  int64_t out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  const float* panels;
  Epilogue epilogue;
  float* out;
  Strides out_strides;
  const float* winograd = nullptr;  // pack_stem_winograd's panels, or none; of three channels, 7 wide, stride 2
  FASTCONV_SHARED int64_t scratch_floats() const { return kernel_h * in_channels * buffer_width(); }
  // Of a row of the buffer, whose columns begin so far in that the image's rows are copied in aligned vectors.
  FASTCONV_SHARED int64_t buffer_width() const { return ceil_div(margin() + columns(), PANEL) * PANEL; }
  FASTCONV_SHARED int64_t margin() const { return ceil_div(pad_w, PANEL) * PANEL - pad_w; }
  FASTCONV_SHARED int64_t columns() const { return (out_width - 1) * stride_w + kernel_w; }
};

// Where a thread's transformed rows of a stem's image stand: its rows [first, next), the last SLOTS of them.
struct alignas(64) StemRing {
  static constexpr int64_t SLOTS = 8;  // rows of a kernel, and a power of two
  float* data = nullptr;
  const float* image = nullptr;
  int64_t first = 0, next = 0;
  bool moderate[SLOTS] = {};
  FASTCONV_SHARED static int64_t slot(int64_t row) { return row & (SLOTS - 1); }
  // Who goes on below the last rows of the same image need not transform again what is there.
  FASTCONV_SHARED void seek(const float* x, int64_t row) {
    if (image != x || row < first || row < next - SLOTS || row > next) first = next = row;
    image = x;
  }
};

// Depthwise KxK, K = 3 or 5, stride_w = 1 or 2. Row h of the input is x + (h % ring_rows) * x_row_stride: a whole image has
// ring_rows = height; a ring of fewer rows serves the fused blocks.
struct Depthwise {
  const float* x;
  Strides x_strides;
  int64_t x_row_stride, ring_rows;
  int64_t height, width, channels;
  int64_t out_width;
  int64_t kernel, stride_h, stride_w, pad_h, pad_w;
  const float* taps;
  const float* bias;
  Activation activation;
  float* out;
  Strides out_strides;
  int64_t out_row_stride;
};

// 3x3 maximum, NaN propagating; windows are clipped at the image's border. Rows as in Depthwise.
struct MaxPool {
  const float* x;
  Strides x_strides;
  int64_t x_row_stride, ring_rows;
  int64_t height, width, channels;
  int64_t out_width;
  int64_t stride_h, stride_w, pad_h, pad_w;
  float* out;
  Strides out_strides;
};

// Training. A layer keeps its raw sums y; the image that y stands for, z = activation(scale * y + shift) * gate, is made again wherever it
// is read. Channels innermost; pointers stand at the first of `channels`, those that are one float a channel are dense.
struct Activated {
  const float* y;
  int64_t stride;  // floats between pixels
  int64_t channels;
  const float *scale, *shift;  // or null: z is y
  Activation activation;
  const float* gate;  // of this image, or null
  FASTCONV_SHARED bool plain() const { return !scale && !gate; }
};

// The gradient of a layer's sums: factor * (dz' - offset - (y - mean) * slope) with dz' = (dz + add) * activation'(scale * y + shift).
// Where scale is null y is the activation's result: none, relu or relu6. Where factor is null it is dz' itself.
struct Gradient {
  const float* dz;
  int64_t dz_stride;
  const float* add;  // of this image, or null
  const float* y;
  int64_t y_stride;
  int64_t channels;
  const float *scale, *shift;
  Activation activation;
  const float *factor, *offset, *mean, *slope;
};

// sums[n, k] += sum over rows of dy[row, n] * z[row, k]. z's rows and those of sums reach to whole vectors.
struct ProductGradient {
  const float* dy;
  Strides dy_strides;
  const float* z;
  Strides z_strides;
  int64_t rows, outputs, inputs;
  float* sums;
  int64_t sums_stride;
  Fetch soon = {};  // what is read or written after this product
};

// A row of tiles on their way into Winograd's sums (winograd_gradient.h). Whole vectors of channels.
struct WindowTiles {
  const float* x;
  int64_t x_stride, x_row_stride;  // floats between pixels and between rows
  int64_t channels, tiles;
  float* out;
  int64_t out_stride, plane;  // floats between tiles and between the 36 planes
};

// sums[tap, c] += sum over output pixels of dy * z under that tap. Images are blocked, in rings of rows; output pixel (h, w) of dy stands
// at row h * stride_h, pixel w * stride_w: where the input gradient, a convolution of stride 1 over the same buffer, wants it.
struct DepthwiseGradient {
  const float *z, *dy;
  Strides z_strides, dy_strides;
  int64_t z_row_stride, dy_row_stride, z_ring_rows, dy_ring_rows;
  int64_t height, width, channels;
  int64_t out_width;
  int64_t kernel, stride_h, stride_w, pad_h, pad_w;
  float* sums;  // (K * K, blocks of 16 channels)
  int64_t sums_stride;
};

// dx of a 3x3 maximum: dy goes to the first maximum of its window, as in ATen. One image, channels innermost, pixels dense.
struct MaxPoolGradient {
  const float *x, *dy;
  int64_t height, width, channels, out_height, out_width;
  int64_t stride_h, stride_w, pad_h, pad_w;
  float* dx;
};

struct KernelInfo {
  const char* op;
  const char* tile;  // pixels x output channels in registers
};

struct Kernels {
  const char* isa;
  KernelInfo info[8];
  int64_t tile_pixels;  // of pointwise: pieces of so many, or a multiple, waste nothing
  int64_t step_work;    // multiply-adds of a few inputs of its tile, between which it fetches
  void (*pointwise)(const Pointwise&, Range pixels, Range panels);
  void (*conv)(const Conv&, Range pixels, Range panels);  // pixels: row-major over (out_height, out_width)
  void (*padded_conv)(const PaddedConv&, Range rows, Range panels);
  // Pointwise by Strassen: pairs of pixels, transformed once to strassen_floats(in_channels, pairs) floats, for any panels; an even number
  // of them, but for the last. Scratch: strassen_scratch(in_channels) floats.
  void (*strassen_transform)(const Pointwise&, Range pairs, float* transformed);
  void (*strassen_multiply)(const Pointwise&, Range pairs, Range panels, float* transformed, float* scratch);
  int64_t (*strassen_floats)(int64_t in_channels, int64_t pairs);
  int64_t (*strassen_scratch)(int64_t in_channels);
  // Pointwise by a matrix unit; null where there is none. Pixels, split once, for any panels; those that are not ordinary are marked, their
  // outputs are left for the caller to make.
  void (*digits_split)(const Pointwise&, Range pixels, const DigitPixels& parts);
  void (*digits_multiply)(const Pointwise&, Range pixels, Range panels, const DigitPixels& parts);
  // 3x3 by Winograd F(4x4, 3x3), panels of pack_winograd; the buffer's border reaches to whole tiles of 4x4 outputs. Tiles count through
  // the image, row by row.
  void (*winograd)(const PaddedConv&, Range tiles, Range panels, float* scratch);
  int64_t (*winograd_scratch)(const PaddedConv&, int64_t tiles);  // floats
  // The same in two steps: tiles, transformed once, for any panels. `sums`: winograd_sums floats.
  int64_t (*winograd_transformed)(const PaddedConv&);  // floats
  void (*winograd_transform)(const PaddedConv&, Range tiles, float* transformed);
  void (*winograd_multiply)(const PaddedConv&, Range tiles, Range panels, float* transformed, float* sums);
  int64_t winograd_sums;
  bool (*all_moderate)(const float* x, int64_t count);  // finite and below 1e30: what Winograd may be given
  void (*stem)(const Stem&, Range rows, float* scratch);
  void (*stem_winograd)(const Stem&, Range rows, StemRing& ring, float* scratch);
  int64_t (*stem_ring_floats)(const Stem&);
  void (*depthwise)(const Depthwise&, Range rows, Range channels);  // out points at row rows.begin
  void (*max_pool)(const MaxPool&, Range rows);
  // x points at the first channel of a block, sums and scales at that channel's.
  void (*sum_pixels)(const float* x, Strides strides, int64_t pixels, int64_t channels, float* sums);  // adds to sums
  // Of each row of so many pixels; its sums stand sums_stride apart.
  void (*sum_rows)(const float* x, Strides strides, int64_t pixels, int64_t rows, int64_t channels, float* sums, int64_t sums_stride);
  void (*scale_channels)(float* x, Strides strides, int64_t pixels, int64_t channels, const float* scales);  // in place
  // gradient.h. `to` and rows of sums reach to whole vectors; sums are added to.
  void (*activated)(const Activated&, int64_t pixels, float* to, Strides to_strides);
  void (*activated_exactly)(const Activated&, int64_t pixels, const float* residual, int64_t residual_stride, float* to, int64_t to_stride);
  void (*moments)(const float* y, int64_t stride, int64_t pixels, int64_t channels, float* mean, float* squares);  // about the mean
  void (*gradient)(const Gradient&, int64_t pixels, float* to, Strides to_strides);
  void (*gradient_sums)(const Gradient&, int64_t pixels, const float* mean, float* sums, float* products);  // of dz', and dz' * (y - mean)
  // dz *= activation'; adds the sums of what results.
  void (*through_activation)(const Activated&, int64_t pixels, const float* mean, float* dz, int64_t dz_stride, float* sums,
                             float* products);
  void (*through_gate)(const Activated&, int64_t pixels, float* dz, int64_t dz_stride, float* gate_sums);  // adds dz * z, then dz *= gate
  void (*product_gradient)(const ProductGradient&);
  void (*depthwise_gradient)(const DepthwiseGradient&, Range out_rows);
  void (*max_pool_gradient)(const MaxPoolGradient&);
  // winograd_gradient.h
  void (*window_inputs)(const WindowTiles&);
  void (*window_gradients)(const WindowTiles&);
  void (*window_taps)(const float* sums, int64_t inputs, int64_t outputs, float* taps, int64_t taps_stride);
  // peak.h
  double (*fma_chains)(int64_t iterations, float* sink);
  void (*read_stream)(const float* x, int64_t count, float* sink);
  void (*copy_stream)(const float* x, int64_t count, float* out);
};

}  // namespace fastconv
