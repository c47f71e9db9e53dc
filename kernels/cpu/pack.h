// Weights in the micro-kernels' order. The formats do not depend on the ISA, so packed weights survive pickling and a change of ISA.
#pragma once

#include <cstdint>

#include "kernels/cpu/kernels.h"

namespace fastconv {

// (Cout, Cin, KH, KW) -> panels (ceil(Cout / 16), KH * KW * Cin, 16), zeros beyond Cout.
inline void pack_panels(const float* weight, int64_t out_channels, int64_t in_channels, int64_t taps, float* panels) {
  for (int64_t g = 0; g < panels_for(out_channels); ++g)
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t c = 0; c < in_channels; ++c)
        for (int64_t j = 0; j < PANEL; ++j) {
          const int64_t n = g * PANEL + j;
          *panels++ = n < out_channels ? weight[(n * in_channels + c) * taps + tap] : 0.0f;
        }
}

// (C, 1, K, K) -> taps (K * K, C).
inline void pack_taps(const float* weight, int64_t channels, int64_t taps, float* packed) {
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t c = 0; c < channels; ++c) *packed++ = weight[c * taps + tap];
}

}  // namespace fastconv
