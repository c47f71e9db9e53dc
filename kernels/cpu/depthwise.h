// Depthwise KxK, channels innermost: a vector of channels slides along a row, TILE output columns in registers, so each input is loaded
// once per tap row and used for every tap column. Included per ISA.
#pragma once

#include "kernels/cpu/epilogue.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/tile.h"

namespace fastconv::FASTCONV_ISA {

constexpr int DEPTHWISE_TILE = 7;  // divides 112, 56, 28, 14 and 7

// The input rows under one output row; those outside the image are none.
template <int K>
struct TapRows {
  const float* row[K];
  Range kh;
};

// One tile: TILE columns from `ow`, one vector of channels. At the image's edge, columns outside are skipped, not read.
template <int K, int STRIDE, int TILE, bool EDGE>
FASTCONV_INLINE void depthwise_tile(const Depthwise& op, const TapRows<K>& rows, int64_t ow, int64_t c, int lanes) {
  const auto read = [&](const float* p) { return lanes == W ? load(p) : load_first(p, lanes); };
  vec sum[TILE];
  const vec bias = read(op.bias + c);
#pragma GCC unroll 8
  for (int t = 0; t < TILE; ++t) sum[t] = bias;
  const int64_t left = ow * STRIDE - op.pad_w;
  for (int64_t kh = rows.kh.begin; kh < rows.kh.end; ++kh) {
    const float* row = rows.row[kh] + left * op.x_stride + c;
    vec tap[K];
#pragma GCC unroll 8
    for (int kw = 0; kw < K; ++kw) tap[kw] = read(op.taps + (kh * K + kw) * op.channels + c);
#pragma GCC unroll 32
    for (int j = 0; j < (TILE - 1) * STRIDE + K; ++j) {
      if (EDGE && (left + j < 0 || left + j >= op.width)) continue;
      const vec x = read(row + j * op.x_stride);
#pragma GCC unroll 8
      for (int kw = 0; kw < K; ++kw)
        if ((j - kw) % STRIDE == 0 && j >= kw && (j - kw) / STRIDE < TILE) sum[(j - kw) / STRIDE] += x * tap[kw];
    }
  }
  float* out = op.out + ow * op.out_stride + c;
#pragma GCC unroll 8
  for (int t = 0; t < TILE; ++t) {
    const vec y = activate(sum[t], op.activation);
    lanes == W ? store(out + t * op.out_stride, y) : store_first(out + t * op.out_stride, y, lanes);
  }
}

template <int K, int STRIDE, int TILE>
__attribute__((noinline)) void depthwise_tile_any(const Depthwise& op, const TapRows<K>& rows, int64_t ow, Range channels) {
  const int64_t left = ow * STRIDE - op.pad_w;
  const bool edge = left < 0 || left + (TILE - 1) * STRIDE + K > op.width;
  int64_t c = channels.begin;
  if (edge)
    for (; c + W <= channels.end; c += W) depthwise_tile<K, STRIDE, TILE, true>(op, rows, ow, c, W);
  else
    for (; c + W <= channels.end; c += W) depthwise_tile<K, STRIDE, TILE, false>(op, rows, ow, c, W);
  if (c < channels.end) depthwise_tile<K, STRIDE, TILE, true>(op, rows, ow, c, static_cast<int>(channels.end - c));
}

template <int K, int STRIDE>
void depthwise_rows(Depthwise op, Range rows, Range channels) {
  const Pieces pieces(op.out_width, DEPTHWISE_TILE);
  for (int64_t oh = rows.begin; oh < rows.end; ++oh) {
    const int64_t top = oh * op.stride_h - op.pad_h;
    TapRows<K> taps{{}, {top < 0 ? -top : 0, top + K > op.height ? op.height - top : K}};
    for (int64_t kh = taps.kh.begin; kh < taps.kh.end; ++kh) taps.row[kh] = op.x + (top + kh) % op.ring_rows * op.x_row_stride;
    int64_t ow = 0;
    for (int64_t t = 0; t < pieces.longer + pieces.shorter; ++t) {
      const int64_t size = pieces.size + (t < pieces.longer);
      with_constant<DEPTHWISE_TILE>(size, [&](auto TILE) { depthwise_tile_any<K, STRIDE, TILE>(op, taps, ow, channels); });
      ow += size;
    }
    op.out += op.out_row_stride;
  }
}

inline void depthwise(const Depthwise& op, Range rows, Range channels) {
  if (op.kernel == 3 && op.stride_w == 1) return depthwise_rows<3, 1>(op, rows, channels);
  if (op.kernel == 3) return depthwise_rows<3, 2>(op, rows, channels);
  if (op.stride_w == 1) return depthwise_rows<5, 1>(op, rows, channels);
  depthwise_rows<5, 2>(op, rows, channels);
}

}  // namespace fastconv::FASTCONV_ISA
