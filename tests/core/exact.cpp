// Exact cases: the core's operators on integer-valued data against plain loops, with no tolerance, on every instruction set this CPU has.
// Every case runs twice: with input, residual, weights, biases and output each ending at an unmapped page, and each starting at one, so
// that a byte read or written outside is a fault that names the case. What lies between an image's elements is NaN in inputs and must be as
// it was in outputs. Pixels whose window touches the padding are compared, and counted, apart from the others.
//
//   exact [--isa NAME] [--op NAME] [--one-in N] [--seed N] [--list] [--heap] [--threads]
//
// --one-in: that share of the shapes, drawn by --seed; --list: the cases, a line each, instead of running them; --heap: blocks of malloc
// instead of pages, for sanitizers; --threads: teams whose threads all come, where else a leader does all their pieces.

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cpu/blocks.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/pack.h"

using namespace fastconv;

namespace {

using Floats = std::vector<float>;

struct Options {
  bool list = false, heap = false, threads = false;
  uint64_t one_in = 1, seed = 1;
  std::string op, isa;
} options;

uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// Data

class Integers {
 public:
  explicit Integers(uint64_t seed) : state_(seed) {}
  Floats operator()(int64_t count, int most) {
    Floats values(count);
    for (float& value : values) value = static_cast<float>(static_cast<int>((state_ = mix(state_)) % (2 * most + 1)) - most);
    return values;
  }

 private:
  uint64_t state_;
};

// A NaN that no computation makes.
float untouched() {
  const uint32_t bits = 0x7fc0dead;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Memory whose end, or whose beginning, is an unmapped page's neighbour.
class Guarded {
 public:
  ~Guarded() {
    if (options.heap)
      std::free(base_);
    else if (base_)
      munmap(base_, capacity_ + 2 * PAGE);
  }
  float* place(int64_t count, bool at_end) {
    const size_t bytes = count * sizeof(float);
    if (options.heap) {
      std::free(base_);
      base_ = static_cast<char*>(std::malloc(bytes));
      return reinterpret_cast<float*>(base_);
    }
    if (bytes > capacity_) {
      if (base_) munmap(base_, capacity_ + 2 * PAGE);
      capacity_ = (bytes + PAGE - 1) / PAGE * PAGE;
      base_ = static_cast<char*>(mmap(nullptr, capacity_ + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      if (base_ == MAP_FAILED || mprotect(base_ + PAGE, capacity_, PROT_READ | PROT_WRITE)) std::perror("mmap"), std::exit(2);
    }
    return reinterpret_cast<float*>(base_ + PAGE + (at_end ? capacity_ - bytes : 0));
  }
  const float* put(const Floats& values, bool at_end) {
    float* data = place(values.size(), at_end);
    std::copy(values.begin(), values.end(), data);
    return data;
  }

 private:
  static constexpr size_t PAGE = 4096;
  char* base_ = nullptr;
  size_t capacity_ = 0;
};

enum class Form { dense, slice, blocked };  // channels innermost, with others' channels between, 16 channels a block

struct Layout {
  const char* name;
  Form in, out;
};
constexpr Layout LAYOUTS[] = {{"dense", Form::dense, Form::dense},
                              {"slice", Form::slice, Form::slice},
                              {"blocked", Form::blocked, Form::blocked},
                              {"dense-to-blocked", Form::dense, Form::blocked},
                              {"blocked-to-slice", Form::blocked, Form::slice}};

struct Image {
  Guarded memory;
  float* data = nullptr;
  Strides strides;
  int64_t pixels = 0, channels = 0, floats = 0;

  void shape(int64_t count, int64_t depth, Form form, bool at_end) {
    pixels = count;
    channels = depth;
    strides = form == Form::blocked ? fastconv::blocked(pixels) : Strides(form == Form::slice ? channels + 3 : channels);
    floats = strides.innermost() ? (pixels - 1) * strides.pixel + channels : (panels_for(channels) - 1) * strides.block + pixels * PANEL;
    data = memory.place(floats, at_end);
    clear();
  }
  void clear() { std::fill(data, data + floats, untouched()); }
  // f(pixel, first channel, channels, where they stand) for every run of neighbours.
  template <class F>
  void runs(const F& f) const {
    const int64_t step = strides.innermost() ? channels : PANEL;
    for (int64_t c = 0; c < channels; c += step)
      for (int64_t p = 0; p < pixels; ++p) f(p, c, std::min(step, channels - c), strides.at(p, c));
  }
  void put(const Floats& x) {
    runs([&](int64_t p, int64_t c, int64_t count, int64_t at) { std::copy_n(&x[p * channels + c], count, data + at); });
  }
};

// Cases

const char* name_of(Activation activation) {
  constexpr const char* names[] = {"none", "relu", "relu6", "hardswish", "hardsigmoid", "silu", "sigmoid"};
  return names[static_cast<int>(activation)];
}

// In the kernels' order of operations, so that equality is meant to the bit.
float activate(float v, Activation activation) {
  const auto clamped = [](float value, float high) { return value < 0 ? 0 : value > high ? high : value; };
  switch (activation) {
    case Activation::relu:
      return v < 0 ? 0 : v;
    case Activation::relu6:
      return clamped(v, 6);
    case Activation::hardswish:
      return v * clamped(v + 3, 6) * (1.0f / 6.0f);
    case Activation::hardsigmoid:
      return clamped(v + 3, 6) * (1.0f / 6.0f);
    default:
      return v;
  }
}
constexpr Activation ALL[] = {Activation::none, Activation::relu, Activation::relu6, Activation::hardswish, Activation::hardsigmoid};

struct Problem {
  const char* op;
  int64_t n, h, w, in, middle, out;  // middle: channels between, where the operator has them
  int64_t kernel, sh, sw, ph, pw;
  Activation between = Activation::none;
  bool winograd = false;
  Packing packing = Packing::panels;  // of 1x1 convolutions that can have it
  int64_t out_h() const { return (h + 2 * ph - kernel) / sh + 1; }
  int64_t out_w() const { return (w + 2 * pw - kernel) / sw + 1; }
  int64_t pixels() const { return n * h * w; }
  int64_t out_pixels() const { return n * out_h() * out_w(); }
  bool possible() const { return h + 2 * ph >= kernel && w + 2 * pw >= kernel; }
};

struct Finish {
  Activation activation;
  bool residual;
};

// What runs, for the line that a failure or a fault prints.
struct Current {
  Problem problem;
  Layout layout;
  Finish epilogue;
  std::string line() const {
    char text[400];
    const Problem& p = problem;
    std::snprintf(text, sizeof(text),
                  "%s shape=%ld,%ld,%ld,%ld middle=%ld out=%ld kernel=%ld stride=%ld,%ld padding=%ld,%ld layout=%s dtype=float32 "
                  "epilogue=bias,%s%s,%s%s%s%s",
                  p.op, p.n, p.in, p.h, p.w, p.middle, p.out, p.kernel, p.sh, p.sw, p.ph, p.pw, layout.name, name_of(p.between),
                  epilogue.residual ? ",residual" : "", name_of(epilogue.activation), p.winograd ? " winograd" : "",
                  p.packing == Packing::strassen ? " strassen" : "", p.packing == Packing::digits ? " digits" : "");
    return text;
  }
} current;
bool current_at_end = false;
int64_t current_team = 0;

void failed(const std::string& what) {
  std::printf("%s %s (%s-aligned, team of %ld): %s\n", kernels().isa, current.line().c_str(), current_at_end ? "end" : "start",
              current_team, what.c_str());
  std::fflush(stdout);
  std::_Exit(1);
}
void on_fault(int signal) { failed(signal == SIGSEGV || signal == SIGBUS ? "read or wrote outside its arguments" : "crashed"); }

struct Count {
  int64_t runs = 0, border = 0, interior = 0;
};
struct Totals {
  std::vector<uint64_t> cases;
  std::vector<Count> of_isa;
  float worst = 0;  // part of Winograd's bound that was used
} totals;

// Operators: each makes its data and its reference, puts its weights into guarded memory, and runs.

Floats convolve(const Problem& p, const Floats& x, int64_t channels, int64_t out, const Floats& weight, const Floats& bias,
                bool depthwise) {
  Floats y(p.out_pixels() * out);
  float* to = y.data();
  for (int64_t n = 0; n < p.n; ++n)
    for (int64_t oh = 0; oh < p.out_h(); ++oh)
      for (int64_t ow = 0; ow < p.out_w(); ++ow, to += out) {
        std::copy(bias.begin(), bias.end(), to);
        for (int64_t kh = 0; kh < p.kernel; ++kh)
          for (int64_t kw = 0; kw < p.kernel; ++kw) {
            const int64_t ih = oh * p.sh - p.ph + kh, iw = ow * p.sw - p.pw + kw, tap = kh * p.kernel + kw, taps = p.kernel * p.kernel;
            if (ih < 0 || ih >= p.h || iw < 0 || iw >= p.w) continue;
            const float* pixel = &x[((n * p.h + ih) * p.w + iw) * channels];
            for (int64_t o = 0; o < out; ++o) {
              if (depthwise) {
                to[o] += pixel[o] * weight[o * taps + tap];
              } else {
                const float* row = &weight[o * channels * taps + tap];
                for (int64_t c = 0; c < channels; ++c) to[o] += pixel[c] * row[c * taps];
              }
            }
          }
      }
  return y;
}
Floats multiply(const Floats& x, int64_t channels, int64_t out, const Floats& weight, const Floats& bias) {
  const int64_t pixels = x.size() / channels;
  Floats y(pixels * out);
  for (int64_t m = 0; m < pixels; ++m)
    for (int64_t o = 0; o < out; ++o) {
      float sum = bias[o];
      for (int64_t k = 0; k < channels; ++k) sum += x[m * channels + k] * weight[o * channels + k];
      y[m * out + o] = sum;
    }
  return y;
}
void activate_all(Floats& x, Activation activation) {
  for (float& value : x) value = activate(value, activation);
}

// Weights and bias of one layer, packed.
struct Layer {
  int64_t in = 0, out = 0, taps = 0;
  Floats weight, bias;
  Guarded panels_memory, bias_memory;
  const float *panels = nullptr, *packed_bias = nullptr;
  Packing packing = Packing::panels;

  void make(Integers& integers, int64_t inputs, int64_t outputs, int64_t size, int most) {
    in = inputs;
    out = outputs;
    taps = size;
    weight = integers(in * out * taps, most);
    bias = integers(out, most);
  }
  float* place(int64_t count, bool at_end) {
    packed_bias = bias_memory.put(bias, at_end);
    float* to = panels_memory.place(count, at_end);
    panels = to;
    return to;
  }
  void pack(bool at_end) {
    packing = Packing::panels;
    pack_panels(weight.data(), out, in, taps, place(panels_for(out) * taps * in * PANEL, at_end));
  }
  void pack_as(Packing wanted, bool at_end) {
    if (wanted == Packing::panels) return pack(at_end);
    packing = wanted;
    if (wanted == Packing::strassen)
      return pack_strassen(weight.data(), out, in, place(StrassenWeights{nullptr, in, out}.floats(), at_end));
    float* const aligned = place(ceil_div(DigitWeights{nullptr, in, out}.floats(), PANEL) * PANEL, at_end);
    pack_digits(weight.data(), out, in, aligned);
  }
  void pack_as_taps(bool at_end) { pack_taps(weight.data(), out, taps, place(out * taps, at_end)); }
  PackedPointwise product(Activation activation) const { return {panels, packed_bias, in, out, activation, packing}; }
};

struct Operator {
  virtual ~Operator() = default;
  virtual Floats prepare(const Problem& p, const Floats& x, Integers& integers) = 0;  // weights; returns the sums before the epilogue
  virtual void pack(bool at_end) = 0;
  virtual void run(const Problem& p, const Image& x, const Epilogue& epilogue, const Image& out, const Parallel& parallel) const = 0;
};

struct DepthwiseOp : Operator {
  Layer layer;
  Floats prepare(const Problem& p, const Floats& x, Integers& integers) override {
    layer.make(integers, 1, p.in, p.kernel * p.kernel, 4);
    return convolve(p, x, p.in, p.in, layer.weight, layer.bias, true);
  }
  void pack(bool at_end) override { layer.pack_as_taps(at_end); }
  void run(const Problem& p, const Image& x, const Epilogue& epilogue, const Image& out, const Parallel& parallel) const override {
    run_depthwise({x.data, x.strides, p.w * x.strides.pixel, p.h, p.h, p.w, p.in, p.out_w(), p.kernel, p.sh, p.sw, p.ph, p.pw, layer.panels,
                   layer.packed_bias, epilogue.activation, out.data, out.strides, p.out_w() * out.strides.pixel},
                  p.n, p.out_h(), parallel);
  }
};

struct PointwiseOp : Operator {
  Layer layer;
  Packing packing = Packing::panels;
  Floats prepare(const Problem& p, const Floats& x, Integers& integers) override {
    packing = p.packing;
    layer.make(integers, p.in, p.out, 1, packing == Packing::digits ? 1000 : 4);  // of two digits
    return multiply(x, p.in, p.out, layer.weight, layer.bias);
  }
  void pack(bool at_end) override { layer.pack_as(packing, at_end); }
  void run(const Problem& p, const Image& x, const Epilogue& epilogue, const Image& out, const Parallel& parallel) const override {
    Epilogue own = epilogue;
    own.bias = layer.packed_bias;
    Pointwise op{x.data, x.strides, p.in, p.out, layer.panels, own, out.data, out.strides};
    op.packing = layer.packing;
    op.pairs_within = p.h * p.w % 3 == 0 ? 1 : p.h * p.w;
    run_pointwise(op, p.pixels(), parallel);
  }
};

struct StemOp : Operator {
  Layer layer;
  Guarded winograd_memory;
  const float* winograd = nullptr;
  bool transforms = false;
  Floats prepare(const Problem& p, const Floats& x, Integers& integers) override {
    transforms = p.winograd;
    layer.make(integers, p.in, p.out, p.kernel * p.kernel, 4);
    if (transforms)
      for (float& w : layer.weight) w *= 45;  // then every transformed weight, and so every sum, is exact
    return convolve(p, x, p.in, p.out, layer.weight, layer.bias, false);
  }
  void pack(bool at_end) override {
    layer.pack(at_end);
    if (!transforms) return;
    const int64_t kernel_h = layer.taps / 7;
    float* panels = winograd_memory.place(panels_for(layer.out) * STEM_POINTS * kernel_h * STEM_PLANES * PANEL, at_end);
    pack_stem_winograd(layer.weight.data(), layer.out, kernel_h, panels);
    winograd = panels;
  }
  void run(const Problem& p, const Image& x, const Epilogue& epilogue, const Image& out, const Parallel& parallel) const override {
    const int64_t pixel = x.strides.pixel;
    run_stem({x.data,
              1,
              p.w * pixel,
              pixel,
              p.h,
              p.w,
              p.in,
              p.out,
              p.out_h(),
              p.out_w(),
              p.kernel,
              p.kernel,
              p.sh,
              p.sw,
              p.ph,
              p.pw,
              layer.panels,
              {layer.packed_bias, nullptr, 0, epilogue.activation},
              out.data,
              out.strides,
              p.winograd ? winograd : nullptr},
             p.n, p.h * p.w * pixel, parallel);
  }
};

// Both expands of a fire module, as fire_expand runs them: p.middle channels by 1x1, the others by 3x3.
struct FireExpandOp : Operator {
  Layer one, three;
  Floats zeros;
  Guarded zeros_memory, winograd_memory;
  const float *zero = nullptr, *winograd = nullptr;

  Floats prepare(const Problem& p, const Floats& x, Integers& integers) override { return expand(p, x, p.in, integers); }
  Floats expand(const Problem& p, const Floats& x, int64_t channels, Integers& integers) {
    one.make(integers, channels, p.middle, 1, 4);
    three.make(integers, channels, p.out - p.middle, 9, 4);
    zeros.assign(channels, 0.0f);
    const Floats a = multiply(x, channels, one.out, one.weight, one.bias);
    const Floats b = convolve(p, x, channels, three.out, three.weight, three.bias, false);
    Floats both(p.pixels() * p.out);
    for (int64_t m = 0; m < p.pixels(); ++m) {
      std::copy_n(&a[m * one.out], one.out, &both[m * p.out]);
      std::copy_n(&b[m * three.out], three.out, &both[m * p.out + one.out]);
    }
    return both;
  }
  void pack(bool at_end) override {
    one.pack(at_end);
    three.pack(at_end);
    zero = zeros_memory.put(zeros, at_end);
    float* panels = winograd_memory.place(panels_for(three.out) * 36 * three.in * PANEL, at_end);
    pack_winograd(three.weight.data(), three.out, three.in, panels);
    winograd = panels;
  }
  void run(const Problem& p, const Image& x, const Epilogue&, const Image& out, const Parallel& parallel) const override {
    const Epilogue first{one.packed_bias, nullptr, 0, Activation::relu}, second{three.packed_bias, nullptr, 0, Activation::relu};
    run_pointwise({x.data, x.strides, p.in, one.out, one.panels, first, out.data, out.strides}, p.pixels(), parallel);
    run_conv({x.data, x.strides.pixel, p.h, p.w, p.in, three.out, p.h, p.w, 3, 3, 1, 1, 1, 1, three.panels, zero, second,
              out.data + out.strides.at(0, one.out), out.strides},
             p.n, parallel);
  }
};

struct FireOp : FireExpandOp {
  Layer squeeze;
  Floats prepare(const Problem& p, const Floats& x, Integers& integers) override {
    packing = p.packing;
    squeeze.make(integers, p.in, 4 + p.in % 13, 1, 2);
    Floats strip = multiply(x, p.in, squeeze.out, squeeze.weight, squeeze.bias);
    activate_all(strip, Activation::relu);
    return expand(p, strip, squeeze.out, integers);
  }
  Packing packing = Packing::panels;
  void pack(bool at_end) override {
    squeeze.pack_as(packing, at_end);
    FireExpandOp::pack(at_end);
    if (packing == Packing::digits) one.pack_as(packing, at_end);
  }
  void run(const Problem& p, const Image& x, const Epilogue&, const Image& out, const Parallel& parallel) const override {
    run_fire({x.data, x.strides, p.n, p.h, p.w, squeeze.product(Activation::relu), one.product(Activation::relu), three.panels,
              p.winograd ? winograd : nullptr, three.packed_bias, three.out, out.data, out.strides},
             parallel);
  }
};

// separable where middle is 0, else inverted_residual.
struct BlockOp : Operator {
  Layer expand, depthwise, project;
  Packing packing = Packing::panels;
  Floats prepare(const Problem& p, const Floats& x, Integers& integers) override {
    packing = p.packing;
    const int64_t channels = p.middle ? p.middle : p.in;
    Floats y = x;
    expand.out = 0;
    if (p.middle) {
      expand.make(integers, p.in, channels, 1, 2);
      y = multiply(x, p.in, channels, expand.weight, expand.bias);
      activate_all(y, p.between);
    }
    depthwise.make(integers, 1, channels, p.kernel * p.kernel, 2);
    y = convolve(p, y, channels, channels, depthwise.weight, depthwise.bias, true);
    activate_all(y, p.between);
    project.make(integers, channels, p.out, 1, 2);
    return multiply(y, channels, p.out, project.weight, project.bias);
  }
  void pack(bool at_end) override {
    if (expand.out) expand.pack_as(packing == Packing::digits ? packing : Packing::panels, at_end);
    depthwise.pack_as_taps(at_end);
    project.pack_as(packing, at_end);
  }
  void run(const Problem& p, const Image& x, const Epilogue& epilogue, const Image& out, const Parallel& parallel) const override {
    run_inverted_residual({x.data,
                           x.strides,
                           nullptr,
                           p.n,
                           p.h,
                           p.w,
                           p.in,
                           p.middle ? expand.product(p.between) : PackedPointwise{},
                           depthwise.panels,
                           depthwise.packed_bias,
                           depthwise.out,
                           p.kernel,
                           p.sh,
                           p.sw,
                           p.ph,
                           p.pw,
                           p.between,
                           {},
                           project.product(epilogue.activation),
                           epilogue.residual,
                           epilogue.residual_strides,
                           false,
                           p.out_h(),
                           p.out_w(),
                           out.data,
                           out.strides},
                          parallel);
  }
};

template <class F>
void with_team(int64_t threads, const F& f) {
  if (threads <= 1) return f(Parallel{});
  Team team(threads);
  std::vector<std::thread> helpers;
  if (options.threads)
    for (int64_t worker = 1; worker < threads; ++worker) helpers.emplace_back([&team, worker] { team.help(worker); });
  f(Parallel{&team});
  team.finish();
  for (std::thread& helper : helpers) helper.join();
}

// The border: pixels whose window reaches over the image's edge.
std::vector<char> border_of(const Problem& p) {
  std::vector<char> border;
  for (int64_t n = 0; n < p.n; ++n)
    for (int64_t oh = 0; oh < p.out_h(); ++oh)
      for (int64_t ow = 0; ow < p.out_w(); ++ow) {
        const int64_t top = oh * p.sh - p.ph, left = ow * p.sw - p.pw;
        border.push_back(top < 0 || left < 0 || top + p.kernel > p.h || left + p.kernel > p.w);
      }
  return border;
}

// Exact, or within Winograd's bound: 1e-5 of the largest sum (2e-6 to 3e-6 on random data).
void compare(const Image& out, const Floats& wanted, const std::vector<char>& border, float bound, int64_t winograd_from) {
  int64_t wrong[2] = {0, 0}, first = -1;
  float* const data = out.data;
  out.runs([&](int64_t p, int64_t c, int64_t count, int64_t at) {
    const float* expected = &wanted[p * out.channels + c];
    if (std::memcmp(data + at, expected, count * sizeof(float)) != 0)
      for (int64_t i = 0; i < count; ++i) {
        const float difference = std::fabs(data[at + i] - expected[i]);
        const bool near = bound > 0 && c + i >= winograd_from && difference <= bound;
        if (near) totals.worst = std::max(totals.worst, difference / bound);
        if (near || std::memcmp(data + at + i, expected + i, sizeof(float)) == 0) continue;
        ++wrong[static_cast<int>(border[p])];
        if (first < 0) first = p * out.channels + c + i;
      }
    // Taken out, so that what is left was to be left alone: but for a last block's unused lanes, which may be written.
    std::fill_n(data + at, out.strides.innermost() ? count : PANEL, untouched());
  });
  if (first >= 0)
    failed(std::to_string(wrong[1]) + " elements differ at the border and " + std::to_string(wrong[0]) + " inside; first: pixel " +
           std::to_string(first / out.channels) + ", channel " + std::to_string(first % out.channels) + ", wanted " +
           std::to_string(wanted[first]));
  const float mark = untouched();
  for (int64_t i = 0; i < out.floats; ++i)
    if (std::memcmp(data + i, &mark, sizeof(float)) != 0) failed("wrote between its elements, at float " + std::to_string(i));
}

std::vector<std::string> isas;

template <class Op>
void check(const Problem& p, const std::vector<Layout>& layouts, const std::vector<Finish>& epilogues) {
  static uint64_t number = 0;
  ++number;
  if (!p.possible() || (options.one_in > 1 && mix(number ^ mix(options.seed)) % options.one_in != 0)) return;
  current.problem = p;
  for (const Layout& layout : layouts)
    for (const Finish& epilogue : epilogues) {
      current.layout = layout;
      current.epilogue = epilogue;
      const std::string line = current.line();
      if (options.list) std::puts(line.c_str());
      totals.cases.push_back(std::hash<std::string>{}(line));
    }
  if (options.list) return;

  Integers integers(mix(number));
  static Op op;  // its memory serves all problems
  const Floats x = integers(p.pixels() * p.in, 4), residual = integers(p.out_pixels() * p.out, 4);
  const Floats sums = op.prepare(p, x, integers);
  const std::vector<char> border = border_of(p);
  const int64_t at_border = std::count(border.begin(), border.end(), 1) * p.out;
  float bound = 0;
  if (p.winograd && p.middle > 0)  // a fire's; a stem's is exact on its weights
    for (const float sum : sums) bound = std::max(bound, 1e-5f * std::fabs(sum));
  std::vector<Floats> wanted;
  for (const Finish& epilogue : epilogues) {
    Floats y = sums;
    for (size_t i = 0; i < y.size(); ++i) y[i] = activate(y[i] + (epilogue.residual ? residual[i] : 0), epilogue.activation);
    wanted.push_back(std::move(y));
  }
  static Image in, added, out;
  current_team = static_cast<int64_t>(number % 3) + 1;
  for (const bool at_end : {true, false}) {
    current_at_end = at_end;
    op.pack(at_end);
    for (const Layout& layout : layouts) {
      current.layout = layout;
      in.shape(p.pixels(), p.in, layout.in, at_end);
      in.put(x);
      added.shape(p.out_pixels(), p.out, layout.in, at_end);
      added.put(residual);
      out.shape(p.out_pixels(), p.out, layout.out, at_end);
      for (size_t e = 0; e < epilogues.size(); ++e) {
        current.epilogue = epilogues[e];
        const Epilogue epilogue{nullptr, epilogues[e].residual ? added.data : nullptr, added.strides, epilogues[e].activation};
        for (size_t i = 0; i < isas.size(); ++i) {
          if (isas[i] == "amx" && p.packing != Packing::digits) continue;  // AVX-512's kernels
          if (isas.size() > 1) set_isa(isas[i]);
          with_team(current_team, [&](const Parallel& parallel) { op.run(p, in, epilogue, out, parallel); });
          compare(out, wanted[e], border, bound, p.winograd ? p.middle : p.out);
          Count& count = totals.of_isa[i];
          count.runs += 1;
          count.border += at_border;
          count.interior += static_cast<int64_t>(sums.size()) - at_border;
        }
      }
    }
  }
}

// The lattice of every operator. Batches of two where the sum of an image's sides is odd.

std::vector<Finish> each(std::initializer_list<Activation> activations, bool residuals) {
  std::vector<Finish> all;
  for (const Activation activation : activations) {
    all.push_back({activation, false});
    if (residuals) all.push_back({activation, true});
  }
  return all;
}
const std::vector<Layout> EVERY(std::begin(LAYOUTS), std::end(LAYOUTS));

void depthwise_cases() {
  const std::vector<Finish> epilogues = each({ALL[0], ALL[1], ALL[2], ALL[3], ALL[4]}, false);
  for (const int64_t h : {1, 2, 3, 4, 5, 7, 8, 13, 14, 15})
    for (const int64_t w : {1, 2, 3, 4, 5, 7, 8, 13, 14, 15})
      for (const int64_t c : {1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33})
        for (const int64_t kernel : {3, 5})
          for (const auto& [sh, sw] : {std::array<int64_t, 2>{1, 1}, {2, 2}, {1, 2}, {2, 1}})
            for (const auto& [ph, pw] : {std::array<int64_t, 2>{0, 0}, {kernel / 2, kernel / 2}, {kernel - 1, 1}, {1, kernel - 1}})
              check<DepthwiseOp>({"depthwise", 1 + (h + w) % 2, h, w, c, 0, c, kernel, sh, sw, ph, pw}, EVERY, epilogues);
}

void pointwise_cases() {
  const std::vector<Finish> epilogues = each({ALL[0], ALL[1], ALL[2], ALL[3], ALL[4]}, true);
  for (const int64_t pixels : {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 27, 28, 29, 49})
    for (const int64_t in : {1, 2, 3, 4, 5, 8, 15, 16, 17, 32, 33, 64})
      for (const int64_t out : {1, 3, 7, 8, 9, 15, 16, 17, 24, 25, 31, 33, 40, 48, 56, 72})
        check<PointwiseOp>({"pointwise", 1, 1, pixels, in, 0, out, 1, 1, 1, 0, 0}, EVERY, epilogues);
  // Work enough for a team to share, by pixels and by channels.
  for (const int64_t pixels : {1, 5, 13, 28, 49, 100})
    for (const int64_t in : {250, 600})
      for (const int64_t out : {96, 520, 1000})
        check<PointwiseOp>({"pointwise", 1, 1, pixels, in, 0, out, 1, 1, 1, 0, 0}, {LAYOUTS[0], LAYOUTS[1], LAYOUTS[2]},
                           each({Activation::relu}, true));
}

void strassen_cases() {
  const auto strassen = [](Problem p) {
    p.packing = Packing::strassen;
    return p;
  };
  const std::vector<Finish> epilogues = each({ALL[0], ALL[2], ALL[3], ALL[4]}, true);
  for (const int64_t n : {1, 3})
    for (const int64_t pixels : {1, 2, 3, 4, 7, 12, 13, 14, 25, 26, 27, 28, 29, 30, 49, 57})
      for (const int64_t in : {32, 64, 96})
        for (const int64_t out : {7, 31, 32, 40, 64, 80, 96, 121, 128, 168})
          check<PointwiseOp>(strassen({"strassen", n, 1, pixels, in, 0, out, 1, 1, 1, 0, 0}), EVERY, epilogues);
  // Strips of pixels, and work for a team by pixels and by panels.
  for (const int64_t pixels : {13, 49, 100, 225})
    for (const int64_t in : {256, 608})
      for (const int64_t out : {96, 520, 1000})
        check<PointwiseOp>(strassen({"strassen", 2, 1, pixels, in, 0, out, 1, 1, 1, 0, 0}), {LAYOUTS[0], LAYOUTS[1], LAYOUTS[2]},
                           each({Activation::relu}, true));
  // Projections by rows, odd and even, and of whole images whose weights do not fit L2.
  for (const auto& [h, w] : {std::array<int64_t, 2>{1, 1}, {3, 5}, {5, 4}, {7, 7}, {14, 14}, {29, 15}, {56, 9}})
    for (const auto& [in, out] : {std::array<int64_t, 2>{32, 40}, {64, 64}, {96, 96}, {512, 320}})
      for (const int64_t middle : {int64_t{0}, in})
        for (const int64_t stride : {1, 2}) {
          if (in > 96 && h * w > 196) continue;
          Problem p = strassen({"strassen", 1 + (h + w) % 2, h, w, middle ? 24 : in, middle, out, 3, stride, stride, 1, 1});
          p.between = Activation::relu6;
          check<BlockOp>(p, {LAYOUTS[0], LAYOUTS[2]}, each({Activation::none, Activation::relu}, true));
        }
}

// Sums of digits of integers are exact too: the digits that are left out are zero.
void digits_cases() {
  const auto digits = [](Problem p) {
    p.packing = Packing::digits;
    return p;
  };
  const std::vector<Finish> epilogues = each({ALL[0], ALL[2], ALL[3], ALL[4]}, true);
  for (const int64_t pixels : {1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 49, 57})
    for (const int64_t in : {1, 15, 16, 17, 48, 63, 64, 65, 130})
      for (const int64_t out : {1, 8, 15, 16, 17, 48, 56, 100})
        check<PointwiseOp>(digits({"digits", 1, 1, pixels, in, 0, out, 1, 1, 1, 0, 0}), EVERY, epilogues);
  for (const int64_t pixels : {13, 49, 100, 225})
    for (const int64_t in : {256, 600})
      for (const int64_t out : {96, 520, 1000})
        check<PointwiseOp>(digits({"digits", 2, 1, pixels, in, 0, out, 1, 1, 1, 0, 0}), {LAYOUTS[0], LAYOUTS[1], LAYOUTS[2]},
                           each({Activation::relu}, true));
  for (const auto& [h, w] : {std::array<int64_t, 2>{1, 1}, {3, 5}, {5, 4}, {7, 7}, {14, 14}, {29, 15}, {56, 9}})
    for (const auto& [in, out] : {std::array<int64_t, 2>{48, 40}, {64, 64}, {100, 72}})
      for (const int64_t middle : {0, 60, 192})
        for (const int64_t stride : {1, 2}) {
          Problem p = digits({"digits", 1 + (h + w) % 2, h, w, in, middle, out, 3, stride, stride, 1, 1});
          p.between = Activation::relu6;
          check<BlockOp>(p, {LAYOUTS[0], LAYOUTS[2]}, each({Activation::none, Activation::relu}, true));
        }
  for (const auto& [h, w] : {std::array<int64_t, 2>{1, 1}, {5, 4}, {13, 13}, {27, 14}})
    for (const int64_t in : {48, 64, 96})
      check<FireOp>(digits({"digits", 1 + (h + w) % 2, h, w, in, 32, 80, 3, 1, 1, 1, 1}), {LAYOUTS[0], LAYOUTS[2]},
                    each({Activation::relu}, false));
}

void stem_cases() {
  const std::vector<Finish> epilogues = each({ALL[0], ALL[2], ALL[3]}, false);
  const std::vector<Layout> layouts{LAYOUTS[0], LAYOUTS[1], LAYOUTS[3]};
  for (const int64_t h : {1, 3, 6, 7, 15})
    for (const int64_t w : {1, 3, 6, 7, 16, 33})
      for (const int64_t in : {1, 2, 3, 4})
        for (const int64_t out : {1, 8, 16, 24, 33})
          for (const int64_t kernel : {3, 5, 7})
            for (const int64_t stride : {1, 2, 3})
              for (const int64_t pad : {int64_t{0}, kernel / 2, kernel - 1})
                check<StemOp>({"stem", 1 + (h + w) % 2, h, w, in, 0, out, kernel, stride, stride, pad, pad}, layouts, epilogues);
  for (const int64_t h : {1, 2, 6, 7, 8, 15, 31})
    for (const int64_t w : {1, 2, 3, 6, 7, 8, 16, 33, 121, 130})
      for (const int64_t out : {1, 8, 16, 24, 33, 48, 80})
        for (const int64_t stride_h : {1, 2, 3})
          for (const int64_t pad : {0, 1, 3, 6}) {
            Problem p{"stem", 1 + (h + w) % 2, h, w, 3, 0, out, 7, stride_h, 2, pad, pad};
            p.winograd = true;
            check<StemOp>(p, layouts, epilogues);
          }
}

template <class F>
void expand_channels(const F& f) {
  for (const auto& [one, three] : {std::array<int64_t, 2>{1, 1}, {4, 7}, {9, 17}, {16, 8}, {16, 16}, {32, 40}, {64, 64}, {48, 9}})
    f(one, three);
}
// Blocked outputs where the 1x1's channels are whole blocks.
std::vector<Layout> expand_layouts(int64_t one, bool blocked_input) {
  std::vector<Layout> layouts;
  for (const Layout& layout : LAYOUTS)
    if ((layout.out != Form::blocked || one % PANEL == 0) && (layout.in != Form::blocked || blocked_input)) layouts.push_back(layout);
  return layouts;
}
const std::vector<Finish> RELU{{Activation::relu, false}};

void fire_expand_cases() {
  for (const int64_t h : {1, 2, 3, 4, 5, 7, 8, 13, 14})
    for (const int64_t w : {1, 2, 3, 4, 5, 7, 8, 13, 15})
      for (const int64_t in : {1, 3, 4, 8, 15, 16, 17, 24})
        for (const int64_t n : {1, 2})
          expand_channels([&](int64_t one, int64_t three) {
            check<FireExpandOp>({"fire_expand", n, h, w, in, one, one + three, 3, 1, 1, 1, 1}, expand_layouts(one, false), RELU);
          });
}

void fire_cases() {
  for (const int64_t h : {1, 2, 3, 4, 5, 7, 8, 13, 30})
    for (const int64_t w : {1, 2, 3, 4, 5, 8, 13, 15})
      for (const int64_t in : {1, 4, 8, 17, 33})
        for (const bool winograd : {false, true})
          expand_channels([&](int64_t one, int64_t three) {
            Problem p{"fire", 1 + (h + w) % 2, h, w, in, one, one + three, 3, 1, 1, 1, 1};
            p.winograd = winograd;
            check<FireOp>(p, expand_layouts(one, true), RELU);
          });
}

struct Window {
  int64_t kernel, sh, sw, pad;
};
constexpr Window WINDOWS[] = {{3, 1, 1, 1}, {3, 2, 2, 1}, {3, 1, 1, 0}, {3, 1, 2, 2}, {5, 1, 1, 2}, {5, 2, 2, 2}, {5, 2, 1, 4}};

void separable_cases() {
  const std::vector<Finish> epilogues = each({Activation::none, Activation::relu6, Activation::hardswish}, true);
  const std::vector<Layout> layouts{LAYOUTS[0], LAYOUTS[1], LAYOUTS[2]};
  uint64_t turn = 0;
  for (const int64_t h : {1, 2, 3, 5, 7, 8, 15, 29})
    for (const int64_t w : {1, 2, 4, 7, 8, 15})
      for (const int64_t in : {1, 3, 8, 16, 17, 33})
        for (const int64_t out : {1, 8, 9, 16, 40})
          for (const Window& at : WINDOWS) {
            Problem p{"separable", 1 + (h + w) % 2, h, w, in, 0, out, at.kernel, at.sh, at.sw, at.pad, at.pad};
            p.between = ALL[turn++ % 3];
            check<BlockOp>(p, layouts, epilogues);
          }
}

void inverted_residual_cases() {
  const std::vector<Finish> epilogues = each({Activation::none, Activation::relu}, true);
  const std::vector<Layout> layouts{LAYOUTS[0], LAYOUTS[2], LAYOUTS[1]};
  uint64_t turn = 0;
  for (const int64_t h : {1, 2, 3, 5, 7, 8, 15, 29})
    for (const int64_t w : {1, 2, 4, 7, 15})
      for (const int64_t in : {1, 8, 17})
        for (const int64_t middle : {6, 16, 33, 72})
          for (const int64_t out : {8, 9, 24})
            for (const Window& at : WINDOWS) {
              Problem p{"inverted_residual", 1 + (h + w) % 2, h, w, in, middle, out, at.kernel, at.sh, at.sw, at.pad, at.pad};
              p.between = ALL[turn++ % 3];
              check<BlockOp>(p, layouts, epilogues);
            }
  // Weights that do not fit L2: a thread takes its images together.
  for (const auto& [h, w] : {std::array<int64_t, 2>{7, 7}, {4, 5}, {3, 3}})
    for (const int64_t in : {64, 70})
      for (const int64_t n : {5, 7})
        for (const Window& at : WINDOWS) {
          Problem p{"inverted_residual", n, h, w, in, 640, 160, at.kernel, at.sh, at.sw, at.pad, at.pad};
          p.between = ALL[turn++ % 3];
          check<BlockOp>(p, {LAYOUTS[0], LAYOUTS[2]}, each({Activation::none}, true));
        }
}

struct Lattice {
  const char* op;
  void (*run)();
};
constexpr Lattice LATTICES[] = {
    {"depthwise", depthwise_cases}, {"pointwise", pointwise_cases}, {"strassen", strassen_cases},
    {"digits", digits_cases},       {"stem", stem_cases},           {"fire_expand", fire_expand_cases},
    {"fire", fire_cases},           {"separable", separable_cases}, {"inverted_residual", inverted_residual_cases}};

void usage(const char* wrong) {
  std::fprintf(stderr, "exact: %s; see tests/core/exact.cpp\n", wrong);
  std::exit(2);
}

}  // namespace

int main(int count, char** arguments) {
  for (int i = 1; i < count; ++i) {
    const std::string name = arguments[i];
    const auto value = [&] { return i + 1 < count ? arguments[++i] : (usage((name + " needs a value").c_str()), nullptr); };
    if (name == "--list")
      options.list = true;
    else if (name == "--heap")
      options.heap = true;
    else if (name == "--threads")
      options.threads = true;
    else if (name == "--one-in")
      options.one_in = std::strtoull(value(), nullptr, 10);
    else if (name == "--seed")
      options.seed = std::strtoull(value(), nullptr, 10);
    else if (name == "--op")
      options.op = value();
    else if (name == "--isa")
      options.isa = value();
    else
      usage(("unknown argument " + name).c_str());
  }
  isas = options.isa.empty() ? supported_isas() : std::vector<std::string>{options.isa};
  set_isa(isas[0]);
  if (!options.heap)
    for (const int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) ::signal(number, on_fault);
  bool known = options.op.empty();
  for (const Lattice& lattice : LATTICES) {
    if (!options.op.empty() && options.op != lattice.op) continue;
    known = true;
    totals = Totals{{}, std::vector<Count>(isas.size()), 0};
    lattice.run();
    if (options.list) continue;
    std::sort(totals.cases.begin(), totals.cases.end());
    const auto distinct = std::unique(totals.cases.begin(), totals.cases.end()) - totals.cases.begin();
    for (size_t i = 0; i < isas.size(); ++i) {
      const Count& c = totals.of_isa[i];
      if (c.runs == 0) continue;
      std::printf("%s %s: %ld distinct cases, %ld runs, %ld border and %ld interior elements equal", lattice.op, isas[i].c_str(),
                  static_cast<long>(distinct), static_cast<long>(c.runs), static_cast<long>(c.border), static_cast<long>(c.interior));
      if (totals.worst > 0) std::printf(", Winograd within %.2f of its bound", static_cast<double>(totals.worst));
      std::printf("\n");
    }
    std::fflush(stdout);
  }
  if (!known) usage(("no operator " + options.op).c_str());
  return 0;
}
