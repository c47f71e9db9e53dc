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

// Vectors of sums a paired panel takes a row.
constexpr int PAIRED_NV = PANEL / W;

// Largest tiles whose sums, weights and one broadcast fit the registers: 6x64, 8x48, 14x32, 14x16 on AVX-512, and 14x24, 9x40 with a
// paired panel; 6x16, 12x8 and 6x8 paired on AVX2.
template <int NV, bool PAIR = false>
constexpr int max_rows() {
  constexpr int VECTORS = NV + (PAIR ? PAIRED_NV : 0);
  if constexpr (W == 16) return VECTORS == 4 ? 6 : VECTORS == 3 ? (PAIR ? 9 : 8) : 14;
  if constexpr (REGISTERS == 32) return 6;
  if constexpr (W == 8) return VECTORS == 2 ? 6 : 12;
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
  static constexpr bool FETCHES = true;
  const float* x;
  int64_t stride, segments, depth, segment_stride;
  const float* p[(MR + 2) / 3];
  FASTCONV_INLINE Strided(const StridedSource& source, int64_t first_row)
      : x(source.x + first_row * source.stride),
        stride(source.stride),
        segments(source.segments),
        depth(source.depth),
        segment_stride(source.segment_stride) {}
  FASTCONV_INLINE void enter(int64_t s) {
    const float* first = x + s * segment_stride;
#pragma GCC unroll 8
    for (int i = 0; i < (MR + 2) / 3; ++i) p[i] = first + 3 * i * stride;
  }
  FASTCONV_INLINE void next() { x += MR * stride; }
  FASTCONV_INLINE void again() {}  // the same rows for the next chunk
  FASTCONV_INLINE const float* at(int r, int64_t, int u) const { return p[r / 3] + (r % 3 * stride + u); }
  FASTCONV_INLINE void advance(int n) {
#pragma GCC unroll 8
    for (int i = 0; i < (MR + 2) / 3; ++i) {
      p[i] += n;
      asm("" : "+r"(p[i]));  // keeps the compiler from deriving one pointer a row after all
    }
  }
};

// Pixels of a blocked image. One pointer serves all rows, whose places are constants; after 16 inputs it goes on to the next block. (A
// segment a block would move every sum from register to register between segments.)
//
// Up to `end` inputs are fetched AHEAD_BLOCKS of 16 before they are read: another thread may have made them, and a line comes from its
// cache in as long as a tile takes for 16 inputs, in runs too short for the hardware to fetch by itself.
template <int MR>
struct Blocked {
  static constexpr bool FETCHES = true;
  static constexpr int64_t segments = 1;
  static constexpr int64_t AHEAD_BLOCKS = 4;
  const float* x;
  int64_t to_next_block, depth;
  const float* p;
  int64_t read = 0;
  const float *tile, *fetched, *end;  // the tile that is fetched, and its block
  FASTCONV_INLINE Blocked(const float* x, int64_t block, int64_t inputs, const float* end = nullptr)
      : x(x), to_next_block(block - PANEL), depth(inputs), p(x), tile(x), fetched(x), end(end) {
    for (int64_t i = 0; tile < end && i < AHEAD_BLOCKS; ++i) next_fetch();
  }
  FASTCONV_INLINE void next_fetch() {
    fetched += to_next_block + PANEL;
    if (fetched - tile >= ceil_div(depth, PANEL) * (to_next_block + PANEL)) fetched = tile += MR * PANEL;
  }
  FASTCONV_INLINE void enter(int64_t) {
    p = x;
    read = 0;
  }
  FASTCONV_INLINE void next() { x += MR * PANEL; }
  FASTCONV_INLINE void again() { end = nullptr; }  // they are here by now
  FASTCONV_INLINE const float* at(int r, int64_t, int u) const { return p + (r * PANEL + u); }
  FASTCONV_INLINE void advance(int n) {
    p += n;
    read += n;
    if (read % PANEL == 0) {
      p += to_next_block;
      if (tile < end) {
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) __builtin_prefetch(fetched + r * PANEL);
        next_fetch();
      }
    }
  }
};

// The same in `planes` that stand a stride apart: the next tile is the next plane's.
template <int MR>
struct Planes : Blocked<MR> {
  // The next plane's weights are fetched: they come from L3, in runs of a page, where hardware stops fetching. SqueezeNet's fires at 13x13
  // take 4% less, wherever their pages are.
  static constexpr bool STREAMS = true;
  int64_t plane;
  FASTCONV_INLINE Planes(const float* x, int64_t block, int64_t inputs, int64_t plane) : Blocked<MR>(x, block, inputs), plane(plane) {}
  FASTCONV_INLINE void next() { this->x += plane; }
};

// Rows found through a table of pointers, (segments, rows): taps outside the image point at zeros.
template <int MR>
struct Indirect {
  static constexpr bool FETCHES = false;
  const float* const* table;
  int64_t segments, depth;
  const float* p[MR];
  FASTCONV_INLINE void enter(int64_t s) {
    for (int r = 0; r < MR; ++r) p[r] = table[s * MR + r];
  }
  FASTCONV_INLINE void next() {}  // a table serves one tile
  FASTCONV_INLINE void again() {}
  FASTCONV_INLINE const float* at(int r, int64_t k, int u) const { return p[r] + (k + u); }
  FASTCONV_INLINE void advance(int) {}
};

// Rows a small step apart (a compile-time constant unless STEP is 0) with a table of offsets along the depth: the stem's row buffer.
template <int MR, int STEP>
struct Stepped {
  static constexpr bool FETCHES = false;
  const float* x;
  const int32_t* offsets;
  int64_t segments, depth, step;
  FASTCONV_INLINE void enter(int64_t) {}
  FASTCONV_INLINE void next() { x += MR * (STEP ? STEP : step); }
  FASTCONV_INLINE void again() {}
  FASTCONV_INLINE const float* at(int r, int64_t k, int u) const { return x + (offsets[k + u] + r * (STEP ? STEP : step)); }
  FASTCONV_INLINE void advance(int) {}
};

// The stem's row buffer of three channels a compile-time step and kernel width apart: every place is a displacement, or the width's
// multiple.
template <int MR, int STEP, int KW>
struct Window {
  static constexpr bool FETCHES = false;
  static constexpr int DEPTH = KW * 3;  // a segment is a kernel row: (kw, channel)
  static constexpr int64_t depth = DEPTH;
  const float* x;
  int64_t segments, width;
  const float* p[3];  // of the channels
  Fetch soon[3];      // what the next row of output adds to the input, of which each tile fetches its share
  int64_t floats_a_tile;
  FASTCONV_INLINE Window(const float* x, int64_t segments, int64_t width, const Fetch (&next)[3], Range pixels)
      : x(x), segments(segments), width(width), floats_a_tile(ceil_div(next[0].size() * MR, pixels.end * PANEL) * PANEL) {
    for (int c = 0; c < 3; ++c) soon[c] = next[c].part(pixels, pixels.end);
  }
  FASTCONV_INLINE void enter(int64_t s) {
    if (s > 0) return;
    for (int c = 0; c < 3; ++c) p[c] = x + c * width;
    keep();
  }
  FASTCONV_INLINE void keep() {
    asm("" : "+r"(p[0]), "+r"(p[1]), "+r"(p[2]));  // as they are: not one pointer a place
  }
  FASTCONV_INLINE void next() {
    x += MR * STEP;
    for (Fetch& rows : soon) {
      for (int64_t i = 0; i < floats_a_tile; i += PANEL) __builtin_prefetch(rows.begin + i);
      rows.begin += floats_a_tile;
    }
  }
  FASTCONV_INLINE void again() {}
  FASTCONV_INLINE const float* at(int r, int64_t, int u) const { return p[u % 3] + (r * STEP + u / 3); }
  FASTCONV_INLINE void advance(int) {
    for (int c = 0; c < 3; ++c) p[c] += 3 * width;
    keep();
  }
};

// What tiles fetch into L2 while they multiply, floats_a_step for every UNROLL of the depth: the weights of the next chunk of columns, a
// share of what the product says is read after it, and what the thread's stream says. Weights come from L3 or memory once a call: fetched
// in time they cost nothing.
struct Ahead {
  static constexpr int RANGES = 3;
  const Pointwise& op;
  const Range panels;              // of the call
  const int64_t at_a_time, steps;  // panels a chunk; steps of UNROLL that it takes
  const bool cold;                 // the product's own weights, in the caches below
  Fetch ranges[RANGES] = {};
  int64_t panel = 0, floats_a_step = 0;
  int at = 0;
  FASTCONV_INLINE Ahead(const Pointwise& op, Range panels, int64_t at_a_time, int64_t steps, bool cold)
      : op(op), panels(panels), at_a_time(at_a_time), steps(steps), cold(cold) {}
  // The chunk from this panel on begins.
  FASTCONV_INLINE void begin(int64_t first) {
    panel = first;
    const auto upto = [](int64_t a, int64_t b) { return a < b ? a : b; };
    if (cold) {
      const int64_t panel_floats = op.in_channels * PANEL, all = panels_for(op.out_channels);
      const int64_t next = upto(first + at_a_time, all), done = first - panels.begin;
      ranges[0] = {op.panels + next * panel_floats, op.panels + upto(next + at_a_time, all) * panel_floats};
      if (op.soon.begin) ranges[1] = op.soon.part({done, upto(done + at_a_time, panels.size())}, panels.size());
    }
    ranges[2] = stream && !stream->empty() ? stream->take(steps) : Fetch{};
    const int64_t floats = ranges[0].size() + ranges[1].size() + ranges[2].size();
    floats_a_step = steps > 0 ? ceil_div(floats, steps * PANEL) * PANEL : 0;
    at = 0;
  }
  FASTCONV_INLINE bool more() {
    while (at < RANGES && ranges[at].begin >= ranges[at].end) ++at;
    return at < RANGES;
  }
};

// A number that the compiler knows nothing of, so that what follows from it is not made before the loop, on the stack: that took 200 cycles
// a call of `tiles`.
FASTCONV_INLINE int64_t opaque(int64_t number) {
  asm volatile("" : "+r"(number));
  return number;
}

// Where a run of tiles writes, and the weights it uses: `columns` output channels from column 0 of panels, bias, residual and out; and as
// many again in each of `chunks`.
struct Output {
  const float* panels;
  int64_t panel_stride;
  Epilogue epilogue;
  float* out;
  Strides out_strides;
  int64_t columns;
  Ahead* ahead = nullptr;
  int64_t panel_step = 0, out_step = 0;  // from tile to tile, where the next is not the pixels below
  int64_t chunks = 1;                    // more than one: of whole panels
  FASTCONV_INLINE void next_chunk() {
    panels += columns / PANEL * panel_stride;
    epilogue.bias += columns;
    if (epilogue.residual) epilogue.residual += epilogue.residual_strides.at(0, columns);
    out += out_strides.at(0, columns);
    if (ahead) ahead->begin(ahead->panel + ahead->at_a_time);
  }
};

// sum[v] += *x * weight[v], spelled out on x86: with all sums alive gcc issues broadcasts early and spills sums for them, or keeps them in
// chains that wait for each other (AVX-512, Zen 5, 268 GFLOP/s peak: 56x64->32 231 and 242, 56x96->24 196 and 231, 196x240->80 244 and
// 260).
template <int NV, int SUMS>
FASTCONV_INLINE void multiply_add(vec (&sum)[SUMS], const float* x, const vec (&weight)[NV + 1]) {
#if defined(FASTCONV_ISA_IS_AVX512)
  // One instruction where nothing else reads the broadcast: on Zen 4 two took a third longer (2916x96->16: 85 and 114 of 118 GFLOP/s).
  if constexpr (NV == 1) {
    asm volatile("vfmadd231ps %1%{1to16%}, %2, %0" : "+v"(sum[0]) : "m"(*x), "v"(weight[0]));
    return;
  }
#endif
#if defined(FASTCONV_ISA_IS_AVX512) || defined(FASTCONV_ISA_IS_AVX2)
  vec value;
  if constexpr (NV == 1)
    asm volatile("vbroadcastss %2, %1\n\tvfmadd231ps %3, %1, %0" : "+v"(sum[0]), "=&v"(value) : "m"(*x), "v"(weight[0]));
  else if constexpr (NV == 2)
    asm volatile("vbroadcastss %3, %2\n\tvfmadd231ps %4, %2, %0\n\tvfmadd231ps %5, %2, %1"
                 : "+v"(sum[0]), "+v"(sum[1]), "=&v"(value)
                 : "m"(*x), "v"(weight[0]), "v"(weight[1]));
  else if constexpr (NV == 3)
    asm volatile("vbroadcastss %4, %3\n\tvfmadd231ps %5, %3, %0\n\tvfmadd231ps %6, %3, %1\n\tvfmadd231ps %7, %3, %2"
                 : "+v"(sum[0]), "+v"(sum[1]), "+v"(sum[2]), "=&v"(value)
                 : "m"(*x), "v"(weight[0]), "v"(weight[1]), "v"(weight[2]));
  else
#endif
  {
    const vec each = splat(*x);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[v] += each * weight[v];
  }
}

// The first of a tile's, onto the bias, which stays in memory: sums need no moves before it.
template <int NV, int SUMS>
FASTCONV_INLINE void multiply_first(vec (&sum)[SUMS], const float* x, const vec (&weight)[NV + 1], const vec* bias) {
#if defined(FASTCONV_ISA_IS_AVX512) || defined(FASTCONV_ISA_IS_AVX2)
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v)
    asm volatile("vbroadcastss %1, %0\n\tvfmadd213ps %3, %2, %0" : "=&v"(sum[v]) : "m"(*x), "v"(weight[v]), "m"(bias[v]));
#else
  const vec each = splat(*x);
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) sum[v] = bias[v] + each * weight[v];
#endif
}

// The same for a paired panel: two inputs, (x[0], x[1]), against sums of pairs of lanes.
FASTCONV_INLINE void multiply_add_pair(vec* sum, const float* x, const vec* weight, bool one) {
#if defined(FASTCONV_ISA_IS_AVX512)
  if (!one) {
    vec value;
    asm volatile("vbroadcastsd %2, %1\n\tvfmadd231ps %3, %1, %0"
                 : "+v"(*sum), "=&v"(value)
                 : "m"(*reinterpret_cast<const float (*)[2]>(x)), "v"(*weight));
    return;
  }
#endif
  const vec value = splat_pair(x, one);
#pragma GCC unroll 4
  for (int v = 0; v < PAIRED_NV; ++v) sum[v] += value * weight[v];
}

// `count` tiles one below the other, of one chunk of columns; PAIR: a paired panel follows the NV vectors. STEPS: which of the depth's
// loops there are; where one ends and another may begin, gcc moves all sums from register to register.
enum class Steps { fours, pairs, all };
template <int MR, int NV, bool PAIR, Steps STEPS, class Rows>
FASTCONV_INLINE void tile_chunk(Rows rows, int64_t count, Output to, Clamp clamp) {
  constexpr int ALL = NV + (PAIR ? PAIRED_NV : 0);
  const int64_t columns = to.columns;
  vec bias[ALL];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) bias[v] = load_up_to(to.epilogue.bias + v * W, columns - v * W);
  if constexpr (PAIR) {
    float lanes[PANEL] = {};
    for (int64_t j = 0; j < columns - NV * W; ++j) lanes[2 * j] = to.epilogue.bias[NV * W + j];
#pragma GCC unroll 4
    for (int v = NV; v < ALL; ++v) bias[v] = load(lanes + (v - NV) * W);
  }
  for (; count > 0; --count) {
    const bool fetches = Rows::FETCHES && to.ahead && to.ahead->more();
    const float* ahead = fetches ? to.ahead->ranges[to.ahead->at].begin : nullptr;
    const int64_t ahead_floats = fetches ? to.ahead->floats_a_step : 0;
    // With one segment the first step begins the sums of whole vectors.
    constexpr bool BEGINS = STEPS == Steps::fours && requires { std::bool_constant<Rows::segments == 1>{}; };
    vec sum[MR][ALL];
    if constexpr (!BEGINS) asm("" : "+m"(bias));  // no register for it in the loop
#pragma GCC unroll 4
    for (int v = BEGINS ? NV : 0; v < ALL; ++v)
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) sum[r][v] = bias[v];
    const float* panel[ALL];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) panel[v] = to.panels + (v * W / PANEL) * to.panel_stride + (v * W) % PANEL;
#pragma GCC unroll 4
    for (int v = NV; v < ALL; ++v) panel[v] = to.panels + (NV * W / PANEL) * to.panel_stride + (v - NV) * W;

    for (int64_t s = 0; s < rows.segments; ++s) {
      rows.enter(s);
      const auto step = [&](int64_t k, int u, auto first) FASTCONV_LAMBDA_INLINE {
        vec weight[NV + 1];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) weight[v] = load(panel[v] + u * PANEL);
        if constexpr (requires { std::bool_constant<Rows::STREAMS>{}; }) {
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) __builtin_prefetch(panel[v] + u * PANEL + to.panel_step, 0, 3);
        }
        if constexpr (NV > 0) {
#pragma GCC unroll 16
          for (int r = 0; r < MR; ++r)
            if constexpr (first)
              multiply_first<NV>(sum[r], rows.at(r, k, u), weight, bias);
            else
              multiply_add<NV>(sum[r], rows.at(r, k, u), weight);
        }
      };
      const auto step_pair = [&](int64_t k, int u, bool one) FASTCONV_LAMBDA_INLINE {
        if constexpr (PAIR) {
          vec weight[PAIRED_NV];
#pragma GCC unroll 4
          for (int v = 0; v < PAIRED_NV; ++v) weight[v] = load(panel[NV + v] + u / 2 * PANEL);
#pragma GCC unroll 16
          for (int r = 0; r < MR; ++r) multiply_add_pair(sum[r] + NV, rows.at(r, k, u), weight, one);
        }
      };
      const auto advance = [&](int n) FASTCONV_LAMBDA_INLINE {
        rows.advance(n);
#pragma GCC unroll 4
        for (int v = 0; v < ALL; ++v) panel[v] += (v < NV ? n : n / 2) * PANEL;
      };
      const auto four = [&](int64_t k, auto first) FASTCONV_LAMBDA_INLINE {
        step(k, 0, first);
        step_pair(k, 0, false);
#pragma GCC unroll 4
        for (int u = 1; u < UNROLL; ++u) {
          step(k, u, std::false_type{});
          if (u % 2 == 0) step_pair(k, u, false);
        }
        if constexpr (Rows::FETCHES) {
          for (int64_t i = 0; i < ahead_floats; i += PANEL) __builtin_prefetch(ahead + i, 0, 2);
          ahead += ahead_floats;
        }
        advance(UNROLL);
      };
      if constexpr (requires { std::bool_constant<(Rows::DEPTH > 0)>{}; }) {
        [&]<int... U>(std::integer_sequence<int, U...>)
            FASTCONV_LAMBDA_INLINE { (step(0, U, std::false_type{}), ...); }(std::make_integer_sequence<int, Rows::DEPTH>{});
        advance(Rows::DEPTH);
        continue;
      }
      int64_t k = 0;
      if constexpr (BEGINS) {
        four(0, std::true_type{});
        k = UNROLL;
      }
      if constexpr (STEPS != Steps::pairs)
        for (; k + UNROLL <= rows.depth; k += UNROLL) four(k, std::false_type{});
      if constexpr (STEPS != Steps::fours) {
        for (; k + 2 <= rows.depth; k += 2) {
          step(k, 0, std::false_type{});
          step_pair(k, 0, false);
          step(k, 1, std::false_type{});
          advance(2);
        }
        if (k < rows.depth) {
          step(k, 0, std::false_type{});
          step_pair(k, 0, true);
          advance(1);
        }
      }
    }

    if (fetches) to.ahead->ranges[to.ahead->at].begin = ahead;

    // From here on a paired panel's sums are plain columns.
    constexpr int PLAIN = NV + (PAIR ? (W == 4 ? 2 : 1) : 0);
    if constexpr (PAIR)
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        if constexpr (W == 4) {
          sum[r][NV] = fold_pairs(sum[r][NV], sum[r][NV + 1]);
          sum[r][NV + 1] = fold_pairs(sum[r][NV + 2], sum[r][NV + 3]);
        } else {
          sum[r][NV] = fold_pairs(sum[r][NV], sum[r][ALL - 1]);
        }
      }
    if (to.epilogue.residual) {
      const float* residual = to.epilogue.residual;
      const int64_t pixel = opaque(to.epilogue.residual_strides.pixel);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r, residual += pixel)
#pragma GCC unroll 4
        for (int v = 0; v < PLAIN; ++v)
          if (columns > v * W) sum[r][v] += load_up_to(residual + to.epilogue.residual_strides.at(0, v * W), columns - v * W);
    }
    if (to.epilogue.activation == Activation::hardswish) {
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < PLAIN; ++v) sum[r][v] = activate(sum[r][v], Activation::hardswish);
    }
    const auto finish = [&](auto bounded, auto put) FASTCONV_LAMBDA_INLINE {
      const int64_t pixel = opaque(to.out_strides.pixel);
#pragma GCC unroll 4
      for (int v = 0; v < PLAIN; ++v) {
        float* out = to.out + to.out_strides.at(0, v * W);
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r, out += pixel) put(out, bounded(sum[r][v]), v);
      }
    };
    const auto put = [&](auto bounded) FASTCONV_LAMBDA_INLINE {
      if (!PAIR && columns == NV * W)
        finish(bounded, [](float* p, vec y, int) FASTCONV_LAMBDA_INLINE { store(p, y); });
      else
        finish(bounded, [&](float* p, vec y, int v) FASTCONV_LAMBDA_INLINE {
          if (v < NV - 1 || (PAIR && v < NV))
            store(p, y);
          else if (columns > v * W)
            store_first(p, y, static_cast<int>(columns - v * W < W ? columns - v * W : W));
        });
    };
    // Bounds only where there are any: minimum and maximum take the multiply-adds' ports on Intel's cores (40 inputs with hardswish 3% less
    // time, a projection of 96 inputs 2%). They come from memory: the loop has no register for them.
    if (clamp.bounds()) {
      asm("" : "+m"(clamp));
      put([&](vec y) FASTCONV_LAMBDA_INLINE { return clamp(y); });
    } else {
      put([](vec y) FASTCONV_LAMBDA_INLINE { return y; });
    }
    if (in_second_pass(to.epilogue.activation)) activate_rows(to.out, to.out_strides, MR, columns, to.epilogue.activation);

    rows.next();
    to.panels += to.panel_step;
    to.out += to.out_step ? to.out_step : MR * to.out_strides.pixel;
    if (to.epilogue.residual) to.epilogue.residual += MR * to.epilogue.residual_strides.pixel;
  }
}

// Every chunk of columns over the same pixels. (A call costs 200 cycles, as much as a tile of 14 inputs.)
template <int MR, int NV, bool PAIR, class Rows>
__attribute__((noinline)) void tiles(Rows rows, int64_t count, Output to) {
  const Clamp clamp(to.epilogue.activation);
  for (int64_t left = to.chunks; left > 0; --left) {
    if constexpr (!Rows::FETCHES)
      tile_chunk<MR, NV, PAIR, Steps::all>(rows, count, to, clamp);
    else if (rows.depth % UNROLL == 0) [[likely]]
      tile_chunk<MR, NV, PAIR, Steps::fours>(rows, count, to, clamp);
    else
      tile_chunk<MR, NV, PAIR, Steps::pairs>(rows, count, to, clamp);
    if (left > 1) {
      to.next_chunk();
      rows.again();
    }
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
  FASTCONV_INLINE int64_t number() const { return longer + shorter; }
  // f(piece, first thing, things)
  template <class F>
  FASTCONV_INLINE void for_each(F f) const {
    for (int64_t piece = 0, first = 0; piece < number(); ++piece) {
      const int64_t things = size + (piece < longer);
      f(piece, first, things);
      first += things;
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
template <int NV, bool PAIR, class RowsOf>
FASTCONV_INLINE void cover(int64_t count, Output to, RowsOf rows_of) {
  constexpr int MOST = max_rows<NV, PAIR>();
  const Pieces pieces(count, MOST);
  const bool mixed = pieces.longer > 0 && pieces.shorter > 0;  // then chunk by chunk, so that both sizes find its weights in L1
  const int64_t calls = mixed ? to.chunks : 1;
  for (int64_t call = 0; call < calls; ++call) {
    const auto run = [&](int64_t size, int64_t first, int64_t number) FASTCONV_LAMBDA_INLINE {
      if (number == 0) return;
      Output at = to;
      at.chunks = mixed ? 1 : to.chunks;
      at.out += first * to.out_strides.pixel;
      if (at.epilogue.residual) at.epilogue.residual += first * to.epilogue.residual_strides.pixel;
      with_constant<MOST>(size, [&](auto MR) {
        auto rows = rows_of(MR, first);
        if (call > 0) rows.again();
        tiles<MR, NV, PAIR>(rows, number, at);
      });
    };
    run(pieces.size + 1, 0, pieces.longer);
    run(pieces.size, pieces.longer * (pieces.size + 1), pieces.shorter);
    if (call + 1 < calls) to.next_chunk();
  }
}

// The output of a chunk of columns: everything of `to` moved to `column`.
FASTCONV_INLINE Output at_column(Output to, int64_t column, int64_t columns) {
  to.panels += column / PANEL * to.panel_stride + column % PANEL;
  to.epilogue.bias += column;
  if (to.epilogue.residual) to.epilogue.residual += to.epilogue.residual_strides.at(0, column);
  to.out += to.out_strides.at(0, column);
  to.columns = columns;
  return to;
}

// Panels [panels.begin, panels.end) in chunks of NV vectors, PREFERRED where there are enough: f(NV, PAIR, first column, columns), and,
// where f takes it, how many such chunks follow each other. With `paired` the last panel of all is a paired one; it joins up to two whole
// vectors where registers allow.
template <int PREFERRED, class F>
FASTCONV_INLINE void for_each_chunk(Range panels, int64_t out_channels, bool paired, F f) {
  const int64_t end = panels.end * PANEL < out_channels ? panels.end * PANEL : out_channels;
  const bool pair = paired && panels.end * PANEL > out_channels;
  const int64_t whole = pair ? (panels.end - 1) * PANEL : end;  // columns before the paired panel
  constexpr int64_t WITH_PAIR = W == 16 ? 2 : 0;
  int64_t vectors = ceil_div(whole - panels.begin * PANEL, W);
  int64_t column = panels.begin * PANEL;
  while (vectors > (pair ? WITH_PAIR : 0)) {
    int64_t nv = vectors < PREFERRED ? vectors : PREFERRED;
    if (vectors == PREFERRED + 1 && PREFERRED < MAX_NV) nv = PREFERRED + 1;  // 3 = 3, not 2 + 1: one vector alone is slower
    const int64_t columns = whole - column < nv * W ? whole - column : nv * W;
    int64_t chunks = 1;
    if constexpr (std::is_invocable_v<F, std::integral_constant<int, 1>, std::false_type, int64_t, int64_t, int64_t>) {
      const auto same = [&](int64_t left) { return left > (pair ? WITH_PAIR : 0) && left >= nv && (left != nv + 1 || nv == MAX_NV); };
      while (nv == PREFERRED && same(vectors - chunks * nv) && column + (chunks + 1) * nv * W <= whole) ++chunks;
      with_constant<MAX_NV>(nv, [&](auto NV) { f(NV, std::false_type{}, column, columns, chunks); });
    } else {
      with_constant<MAX_NV>(nv, [&](auto NV) { f(NV, std::false_type{}, column, columns); });
    }
    column += chunks * nv * W;
    vectors -= chunks * nv;
  }
  if constexpr (std::is_invocable_v<F, std::integral_constant<int, 0>, std::true_type, int64_t, int64_t, int64_t>)
    if (pair)
      with_constant<WITH_PAIR + 1>(
          vectors + 1, [&](auto N) { f(std::integral_constant<int, N - 1>{}, std::true_type{}, column, end - column, int64_t{1}); });
}
constexpr int PREFERRED_NV = W == 16 ? 2 : MAX_NV;  // 14x32 loads weights at half the rate of 6x64, so L2 keeps up

}  // namespace fastconv::FASTCONV_ISA
