// What a packed operator does once its weights are there: the shape of its output, and the run. An operator runs its step once; a program
// keeps its steps.
#pragma once

#include <memory>

#include "csrc/tensor.h"
#include "kernels/cpu/scratch.h"

namespace fastconv {

struct Shape {
  int64_t n, c, h, w;
  int64_t image() const { return c * h * w; }  // elements
  bool operator==(const Shape&) const = default;
};
std::ostream& operator<<(std::ostream& text, const Shape& shape);
inline Shape shape_like(const Tensor& x) { return {x.size(0), x.size(1), x.size(2), x.size(3)}; }

// Images in memory. Between the steps of a program they are blocked; an operator's are channels_last, or NCHW for a stem.
struct Pixels {
  const float* data = nullptr;
  Shape shape{};
  Strides strides;
  bool nchw = false;  // then without strides
};
struct Target {
  float* data;
  Shape shape;
  Strides strides;
};
inline Pixels channels_last(const float* data, const Shape& shape) { return {data, shape, shape.c}; }
inline Target channels_last(float* data, const Shape& shape) { return {data, shape, shape.c}; }

class Step {
 public:
  virtual ~Step() = default;
  virtual const char* op() const = 0;
  virtual Shape output(const Shape& in) const = 0;  // throws if there is none
  virtual int64_t multiply_adds(const Shape& in, const Shape& out) const = 0;
  virtual bool reads_nchw() const { return false; }
  virtual bool reads_blocks() const { return true; }
  virtual bool writes_blocks() const { return true; }
  // A chain of steps is one step: the last takes in the one before it and has it make each row just before it is used. Input and output
  // are the chain's from then on. False: this step cannot, or it would not pay; `before` stays the caller's.
  virtual bool take(std::unique_ptr<Step>& before, bool residual_is_before) { return false; }
  // What makes this step's rows, or null where it makes only whole images.
  virtual std::unique_ptr<RowSource> source(const Pixels& x, const Shape& out_shape, int64_t threads) const { return nullptr; }
  virtual bool makes_rows() const { return false; }
  virtual int64_t weights() const { return 0; }  // floats, of the whole chain
  virtual int length() const { return 1; }       // steps of the chain
  // Of a matrix-vector product, which waits for its weights; or null.
  virtual const PackedPointwise* streams(const Shape& in) const { return nullptr; }
  // residual: of the output's shape, its data null where there is none.
  virtual void run(const Pixels& x, const Pixels& residual, const Target& out, const Parallel& parallel) const = 0;
};
using StepPointer = std::unique_ptr<Step>;

// Runs a step whose rows are not to be made on demand: its whole image, blocked, in memory that stays.
Target run_whole(const Step& step, const Pixels& x, Scratch& scratch, const Parallel& parallel);

// The packed operators' arguments; weights are checked here, once.
StepPointer stem_step(Tensor panels, Tensor bias, Ints kernel_size, Ints stride, Ints padding, Activation activation,
                      OptionalTensor winograd = std::nullopt);
StepPointer pointwise_step(Tensor panels, Tensor bias, Activation activation);
StepPointer depthwise_step(Tensor taps, Tensor bias, Ints stride, Ints padding, Activation activation);
StepPointer fire_expand_step(Tensor panels1x1, Tensor bias1x1, Tensor panels3x3, Tensor bias3x3);
StepPointer fire_step(Tensor squeeze_panels, Tensor squeeze_bias, Tensor panels1x1, Tensor bias1x1, Tensor panels3x3, Tensor bias3x3,
                      OptionalTensor winograd3x3);
struct BlockWeights {
  OptionalTensor expand_panels, expand_bias;
  Tensor taps, depthwise_bias;
  std::vector<Tensor> squeeze_excite;
  Tensor project_panels, project_bias;
};
struct BlockActivations {
  Activation expand, depthwise, squeeze, gate, project;
};
BlockActivations parse_activations(const OptionalString& expand, const OptionalString& depthwise, const OptionalString& squeeze,
                                   const OptionalString& gate, const OptionalString& project);
StepPointer block_step(const char* op, BlockWeights weights, BlockActivations activations, Ints stride, Ints padding);
StepPointer max_pool_step(Ints stride, Ints padding, bool ceil_mode);
StepPointer global_avg_pool_step();

// The step on a tensor, as an operator's whole work.
Tensor run_step(const Step& step, const Tensor& x, const OptionalTensor& residual, Output output);

}  // namespace fastconv
