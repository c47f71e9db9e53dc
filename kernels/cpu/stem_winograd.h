// The first layer of a 7 wide kernel and stride 2 over RGB, by Winograd's F(4, 4) along rows: 294 multiplications for four neighbouring
// outputs where the direct sum takes 588. Included per ISA.
//
// Taps of even and of odd columns are two convolutions of stride 1, of four taps (the last odd one is zero) over every other column, whose
// sums add up before the output transform: y = A^T sum [(G g) * (B^T d)] over kernel rows, channels and parities. Points 0, 1, -1, 2, -2,
// -1/2 and infinity; A. Lavin, S. Gray, arXiv 1509.09308, and Toom's construction of A, B and G from points. In one dimension the error is
// 5e-7 of the outputs' (root mean square; directly 2e-7). As in winograd.h, rows that see a NaN, an infinity or a huge number are computed
// directly.
//
// An input row is transformed once, into a ring of rows, and serves the output rows above and below. Tiles of four outputs count from the
// left edge, so results do not depend on the split.
#pragma once

#include "kernels/cpu/stem.h"
#include "kernels/cpu/winograd.h"

namespace fastconv::FASTCONV_ISA {

constexpr int64_t STEM_RUN = W == 16 ? 14 : 12;  // tiles that stand together, of PANEL lanes
constexpr int64_t STEM_SUMS = STEM_POINTS * STEM_RUN * MAX_NV * W;

// What a row of the image is to the tiles, and where its parts stand. A run of tiles reads PANEL lanes and one more.
struct StemTiles {
  int64_t tiles;
  Pieces runs;
  int64_t lanes;  // of every eighth column
  FASTCONV_INLINE explicit StemTiles(const Stem& op)
      : tiles(ceil_div(op.out_width, 4)), runs(tiles, STEM_RUN), lanes(ceil_div(tiles - runs.size + PANEL + 1, PANEL) * PANEL) {}
  FASTCONV_INLINE int64_t row_floats() const { return runs.number() * STEM_POINTS * STEM_PLANES * PANEL; }
  FASTCONV_INLINE int64_t columns() const { return 8 * lanes; }  // of a channel
  FASTCONV_INLINE int64_t buffer_floats() const { return 2 * 3 * columns(); }
};

inline int64_t stem_ring_floats(const Stem& op) {
  const StemTiles t(op);
  return StemRing::SLOTS * t.row_floats() + t.buffer_floats() + STEM_SUMS;
}

// B^T d, from seven inputs of one parity.
FASTCONV_INLINE void stem_inputs(const vec (&d)[STEM_POINTS], vec (&v)[STEM_POINTS]) {
  v[0] = 4.0f * d[0] + 8.0f * d[1] - 5.0f * d[2] - 10.0f * d[3] + d[4] + 2.0f * d[5];
  v[1] = 4.0f * d[1] + 12.0f * d[2] + 7.0f * d[3] - 3.0f * d[4] - 2.0f * d[5];
  v[2] = 4.0f * d[1] + 4.0f * d[2] - 9.0f * d[3] - d[4] + 2.0f * d[5];
  v[3] = 5.0f * d[4] - 5.0f * d[2] + 2.0f * d[5] - 2.0f * d[1];
  v[4] = 3.0f * d[4] - 3.0f * d[2] + 4.0f * d[3] - 2.0f * d[1] - 2.0f * d[5];
  v[5] = 5.0f * d[3] - 4.0f * d[1] - d[5];
  v[6] = 4.0f * d[1] + 8.0f * d[2] - 5.0f * d[3] - 10.0f * d[4] + d[5] + 2.0f * d[6];
}

// A^T m, to four outputs.
FASTCONV_INLINE void stem_outputs(const vec (&m)[STEM_POINTS], vec (&y)[4]) {
  const vec a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], d = m[3] - m[4];
  y[0] = m[0] + a + c + m[5];
  y[1] = b + 2.0f * d - 0.5f * m[5];
  y[2] = a + 4.0f * c + 0.25f * m[5];
  y[3] = b + 8.0f * d - 0.125f * m[5] + m[6];
}

// Even and odd lanes of two vectors in a row.
template <int... LANE>
FASTCONV_INLINE void part_lanes(vec a, vec b, vec& even, vec& odd, std::integer_sequence<int, LANE...>) {
  even = __builtin_shufflevector(a, b, (2 * LANE)...);
  odd = __builtin_shufflevector(a, b, (2 * LANE + 1)...);
}

// Every eighth float of `count` * 8, from the first to the eighth: out[j * stride + i] = x[8 * i + j].
FASTCONV_INLINE void part_by_eight(const float* x, int64_t count, float* out, int64_t stride) {
  constexpr std::make_integer_sequence<int, W> lanes;
  for (int64_t i = 0; i < count; i += W, x += 8 * W) {
    vec v[8], even[4], odd[4];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) v[j] = load(x + j * W);
    // Three times evens before odds: places 0 to 7 are then the columns 0, 4, 2, 6, 1, 5, 3, 7.
#pragma GCC unroll 3
    for (int size = 8; size > 1; size /= 2)
#pragma GCC unroll 4
      for (int first = 0; first < 8; first += size) {
#pragma GCC unroll 4
        for (int j = 0; j < size / 2; ++j) part_lanes(v[first + 2 * j], v[first + 2 * j + 1], even[j], odd[j], lanes);
#pragma GCC unroll 4
        for (int j = 0; j < size / 2; ++j) {
          v[first + j] = even[j];
          v[first + size / 2 + j] = odd[j];
        }
      }
    constexpr int COLUMN[8] = {0, 4, 2, 6, 1, 5, 3, 7};
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) store(out + COLUMN[j] * stride + i, v[j]);
  }
}

// Input row ih, to (run, point, plane, PANEL lanes). False, and nothing, for a row whose numbers a transform might spoil.
inline bool transform_stem_row(const Stem& op, const StemTiles& t, int64_t ih, float* buffer, float* to) {
  if (ih < 0 || ih >= op.height) {
    std::memset(to, 0, t.row_floats() * sizeof(float));
    return true;
  }
  const int64_t columns = t.columns(), first = op.pad_w, last = first + op.width < columns ? first + op.width : columns;
  float* const parts = buffer + 3 * columns;
  fill_image_row(op, ih, buffer, columns, first, last, columns);
  if (!all_moderate(buffer, 3 * columns)) return false;
  // All channels before any is read again: loads across what two stores have just written wait for both.
  for (int64_t c = 0; c < 3; ++c) part_by_eight(buffer + c * columns, t.lanes, parts + c * columns, t.lanes);
  t.runs.for_each([&](int64_t run, int64_t tile, int64_t) FASTCONV_LAMBDA_INLINE {
    for (int64_t plane = 0; plane < STEM_PLANES; ++plane)
      for (int64_t lane = 0; lane < PANEL; lane += W) {
        const int64_t parity = plane % 2;
        const float* const x = parts + plane / 2 * columns + parity * t.lanes + tile + lane;
        vec d[STEM_POINTS], v[STEM_POINTS];
#pragma GCC unroll 7
        for (int i = 0; i < STEM_POINTS; ++i) d[i] = load(x + i % 4 * 2 * t.lanes + i / 4);
        stem_inputs(d, v);
        float* const out = to + (run * STEM_POINTS * STEM_PLANES + plane) * PANEL + lane;
#pragma GCC unroll 7
        for (int p = 0; p < STEM_POINTS; ++p) store(out + p * STEM_PLANES * PANEL, v[p]);
      }
  });
  return true;
}

// Tiles of a run, whose kernel rows stand anywhere; the next plane of sums is the next point's.
template <int MR>
struct StemRun {
  static constexpr bool FETCHES = false;
  static constexpr int DEPTH = STEM_PLANES;
  static constexpr int64_t depth = DEPTH;
  const float* const* rows;
  int64_t segments, first;
  const float* p;
  FASTCONV_INLINE StemRun(const float* const* rows, int64_t segments, int64_t first) : rows(rows), segments(segments), first(first) {}
  FASTCONV_INLINE void enter(int64_t s) { p = rows[s] + first; }
  FASTCONV_INLINE void next() { first += STEM_PLANES * PANEL; }
  FASTCONV_INLINE void again() {}
  FASTCONV_INLINE const float* at(int r, int64_t, int u) const { return p + (u * PANEL + r); }
  FASTCONV_INLINE void advance(int) {}
};

// Four outputs of a row at `out`, or as many as `width` says, of `lanes` channels.
FASTCONV_INLINE void finish_stem_tile(const float* sums, int64_t plane, vec bias, const Clamp& clamp, Activation activation, float* out,
                                      int64_t pixel, int64_t width, int64_t lanes) {
  vec m[STEM_POINTS], y[4];
#pragma GCC unroll 7
  for (int p = 0; p < STEM_POINTS; ++p) m[p] = load(sums + p * plane);
  stem_outputs(m, y);
  if (width >= 4 && lanes >= W && activation <= Activation::relu6) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) store(out + i * pixel, clamp(y[i] + bias));
    return;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    if (i < width) store_up_to(out + i * pixel, activate(y[i] + bias, activation), lanes);
}

// One output row, from transformed rows.
inline void stem_products(const Stem& op, const StemTiles& t, int64_t oh, const float* const* rows, float* sums) {
  const int64_t K = op.kernel_h * STEM_PLANES, panel_stride = STEM_POINTS * K * PANEL;
  const Activation activation = op.epilogue.activation;
  const Clamp clamp(activation);
  for_each_chunk<PREFERRED_NV>(
      {0, panels_for(op.out_channels)}, op.out_channels, false, [&](auto NV, std::false_type, int64_t column, int64_t columns) {
        constexpr int64_t stride = NV * W, plane = STEM_RUN * stride;
        constexpr int MOST = max_rows<NV>() < STEM_RUN ? max_rows<NV>() : STEM_RUN;
        const float* const panels = op.winograd + column / PANEL * panel_stride + column % PANEL;
        Output to{panels, panel_stride, {no_bias, nullptr, 0, Activation::none}, sums, stride, stride};
        to.panel_step = K * PANEL;
        to.out_step = plane;
        t.runs.for_each([&](int64_t run, int64_t tile, int64_t count) {
          Pieces(count, MOST).for_each([&](int64_t, int64_t first, int64_t size) {
            to.out = sums + first * stride;
            with_constant<MOST>(size, [&](auto MR) {
              tiles<MR, NV, false>(StemRun<MR>(rows, op.kernel_h, run * STEM_POINTS * STEM_PLANES * PANEL + first), STEM_POINTS, to);
            });
          });
          for (int64_t i = 0; i < count; ++i)
            for (int v = 0; v < NV && v * W < columns; ++v)
              finish_stem_tile(sums + i * stride + v * W, plane, load_up_to(op.epilogue.bias + column + v * W, columns - v * W), clamp,
                               activation, op.out + op.out_strides.at(oh * op.out_width + 4 * (tile + i), column + v * W),
                               op.out_strides.pixel, op.out_width - 4 * (tile + i), columns - v * W);
        });
      });
}

// Rows [rows.begin, rows.end) of the output. ring.data: stem_ring_floats floats; scratch: op.scratch_floats().
inline void stem_winograd(const Stem& op, Range rows, StemRing& ring, float* scratch) {
  const StemTiles t(op);
  float* const buffer = ring.data + StemRing::SLOTS * t.row_floats();
  float* const sums = buffer + t.buffer_floats();
  for (int64_t oh = rows.begin; oh < rows.end; ++oh) {
    const int64_t first = oh * op.stride_h - op.pad_h, last = first + op.kernel_h;
    ring.seek(op.x, first);
    for (; ring.next < last; ++ring.next) {
      const int64_t slot = ring.slot(ring.next);
      ring.moderate[slot] = transform_stem_row(op, t, ring.next, buffer, ring.data + slot * t.row_floats());
    }
    NewRows(op, oh + 1).fetch();
    bool moderate = true;
    const float* table[StemRing::SLOTS];
    for (int64_t ih = first; ih < last; ++ih) {
      moderate &= ring.moderate[ring.slot(ih)];
      table[ih - first] = ring.data + ring.slot(ih) * t.row_floats();
    }
    if (moderate)
      stem_products(op, t, oh, table, sums);
    else
      stem(op, {oh, oh + 1}, scratch);
  }
}

}  // namespace fastconv::FASTCONV_ISA
