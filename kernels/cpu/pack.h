// Weights in the micro-kernels' order. The formats do not depend on the ISA, so packed weights survive pickling and a change of ISA.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/cpu/kernels.h"

namespace fastconv {

// The last 1 to 8 output channels of a 1x1 convolution, (n0..n0+7) x (k, k+1) interleaved: lane 2j + i of pair k / 2 is w[n0 + j, k + i].
// One broadcast of two inputs then fills a whole vector, where half of it would multiply zeros.
inline void pack_paired(const float* weight, int64_t channels, int64_t in_channels, float* panel) {
  for (int64_t k = 0; k < in_channels; k += 2)
    for (int64_t j = 0; j < PAIRED; ++j)
      for (int64_t i = 0; i < 2; ++i) *panel++ = j < channels && k + i < in_channels ? weight[j * in_channels + k + i] : 0.0f;
}

// (Cout, Cin, KH, KW) -> panels (ceil(Cout / 16), KH * KW * Cin, 16), zeros beyond Cout.
inline void pack_panels(const float* weight, int64_t out_channels, int64_t in_channels, int64_t taps, float* panels) {
  for (int64_t g = 0; g < panels_for(out_channels); ++g) {
    const int64_t first = g * PANEL;
    if (taps == 1 && out_channels - first <= PAIRED) {
      std::memset(panels, 0, in_channels * PANEL * sizeof(float));
      pack_paired(weight + first * in_channels, out_channels - first, in_channels, panels);
      return;
    }
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t c = 0; c < in_channels; ++c)
        for (int64_t j = 0; j < PANEL; ++j) {
          const int64_t n = first + j;
          *panels++ = n < out_channels ? weight[(n * in_channels + c) * taps + tap] : 0.0f;
        }
  }
}

// (Cout, Cin, 3, 3) -> panels (ceil(Cout / 16), 36 * Cin, 16) of G g G^T for Winograd F(4x4, 3x3), in double until the last rounding.
inline void pack_winograd(const float* weight, int64_t out_channels, int64_t in_channels, float* panels) {
  constexpr double G[6][3] = {{1.0 / 4, 0, 0},
                              {-1.0 / 6, -1.0 / 6, -1.0 / 6},
                              {-1.0 / 6, 1.0 / 6, -1.0 / 6},
                              {1.0 / 24, 1.0 / 12, 1.0 / 6},
                              {1.0 / 24, -1.0 / 12, 1.0 / 6},
                              {0, 0, 1}};
  std::memset(panels, 0, panels_for(out_channels) * 36 * in_channels * PANEL * sizeof(float));
  for (int64_t n = 0; n < out_channels; ++n)
    for (int64_t c = 0; c < in_channels; ++c) {
      const float* g = weight + (n * in_channels + c) * 9;
      for (int64_t i = 0; i < 6; ++i)
        for (int64_t j = 0; j < 6; ++j) {
          double sum = 0;
          for (int64_t a = 0; a < 3; ++a)
            for (int64_t b = 0; b < 3; ++b) sum += G[i][a] * static_cast<double>(g[a * 3 + b]) * G[j][b];
          panels[((n / PANEL * 36 + i * 6 + j) * in_channels + c) * PANEL + n % PANEL] = static_cast<float>(sum);
        }
    }
}

// (C, 1, K, K) -> taps (K * K, C).
inline void pack_taps(const float* weight, int64_t channels, int64_t taps, float* packed) {
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t c = 0; c < channels; ++c) *packed++ = weight[c * taps + tap];
}

}  // namespace fastconv
