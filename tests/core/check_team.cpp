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

void check_streams() {
  const float memory[64] = {};
  const auto range = [&](int64_t begin, int64_t end) { return Fetch{memory + begin, memory + end}; };
  const auto is = [](Fetch got, Fetch wanted) { return got.begin == wanted.begin && got.end == wanted.end; };
  Stream one;
  expect(one.empty(), "a new stream is empty");
  one.push(range(0, 16), 4, false);
  one.push(range(5, 5), 4, true);  // nothing
  one.push(range(16, 40), 2, false);
  one.push(range(40, 50), 1, true);
  expect(is(one.take(1), range(40, 47)), "the urgent range comes first, at the pace of all");
  expect(is(one.take(3), range(47, 50)), "no further than a range's end");
  expect(is(one.take(2), range(0, 12)), "then the others, in turn");
  expect(is(one.take(9), range(12, 16)), "the rest of a range");
  expect(is(one.take(1), range(16, 18)), "at the last range's own pace");
  expect(is(one.take(99), range(18, 40)) && one.empty(), "to its end");
  for (int64_t i = 0; i < 5; ++i) one.push(range(i, i + 1), 1, false);
  one.push(range(60, 64), 1, true);
  int64_t floats = 0;
  for (; !one.empty(); floats += one.take(9).size())
    ;
  expect(floats == 4 + 3, "four ranges, of which the urgent one took the last's place");

  expect(stream == nullptr, "a thread without a team fetches nothing");
  Parallel{}.fetch(range(0, 16), 1, false);
  with_team(2, 1, [&](const Parallel& parallel) {
    parallel.fetch(range(0, 64), 8, false);
    std::vector<Fetch> taken(2);
    while (!taken[0].begin || !taken[1].begin)  // until the helper has come as well
      parallel.pieces(2, 2, [&](Range, int64_t worker) {
        if (!stream->empty()) taken[worker] = stream->take(8);
      });
    expect(is(taken[0], range(0, 32)) && is(taken[1], range(32, 64)), "each thread its share");
  });
  expect(stream == nullptr, "none after the team");
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
  check_streams();
  std::printf("ok\n");
}
