// inverted_residual, and separable: the same block without its expansion.
#include "csrc/ops.h"

namespace fastconv {

namespace {

class BlockStep : public Step {
 public:
  BlockStep(const char* op, BlockWeights weights, BlockActivations activations, Ints stride, Ints padding)
      : op_(op), weights_(std::move(weights)), stride_(std::move(stride)), padding_(std::move(padding)), activations_(activations) {
    channels_ = weights_.depthwise_bias.numel();
    check_taps(op, weights_.taps, weights_.depthwise_bias, channels_, stride_, padding_);
    in_channels_ = channels_;
    if (weights_.expand_panels) {
      const Tensor& panels = *weights_.expand_panels;
      check(weights_.expand_bias.has_value(), op, "expand_bias must be given with expand_panels");
      expand_ = check_pointwise(op, "expand_panels", panels, *weights_.expand_bias, 0, activations_.expand);
      check(expand_.packing != Packing::strassen, op, "expand_panels cannot be packed for Strassen's algorithm");
      in_channels_ = expand_.in_channels;
      check(expand_.out_channels == channels_, op, "expand_panels must give the depthwise convolution's ", channels_, " channels, got ",
            expand_.out_channels);
    }
    project_ = check_pointwise(op, "project_panels", weights_.project_panels, weights_.project_bias, channels_, activations_.project);
    out_channels_ = project_.out_channels;
    const std::vector<Tensor>& se = weights_.squeeze_excite;
    if (!se.empty()) {
      check(se.size() == 4, op, "squeeze_excite must be empty or [reduce_panels, reduce_bias, expand_panels, expand_bias], got ", se.size(),
            " tensors");
      reduced_ = check_panels(op, "squeeze_excite[0]", se[0], se[1], channels_);
      check(check_panels(op, "squeeze_excite[2]", se[2], se[3], reduced_) == channels_, op, "squeeze_excite[2] must give ", channels_,
            " channels");
    }
    kernel_ = weights_.taps.size(0) == 9 ? 3 : 5;
    if (!se.empty())
      gate_ = {{data(se[0]), data(se[1]), channels_, reduced_, activations_.squeeze},
               {data(se[2]), data(se[3]), reduced_, channels_, activations_.gate}};
    taps_ = data(weights_.taps), depthwise_bias_ = data(weights_.depthwise_bias);
  }
  const char* op() const override { return op_; }
  Shape output(const Shape& x) const override {
    const Shape in = before_ ? before_->output(x) : x;
    check_channels(op_, in, in_channels_);
    return {in.n, out_channels_, output_size(op_, "height", in.h, kernel_, stride_[0], padding_[0]),
            output_size(op_, "width", in.w, kernel_, stride_[1], padding_[1])};
  }
  int64_t multiply_adds(const Shape& x, const Shape& out) const override {
    const Shape in = before_ ? before_->output(x) : x;
    const int64_t expand = expands() ? in.h * in.w * in_channels_ : 0;
    return in.n * channels_ * (expand + out.h * out.w * (kernel_ * kernel_ + out_channels_) + 2 * reduced_) +
           (before_ ? before_->multiply_adds(x, in) : 0);
  }
  bool reads_nchw() const override { return before_ && before_->reads_nchw(); }

  // A chain's rings and weights have to stay in L2 together.
  static constexpr int64_t CHAIN_WEIGHTS = 64 * 1024;
  bool makes_rows() const override { return reduced_ == 0 && weights() <= CHAIN_WEIGHTS && length() < MAX_LEVELS; }
  int64_t weights() const override {
    return channels_ * ((expands() ? in_channels_ : 0) + out_channels_) + (before_ ? before_->weights() : 0);
  }
  int length() const override { return 1 + (before_ ? before_->length() : 0); }
  bool take(StepPointer& before, bool residual_is_before) override {
    if (reduced_ > 0 || weights() + before->weights() > CHAIN_WEIGHTS || (residual_is_before && expands())) return false;
    before_ = std::move(before);
    residual_is_before_ = residual_is_before;
    return true;
  }
  std::unique_ptr<RowSource> source(const Pixels& x, const Shape& shape, int64_t threads) const override {
    class Rows : public RowSource {
     public:
      std::unique_ptr<RowSource> before, block;
      void rows(int64_t image, Range rows, float* to, Strides strides, int64_t worker) const override {
        block->rows(image, rows, to, strides, worker);
      }
    };
    auto made = std::make_unique<Rows>();
    const Shape in = before_ ? before_->output(x.shape) : x.shape;
    if (before_) made->before = before_->source(x, in, threads);
    made->block =
        block_rows(block(before_ ? Pixels{nullptr, in, 0} : x, made->before.get(), {}, {nullptr, shape, 0}), threads, length() - 1);
    return made;
  }

  void run(const Pixels& x, const Pixels& residual, const Target& out, const Parallel& parallel) const override {
    if (!before_) return run_inverted_residual(block(x, nullptr, residual, out), parallel);
    const Shape in = before_->output(x.shape);
    InvertedResidual call = block({nullptr, in, 0}, nullptr, residual, out);
    std::unique_ptr<RowSource> source;
    if (worth_chaining(call, parallel.threads())) {
      source = before_->source(x, in, parallel.threads());
      call.source = source.get();
    } else {
      const Target whole = run_whole(*before_, x, step_scratch[length()], parallel);
      call.x = whole.data;
      call.x_strides = whole.strides;
      if (call.residual_is_source) call.residual = whole.data, call.residual_strides = whole.strides;
      call.residual_is_source = false;
    }
    run_inverted_residual(call, parallel);
  }

 private:
  bool expands() const { return weights_.expand_panels.has_value(); }
  InvertedResidual block(const Pixels& x, const RowSource* source, const Pixels& residual, const Target& out) const {
    const Shape &in = x.shape, &shape = out.shape;
    return {x.data,
            x.strides,
            source,
            in.n,
            in.h,
            in.w,
            in_channels_,
            expand_,
            taps_,
            depthwise_bias_,
            channels_,
            kernel_,
            stride_[0],
            stride_[1],
            padding_[0],
            padding_[1],
            activations_.depthwise,
            gate_,
            project_,
            residual.data,
            residual.strides,
            residual_is_before_,
            shape.h,
            shape.w,
            out.data,
            out.strides};
  }

  StepPointer before_;
  bool residual_is_before_ = false;
  const char* op_;
  BlockWeights weights_;
  // Where they stand: the way there through torch's objects, out of the caches between two calls, was half of the 1.0 us between two steps.
  PackedPointwise expand_{}, project_;
  SqueezeExcite gate_{};
  const float *taps_, *depthwise_bias_;
  Ints stride_, padding_;
  BlockActivations activations_;
  int64_t in_channels_, channels_, out_channels_, kernel_, reduced_ = 0;
};

void check_block(const char* op, const Tensor& x, const Tensor& depthwise_weight, const OptionalTensor& depthwise_bias, const char* last,
                 const Tensor& weight, const OptionalTensor& bias, const char* bias_name, int64_t channels, const Ints& stride,
                 const Ints& padding) {
  check_depthwise_weight(op, "depthwise_weight", depthwise_weight, channels, x);
  check_bias(op, "depthwise_bias", depthwise_bias, channels, x);
  check_pointwise_weight(op, last, weight, channels, x);
  check_bias(op, bias_name, bias, weight.size(0), x);
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  output_size(op, "height", x.size(2), depthwise_weight.size(2), stride[0], padding[0]);
  output_size(op, "width", x.size(3), depthwise_weight.size(3), stride[1], padding[1]);
}

}  // namespace

BlockActivations parse_activations(const OptionalString& expand, const OptionalString& depthwise, const OptionalString& squeeze,
                                   const OptionalString& gate, const OptionalString& project) {
  const char* op = "inverted_residual";
  return {parse_activation(op, "expand_activation", expand), parse_activation(op, "depthwise_activation", depthwise),
          parse_activation(op, "squeeze_activation", squeeze), parse_activation(op, "gate_activation", gate),
          parse_activation(op, "activation", project)};
}

StepPointer block_step(const char* op, BlockWeights weights, BlockActivations activations, Ints stride, Ints padding) {
  return std::make_unique<BlockStep>(op, std::move(weights), activations, std::move(stride), std::move(padding));
}

Tensor separable(Tensor x, Tensor depthwise_weight, OptionalTensor depthwise_bias, Tensor pointwise_weight, OptionalTensor pointwise_bias,
                 Ints stride, Ints padding, OptionalString depthwise_activation, OptionalString activation, OptionalTensor residual) {
  const char* op = "separable";
  check_image(op, x);
  check_block(op, x, depthwise_weight, depthwise_bias, "pointwise_weight", pointwise_weight, pointwise_bias, "pointwise_bias", x.size(1),
              stride, padding);
  const BlockActivations activations{
      {}, parse_activation(op, "depthwise_activation", depthwise_activation), {}, {}, parse_activation(op, "activation", activation)};
  if (residual) {
    const int64_t kernel = depthwise_weight.size(2);
    check_residual(op, *residual, x, x.size(0), pointwise_weight.size(0),
                   output_size(op, "height", x.size(2), kernel, stride[0], padding[0]),
                   output_size(op, "width", x.size(3), kernel, stride[1], padding[1]));
  }
  if (!covered(op, x) || !depthwise_covers(depthwise_weight.size(2), stride, padding)) {
    const Tensor middle = aten::conv_act(x, depthwise_weight, depthwise_bias, stride, padding, x.size(1), depthwise_activation);
    return aten::formatted_like(aten::conv_act(middle, pointwise_weight, pointwise_bias, {1, 1}, {0, 0}, 1, activation, residual), x);
  }
  const BlockWeights weights{std::nullopt,
                             std::nullopt,
                             pack_taps(depthwise_weight),
                             bias_or_zeros(depthwise_bias, x.size(1)),
                             {},
                             pack_panels(pointwise_weight),
                             bias_or_zeros(pointwise_bias, pointwise_weight.size(0))};
  return run_step(BlockStep(op, weights, activations, stride, padding), x, residual, Output::like_input);
}

Tensor inverted_residual(Tensor x, Tensor expand_weight, OptionalTensor expand_bias, Tensor depthwise_weight, OptionalTensor depthwise_bias,
                         Tensor project_weight, OptionalTensor project_bias, Ints stride, Ints padding, OptionalString activation,
                         bool residual) {
  const char* op = "inverted_residual";
  check_image(op, x);
  check_pointwise_weight(op, "expand_weight", expand_weight, x.size(1), x);
  const int64_t channels = expand_weight.size(0);
  check_bias(op, "expand_bias", expand_bias, channels, x);
  check_block(op, x, depthwise_weight, depthwise_bias, "project_weight", project_weight, project_bias, "project_bias", channels, stride,
              padding);
  const Activation parsed = parse_activation(op, "activation", activation);
  OptionalTensor added;
  if (residual) {
    const int64_t kernel = depthwise_weight.size(2);
    const int64_t out_height = output_size(op, "height", x.size(2), kernel, stride[0], padding[0]),
                  out_width = output_size(op, "width", x.size(3), kernel, stride[1], padding[1]);
    check(project_weight.size(0) == x.size(1) && out_height == x.size(2) && out_width == x.size(3), op,
          "residual needs an output of x's shape ", shape_of{x}, ", got (", x.size(0), ", ", project_weight.size(0), ", ", out_height, ", ",
          out_width, ")");
    added = x;
  }
  if (!covered(op, x) || !depthwise_covers(depthwise_weight.size(2), stride, padding)) {
    const Tensor expanded = aten::conv_act(x, expand_weight, expand_bias, {1, 1}, {0, 0}, 1, activation);
    const Tensor middle = aten::conv_act(expanded, depthwise_weight, depthwise_bias, stride, padding, channels, activation);
    return aten::formatted_like(aten::conv_act(middle, project_weight, project_bias, {1, 1}, {0, 0}, 1, std::nullopt, added), x);
  }
  const BlockWeights weights{pack_panels(expand_weight),
                             bias_or_zeros(expand_bias, channels),
                             pack_taps(depthwise_weight),
                             bias_or_zeros(depthwise_bias, channels),
                             {},
                             pack_panels(project_weight),
                             bias_or_zeros(project_bias, project_weight.size(0))};
  return run_step(BlockStep(op, weights, {parsed, parsed, {}, {}, Activation::none}, stride, padding), x, added, Output::like_input);
}

Tensor inverted_residual_packed(Tensor x, OptionalTensor expand_panels, OptionalTensor expand_bias, Tensor taps, Tensor depthwise_bias,
                                std::vector<Tensor> squeeze_excite, Tensor project_panels, Tensor project_bias, OptionalTensor residual,
                                Ints stride, Ints padding, OptionalString expand_activation, OptionalString depthwise_activation,
                                OptionalString squeeze_activation, OptionalString gate_activation, OptionalString activation) {
  return run_step(
      BlockStep("inverted_residual", {expand_panels, expand_bias, taps, depthwise_bias, squeeze_excite, project_panels, project_bias},
                parse_activations(expand_activation, depthwise_activation, squeeze_activation, gate_activation, activation), stride,
                padding),
      x, residual, Output::channels_last);
}

}  // namespace fastconv
