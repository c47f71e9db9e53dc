#include "csrc/aten.h"

#include <array>
#include <utility>

namespace fastconv::aten {

namespace {

template <size_t RESULTS, class... Args>
std::array<Tensor, RESULTS> call_all(const char* op, const char* overload, const Args&... args) {
  static_assert(RESULTS <= sizeof...(Args));  // they come back in the arguments' place
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  if (torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS)  // it has printed the reason
    throw std::runtime_error(std::string("fastconv: ") + op +
                             " failed on these arguments, which only ATen computes; its own message stands above");
  return [&]<size_t... I>(std::index_sequence<I...>) {
    return std::array<Tensor, RESULTS>{torch::stable::detail::to<Tensor>(stack[I])...};
  }(std::make_index_sequence<RESULTS>{});
}

template <class... Args>
Tensor call(const char* op, const char* overload, const Args&... args) {
  return call_all<1>(op, overload, args...)[0];
}

// ATen's convolution misreads views of one channel whose pixels are apart, (1, 1, 1, 5) of strides (20, 1, 20, 4), at stride 3.
Tensor dense(const Tensor& x) { return x.is_contiguous() || is_channels_last(x) ? x : to_contiguous(x); }

}  // namespace

Tensor conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Ints& stride, const Ints& padding, int64_t groups) {
  return call("aten::convolution", "", dense(x), weight, bias, stride, padding, Ints{1, 1}, false, Ints{0, 0}, groups);
}

Tensor conv_backward(ConvGradient which, const Tensor& grad, const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding,
                     int64_t groups) {
  const bool wanted[3] = {which == ConvGradient::input, which == ConvGradient::weight, false};
  const auto gradients = call_all<3>("aten::convolution_backward", "", dense(grad), dense(x), weight, std::nullopt, stride, padding,
                                     Ints{1, 1}, false, Ints{0, 0}, groups, torch::headeronly::HeaderOnlyArrayRef<bool>(wanted, 3));
  return gradients[which == ConvGradient::input ? 0 : 1];
}

Tensor activate(const Tensor& x, const OptionalString& activation) {
  return activation ? call(("aten::" + *activation).c_str(), "", x) : x;
}

// The stable ABI hands no Scalar to the dispatcher, and add takes one; x - (-y) has the same bits.
Tensor add(const Tensor& x, const Tensor& y) { return torch::stable::subtract(x, call("aten::neg", "", y)); }

Tensor cat_channels(const Tensor& x, const Tensor& y) { return call("aten::cat", "", std::vector<Tensor>{x, y}, int64_t{1}); }

Tensor max_pool(const Tensor& x, const Ints& stride, const Ints& padding, bool ceil_mode) {
  return call("aten::max_pool2d", "", x, Ints{3, 3}, stride, padding, Ints{1, 1}, ceil_mode);
}

Tensor global_avg_pool(const Tensor& x) { return call("aten::adaptive_avg_pool2d", "", x, Ints{1, 1}); }

Tensor formatted_like(const Tensor& result, const Tensor& x) {
  const bool channels_last = is_channels_last(x) && !x.is_contiguous();
  if (result.numel() == 0)  // of no elements, every order is contiguous: the strides must be made
    return torch::stable::empty(result.sizes(), result.scalar_type(), std::nullopt, std::nullopt, std::nullopt,
                                channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  return torch::stable::contiguous(result, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Tensor conv_act(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Ints& stride, const Ints& padding, int64_t groups,
                const OptionalString& activation, const OptionalTensor& residual) {
  Tensor y = conv(x, weight, bias, stride, padding, groups);
  if (residual) y = add(y, *residual);
  return activate(y, activation);
}

}  // namespace fastconv::aten
