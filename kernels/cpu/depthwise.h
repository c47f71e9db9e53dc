// Depthwise KxK: a vector of channels, ROWS x TILE outputs in registers, so each input is loaded once a tile and used for every tap.
// Included per ISA.
//
// Two output rows at a time, over blocked images: 56x56x144 at 257 GFLOP/s where one row over innermost channels reaches 114 (Zen 5, 268
// peak): blocks are contiguous, so the hardware fetches ahead and neighbouring pixels never share a cache set, and four rows of loads serve
// two of outputs instead of six.
#pragma once

#include "kernels/cpu/epilogue.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/tile.h"

namespace fastconv::FASTCONV_ISA {

constexpr int DEPTHWISE_TILE = 7;                        // divides 112, 56, 28, 14 and 7
constexpr int DEPTHWISE_ROWS = REGISTERS == 32 ? 2 : 1;  // 14 sums and 6 taps need more than 16 registers

// ROWS x TILE outputs of one vector of channels. rows + offset: the inputs of the tile's first column; null rows are outside the image. At
// the image's edge, columns outside [first, last) are skipped, not read. (Every sum takes its taps in the same order in every tile.)
template <int K, int STRIDE, int ROWS, int TILE, bool EDGE, class Read, class Write>
FASTCONV_INLINE void depthwise_tile(const float* const* rows, int64_t offset, int64_t x_stride, const float* taps, int64_t channels,
                                    const float* bias, int64_t first, int64_t last, Activation activation, const Clamp& clamp, Read read,
                                    Write write) {
  constexpr int N = (TILE - 1) * STRIDE + K;  // columns of the input
  vec sum[ROWS][TILE];
  const vec start = read(bias);
#pragma GCC unroll 2
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < TILE; ++t) sum[r][t] = start;
  // The first and last STRIDE input rows serve one row of outputs, those between both.
#pragma GCC unroll 8
  for (int i = 0; i < (ROWS - 1) * STRIDE + K; ++i) {
    if (EDGE && !rows[i]) continue;
    const float* x = rows[i] + offset;
    vec tap[ROWS][K];
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; ++r)
      if (i >= r * STRIDE && i < r * STRIDE + K)
#pragma GCC unroll 8
        for (int kw = 0; kw < K; ++kw) tap[r][kw] = read(taps + ((i - r * STRIDE) * K + kw) * channels);
    // Tap by tap where a row's inputs fit the registers beside the sums: neighbouring multiply-adds do not wait for each other.
    if constexpr (!EDGE && STRIDE == 1 && N + ROWS * TILE + ROWS * K <= REGISTERS) {
      vec value[N];
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) value[j] = read(x + j * x_stride);
#pragma GCC unroll 8
      for (int kw = 0; kw < K; ++kw)
#pragma GCC unroll 8
        for (int t = 0; t < TILE; ++t)
#pragma GCC unroll 2
          for (int r = 0; r < ROWS; ++r)
            if (i >= r && i < r + K) sum[r][t] += value[t + kw] * tap[r][kw];
      continue;
    }
#pragma GCC unroll 32
    for (int j = 0; j < N; ++j, x += x_stride) {
      if (EDGE && (j < first || j >= last)) continue;
      const vec value = read(x);
#pragma GCC unroll 2
      for (int r = 0; r < ROWS; ++r)
        if (i >= r * STRIDE && i < r * STRIDE + K)
#pragma GCC unroll 8
          for (int kw = 0; kw < K; ++kw)
            if ((j - kw) % STRIDE == 0 && j >= kw && (j - kw) / STRIDE < TILE) sum[r][(j - kw) / STRIDE] += value * tap[r][kw];
    }
  }
  const auto finish = [&](auto activated) FASTCONV_LAMBDA_INLINE {
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
      for (int t = 0; t < TILE; ++t) write(r, t, activated(sum[r][t]));
  };
  if (clamp.bounds())
    finish([&](vec y) FASTCONV_LAMBDA_INLINE { return clamp(y); });
  else if (activation == Activation::hardswish)
    finish([](vec y) FASTCONV_LAMBDA_INLINE { return activate(y, Activation::hardswish); });
  else
    finish([](vec y) FASTCONV_LAMBDA_INLINE { return y; });
}

// `number` tiles of TILE columns from `column` on, of ROWS output rows and the channels of a range. BLOCKED: both images are, so a pixel's
// place is a displacement; additions take the multiply-adds' ports (a 3x3 tile in L1, Xeon: 115 cycles, 91 so, 77 at best).
template <int K, int STRIDE, int ROWS, int TILE, bool BLOCKED>
__attribute__((noinline)) void depthwise_columns(const Depthwise& op, const float* const* rows, int64_t column, int64_t number,
                                                 Range channels, float* out) {
  const Clamp clamp(op.activation);
  const Strides x_strides(BLOCKED ? PANEL : op.x_strides.pixel, op.x_strides.block);
  const Strides out_strides(BLOCKED ? PANEL : op.out_strides.pixel, op.out_strides.block);
  const int64_t vectors = ceil_div(channels.size(), W);
  bool complete = true;
  for (int i = 0; i < (ROWS - 1) * STRIDE + K; ++i) complete = complete && rows[i];
  const auto one = [&](int64_t column, int64_t c) FASTCONV_LAMBDA_INLINE {
    const int64_t left = column * STRIDE - op.pad_w, offset = left * x_strides.pixel + x_strides.at(0, c), lanes = channels.end - c;
    float* const to = out + out_strides.at(column, c);
    const bool inside = complete && left >= 0 && left + (TILE - 1) * STRIDE + K <= op.width;
    const auto tile = [&](auto EDGE, auto read, auto put) FASTCONV_LAMBDA_INLINE {
      depthwise_tile<K, STRIDE, ROWS, TILE, EDGE>(
          rows, offset, x_strides.pixel, op.taps + c, op.channels, op.bias + c, -left, op.width - left, op.activation, clamp, read,
          [&](int r, int t, vec y) FASTCONV_LAMBDA_INLINE { put(to + r * op.out_row_stride + t * out_strides.pixel, y); });
    };
    const auto whole = [](const float* p) FASTCONV_LAMBDA_INLINE { return load(p); };
    const auto put_whole = [](float* p, vec y) FASTCONV_LAMBDA_INLINE { store(p, y); };
    const auto some = [&](const float* p) FASTCONV_LAMBDA_INLINE { return load_first(p, static_cast<int>(lanes)); };
    const auto put_some = [&](float* p, vec y) FASTCONV_LAMBDA_INLINE { store_first(p, y, static_cast<int>(lanes)); };
    if (lanes < W)
      tile(std::true_type{}, some, put_some);
    else if (inside)
      tile(std::false_type{}, whole, put_whole);
    else
      tile(std::true_type{}, whole, put_whole);
    if (in_second_pass(op.activation))
      for (int r = 0; r < ROWS; ++r) activate_rows(to + r * op.out_row_stride, out_strides, TILE, lanes < W ? lanes : W, op.activation);
  };
  // A block's row is one run of memory, and so are a pixel's channels where they are innermost.
  const bool by_tile = x_strides.innermost();
  const int64_t outer = by_tile ? number : vectors, inner = by_tile ? vectors : number;
  for (int64_t i = 0; i < outer; ++i)
    for (int64_t j = 0; j < inner; ++j) one(column + (by_tile ? i : j) * TILE, channels.begin + (by_tile ? j : i) * W);
}

// ROWS output rows; out points at the first.
template <int K, int STRIDE, int ROWS>
void depthwise_rows(const Depthwise& op, int64_t oh, Range channels, float* out) {
  constexpr int IN_ROWS = (ROWS - 1) * STRIDE + K;
  const float* rows[IN_ROWS];
  for (int64_t i = 0; i < IN_ROWS; ++i) {
    // With a stride_h of its own (2 rows at a time only where it is STRIDE) row i is still the i-th under the first output row.
    const int64_t h = oh * op.stride_h - op.pad_h + i;
    rows[i] = h < 0 || h >= op.height ? nullptr : op.x + h % op.ring_rows * op.x_row_stride;
  }
  const Pieces pieces(op.out_width, DEPTHWISE_TILE);
  const bool blocked = op.x_strides.pixel == PANEL && op.out_strides.pixel == PANEL;
  const auto run = [&](int64_t size, int64_t column, int64_t number) {
    if (number > 0)
      with_constant<DEPTHWISE_TILE>(size, [&](auto TILE) {
        auto columns = depthwise_columns<K, STRIDE, ROWS, TILE, false>;
        if constexpr (TILE == DEPTHWISE_TILE)  // the size of nearly all
          if (blocked) columns = depthwise_columns<K, STRIDE, ROWS, TILE, true>;
        columns(op, rows, column, number, channels, out);
      });
  };
  run(pieces.size + 1, 0, pieces.longer);
  run(pieces.size, pieces.longer * (pieces.size + 1), pieces.shorter);
}

template <int K, int STRIDE>
void depthwise_image(const Depthwise& op, Range rows, Range channels) {
  float* out = op.out;
  int64_t oh = rows.begin;
  if (DEPTHWISE_ROWS == 2 && op.stride_h == STRIDE)
    for (; oh + 2 <= rows.end; oh += 2, out += 2 * op.out_row_stride) depthwise_rows<K, STRIDE, DEPTHWISE_ROWS>(op, oh, channels, out);
  for (; oh < rows.end; ++oh, out += op.out_row_stride) depthwise_rows<K, STRIDE, 1>(op, oh, channels, out);
}

inline void depthwise(const Depthwise& op, Range rows, Range channels) {
  if (op.kernel == 3 && op.stride_w == 1) return depthwise_image<3, 1>(op, rows, channels);
  if (op.kernel == 3) return depthwise_image<3, 2>(op, rows, channels);
  if (op.stride_w == 1) return depthwise_image<5, 1>(op, rows, channels);
  depthwise_image<5, 2>(op, rows, channels);
}

}  // namespace fastconv::FASTCONV_ISA
