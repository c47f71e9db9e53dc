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

// Transformed inputs: 36 planes, each a blocked image of `capacity` tiles.
struct Transformed {
  float* data;
  int64_t block, plane;  // floats between blocks of 16 channels, and between planes
  FASTCONV_INLINE Transformed(float* data, int64_t capacity, int64_t channels)
      : data(data), block(capacity * PANEL), plane(panels_for(channels) * block) {}
  FASTCONV_INLINE int64_t floats() const { return 36 * plane; }
};

// B^T d B of one tile and vector of channels, to 36 places `plane` apart.
FASTCONV_INLINE void transform_tile(const float* x, int64_t row_stride, int64_t stride, int64_t lanes, float* out, int64_t plane) {
  vec rows[6][6];  // B^T d
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) {
    vec column[6], to[6];
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) column[i] = load_up_to(x + i * row_stride + j * stride, lanes);
    input_transform(column, to);
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) rows[i][j] = to[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < 6; ++i) {
    vec line[6];
    input_transform(rows[i], line);
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) store_up_to(out + (i * 6 + j) * plane, line[j], lanes);
  }
}

// To places from `first` on. Tiles count through the image, row by row.
inline void transform_tiles(const PaddedConv& op, Range tiles, const Transformed& to, int64_t first) {
  const int64_t tiles_w = ceil_div(op.out_width, 4);
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile, ++first) {
    const float* x = op.x + tile / tiles_w * 4 * op.x_row_stride + tile % tiles_w * 4 * op.x_stride;
    for (int64_t c = 0; c < op.in_channels; c += W)
      transform_tile(x + c, op.x_row_stride, op.x_stride, op.in_channels - c, to.data + c / PANEL * to.block + c % PANEL + first * PANEL,
                     to.plane);
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
constexpr int64_t WINOGRAD_SUMS = 36 * WINOGRAD_TILES * WINOGRAD_NV * W;
constexpr int64_t WINOGRAD_INPUT_FLOATS = 128 * 1024;

// The 36 products of a range of tiles, which stand in `from` from place `first` on, and their outputs.
inline void winograd_products(const PaddedConv& op, Range tiles, Range panels, const Transformed& from, int64_t first, float* sums) {
  constexpr int NV = WINOGRAD_NV;
  constexpr int64_t sums_stride = NV * W, sums_plane = WINOGRAD_TILES * sums_stride;  // sums: (36, WINOGRAD_TILES, NV vectors)
  const int64_t tiles_w = ceil_div(op.out_width, 4), K = op.in_channels, panel_stride = 36 * K * PANEL, pixel = op.out_strides.pixel;
  const Clamp clamp(op.epilogue.activation);
  const int64_t end = panels.end * PANEL < op.out_channels ? panels.end * PANEL : op.out_channels;
  const Pieces pieces(tiles.size(), WINOGRAD_TILES);
  for (int64_t column = panels.begin * PANEL; column < end; column += NV * W) {
    const int64_t columns = end - column < NV * W ? end - column : NV * W;
    pieces.for_each([&](int64_t, int64_t done, int64_t count) {
      with_constant<NV>(ceil_div(columns, W), [&](auto VECTORS) {
        constexpr int MOST = max_rows<VECTORS>() < WINOGRAD_TILES ? max_rows<VECTORS>() : WINOGRAD_TILES;
        Output to{op.panels + column / PANEL * panel_stride,
                  panel_stride,
                  {no_bias, nullptr, 0, Activation::none},
                  sums,
                  sums_stride,
                  VECTORS * W};
        to.panel_step = K * PANEL;
        to.out_step = sums_plane;
        for (int64_t row = 0; row < count; row += MOST) {
          const float* x = from.data + (first + done + row) * PANEL;
          with_constant<MOST>(count - row < MOST ? count - row : MOST,
                              [&](auto MR) { FASTCONV_ISA::tiles<MR, VECTORS, false>(Planes<MR>(x, from.block, K, from.plane), 36, to); });
          to.out += MOST * sums_stride;
        }
      });
      for (int64_t t = 0; t < count; ++t) {
        const int64_t tile = tiles.begin + done + t, oh = tile / tiles_w * 4, ow = tile % tiles_w * 4;
        for (int64_t c = 0; c < columns; c += W)
          finish_tile(sums + t * sums_stride + c, sums_plane, load_up_to(op.epilogue.bias + column + c, columns - c), clamp,
                      op.out + op.out_strides.at(oh * op.out_width + ow, column + c), pixel, op.out_width * pixel, op.out_height - oh,
                      op.out_width - ow, columns - c);
      }
    });
  }
}

// Tiles transformed at a time. Each pass reads all weights, so the few tiles that one more pass would be for join the others.
FASTCONV_INLINE int64_t winograd_at_once(const PaddedConv& op, int64_t tiles) {
  const int64_t most = WINOGRAD_INPUT_FLOATS / (36 * op.in_channels) + 1, passes = (2 * tiles + most) / (2 * most);
  return ceil_div(tiles, passes > 1 ? passes : 1);
}

// Tiles [tiles.begin, tiles.end); outputs beyond the image are left out. op.panels are pack_winograd's. Scratch: winograd_scratch floats.
inline void winograd(const PaddedConv& op, Range tiles, Range panels, float* scratch) {
  const int64_t at_once = winograd_at_once(op, tiles.size());
  const Transformed transformed(scratch + WINOGRAD_SUMS, at_once, op.in_channels);
  for (int64_t first = tiles.begin; first < tiles.end; first += at_once) {
    const Range some{first, tiles.end - first < at_once ? tiles.end : first + at_once};
    transform_tiles(op, some, transformed, 0);
    winograd_products(op, some, panels, transformed, 0, scratch);
  }
}

inline int64_t winograd_scratch(const PaddedConv& op, int64_t tiles) {
  return WINOGRAD_SUMS + Transformed(nullptr, winograd_at_once(op, tiles), op.in_channels).floats();
}

// The same in two steps, for threads that share the transformed inputs of a whole image: tiles to `transformed`, of winograd_transformed
// floats; then panels of any tiles' outputs, with a scratch of its own of WINOGRAD_SUMS floats.
FASTCONV_INLINE Transformed whole_image(const PaddedConv& op, float* data) {
  return {data, ceil_div(op.out_height, 4) * ceil_div(op.out_width, 4), op.in_channels};
}
inline int64_t winograd_transformed(const PaddedConv& op) { return whole_image(op, nullptr).floats(); }
inline void winograd_transform(const PaddedConv& op, Range tiles, float* transformed) {
  transform_tiles(op, tiles, whole_image(op, transformed), tiles.begin);
}
inline void winograd_multiply(const PaddedConv& op, Range tiles, Range panels, float* transformed, float* sums) {
  winograd_products(op, tiles, panels, whole_image(op, transformed), tiles.begin, sums);
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
