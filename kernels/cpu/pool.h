// Max-pool 3x3, and the two channel-wise passes of a squeeze-excitation: sum over pixels, and scale. Included per ISA.
#pragma once

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/simd.h"

namespace fastconv::FASTCONV_ISA {

// NaN wins, as in ATen: a NaN in either operand is kept.
FASTCONV_INLINE vec maximum(vec a, vec b) { return (b > a) | (b != b) ? b : a; }

inline void max_pool(const MaxPool& op, Range rows) {
  for (int64_t oh = rows.begin; oh < rows.end; ++oh)
    for (int64_t ow = 0; ow < op.out_width; ++ow) {
      const int64_t top = oh * op.stride_h - op.pad_h, left = ow * op.stride_w - op.pad_w;
      const int64_t h0 = top < 0 ? 0 : top, h1 = top + 3 > op.height ? op.height : top + 3;
      const int64_t w0 = left < 0 ? 0 : left, w1 = left + 3 > op.width ? op.width : left + 3;
      const float* rows[3];
      for (int64_t h = h0; h < h1; ++h) rows[h - h0] = op.x + h % op.ring_rows * op.x_row_stride;
      float* out = op.out + (oh * op.out_width + ow) * op.out_stride;
      for (int64_t c = 0; c < op.channels; c += W) {
        const int64_t n = op.channels - c;
        vec y = load_up_to(rows[0] + w0 * op.x_stride + c, n);
        for (int64_t h = 0; h < h1 - h0; ++h)
          for (int64_t w = w0; w < w1; ++w) y = maximum(y, load_up_to(rows[h] + w * op.x_stride + c, n));
        store_up_to(out + c, y, n);
      }
    }
}

inline void sum_pixels(const float* x, int64_t x_stride, int64_t pixels, int64_t channels, float* sums) {
  for (int64_t c = 0; c < channels; c += W) {
    const int64_t n = channels - c;
    vec sum = load_up_to(sums + c, n);
    for (int64_t p = 0; p < pixels; ++p) sum += load_up_to(x + p * x_stride + c, n);
    store_up_to(sums + c, sum, n);
  }
}

inline void scale_channels(float* x, int64_t x_stride, int64_t pixels, int64_t channels, const float* scales) {
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t c = 0; c < channels; c += W) {
      const int64_t n = channels - c;
      store_up_to(x + p * x_stride + c, load_up_to(x + p * x_stride + c, n) * load_up_to(scales + c, n), n);
    }
}

}  // namespace fastconv::FASTCONV_ISA
