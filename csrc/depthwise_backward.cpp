// The gradients of a depthwise convolution as operators of their own.
#include <cstring>

#include "csrc/ops.h"
#include "kernels/cpu/training.h"

namespace fastconv {

namespace {

// grad is what a depthwise convolution of a (batch, channels, height, width) image gives.
Shape check_gradient(const char* op, const Tensor& grad, const Shape& in, const Ints& kernel, const Ints& stride, const Ints& padding) {
  check_image(op, grad, "grad");
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  const Shape out{in.n, in.c, output_size(op, "height", in.h, kernel[0], stride[0], padding[0]),
                  output_size(op, "width", in.w, kernel[1], stride[1], padding[1])};
  const Shape got = shape_like(grad);
  check(got.n == out.n && got.c == out.c && got.h == out.h && got.w == out.w, op, "grad must be ", out, ", got ", got);
  return out;
}

bool kernel_covers(int64_t kernel_h, int64_t kernel_w, const Ints& stride, const Ints& padding) {
  return kernel_h == kernel_w && (kernel_h == 3 || kernel_h == 5) && depthwise_covers(kernel_h, stride, padding);
}

DepthwiseBackward backward(const Shape& in, const Shape& out, int64_t kernel, const Ints& stride, const Ints& padding, const float* grad) {
  DepthwiseBackward op{};
  op.batch = in.n;
  op.height = in.h;
  op.width = in.w;
  op.channels = in.c;
  op.out_height = out.h;
  op.out_width = out.w;
  op.kernel = kernel;
  op.stride_h = stride[0];
  op.stride_w = stride[1];
  op.pad_h = padding[0];
  op.pad_w = padding[1];
  op.gradient.dz = op.gradient.y = grad;  // without an activation y is not looked at
  op.gradient.dz_stride = op.gradient.y_stride = op.gradient.channels = in.c;
  op.gradient.activation = Activation::none;
  op.through.kind = Through::nothing;
  return op;
}

int64_t work(const Shape& out, int64_t kernel) { return out.n * out.image() * kernel * kernel; }

}  // namespace

Tensor flip_taps(const Tensor& taps) {
  const int64_t count = taps.size(0), channels = taps.size(1);
  Tensor flipped = floats({count, channels});
  const float* const from = data(taps);
  float* const to = static_cast<float*>(flipped.mutable_data_ptr());
  for (int64_t t = 0; t < count; ++t) std::memcpy(to + t * channels, from + (count - 1 - t) * channels, channels * sizeof(float));
  return flipped;
}

Tensor unpack_taps(const Tensor& taps) {
  const int64_t count = taps.size(0), channels = taps.size(1), kernel = count == 9 ? 3 : 5;
  Tensor weight = floats({channels, 1, kernel, kernel});
  const float* const from = data(taps);
  float* to = static_cast<float*>(weight.mutable_data_ptr());
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t t = 0; t < count; ++t) *to++ = from[t * channels + c];
  return weight;
}

Tensor depthwise_backward_input(Tensor grad, Tensor weight, Ints input_size, Ints stride, Ints padding) {
  const char* op = "depthwise_backward_input";
  check_image(op, grad, "grad");
  check_pair(op, "input_size", input_size, 1);
  check(weight.dim() == 4 && weight.size(1) == 1 && weight.size(0) == grad.size(1), op, "weight must be (", grad.size(1),
        ", 1, KH, KW), got ", shape_of{weight});
  check_like(op, "weight", weight, grad);
  const Shape in{grad.size(0), grad.size(1), input_size[0], input_size[1]};
  const Shape out = check_gradient(op, grad, in, {weight.size(2), weight.size(3)}, stride, padding);
  if (!covered(op, grad) || !kernel_covers(weight.size(2), weight.size(3), stride, padding)) {
    const Tensor like = torch::stable::empty({in.n, in.c, in.h, in.w}, grad.scalar_type());
    return aten::formatted_like(aten::conv_backward(aten::ConvGradient::input, grad, like, weight, stride, padding, in.c), grad);
  }
  const Image arriving(grad);
  const Tensor taps = flip_taps(pack_taps(weight)), no_bias = zeros(in.c);
  Result result(in.n, in.c, in.h, in.w, grad, Output::like_input);
  DepthwiseBackward gradient = backward(in, out, weight.size(2), stride, padding, arriving.data);
  gradient.flipped_taps = data(taps);
  gradient.zeros = data(no_bias);
  gradient.dx = result.data();
  in_parallel(work(in, gradient.kernel), [&](const Parallel& parallel) { run_depthwise_backward(gradient, parallel); });
  return result.done();
}

Tensor depthwise_backward_weight(Tensor grad, Tensor x, Ints kernel_size, Ints stride, Ints padding) {
  const char* op = "depthwise_backward_weight";
  check_image(op, x);
  check_pair(op, "kernel_size", kernel_size, 1);
  check_like(op, "grad", grad, x);
  const Shape in = shape_like(x), out = check_gradient(op, grad, in, kernel_size, stride, padding);
  const int64_t kernel = kernel_size[0];
  if (!covered(op, x) || !kernel_covers(kernel, kernel_size[1], stride, padding)) {
    const Tensor like = torch::stable::empty({in.c, 1, kernel, kernel_size[1]}, x.scalar_type());
    return to_contiguous(aten::conv_backward(aten::ConvGradient::weight, grad, x, like, stride, padding, in.c));
  }
  const Image arriving(grad), image(x);
  Tensor taps = floats({kernel * kernel, in.c});
  DepthwiseBackward gradient = backward(in, out, kernel, stride, padding, arriving.data);
  gradient.image = {image.data, in.c, in.c, nullptr, nullptr, Activation::none, nullptr};
  gradient.dweight = static_cast<float*>(taps.mutable_data_ptr());
  in_parallel(work(out, kernel), [&](const Parallel& parallel) { run_depthwise_backward(gradient, parallel); });
  return unpack_taps(taps);
}

}  // namespace fastconv
