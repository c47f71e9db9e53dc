// The first layer: KxK over at most 4 channels, reading NCHW or channels_last directly. Included per ISA.
//
// Each output row copies the input rows under it into a small buffer with its zero border, (kh, channel, column); the tile then reads
// every tap at a constant step. The copy is under 3% of the work (7x7, 96 channels: 4.7k floats against 1.5M multiply-adds).
#pragma once

#include "kernels/cpu/tile.h"

namespace fastconv::FASTCONV_ISA {

// `count` RGB pixels, channels innermost, to three rows `width` apart. One float at a time this took as long as the stem of MobileNet V3
// small itself.
FASTCONV_INLINE void part_rgb(const float* pixels, int64_t count, float* rows, int64_t width) {
  constexpr std::make_integer_sequence<int, W> lanes;
  int64_t j = 0;
  for (; j + W <= count; j += W) {
    const float* p = pixels + 3 * j;
    const vec a = load(p), b = load(p + W), c = load(p + 2 * W);
    store(rows + j, every_third<0>(a, b, c, lanes));
    store(rows + width + j, every_third<1>(a, b, c, lanes));
    store(rows + 2 * width + j, every_third<2>(a, b, c, lanes));
  }
  for (; j < count; ++j)
    for (int64_t c = 0; c < 3; ++c) rows[c * width + j] = pixels[3 * j + c];
}

// A row is a few vectors: a call of memcpy costs as much again.
FASTCONV_INLINE void copy_row(const float* from, int64_t count, float* to) {
  int64_t j = 0;
  for (; j + 2 * W <= count; j += 2 * W) {
    const vec a = load(from + j), b = load(from + j + W);
    store(to + j, a);
    store(to + j + W, b);
  }
  for (; j < count; j += W) store_up_to(to + j, load_up_to(from + j, count - j), count - j);
}

// Input row ih, a row of `width` floats a channel: its columns at [first, last), zeros before and from there to `end`.
FASTCONV_INLINE void fill_image_row(const Stem& op, int64_t ih, float* rows, int64_t width, int64_t first, int64_t last, int64_t end) {
  const int64_t C = op.in_channels;
  const float* const source = op.x + ih * op.row_stride;
  const bool rgb = C == 3 && op.pixel_stride == 3 && op.channel_stride == 1;
  if (rgb) part_rgb(source, last - first, rows + first, width);
  for (int64_t c = 0; c < C; ++c) {
    float* const row = rows + c * width;
    const float* const from = source + c * op.channel_stride;
    for (int64_t j = 0; j < first; ++j) row[j] = 0.0f;
    if (op.pixel_stride == 1)
      copy_row(from, last - first, row + first);
    else if (!rgb)
      for (int64_t j = first; j < last; ++j) row[j] = from[(j - first) * op.pixel_stride];
    for (int64_t j = last; j < end; ++j) row[j] = 0.0f;
  }
}

inline void fill_row_buffer(const Stem& op, int64_t oh, float* buffer) {
  const int64_t width = op.buffer_width(), columns = op.columns(), C = op.in_channels;
  // Buffer column j is input column j - pad_w.
  const int64_t first = op.pad_w < columns ? op.pad_w : columns, end = op.width + op.pad_w < columns ? op.width + op.pad_w : columns;
  const int64_t last = end > first ? end : first;
  for (int64_t kh = 0; kh < op.kernel_h; ++kh) {
    const int64_t ih = oh * op.stride_h - op.pad_h + kh;
    float* const rows = buffer + kh * C * width + op.margin();
    if (ih < 0 || ih >= op.height || last == first)  // an image of no columns has no address either
      std::memset(rows - op.margin(), 0, C * width * sizeof(float));
    else
      fill_image_row(op, ih, rows, width, first, last, columns);
  }
}

// The input rows that output row `oh` adds: a range for each channel, or three equal ones where pixels have all channels. An image comes
// from memory, and its rows are too short for the hardware to guess.
struct NewRows {
  Fetch ranges[3];
  NewRows() = default;
  NewRows(const Stem& op, int64_t oh) {
    const int64_t end = oh * op.stride_h - op.pad_h + op.kernel_h, last = end < op.height ? end : op.height;
    const int64_t first = end - op.stride_h < 0 ? 0 : end - op.stride_h;
    if (first >= last) return;
    const float* const x = op.x + first * op.row_stride;
    const int64_t floats = (last - 1 - first) * op.row_stride + op.width * op.pixel_stride;
    for (int64_t c = 0; c < 3; ++c)
      if (op.pixel_stride == 1 && op.in_channels > c)
        ranges[c] = {x + c * op.channel_stride, x + c * op.channel_stride + floats};
      else if (op.pixel_stride > 1)
        ranges[c] = Fetch{x, x + floats}.part({c, c + 1}, 3);
  }
  void fetch() const {
    for (const Fetch& range : ranges)
      for (const float* p = range.begin; p < range.end; p += PANEL) __builtin_prefetch(p);
  }
};

// rows_of(MR, x, ...): where tiles of MR pixels read whose first reads from x of the buffer on. SPREADS: each tile fetches a share of the
// next row's new input, and rows_of takes that and the row's pixels from the tiles' first on; else all of it is fetched beforehand.
template <bool SPREADS, class RowsOf>
FASTCONV_INLINE void stem_tiles(const Stem& op, Range rows, float* buffer, RowsOf rows_of) {
  const int64_t depth = op.kernel_h * op.kernel_w * op.in_channels;
  for (int64_t oh = rows.begin; oh < rows.end; ++oh) {
    fill_row_buffer(op, oh, buffer);
    const NewRows soon(op, oh + 1);
    if constexpr (!SPREADS) soon.fetch();
    const Output to{op.panels, depth * PANEL, op.epilogue, op.out + oh * op.out_width * op.out_strides.pixel, op.out_strides, 0};
    for_each_chunk<PREFERRED_NV>({0, panels_for(op.out_channels)}, op.out_channels, false,
                                 [&](auto NV, std::false_type, int64_t column, int64_t columns) {
                                   cover<NV, false>(op.out_width, at_column(to, column, columns), [&](auto MR, int64_t first) {
                                     const float* const x = buffer + op.margin() + first * op.stride_w;
                                     if constexpr (SPREADS)
                                       return rows_of(MR, x, column ? NewRows() : soon, Range{first, op.out_width});
                                     else
                                       return rows_of(MR, x);
                                   });
                                 });
  }
}

template <int STEP>
void stem_taps(const Stem& op, Range rows, float* buffer) {
  constexpr int MAX_DEPTH = 7 * 7 * 4;
  int32_t offsets[MAX_DEPTH];  // packed order (kh, kw, c) -> place in the row buffer
  const int64_t width = op.buffer_width(), depth = op.kernel_h * op.kernel_w * op.in_channels;
  int32_t* offset = offsets;
  for (int64_t kh = 0; kh < op.kernel_h; ++kh)
    for (int64_t kw = 0; kw < op.kernel_w; ++kw)
      for (int64_t c = 0; c < op.in_channels; ++c) *offset++ = static_cast<int32_t>((kh * op.in_channels + c) * width + kw);
  stem_tiles<false>(op, rows, buffer, [&](auto MR, const float* x) { return Stepped<MR, STEP>{x, offsets, 1, depth, op.stride_w}; });
}

inline void stem(const Stem& op, Range rows, float* scratch) {
  if (op.kernel_w == 3 && op.stride_w == 2 && op.in_channels == 3)
    return stem_tiles<true>(op, rows, scratch, [&](auto MR, const float* x, const NewRows& soon, Range pixels) {
      return Window<MR, 2, 3>(x, op.kernel_h, op.buffer_width(), soon.ranges, pixels);
    });
  if (op.stride_w == 2) return stem_taps<2>(op, rows, scratch);
  stem_taps<0>(op, rows, scratch);
}

}  // namespace fastconv::FASTCONV_ISA
