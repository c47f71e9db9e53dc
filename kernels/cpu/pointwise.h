// Pointwise (1x1) convolution: out[m, n] = activation(sum_k x[m, k] * w[k, n] + bias[n] + residual[m, n]). Included per ISA.
#pragma once

#include "kernels/cpu/tile.h"

namespace fastconv::FASTCONV_ISA {

inline void pointwise(const Pointwise& op, Range pixels, Range panels) {
  // Weights that fit L2 pass whole over a block of up to eight tiles that stays in L1, or nearly, so each pixel is read and written once
  // (12544x32->64: 1.5x faster than by panel). Larger ones: a block of pixels stays in L2 while all panels pass over it.
  constexpr int64_t L2_FLOATS = 64 * 1024, L2_WEIGHTS = 128 * 1024, TILE = max_rows<PREFERRED_NV>(), SMALL_TILES = 8;
  const int64_t K = op.in_channels;
  const bool small = K * panels.size() * PANEL <= L2_WEIGHTS;
  const bool once = panels.size() * PANEL <= PREFERRED_NV * W;  // one pass
  const int64_t tiles = ceil_div(pixels.size(), TILE), at_once = once ? tiles : small ? SMALL_TILES : L2_FLOATS / K / TILE;
  const int64_t most = TILE * (at_once < 1 ? 1 : at_once >= tiles ? tiles : ceil_div(tiles, ceil_div(tiles, at_once)));
  for (int64_t m = pixels.begin; m < pixels.end; m += most) {
    const int64_t rows = pixels.end - m < most ? pixels.end - m : most;
    const float* const x = op.x + m * op.x_strides.pixel;
    const float* const end = op.x + (pixels.end + op.more_pixels) * PANEL;
    const StridedSource source{x, op.x_strides.pixel, 1, K, 0};
    Output to{op.panels, K * PANEL, op.epilogue, op.out + m * op.out_strides.pixel, op.out_strides, 0};
    if (to.epilogue.residual) to.epilogue.residual += m * to.epilogue.residual_strides.pixel;
    const bool paired = last_panel_is_paired(op.out_channels);
    // Weights that this call has not brought into L2 yet. (Those of a matrix-vector product are a stream that the hardware fetches: 109
    // GB/s, with our fetches 100.)
    const bool cold = !small || m == pixels.begin, fetches = rows > 4 && (cold || (stream && !stream->empty()));
    const auto chunk = [&](auto NV, auto PAIR, int64_t column, int64_t columns, int64_t chunks) {
      Output at = at_column(to, column, columns);
      at.chunks = chunks;
      Ahead ahead(op, panels, NV * W / PANEL, ceil_div(rows, TILE) * (K / UNROLL), cold);
      if constexpr (NV > 0 && NV * W % PANEL == 0)
        if (fetches) {
          ahead.begin(column / PANEL);
          at.ahead = &ahead;
        }
      if (op.x_strides.innermost())
        cover<NV, PAIR>(rows, at, [&](auto MR, int64_t first) { return Strided<MR>(source, first); });
      else
        cover<NV, PAIR>(rows, at, [&](auto MR, int64_t first) {
          return Blocked<MR>(x + first * PANEL, op.x_strides.block, K, column == panels.begin * PANEL ? end : nullptr);
        });
    };
    if (rows <= 4)  // a matrix-vector product reads each weight once: the more streams at a time, the better memory keeps up
      for_each_chunk<MAX_NV>(panels, op.out_channels, paired, chunk);
    else
      for_each_chunk<PREFERRED_NV>(panels, op.out_channels, paired, chunk);
  }
}

}  // namespace fastconv::FASTCONV_ISA
