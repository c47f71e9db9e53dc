// Max-pool 3x3, and the two channel-wise passes of a squeeze-excitation: sum over pixels, and scale. Included per ISA.
#pragma once

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/simd.h"

namespace fastconv::FASTCONV_ISA {

// A vector of channels slides along the row; the maximum of a column of three is shared by the windows that hold it. `maximum`, which keeps
// a NaN, is three instructions on x86: windows take the plain maximum, which keeps that of one operand, and ask of the others, two at a
// time, whether they are numbers. A row where they are not is made again.
template <class Read, class Write>
FASTCONV_INLINE void max_pool_row(const MaxPool& op, int64_t oh, int64_t c, Read read, Write write) {
  const int64_t top = oh * op.stride_h - op.pad_h, pixel = op.x_strides.pixel;
  const int64_t h0 = top < 0 ? 0 : top, h1 = top + 3 > op.height ? op.height : top + 3;
  const float* rows[3];
  for (int64_t i = 0; i < 3; ++i) {  // windows are clipped: a row again changes no maximum
    const int64_t h = h0 + i < h1 ? h0 + i : h1 - 1;
    rows[i] = op.x + h % op.ring_rows * op.x_row_stride + op.x_strides.at(0, c);
  }
  float* const out = op.out + op.out_strides.at(oh * op.out_width, c);
  const auto clipped = [&](int64_t begin, int64_t end) FASTCONV_LAMBDA_INLINE {
    for (int64_t ow = begin; ow < end; ++ow) {
      const int64_t left = ow * op.stride_w - op.pad_w;
      const int64_t w0 = left < 0 ? 0 : left, w1 = left + 3 > op.width ? op.width : left + 3;
      vec y = read(rows[0] + w0 * pixel);
      for (const float* row : rows)
        for (int64_t w = w0; w < w1; ++w) y = maximum(y, read(row + w * pixel));
      write(out + ow * op.out_strides.pixel, y);
    }
  };
  const int64_t first = ceil_div(op.pad_w, op.stride_w);  // of the windows inside the image
  int64_t last = op.width < 3 ? first : (op.width - 3 + op.pad_w) / op.stride_w + 1;
  last = last < first ? first : last < op.out_width ? last : op.out_width;
  if (first >= op.out_width) return clipped(0, op.out_width);
  clipped(0, first);
  Numbers numbers;
  const auto column = [&](int64_t w) FASTCONV_LAMBDA_INLINE {
    const vec upper = read(rows[0] + w * pixel), lower = read(rows[2] + w * pixel);
    numbers.both(upper, lower);
    return at_least(at_least(read(rows[1] + w * pixel), upper), lower);
  };
  vec left{};
  for (int64_t ow = first; ow < last; ++ow) {
    const int64_t w = ow * op.stride_w - op.pad_w;
    if (ow == first || op.stride_w != 2) left = column(w);
    const vec middle = column(w + 1), right = column(w + 2);
    numbers.both(left, right);
    write(out + ow * op.out_strides.pixel, at_least(at_least(middle, left), right));
    left = right;
  }
  clipped(numbers.all() ? last : first, op.out_width);
}

inline void max_pool(const MaxPool& op, Range rows) {
  for (int64_t oh = rows.begin; oh < rows.end; ++oh)
    for (int64_t c = 0; c < op.channels; c += W) {
      const int lanes = static_cast<int>(op.channels - c < W ? op.channels - c : W);
      if (lanes == W)
        max_pool_row(
            op, oh, c, [](const float* p) FASTCONV_LAMBDA_INLINE { return load(p); },
            [](float* p, vec y) FASTCONV_LAMBDA_INLINE { store(p, y); });
      else
        max_pool_row(
            op, oh, c, [=](const float* p) FASTCONV_LAMBDA_INLINE { return load_first(p, lanes); },
            [=](float* p, vec y) FASTCONV_LAMBDA_INLINE { store_first(p, y, lanes); });
    }
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
