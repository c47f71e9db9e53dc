// Pointwise convolution by one step of Strassen's algorithm: 7 products of half the depth where the direct sums take 8. Included per ISA.
//
// Source: V. Strassen, Gaussian elimination is not optimal, Numerische Mathematik 13 (1969), in S. Winograd's form with 15 additions.
// The matrices' halves lie side by side: neighbouring pixels (2p, 2p + 1), and panels of 16 channels (2i, 2i + 1), in and out. So any run
// of whole pairs can be computed by itself, and a pixel's result depends on its neighbour alone. With A the pixels (rows) by inputs, B the
// inputs by outputs:
//
//     S1 = A21 + A22   S2 = S1 - A11    S3 = A11 - A21   S4 = A12 - S2      (transformed: once for all outputs)
//     T1 = B12 - B11   T2 = B22 - T1    T3 = B22 - B12   T4 = T2 - B21      (packed)
//     U1 = A11 B11     U2 = U1 + S2 T2  U3 = U2 + S3 T3
//     C11 = U1 + A12 B21   C21 = U3 - A22 T4   C22 = U3 + S1 T1   C12 = U2 + S1 T1 + S4 B22
//
// The 15 additions cost next to nothing: those of B are done when weights are packed, those of C in registers between products. Errors are
// 2 to 3 times those of direct sums, relative to the largest inputs and weights that meet; scales of powers of two (pack.h) keep channels
// of different sizes apart. A NaN, an infinity or a huge number would spread to its neighbour: such pairs are computed directly.
//
// Where pixels are so few that weights are what takes time, each stays alone (pairs_within 1) and reads 4 of the 7 factors, as many as
// there are plain weights: C1 = A1 B11 + A2 B21, C2 = (A1 + A2) B22 - A1 T3.
#pragma once

#include <array>

#include "kernels/cpu/pointwise.h"

namespace fastconv::FASTCONV_ISA {

constexpr int PANEL_VECTORS = PANEL / W;
// Groups of 32 outputs whose first halves fill a tile: 14x32 and 8x48 on AVX-512, else one.
constexpr int STRASSEN_GROUPS = PREFERRED_NV / PANEL_VECTORS > 1 ? PREFERRED_NV / PANEL_VECTORS : 1;
constexpr int MAX_STRASSEN_GROUPS = W == 16 ? 3 : 1;

// Pairs of pixels: their first pixels, by number. `within`: see Pointwise.
struct Pairs {
  int64_t within, each;  // pairs in so many pixels
  FASTCONV_INLINE explicit Pairs(int64_t within) : within(within), each(ceil_div(within, 2)) {}
  // f(first pixel, pairs, whether the last one has no second pixel, pairs before) for runs of neighbours.
  template <class F>
  FASTCONV_INLINE void for_each_run(Range pairs, F f) const {
    if (within % 2 == 0) return f(2 * pairs.begin, pairs.size(), false, int64_t{0});
    for (int64_t pair = pairs.begin; pair < pairs.end;) {
      const int64_t group = pair / each, end = (group + 1) * each, count = (end < pairs.end ? end : pairs.end) - pair;
      f(group * within + 2 * (pair - group * each), count, pair + count == end, pair - pairs.begin);
      pair += count;
    }
  }
};

// Where transformed pairs stand: planes in the order of their factors (pack.h), each a blocked image of half the channels, and whether each
// pair is moderate, 1 or 0. All 7, or of pixels alone the 4 of factors 2 to 5.
constexpr int64_t ALONE_FIRST = 2, ALONE = 4;
struct StrassenPlanes {
  float* data;
  int64_t block, plane, first, count;
  FASTCONV_INLINE StrassenPlanes(float* data, int64_t pairs, const Pointwise& op)
      : data(data),
        block(pairs * PANEL),
        plane(op.in_channels / (2 * PANEL) * block),
        first(op.pairs_within == 1 ? ALONE_FIRST : 0),
        count(op.pairs_within == 1 ? ALONE : 7) {}
  FASTCONV_INLINE float* moderate() const { return data + count * plane; }
};
inline int64_t strassen_floats(int64_t in_channels, int64_t pairs) { return 7 * in_channels / 2 * pairs + ceil_div(pairs, PANEL) * PANEL; }

// Inputs are asked for so many pairs ahead: another thread may have made them, and the hardware does not see the next block coming.
constexpr int64_t AHEAD_PAIRS = 2;

inline void strassen_transform(const Pointwise& op, Range pairs, float* transformed) {
  const StrassenPlanes to(transformed, pairs.size(), op);
  const StrassenWeights weights = op.strassen();
  const Strides& strides = op.x_strides;
  const int64_t next = strides.at(0, 2 * PANEL), other = strides.at(0, PANEL);
  const auto put = [&](float* p, const auto& planes) FASTCONV_LAMBDA_INLINE {
#pragma GCC unroll 7
    for (const vec& plane : planes) {
      store(p, plane);
      p += to.plane;
    }
  };
  Pairs(op.pairs_within).for_each_run(pairs, [&](int64_t pixel, int64_t count, bool half, int64_t done) FASTCONV_LAMBDA_INLINE {
    for (int64_t i = 0; i < count; ++i) {
      const float* x = op.x + strides.at(pixel + 2 * i, 0);
      const float* scales = weights.input_scales();
      float* p = to.data + (done + i) * PANEL;
      const bool alone = half && i + 1 == count;
      const int64_t below = alone ? 0 : strides.pixel;
      const vec there = splat(alone ? 0.0f : 1.0f);
      vec squares{};  // beyond the largest number, or NaN, where an input is not moderate
      for (int64_t channel = 0; channel < op.in_channels; channel += 2 * PANEL, x += next, scales += 2 * PANEL, p += to.block) {
        for (const float* line : {x, x + strides.pixel, x + other, x + other + strides.pixel})
          __builtin_prefetch(line + AHEAD_PAIRS * 2 * strides.pixel);
#pragma GCC unroll 4
        for (int v = 0; v < PANEL_VECTORS; ++v) {
          const vec scale = load(scales + v * W), scale2 = load(scales + PANEL + v * W);
          const vec a11 = load(x + v * W) * scale, a12 = load(x + other + v * W) * scale2;
          if (op.pairs_within == 1) {
            squares += a11 * a11 + a12 * a12;
            put(p + v * W, std::array<vec, ALONE>{a11, a12, a11 + a12, -a11});
            continue;
          }
          const vec a21 = load(x + below + v * W) * (scale * there), a22 = load(x + below + other + v * W) * (scale2 * there);
          squares += a11 * a11 + a12 * a12 + (a21 * a21 + a22 * a22);
          const vec s1 = a21 + a22, s2 = s1 - a11;
          put(p + v * W, std::array<vec, 7>{s1, s2, a11, a12, a12 - s2, a11 - a21, a22});
        }
      }
      to.moderate()[done + i] = all_set(squares < 1e30f) ? 1.0f : 0.0f;
    }
  });
}

// A tile of MR pairs, or pixels alone, by NV vectors of either half of its groups.
struct StrassenTile {
  const float* x;  // the tile's first pair in the first plane that there is
  StrassenPlanes planes;
  int64_t depth;         // of a product
  const float* group;    // the first group's scales and products
  int64_t group_floats;  // from group to group
  Epilogue epilogue;     // at the tile's first pixel and output
  float* out;
  Strides out_strides;
  bool half;  // the last pair has no second pixel
};
// What tiles fetch into L2 while they multiply, so many floats for every UNROLL of the depth: the next groups' weights, then what the
// thread's stream says.
struct StrassenAhead {
  Fetch ranges[MAX_STRASSEN_GROUPS + 1] = {};
  const float *begin = nullptr, *end = nullptr;  // of what is left of one range; the others follow
  int64_t floats_a_step = 0;
  int next = 0;
  FASTCONV_INLINE void spread(int64_t steps) {
    if (stream && !stream->empty()) ranges[MAX_STRASSEN_GROUPS] = stream->take(steps);
    int64_t floats = 0;
    for (const Fetch& range : ranges) floats += range.size();
    floats_a_step = ceil_div(floats, steps * PANEL) * PANEL;
    go_on(begin, end);
  }
  __attribute__((noinline)) void go_on(const float*& from, const float*& to) {
    while (from >= to && next <= MAX_STRASSEN_GROUPS) from = ranges[next].begin, to = ranges[next++].end;
  }
};

// One run of products after another onto the same sums. (All seven in one function: gcc spills the sums between them.)
struct StrassenRun {
  int first, products;  // factors
  const float* from;    // sums to add to, or null
  float* keep;          // where sums are kept after each product but the last, one after the other; or null
  int pixel, column;    // of the outputs, in pixels and channels from the tile's first; -1: none, the last sums are kept as well
  const float *more_outputs = nullptr, *more = nullptr;  // kept sums that are added to the outputs, and to the sums; these are kept then
};

template <int MR, int NV, int PIXELS>
FASTCONV_INLINE void strassen_run(const StrassenTile& tile, StrassenAhead& ahead, StrassenRun run) {
  constexpr int64_t KEPT = MR * NV * W;
  const int64_t product = tile.depth, depth = run.products * product;
  const float* weights[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v)
    weights[v] = tile.group + v / PANEL_VECTORS * tile.group_floats + 2 * PANEL + run.first * product * PANEL + v % PANEL_VECTORS * W;
  const float *soon = ahead.begin, *soon_end = ahead.end;
  const int64_t soon_floats = ahead.floats_a_step;
  // Planes follow each other as blocks do.
  Blocked<MR> rows(tile.x + (run.first - tile.planes.first) * tile.planes.plane, tile.planes.block, depth);
  vec sum[MR][NV];
  if (run.from) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[r][v] = load(run.from + (r * NV + v) * W);
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[r][v] = vec{};
  }
  rows.enter(0);
  int64_t next = product;
  for (int64_t k = 0; k < depth; k += UNROLL) {
    if (run.keep && k == next) {
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) store(run.keep + (r * NV + v) * W, sum[r][v]);
      run.keep += KEPT;
      next += product;
    }
#pragma GCC unroll 4
    for (int u = 0; u < UNROLL; ++u) {
      vec weight[NV + 1];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) weight[v] = load(weights[v] + u * PANEL);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) multiply_add<NV>(sum[r], rows.at(r, k, u), weight);
    }
    if (soon < soon_end) {
      for (int64_t i = 0; i < soon_floats; i += PANEL) __builtin_prefetch(soon + i, 0, 2);
      soon += soon_floats;
      if (soon >= soon_end) ahead.go_on(soon, soon_end);
    }
    rows.advance(UNROLL);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) weights[v] += UNROLL * PANEL;
  }
  ahead.begin = soon;
  ahead.end = soon_end;

  if (run.pixel < 0) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) store(run.keep + (r * NV + v) * W, sum[r][v]);
    return;
  }
  if (run.more) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        store(run.keep + (r * NV + v) * W, sum[r][v] + load(run.more + (r * NV + v) * W));
        sum[r][v] += load(run.more_outputs + (r * NV + v) * W);
      }
  }
  Clamp clamp(tile.epilogue.activation);
  asm("" : "+m"(clamp));  // bounds come from memory: there are no registers for them
  const int64_t pixels = PIXELS * opaque(tile.out_strides.pixel), residual_pixels = PIXELS * opaque(tile.epilogue.residual_strides.pixel);
  const bool one_less = tile.half && run.pixel == 1;
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const int column = v / PANEL_VECTORS * 2 * PANEL + v % PANEL_VECTORS * W + run.column;
    const vec scale = load(tile.group + v / PANEL_VECTORS * tile.group_floats + v % PANEL_VECTORS * W + run.column);
    const vec bias = load(tile.epilogue.bias + column);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) sum[r][v] = sum[r][v] * scale + bias;
    if (tile.epilogue.residual) {
      const float* residual = tile.epilogue.residual + tile.epilogue.residual_strides.at(run.pixel, column);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r, residual += residual_pixels)
        if (r < MR - 1 || !one_less) sum[r][v] += load(residual);
    }
    if (tile.epilogue.activation == Activation::hardswish) {
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) sum[r][v] = activate(sum[r][v], Activation::hardswish);
    }
    float* out = tile.out + tile.out_strides.at(run.pixel, column);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r, out += pixels)
      if (r < MR - 1 || !one_less) store(out, clamp(sum[r][v]));
  }
}

template <int MR, int NV>
__attribute__((noinline)) void strassen_tile(const StrassenTile& tile, StrassenAhead& ahead) {
  alignas(64) float kept[4][MR * NV * W];
  float *const u1 = kept[0], *const u2 = kept[1], *const u3 = kept[2], *const u2_p5 = kept[3];
  strassen_run<MR, NV, 2>(tile, ahead, {2, 2, nullptr, u1, 0, 0});
  strassen_run<MR, NV, 2>(tile, ahead, {1, 1, u1, u2, -1, 0});
  strassen_run<MR, NV, 2>(tile, ahead, {5, 2, u2, u3, 1, 0});
  strassen_run<MR, NV, 2>(tile, ahead, {0, 1, nullptr, u2_p5, 1, PANEL, u3, u2});
  strassen_run<MR, NV, 2>(tile, ahead, {4, 1, u2_p5, nullptr, 0, PANEL});
}
template <int MR, int NV>
__attribute__((noinline)) void strassen_tile_alone(const StrassenTile& tile, StrassenAhead& ahead) {
  strassen_run<MR, NV, 1>(tile, ahead, {2, 2, nullptr, nullptr, 0, 0});
  strassen_run<MR, NV, 1>(tile, ahead, {4, 2, nullptr, nullptr, 0, PANEL});
}

// The plain panels of a group, from its products: B12 is the sum of two.
inline void unpack_group(const StrassenWeights& weights, int64_t g, float* panels) {
  const int64_t K = weights.in_channels, product = K / 2 * PANEL;
  const float *scales = weights.group(g), *b = weights.products(g);
  for (int64_t k = 0; k < K; ++k) {
    const float input_scale = weights.input_scales()[k];
    const float* row = b + (k / (2 * PANEL) * PANEL + k % PANEL) * PANEL;
    for (int64_t n = 0; n < PANEL; ++n, ++row) {
      const bool upper = k / PANEL % 2 == 0;
      const float first = row[(upper ? 2 : 3) * product], second = upper ? first + row[0] : row[4 * product];
      panels[k * PANEL + n] = first * input_scale * scales[n];
      panels[(K + k) * PANEL + n] = second * input_scale * scales[PANEL + n];
    }
  }
}

// Panels of pairs that stand transformed. Panels of a group go together. scratch: strassen_scratch floats.
inline void strassen_multiply(const Pointwise& op, Range pairs, Range panels, float* transformed, float* scratch) {
  const StrassenWeights weights = op.strassen();
  const StrassenPlanes planes(transformed, pairs.size(), op);
  const bool alone = op.pairs_within == 1;
  const int64_t depth = op.in_channels / 2, tiles = ceil_div(pairs.size(), max_rows<PREFERRED_NV>());
  const int64_t end = panels.end / 2 < weights.groups() ? panels.end / 2 : weights.groups();
  bool moderate = true;
  for (int64_t i = 0; i < pairs.size(); ++i) moderate &= planes.moderate()[i] != 0.0f;
  const auto at = [&](int64_t pixel, int64_t column) FASTCONV_LAMBDA_INLINE {
    Epilogue to = op.epilogue;
    to.bias += column;
    if (to.residual) to.residual += to.residual_strides.at(pixel, column);
    return to;
  };
  for (int64_t g = panels.begin / 2; g < end;) {
    int64_t count = end - g < STRASSEN_GROUPS ? end - g : STRASSEN_GROUPS;
    if (end - g == STRASSEN_GROUPS + 1 && STRASSEN_GROUPS < MAX_STRASSEN_GROUPS) count = MAX_STRASSEN_GROUPS;
    const int64_t after = g + count < weights.groups() ? g + count : weights.groups(),
                  upto = after + count < weights.groups() ? after + count : weights.groups();
    StrassenAhead ahead;
    for (int64_t each = after; each < upto; ++each) {
      const float* const factors = weights.products(each) + planes.first * depth * PANEL;
      ahead.ranges[each - after] = {factors, factors + planes.count * depth * PANEL};
    }
    ahead.spread(tiles * planes.count * (depth / UNROLL));
    const auto all_tiles = [&](int64_t pixel, int64_t number, bool half, int64_t done) FASTCONV_LAMBDA_INLINE {
      with_constant<MAX_STRASSEN_GROUPS>(count, [&](auto GROUPS) {
        constexpr int NV = GROUPS * PANEL_VECTORS, MOST = max_rows<NV>();
        Pieces(number, MOST).for_each([&](int64_t, int64_t first, int64_t rows) {
          const int64_t top = pixel + (alone ? first : 2 * first), column = g * 2 * PANEL;
          const StrassenTile tile{planes.data + (done + first) * PANEL,
                                  planes,
                                  depth,
                                  weights.group(g),
                                  weights.group_floats(),
                                  at(top, column),
                                  op.out + op.out_strides.at(top, column),
                                  op.out_strides,
                                  half && first + rows == number};
          with_constant<MOST>(rows, [&](auto MR) {
            if (alone)
              strassen_tile_alone<MR, NV>(tile, ahead);
            else
              strassen_tile<MR, NV>(tile, ahead);
          });
          if (in_second_pass(op.epilogue.activation))
            activate_rows(tile.out, op.out_strides, alone ? rows : 2 * rows - tile.half, GROUPS * 2 * PANEL, op.epilogue.activation);
        });
      });
    };
    if (alone) all_tiles(pairs.begin, pairs.size(), false, 0);
    Pairs(op.pairs_within).for_each_run(pairs, [&](int64_t pixel, int64_t number, bool half, int64_t done) FASTCONV_LAMBDA_INLINE {
      if (!alone) all_tiles(pixel, number, half, done);
      for (int64_t i = 0; !moderate && i < number; ++i)
        if (planes.moderate()[done + i] == 0.0f)
          for (int64_t each = g; each < g + count; ++each) {
            unpack_group(weights, each, scratch);
            const int64_t first = pixel + 2 * i, column = each * 2 * PANEL;
            Pointwise direct = op;
            direct.packing = Packing::panels;
            direct.x += op.x_strides.at(first, 0);
            direct.panels = scratch;
            direct.out_channels = 2 * PANEL;
            direct.epilogue = at(first, column);
            direct.out += op.out_strides.at(first, column);
            pointwise(direct, {0, half && i + 1 == number ? 1 : 2}, {0, 2});
          }
    });
    g += count;
  }
  if (panels.end <= 2 * weights.groups()) return;
  const auto direct = [&](int64_t pixel, int64_t pixels) {
    const int64_t column = weights.groups() * 2 * PANEL;
    Pointwise rest = op;
    rest.packing = Packing::panels;
    rest.x += op.x_strides.at(pixel, 0);
    rest.panels = weights.rest();
    rest.out_channels = op.out_channels - column;
    rest.epilogue = at(pixel, column);
    rest.out += op.out_strides.at(pixel, column);
    pointwise(rest, {0, pixels}, {0, panels_for(rest.out_channels)});
  };
  if (alone) return direct(pairs.begin, pairs.size());
  Pairs(op.pairs_within).for_each_run(pairs, [&](int64_t pixel, int64_t number, bool half, int64_t) { direct(pixel, 2 * number - half); });
}
inline int64_t strassen_scratch(int64_t in_channels) { return 2 * PANEL * in_channels; }

}  // namespace fastconv::FASTCONV_ISA
