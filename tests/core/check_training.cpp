// What trains a first convolution and a 1x1, without torch: the windows that the first reads, and its gradients behind a max-pool; the
// gradients of the second. Against plain loops on values whose sums float32 has exactly, in buffers of their own size, which the address
// sanitizer watches. Prints one line an instruction set; exits with 1 at the first difference.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/pack.h"
#include "kernels/cpu/training.h"

using namespace fastconv;

namespace {

std::mt19937 generator(11);

// Blocks of malloc, so that a sanitizer sees where they end.
struct Floats {
  std::unique_ptr<float[]> data;
  int64_t size;
  explicit Floats(int64_t size) : data(new float[size]), size(size) {}
  float& operator[](int64_t i) const { return data[i]; }
  float* get() const { return data.get(); }
};
Floats quarters(int64_t size) {
  std::uniform_int_distribution<int> pick(-8, 8);
  Floats values(size);
  for (int64_t i = 0; i < size; ++i) values[i] = pick(generator) / 4.0f;
  return values;
}

struct Case {
  int64_t kernel, channels, stride, pad, outputs, height, width, pool_stride, pool_pad;
};

void fail(const Case& c, const char* what) {
  std::printf("%s: %s, kernel %ld channels %ld stride %ld pad %ld outputs %ld image %ld x %ld pool stride %ld pad %ld\n", kernels().isa,
              what, c.kernel, c.channels, c.stride, c.pad, c.outputs, c.height, c.width, c.pool_stride, c.pool_pad);
  std::exit(1);
}

int64_t extent(int64_t size, int64_t kernel, int64_t stride, int64_t pad) { return (size + 2 * pad - kernel) / stride + 1; }

void check(const Case& c) {
  const int64_t batch = 2, depth = c.kernel * c.kernel * c.channels, whole = panels_for(depth) * PANEL;
  const int64_t oh = extent(c.height, c.kernel, c.stride, c.pad), ow = extent(c.width, c.kernel, c.stride, c.pad), pixels = oh * ow;
  const int64_t ph = extent(oh, 3, c.pool_stride, c.pool_pad), pw = extent(ow, 3, c.pool_stride, c.pool_pad);
  const Floats x = quarters(batch * c.height * c.width * c.channels), dz = quarters(batch * ph * pw * c.outputs),
               bias = quarters(c.outputs);
  const Windows geometry{x.get(), c.height, c.width, c.channels, oh, ow, c.kernel, c.kernel, c.stride, c.stride, c.pad, c.pad};
  const WindowRows windows(geometry);

  std::vector<float> wanted(batch * pixels * depth);
  for (int64_t p = 0; p < batch * pixels; ++p)
    for (int64_t k = 0; k < depth; ++k) {
      const int64_t h = p % pixels / ow * c.stride - c.pad + k / c.channels / c.kernel;
      const int64_t w = p % ow * c.stride - c.pad + k / c.channels % c.kernel;
      const bool inside = h >= 0 && w >= 0 && h < c.height && w < c.width;
      wanted[p * depth + k] = inside ? x[((p / pixels * c.height + h) * c.width + w) * c.channels + k % c.channels] : 0.0f;
    }
  for (const int64_t stride : {whole, (panels_for(depth) | 1) * PANEL, whole + 2 * PANEL}) {  // with room for whole lines, and without
    const Floats rows(batch * pixels * stride);
    windows.rows({0, batch * pixels}, rows.get(), stride);
    for (int64_t p = 0; p < batch * pixels; ++p)
      for (int64_t k = 0; k < whole; ++k)
        if (rows[p * stride + k] != (k < depth ? wanted[p * depth + k] : 0.0f)) fail(c, "a window");
  }

  // weights are 1/4 everywhere, whatever the order they are packed in
  const std::vector<float> panels(panels_for(c.outputs) * depth * PANEL, 0.25f);
  const Floats dweight(c.outputs * depth), dbias(c.outputs);
  const Stem stem{x.get(),
                  1,
                  c.width * c.channels,
                  c.channels,
                  c.height,
                  c.width,
                  c.channels,
                  c.outputs,
                  oh,
                  ow,
                  c.kernel,
                  c.kernel,
                  c.stride,
                  c.stride,
                  c.pad,
                  c.pad,
                  panels.data(),
                  {bias.get(), nullptr, 0, Activation::relu},
                  nullptr,
                  {}};
  run_stem_pool_backward({batch,
                          c.height * c.width * c.channels,
                          stem,
                          geometry,
                          {nullptr, dz.get(), oh, ow, c.outputs, ph, pw, c.pool_stride, c.pool_stride, c.pool_pad, c.pool_pad, nullptr},
                          dweight.get(),
                          dbias.get()},
                         Parallel{});

  std::vector<double> sums(batch * pixels), gradient(c.outputs * depth), biases(c.outputs);
  for (int64_t p = 0; p < batch * pixels; ++p)
    for (int64_t k = 0; k < depth; ++k) sums[p] += 0.25 * wanted[p * depth + k];
  for (int64_t o = 0; o < c.outputs; ++o)
    for (int64_t q = 0; q < batch * ph * pw; ++q) {
      int64_t best = -1;
      for (int64_t i = 0; i < 9; ++i) {
        const int64_t h = q % (ph * pw) / pw * c.pool_stride - c.pool_pad + i / 3, w = q % pw * c.pool_stride - c.pool_pad + i % 3;
        if (h < 0 || w < 0 || h >= oh || w >= ow) continue;
        const int64_t p = q / (ph * pw) * pixels + h * ow + w;
        if (best < 0 || std::max(sums[p] + bias[o], 0.0) > std::max(sums[best] + bias[o], 0.0)) best = p;
      }
      if (sums[best] + bias[o] <= 0) continue;
      biases[o] += dz[q * c.outputs + o];
      for (int64_t k = 0; k < depth; ++k) gradient[o * depth + k] += static_cast<double>(dz[q * c.outputs + o]) * wanted[best * depth + k];
    }
  for (int64_t o = 0; o < c.outputs; ++o) {
    if (dbias[o] != biases[o]) fail(c, "the bias's gradient");
    for (int64_t k = 0; k < depth; ++k)
      if (dweight[o * depth + k] != gradient[o * depth + k]) fail(c, "the weights' gradient");
  }
}

// Gradients of y = relu(weight x + bias), with a residual added to the input's or not.
void check_product(int64_t pixels, int64_t inputs, int64_t outputs, bool added) {
  const Floats x = quarters(pixels * inputs), y = quarters(pixels * outputs), dz = quarters(pixels * outputs),
               weight = quarters(inputs * outputs), residual = quarters(pixels * inputs);
  const Floats dweight(outputs * inputs), dbias(outputs), dx(pixels * inputs), panels(panels_for(inputs) * outputs * PANEL);
  const std::vector<float> zeros(inputs);
  pack_panels(weight.get(), inputs, outputs, 1, panels.get());  // (inputs, outputs), as the gradient's product has it
  const Gradient gradient{dz.get(), outputs,          nullptr, y.get(), outputs, outputs, nullptr,
                          nullptr,  Activation::relu, nullptr, nullptr, nullptr, nullptr};
  const PixelRows rows({x.get(), inputs, inputs, nullptr, nullptr, Activation::none, nullptr}, pixels);
  run_product_backward({1,
                        pixels,
                        gradient,
                        &rows,
                        dweight.get(),
                        dbias.get(),
                        panels.get(),
                        zeros.data(),
                        added ? residual.get() : nullptr,
                        dx.get(),
                        inputs,
                        {Through::nothing, {}, nullptr, nullptr}},
                       Parallel{});
  const auto wrong = [&](const char* what) {
    std::printf("%s: %s, %ld pixels %ld inputs %ld outputs residual %d\n", kernels().isa, what, pixels, inputs, outputs, added);
    std::exit(1);
  };
  std::vector<double> sums(outputs * inputs), biases(outputs), back(pixels * inputs);
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t n = 0; n < outputs; ++n) {
      if (y[p * outputs + n] <= 0) continue;
      const double d = dz[p * outputs + n];
      biases[n] += d;
      for (int64_t k = 0; k < inputs; ++k) {
        sums[n * inputs + k] += d * x[p * inputs + k];
        back[p * inputs + k] += d * weight[k * outputs + n];
      }
    }
  for (int64_t n = 0; n < outputs; ++n)
    if (dbias[n] != biases[n]) wrong("the bias's gradient");
  for (int64_t i = 0; i < outputs * inputs; ++i)
    if (dweight[i] != sums[i]) wrong("the weights' gradient");
  for (int64_t i = 0; i < pixels * inputs; ++i)
    if (dx[i] != back[i] + (added ? residual[i] : 0.0f)) wrong("the input's gradient");
}

}  // namespace

int main() {
  for (const std::string& isa : supported_isas()) {
    set_isa(isa);
    long cases = 0;
    int64_t number = 0;
    for (const int64_t kernel : {2, 3, 5, 7})
      for (const int64_t channels : {1, 2, 3, 4})
        for (const int64_t stride : {1, 2, 3})
          for (const int64_t pad : {0, 1})
            for (const int64_t outputs : {1, 16, 24, 65})
              for (const auto& [height, width] : {std::pair<int64_t, int64_t>{9, 9}, {15, 40}, {29, 250}})
                for (const int64_t pool_stride : {1, 2, 3})
                  for (const int64_t pool_pad : {0, 1}) {
                    if (++number % 11) continue;  // one in eleven, which meets every value beside every other
                    const Case c{kernel, channels, stride, pad, outputs, height, width, pool_stride, pool_pad};
                    if (extent(height, kernel, stride, pad) < 3 || extent(width, kernel, stride, pad) < 3) continue;
                    check(c);
                    ++cases;
                  }
    for (const int64_t pixels : {1, 13, 57, 460})
      for (const int64_t inputs : {1, 3, 16, 24, 33, 48, 72, 130})
        for (const int64_t outputs : {1, 7, 8, 9, 16, 31, 65}) {
          check_product(pixels, inputs, outputs, cases % 2);
          ++cases;
        }
    check_product(470, 520, 601, true);  // more than 2^18 weights, whose strips are longer
    std::printf("%s: %ld cases equal\n", isa.c_str(), cases + 1);
  }
  return 0;
}
