// The register tile: MR pixels x NV vectors of output channels, all sums in registers. Included per ISA.
//
// One template serves pointwise, KxK convolution and the stem; they differ in where the MR broadcast inputs come from (Rows).
// Assumes: panels lie panel_stride floats apart; `columns` of the tile's NV * W are real (more than (NV - 1) * W).
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
  FASTCONV_INLINE Strided(const StridedSource& source, int64_t first_row)
      : x(source.x + first_row * source.stride), stride(source.stride), segments(source.segments), depth(source.depth), segment_stride(source.segment_stride) {}
  FASTCONV_INLINE void enter(int64_t s) {
    const float* first = x + s * segment_stride;
#pragma GCC unroll 8
    for (int i = 0; i < (MR + 2) / 3; ++i) p[i] = first + 3 * i * stride;
  }
  FASTCONV_INLINE void next() { x += MR * stride; }
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
  FASTCONV_INLINE void next() {}  // a table serves one tile
  FASTCONV_INLINE float at(int r, int64_t k, int u) const { return p[r][k + u]; }
  FASTCONV_INLINE void advance(int) {}
};

// Rows a small step apart (a compile-time constant unless STEP is 0) with a table of offsets along the depth: the stem's row buffer.
template <int MR, int STEP>
struct Stepped {
  const float* x;
  const int32_t* offsets;
  int64_t segments, depth, step;
  FASTCONV_INLINE void enter(int64_t) {}
  FASTCONV_INLINE void next() { x += MR * (STEP ? STEP : step); }
  FASTCONV_INLINE float at(int r, int64_t k, int u) const { return x[offsets[k + u] + r * (STEP ? STEP : step)]; }
  FASTCONV_INLINE void advance(int) {}
};

// Where a run of tiles writes, and the weights it uses: `columns` output channels from column 0 of panels, bias, residual and out.
struct Output {
  const float* panels;
  int64_t panel_stride;
  Epilogue epilogue;
  float* out;
  int64_t out_stride, columns;
};

// `count` tiles one below the other.
template <int MR, int NV, class Rows>
__attribute__((noinline)) void tiles(Rows rows, int64_t count, Output to) {
  const int64_t columns = to.columns;
  const Clamp clamp(to.epilogue.activation);
  vec bias[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) bias[v] = load_up_to(to.epilogue.bias + v * W, columns - v * W);
  for (; count > 0; --count) {
    vec sum[MR][NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) sum[r][v] = bias[v];
    const float* panel[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) panel[v] = to.panels + (v * W / PANEL) * to.panel_stride + (v * W) % PANEL;

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

    if (to.epilogue.residual) {
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[r][v] += load_up_to(to.epilogue.residual + r * to.epilogue.residual_stride + v * W, columns - v * W);
    }
    const auto finish = [&](auto store_last) FASTCONV_LAMBDA_INLINE {
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < NV - 1; ++v) store(to.out + r * to.out_stride + v * W, clamp(sum[r][v]));
        store_last(to.out + r * to.out_stride + (NV - 1) * W, clamp(sum[r][NV - 1]));
      }
    };
    if (columns == NV * W)
      finish([](float* p, vec v) FASTCONV_LAMBDA_INLINE { store(p, v); });
    else
      finish([&](float* p, vec v) FASTCONV_LAMBDA_INLINE { store_first(p, v, static_cast<int>(columns - (NV - 1) * W)); });
    if (!is_clamp(to.epilogue.activation)) activate_rows(to.out, to.out_stride, MR, columns, to.epilogue.activation);

    rows.next();
    to.out += MR * to.out_stride;
    if (to.epilogue.residual) to.epilogue.residual += MR * to.epilogue.residual_stride;
  }
}

// `count` things in pieces of at most `most`, as equal as can be: 49 rows of at most 14 are 13 + 12 + 12 + 12, not 14 + 14 + 14 + 7.
struct Pieces {
  int64_t size, shorter, longer;  // `longer` pieces of size + 1, then `shorter` of size
  FASTCONV_INLINE Pieces(int64_t count, int64_t most) : size(count), shorter(1), longer(0) {
    if (count > most) {  // a 64-bit division costs as much as one step of a whole tile: none where one piece is all
      const int64_t pieces = ceil_div(count, most);
      size = count / pieces;
      longer = count % pieces;
      shorter = pieces - longer;
    }
  }
};

// Calls f with the run-time value n as a compile-time constant, 1 <= n <= MOST.
template <int MOST, class F>
FASTCONV_INLINE void with_constant(int64_t n, F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (void)((n == I + 1 ? (f(std::integral_constant<int, I + 1>{}), true) : false) || ...);
  }(std::make_integer_sequence<int, MOST>{});
}

// `count` rows by NV vectors in tiles of nearly equal size; rows_of(MR, first row) tells where a run of MR-row tiles reads.
template <int NV, int MOST = max_rows<NV>(), class RowsOf>
FASTCONV_INLINE void cover(int64_t count, Output to, RowsOf rows_of) {
  const Pieces pieces(count, MOST);
  const auto run = [&](int64_t size, int64_t first, int64_t number) {
    if (number == 0) return;
    Output at = to;
    at.out += first * to.out_stride;
    if (at.epilogue.residual) at.epilogue.residual += first * to.epilogue.residual_stride;
    with_constant<MOST>(size, [&](auto MR) { tiles<MR, NV>(rows_of(MR, first), number, at); });
  };
  run(pieces.size + 1, 0, pieces.longer);
  run(pieces.size, pieces.longer * (pieces.size + 1), pieces.shorter);
}

// The output of a chunk of columns: everything of `to` moved to `column`.
FASTCONV_INLINE Output at_column(Output to, int64_t column, int64_t columns) {
  to.panels += column / PANEL * to.panel_stride + column % PANEL;
  to.epilogue.bias += column;
  if (to.epilogue.residual) to.epilogue.residual += column;
  to.out += column;
  to.columns = columns;
  return to;
}

// Panels [panels.begin, panels.end) in chunks of NV vectors, PREFERRED where there are enough: f(NV, first column, columns).
template <int PREFERRED, class F>
FASTCONV_INLINE void for_each_chunk(Range panels, int64_t out_channels, F f) {
  const int64_t end = panels.end * PANEL < out_channels ? panels.end * PANEL : out_channels;
  int64_t vectors = ceil_div(end - panels.begin * PANEL, W);
  int64_t column = panels.begin * PANEL;
  while (vectors > 0) {
    int64_t nv = vectors < PREFERRED ? vectors : PREFERRED;
    if (vectors == PREFERRED + 1 && PREFERRED < MAX_NV) nv = PREFERRED + 1;  // 3 = 3, not 2 + 1: one vector alone is slower
    const int64_t columns = end - column < nv * W ? end - column : nv * W;
    with_constant<MAX_NV>(nv, [&](auto NV) { f(NV, column, columns); });
    column += nv * W;
    vectors -= nv;
  }
}
constexpr int PREFERRED_NV = W == 16 ? 2 : MAX_NV;  // 14x32 loads weights at half the rate of 6x64, so L2 keeps up

}  // namespace fastconv::FASTCONV_ISA
