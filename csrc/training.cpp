// The training operators: what fastconv/nn/_training.py builds its gradients from. Private, float32 on the CPU, channels innermost.
#include "kernels/cpu/training.h"

#include <cmath>
#include <cstring>

#include "csrc/ops.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/pack.h"

namespace fastconv {

namespace {

// What follows a convolution: nothing but bias and activation, whose result is stored; a norm by the batch's statistics, or by running
// ones, whose result is not.
enum Norm : int64_t { none = 0, batch = 1, running = 2 };

// Rows of a norm (4, C).
enum NormRow : int64_t { scale_row = 0, shift_row = 1, mean_row = 2, rstd_row = 3, norm_rows = 4 };

float* mutable_data(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

void check_floats(const char* op, const char* argument, const Tensor& tensor) {
  check(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Float, op, argument, " must be float32 on the CPU");
}
void check_norm(const char* op, const char* argument, const OptionalTensor& norm, int64_t channels) {
  if (!norm) return;
  check_floats(op, argument, *norm);
  check(norm->dim() == 2 && norm->size(0) == norm_rows && norm->size(1) == channels && norm->is_contiguous(), op, argument, " must be (4, ",
        channels, "), got ", shape_of{*norm});
}
void check_vector(const char* op, const char* argument, const OptionalTensor& vector, int64_t channels) {
  if (!vector) return;
  check_floats(op, argument, *vector);
  check(vector->dim() == 1 && vector->size(0) == channels && vector->is_contiguous(), op, argument, " must be (", channels, ",), got ",
        shape_of{*vector});
}
void check_images(const char* op, const char* argument, const Tensor& image) {
  check_floats(op, argument, image);
  check(image.dim() == 4 && image.size(1) > 0, op, argument, " must be (N, C, H, W), got ", shape_of{image});
}
void check_shape(const char* op, const char* argument, const Tensor& image, const Shape& shape) {
  check_images(op, argument, image);
  check(image.size(0) == shape.n && image.size(1) == shape.c && image.size(2) == shape.h && image.size(3) == shape.w, op, argument,
        " must be ", shape, ", got ", shape_of{image});
}

// One float a channel and image: (N, C, 1, 1).
OptionalTensor by_image(const char* op, const char* argument, const OptionalTensor& tensor, int64_t batch, int64_t channels) {
  if (!tensor) return tensor;
  check_shape(op, argument, *tensor, {batch, channels, 1, 1});
  return to_contiguous(*tensor);
}

const float* row(const OptionalTensor& norm, NormRow which) { return norm ? data(*norm) + which * norm->size(1) : nullptr; }

Activated activated_image(const Image& x, const OptionalTensor& norm, Activation activation, const OptionalTensor& gate = std::nullopt) {
  const int64_t channels = x.tensor.size(1);
  return {x.data, channels, channels, row(norm, scale_row), row(norm, shift_row), activation, gate ? data(*gate) : nullptr};
}

Tensor empty_image(const Shape& shape) { return Result(shape.n, shape.c, shape.h, shape.w, floats({0}), Output::channels_last).done(); }
Tensor nothing() { return floats({0}); }

// Memory that the caller brings for an image.
void check_written(const char* op, const char* name, const Tensor& image, const Shape& shape) {
  check_shape(op, name, image, shape);
  check(is_channels_last(image), op, name, " must be channels_last");
}
// Where a result goes: memory that the caller brings, or its own.
Tensor result_image(const char* op, const OptionalTensor& out, const Shape& shape) {
  if (!out) return empty_image(shape);
  check_written(op, "out", *out, shape);
  return *out;
}
// What is not to come back a second time.
Tensor returned(const OptionalTensor& out, const Tensor& result) { return out ? nothing() : result; }

struct Geometry {
  enum Kind { pointwise, depthwise, dense } kind;
  Shape in, out;
  int64_t kernel_h, kernel_w;
};

Geometry geometry(const char* op, const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding) {
  check_images(op, "x", x);
  check_floats(op, "weight", weight);
  check(weight.dim() == 4, op, "weight must be (Cout, Cin, KH, KW), got ", shape_of{weight});
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  const Shape in = shape_like(x);
  const int64_t outputs = weight.size(0), kernel_h = weight.size(2), kernel_w = weight.size(3);
  const bool one = kernel_h == 1 && kernel_w == 1 && stride[0] == 1 && stride[1] == 1 && padding[0] == 0 && padding[1] == 0;
  const bool depthwise = weight.size(1) == 1 && outputs == in.c && kernel_h == kernel_w && (kernel_h == 3 || kernel_h == 5) &&
                         depthwise_covers(kernel_h, stride, padding);
  check(depthwise || weight.size(1) == in.c, op, "weight must be (Cout, ", in.c, ", KH, KW) or depthwise, got ", shape_of{weight});
  return {one         ? Geometry::pointwise
          : depthwise ? Geometry::depthwise
                      : Geometry::dense,
          in,
          {in.n, outputs, output_size(op, "height", in.h, kernel_h, stride[0], padding[0]),
           output_size(op, "width", in.w, kernel_w, stride[1], padding[1])},
          kernel_h,
          kernel_w};
}

int64_t multiply_adds(const Geometry& g) {
  return g.out.n * g.out.image() * g.kernel_h * g.kernel_w * (g.kind == Geometry::depthwise ? 1 : g.in.c);
}

Windows windows(const Geometry& g, const Image& x, const Ints& stride, const Ints& padding) {
  return {x.data, g.in.h, g.in.w, g.in.c, g.out.h, g.out.w, g.kernel_h, g.kernel_w, stride[0], stride[1], padding[0], padding[1]};
}

// Panels of a dense convolution's weight as a matrix product over its windows, or, `transposed`, of (Cin, Cout) for the input gradient.
Tensor pack_training_panels(const Tensor& weight, bool transposed, const Parallel& parallel) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1), taps = weight.size(2) * weight.size(3);
  const int64_t columns = transposed ? inputs : outputs, depth = transposed ? outputs : taps * inputs;
  const Tensor dense = to_contiguous(weight);
  const float* const w = data(dense);
  Tensor panels = floats({panels_for(columns), depth, PANEL});
  float* const to = mutable_data(panels);
  parallel.split(panels_for(columns), ceil_div(4096, depth * PANEL), 1, [&](Range range) {
    for (int64_t g = range.begin; g < range.end; ++g) {
      const int64_t first = g * PANEL, lanes = std::min(PANEL, columns - first);
      float* const panel = to + g * depth * PANEL;
      // f(column, input, value)
      const auto each = [&](const auto& f) {
        if (transposed) {
          for (int64_t k = 0; k < depth; ++k)
            for (int64_t j = 0; j < lanes; ++j) f(j, k, w[k * inputs + first + j]);
          return;
        }
        for (int64_t j = 0; j < lanes; ++j)
          for (int64_t tap = 0; tap < taps; ++tap)
            for (int64_t c = 0; c < inputs; ++c) f(j, tap * inputs + c, w[((first + j) * inputs + c) * taps + tap]);
      };
      if (lanes < PANEL) std::memset(panel, 0, depth * PANEL * sizeof(float));
      if (lanes <= PAIRED) {  // as the pointwise kernel wants its last panel
        std::vector<float> rows(lanes * depth);
        each([&](int64_t j, int64_t k, float value) { rows[j * depth + k] = value; });
        pack_paired(rows.data(), lanes, depth, panel);
      } else {
        each([&](int64_t j, int64_t k, float value) { panel[k * PANEL + j] = value; });
      }
    }
  });
  return panels;
}

// (Cout, tap * Cin + c) -> (Cout, Cin, KH, KW).
Tensor unpack_windows(const Tensor& product, int64_t inputs, int64_t kernel_h, int64_t kernel_w) {
  const int64_t outputs = product.size(0), taps = kernel_h * kernel_w;
  Tensor weight = floats({outputs, inputs, kernel_h, kernel_w});
  const float* const from = data(product);
  float* to = mutable_data(weight);
  for (int64_t n = 0; n < outputs; ++n)
    for (int64_t c = 0; c < inputs; ++c)
      for (int64_t t = 0; t < taps; ++t) *to++ = from[(n * taps + t) * inputs + c];
  return weight;
}

// gamma / sqrt(variance + eps) and so on, and the running statistics as torch moves them on.
void make_norm(const float* mean, const float* variance, const OptionalTensor& gamma, const OptionalTensor& beta, double eps,
               Tensor& norm) {
  const int64_t channels = norm.size(1);
  float* const to = mutable_data(norm);
  for (int64_t c = 0; c < channels; ++c) {
    const double rstd = 1.0 / std::sqrt(static_cast<double>(variance[c]) + eps), scale = (gamma ? data(*gamma)[c] : 1.0) * rstd;
    to[scale_row * channels + c] = static_cast<float>(scale);
    to[shift_row * channels + c] = static_cast<float>((beta ? data(*beta)[c] : 0.0) - mean[c] * scale);
    to[mean_row * channels + c] = mean[c];
    to[rstd_row * channels + c] = static_cast<float>(rstd);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> training_conv(Tensor x, OptionalTensor input_norm, OptionalTensor gate, OptionalString input_activation,
                                         Tensor weight, OptionalTensor bias, OptionalString activation, int64_t norm, OptionalTensor gamma,
                                         OptionalTensor beta, OptionalTensor running_mean, OptionalTensor running_var, double momentum,
                                         double eps, Ints stride, Ints padding, OptionalTensor out) {
  const char* op = "training_conv";
  const Geometry g = geometry(op, x, weight, stride, padding);
  const int64_t channels = g.out.c;
  check_norm(op, "input_norm", input_norm, g.in.c);
  check_vector(op, "bias", bias, channels);
  check_vector(op, "gamma", gamma, channels);
  check_vector(op, "beta", beta, channels);
  check_vector(op, "running_mean", running_mean, channels);
  check_vector(op, "running_var", running_var, channels);
  check(norm != Norm::running || (running_mean && running_var), op, "running_mean and running_var must be given for norm 2");
  check(norm == Norm::none || !activation, op, "activation must be None where a norm follows: nothing is activated yet");
  const Activation before = parse_activation(op, "input_activation", input_activation),
                   after = parse_activation(op, "activation", activation);
  const OptionalTensor gates = by_image(op, "gate", gate, g.in.n, g.in.c);
  const int64_t pixels = g.out.n * g.out.h * g.out.w;
  Tensor y = result_image(op, out, g.out);
  Tensor norms = norm == Norm::none ? nothing() : floats({norm_rows, channels});
  if (g.out.n == 0) return {returned(out, y), norms};
  std::vector<float> moments(norm == Norm::batch ? 2 * channels : 0);
  const Statistics statistics{moments.empty() ? nullptr : moments.data(), moments.empty() ? nullptr : moments.data() + channels};
  const Tensor biases = bias_or_zeros(bias, channels);
  check(g.kind != Geometry::dense || (!input_norm && !gates), op, "input_norm and gate must be None for a dense convolution");

  in_parallel(multiply_adds(g), [&](const Parallel& parallel) {
    if (g.kind == Geometry::depthwise) {
      const Image image(x);
      const Tensor taps = pack_taps(weight);
      const Depthwise shape{
          nullptr,   0,          0,          g.in.h,     g.in.h,       g.in.w, g.in.c,          g.out.w,  g.kernel_h,        stride[0],
          stride[1], padding[0], padding[1], data(taps), data(biases), after,  mutable_data(y), channels, g.out.w * channels};
      return run_training_depthwise(activated_image(image, input_norm, before, gates), shape, g.in.n, g.out.h, statistics, parallel);
    }
    const Tensor panels = pack_training_panels(weight, false, parallel);
    const PackedPointwise weights{data(panels), data(biases), weight.size(1) * g.kernel_h * g.kernel_w, channels, after};
    const Image image(x);
    if (g.kind == Geometry::dense)
      return run_training_product(WindowRows(windows(g, image, stride, padding)), pixels, weights, mutable_data(y), statistics, parallel);
    run_training_product(PixelRows(activated_image(image, input_norm, before, gates), g.in.h * g.in.w), pixels, weights, mutable_data(y),
                         statistics, parallel);
  });

  if (norm == Norm::running) make_norm(data(*running_mean), data(*running_var), gamma, beta, eps, norms);
  if (norm == Norm::batch) {
    make_norm(statistics.mean, statistics.variance, gamma, beta, eps, norms);
    if (running_mean && running_var) {
      const double unbiased = pixels > 1 ? static_cast<double>(pixels) / (pixels - 1) : 1.0;
      float *const mean = mutable_data(*running_mean), *const variance = mutable_data(*running_var);
      for (int64_t c = 0; c < channels; ++c) {
        mean[c] = static_cast<float>((1.0 - momentum) * mean[c] + momentum * statistics.mean[c]);
        variance[c] = static_cast<float>((1.0 - momentum) * variance[c] + momentum * unbiased * statistics.variance[c]);
      }
    }
  }
  return {returned(out, y), norms};
}

Tensor training_activated(Tensor y, Tensor norm, OptionalString activation, OptionalTensor residual, OptionalTensor out) {
  const char* op = "training_activated";
  check_images(op, "y", y);
  const Shape shape = shape_like(y);
  check_norm(op, "norm", norm, shape.c);
  if (residual) check_shape(op, "residual", *residual, shape);
  const Image image(y);
  std::optional<Image> added;
  if (residual) added.emplace(*residual);
  Tensor z = result_image(op, out, shape);
  const int64_t pixels = shape.n * shape.h * shape.w;
  in_parallel(pixels * shape.c, [&](const Parallel& parallel) {
    run_activated(activated_image(image, norm, parse_activation(op, "activation", activation)), pixels, added ? added->data : nullptr,
                  mutable_data(z), parallel);
  });
  return returned(out, z);
}

Tensor training_means(Tensor y, Tensor norm, OptionalString activation) {
  const char* op = "training_means";
  check_images(op, "y", y);
  const Shape shape = shape_like(y);
  check(shape.h > 0 && shape.w > 0, op, "y must have pixels, got ", shape);
  check_norm(op, "norm", norm, shape.c);
  const Image image(y);
  Tensor means = floats({shape.n, shape.c, 1, 1});
  in_parallel(shape.n * shape.image(), [&](const Parallel& parallel) {
    run_activated_means(activated_image(image, norm, parse_activation(op, "activation", activation)), shape.n, shape.h * shape.w,
                        mutable_data(means), parallel);
  });
  return means;
}

namespace {

// The gradient that arrives at a layer's output, and what it is of.
struct Arriving {
  Image dz, y;
  OptionalTensor add;
  Gradient gradient;
  Shape shape;
  Arriving(const char* op, const Tensor& dz_, const OptionalTensor& add_, const Tensor& y_, const OptionalTensor& norm,
           const OptionalString& activation)
      : dz(dz_), y(y_), shape(shape_like(y_)) {
    check_shape(op, "dz", dz_, shape);
    check_norm(op, "norm", norm, shape.c);
    add = by_image(op, "add", add_, shape.n, shape.c);
    const Activation parsed = parse_activation(op, "activation", activation);
    check(norm || parsed == Activation::none || parsed == Activation::relu || parsed == Activation::relu6, op,
          "activation must be None, 'relu' or 'relu6' without a norm: the others do not show in their result");
    gradient = {dz.data,
                shape.c,
                add ? data(*add) : nullptr,
                y.data,
                shape.c,
                shape.c,
                row(norm, scale_row),
                row(norm, shift_row),
                parsed,
                nullptr,
                nullptr,
                nullptr,
                nullptr};
  }
};

}  // namespace

Tensor training_gradient_sums(Tensor dz, OptionalTensor add, Tensor y, OptionalTensor norm, OptionalString activation) {
  const char* op = "training_gradient_sums";
  check_images(op, "y", y);
  const Arriving arriving(op, dz, add, y, norm, activation);
  const Shape& shape = arriving.shape;
  Tensor sums = floats({2, shape.c});
  in_parallel(shape.n * shape.image(), [&](const Parallel& parallel) {
    run_gradient_sums(arriving.gradient, shape.n, shape.h * shape.w, row(norm, mean_row), mutable_data(sums), parallel);
  });
  return sums;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> training_conv_backward(Tensor dz, OptionalTensor add, Tensor y, OptionalTensor norm,
                                                                  OptionalTensor sums, OptionalString activation, Tensor x,
                                                                  OptionalTensor input_norm, OptionalTensor gate,
                                                                  OptionalString input_activation, Tensor weight, OptionalTensor residual,
                                                                  Ints stride, Ints padding, bool needs_input, bool needs_weight,
                                                                  bool needs_bias, OptionalTensor out) {
  const char* op = "training_conv_backward";
  const Geometry g = geometry(op, x, weight, stride, padding);
  check(g.in.n > 0, op, "x must not be empty, got ", shape_of{x});
  check_shape(op, "y", y, g.out);
  check_norm(op, "input_norm", input_norm, g.in.c);
  Arriving arriving(op, dz, add, y, norm, activation);
  const int64_t channels = g.out.c, pixels = g.out.n * g.out.h * g.out.w;

  // dy = scale * (dz' - mean(dz') - (y - mean) * rstd^2 * mean(dz' * (y - mean))), Ioffe and Szegedy, 2015; by running statistics, scale *
  // dz'.
  std::vector<float> means(norm ? 2 * channels : 0);  // offset, slope
  if (sums) {
    check_floats(op, "sums", *sums);
    check(norm && sums->dim() == 2 && sums->size(0) == 2 && sums->size(1) == channels && sums->is_contiguous(), op, "sums must be (2, ",
          channels, ") beside a norm, got ", shape_of{*sums});
    const float *const rstd = row(norm, rstd_row), *const sum = data(*sums), *const products = sum + channels;
    for (int64_t i = 0; i < channels; ++i) {
      means[i] = static_cast<float>(static_cast<double>(sum[i]) / pixels);
      means[channels + i] = static_cast<float>(static_cast<double>(rstd[i]) * rstd[i] * products[i] / pixels);
    }
  }
  if (norm) {
    arriving.gradient.factor = row(norm, scale_row);
    arriving.gradient.mean = row(norm, mean_row);
    arriving.gradient.offset = means.data();
    arriving.gradient.slope = means.data() + channels;
  }

  const OptionalTensor gates = by_image(op, "gate", gate, g.in.n, g.in.c);
  check(g.kind != Geometry::dense || (!needs_input && !input_norm && !gates), op,
        "needs_input must be False, input_norm and gate None for a dense convolution");
  check(g.kind == Geometry::pointwise || (!gates && !residual), op, "gate and residual must be None but for a 1x1 convolution");
  check(!gates || input_norm, op, "gate needs an input_norm");
  const Activation before = parse_activation(op, "input_activation", input_activation);
  std::optional<Image> added;
  if (residual) {
    check_shape(op, "residual", *residual, g.in);
    added.emplace(*residual);
  }
  const Through::Kind kind = !needs_input || !input_norm ? Through::nothing : gates ? Through::gate : Through::activation;
  check(!out || needs_input, op, "out must be None where needs_input is False");
  Tensor dx = needs_input ? result_image(op, out, g.in) : nothing();
  Tensor through_sums = kind == Through::nothing ? nothing() : kind == Through::gate ? floats({g.in.n, g.in.c, 1, 1}) : floats({2, g.in.c});
  Tensor dbias = needs_bias ? floats({channels}) : nothing();
  const Tensor no_bias = zeros(g.in.c);

  if (g.kind == Geometry::depthwise) {
    check(!needs_bias, op, "needs_bias must be False for a depthwise convolution: its bias gradient is a sum of dz'");
    const int64_t taps = g.kernel_h * g.kernel_w;
    const Image image(x);
    const Tensor flipped = needs_input ? flip_taps(pack_taps(weight)) : nothing();
    Tensor packed = floats({taps, channels});
    const Activated input = activated_image(image, input_norm, before);
    const DepthwiseBackward backward{
        g.in.n,
        g.in.h,
        g.in.w,
        channels,
        g.out.h,
        g.out.w,
        g.kernel_h,
        stride[0],
        stride[1],
        padding[0],
        padding[1],
        arriving.gradient,
        input,
        needs_weight ? mutable_data(packed) : nullptr,
        needs_input ? data(flipped) : nullptr,
        data(no_bias),
        needs_input ? mutable_data(dx) : nullptr,
        {kind, input, row(input_norm, mean_row), kind == Through::nothing ? nullptr : mutable_data(through_sums)}};
    in_parallel(2 * multiply_adds(g), [&](const Parallel& parallel) { run_depthwise_backward(backward, parallel); });
    return {returned(out, dx), through_sums, needs_weight ? unpack_taps(packed) : nothing(), dbias};
  }

  const int64_t taps = g.kernel_h * g.kernel_w, depth = taps * g.in.c;
  const Image image(x);
  Tensor product = needs_weight ? floats({channels, depth}) : nothing();
  in_parallel(2 * multiply_adds(g), [&](const Parallel& parallel) {
    const Tensor panels = needs_input ? pack_training_panels(weight, true, parallel) : nothing();
    std::unique_ptr<InputRows> input;
    Activated read{};
    if (g.kind == Geometry::dense) {
      input = std::make_unique<WindowRows>(windows(g, image, stride, padding));
    } else {
      read = activated_image(image, input_norm, before, gates);
      input = std::make_unique<PixelRows>(read, g.in.h * g.in.w);
    }
    run_product_backward({g.out.n,
                          g.out.h * g.out.w,
                          arriving.gradient,
                          input.get(),
                          needs_weight ? mutable_data(product) : nullptr,
                          needs_bias ? mutable_data(dbias) : nullptr,
                          needs_input ? data(panels) : nullptr,
                          data(no_bias),
                          added ? added->data : nullptr,
                          needs_input ? mutable_data(dx) : nullptr,
                          depth,
                          {kind, read, row(input_norm, mean_row), kind == Through::nothing ? nullptr : mutable_data(through_sums)}},
                         parallel);
  });
  if (!needs_weight || g.kind == Geometry::pointwise) {
    const Ints shape{channels, g.in.c, 1, 1};
    return {returned(out, dx), through_sums, needs_weight ? torch::stable::view(product, shape) : product, dbias};
  }
  Tensor dweight = unpack_windows(product, g.in.c, g.kernel_h, g.kernel_w);
  return {returned(out, dx), through_sums, dweight, dbias};
}

namespace {

// A dense 3x3 weight as direct sums and as Winograd's products read it.
struct Panels3x3 {
  Tensor direct, winograd;
  Panels3x3(const Tensor& weight, const Parallel& parallel)
      : direct(floats({panels_for(weight.size(0)), 9 * weight.size(1), PANEL})),
        winograd(floats({panels_for(weight.size(0)), 36 * weight.size(1), PANEL})) {
    const int64_t outputs = weight.size(0), inputs = weight.size(1);
    parallel.split(panels_for(outputs), 1, 1, [&](Range range) {
      for (int64_t g = range.begin; g < range.end; ++g) {
        pack_panel(data(weight), outputs, inputs, 9, g, mutable_data(direct) + g * 9 * inputs * PANEL);
        pack_winograd_panel(data(weight), outputs, inputs, g, mutable_data(winograd) + g * 36 * inputs * PANEL);
      }
    });
  }
};

// (E, S, 3, 3) as the convolution that takes dy back: (S, E, 3, 3), its taps turned by half; E up to a multiple of 16, with zeros.
Tensor flipped(const Tensor& weight) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const Tensor dense = to_contiguous(weight);
  const int64_t padded = panels_for(outputs) * PANEL;
  Tensor turned = floats({inputs, padded, 3, 3});
  const float* const from = data(dense);
  float* to = mutable_data(turned);
  for (int64_t s = 0; s < inputs; ++s)
    for (int64_t e = 0; e < padded; ++e)
      for (int64_t t = 0; t < 9; ++t) *to++ = e < outputs ? from[(e * inputs + s) * 9 + 8 - t] : 0.0f;
  return turned;
}

struct FireShapes {
  Shape in;
  int64_t squeezed, out1, out3, pixels;
  FireShapes(const char* op, const Tensor& x, const Tensor& squeeze, const Tensor& weight1x1, const Tensor& weight3x3)
      : in(shape_like(x)), squeezed(squeeze.size(0)), out1(weight1x1.size(0)), out3(weight3x3.size(0)), pixels(in.n * in.h * in.w) {
    check_pointwise_weight(op, "squeeze_weight", squeeze, in.c, x);
    check_pointwise_weight(op, "weight1x1", weight1x1, squeezed, x);
    check(weight3x3.dim() == 4 && weight3x3.size(1) == squeezed && weight3x3.size(2) == 3 && weight3x3.size(3) == 3, op,
          "weight3x3 must be (Cout, ", squeezed, ", 3, 3), got ", shape_of{weight3x3});
    check_floats(op, "weight3x3", weight3x3);
  }
  Shape squeezed_image() const { return {in.n, squeezed, in.h, in.w}; }
  int64_t multiply_adds() const { return pixels * squeezed * (in.c + out1 + 9 * out3); }
};

}  // namespace

Tensor training_fire(Tensor x, Tensor squeeze_weight, OptionalTensor squeeze_bias, Tensor weight1x1, OptionalTensor bias1x1,
                     Tensor weight3x3, OptionalTensor bias3x3, OptionalTensor squeezed, OptionalTensor out) {
  const char* op = "training_fire";
  check_images(op, "x", x);
  const FireShapes f(op, x, squeeze_weight, weight1x1, weight3x3);
  check_vector(op, "squeeze_bias", squeeze_bias, f.squeezed);
  check_vector(op, "bias1x1", bias1x1, f.out1);
  check_vector(op, "bias3x3", bias3x3, f.out3);
  const Tensor biases[3] = {bias_or_zeros(squeeze_bias, f.squeezed), bias_or_zeros(bias1x1, f.out1), bias_or_zeros(bias3x3, f.out3)};
  const Image image(x);
  const Tensor dense = to_contiguous(weight3x3);
  Tensor z = result_image(op, out, {f.in.n, f.out1 + f.out3, f.in.h, f.in.w});
  if (squeezed) check_written(op, "squeezed", *squeezed, f.squeezed_image());
  in_parallel(f.multiply_adds(), [&](const Parallel& parallel) {
    const Tensor squeeze = pack_training_panels(squeeze_weight, false, parallel), expand = pack_training_panels(weight1x1, false, parallel);
    const Panels3x3 three(dense, parallel);
    run_fire({image.data,
              f.in.c,
              f.in.n,
              f.in.h,
              f.in.w,
              {data(squeeze), data(biases[0]), f.in.c, f.squeezed, Activation::relu},
              {data(expand), data(biases[1]), f.squeezed, f.out1, Activation::relu},
              data(three.direct),
              data(three.winograd),
              data(biases[2]),
              f.out3,
              mutable_data(z),
              f.out1 + f.out3,
              squeezed ? mutable_data(*squeezed) : nullptr},
             parallel);
  });
  return returned(out, z);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> training_fire_backward(Tensor dz, Tensor z, Tensor x, Tensor squeezed,
                                                                                          Tensor squeeze_weight, Tensor weight1x1,
                                                                                          Tensor weight3x3, bool needs_input,
                                                                                          OptionalTensor out) {
  const char* op = "training_fire_backward";
  check_images(op, "x", x);
  const FireShapes f(op, x, squeeze_weight, weight1x1, weight3x3);
  check(f.pixels > 0, op, "x must not be empty, got ", shape_of{x});
  const int64_t channels = f.out1 + f.out3, image_pixels = f.in.h * f.in.w;
  const Shape shape{f.in.n, channels, f.in.h, f.in.w};
  check_shape(op, "z", z, shape);
  check_shape(op, "dz", dz, shape);
  check(!out || needs_input, op, "out must be None where needs_input is False");
  check_shape(op, "squeezed", squeezed, f.squeezed_image());
  const Image image(x), result(z), arriving(dz), squeezed_image(squeezed);
  const Tensor zeros = fastconv::zeros(std::max(f.squeezed, f.in.c));
  Tensor dx = needs_input ? result_image(op, out, f.in) : nothing();
  Tensor dsqueeze = floats({f.squeezed, f.in.c, 1, 1}), dsqueeze_bias = floats({f.squeezed});
  Tensor dweight1 = floats({f.out1, f.squeezed, 1, 1}), dbias1 = floats({f.out1});
  Tensor dweight3 = floats({f.out3, f.squeezed, 3, 3}), dbias3 = floats({f.out3}), sums = floats({2, f.squeezed});
  const Tensor turned = flipped(weight3x3);
  Tensor dsqueezed = floats({f.pixels, f.squeezed});
  const auto expand = [&](int64_t first, int64_t count) {
    Gradient g{};
    g.dz = arriving.data + first;
    g.y = result.data + first;
    g.dz_stride = g.y_stride = channels;
    g.channels = count;
    g.activation = Activation::relu;
    return g;
  };
  in_parallel(2 * f.multiply_adds(), [&](const Parallel& parallel) {
    const Activated plain{image.data, f.in.c, f.in.c, nullptr, nullptr, Activation::none, nullptr};
    const PixelRows input(plain, image_pixels);
    const Activated middle{squeezed_image.data, f.squeezed, f.squeezed, nullptr, nullptr, Activation::relu, nullptr};
    const Through nothing_more{Through::nothing, middle, nullptr, nullptr};
    const Panels3x3 three(turned, parallel);
    run_window_backward({f.in.n, f.in.h, f.in.w, expand(f.out1, f.out3), data(three.direct), data(three.winograd), data(zeros),
                         mutable_data(dsqueezed), f.squeezed},
                        parallel);
    run_window_gradient(
        {f.in.n, f.in.h, f.in.w, expand(f.out1, f.out3), squeezed_image.data, f.squeezed, mutable_data(dweight3), mutable_data(dbias3)},
        parallel);
    const PixelRows middle_rows(middle, image_pixels);
    const Tensor panels1 = pack_training_panels(weight1x1, true, parallel);
    run_product_backward({f.in.n,
                          image_pixels,
                          expand(0, f.out1),
                          &middle_rows,
                          mutable_data(dweight1),
                          mutable_data(dbias1),
                          data(panels1),
                          data(zeros),
                          data(dsqueezed),
                          mutable_data(dsqueezed),
                          f.squeezed,
                          {Through::activation, middle, nullptr, mutable_data(sums)}},
                         parallel);

    Gradient g{};
    g.dz = data(dsqueezed);
    g.y = squeezed_image.data;
    g.dz_stride = g.y_stride = g.channels = f.squeezed;
    g.activation = Activation::none;
    const Tensor panels = needs_input ? pack_training_panels(squeeze_weight, true, parallel) : nothing();
    run_product_backward({f.in.n, image_pixels, g, &input, mutable_data(dsqueeze), nullptr, needs_input ? data(panels) : nullptr,
                          data(zeros), nullptr, needs_input ? mutable_data(dx) : nullptr, f.in.c, nothing_more},
                         parallel);
  });
  std::memcpy(mutable_data(dsqueeze_bias), data(sums), f.squeezed * sizeof(float));
  return {returned(out, dx), dsqueeze, dsqueeze_bias, dweight1, dbias1, dweight3, dbias3};
}

Tensor training_max_pool(Tensor x, Ints stride, Ints padding, bool ceil_mode, OptionalTensor out) {
  const char* op = "training_max_pool";
  check_images(op, "x", x);
  const StepPointer step = max_pool_step(std::move(stride), std::move(padding), ceil_mode);
  const Shape in = shape_like(x), pooled = step->output(in);
  const Image image(x);
  Tensor y = result_image(op, out, pooled);
  float* const to = mutable_data(y);
  in_parallel(step->multiply_adds(in, pooled),
              [&](const Parallel& parallel) { step->run(channels_last(image.data, in), {}, channels_last(to, pooled), parallel); });
  return returned(out, y);
}

namespace {

// A stem's geometry as it trains with the max-pool after it.
Geometry stem_pool_geometry(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Ints& stride,
                            const Ints& padding) {
  check(weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) == x.size(1), op, "weight must be (Cout, Cin, KH, KW), got ",
        shape_of{weight});
  check_vector(op, "bias", bias, weight.size(0));
  return geometry(op, x, weight, stride, padding);
}

}  // namespace

Tensor training_stem_pool(Tensor x, Tensor weight, OptionalTensor bias, OptionalString activation, Ints stride, Ints padding,
                          Ints pool_stride, Ints pool_padding, bool ceil_mode, OptionalTensor out) {
  const char* op = "training_stem_pool";
  check_images(op, "x", x);
  const Geometry g = stem_pool_geometry(op, x, weight, bias, stride, padding);
  StepPointer stem = stem_step(pack_panels(weight), bias_or_zeros(bias, g.out.c), {g.kernel_h, g.kernel_w}, std::move(stride),
                               std::move(padding), parse_activation(op, "activation", activation));
  const StepPointer step = max_pool_step(std::move(pool_stride), std::move(pool_padding), ceil_mode);
  step->take(stem, false);
  const Shape pooled = step->output(g.in);
  const Image image(x);
  Tensor y = result_image(op, out, pooled);
  float* const to = mutable_data(y);
  in_parallel(step->multiply_adds(g.in, pooled),
              [&](const Parallel& parallel) { step->run(channels_last(image.data, g.in), {}, channels_last(to, pooled), parallel); });
  return returned(out, y);
}

namespace {

// Whether a max-pool of an axis makes so many windows, with or without ceil_mode.
bool pools_to(int64_t size, int64_t out_size, int64_t stride, int64_t padding) {
  const int64_t most = (size + 2 * padding - 3 + stride - 1) / stride + 1;
  return out_size > 0 && out_size <= most && (out_size - 1) * stride < size + padding;
}

}  // namespace

std::tuple<Tensor, Tensor> training_stem_pool_backward(Tensor dz, Tensor x, Tensor weight, OptionalTensor bias, OptionalString activation,
                                                       Ints stride, Ints padding, Ints pool_stride, Ints pool_padding) {
  const char* op = "training_stem_pool_backward";
  check_images(op, "x", x);
  check_images(op, "dz", dz);
  const Geometry g = stem_pool_geometry(op, x, weight, bias, stride, padding);
  const Activation parsed = parse_activation(op, "activation", activation);
  check(parsed == Activation::none || parsed == Activation::relu || parsed == Activation::relu6, op,
        "activation must be None, 'relu' or 'relu6': the others do not show in their result");
  check_pair(op, "pool_stride", pool_stride, 1);
  check_pair(op, "pool_padding", pool_padding, 0);
  const Shape pooled = shape_like(dz);
  check(pooled.n == g.in.n && pooled.c == g.out.c && pools_to(g.out.h, pooled.h, pool_stride[0], pool_padding[0]) &&
            pools_to(g.out.w, pooled.w, pool_stride[1], pool_padding[1]),
        op, "dz must be of the pooled image's shape, got ", pooled, " for ", g.out);
  const Tensor panels = pack_panels(weight), biases = bias_or_zeros(bias, g.out.c);
  stem_step(panels, biases, {g.kernel_h, g.kernel_w}, stride, padding, parsed)->output(g.in);  // which checks what the kernel covers
  const Image image(x), arriving(dz);
  Tensor product = floats({g.out.c, g.kernel_h * g.kernel_w * g.in.c}), dbias = floats({g.out.c});
  const Stem stem{image.data, 1,         g.in.w * g.in.c, g.in.c,     g.in.h,       g.in.w,
                  g.in.c,     g.out.c,   g.out.h,         g.out.w,    g.kernel_h,   g.kernel_w,
                  stride[0],  stride[1], padding[0],      padding[1], data(panels), {data(biases), nullptr, 0, parsed},
                  nullptr,    {}};
  in_parallel(2 * multiply_adds(g), [&](const Parallel& parallel) {
    run_stem_pool_backward({g.in.n,
                            g.in.image(),
                            stem,
                            windows(g, image, stride, padding),
                            {nullptr, arriving.data, g.out.h, g.out.w, g.out.c, pooled.h, pooled.w, pool_stride[0], pool_stride[1],
                             pool_padding[0], pool_padding[1], nullptr},
                            mutable_data(product),
                            mutable_data(dbias)},
                           parallel);
  });
  return {unpack_windows(product, g.in.c, g.kernel_h, g.kernel_w), dbias};
}

Tensor training_max_pool_backward(Tensor dz, Tensor x, Ints stride, Ints padding, OptionalTensor out) {
  const char* op = "training_max_pool_backward";
  check_images(op, "x", x);
  check_images(op, "dz", dz);
  const Shape in = shape_like(x), pooled = shape_like(dz);
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check(pooled.n == in.n && pooled.c == in.c && pools_to(in.h, pooled.h, stride[0], padding[0]) &&
            pools_to(in.w, pooled.w, stride[1], padding[1]),
        op, "dz must be of the pooled image's shape, got ", pooled, " for x ", in);
  const Image image(x), arriving(dz);
  Tensor dx = result_image(op, out, in);
  float* const to = mutable_data(dx);
  in_parallel(9 * pooled.n * pooled.image(), [&](const Parallel& parallel) {
    parallel.split(in.n, 1, 1, [&](Range range) {
      for (int64_t n = range.begin; n < range.end; ++n)
        kernels().max_pool_gradient({image.data + n * in.image(), arriving.data + n * pooled.image(), in.h, in.w, in.c, pooled.h, pooled.w,
                                     stride[0], stride[1], padding[0], padding[1], to + n * in.image()});
    });
  });
  return returned(out, dx);
}

}  // namespace fastconv
