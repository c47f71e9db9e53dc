// Pointwise (1x1) convolution: out[m, n] = activation(sum_k x[m, k] * w[k, n] + bias[n] + residual[m, n]). Included per ISA.
#pragma once

#include "kernels/cpu/tile.h"

namespace fastconv::FASTCONV_ISA {

inline void pointwise(const Pointwise& op, Range pixels, Range panels) {
  // Weights that fit L2 pass whole over a block of up to four tiles that stays in L1, so each pixel is read and written once
  // (12544x32->64: 1.5x faster than by panel). Larger ones: a block of pixels stays in L2 while all panels pass over it.
  constexpr int64_t L1_FLOATS = 8 * 1024, L2_FLOATS = 64 * 1024, L2_WEIGHTS = 128 * 1024, TILE = max_rows<PREFERRED_NV>();
  const int64_t K = op.in_channels;
  const bool small = K * panels.size() * PANEL <= L2_WEIGHTS;
  const bool once = panels.size() * PANEL <= PREFERRED_NV * W;  // one pass
  const int64_t tiles_at_once = once ? ceil_div(pixels.size(), TILE) : (small ? L1_FLOATS : L2_FLOATS) / K / TILE;
  const int64_t most = TILE * (tiles_at_once < 1 ? 1 : small && !once && tiles_at_once > 4 ? 4 : tiles_at_once);
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
    const bool cold = rows > 4 && (!small || m == pixels.begin);
    const auto chunk = [&](auto NV, auto PAIR, int64_t column, int64_t columns) {
      Output at = at_column(to, column, columns);
      Ahead ahead;
      if constexpr (NV > 0 && NV * W % PANEL == 0)
        if (cold) {
          constexpr int64_t PANELS = NV * W / PANEL;
          const int64_t done = column / PANEL - panels.begin, size = panels.size() - done < PANELS ? panels.size() - done : PANELS;
          const int64_t left = panels_for(op.out_channels) - column / PANEL - PANELS;
          const float* const next = at.panels + PANELS * to.panel_stride;
          ahead.ranges[0] = {next, next + (left < PANELS ? left : PANELS) * to.panel_stride};
          for (int i = 0; i < 2; ++i) ahead.ranges[1 + i] = op.soon[i].part({done, done + size}, panels.size());
          ahead.spread(ceil_div(rows, TILE) * (K / UNROLL));
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
