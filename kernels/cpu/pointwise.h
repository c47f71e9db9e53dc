// Pointwise (1x1) convolution: out[m, n] = activation(sum_k x[m, k] * w[k, n] + bias[n] + residual[m, n]). Included per ISA.
#pragma once

#include "kernels/cpu/tile.h"

namespace fastconv::FASTCONV_ISA {

inline void pointwise(const Pointwise& op, Range pixels, Range panels) {
  // Weights that fit L2 pass whole over one tile of pixels, so each pixel is read and written once (12544x32->64: 1.4x faster).
  // Larger ones: a block of pixels stays in L2 while all panels pass over it.
  constexpr int64_t WEIGHT_FLOATS = 128 * 1024, BLOCK_FLOATS = 64 * 1024;
  const int64_t K = op.in_channels, panel_stride = K * PANEL;
  const int64_t most = K * panels.size() * PANEL <= WEIGHT_FLOATS ? max_rows<W == 16 ? 2 : MAX_NV>() : BLOCK_FLOATS / K < 56 ? 56 : BLOCK_FLOATS / K;
  const Pieces blocks(pixels.size(), most);
  for (int64_t b = 0; b < blocks.pieces; ++b) {
    const int64_t block = pixels.begin + blocks.begin(b), block_size = blocks.size(b);
    for_each_chunk(panels, op.out_channels, W == 16 ? 2 : MAX_NV, [&](int64_t column, int64_t nv, int64_t columns) {
      with_constant<MAX_NV>(nv, [&](auto NV) {
        const Pieces tiles(block_size, max_rows<NV>());
        for (int64_t t = 0; t < tiles.pieces; ++t) {
          const int64_t m = block + tiles.begin(t);
          Epilogue epilogue = op.epilogue;
          epilogue.bias += column;
          if (epilogue.residual) epilogue.residual += m * epilogue.residual_stride + column;
          const StridedSource source{op.x + m * op.x_stride, op.x_stride, 1, K, 0};
          const float* panel = op.panels + column / PANEL * panel_stride + column % PANEL;
          float* out = op.out + m * op.out_stride + column;
          with_constant<max_rows<NV>()>(tiles.size(t), [&](auto MR) { tile<MR, NV>(Strided<MR>(source), panel, panel_stride, epilogue, out, op.out_stride, columns); });
        }
      });
    });
  }
}

}  // namespace fastconv::FASTCONV_ISA
