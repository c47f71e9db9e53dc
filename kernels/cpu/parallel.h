// How the core runs things in parallel without knowing torch: a team of threads that the binding brings together once, for one operator
// or a whole network, and that shares the loops of its leader.
//
// A loop's pieces are dealt out as one run of neighbours a thread, the same from loop to loop, so that a thread finds in its caches what
// it wrote before; who is done takes pieces from the far end of another's run. A core that a neighbour slows down thus costs its speed,
// not a wait: with fixed halves, MobileNet V3-L took 5.8 ms on two threads and 6.2 ms on one while a neighbour was busy.
// No thread waits for one that has not arrived: a leader alone does all pieces itself.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "kernels/cpu/kernels.h"

namespace fastconv {

inline void spin_hint() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The calling thread's floating-point mode. torch.set_flush_denormal sets the caller's alone; for the same bits on any number of threads a
// team computes as its leader does.
struct FloatMode {
#if defined(__x86_64__)
  static constexpr uint32_t STATUS = 0x3f;  // sticky exceptions
  uint32_t bits = __builtin_ia32_stmxcsr() & ~STATUS;
  void set() const { __builtin_ia32_ldmxcsr(bits); }
#elif defined(__aarch64__)
  uint64_t bits;
  FloatMode() { asm volatile("mrs %0, fpcr" : "=r"(bits)); }
  void set() const { asm volatile("msr fpcr, %0" : : "r"(bits)); }
#else
  void set() const {}
#endif
};

// While it lives, the calling thread's products fetch from this stream.
class Fetching {
 public:
  explicit Fetching(Stream& from) : before_(stream) { stream = &from; }
  ~Fetching() { stream = before_; }
  Fetching(const Fetching&) = delete;
  Fetching& operator=(const Fetching&) = delete;

 private:
  Stream* const before_;
};

class Team {
 public:
  using Body = void (*)(const void* context, int64_t piece, int64_t worker);

  explicit Team(int64_t threads) : threads_(threads), mode_(), shares_(new Share[threads]) {}

  int64_t threads() const { return threads_; }

  // Every other thread of the team, until finish().
  void help(int64_t worker) {
    const FloatMode own;
    mode_.set();
    follow(worker);
    own.set();
  }

  // The leader's, worker 0: returns when every piece has run. Throws what a piece threw.
  void run(int64_t pieces, Body body, const void* context) {
    for (int64_t t = 0; t < threads_; ++t) {
      const int64_t begin = t * pieces / threads_, end = (t + 1) * pieces / threads_;
      shares_[t].begin.store(begin, std::memory_order_relaxed);
      shares_[t].end.store(end, std::memory_order_relaxed);
      shares_[t].left.store(end - begin, std::memory_order_relaxed);
    }
    body_ = body;
    context_ = context;
    const uint64_t loop = loop_.load(std::memory_order_relaxed);
    loop_.store(loop + 1);  // open
    claim(0);
    loop_.store(loop + 2);  // closed: who has not counted itself in stays out
    for (int spins = 0; active_.load() != 0;)
      if (++spins < SPINS)
        spin_hint();
      else
        std::this_thread::yield();
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

  void finish() { loop_.store(FINISHED); }

  // The leader's to fill between two loops.
  Stream& stream_of(int64_t worker) { return shares_[worker].stream; }

 private:
  static constexpr int SPINS = 20000;  // about 0.3 ms
  static constexpr uint64_t FINISHED = ~uint64_t{0} - 1;

  struct alignas(64) Share {
    std::atomic<int64_t> left{0}, begin{0}, end{0};
    Stream stream;
  };

  void follow(int64_t worker) {
    uint64_t done = 0;
    for (int spins = 0;;) {
      const uint64_t loop = loop_.load(std::memory_order_acquire);
      if (loop == FINISHED) return;
      if (loop % 2 == 0 || loop == done) {
        if (++spins < SPINS)
          spin_hint();
        else
          std::this_thread::yield();  // more threads than cores: the leader may be waiting for this one's
        continue;
      }
      spins = 0;
      active_.fetch_add(1);
      if (loop_.load() == loop) claim(worker);
      active_.fetch_sub(1);
      done = loop;
    }
  }

  void claim(int64_t worker) {
    try {
      Share& own = shares_[worker];
      const Fetching fetching(own.stream);
      while (own.left.fetch_sub(1) > 0) body_(context_, own.begin.fetch_add(1), worker);
      for (int64_t i = 1; i < threads_; ++i) {
        Share& other = shares_[(worker + i) % threads_];
        while (other.left.load(std::memory_order_relaxed) > 0 && other.left.fetch_sub(1) > 0)
          body_(context_, other.end.fetch_sub(1) - 1, worker);
      }
    } catch (...) {  // the pieces that are left go to the others
      const std::lock_guard<std::mutex> lock(failing_);
      failure_ = std::current_exception();
    }
  }

  const int64_t threads_;
  const FloatMode mode_;  // of who makes the team, its leader
  const std::unique_ptr<Share[]> shares_;
  alignas(64) std::atomic<uint64_t> loop_{0};  // odd while a loop is open
  alignas(64) std::atomic<int64_t> active_{0};
  Body body_ = nullptr;
  const void* context_ = nullptr;
  std::mutex failing_;
  std::exception_ptr failure_;
};

// What a kernel splits its work with. Without a team everything runs on the caller, in one piece.
struct Parallel {
  Team* team = nullptr;

  int64_t threads() const { return team ? team->threads() : 1; }

  // Calls f(range, worker) for pieces of [0, count) that together are all of it. Workers count from 0 to threads() - 1.
  template <class F>
  void pieces(int64_t count, int64_t number, const F& f) const {
    if (count <= 0) return;
    if (!team || number <= 1) return f(Range{0, count}, int64_t{0});
    struct Loop {
      int64_t count, number;
      const F& f;
    } const loop{count, number, f};
    team->run(
        number,
        [](const void* context, int64_t piece, int64_t worker) {
          const Loop& loop = *static_cast<const Loop*>(context);
          loop.f(Range{piece * loop.count / loop.number, (piece + 1) * loop.count / loop.number}, worker);
        },
        &loop);
  }

  // How many pieces of at least `least` things each: enough to even out what a slow core leaves, and the same number for every thread.
  int64_t number_for(int64_t count, int64_t least) const {
    const int64_t most = std::min(count / std::max<int64_t>(least, 1), PIECES * threads());
    return most > threads() ? most - most % threads() : std::max<int64_t>(most, 1);
  }

  // To be fetched by the products of the next loops (Stream): each thread its share, as loops deal them out.
  void fetch(Fetch weights, int64_t floats_a_step, bool urgent) const {
    if (!team) {
      if (stream) stream->push(weights, floats_a_step, urgent);
      return;
    }
    for (int64_t worker = 0; worker < threads(); ++worker)
      team->stream_of(worker).push(weights.part({worker, worker + 1}, threads()), floats_a_step, urgent);
  }

  // f(range) for so many pieces, each a whole number of `unit` things.
  template <class F>
  void split(int64_t count, int64_t least, int64_t unit, const F& f) const {
    const int64_t units = ceil_div(count, unit);
    pieces(units, number_for(units, ceil_div(least, unit)),
           [&](Range range, int64_t) { f(Range{range.begin * unit, std::min(range.end * unit, count)}); });
  }

  static constexpr int64_t PIECES = 16;  // a thread: one at half its speed holds up the others by 1/32 at most
};

}  // namespace fastconv
