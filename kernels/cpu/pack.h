// Weights in the micro-kernels' order. The formats do not depend on the ISA, so packed weights survive pickling and a change of ISA.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels/cpu/kernels.h"

namespace fastconv {

// The last 1 to 8 output channels of a 1x1 convolution, (n0..n0+7) x (k, k+1) interleaved: lane 2j + i of pair k / 2 is w[n0 + j, k + i].
// One broadcast of two inputs then fills a whole vector, where half of it would multiply zeros.
inline void pack_paired(const float* weight, int64_t channels, int64_t in_channels, float* panel) {
  for (int64_t k = 0; k < in_channels; k += 2)
    for (int64_t j = 0; j < PAIRED; ++j)
      for (int64_t i = 0; i < 2; ++i) *panel++ = j < channels && k + i < in_channels ? weight[j * in_channels + k + i] : 0.0f;
}

// Panel `g` of (Cout, Cin, KH, KW) -> panels (ceil(Cout / 16), KH * KW * Cin, 16), zeros beyond Cout.
inline void pack_panel(const float* weight, int64_t out_channels, int64_t in_channels, int64_t taps, int64_t g, float* panel) {
  const int64_t first = g * PANEL;
  if (taps == 1 && out_channels - first <= PAIRED) {
    std::memset(panel, 0, in_channels * PANEL * sizeof(float));
    return pack_paired(weight + first * in_channels, out_channels - first, in_channels, panel);
  }
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t c = 0; c < in_channels; ++c)
      for (int64_t n = first; n < first + PANEL; ++n) *panel++ = n < out_channels ? weight[(n * in_channels + c) * taps + tap] : 0.0f;
}
inline void pack_panels(const float* weight, int64_t out_channels, int64_t in_channels, int64_t taps, float* panels) {
  for (int64_t g = 0; g < panels_for(out_channels); ++g)
    pack_panel(weight, out_channels, in_channels, taps, g, panels + g * taps * in_channels * PANEL);
}

// (Cout, Cin), Cin a multiple of 32, to StrassenWeights. Its sums of weights, and of inputs, would lose the smaller to the larger's
// rounding, so channels that meet in one are made alike in size: of two inputs the one with the larger weights gives of them to its input,
// outputs are divided by their weights' norm and multiplied by it in the end. All by powers of two, which round nothing.
inline void pack_strassen(const float* weight, int64_t out_channels, int64_t in_channels, float* packed) {
  constexpr int64_t GROUP = StrassenWeights::GROUP;
  const StrassenWeights to{packed, in_channels, out_channels};
  const auto writable = [&](const float* place) { return packed + (place - packed); };
  const auto power = [](double ratio, int most) {
    return std::ldexp(1.0, std::clamp(static_cast<int>(std::lround(std::log2(ratio))), -most, most));
  };
  const int64_t grouped = to.groups() * GROUP;
  std::vector<double> norms(in_channels);  // of the inputs' weights
  for (int64_t n = 0; n < grouped; ++n)
    for (int64_t k = 0; k < in_channels; ++k) norms[k] += static_cast<double>(weight[n * in_channels + k]) * weight[n * in_channels + k];
  float* const inputs = writable(to.input_scales());
  for (int64_t k = 0; k < in_channels; ++k) {
    const double norm = std::sqrt(norms[k]), other = std::sqrt(norms[k ^ PANEL]);
    inputs[k] = norm > other && other > 0 ? static_cast<float>(power(norm / other, 20)) : 1.0f;
  }
  for (int64_t g = 0; g < to.groups(); ++g) {
    const float* const rows = weight + g * GROUP * in_channels;
    float *const scales = writable(to.group(g)), *const products = writable(to.products(g));
    double divisors[GROUP];
    for (int64_t n = 0; n < GROUP; ++n) {
      double sum = 0;
      for (int64_t k = 0; k < in_channels; ++k) {
        const double w = rows[n * in_channels + k] / inputs[k];
        sum += w * w;
      }
      divisors[n] = sum > 0 ? power(std::sqrt(sum), 40) : 1;
      scales[n] = sum > 0 ? static_cast<float>(divisors[n]) : 0.0f;  // no weights: the bias alone
    }
    const int64_t product = in_channels / 2 * PANEL;
    for (int64_t i = 0; i < in_channels / 2; ++i) {
      const int64_t upper = i / PANEL * GROUP + i % PANEL, lower = upper + PANEL;  // inputs of B's upper and lower half
      for (int64_t j = 0; j < PANEL; ++j) {
        const auto b = [&](int64_t k, int64_t n) { return rows[n * in_channels + k] / inputs[k] / divisors[n]; };
        const double b11 = b(upper, j), b12 = b(upper, j + PANEL), b21 = b(lower, j), b22 = b(lower, j + PANEL), t1 = b12 - b11,
                     t2 = b22 - t1;
        const double factors[7] = {t1, t2, b11, b21, b22, b22 - b12, b21 - t2};  // those that pixels alone take side by side
        for (int64_t f = 0; f < 7; ++f) products[f * product + i * PANEL + j] = static_cast<float>(factors[f]);
      }
    }
  }
  pack_panels(weight + grouped * in_channels, out_channels - grouped, in_channels, 1, writable(to.rest()));
}

// The mean square of weights (Cout, Cin) that are not 0, each a part of its output's largest one; 0 where there are none, or not all
// finite.
inline double relative_power(const float* weight, int64_t out_channels, int64_t in_channels) {
  double sum = 0;
  int64_t count = 0;
  for (int64_t n = 0; n < out_channels; ++n) {
    double largest = 0, squares = 0;
    for (int64_t k = 0; k < in_channels; ++k) {
      const double w = weight[n * in_channels + k];
      if (!std::isfinite(w)) return 0;
      largest = std::max(largest, std::fabs(w));
      squares += w * w;
      count += w != 0;
    }
    if (largest > 0) sum += squares / (largest * largest);
  }
  return count ? sum / static_cast<double>(count) : 0;
}

// (Cout, Cin), all finite, to DigitWeights. An output's weights are scaled by a power of two to integers of 24 bits, whose digits are to
// base 256.
inline void pack_digits(const float* weight, int64_t out_channels, int64_t in_channels, float* packed) {
  constexpr int64_t CHUNK = DigitWeights::CHUNK, TILE = DigitWeights::TILE, DIGITS = DigitWeights::DIGITS;
  constexpr double MOST = 0x7f7f7f;  // of three digits, each from -128 to 127
  const DigitWeights to{packed, in_channels, out_channels};
  std::memset(packed, 0, to.floats() * sizeof(float));
  const int32_t inputs = static_cast<int32_t>(in_channels);
  std::memcpy(packed, &inputs, sizeof inputs);
  for (int64_t n = 0; n < out_channels; ++n) {
    double largest = 0;
    for (int64_t k = 0; k < in_channels; ++k) largest = std::max(largest, std::fabs(static_cast<double>(weight[n * in_channels + k])));
    int exponent = largest > 0 ? 22 - std::ilogb(largest) : 0;
    if (std::ldexp(largest, exponent) > MOST) --exponent;
    packed[to.scales() + n - packed] = static_cast<float>(std::ldexp(1.0, DigitWeights::UNITS - exponent));
    for (int64_t k = 0; k < in_channels; ++k) {
      int64_t rest = std::llrint(std::ldexp(static_cast<double>(weight[n * in_channels + k]), exponent));
      const int64_t i = k % CHUNK;
      const float* const word = to.panel(n / PANEL) + k / CHUNK * DIGITS * TILE + i / 4 * PANEL + n % PANEL;
      for (int64_t digit = DIGITS; digit-- > 0;) {
        const int8_t lowest = static_cast<int8_t>(rest & 0xff);
        std::memcpy(reinterpret_cast<char*>(packed + (word + digit * TILE - packed)) + i % 4, &lowest, 1);
        rest = (rest - lowest) / 256;
      }
    }
  }
}

// Panel `g` of them as pack_panel makes it, of the weights that the digits stand for. `rows`: memory for in_channels * 16 floats.
inline void unpack_digits_panel(const DigitWeights& from, int64_t g, float* rows, float* panel) {
  constexpr int64_t CHUNK = DigitWeights::CHUNK, TILE = DigitWeights::TILE, DIGITS = DigitWeights::DIGITS;
  const int64_t channels = std::min(PANEL, from.out_channels - g * PANEL);
  for (int64_t n = 0; n < channels; ++n)
    for (int64_t k = 0; k < from.in_channels; ++k) {
      const int64_t i = k % CHUNK;
      const float* const word = from.panel(g) + k / CHUNK * DIGITS * TILE + i / 4 * PANEL + n;
      int32_t sum = 0;
      for (int64_t digit = 0; digit < DIGITS; ++digit) {
        int8_t value;
        std::memcpy(&value, reinterpret_cast<const char*>(word + digit * TILE) + i % 4, 1);
        sum = sum * 256 + value;
      }
      rows[n * from.in_channels + k] =
          static_cast<float>(std::ldexp(static_cast<double>(sum) * from.scales()[g * PANEL + n], -DigitWeights::UNITS));
    }
  pack_panel(rows, channels, from.in_channels, 1, 0, panel);
}

// Panel `g` of (Cout, Cin, 3, 3) -> panels (ceil(Cout / 16), 36 * Cin, 16) of G w G^T for Winograd F(4x4, 3x3), in double until the last
// rounding: first along the columns, then along the rows, 16 output channels at a time.
inline void pack_winograd_panel(const float* weight, int64_t out_channels, int64_t in_channels, int64_t g, float* panel) {
  constexpr double G[6][3] = {{1.0 / 4, 0, 0},
                              {-1.0 / 6, -1.0 / 6, -1.0 / 6},
                              {-1.0 / 6, 1.0 / 6, -1.0 / 6},
                              {1.0 / 24, 1.0 / 12, 1.0 / 6},
                              {1.0 / 24, -1.0 / 12, 1.0 / 6},
                              {0, 0, 1}};
  for (int64_t c = 0; c < in_channels; ++c) {
    double w[9][PANEL] = {}, columns[3][6][PANEL];
    for (int64_t j = 0; j < PANEL && g * PANEL + j < out_channels; ++j)
      for (int64_t tap = 0; tap < 9; ++tap) w[tap][j] = weight[((g * PANEL + j) * in_channels + c) * 9 + tap];
    for (int64_t a = 0; a < 3; ++a)
      for (int64_t i = 0; i < 6; ++i)
        for (int64_t j = 0; j < PANEL; ++j)
          columns[a][i][j] = G[i][0] * w[a * 3][j] + G[i][1] * w[a * 3 + 1][j] + G[i][2] * w[a * 3 + 2][j];
    for (int64_t k = 0; k < 6; ++k)
      for (int64_t i = 0; i < 6; ++i)
        for (int64_t j = 0; j < PANEL; ++j)
          panel[((k * 6 + i) * in_channels + c) * PANEL + j] =
              static_cast<float>(G[k][0] * columns[0][i][j] + G[k][1] * columns[1][i][j] + G[k][2] * columns[2][i][j]);
  }
}
inline void pack_winograd(const float* weight, int64_t out_channels, int64_t in_channels, float* panels) {
  for (int64_t g = 0; g < panels_for(out_channels); ++g)
    pack_winograd_panel(weight, out_channels, in_channels, g, panels + g * 36 * in_channels * PANEL);
}

// (Cout, 3, KH, 7) -> panels (ceil(Cout / 16), 7 * KH * 6, 16) of G g for a stem's Winograd F(4, 4): (point, kh, channel, parity of kw), in
// double until the last rounding.
inline void pack_stem_winograd(const float* weight, int64_t out_channels, int64_t kernel_h, float* panels) {
  constexpr double G[STEM_POINTS][4] = {{1.0 / 4, 0, 0, 0},
                                        {1.0 / 18, 1.0 / 18, 1.0 / 18, 1.0 / 18},
                                        {1.0 / 6, -1.0 / 6, 1.0 / 6, -1.0 / 6},
                                        {1.0 / 120, 1.0 / 60, 1.0 / 30, 1.0 / 15},
                                        {1.0 / 72, -1.0 / 36, 1.0 / 18, -1.0 / 9},
                                        {32.0 / 45, -16.0 / 45, 8.0 / 45, -4.0 / 45},
                                        {0, 0, 0, 1.0 / 2}};
  for (int64_t g = 0; g < panels_for(out_channels); ++g)
    for (const auto& point : G)
      for (int64_t kh = 0; kh < kernel_h; ++kh)
        for (int64_t c = 0; c < 3; ++c)
          for (int64_t parity = 0; parity < 2; ++parity)
            for (int64_t n = g * PANEL; n < (g + 1) * PANEL; ++n) {
              double sum = 0;
              for (int64_t i = 0; n < out_channels && i < 4 - parity; ++i)
                sum += point[i] * weight[((n * 3 + c) * kernel_h + kh) * 7 + 2 * i + parity];
              *panels++ = static_cast<float>(sum);
            }
}

// (C, 1, K, K) -> taps (K * K, C).
inline void pack_taps(const float* weight, int64_t channels, int64_t taps, float* packed) {
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t c = 0; c < channels; ++c) *packed++ = weight[c * taps + tap];
}

}  // namespace fastconv
