// The first layer: KxK over at most 4 channels, reading NCHW or channels_last directly. Included per ISA.
//
// Each output row copies the input rows under it into a small buffer with its zero border, (kh, channel, column); the tile then reads
// every tap at a constant step. The copy is under 3% of the work (7x7, 96 channels: 4.7k floats against 1.5M multiply-adds).
#pragma once

#include "kernels/cpu/tile.h"

namespace fastconv::FASTCONV_ISA {

inline void fill_row_buffer(const Stem& op, int64_t oh, float* buffer) {
  const int64_t width = op.buffer_width();
  for (int64_t kh = 0; kh < op.kernel_h; ++kh) {
    const int64_t ih = oh * op.stride_h - op.pad_h + kh;
    for (int64_t c = 0; c < op.in_channels; ++c) {
      float* row = buffer + (kh * op.in_channels + c) * width;
      if (ih < 0 || ih >= op.height) {
        std::memset(row, 0, width * sizeof(float));
        continue;
      }
      const float* source = op.x + ih * op.row_stride + c * op.channel_stride;
      // Buffer column j is input column j - pad_w.
      const int64_t first = op.pad_w < width ? op.pad_w : width;
      const int64_t last = op.width + op.pad_w < width ? op.width + op.pad_w : width;
      for (int64_t j = 0; j < first; ++j) row[j] = 0.0f;
      if (op.pixel_stride == 1 && last > first)
        std::memcpy(row + first, source, (last - first) * sizeof(float));
      else
        for (int64_t j = first; j < last; ++j) row[j] = source[(j - op.pad_w) * op.pixel_stride];
      for (int64_t j = last > first ? last : first; j < width; ++j) row[j] = 0.0f;
    }
  }
}

// Asks for the input rows that output row `oh` adds: an image comes from memory, and its rows are too short for the hardware to guess.
inline void fetch_rows(const Stem& op, int64_t oh) {
  const int64_t end = oh * op.stride_h - op.pad_h + op.kernel_h, last = end < op.height ? end : op.height;
  const int64_t first = end - op.stride_h < 0 ? 0 : end - op.stride_h, runs = op.pixel_stride == 1 ? op.in_channels : 1;
  for (int64_t ih = first; ih < last; ++ih)
    for (int64_t c = 0; c < runs; ++c) {
      const float* row = op.x + ih * op.row_stride + c * op.channel_stride;
      for (int64_t i = 0; i < op.width * op.pixel_stride; i += 16) __builtin_prefetch(row + i);
    }
}

template <int STEP>
void stem_rows(const Stem& op, Range rows, float* buffer) {
  constexpr int MAX_DEPTH = 7 * 7 * 4;
  int32_t offsets[MAX_DEPTH];  // packed order (kh, kw, c) -> place in the row buffer
  const int64_t width = op.buffer_width(), depth = op.kernel_h * op.kernel_w * op.in_channels;
  int32_t* offset = offsets;
  for (int64_t kh = 0; kh < op.kernel_h; ++kh)
    for (int64_t kw = 0; kw < op.kernel_w; ++kw)
      for (int64_t c = 0; c < op.in_channels; ++c) *offset++ = static_cast<int32_t>((kh * op.in_channels + c) * width + kw);
  for (int64_t oh = rows.begin; oh < rows.end; ++oh) {
    fill_row_buffer(op, oh, buffer);
    fetch_rows(op, oh + 1);
    const Output to{op.panels, depth * PANEL, op.epilogue, op.out + oh * op.out_width * op.out_strides.pixel, op.out_strides, 0};
    for_each_chunk<PREFERRED_NV>({0, panels_for(op.out_channels)}, op.out_channels, false,
                                 [&](auto NV, std::false_type, int64_t column, int64_t columns) {
                                   cover<NV, false>(op.out_width, at_column(to, column, columns), [&](auto MR, int64_t first) {
                                     return Stepped<MR, STEP>{buffer + first * op.stride_w, offsets, 1, depth, op.stride_w};
                                   });
                                 });
  }
}

inline void stem(const Stem& op, Range rows, float* scratch) {
  if (op.stride_w == 2) return stem_rows<2>(op, rows, scratch);
  stem_rows<0>(op, rows, scratch);
}

}  // namespace fastconv::FASTCONV_ISA
