// The weights' gradient of a 3x3 convolution, stride 1, by Winograd's F(4x4, 3x3) turned around. Included per ISA.
//
// The convolution (winograd.h) is Y = A^T [(G g G^T) * (B^T d B)] A for every tile, linear in g; so dg = G^T [sum of (A dY A^T) * (B^T d
// B)] G with the same matrices: 36 multiplications for a tile's 4x4 outputs where the direct sum takes 144. The sums are 36 products over
// tiles.
#pragma once

#include "kernels/cpu/winograd.h"

namespace fastconv::FASTCONV_ISA {

// One column or row of A dY: four gradients to six.
FASTCONV_INLINE void gradient_transform(const vec (&d)[4], vec (&out)[6]) {
  const vec a = d[0] + d[2], b = d[1] + d[3], c = d[0] + 4.0f * d[2], e = 2.0f * d[1] + 8.0f * d[3];
  out[0] = d[0];
  out[1] = a + b;
  out[2] = a - b;
  out[3] = c + e;
  out[4] = c - e;
  out[5] = d[3];
}

// One column or row of G^T m: six sums to three taps.
FASTCONV_INLINE void tap_transform(const vec (&m)[6], vec (&out)[3]) {
  const vec a = (m[1] + m[2]) * (1.0f / 6.0f), b = (m[2] - m[1]) * (1.0f / 6.0f);
  const vec c = m[3] + m[4], d = (m[3] - m[4]) * (1.0f / 12.0f);
  out[0] = 0.25f * m[0] - a + c * (1.0f / 24.0f);
  out[1] = b + d;
  out[2] = c * (1.0f / 6.0f) - a + m[5];
}

// Inputs of a row of tiles: x stands at the first pixel of the first tile's halo.
inline void window_inputs(const WindowTiles& op) {
  for (int64_t tile = 0; tile < op.tiles; ++tile)
    for (int64_t c = 0; c < op.channels; c += W)
      transform_tile(op.x + tile * 4 * op.x_stride + c, op.x_row_stride, op.x_stride, W, op.out + tile * op.out_stride + c, op.plane);
}

// Gradients of a row of tiles' 4x4 outputs.
inline void window_gradients(const WindowTiles& op) {
  for (int64_t tile = 0; tile < op.tiles; ++tile)
    for (int64_t c = 0; c < op.channels; c += W) {
      const float* const x = op.x + tile * 4 * op.x_stride + c;
      float* const out = op.out + tile * op.out_stride + c;
      vec rows[6][4];  // A dY
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        vec column[4], to[6];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) column[i] = load(x + i * op.x_row_stride + j * op.x_stride);
        gradient_transform(column, to);
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) rows[i][j] = to[i];
      }
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
        vec line[6];
        gradient_transform(rows[i], line);
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j) store(out + (i * 6 + j) * op.plane, line[j]);
      }
    }
}

// Adds the taps of sums (36, inputs, outputs) to taps (9, inputs, outputs), whose rows are taps_stride apart. Whole vectors of outputs.
inline void window_taps(const float* sums, int64_t inputs, int64_t outputs, float* taps, int64_t taps_stride) {
  const int64_t plane = inputs * outputs;
  for (int64_t k = 0; k < inputs; ++k)
    for (int64_t n = 0; n < outputs; n += W) {
      const float* const m = sums + k * outputs + n;
      vec rows[3][6];  // G^T m
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) {
        vec column[6], to[3];
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) column[i] = load(m + (i * 6 + j) * plane);
        tap_transform(column, to);
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) rows[i][j] = to[i];
      }
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        vec to[3];
        tap_transform(rows[i], to);
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) {
          float* const tap = taps + ((i * 3 + j) * inputs + k) * taps_stride + n;
          store(tap, load(tap) + to[j]);
        }
      }
    }
}

}  // namespace fastconv::FASTCONV_ISA
