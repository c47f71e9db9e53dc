// One vector type per ISA, on GCC/Clang vector extensions.
//
// Included once per ISA source, inside that ISA's namespace (FASTCONV_ISA), so that no inline function is shared between
// sources compiled with different flags. Intrinsics appear only where the compiler has no spelling: masks, and a fused multiply-add
// that must not depend on the contraction mode.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastconv::FASTCONV_ISA {

#if defined(FASTCONV_ISA_IS_AVX512)
constexpr int W = 16;  // floats per vector
constexpr int REGISTERS = 32;
#elif defined(FASTCONV_ISA_IS_AVX2)
constexpr int W = 8;
constexpr int REGISTERS = 16;
#elif defined(FASTCONV_ISA_IS_NEON)
constexpr int W = 4;
constexpr int REGISTERS = 32;
#else
constexpr int W = 4;  // portable: the compiler lowers it to whatever the platform's baseline has
constexpr int REGISTERS = 16;
#endif

typedef float vec __attribute__((vector_size(W * sizeof(float))));
typedef int32_t ivec __attribute__((vector_size(W * sizeof(int32_t))));
typedef float vec_unaligned __attribute__((vector_size(W * sizeof(float)), aligned(4), may_alias));

#define FASTCONV_INLINE inline __attribute__((always_inline))
#define FASTCONV_LAMBDA_INLINE __attribute__((always_inline))

FASTCONV_INLINE vec load(const float* p) { return *reinterpret_cast<const vec_unaligned*>(p); }
FASTCONV_INLINE void store(float* p, vec v) { *reinterpret_cast<vec_unaligned*>(p) = v; }
FASTCONV_INLINE vec splat(float x) { return x - vec{}; }  // x - 0 is x for every x, -0 and NaN included

// (p[0], p[1]) repeated over the vector; with `one`, (p[0], 0) and p[1] is not read.
typedef int64_t lvec __attribute__((vector_size(W * sizeof(float))));
FASTCONV_INLINE vec splat_pair(const float* p, bool one = false) {
  int64_t bits = 0;
  std::memcpy(&bits, p, one ? sizeof(float) : 2 * sizeof(float));
  return reinterpret_cast<vec>(bits + lvec{});
}

// Sums of neighbouring lanes: of a in the lower half of the result, of b in the upper.
FASTCONV_INLINE vec fold_pairs(vec a, vec b) {
#if defined(FASTCONV_ISA_IS_AVX512)
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(FASTCONV_ISA_IS_AVX2)
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) + __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

// Lanes C, C + 3, C + 6, ... of three vectors in a row.
template <int C, int... LANE>
FASTCONV_INLINE vec every_third(vec a, vec b, vec c, std::integer_sequence<int, LANE...>) {
  const vec of_two = __builtin_shufflevector(a, b, (3 * LANE + C < 2 * W ? 3 * LANE + C : 0)...);
  return __builtin_shufflevector(of_two, c, (3 * LANE + C < 2 * W ? LANE : 3 * LANE + C - W)...);
}

// The first n lanes of a vector, 0 < n <= W; nothing beyond them is read or written.
#if defined(FASTCONV_ISA_IS_AVX512)
FASTCONV_INLINE __mmask16 first(int n) { return static_cast<__mmask16>(0xffffu >> (W - n)); }
FASTCONV_INLINE vec load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
FASTCONV_INLINE void store_first(float* p, vec v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
#elif defined(FASTCONV_ISA_IS_AVX2)
FASTCONV_INLINE __m256i first(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
FASTCONV_INLINE vec load_first(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
FASTCONV_INLINE void store_first(float* p, vec v, int n) { _mm256_maskstore_ps(p, first(n), v); }
#else
FASTCONV_INLINE vec load_first(const float* p, int n) {
  vec v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
FASTCONV_INLINE void store_first(float* p, vec v, int n) {
  for (int i = 0; i < n; ++i) p[i] = v[i];
}
#endif

// Full vectors take the plain path: a masked store costs up to 18 micro-ops on AVX2 machines.
FASTCONV_INLINE vec load_up_to(const float* p, int64_t n) { return n >= W ? load(p) : load_first(p, static_cast<int>(n)); }
FASTCONV_INLINE void store_up_to(float* p, vec v, int64_t n) { n >= W ? store(p, v) : store_first(p, v, static_cast<int>(n)); }

// The larger; a NaN in either stays.
#if defined(FASTCONV_ISA_IS_AVX512)
FASTCONV_INLINE vec maximum(vec a, vec b) { return _mm512_mask_mov_ps(_mm512_max_ps(b, a), _mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q), b); }
#elif defined(FASTCONV_ISA_IS_AVX2)
FASTCONV_INLINE vec maximum(vec a, vec b) { return _mm256_blendv_ps(_mm256_max_ps(b, a), b, _mm256_cmp_ps(b, b, _CMP_UNORD_Q)); }
#else
FASTCONV_INLINE vec maximum(vec a, vec b) { return ((b > a) | (b != b)) ? b : a; }
#endif

// Whether every lane of a comparison holds.
FASTCONV_INLINE bool all_set(ivec lanes) {
#if defined(FASTCONV_ISA_IS_AVX512)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(lanes)) == 0xffff;
#elif defined(FASTCONV_ISA_IS_AVX2)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(lanes)) == 0xff;
#else
  int32_t all = -1;
  for (int lane = 0; lane < W; ++lane) all &= lanes[lane];
  return all != 0;
#endif
}

// Whether every lane that it was asked of is a number, of two vectors at a time.
struct Numbers {
#if defined(FASTCONV_ISA_IS_AVX512)
  __mmask16 lanes = 0xffff;
  FASTCONV_INLINE void both(vec a, vec b) { lanes = _mm512_mask_cmp_ps_mask(lanes, a, b, _CMP_ORD_Q); }
  FASTCONV_INLINE bool all() const { return lanes == 0xffff; }
#elif defined(FASTCONV_ISA_IS_AVX2)
  __m256 lanes = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  FASTCONV_INLINE void both(vec a, vec b) { lanes = _mm256_and_ps(lanes, _mm256_cmp_ps(a, b, _CMP_ORD_Q)); }
  FASTCONV_INLINE bool all() const { return _mm256_movemask_ps(lanes) == 0xff; }
#else
  ivec lanes = ~ivec{};
  FASTCONV_INLINE void both(vec a, vec b) { lanes &= (a == a) & (b == b); }
  FASTCONV_INLINE bool all() const { return all_set(lanes); }
#endif
};

// NaN in v stays NaN: x86's max and min return their second operand when either is NaN; the plain comparison is then false.
#if defined(FASTCONV_ISA_IS_AVX512)
FASTCONV_INLINE vec at_least(vec v, vec low) { return _mm512_max_ps(low, v); }
FASTCONV_INLINE vec at_most(vec v, vec high) { return _mm512_min_ps(high, v); }
#elif defined(FASTCONV_ISA_IS_AVX2)
FASTCONV_INLINE vec at_least(vec v, vec low) { return _mm256_max_ps(low, v); }
FASTCONV_INLINE vec at_most(vec v, vec high) { return _mm256_min_ps(high, v); }
#else
FASTCONV_INLINE vec at_least(vec v, vec low) { return v < low ? low : v; }
FASTCONV_INLINE vec at_most(vec v, vec high) { return v > high ? high : v; }
#endif

}  // namespace fastconv::FASTCONV_ISA
