// The kernel core without torch or Python: every kernel of every instruction set this CPU has, against plain loops, on integer-valued data,
// so that results must be equal. Prints one line an instruction set; exits with 1 at the first difference.
//
//   g++ -std=c++20 -O2 -I. tests/core/check_kernels.cpp kernels/cpu/{blocks,isa}.cpp OBJECTS && ./a.out

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/blocks.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/pack.h"

using namespace fastconv;

namespace {

constexpr float SENTINEL = -12345.0f;
std::mt19937 generator(7);
long cases = 0;

std::vector<float> integers(int64_t count) {
  std::uniform_int_distribution<int> pick(-4, 4);
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(pick(generator));
  return values;
}

void expect_equal(const std::string& what, const std::vector<float>& got, const std::vector<float>& wanted) {
  ++cases;
  for (size_t i = 0; i < wanted.size(); ++i)
    if (got[i] != wanted[i]) {
      std::printf("%s %s: element %zu is %g, wanted %g\n", kernels().isa, what.c_str(), i, got[i], wanted[i]);
      std::exit(1);
    }
}

// Winograd's error, against the largest output: 2e-6 to 3e-6 on random data, 1e-5 allowed here.
void expect_near(const std::string& what, const std::vector<float>& got, const std::vector<float>& wanted) {
  ++cases;
  float largest = 0;
  for (const float value : wanted) largest = std::fmax(largest, std::fabs(value));
  for (size_t i = 0; i < wanted.size(); ++i)
    if (!(std::fabs(got[i] - wanted[i]) <= 1e-5f * largest)) {
      std::printf("%s %s: element %zu is %g, wanted %g\n", kernels().isa, what.c_str(), i, got[i], wanted[i]);
      std::exit(1);
    }
}

// Blocked images, a pixel more than they need between blocks; what no channel stands in is NaN, which no result may show.
Strides blocked_strides(int64_t pixels) { return {PANEL, (pixels + 1) * PANEL}; }
std::vector<float> empty_blocks(int64_t pixels, int64_t channels) {
  return std::vector<float>(panels_for(channels) * blocked_strides(pixels).block, std::numeric_limits<float>::quiet_NaN());
}
std::vector<float> to_blocks(const std::vector<float>& x, int64_t pixels, int64_t channels) {
  std::vector<float> blocks = empty_blocks(pixels, channels);
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t c = 0; c < channels; ++c) blocks[blocked_strides(pixels).at(p, c)] = x[p * channels + c];
  return blocks;
}
std::vector<float> from_blocks(const std::vector<float>& blocks, int64_t pixels, int64_t channels) {
  std::vector<float> x(pixels * channels);
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t c = 0; c < channels; ++c) x[p * channels + c] = blocks[blocked_strides(pixels).at(p, c)];
  return x;
}

float relu6(float v) { return v < 0 ? 0 : v > 6 ? 6 : v; }

struct Shape {
  int64_t c, h, w, out, kernel, stride, pad;
  int64_t out_h() const { return (h + 2 * pad - kernel) / stride + 1; }
  int64_t out_w() const { return (w + 2 * pad - kernel) / stride + 1; }
  std::string name() const {
    return "c" + std::to_string(c) + " " + std::to_string(h) + "x" + std::to_string(w) + " out" + std::to_string(out) + " k" +
           std::to_string(kernel) + " s" + std::to_string(stride) + " p" + std::to_string(pad);
  }
};

// Dense or depthwise (groups = channels) convolution, channels innermost, weight (out, c or 1, k, k).
std::vector<float> convolve(const Shape& s, bool depthwise, const std::vector<float>& x, const std::vector<float>& weight,
                            const std::vector<float>& bias) {
  std::vector<float> y(s.out_h() * s.out_w() * s.out);
  for (int64_t oh = 0; oh < s.out_h(); ++oh)
    for (int64_t ow = 0; ow < s.out_w(); ++ow)
      for (int64_t n = 0; n < s.out; ++n) {
        float sum = bias[n];
        for (int64_t kh = 0; kh < s.kernel; ++kh)
          for (int64_t kw = 0; kw < s.kernel; ++kw) {
            const int64_t ih = oh * s.stride - s.pad + kh, iw = ow * s.stride - s.pad + kw;
            if (ih < 0 || ih >= s.h || iw < 0 || iw >= s.w) continue;
            const float* pixel = &x[(ih * s.w + iw) * s.c];
            if (depthwise) {
              sum += pixel[n] * weight[(n * s.kernel + kh) * s.kernel + kw];
            } else {
              for (int64_t c = 0; c < s.c; ++c) sum += pixel[c] * weight[((n * s.c + c) * s.kernel + kh) * s.kernel + kw];
            }
          }
        y[(oh * s.out_w() + ow) * s.out + n] = relu6(sum);
      }
  return y;
}

std::vector<float> panels_of(const std::vector<float>& weight, const Shape& s) {
  std::vector<float> panels(panels_for(s.out) * s.kernel * s.kernel * s.c * PANEL);
  pack_panels(weight.data(), s.out, s.c, s.kernel * s.kernel, panels.data());
  return panels;
}

void check_pointwise(int64_t pixels, int64_t in, int64_t out) {
  const Shape s{in, pixels, 1, out, 1, 1, 0};
  const auto x = integers(pixels * in), weight = integers(out * in), bias = integers(out), residual = integers(pixels * out);
  const auto panels = panels_of(weight, s);
  std::vector<float> y(pixels * out, SENTINEL), wanted(pixels * out);
  for (int64_t m = 0; m < pixels; ++m)
    for (int64_t n = 0; n < out; ++n) {
      float sum = bias[n] + residual[m * out + n];
      for (int64_t k = 0; k < in; ++k) sum += x[m * in + k] * weight[n * in + k];
      wanted[m * out + n] = relu6(sum);
    }
  kernels().pointwise({x.data(), in, in, out, panels.data(), {bias.data(), residual.data(), out, Activation::relu6}, y.data(), out},
                      {0, pixels}, {0, panels_for(out)});
  expect_equal("pointwise " + s.name(), y, wanted);
  const auto x_blocks = to_blocks(x, pixels, in), residual_blocks = to_blocks(residual, pixels, out);
  std::vector<float> blocks = empty_blocks(pixels, out);
  const Strides strides = blocked_strides(pixels);
  kernels().pointwise({x_blocks.data(),
                       strides,
                       in,
                       out,
                       panels.data(),
                       {bias.data(), residual_blocks.data(), strides, Activation::relu6},
                       blocks.data(),
                       strides},
                      {0, pixels}, {0, panels_for(out)});
  expect_equal("pointwise, blocked " + s.name(), from_blocks(blocks, pixels, out), wanted);
}

// Strassen's: strips of two pairs and three, every two panels by themselves, and the image's odd last pixel.
void check_strassen(int64_t pixels, int64_t in, int64_t out) {
  const auto x = integers(pixels * in), weight = integers(out * in), bias = integers(out), residual = integers(pixels * out);
  std::vector<float> y(pixels * out, SENTINEL), wanted(pixels * out), packed(StrassenWeights{nullptr, in, out}.floats());
  for (int64_t m = 0; m < pixels; ++m)
    for (int64_t n = 0; n < out; ++n) {
      float sum = bias[n] + residual[m * out + n];
      for (int64_t k = 0; k < in; ++k) sum += x[m * in + k] * weight[n * in + k];
      wanted[m * out + n] = relu6(sum);
    }
  pack_strassen(weight.data(), out, in, packed.data());
  Pointwise op{x.data(), in, in, out, packed.data(), {bias.data(), residual.data(), out, Activation::relu6}, y.data(), out};
  op.packing = Packing::strassen;
  op.pairs_within = pixels;
  const Range pairs = op.pairs({0, pixels});
  std::vector<float> transformed(kernels().strassen_floats(in, pairs.size())), scratch(kernels().strassen_scratch(in));
  for (int64_t pair = 0, count = 2; pair < pairs.end; pair += count, count = 5 - count) {
    const Range strip{pair, std::min(pair + count, pairs.end)};
    kernels().strassen_transform(op, strip, transformed.data());
    for (int64_t panel = 0; panel < panels_for(out); panel += 2)
      kernels().strassen_multiply(op, strip, {panel, std::min(panel + 2, panels_for(out))}, transformed.data(), scratch.data());
  }
  expect_equal("strassen " + std::to_string(pixels) + " pixels, " + std::to_string(in) + " to " + std::to_string(out), y, wanted);
}

void check_conv(const Shape& s) {
  const auto x = integers(s.h * s.w * s.c), weight = integers(s.out * s.c * s.kernel * s.kernel), bias = integers(s.out);
  const std::vector<float> zeros(s.c), panels = panels_of(weight, s), wanted = convolve(s, false, x, weight, bias);
  std::vector<float> y(wanted.size(), SENTINEL);
  const Epilogue epilogue{bias.data(), nullptr, 0, Activation::relu6};
  kernels().conv({x.data(), s.c, s.h, s.w, s.c, s.out, s.out_h(), s.out_w(), s.kernel, s.kernel, s.stride, s.stride, s.pad, s.pad,
                  panels.data(), zeros.data(), epilogue, y.data(), s.out},
                 {0, s.out_h() * s.out_w()}, {0, panels_for(s.out)});
  expect_equal("conv " + s.name(), y, wanted);
  if (s.c > 4) return;
  y.assign(wanted.size(), SENTINEL);
  const Stem stem{x.data(), 1,        s.w * s.c, s.c,      s.h,   s.w,   s.c,           s.out,    s.out_h(), s.out_w(),
                  s.kernel, s.kernel, s.stride,  s.stride, s.pad, s.pad, panels.data(), epilogue, y.data(),  s.out};
  std::vector<float> scratch(stem.scratch_floats());
  kernels().stem(stem, {0, s.out_h()}, scratch.data());
  expect_equal("stem " + s.name(), y, wanted);
  const int64_t pixels = s.out_h() * s.out_w();
  std::vector<float> blocks = empty_blocks(pixels, s.out);
  Stem to_blocked = stem;
  to_blocked.out = blocks.data();
  to_blocked.out_strides = blocked_strides(pixels);
  kernels().stem(to_blocked, {0, s.out_h()}, scratch.data());
  expect_equal("stem, blocked " + s.name(), from_blocks(blocks, pixels, s.out), wanted);
}

// A stem by Winograd, its rows in an order that makes the ring go back, and skip. Weights of multiples of 45 make every sum exact.
void check_stem_ring() {
  const Shape s{3, 61, 40, 20, 7, 2, 3};
  auto x = integers(s.h * s.w * s.c), weight = integers(s.out * s.c * 49), bias = integers(s.out);
  for (float& w : weight) w *= 45.0f / 1024;  // small enough for sums between relu6's bounds
  const std::vector<float> panels = panels_of(weight, s), wanted = convolve(s, false, x, weight, bias);
  std::vector<float> y(wanted.size(), SENTINEL), winograd(panels_for(s.out) * STEM_POINTS * 7 * STEM_PLANES * PANEL);
  pack_stem_winograd(weight.data(), s.out, 7, winograd.data());
  const Stem stem{x.data(), 1,        s.w * s.c,      s.c,       s.h,           s.w,
                  s.c,      s.out,    s.out_h(),      s.out_w(), s.kernel,      s.kernel,
                  s.stride, s.stride, s.pad,          s.pad,     panels.data(), {bias.data(), nullptr, 0, Activation::relu6},
                  y.data(), s.out,    winograd.data()};
  std::vector<float> memory(kernels().stem_ring_floats(stem)), scratch(stem.scratch_floats());
  StemRing ring;
  ring.data = memory.data();
  for (const Range rows : {Range{0, 20}, {4, 6}, {19, 31}, {10, 12}, {30, 31}, {0, 1}, {17, 18}, {1, 3}})
    kernels().stem_winograd(stem, rows, ring, scratch.data());
  expect_equal("stem by Winograd", y, wanted);
}

// 3x3, stride 1, padding 1, in a buffer with its zero border up to whole tiles: Winograd and the direct sum.
void check_padded(const Shape& s) {
  const auto x = integers(s.h * s.w * s.c), weight = integers(s.out * s.c * 9), bias = integers(s.out);
  const int64_t tiles_h = ceil_div(s.h, 4), tiles = tiles_h * ceil_div(s.w, 4), width = ceil_div(s.w, 4) * 4 + 2;
  std::vector<float> buffer((tiles_h * 4 + 2) * width * s.c), winograd(panels_for(s.out) * 36 * s.c * PANEL);
  for (int64_t h = 0; h < s.h; ++h)
    for (int64_t i = 0; i < s.w * s.c; ++i) buffer[((h + 1) * width + 1) * s.c + i] = x[h * s.w * s.c + i];
  const auto panels = panels_of(weight, s);
  pack_winograd(weight.data(), s.out, s.c, winograd.data());
  std::vector<float> unclamped(s.h * s.w * s.out), y(unclamped.size(), SENTINEL);
  PaddedConv op{buffer.data(),    s.c,  width * s.c, s.c, s.out, s.h, s.w, 3, 3, panels.data(), {bias.data(), nullptr, 0, Activation::none},
                unclamped.data(), s.out};
  kernels().padded_conv(op, {0, s.h}, {0, panels_for(s.out)});
  std::vector<float> clamped(unclamped);
  for (float& value : clamped) value = relu6(value);
  expect_equal("padded_conv " + s.name(), clamped, convolve(s, false, x, weight, bias));
  op.panels = winograd.data();
  op.out = y.data();
  std::vector<float> scratch(kernels().winograd_scratch(op, tiles));
  kernels().winograd(op, {0, tiles}, {0, panels_for(s.out)}, scratch.data());
  expect_near("winograd " + s.name(), y, unclamped);
  const int64_t pixels = s.h * s.w;
  std::vector<float> blocks = empty_blocks(pixels, s.out), transformed(kernels().winograd_transformed(op)), sums(kernels().winograd_sums);
  op.out = blocks.data();
  op.out_strides = blocked_strides(pixels);
  for (int64_t t = 0; t < tiles; ++t) kernels().winograd_transform(op, {t, t + 1}, transformed.data());
  for (int64_t panel = 0; panel < panels_for(s.out); ++panel)
    kernels().winograd_multiply(op, {0, tiles}, {panel, panel + 1}, transformed.data(), sums.data());
  expect_equal("winograd in two steps, blocked " + s.name(), from_blocks(blocks, pixels, s.out), y);
}

void check_depthwise(const Shape& s) {
  const auto x = integers(s.h * s.w * s.c), weight = integers(s.c * s.kernel * s.kernel), bias = integers(s.c);
  std::vector<float> taps(weight.size());
  pack_taps(weight.data(), s.c, s.kernel * s.kernel, taps.data());
  const std::vector<float> wanted = convolve(s, true, x, weight, bias);
  std::vector<float> y(wanted.size(), SENTINEL);
  kernels().depthwise({x.data(), s.c, s.w * s.c, s.h, s.h, s.w, s.c, s.out_w(), s.kernel, s.stride, s.stride, s.pad, s.pad, taps.data(),
                       bias.data(), Activation::relu6, y.data(), s.c, s.out_w() * s.c},
                      {0, s.out_h()}, {0, s.c});
  expect_equal("depthwise " + s.name(), y, wanted);
  const int64_t pixels = s.h * s.w, out_pixels = s.out_h() * s.out_w();
  const auto x_blocks = to_blocks(x, pixels, s.c);
  std::vector<float> blocks = empty_blocks(out_pixels, s.c);
  kernels().depthwise(
      {x_blocks.data(), blocked_strides(pixels), s.w * PANEL, s.h, s.h, s.w, s.c, s.out_w(), s.kernel, s.stride, s.stride, s.pad, s.pad,
       taps.data(), bias.data(), Activation::relu6, blocks.data(), blocked_strides(out_pixels), s.out_w() * PANEL},
      {0, s.out_h()}, {0, s.c});
  expect_equal("depthwise, blocked " + s.name(), from_blocks(blocks, out_pixels, s.c), wanted);
}

// 3x3 maxima with a NaN and an infinity in the image, padding up to 1.
void check_max_pool(const Shape& s) {
  auto x = integers(s.h * s.w * s.c);
  x[x.size() / 2] = std::numeric_limits<float>::quiet_NaN();
  x[x.size() / 3] = std::numeric_limits<float>::infinity();
  const int64_t pixels = s.h * s.w, out_pixels = s.out_h() * s.out_w();
  std::vector<float> wanted(out_pixels * s.c), y(wanted.size(), SENTINEL), blocks = empty_blocks(out_pixels, s.c);
  for (int64_t oh = 0; oh < s.out_h(); ++oh)
    for (int64_t ow = 0; ow < s.out_w(); ++ow)
      for (int64_t c = 0; c < s.c; ++c) {
        float most = -std::numeric_limits<float>::infinity();
        for (int64_t ih = oh * s.stride - s.pad; ih < oh * s.stride - s.pad + 3; ++ih)
          for (int64_t iw = ow * s.stride - s.pad; iw < ow * s.stride - s.pad + 3; ++iw)
            if (ih >= 0 && ih < s.h && iw >= 0 && iw < s.w) {
              const float value = x[(ih * s.w + iw) * s.c + c];
              most = std::isnan(most) || most > value ? most : value;
            }
        wanted[(oh * s.out_w() + ow) * s.c + c] = most;
      }
  const auto same = [&](const char* what, std::vector<float> got) {
    std::vector<float> all = wanted;
    for (std::vector<float>* values : {&got, &all})
      for (float& value : *values) value = std::isnan(value) ? SENTINEL / 2 : value;
    expect_equal(what + s.name(), got, all);
  };
  kernels().max_pool({x.data(), s.c, s.w * s.c, s.h, s.h, s.w, s.c, s.out_w(), s.stride, s.stride, s.pad, s.pad, y.data(), s.c},
                     {0, s.out_h()});
  same("max_pool ", y);
  const auto x_blocks = to_blocks(x, pixels, s.c);
  kernels().max_pool({x_blocks.data(), blocked_strides(pixels), s.w * PANEL, s.h, s.h, s.w, s.c, s.out_w(), s.stride, s.stride, s.pad,
                      s.pad, blocks.data(), blocked_strides(out_pixels)},
                     {0, s.out_h()});
  same("max_pool, blocked ", from_blocks(blocks, out_pixels, s.c));
}

}  // namespace

int main() {
  const int64_t channels[] = {1, 3, 4, 7, 8, 9, 15, 16, 17, 24, 31, 33, 40, 64, 72, 100};
  for (const std::string& isa : supported_isas()) {
    set_isa(isa);
    cases = 0;
    for (const int64_t in : channels)
      for (const int64_t out : channels)
        for (const int64_t pixels : {1, 5, 13, 14, 29}) check_pointwise(pixels, in, out);
    for (const int64_t c : channels)
      for (const int64_t size : {1, 2, 5, 7, 16})
        for (const int64_t kernel : {3, 5})
          for (const int64_t stride : {1, 2})
            for (const int64_t pad : {int64_t{0}, kernel / 2, kernel - 1}) {
              const Shape depthwise{c, size, size + 1, c, kernel, stride, pad};
              if (size + 2 * pad < kernel) continue;
              check_depthwise(depthwise);
              if (kernel == 3 && pad <= 1) check_max_pool(depthwise);
              if (c <= 17) check_conv({c, size, size + 1, c + 2, kernel, stride, pad});
            }
    for (const int64_t c : channels)
      for (const int64_t out : {1, 16, 24, 40, 64})
        for (const int64_t size : {1, 4, 7, 13}) check_padded({c, size, size + 2, out, 3, 1, 1});
    const std::mt19937 before = generator;  // the others' data stay: what Winograd's error is of the largest output depends on them
    for (const int64_t pixels : {1, 2, 7, 30})
      for (const int64_t in : {32, 96})
        for (const int64_t out : {8, 32, 41, 120}) check_strassen(pixels, in, out);
    generator = before;
    check_stem_ring();
    std::printf("%s: %ld cases equal\n", isa.c_str(), cases);
  }
  return 0;
}
