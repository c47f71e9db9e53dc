// Training: what lies between the products. Included per ISA.
//
// Every loop takes four pixels at a time, so that a channel's constants are loaded once for four vectors of the image: these kernels run at
// the speed of the memory that feeds them. (Arguments are copied first: a store of floats could change what a reference refers to.)
#pragma once

#include "kernels/cpu/epilogue.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/tile.h"

namespace fastconv::FASTCONV_ISA {

constexpr int64_t AHEAD_PIXELS = 8;
FASTCONV_INLINE void prefetch(const float* p) { __builtin_prefetch(p, 0, 3); }

template <int N, class F>
FASTCONV_INLINE void repeat(F f) {
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) f(i);
}

// f(PIXELS, WHOLE, pixel, channel, lanes) over pixels x channels; WHOLE: the vector is full.
template <class F>
FASTCONV_INLINE void for_pixels(int64_t pixels, int64_t channels, F f) {
  const auto row = [&](auto PIXELS, int64_t p) FASTCONV_LAMBDA_INLINE {
    int64_t c = 0;
    for (; c + W <= channels; c += W) f(PIXELS, std::true_type{}, p, c, W);
    if (c < channels) f(PIXELS, std::false_type{}, p, c, static_cast<int>(channels - c));
  };
  int64_t p = 0;
  for (; p + 4 <= pixels; p += 4) row(std::integral_constant<int, 4>{}, p);
  for (; p < pixels; ++p) row(std::integral_constant<int, 1>{}, p);
}
template <bool WHOLE>
FASTCONV_INLINE vec load_lanes(const float* p, int lanes) {
  if constexpr (WHOLE) return load(p);
  return load_first(p, lanes);
}
template <bool WHOLE>
FASTCONV_INLINE void store_lanes(float* p, vec v, int lanes) {
  if constexpr (WHOLE)
    store(p, v);
  else
    store_first(p, v, lanes);
}
template <bool WHOLE>
FASTCONV_INLINE void add_lanes(float* p, vec v, int lanes) {
  store_lanes<WHOLE>(p, load_lanes<WHOLE>(p, lanes) + v, lanes);
}

template <class F>
FASTCONV_INLINE void with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::none:
      return f(std::integral_constant<Activation, Activation::none>{});
    case Activation::relu:
      return f(std::integral_constant<Activation, Activation::relu>{});
    case Activation::relu6:
      return f(std::integral_constant<Activation, Activation::relu6>{});
    case Activation::hardswish:
      return f(std::integral_constant<Activation, Activation::hardswish>{});
    case Activation::hardsigmoid:
      return f(std::integral_constant<Activation, Activation::hardsigmoid>{});
    default:
      return f(std::integral_constant<Activation, Activation::silu>{});
  }
}

template <Activation A>
FASTCONV_INLINE vec value_at(vec t) {
  if constexpr (A == Activation::none) return t;
  return activate(t, A);
}

// dz * activation'(t), at the kinks and at NaN as ATen.
template <Activation A>
FASTCONV_INLINE vec through_slope(vec dz, vec t) {
  if constexpr (A == Activation::relu) return t <= 0.0f ? vec{} : dz;
  if constexpr (A == Activation::relu6) return ((t > 0.0f) & (t < 6.0f)) ? dz : vec{};
  if constexpr (A == Activation::hardswish) {
    const vec middle = dz * (t * (1.0f / 3.0f) + 0.5f);
    const vec y = t >= 3.0f ? dz : middle;
    return t <= -3.0f ? vec{} : y;
  }
  if constexpr (A == Activation::hardsigmoid) return ((t > -3.0f) & (t < 3.0f)) ? dz * (1.0f / 6.0f) : vec{};
  if constexpr (A == Activation::silu) {
    const vec s = activate(t, Activation::sigmoid);
    return dz * s * (1.0f + t * (1.0f - s));
  }
  return dz;
}

// scale * y + shift, or y.
template <bool WHOLE>
struct Normalize {
  vec scale, shift;
  bool plain;
  FASTCONV_INLINE Normalize(const float* scales, const float* shifts, int64_t c, int lanes) : plain(!scales) {
    scale = plain ? vec{} : load_lanes<WHOLE>(scales + c, lanes);
    shift = plain ? vec{} : load_lanes<WHOLE>(shifts + c, lanes);
  }
  FASTCONV_INLINE vec operator()(vec y) const { return plain ? y : y * scale + shift; }
};

inline void activated(const Activated& op, int64_t pixels, float* to, Strides to_strides) {
  const Activated in = op;
  with_activation(in.scale ? in.activation : Activation::none, [&](auto A) {
    for_pixels(pixels, in.channels, [&](auto PIXELS, auto WHOLE, int64_t p, int64_t c, int lanes) FASTCONV_LAMBDA_INLINE {
      const Normalize<WHOLE> normalize(in.scale, in.shift, c, lanes);
      const vec gate = in.gate ? load_lanes<WHOLE>(in.gate + c, lanes) : splat(1.0f);
      repeat<PIXELS>([&](int i) FASTCONV_LAMBDA_INLINE {
        prefetch(in.y + (p + i + AHEAD_PIXELS) * in.stride + c);
        const vec y = load_lanes<WHOLE>(in.y + (p + i) * in.stride + c, lanes);
        store(to + to_strides.at(p + i, c), value_at<A>(normalize(y)) * gate);
      });
    });
  });
}

inline void activated_exactly(const Activated& op, int64_t pixels, const float* residual, int64_t residual_stride, float* to,
                              int64_t to_stride) {
  const Activated in = op;
  with_activation(in.scale ? in.activation : Activation::none, [&](auto A) {
    for_pixels(pixels, in.channels, [&](auto PIXELS, auto WHOLE, int64_t p, int64_t c, int lanes) FASTCONV_LAMBDA_INLINE {
      const Normalize<WHOLE> normalize(in.scale, in.shift, c, lanes);
      repeat<PIXELS>([&](int i) FASTCONV_LAMBDA_INLINE {
        vec z = value_at<A>(normalize(load_lanes<WHOLE>(in.y + (p + i) * in.stride + c, lanes)));
        if (residual) z += load_lanes<WHOLE>(residual + (p + i) * residual_stride + c, lanes);
        store_lanes<WHOLE>(to + (p + i) * to_stride + c, z, lanes);
      });
    });
  });
}

// About the mean of a few first pixels, so that a mean far from zero cancels nothing and sums stay small.
inline void moments(const float* y, int64_t stride, int64_t pixels, int64_t channels, float* mean, float* squares) {
  constexpr int64_t FIRST = 16;
  const float each = 1.0f / static_cast<float>(pixels);
  for (int64_t c = 0; c < channels; c += W) {
    const int64_t lanes = channels - c, first = pixels < FIRST ? pixels : FIRST;
    const auto at = [&](int64_t p) FASTCONV_LAMBDA_INLINE { return load_up_to(y + p * stride + c, lanes); };
    vec origin{};
    for (int64_t p = 0; p < first; ++p) origin += at(p);
    origin *= 1.0f / static_cast<float>(first);
    vec sum[4]{}, square[4]{};
    const auto add = [&](int i, int64_t p) FASTCONV_LAMBDA_INLINE {
      const vec d = at(p) - origin;
      sum[i] += d;
      square[i] += d * d;
    };
    int64_t p = 0;
    for (; p + 4 <= pixels; p += 4) repeat<4>([&](int i) FASTCONV_LAMBDA_INLINE { add(i, p + i); });
    for (; p < pixels; ++p) add(0, p);
    const vec sums = (sum[0] + sum[1]) + (sum[2] + sum[3]), all = (square[0] + square[1]) + (square[2] + square[3]);
    store_up_to(mean + c, origin + sums * each, lanes);
    store_up_to(squares + c, all - sums * sums * each, lanes);
  }
}

// dz' of PIXELS pixels, and y: f(i, dz', y).
template <Activation A, int PIXELS, bool WHOLE, class F>
FASTCONV_INLINE void activation_gradients(const Gradient g, int64_t p, int64_t c, int lanes, F f) {
  const Normalize<WHOLE> normalize(g.scale, g.shift, c, lanes);
  const vec add = g.add ? load_lanes<WHOLE>(g.add + c, lanes) : vec{};
  repeat<PIXELS>([&](int i) FASTCONV_LAMBDA_INLINE {
    prefetch(g.y + (p + i + AHEAD_PIXELS) * g.y_stride + c);
    prefetch(g.dz + (p + i + AHEAD_PIXELS) * g.dz_stride + c);
    const vec y = load_lanes<WHOLE>(g.y + (p + i) * g.y_stride + c, lanes);
    const vec dz = load_lanes<WHOLE>(g.dz + (p + i) * g.dz_stride + c, lanes) + add;
    f(i, through_slope<A>(dz, normalize(y)), y);
  });
}

inline void gradient(const Gradient& op, int64_t pixels, float* to, Strides to_strides) {
  const Gradient g = op;
  with_activation(g.activation, [&](auto A) {
    for_pixels(pixels, g.channels, [&](auto PIXELS, auto WHOLE, int64_t p, int64_t c, int lanes) FASTCONV_LAMBDA_INLINE {
      if (g.factor) {
        const vec factor = load_lanes<WHOLE>(g.factor + c, lanes), offset = load_lanes<WHOLE>(g.offset + c, lanes);
        const vec mean = load_lanes<WHOLE>(g.mean + c, lanes), slope = load_lanes<WHOLE>(g.slope + c, lanes);
        activation_gradients<A, PIXELS, WHOLE>(g, p, c, lanes, [&](int i, vec dz, vec y) FASTCONV_LAMBDA_INLINE {
          store(to + to_strides.at(p + i, c), factor * ((dz - offset) - (y - mean) * slope));
        });
      } else {
        activation_gradients<A, PIXELS, WHOLE>(g, p, c, lanes,
                                               [&](int i, vec dz, vec) FASTCONV_LAMBDA_INLINE { store(to + to_strides.at(p + i, c), dz); });
      }
    });
  });
}

inline void gradient_sums(const Gradient& op, int64_t pixels, const float* mean, float* sums, float* products) {
  const Gradient g = op;
  with_activation(g.activation, [&](auto A) {
    for_pixels(pixels, g.channels, [&](auto PIXELS, auto WHOLE, int64_t p, int64_t c, int lanes) FASTCONV_LAMBDA_INLINE {
      const vec middle = mean ? load_lanes<WHOLE>(mean + c, lanes) : vec{};
      vec sum{}, product{};
      activation_gradients<A, PIXELS, WHOLE>(g, p, c, lanes, [&](int, vec dz, vec y) FASTCONV_LAMBDA_INLINE {
        sum += dz;
        product += dz * (y - middle);
      });
      add_lanes<WHOLE>(sums + c, sum, lanes);
      add_lanes<WHOLE>(products + c, product, lanes);
    });
  });
}

inline void through_activation(const Activated& op, int64_t pixels, const float* mean, float* dz, int64_t dz_stride, float* sums,
                               float* products) {
  const Activated in = op;
  with_activation(in.activation, [&](auto A) {
    for_pixels(pixels, in.channels, [&](auto PIXELS, auto WHOLE, int64_t p, int64_t c, int lanes) FASTCONV_LAMBDA_INLINE {
      const Normalize<WHOLE> normalize(in.scale, in.shift, c, lanes);
      const vec middle = mean ? load_lanes<WHOLE>(mean + c, lanes) : vec{};
      vec sum{}, product{};
      repeat<PIXELS>([&](int i) FASTCONV_LAMBDA_INLINE {
        float* const at = dz + (p + i) * dz_stride + c;
        prefetch(in.y + (p + i + AHEAD_PIXELS) * in.stride + c);
        const vec y = load_lanes<WHOLE>(in.y + (p + i) * in.stride + c, lanes);
        const vec d = through_slope<A>(load_lanes<WHOLE>(at, lanes), normalize(y));
        store_lanes<WHOLE>(at, d, lanes);
        sum += d;
        product += d * (y - middle);
      });
      add_lanes<WHOLE>(sums + c, sum, lanes);
      add_lanes<WHOLE>(products + c, product, lanes);
    });
  });
}

inline void through_gate(const Activated& op, int64_t pixels, float* dz, int64_t dz_stride, float* gate_sums) {
  const Activated in = op;
  with_activation(in.activation, [&](auto A) {
    for_pixels(pixels, in.channels, [&](auto PIXELS, auto WHOLE, int64_t p, int64_t c, int lanes) FASTCONV_LAMBDA_INLINE {
      const Normalize<WHOLE> normalize(in.scale, in.shift, c, lanes);
      const vec gate = load_lanes<WHOLE>(in.gate + c, lanes);
      vec sum{};
      repeat<PIXELS>([&](int i) FASTCONV_LAMBDA_INLINE {
        float* const at = dz + (p + i) * dz_stride + c;
        const vec d = load_lanes<WHOLE>(at, lanes);
        sum += d * value_at<A>(normalize(load_lanes<WHOLE>(in.y + (p + i) * in.stride + c, lanes)));
        store_lanes<WHOLE>(at, d * gate, lanes);
      });
      add_lanes<WHOLE>(gate_sums + c, sum, lanes);
    });
  });
}

// Tiles of the product, outputs x inputs, stay in registers over all rows: 8x48, 8x32 and 16x16 on AVX-512. A tile's outputs lie in one
// block of 16, so that blocked gradients are read line after line (1000 x 512 over 112 rows: 152 GFLOP/s, with gradients a page apart 134).
constexpr int PRODUCT_NV = 3;
template <int NV>
constexpr int product_rows() {
  if constexpr (REGISTERS == 32) return NV == 1 ? 16 : 8;
  return NV == 1 ? 8 : 4;
}
// Returns what is left of `soon`.
template <int MR, int NV>
__attribute__((noinline)) Fetch product_gradient_tile(const ProductGradient& op, int64_t n, int64_t k, Fetch soon, int64_t soon_a_row) {
  vec sum[MR][NV];
  float* const to = op.sums + n * op.sums_stride + k;
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[r][v] = load(to + r * op.sums_stride + v * W);
  const float *dy = op.dy + op.dy_strides.at(0, n), *z[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) z[v] = op.z + op.z_strides.at(0, k + v * W);
  const int64_t dy_pixel = op.dy_strides.pixel, z_pixel = op.z_strides.pixel;
  for (int64_t row = 0; row < op.rows; ++row, dy += dy_pixel) {
    vec inputs[NV + 1];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      inputs[v] = load(z[v]);
      z[v] += z_pixel;
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) multiply_add<NV>(sum[r], dy + r, inputs);
    if (soon.begin < soon.end) {
      for (int64_t i = 0; i < soon_a_row; i += PANEL) __builtin_prefetch(soon.begin + i, 0, 2);
      soon.begin += soon_a_row;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(to + r * op.sums_stride + v * W, sum[r][v]);
  return soon;
}

// f(NV, first input) over all inputs.
template <class F>
FASTCONV_INLINE void for_product_chunks(int64_t inputs, F f) {
  const int64_t vectors = ceil_div(inputs, W);
  for (int64_t v = 0; v < vectors;) {
    const int64_t left = vectors - v, nv = left == PRODUCT_NV + 1 ? 2 : left < PRODUCT_NV ? left : PRODUCT_NV;
    with_constant<PRODUCT_NV>(nv, [&](auto NV) { f(NV, v * W); });
    v += nv;
  }
}

inline void product_gradient(const ProductGradient& op) {
  if (op.rows == 0) return;
  int64_t tiles = 0;
  for_product_chunks(op.inputs, [&](auto NV, int64_t) { tiles += ceil_div(op.outputs, product_rows<NV>()); });
  Fetch soon = op.soon;
  const int64_t soon_a_row = ceil_div(soon.size(), tiles * op.rows * PANEL) * PANEL;
  for_product_chunks(op.inputs, [&](auto NV, int64_t k) {
    constexpr int MOST = product_rows<NV>();
    int64_t n = 0;
    for (; n + MOST <= op.outputs; n += MOST) soon = product_gradient_tile<MOST, NV>(op, n, k, soon, soon_a_row);
    if (n < op.outputs)
      with_constant<MOST>(op.outputs - n, [&](auto MR) { soon = product_gradient_tile<MR, NV>(op, n, k, soon, soon_a_row); });
  });
}

// One output row under one row of taps: each input pixel meets K outputs, or K / 2.
template <int K>
FASTCONV_INLINE void depthwise_gradient_row(const float* z, const float* dy, int64_t width, int64_t out_width, int64_t stride, int64_t pad,
                                            float* sums, int64_t sums_stride) {
  vec sum[2][K];
#pragma GCC unroll 8
  for (int kw = 0; kw < K; ++kw) sum[0][kw] = load(sums + kw * sums_stride), sum[1][kw] = vec{};
  // Outputs whose taps are all inside the image.
  const int64_t first = ceil_div(pad, stride), end = width + pad < K ? 0 : (width + pad - K) / stride + 1;
  const auto edge = [&](int64_t begin, int64_t end) {
    for (int64_t ow = begin; ow < end; ++ow) {
      const vec d = load(dy + ow * stride * PANEL);
#pragma GCC unroll 8
      for (int kw = 0; kw < K; ++kw) {
        const int64_t w = ow * stride - pad + kw;
        if (w >= 0 && w < width) sum[0][kw] += d * load(z + w * PANEL);
      }
    }
  };
  const int64_t inner_begin = first < out_width ? first : out_width;
  const int64_t inner_end = end < out_width ? (end > inner_begin ? end : inner_begin) : out_width;
  edge(0, inner_begin);
  int64_t ow = inner_begin;
  const auto inner = [&](int which, int64_t ow) FASTCONV_LAMBDA_INLINE {
    const vec d = load(dy + ow * stride * PANEL);
    const float* const x = z + (ow * stride - pad) * PANEL;
#pragma GCC unroll 8
    for (int kw = 0; kw < K; ++kw) sum[which][kw] += d * load(x + kw * PANEL);
  };
  for (; ow + 2 <= inner_end; ow += 2) {
    inner(0, ow);
    inner(1, ow + 1);
  }
  if (ow < inner_end) inner(0, ow);
  edge(inner_end, out_width);
#pragma GCC unroll 8
  for (int kw = 0; kw < K; ++kw) store(sums + kw * sums_stride, sum[0][kw] + sum[1][kw]);
}

template <int K>
void depthwise_gradient_rows(const DepthwiseGradient& op, Range out_rows) {
  for (int64_t c = 0; c < op.channels; c += W)
    for (int64_t oh = out_rows.begin; oh < out_rows.end; ++oh) {
      const float* const dy = op.dy + oh * op.stride_h % op.dy_ring_rows * op.dy_row_stride + op.dy_strides.at(0, c);
      for (int64_t kh = 0; kh < K; ++kh) {
        const int64_t h = oh * op.stride_h - op.pad_h + kh;
        if (h < 0 || h >= op.height) continue;
        depthwise_gradient_row<K>(op.z + h % op.z_ring_rows * op.z_row_stride + op.z_strides.at(0, c), dy, op.width, op.out_width,
                                  op.stride_w, op.pad_w, op.sums + kh * K * op.sums_stride + c, op.sums_stride);
      }
    }
}

inline void depthwise_gradient(const DepthwiseGradient& op, Range out_rows) {
  if (op.kernel == 3) return depthwise_gradient_rows<3>(op, out_rows);
  depthwise_gradient_rows<5>(op, out_rows);
}

// dy of one window and vector of channels, to the first maximum of its rows x columns; x and dx stand at the window's first pixel. ALL: 3
// x 3.
template <bool ALL, bool WHOLE>
FASTCONV_INLINE void max_pool_window(const float* x, const float* dy, float* dx, int64_t rows, int64_t columns, int64_t row, int64_t pixel,
                                     int lanes) {
  const int64_t h1 = ALL ? 3 : rows, w1 = ALL ? 3 : columns;
  vec best = splat(-std::numeric_limits<float>::infinity());
  ivec where{};
#pragma GCC unroll 3
  for (int64_t h = 0; h < h1; ++h)
#pragma GCC unroll 3
    for (int64_t w = 0; w < w1; ++w) {
      const vec value = load_lanes<WHOLE>(x + h * row + w * pixel, lanes);
      const auto better = (value > best) | (value != value);
      best = better ? value : best;
      where = better ? ivec{} + static_cast<int32_t>(h * 3 + w) : where;
    }
  const vec d = load_lanes<WHOLE>(dy, lanes);
#pragma GCC unroll 3
  for (int64_t h = 0; h < h1; ++h)
#pragma GCC unroll 3
    for (int64_t w = 0; w < w1; ++w)
      add_lanes<WHOLE>(dx + h * row + w * pixel, where == static_cast<int32_t>(h * 3 + w) ? d : vec{}, lanes);
}

inline void max_pool_gradient(const MaxPoolGradient& op) {
  const int64_t pixel = op.channels, row = op.width * pixel;
  int64_t cleared = 0;  // rows of dx that are ready to be added to
  for (int64_t oh = 0; oh < op.out_height; ++oh) {
    const int64_t top = oh * op.stride_h - op.pad_h, h0 = top < 0 ? 0 : top, h1 = top + 3 < op.height ? top + 3 : op.height;
    if (cleared < h1) std::memset(op.dx + cleared * row, 0, (h1 - cleared) * row * sizeof(float)), cleared = h1;
    for (int64_t ow = 0; ow < op.out_width; ++ow) {
      const int64_t left = ow * op.stride_w - op.pad_w, w0 = left < 0 ? 0 : left, w1 = left + 3 < op.width ? left + 3 : op.width;
      const int64_t first = h0 * row + w0 * pixel;
      const float* const dy = op.dy + (oh * op.out_width + ow) * pixel;
      const auto window = [&](auto ALL) FASTCONV_LAMBDA_INLINE {
        for_pixels(1, op.channels, [&](auto, auto WHOLE, int64_t, int64_t c, int lanes) FASTCONV_LAMBDA_INLINE {
          max_pool_window<ALL, WHOLE>(op.x + first + c, dy + c, op.dx + first + c, h1 - h0, w1 - w0, row, pixel, lanes);
        });
      };
      if (h1 - h0 == 3 && w1 - w0 == 3)
        window(std::true_type{});
      else
        window(std::false_type{});
    }
  }
  if (cleared < op.height) std::memset(op.dx + cleared * row, 0, (op.height - cleared) * row * sizeof(float));
}

}  // namespace fastconv::FASTCONV_ISA
