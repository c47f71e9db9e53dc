// Activations on vectors. Included per ISA.
#pragma once

#include <limits>

#include "kernels/cpu/activation.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/simd.h"

namespace fastconv::FASTCONV_ISA {

// none, relu and relu6 are two bounds, not code paths.
struct Clamp {
  float low, high;
  explicit Clamp(Activation activation)
      : low(activation == Activation::relu || activation == Activation::relu6 ? 0.0f : -std::numeric_limits<float>::infinity()),
        high(activation == Activation::relu6 ? 6.0f : std::numeric_limits<float>::infinity()) {}
  FASTCONV_INLINE bool bounds() const { return low == 0.0f; }
  FASTCONV_INLINE vec operator()(vec v) const { return at_most(at_least(v, splat(low)), splat(high)); }
};

// Those whose code would burden every tile's: done on the stored tile, which is still in L1. (Clamp leaves their sums alone.)
FASTCONV_INLINE bool in_second_pass(Activation activation) {
  return activation == Activation::hardsigmoid || activation == Activation::silu || activation == Activation::sigmoid;
}

// exp(v) by 2^n * p(r), r = v - n ln 2, |r| <= ln(2)/2; Cephes' degree-6 polynomial, relative error below 2 ulp. Past the largest finite
// result it is infinity, and below the smallest normal one that number.
FASTCONV_INLINE vec exponential(vec v) {
  const vec x = at_most(at_least(v, splat(-87.3f)), splat(88.3f));
  const vec shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the rounded integer
  const vec n = shifted - 12582912.0f;
  const vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const ivec exponent = __builtin_convertvector(n, ivec) << 23;
  const vec y = reinterpret_cast<vec>(reinterpret_cast<ivec>(p) + exponent);
  return v > 88.3f ? splat(std::numeric_limits<float>::infinity()) : y;
}

FASTCONV_INLINE vec activate(vec v, Activation activation) {
  switch (activation) {
    case Activation::hardswish:
      return v * at_most(at_least(v + 3.0f, vec{}), splat(6.0f)) * (1.0f / 6.0f);
    case Activation::hardsigmoid:
      return at_most(at_least(v + 3.0f, vec{}), splat(6.0f)) * (1.0f / 6.0f);
    case Activation::silu: {
      const vec y = v / (1.0f + exponential(-v));  // -Inf / Inf is NaN, as in ATen
      return v != v ? v : y;
    }
    case Activation::sigmoid: {
      const vec y = 1.0f / (1.0f + exponential(-v));
      return v != v ? v : y;
    }
    default:
      return Clamp(activation)(v);
  }
}

// In place on rows x columns.
inline __attribute__((noinline)) void activate_rows(float* out, Strides strides, int64_t rows, int64_t columns, Activation activation) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += W) {
      float* p = out + strides.at(r, c);
      store_up_to(p, activate(load_up_to(p, columns - c), activation), columns - c);
    }
}

}  // namespace fastconv::FASTCONV_ISA
