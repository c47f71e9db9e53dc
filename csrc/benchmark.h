#pragma once

#include <cstdint>

namespace fastconv {

// GFLOP/s of fused multiply-adds alone on the active ISA, one thread: the roof of every product kernel.
double fma_gflops();

// Best GFLOP/s of the pointwise kernel on pixels x in_channels -> out_channels within `budget` seconds, one thread, weights packed before.
double pointwise_gflops(int64_t pixels, int64_t in_channels, int64_t out_channels, double budget);

}  // namespace fastconv
