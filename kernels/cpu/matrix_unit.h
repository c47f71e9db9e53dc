// AMX's tiles: eight registers of 16 rows of 64 bytes. Included per ISA.
//
// With FASTCONV_EMULATED_TILES they are memory and plain code, for tests on machines without the unit, and under sanitizers.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels/cpu/simd.h"

namespace fastconv::FASTCONV_ISA {

#ifndef FASTCONV_EMULATED_TILES

// Whole tiles, for as long as it lives. Loading takes 200 cycles. (A product takes 16 whatever part of its tiles is used.)
class TileConfiguration {
 public:
  TileConfiguration() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } whole;
    asm volatile("ldtilecfg %0" : : "m"(whole));
  }
  ~TileConfiguration() { asm volatile("tilerelease" : : : "memory"); }
  TileConfiguration(const TileConfiguration&) = delete;
};

// (Spelled out: gcc's intrinsics take the register's number as a word of source.)
template <int T>
FASTCONV_INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int T>
FASTCONV_INLINE void load_tile(const float* p) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(int64_t{64}), "i"(T), "m"(*reinterpret_cast<const float (*)[256]>(p)));
}
template <int T>
FASTCONV_INLINE void store_tile(float* p) {
  asm volatile("tilestored %%tmm%c3, (%1,%2,1)" : "=m"(*reinterpret_cast<float (*)[256]>(p)) : "r"(p), "r"(int64_t{64}), "i"(T));
}
// sums[m][n] += over the words k of a row of A and their signed bytes i: A[m][k][i] * B[k][n][i], all integers.
template <int SUMS, int A, int B>
FASTCONV_INLINE void multiply_tiles() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(A), "i"(B));
}

#else

inline thread_local float tile_memory[8][256];
struct TileConfiguration {
  TileConfiguration() {}
};
template <int T>
FASTCONV_INLINE void clear_tile() {
  std::memset(tile_memory[T], 0, sizeof tile_memory[T]);
}
template <int T>
FASTCONV_INLINE void load_tile(const float* p) {
  for (int i = 0; i < 256; ++i) tile_memory[T][i] = p[i];  // each by itself, for the sanitizers
}
template <int T>
FASTCONV_INLINE void store_tile(float* p) {
  for (int i = 0; i < 256; ++i) p[i] = tile_memory[T][i];
}
template <int SUMS, int A, int B>
inline void multiply_tiles() {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      int32_t sum;
      std::memcpy(&sum, &tile_memory[SUMS][m * 16 + n], sizeof sum);
      for (int k = 0; k < 16; ++k) {
        int8_t a[4], b[4];
        std::memcpy(a, &tile_memory[A][m * 16 + k], sizeof a);
        std::memcpy(b, &tile_memory[B][k * 16 + n], sizeof b);
        for (int i = 0; i < 4; ++i) sum += a[i] * b[i];
      }
      std::memcpy(&tile_memory[SUMS][m * 16 + n], &sum, sizeof sum);
    }
}

#endif

}  // namespace fastconv::FASTCONV_ISA
