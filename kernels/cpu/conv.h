// Dense KxK convolution as an indirect matrix product: a tile's pixels are found through pointers, so padding costs a pointer to zeros
// instead of a padded copy. Included per ISA.
#pragma once

#include "kernels/cpu/tile.h"

namespace fastconv::FASTCONV_ISA {

inline void conv(const Conv& op, Range pixels, Range panels) {
  constexpr int MOST = max_rows<MAX_NV>();  // pointers take registers: six rows at most
  constexpr int64_t MAX_TAPS = 49;
  const int64_t taps = op.kernel_h * op.kernel_w;
  const float* table[MAX_TAPS * MOST];
  for (int64_t m = pixels.begin; m < pixels.end; m += MOST) {
    const int64_t rows = pixels.end - m < MOST ? pixels.end - m : MOST;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t oh = (m + r) / op.out_width, ow = (m + r) % op.out_width;
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t ih = oh * op.stride_h - op.pad_h + tap / op.kernel_w, iw = ow * op.stride_w - op.pad_w + tap % op.kernel_w;
        const bool inside = ih >= 0 && ih < op.height && iw >= 0 && iw < op.width;
        table[tap * rows + r] = inside ? op.x + (ih * op.width + iw) * op.x_stride : op.zeros;
      }
    }
    Output to{op.panels, taps * op.in_channels * PANEL, op.epilogue, op.out + m * op.out_strides.pixel, op.out_strides, 0};
    if (to.epilogue.residual) to.epilogue.residual += m * to.epilogue.residual_strides.pixel;
    for_each_chunk<MAX_NV>(panels, op.out_channels, false, [&](auto NV, std::false_type, int64_t column, int64_t columns) {
      with_constant<MOST>(
          rows, [&](auto MR) { tiles<MR, NV, false>(Indirect<MR>{table, taps, op.in_channels, {}}, 1, at_column(to, column, columns)); });
    });
  }
}

inline void padded_conv(const PaddedConv& op, Range rows, Range panels) {
  const int64_t tap_row = op.kernel_w * op.in_channels;
  for_each_chunk<PREFERRED_NV>(panels, op.out_channels, false, [&](auto NV, std::false_type, int64_t column, int64_t columns) {
    for (int64_t h = rows.begin; h < rows.end; ++h) {
      const StridedSource source{op.x + h * op.x_row_stride, op.x_stride, op.kernel_h, tap_row, op.x_row_stride};
      Output to{op.panels, op.kernel_h * tap_row * PANEL, op.epilogue, op.out + h * op.out_width * op.out_strides.pixel, op.out_strides, 0};
      if (to.epilogue.residual) to.epilogue.residual += h * op.out_width * to.epilogue.residual_strides.pixel;
      cover<NV, false>(op.out_width, at_column(to, column, columns), [&](auto MR, int64_t first) { return Strided<MR>(source, first); });
    }
  });
}

}  // namespace fastconv::FASTCONV_ISA
