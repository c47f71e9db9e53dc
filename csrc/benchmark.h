#pragma once

#include <cstdint>
#include <string>

namespace fastconv {

// GFLOP/s of fused multiply-adds alone on the active ISA, one thread: the roof of every product kernel.
double fma_gflops();

// GB/s of one thread streaming over a working set of `bytes`, read or copied (bytes read and written both count), best of many runs
// within `budget` seconds. Throws std::invalid_argument on another kind or fewer than 4096 bytes.
double bandwidth_gbs(int64_t bytes, const std::string& kind, double budget);

// Best GFLOP/s of the pointwise kernel on pixels x in_channels -> out_channels within `budget` seconds, one thread, weights packed before.
double pointwise_gflops(int64_t pixels, int64_t in_channels, int64_t out_channels, double budget);

}  // namespace fastconv
