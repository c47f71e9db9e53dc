// The register tile: MR pixels x NV vectors of output channels, all sums in registers. Included per ISA.
//
// One template serves pointwise, KxK convolution and the stem; they differ in where the MR broadcast inputs come from (Rows).
// Assumes: the panels of the NV vectors start at `panels` and lie panel_stride floats apart; `columns` of the tile's NV * W are real
// (more than (NV - 1) * W).
#pragma once

#include <type_traits>
#include <utility>

#include "kernels/cpu/epilogue.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/simd.h"

namespace fastconv::FASTCONV_ISA {

// Largest tiles whose sums, weights and one broadcast fit the registers (6x64, 8x48, 14x32, 14x16 on AVX-512; 6x16 and 12x8 on AVX2).
template <int NV>
constexpr int max_rows() {
  if constexpr (REGISTERS == 32 && W == 16) return NV == 4 ? 6 : NV == 3 ? 8 : 14;
  if constexpr (REGISTERS == 32) return 6;
  if constexpr (W == 8) return NV == 2 ? 6 : 12;
  return 2;
}
constexpr int UNROLL = 4;  // of the depth: addresses become displacements
constexpr int MAX_NV = W == 16 ? 4 : W == 8 ? 2 : 4;

// Rows whose pixels stand a fixed stride apart. Each segment is a run of `depth` inputs: one for pointwise; for a convolution over a padded
// buffer one per tap row, as taps and channels of a row follow each other in memory there.
//
// Three rows share a pointer (p, p + stride, p + 2 * stride are all x86 addressing modes): a pointer a row would not fit 16 integer
// registers, and reloading them from the stack costs the one-vector tile a quarter of its speed.
struct StridedSource {
  const float* x;
  int64_t stride;
  int64_t segments, depth;
  int64_t segment_stride;
};
template <int MR>
struct Strided {
  const float* x;
  int64_t stride, segments, depth, segment_stride;
  const float* p[(MR + 2) / 3];
  FASTCONV_INLINE explicit Strided(const StridedSource& source)
      : x(source.x), stride(source.stride), segments(source.segments), depth(source.depth), segment_stride(source.segment_stride) {}
  FASTCONV_INLINE void enter(int64_t s) {
    const float* first = x + s * segment_stride;
#pragma GCC unroll 8
    for (int i = 0; i < (MR + 2) / 3; ++i) p[i] = first + 3 * i * stride;
  }
  FASTCONV_INLINE float at(int r, int64_t, int u) const { return p[r / 3][r % 3 * stride + u]; }
  FASTCONV_INLINE void advance(int n) {
#pragma GCC unroll 8
    for (int i = 0; i < (MR + 2) / 3; ++i) {
      p[i] += n;
      asm("" : "+r"(p[i]));  // keeps the compiler from deriving one pointer a row after all
    }
  }
};

// Rows found through a table of pointers, (segments, rows): taps outside the image point at zeros.
template <int MR>
struct Indirect {
  const float* const* table;
  int64_t segments, depth;
  const float* p[MR];
  FASTCONV_INLINE void enter(int64_t s) {
    for (int r = 0; r < MR; ++r) p[r] = table[s * MR + r];
  }
  FASTCONV_INLINE float at(int r, int64_t k, int u) const { return p[r][k + u]; }
  FASTCONV_INLINE void advance(int) {}
};

// Rows a small step apart (a compile-time constant unless STEP is 0) with a table of offsets along the depth: the stem's row buffer.
template <int STEP>
struct Stepped {
  const float* x;
  const int32_t* offsets;
  int64_t segments, depth, step;
  FASTCONV_INLINE void enter(int64_t) {}
  FASTCONV_INLINE float at(int r, int64_t k, int u) const { return x[offsets[k + u] + r * (STEP ? STEP : step)]; }
  FASTCONV_INLINE void advance(int) {}
};

template <int MR, int NV, class Rows>
__attribute__((noinline)) void tile(Rows rows, const float* panels, int64_t panel_stride, const Epilogue& epilogue, float* out,
                                    int64_t out_stride, int64_t columns) {
  vec sum[MR][NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const vec bias = load_up_to(epilogue.bias + v * W, columns - v * W);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) sum[r][v] = bias;
  }
  const float* panel[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) panel[v] = panels + (v * W / PANEL) * panel_stride + (v * W) % PANEL;

  for (int64_t s = 0; s < rows.segments; ++s) {
    rows.enter(s);
    const auto step = [&](int64_t k, int u) FASTCONV_LAMBDA_INLINE {
      vec weight[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) weight[v] = load(panel[v] + u * PANEL);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const vec x = splat(rows.at(r, k, u));
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[r][v] += x * weight[v];
      }
    };
    const auto advance = [&](int n) FASTCONV_LAMBDA_INLINE {
      rows.advance(n);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) panel[v] += n * PANEL;
    };
    int64_t k = 0;
    for (; k + UNROLL <= rows.depth; k += UNROLL) {
#pragma GCC unroll 4
      for (int u = 0; u < UNROLL; ++u) step(k, u);
      advance(UNROLL);
    }
    for (; k < rows.depth; ++k) {
      step(k, 0);
      advance(1);
    }
  }

  if (epilogue.residual) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[r][v] += load_up_to(epilogue.residual + r * epilogue.residual_stride + v * W, columns - v * W);
  }
  const Clamp clamp(epilogue.activation);
  const auto finish = [&](auto store_last) FASTCONV_LAMBDA_INLINE {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < NV - 1; ++v) store(out + r * out_stride + v * W, clamp(sum[r][v]));
      store_last(out + r * out_stride + (NV - 1) * W, clamp(sum[r][NV - 1]));
    }
  };
  if (columns == NV * W)
    finish([](float* p, vec v) FASTCONV_LAMBDA_INLINE { store(p, v); });
  else
    finish([&](float* p, vec v) FASTCONV_LAMBDA_INLINE { store_first(p, v, static_cast<int>(columns - (NV - 1) * W)); });
  if (!is_clamp(epilogue.activation)) activate_rows(out, out_stride, MR, columns, epilogue.activation);
}

// `count` things in pieces of at most `most`, as equal as can be: 49 rows of at most 14 are 13 + 12 + 12 + 12, not 14 + 14 + 14 + 7.
class Pieces {
 public:
  FASTCONV_INLINE Pieces(int64_t count, int64_t most) : pieces(ceil_div(count, most)), size_(count), longer_(0) {
    if (pieces > 1) {  // a 64-bit division costs as much as one step of a whole tile: none where one piece is all
      size_ = count / pieces;
      longer_ = count % pieces;
    }
  }
  FASTCONV_INLINE int64_t begin(int64_t i) const { return i * size_ + (i < longer_ ? i : longer_); }
  FASTCONV_INLINE int64_t size(int64_t i) const { return size_ + (i < longer_); }

  int64_t pieces;

 private:
  int64_t size_, longer_;
};

// Calls f with the run-time value n as a compile-time constant, 1 <= n <= MOST.
template <int MOST, class F>
FASTCONV_INLINE void with_constant(int64_t n, F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (void)((n == I + 1 ? (f(std::integral_constant<int, I + 1>{}), true) : false) || ...);
  }(std::make_integer_sequence<int, MOST>{});
}

// Panels [panels.begin, panels.end) in chunks of NV vectors, widest tile first choice `preferred`: f(first column, NV, columns).
template <class F>
FASTCONV_INLINE void for_each_chunk(Range panels, int64_t out_channels, int preferred, F f) {
  const int64_t end = panels.end * PANEL < out_channels ? panels.end * PANEL : out_channels;
  int64_t vectors = ceil_div(end - panels.begin * PANEL, W);
  int64_t column = panels.begin * PANEL;
  while (vectors > 0) {
    int64_t nv = vectors < preferred ? vectors : preferred;
    if (vectors == preferred + 1 && preferred + 1 <= MAX_NV) nv = preferred + 1;  // 3 = 3, not 2 + 1: one vector alone runs at 2/3 speed
    const int64_t columns = end - column < nv * W ? end - column : nv * W;
    f(column, nv, columns);
    column += nv * W;
    vectors -= nv;
  }
}

}  // namespace fastconv::FASTCONV_ISA
