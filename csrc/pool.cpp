// max_pool (3x3) and global_avg_pool.
#include "csrc/ops.h"

namespace fastconv {

namespace {

// As ATen: with ceil_mode the last window may hang over the far side, but must start inside the image or its near padding.
int64_t pooled_size(const char* op, const char* axis, int64_t size, int64_t stride, int64_t padding, bool ceil_mode) {
  const int64_t extra = ceil_mode ? stride - 1 : 0;
  check(size + 2 * padding - 3 + extra >= 0, op, "x has no output pixels: ", axis, " ", size, " with padding ", padding,
        " is below the window's 3");
  int64_t out = (size + 2 * padding - 3 + extra) / stride + 1;
  if (ceil_mode && (out - 1) * stride >= size + padding) --out;
  check(out > 0, op, "x has no output pixels: ", axis, " ", size, " with padding ", padding);
  return out;
}

class MaxPoolStep : public Step {
 public:
  MaxPoolStep(Ints stride, Ints padding, bool ceil_mode) : stride_(std::move(stride)), padding_(std::move(padding)), ceil_mode_(ceil_mode) {
    check_pair(op(), "stride", stride_, 1);
    check_pair(op(), "padding", padding_, 0);
    check(padding_[0] <= 1 && padding_[1] <= 1, op(), "padding must be at most 1, half the window, got (", padding_[0], ", ", padding_[1],
          ")");
  }
  const char* op() const override { return "max_pool"; }
  Shape output(const Shape& x) const override {
    const Shape in = before_ ? before_->output(x) : x;
    check(in.h > 0 && in.w > 0, op(), "x has no pixels: ", in);
    return {in.n, in.c, pooled_size(op(), "height", in.h, stride_[0], padding_[0], ceil_mode_),
            pooled_size(op(), "width", in.w, stride_[1], padding_[1], ceil_mode_)};
  }
  int64_t multiply_adds(const Shape& in, const Shape& out) const override {  // and comparisons
    return 9 * out.n * out.image() + (before_ ? before_->multiply_adds(in, before_->output(in)) : 0);
  }
  bool reads_nchw() const override { return before_ && before_->reads_nchw(); }
  bool take(StepPointer& before, bool) override {
    before_ = std::move(before);
    return true;
  }
  int length() const override { return 1 + (before_ ? before_->length() : 0); }
  void run(const Pixels& x, const Pixels&, const Target& out, const Parallel& parallel) const override {
    if (!before_) return pool(x, nullptr, out, parallel);
    const Shape in = before_->output(x.shape);
    if (worth_chaining(out.shape.h, parallel.threads())) {
      const std::unique_ptr<RowSource> source = before_->source(x, in, parallel.threads());
      return pool({nullptr, in, 0}, source.get(), out, parallel);
    }
    const Target whole = run_whole(*before_, x, step_scratch[0], parallel);
    pool({whole.data, in, whole.strides}, nullptr, out, parallel);
  }

 private:
  void pool(const Pixels& x, const RowSource* source, const Target& out, const Parallel& parallel) const {
    const Shape& in = x.shape;
    const MaxPool image{
        x.data,   x.strides,  in.w * x.strides.pixel, in.h, in.h, in.w, in.c, out.shape.w, stride_[0], stride_[1], padding_[0], padding_[1],
        out.data, out.strides};
    run_max_pool(image, in.n, out.shape.h, source, parallel);
  }

  StepPointer before_;
  Ints stride_, padding_;
  bool ceil_mode_;
};

class GlobalAvgPoolStep : public Step {
 public:
  const char* op() const override { return "global_avg_pool"; }
  Shape output(const Shape& in) const override {
    check(in.h > 0 && in.w > 0, op(), "x has no pixels: ", in);
    return {in.n, in.c, 1, 1};
  }
  int64_t multiply_adds(const Shape& in, const Shape&) const override { return in.n * in.image(); }  // additions
  void run(const Pixels& x, const Pixels&, const Target& out, const Parallel& parallel) const override {
    run_global_avg_pool(x.data, x.strides, x.shape.n, x.shape.h * x.shape.w, x.shape.c, out.data, out.strides, parallel);
  }
};

}  // namespace

StepPointer max_pool_step(Ints stride, Ints padding, bool ceil_mode) {
  return std::make_unique<MaxPoolStep>(std::move(stride), std::move(padding), ceil_mode);
}
StepPointer global_avg_pool_step() { return std::make_unique<GlobalAvgPoolStep>(); }

Tensor max_pool(Tensor x, Ints stride, Ints padding, bool ceil_mode) {
  check_image("max_pool", x);
  const MaxPoolStep step(stride, padding, ceil_mode);
  step.output(shape_like(x));
  if (!covered(step.op(), x)) return aten::formatted_like(aten::max_pool(x, stride, padding, ceil_mode), x);
  return run_step(step, x, std::nullopt, Output::like_input);
}

Tensor global_avg_pool(Tensor x) {
  check_image("global_avg_pool", x);
  const GlobalAvgPoolStep step;
  step.output(shape_like(x));
  if (!covered(step.op(), x)) return aten::formatted_like(aten::global_avg_pool(x), x);
  return run_step(step, x, std::nullopt, Output::like_input);
}

}  // namespace fastconv
