// Max-pool 3x3, and the two channel-wise passes of a squeeze-excitation: sum over pixels, and scale. Included per ISA.
#pragma once

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/simd.h"

namespace fastconv::FASTCONV_ISA {

// A vector of channels slides along the row; the maximum of a column of three is shared by the windows that hold it.
inline void max_pool_row(const MaxPool& op, int64_t oh, int64_t c, int64_t lanes) {
  const int64_t top = oh * op.stride_h - op.pad_h, pixel = op.x_strides.pixel;
  const int64_t h0 = top < 0 ? 0 : top, h1 = top + 3 > op.height ? op.height : top + 3;
  const float* rows[3];
  for (int64_t i = 0; i < 3; ++i) {  // windows are clipped: a row again changes no maximum
    const int64_t h = h0 + i < h1 ? h0 + i : h1 - 1;
    rows[i] = op.x + h % op.ring_rows * op.x_row_stride + op.x_strides.at(0, c);
  }
  const auto column = [&](int64_t w) FASTCONV_LAMBDA_INLINE {
    const int64_t at = w * pixel;
    return maximum(maximum(load_up_to(rows[0] + at, lanes), load_up_to(rows[1] + at, lanes)), load_up_to(rows[2] + at, lanes));
  };
  float* out = op.out + op.out_strides.at(oh * op.out_width, c);
  vec last{};          // of the window before, its last column
  int64_t known = -1;  // which that is
  for (int64_t ow = 0; ow < op.out_width; ++ow, out += op.out_strides.pixel) {
    const int64_t left = ow * op.stride_w - op.pad_w;
    const int64_t w0 = left < 0 ? 0 : left, w1 = left + 3 > op.width ? op.width : left + 3;
    vec y = w0 == known ? last : column(w0);
    for (int64_t w = w0 + 1; w < w1; ++w) y = maximum(y, last = column(w));
    known = w1 - w0 > 1 ? w1 - 1 : -1;
    store_up_to(out, y, lanes);
  }
}

inline void max_pool(const MaxPool& op, Range rows) {
  for (int64_t oh = rows.begin; oh < rows.end; ++oh)
    for (int64_t c = 0; c < op.channels; c += W) max_pool_row(op, oh, c, op.channels - c);
}

inline void sum_pixels(const float* x, Strides strides, int64_t pixels, int64_t channels, float* sums) {
  for (int64_t c = 0; c < channels; c += W) {
    const int64_t n = channels - c;
    const float* p = x + strides.at(0, c);
    vec sum = load_up_to(sums + c, n);
    for (int64_t i = 0; i < pixels; ++i, p += strides.pixel) sum += load_up_to(p, n);
    store_up_to(sums + c, sum, n);
  }
}

// Every row's own sums, sums_stride apart. Four rows at a time: one alone waits for its own last addition.
template <int ROWS>
FASTCONV_INLINE void sum_row_group(const float* x, int64_t row_stride, int64_t pixel_stride, int64_t pixels, int64_t lanes, float* sums,
                                   int64_t sums_stride) {
  vec sum[ROWS] = {};
  for (int64_t i = 0; i < pixels; ++i, x += pixel_stride)
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) sum[r] += load_up_to(x + r * row_stride, lanes);
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) store_up_to(sums + r * sums_stride, sum[r], lanes);
}
inline void sum_rows(const float* x, Strides strides, int64_t pixels, int64_t rows, int64_t channels, float* sums, int64_t sums_stride) {
  const int64_t row_stride = pixels * strides.pixel;
  for (int64_t c = 0; c < channels; c += W) {
    const float* from = x + strides.at(0, c);
    float* to = sums + c;
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4, from += 4 * row_stride, to += 4 * sums_stride)
      sum_row_group<4>(from, row_stride, strides.pixel, pixels, channels - c, to, sums_stride);
    for (; row < rows; ++row, from += row_stride, to += sums_stride)
      sum_row_group<1>(from, row_stride, strides.pixel, pixels, channels - c, to, sums_stride);
  }
}

inline void scale_channels(float* x, Strides strides, int64_t pixels, int64_t channels, const float* scales) {
  for (int64_t c = 0; c < channels; c += W) {
    const int64_t n = channels - c;
    const vec scale = load_up_to(scales + c, n);
    float* p = x + strides.at(0, c);
    for (int64_t i = 0; i < pixels; ++i, p += strides.pixel) store_up_to(p, load_up_to(p, n) * scale, n);
  }
}

}  // namespace fastconv::FASTCONV_ISA
