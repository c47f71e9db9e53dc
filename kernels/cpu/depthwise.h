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

// One tap row of one tile: every input is loaded once and used for all tap columns. At the image's edge, inputs outside [first, last) are
// skipped, not read.
template <int K, int STRIDE, int TILE, bool EDGE, class Read>
FASTCONV_INLINE void depthwise_tap_row(vec (&sum)[TILE], const float* x, int64_t x_stride, const float* taps, int64_t channels,
                                       int64_t first, int64_t last, Read read) {
  vec tap[K];
#pragma GCC unroll 8
  for (int kw = 0; kw < K; ++kw) tap[kw] = read(taps + kw * channels);
#pragma GCC unroll 32
  for (int j = 0; j < (TILE - 1) * STRIDE + K; ++j, x += x_stride) {
    if (EDGE && (j < first || j >= last)) continue;
    const vec value = read(x);
#pragma GCC unroll 8
    for (int kw = 0; kw < K; ++kw)
      if ((j - kw) % STRIDE == 0 && j >= kw && (j - kw) / STRIDE < TILE) sum[(j - kw) / STRIDE] += value * tap[kw];
  }
}

// TILE columns from `ow`, over all channels of the range. WHOLE: all K tap rows lie in the image.
template <int K, int STRIDE, int TILE, bool EDGE, bool WHOLE>
FASTCONV_INLINE void depthwise_tile(const Depthwise& op, const TapRows<K>& rows, int64_t ow, Range channels) {
  const int64_t left = ow * STRIDE - op.pad_w, x_stride = op.x_stride, all = op.channels;
  const Clamp clamp(op.activation);
  float* const out = op.out + ow * op.out_stride;
  const auto block = [&](int64_t c, auto read, auto write) FASTCONV_LAMBDA_INLINE {
    vec sum[TILE];
    const vec bias = read(op.bias + c);
#pragma GCC unroll 8
    for (int t = 0; t < TILE; ++t) sum[t] = bias;
    const auto tap_row = [&](int64_t kh) FASTCONV_LAMBDA_INLINE {
      depthwise_tap_row<K, STRIDE, TILE, EDGE>(sum, rows.row[kh] + left * x_stride + c, x_stride, op.taps + kh * K * all + c, all, -left,
                                               op.width - left, read);
    };
    if constexpr (WHOLE) {
#pragma GCC unroll 8
      for (int kh = 0; kh < K; ++kh) tap_row(kh);
    } else {
      for (int64_t kh = rows.kh.begin; kh < rows.kh.end; ++kh) tap_row(kh);
    }
#pragma GCC unroll 8
    for (int t = 0; t < TILE; ++t) write(out + t * op.out_stride + c, clamp(sum[t]));
  };
  int64_t c = channels.begin;
  for (; c + W <= channels.end; c += W)
    block(c, [](const float* p) FASTCONV_LAMBDA_INLINE { return load(p); }, [](float* p, vec y) FASTCONV_LAMBDA_INLINE { store(p, y); });
  if (const int lanes = static_cast<int>(channels.end - c); lanes > 0)
    block(
        c, [&](const float* p) FASTCONV_LAMBDA_INLINE { return load_first(p, lanes); },
        [&](float* p, vec y) FASTCONV_LAMBDA_INLINE { store_first(p, y, lanes); });
}

template <int K, int STRIDE, int TILE>
__attribute__((noinline)) void depthwise_tile_any(const Depthwise& op, const TapRows<K>& rows, int64_t ow, Range channels) {
  const int64_t left = ow * STRIDE - op.pad_w;
  const bool inside = left >= 0 && left + (TILE - 1) * STRIDE + K <= op.width, whole = rows.kh.size() == K;
  if (inside && whole)
    depthwise_tile<K, STRIDE, TILE, false, true>(op, rows, ow, channels);
  else if (whole)
    depthwise_tile<K, STRIDE, TILE, true, true>(op, rows, ow, channels);
  else
    depthwise_tile<K, STRIDE, TILE, true, false>(op, rows, ow, channels);
  if (!is_clamp(op.activation))
    activate_rows(op.out + ow * op.out_stride + channels.begin, op.out_stride, TILE, channels.size(), op.activation);
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
