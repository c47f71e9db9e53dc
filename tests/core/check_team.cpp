// The team of threads by itself: every piece of every loop runs exactly once, whoever arrives, is late or throws.
//
//   g++ -std=c++20 -O1 -fsanitize=thread -I. tests/core/check_team.cpp -lpthread && ./a.out

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cpu/parallel.h"

using namespace fastconv;

namespace {

void expect(bool condition, const char* what) {
  if (condition) return;
  std::printf("failed: %s\n", what);
  std::exit(1);
}

// The leader's work with `helpers` of the team's threads; the others never come.
template <class F>
void with_team(int64_t threads, int64_t helpers, const F& lead) {
  Team team(threads);
  std::vector<std::thread> others;
  for (int64_t w = 1; w <= helpers; ++w) others.emplace_back([&team, w] { team.help(w); });
  lead(Parallel{&team});
  team.finish();
  for (std::thread& other : others) other.join();
}

void check_every_piece_once(int64_t threads, int64_t helpers, int loops) {
  std::mt19937 generator(static_cast<unsigned>(threads * 10 + helpers));
  with_team(threads, helpers, [&](const Parallel& parallel) {
    std::vector<int> seen;  // plain integers: a race would be the team's
    long sum = 0;
    for (int i = 0; i < loops; ++i) {
      const int64_t count = static_cast<int64_t>(generator() % 200), least = 1 + static_cast<int64_t>(generator() % 5),
                    unit = 1 + static_cast<int64_t>(generator() % 4);
      seen.assign(count, 0);
      parallel.split(count, least, unit, [&](Range range) {
        expect(range.begin % unit == 0, "pieces begin at whole units");
        for (int64_t j = range.begin; j < range.end; ++j) ++seen[j];
      });
      for (const int times : seen) {
        expect(times == 1, "every thing once");
        sum += times;
      }
    }
    expect(sum > 0, "something ran");
  });
}

void check_slow_threads_do_less() {
  with_team(2, 1, [&](const Parallel& parallel) {
    std::vector<int64_t> by(64, -1);
    parallel.pieces(64, 64, [&](Range range, int64_t worker) {
      std::this_thread::sleep_for(std::chrono::microseconds(worker == 0 ? 3000 : 100));
      by[range.begin] = worker;
    });
    int64_t slow = 0;
    for (const int64_t worker : by) slow += worker == 0;
    expect(slow < 24, "the other thread takes over what a slow one leaves");
  });
}

void check_exceptions() {
  for (const int64_t helpers : {0, 3})
    with_team(4, helpers, [&](const Parallel& parallel) {
      for (int i = 0; i < 200; ++i) {
        bool caught = false;
        try {
          parallel.pieces(40, 40, [&](Range range, int64_t) {
            if (range.begin == 17) throw std::runtime_error("piece 17");
          });
        } catch (const std::runtime_error& error) {
          caught = std::string(error.what()) == "piece 17";
        }
        expect(caught, "the leader gets what a piece threw");
        std::vector<int> seen(40);
        parallel.pieces(40, 40, [&](Range range, int64_t) { ++seen[range.begin]; });
        for (const int times : seen) expect(times == 1, "the loop after an exception is whole");
      }
    });
}

}  // namespace

int main(int argc, char** argv) {
  const int loops = argc > 1 ? std::atoi(argv[1]) : 3000;
  for (const int64_t threads : {1, 2, 3, 7}) {
    check_every_piece_once(threads, threads - 1, loops);
    check_every_piece_once(threads, 0, loops);  // a leader alone, as in a nested parallel region
    check_every_piece_once(threads, threads / 2, loops);
  }
  check_slow_threads_do_less();
  check_exceptions();
  std::printf("ok\n");
}
