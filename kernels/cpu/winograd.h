// 3x3 convolution, stride 1, by Winograd's F(4x4, 3x3): 36 multiplications for 16 outputs where the direct sum takes 144. Included per ISA.
//
// Source: A. Lavin, S. Gray, Fast Algorithms for Convolutional Neural Networks, arXiv 1509.09308: Y = A^T [(G g G^T) * (B^T d B)] A. Its
// error in fp32 is 2e-6 to 3e-6 of the largest output, so optimize(exact=True) leaves it out. The transforms subtract: a NaN, an infinity
// or a huge number would spread over its whole tile, so rows of tiles that hold one are for the caller to compute directly (all_moderate).
//
// Tiles lie on a grid fixed to the image, whatever rows are computed, so results do not depend on the split. A block of tiles is
// transformed, then for every two vectors of output channels 36 small products and the output transform run over it in L2.
#pragma once

#include "kernels/cpu/tile.h"

namespace fastconv::FASTCONV_ISA {

// One column or row of B^T d: six inputs to six.
FASTCONV_INLINE void input_transform(const vec (&d)[6], vec (&out)[6]) {
  const vec a = d[4] - 4.0f * d[2], b = d[3] - 4.0f * d[1], c = d[4] - d[2], e = 2.0f * (d[3] - d[1]);
  out[0] = 4.0f * d[0] - 5.0f * d[2] + d[4];
  out[1] = a + b;
  out[2] = a - b;
  out[3] = c + e;
  out[4] = c - e;
  out[5] = 4.0f * d[1] - 5.0f * d[3] + d[5];
}

// One column or row of A^T m: six sums to four.
FASTCONV_INLINE void output_transform(const vec (&m)[6], vec (&out)[4]) {
  const vec a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], d = m[3] - m[4];
  out[0] = m[0] + a + c;
  out[1] = b + 2.0f * d;
  out[2] = a + 4.0f * c;
  out[3] = b + 8.0f * d + m[5];
}

// One row of tiles into transformed[36][capacity][channels], from place `first`.
inline void transform_tile_row(const PaddedConv& op, int64_t tile_row, int64_t tiles, float* transformed, int64_t capacity, int64_t first) {
  const int64_t channels = op.in_channels, plane = capacity * channels;
  for (int64_t t = 0; t < tiles; ++t) {
    const float* x = op.x + tile_row * 4 * op.x_row_stride + t * 4 * op.x_stride;
    float* out = transformed + (first + t) * channels;
    for (int64_t c = 0; c < channels; c += W) {
      const int64_t left = channels - c;
      vec rows[6][6];  // B^T d
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) {
        vec column[6], to[6];
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) column[i] = load_up_to(x + i * op.x_row_stride + j * op.x_stride + c, left);
        input_transform(column, to);
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) rows[i][j] = to[i];
      }
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
        vec to[6];
        input_transform(rows[i], to);
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j) store_up_to(out + (i * 6 + j) * plane + c, to[j], left);
      }
    }
  }
}

// Sums of one tile, (36, plane) apart, to its 4x4 outputs; those beyond height x width are not written.
FASTCONV_INLINE void finish_tile(const float* sums, int64_t plane, vec bias, const Clamp& clamp, float* out, int64_t stride,
                                 int64_t row_stride, int64_t height, int64_t width, int64_t lanes) {
  vec rows[4][6];  // A^T m
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) {
    vec column[6], to[4];
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) column[i] = load(sums + (i * 6 + j) * plane);
    output_transform(column, to);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) rows[i][j] = to[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    if (i >= height) break;
    vec to[4];
    output_transform(rows[i], to);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      if (j < width) store_up_to(out + i * row_stride + j * stride, clamp(to[j] + bias), lanes);
  }
}

alignas(64) constexpr float no_bias[MAX_NV * W] = {};
constexpr int WINOGRAD_NV = W == 16 ? 2 : MAX_NV;  // output vectors a pass
constexpr int WINOGRAD_TILES = max_rows<WINOGRAD_NV>();
constexpr int64_t WINOGRAD_INPUT_FLOATS = 128 * 1024;

FASTCONV_INLINE int64_t winograd_rows_at_once(const PaddedConv& op) {
  const int64_t row = 36 * ceil_div(op.out_width, 4) * op.in_channels;
  return row > WINOGRAD_INPUT_FLOATS ? 1 : WINOGRAD_INPUT_FLOATS / row;
}

// Rows of tiles [tile_rows.begin, tile_rows.end): output rows from 4 * tile_rows.begin, those beyond op.out_height left out. op.panels are
// pack_winograd's. Scratch: winograd_scratch floats.
inline void winograd(const PaddedConv& op, Range tile_rows, Range panels, float* scratch) {
  constexpr int NV = WINOGRAD_NV;
  const int64_t tiles_w = ceil_div(op.out_width, 4), K = op.in_channels, panel_stride = 36 * K * PANEL, at_once = winograd_rows_at_once(op);
  const int64_t capacity = (tile_rows.size() < at_once ? tile_rows.size() : at_once) * tiles_w;
  float* sums = scratch;  // (36, WINOGRAD_TILES, NV vectors)
  constexpr int64_t sums_stride = NV * W, sums_plane = WINOGRAD_TILES * sums_stride;
  float* transformed = scratch + 36 * sums_plane;
  const Clamp clamp(op.epilogue.activation);
  const int64_t end = panels.end * PANEL < op.out_channels ? panels.end * PANEL : op.out_channels;
  for (int64_t row = tile_rows.begin; row < tile_rows.end; row += at_once) {
    const int64_t rows = tile_rows.end - row < at_once ? tile_rows.end - row : at_once, tiles_here = rows * tiles_w;
    for (int64_t r = 0; r < rows; ++r) transform_tile_row(op, row + r, tiles_w, transformed, capacity, r * tiles_w);
    for (int64_t column = panels.begin * PANEL; column < end; column += NV * W) {
      const int64_t columns = end - column < NV * W ? end - column : NV * W;
      const Pieces pieces(tiles_here, WINOGRAD_TILES);
      int64_t first = 0;
      for (int64_t piece = 0; piece < pieces.longer + pieces.shorter; ++piece) {
        const int64_t count = pieces.size + (piece < pieces.longer);
        with_constant<NV>(ceil_div(columns, W), [&](auto VECTORS) {
          constexpr int MOST = max_rows<VECTORS>() < WINOGRAD_TILES ? max_rows<VECTORS>() : WINOGRAD_TILES;
          for (int64_t xi = 0; xi < 36; ++xi) {
            const StridedSource source{transformed + (xi * capacity + first) * K, K, 1, K, 0};
            const float* weights = op.panels + column / PANEL * panel_stride + xi * K * PANEL;
            const Output to{weights,     panel_stride, {no_bias, nullptr, 0, Activation::none}, sums + xi * sums_plane,
                            sums_stride, VECTORS * W};
            if (count <= MOST)
              with_constant<MOST>(count, [&](auto MR) { tiles<MR, VECTORS, false>(Strided<MR>(source, 0), 1, to); });
            else
              cover<VECTORS, false>(count, to, [&](auto MR, int64_t from) { return Strided<MR>(source, from); });
          }
        });
        for (int64_t t = 0; t < count; ++t) {
          const int64_t tile = first + t, oh = (row + tile / tiles_w) * 4, ow = tile % tiles_w * 4;
          const int64_t pixel = op.out_strides.pixel;
          for (int64_t c = 0; c < columns; c += W)
            finish_tile(sums + t * sums_stride + c, sums_plane, load_up_to(op.epilogue.bias + column + c, columns - c), clamp,
                        op.out + op.out_strides.at(oh * op.out_width + ow, column + c), pixel, op.out_width * pixel, op.out_height - oh,
                        op.out_width - ow, columns - c);
        }
        first += count;
      }
    }
  }
}

inline int64_t winograd_scratch(const PaddedConv& op, int64_t tile_rows) {
  const int64_t at_once = winograd_rows_at_once(op), rows = tile_rows < at_once ? tile_rows : at_once;
  return 36 * (WINOGRAD_TILES * WINOGRAD_NV * W + rows * ceil_div(op.out_width, 4) * op.in_channels);
}

// Whether every number of a block is finite and far enough from overflow for the transforms.
inline bool all_moderate(const float* x, int64_t count) {
  ivec outside{};
  for (int64_t i = 0; i < count; i += W) {
    const vec v = load_up_to(x + i, count - i);
    outside |= ~((v < 1e30f) & (v > -1e30f));  // NaN is neither
  }
  int32_t any = 0;
  for (int lane = 0; lane < W; ++lane) any |= outside[lane];
  return any == 0;
}

}  // namespace fastconv::FASTCONV_ISA
