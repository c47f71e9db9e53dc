// The roofs: independent chains of fused multiply-adds, and streams over memory, nothing else. Included per ISA.
#pragma once

#include "kernels/cpu/simd.h"

namespace fastconv::FASTCONV_ISA {

// 14 chains cover two units at a latency of 4 cycles with room to spare, and fit 16 registers. Returns the operations done.
inline double fma_chains(int64_t iterations, float* sink) {
  const vec scale = splat(sink[0]), offset = splat(sink[1]);
  vec a = scale, b = scale + offset, c = offset, d = scale * offset, e = a + d, f = b + e, g = c + f, h = d + g, i = e + h, j = f + i,
      k = g + j, l = h + k, m = i + l, n = j + m;
  for (int64_t it = 0; it < iterations; ++it) {
    a = a * scale + offset;
    b = b * scale + offset;
    c = c * scale + offset;
    d = d * scale + offset;
    e = e * scale + offset;
    f = f * scale + offset;
    g = g * scale + offset;
    h = h * scale + offset;
    i = i * scale + offset;
    j = j * scale + offset;
    k = k * scale + offset;
    l = l * scale + offset;
    m = m * scale + offset;
    n = n * scale + offset;
  }
  const vec sum = a + b + c + d + e + f + g + h + i + j + k + l + m + n;
  sink[2] = sum[0];
  return 14.0 * 2.0 * W * static_cast<double>(iterations);
}

// Sums x through eight vectors, so that loads alone decide. count: a multiple of 8 * W; what is left over is not read.
inline void read_stream(const float* x, int64_t count, float* sink) {
  vec sum[8] = {};
  for (int64_t i = 0; i + 8 * W <= count; i += 8 * W)
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sum[j] += load(x + i + j * W);
  vec all{};
  for (const vec& part : sum) all += part;
  sink[2] = all[0];
}

inline void copy_stream(const float* x, int64_t count, float* out) {
  for (int64_t i = 0; i + 8 * W <= count; i += 8 * W)
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) store(out + i + j * W, load(x + i + j * W));
}

}  // namespace fastconv::FASTCONV_ISA
