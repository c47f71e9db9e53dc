// Dense KxK convolution as an indirect matrix product: a tile's pixels are found through pointers, so padding costs a pointer to zeros
// instead of a padded copy. Included per ISA.
#pragma once

#include "kernels/cpu/tile.h"

namespace fastconv::FASTCONV_ISA {

inline void conv(const Conv& op, Range pixels, Range panels) {
  constexpr int NV = MAX_NV, MOST = max_rows<NV>();  // pointers take registers: six rows at most
  const int64_t taps = op.kernel_h * op.kernel_w, panel_stride = taps * op.in_channels * PANEL;
  constexpr int64_t MAX_TAPS = 49;
  const float* table[MAX_TAPS * MOST];
  const Pieces tiles(pixels.size(), MOST);
  for (int64_t t = 0; t < tiles.pieces; ++t) {
    const int64_t m = pixels.begin + tiles.begin(t), rows = tiles.size(t);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t oh = (m + r) / op.out_width, ow = (m + r) % op.out_width;
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t ih = oh * op.stride_h - op.pad_h + tap / op.kernel_w, iw = ow * op.stride_w - op.pad_w + tap % op.kernel_w;
        const bool inside = ih >= 0 && ih < op.height && iw >= 0 && iw < op.width;
        table[tap * rows + r] = inside ? op.x + (ih * op.width + iw) * op.x_stride : op.zeros;
      }
    }
    for_each_chunk(panels, op.out_channels, NV, [&](int64_t column, int64_t nv, int64_t columns) {
      Epilogue epilogue = op.epilogue;
      epilogue.bias += column;
      if (epilogue.residual) epilogue.residual += m * epilogue.residual_stride + column;
      const float* panel = op.panels + column / PANEL * panel_stride + column % PANEL;
      float* out = op.out + m * op.out_stride + column;
      with_constant<NV>(nv, [&](auto nv_) {
        with_constant<MOST>(rows, [&](auto MR) {
          tile<MR, nv_>(Indirect<MR>{table, taps, op.in_channels, {}}, panel, panel_stride, epilogue, out, op.out_stride, columns);
        });
      });
    });
  }
}

inline void padded_conv(const PaddedConv& op, Range rows, Range panels) {
  const int64_t taps = op.kernel_h * op.kernel_w, panel_stride = taps * op.in_channels * PANEL;
  for_each_chunk(panels, op.out_channels, W == 16 ? 2 : MAX_NV, [&](int64_t column, int64_t nv, int64_t columns) {
    with_constant<MAX_NV>(nv, [&](auto NV) {
      const Pieces tiles(op.out_width, max_rows<NV>());
      for (int64_t h = rows.begin; h < rows.end; ++h)
        for (int64_t t = 0; t < tiles.pieces; ++t) {
          const int64_t ow = tiles.begin(t), m = h * op.out_width + ow;
          Epilogue epilogue = op.epilogue;
          epilogue.bias += column;
          if (epilogue.residual) epilogue.residual += m * epilogue.residual_stride + column;
          const StridedSource source{op.x + h * op.x_row_stride + ow * op.x_stride, op.x_stride, op.kernel_h, op.kernel_w * op.in_channels,
                                     op.x_row_stride};
          const float* panel = op.panels + column / PANEL * panel_stride + column % PANEL;
          float* out = op.out + m * op.out_stride + column;
          with_constant<max_rows<NV>()>(tiles.size(t), [&](auto MR) { tile<MR, NV>(Strided<MR>(source), panel, panel_stride, epilogue, out, op.out_stride, columns); });
        }
    });
  });
}

}  // namespace fastconv::FASTCONV_ISA
