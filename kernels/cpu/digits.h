// Pointwise convolution on a matrix unit that multiplies signed bytes (AMX), with the accuracy of fp32. Included per ISA.
//
// Source: K. Ozaki, T. Ogita, S. Oishi, S. Rump, Error-free transformations of matrix multiplication by using fast routines of matrix
// multiplication and its applications, Numerical Algorithms 59 (2012); on integer units H. Ootomo, K. Ozaki, R. Yokota, DGEMM on Integer
// Matrix Multiplication Unit, arXiv:2306.11975. A pixel's inputs, scaled by one power of two, are integers of 24 bits, as are an output's
// weights: three digits to base 256 each, from -128 to 127. Products of digits are summed as integers, exactly, those of one weight
// together: sums of 256^4 (1 product), 256^3 (2), 256^2 (3) and 256 (2); the product of the lowest digits is left out. A core's unit makes
// 1024 products a cycle where its vector units make 32 multiply-adds, so eight products for one are four times as fast.
//
// What is lost is 2^-24 of the pixel's largest input, and of the output's largest weight. Pixels whose largest input is huge, tiny or no
// number are marked and left to the caller.
#pragma once

#include "kernels/cpu/epilogue.h"
#include "kernels/cpu/matrix_unit.h"

namespace fastconv::FASTCONV_ISA {

// Of two vectors of integers of three digits: 32 lowest ones and 32 middle ones; 32 highest ones, twice.
struct Bytes {
  __m512i low_and_middle, high;
};
FASTCONV_INLINE Bytes byte_places() {
  alignas(64) int8_t low_and_middle[64], high[64];
#pragma GCC unroll 64
  for (int i = 0; i < 32; ++i) {
    low_and_middle[i] = static_cast<int8_t>(4 * i);
    low_and_middle[32 + i] = static_cast<int8_t>(4 * i + 1);
    high[i] = high[32 + i] = static_cast<int8_t>(4 * i + 2);
  }
  return {_mm512_load_si512(low_and_middle), _mm512_load_si512(high)};
}

// ROWS pixels of one tile. `to`: of the first one's first digits.
template <int ROWS>
FASTCONV_INLINE void split_rows(const float* x, Strides strides, int64_t in_channels, float* to, float* scales, char* extraordinary) {
  constexpr int64_t CHUNK = DigitWeights::CHUNK, TILE = DigitWeights::TILE;
  constexpr uint32_t TINY = (127 - 80) << 23, HUGE = (127 + 100) << 23;
  const int64_t blocks = in_channels / PANEL;
  const __mmask16 last = in_channels % PANEL ? first(static_cast<int>(in_channels % PANEL)) : 0;
  const __m512i bits = _mm512_set1_epi32(0x7fffffff);
  __m512i largest[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) largest[r] = __m512i{};
  const float* from = x;
  const auto compare = [&](__mmask16 lanes) FASTCONV_LAMBDA_INLINE {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const __m512i v = _mm512_castps_si512(_mm512_maskz_loadu_ps(lanes, from + r * strides.pixel));
      largest[r] = _mm512_max_epu32(largest[r], _mm512_and_si512(v, bits));
    }
  };
  for (int64_t b = 0; b < blocks; ++b, from += strides.block) compare(0xffff);
  if (last) compare(last);

  __m512 scale[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    const uint32_t most = _mm512_reduce_max_epu32(largest[r]);
    const bool ordinary = most >= TINY && most < HUGE;
    // The exponent of the largest power of two that keeps the largest input within 0x7f7f7f.
    const uint32_t exponent = 127 + 22 + 127 - ((most + 0x10101) >> 23);
    const uint32_t up = ordinary ? exponent << 23 : 0, down = ordinary ? (254 + DigitWeights::UNITS - exponent) << 23 : 0;
    scale[r] = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(up)));
    std::memcpy(scales + r, &down, sizeof down);
    extraordinary[r] = !ordinary && most != 0;
  }

  const Bytes places = byte_places();
  const __m512i carries = _mm512_set1_epi32(0x8080), sign = _mm512_set1_epi8(static_cast<char>(0x80));
  from = x;
  const auto chunk = [&](const auto& mask) FASTCONV_LAMBDA_INLINE {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      __m512i v[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512 part = _mm512_maskz_loadu_ps(mask(i), from + r * strides.pixel + i * strides.block);
        v[i] = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(part, scale[r])), carries);
      }
      const __m512i a = _mm512_permutex2var_epi8(v[0], places.low_and_middle, v[1]),
                    b = _mm512_permutex2var_epi8(v[2], places.low_and_middle, v[3]), c = _mm512_permutex2var_epi8(v[0], places.high, v[1]),
                    d = _mm512_permutex2var_epi8(v[2], places.high, v[3]);
      float* const digits = to + r * PANEL;
      _mm512_store_si512(digits, _mm512_mask_blend_epi64(0xf0, c, d));
      _mm512_store_si512(digits + TILE, _mm512_xor_si512(_mm512_shuffle_i64x2(a, b, 0xee), sign));
      _mm512_store_si512(digits + 2 * TILE, _mm512_xor_si512(_mm512_shuffle_i64x2(a, b, 0x44), sign));
    }
    from += 4 * strides.block;
    to += DigitWeights::DIGITS * TILE;
  };
  int64_t left = in_channels;
  for (; left >= CHUNK; left -= CHUNK) chunk([](int) { return static_cast<__mmask16>(0xffff); });
  if (left > 0)
    chunk([&](int i) {
      const int64_t lanes = left - i * PANEL;
      return lanes >= PANEL ? static_cast<__mmask16>(0xffff) : lanes > 0 ? first(static_cast<int>(lanes)) : static_cast<__mmask16>(0);
    });
}

inline void digits_split(const Pointwise& op, Range pixels, const DigitPixels& to) {
  constexpr int64_t AT_ONCE = 4;
  for (int64_t p = 0; p < pixels.size();) {
    const float* x = op.x + (pixels.begin + p) * op.x_strides.pixel;
    float* digits = to.tile(p / DigitPixels::ROWS) + p % DigitPixels::ROWS * PANEL;
    float* scales = to.scales() + p;
    char* extraordinary = to.extraordinary() + p;
    if (pixels.size() - p >= AT_ONCE) {
      split_rows<AT_ONCE>(x, op.x_strides, op.in_channels, digits, scales, extraordinary);
      p += AT_ONCE;
    } else {
      split_rows<1>(x, op.x_strides, op.in_channels, digits, scales, extraordinary);
      ++p;
    }
  }
}

// What is fetched into L2 meanwhile, a share for every chunk of a tile's depth: the next panel, and what the thread's stream says.
struct DigitAhead {
  Fetch ranges[2] = {};
  int64_t floats_a_chunk[2] = {};
  FASTCONV_INLINE void set(int i, Fetch range, int64_t chunks) {
    ranges[i] = range;
    floats_a_chunk[i] = ceil_div(range.size(), chunks * PANEL) * PANEL;
  }
  FASTCONV_INLINE void fetch() {
    for (int i = 0; i < 2; ++i) {
      Fetch& range = ranges[i];
      if (range.begin >= range.end) continue;
      for (int64_t at = 0; at < floats_a_chunk[i]; at += PANEL) __builtin_prefetch(range.begin + at, 0, 2);
      range.begin += floats_a_chunk[i];
    }
  }
};

constexpr int ORDERS = 4;  // of sums: products of digits i and j belong to sum i + j

// The sums of a tile of pixels by a panel, to `sums`, (ORDERS, 16 pixels, 16 outputs). `between`: 16 pieces of other work, piece by number,
// one after every product (two, where there is one chunk): the front end waits for tile registers, and what stands behind a tile's products
// enters too late to run beside them. 64 inputs then take 187 cycles where products (114) and finishing (75) in turn took 265.
template <class Between>
FASTCONV_INLINE void multiply_digits(const float* pixels, const float* weights, int64_t chunks, DigitAhead& ahead, float* sums,
                                     const Between& between) {
  constexpr int64_t TILE = DigitWeights::TILE;
  clear_tile<0>();
  clear_tile<1>();
  clear_tile<2>();
  if constexpr (ORDERS > 3) clear_tile<3>();
  const auto multiply_chunk = [&](const auto& after) FASTCONV_LAMBDA_INLINE {
    load_tile<4>(pixels);
    load_tile<7>(weights);
    multiply_tiles<0, 4, 7>();
    after(0);
    load_tile<5>(pixels + TILE);
    multiply_tiles<1, 5, 7>();
    after(1);
    load_tile<6>(pixels + 2 * TILE);
    multiply_tiles<2, 6, 7>();
    after(2);
    ahead.fetch();
    load_tile<7>(weights + TILE);
    multiply_tiles<1, 4, 7>();
    after(3);
    multiply_tiles<2, 5, 7>();
    after(4);
    if constexpr (ORDERS > 3) multiply_tiles<3, 6, 7>();
    after(5);
    load_tile<7>(weights + 2 * TILE);
    multiply_tiles<2, 4, 7>();
    after(6);
    if constexpr (ORDERS > 3) multiply_tiles<3, 5, 7>();
    after(7);
    pixels += DigitWeights::DIGITS * TILE;
    weights += DigitWeights::DIGITS * TILE;
  };
  if (chunks == 1) {
    multiply_chunk([&](int i) FASTCONV_LAMBDA_INLINE {
      between(2 * i);
      between(2 * i + 1);
    });
  } else {
    multiply_chunk([&](int i) FASTCONV_LAMBDA_INLINE { between(i); });
    multiply_chunk([&](int i) FASTCONV_LAMBDA_INLINE { between(8 + i); });
    for (int64_t chunk = 2; chunk < chunks; ++chunk) multiply_chunk([](int) FASTCONV_LAMBDA_INLINE {});
  }
  store_tile<0>(sums);
  store_tile<1>(sums + TILE);
  store_tile<2>(sums + 2 * TILE);
  if constexpr (ORDERS > 3) store_tile<3>(sums + 3 * TILE);
}

constexpr int64_t STEP_WORK = 14 * 2 * PANEL * 4;  // Kernels::step_work of AVX-512

template <class Activated>
void digits_multiply(const Pointwise& op, Range pixels, Range panels, const DigitPixels& from, const Activated& activated) {
  constexpr int64_t ROWS = DigitPixels::ROWS;
  const DigitWeights weights = op.digits();
  const Epilogue to = op.epilogue;
  const int64_t tiles = from.tiles(), chunks = weights.chunks();
  alignas(64) float sums[2][ORDERS * DigitWeights::TILE];  // of neighbouring tiles: one is multiplied while the other is finished
  const TileConfiguration configured;
  int at = 0;
  // (Of the tile before, each in a register of its own: gcc copies a structure by vectors, which would wait for all products behind them.)
  const float *done = sums[0], *pixel_scales = from.scales(), *residual = nullptr;
  vec scale{}, bias{};
  float* out = op.out;
  int rows = 0, columns = 0;
  const auto finish = [&](int row, auto whole) FASTCONV_LAMBDA_INLINE {
    constexpr bool WHOLE = decltype(whole)::value;
    if (!WHOLE && row >= rows) return;
    const auto order = [&](int i) FASTCONV_LAMBDA_INLINE {
      return static_cast<vec>(_mm512_cvtepi32_ps(_mm512_load_si512(done + i * DigitWeights::TILE + row * PANEL)));
    };
    vec sum = order(2);
    if constexpr (ORDERS > 3) sum += order(3) * 0x1p-8f;
    sum = order(0) + (order(1) + sum * 0x1p-8f) * 0x1p-8f;
    sum = sum * splat(pixel_scales[row]) * scale + bias;
    if (!WHOLE && residual) sum += load_up_to(residual + row * to.residual_strides.pixel, columns);
    float* const y = out + row * op.out_strides.pixel;
    if constexpr (WHOLE)
      store(y, activated(sum));
    else
      store_up_to(y, activated(sum), columns);
  };
  const auto end = [&]() FASTCONV_LAMBDA_INLINE {
    if (in_second_pass(to.activation)) activate_rows(out, op.out_strides, rows, columns, to.activation);
  };
  for (int64_t g = panels.begin; g < panels.end; ++g) {
    DigitAhead ahead;
    if (g + 1 < panels.end) ahead.set(0, {weights.panel(g + 1), weights.panel(g + 2)}, tiles * chunks);
    if (stream && !stream->empty()) ahead.set(1, stream->take(pixels.size() * op.in_channels * PANEL / STEP_WORK), tiles * chunks);
    const int64_t column = g * PANEL, channels = op.out_channels - column;
    for (int64_t t = 0; t < tiles; ++t, at ^= 1) {
      if (rows == ROWS && columns == PANEL && !residual)
        multiply_digits(from.tile(t), weights.panel(g), chunks, ahead, sums[at],
                        [&](int row) FASTCONV_LAMBDA_INLINE { finish(row, std::true_type{}); });
      else
        multiply_digits(from.tile(t), weights.panel(g), chunks, ahead, sums[at],
                        [&](int row) FASTCONV_LAMBDA_INLINE { finish(row, std::false_type{}); });
      end();
      const int64_t pixel = pixels.begin + t * ROWS, left = pixels.end - pixel;
      done = sums[at];
      pixel_scales = from.scales() + t * ROWS;
      rows = static_cast<int>(left < ROWS ? left : ROWS);
      columns = static_cast<int>(channels < PANEL ? channels : PANEL);
      scale = load(weights.scales() + column);
      bias = load_up_to(to.bias + column, columns);
      if (to.residual) residual = to.residual + to.residual_strides.at(pixel, column);
      out = op.out + op.out_strides.at(pixel, column);
    }
  }
  for (int row = 0; row < rows; ++row) finish(row, std::false_type{});
  end();
}

inline void digits_multiply(const Pointwise& op, Range pixels, Range panels, const DigitPixels& from) {
  const Clamp clamp(op.epilogue.activation);
  if (op.epilogue.activation == Activation::hardswish)
    digits_multiply(op, pixels, panels, from, [](vec v) FASTCONV_LAMBDA_INLINE { return activate(v, Activation::hardswish); });
  else if (clamp.bounds())
    digits_multiply(op, pixels, panels, from, [&](vec v) FASTCONV_LAMBDA_INLINE { return clamp(v); });
  else
    digits_multiply(op, pixels, panels, from, [](vec v) FASTCONV_LAMBDA_INLINE { return v; });
}

}  // namespace fastconv::FASTCONV_ISA
