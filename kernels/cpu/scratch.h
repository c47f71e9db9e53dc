// Per-thread buffers that grow to the largest need seen and stay: no allocation in steady state.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace fastconv {

class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  float* floats(int64_t count) {
#ifdef FASTCONV_EXACT_SCRATCH  // for sanitizers: never more than was asked for
    const bool fits = count == capacity_;
#else
    const bool fits = count <= capacity_;
#endif
    if (!fits) {
      std::free(data_);
      data_ = nullptr;
      capacity_ = 0;
      void* block;
      if (posix_memalign(&block, 64, count * sizeof(float)) != 0) throw std::bad_alloc();
      data_ = static_cast<float*>(block);
      capacity_ = count;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t capacity_ = 0;
};

// For what a thread uses alone, for what the calling thread shares with its team, and for transformed tiles or a stem's rows beside either.
inline thread_local Scratch private_scratch, shared_scratch, tile_scratch;
inline thread_local Scratch strassen_scratch;             // pairs of pixels, transformed
inline thread_local Scratch digit_scratch, band_scratch;  // pixels as digits, of one product and of a band of rows
inline thread_local Scratch unpack_scratch;               // plain weights made of digits
inline thread_local Scratch stem_scratch;                 // its transformed rows, from call to call
// The rings of blocks whose rows are made on demand, by level, and images between steps that had to be made whole after all.
constexpr int MAX_LEVELS = 8;
inline thread_local Scratch ring_scratch[MAX_LEVELS], step_scratch[MAX_LEVELS + 1];

}  // namespace fastconv
