// Timing loops for benchmarks/: one thread, no Python, no allocation inside the timed part.
#include "csrc/benchmark.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <stdexcept>

#include "kernels/cpu/isa.h"

namespace fastconv {

namespace {

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float, Free>;

Buffer filled(int64_t count) {
  Buffer buffer(static_cast<float*>(std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64)));
  for (int64_t i = 0; i < count; ++i) buffer.get()[i] = 0.01f * static_cast<float>(i % 13);
  return buffer;
}

}  // namespace

double fma_gflops() {
  float sink[3] = {0.999f, 0.001f, 0.0f};
  double best = 0;
  for (int run = 0; run < 50; ++run) {  // short runs: a neighbour on the machine spoils some, not all
    const double start = seconds();
    const double operations = kernels().fma_chains(20000, sink);
    best = std::max(best, operations / (seconds() - start) / 1e9);
  }
  return best;
}

double bandwidth_gbs(int64_t bytes, const std::string& kind, double budget) {
  const bool copy = kind == "copy";
  if (!copy && kind != "read") throw std::invalid_argument("bandwidth_gbs: kind must be 'read' or 'copy', got '" + kind + "'");
  if (bytes < 4096) throw std::invalid_argument("bandwidth_gbs: bytes must be at least 4096, got " + std::to_string(bytes));
  const int64_t count =
      bytes / 512 * 128 / (copy ? 2 : 1) / 128 * 128;  // whole unrolled steps on every ISA; a copy has two streams in the set
  const Buffer x = filled(count), out = filled(copy ? count : 128);
  float sink[3] = {};
  const double moved = static_cast<double>(count) * sizeof(float) * (copy ? 2 : 1);
  const int64_t repeats = std::max<int64_t>(1, static_cast<int64_t>(2e6 / moved));
  double best = 0;
  for (const double end = seconds() + budget; seconds() < end;) {
    const double start = seconds();
    for (int64_t i = 0; i < repeats; ++i)
      if (copy)
        kernels().copy_stream(x.get(), count, out.get());
      else
        kernels().read_stream(x.get(), count, sink);
    best = std::max(best, moved * static_cast<double>(repeats) / (seconds() - start) / 1e9);
  }
  return best;
}

double pointwise_gflops(int64_t pixels, int64_t in_channels, int64_t out_channels, double budget) {
  const Buffer x = filled(pixels * in_channels), panels = filled(panels_for(out_channels) * PANEL * in_channels),
               bias = filled(out_channels), out = filled(pixels * out_channels);
  const Pointwise op{x.get(),   in_channels, in_channels, out_channels, panels.get(), {bias.get(), nullptr, 0, Activation::relu6},
                     out.get(), out_channels};
  const double operations = 2.0 * static_cast<double>(pixels) * static_cast<double>(in_channels) * static_cast<double>(out_channels);
  const Range all{0, pixels}, every{0, panels_for(out_channels)};
  kernels().pointwise(op, all, every);
  const int64_t repeats = std::max<int64_t>(1, static_cast<int64_t>(1e7 / operations));
  double best = 0;
  for (const double end = seconds() + budget; seconds() < end;) {
    const double start = seconds();
    for (int64_t i = 0; i < repeats; ++i) kernels().pointwise(op, all, every);
    best = std::max(best, operations * static_cast<double>(repeats) / (seconds() - start) / 1e9);
  }
  return best;
}

}  // namespace fastconv
