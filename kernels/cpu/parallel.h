// How the core runs things in parallel without knowing torch: the binding supplies the loop.
#pragma once

#include <cstdint>

#include "kernels/cpu/kernels.h"

namespace fastconv {

struct Parallel {
  int64_t threads;
  void (*loop)(int64_t count, void (*body)(const void* context, int64_t begin, int64_t end), const void* context);

  // Calls f(begin, end) over disjoint ranges that cover [0, count); not at all when there is nothing to do.
  template <class F>
  void over(int64_t count, const F& f) const {
    if (count == 0) return;
    loop(count, [](const void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); }, &f);
  }

  // Calls f(range) once per piece of `count` things, at most one piece a thread, as equal as can be.
  template <class F>
  void split(int64_t count, const F& f) const {
    const int64_t pieces = count < threads ? count : threads;
    over(pieces, [&](int64_t begin, int64_t end) { f(Range{begin * count / pieces, end * count / pieces}); });
  }
};

}  // namespace fastconv
