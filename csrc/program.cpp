// A whole network as one call: the packed operators of a plan, one after the other, with their intermediate results in an arena.
//
// Memory that a call leaves behind waits for the next one, so that steady state allocates nothing: glibc gives large blocks back to the
// system and takes them again, one page fault per 4 KiB (SqueezeNet 1.1's stem alone: 0.5 ms with its pages, 5.3 ms without).
#include <algorithm>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "csrc/ops.h"

namespace fastconv {

namespace {

using Call = std::function<Tensor(const Tensor& x, const OptionalTensor& residual)>;

struct Step {
  Call call;
  int64_t x, residual, output;  // slots; residual -1: none
};

// A step's arguments in the order of its operator's schema: tensors apart, everything else as numbers and activation names.
class Reader {
 public:
  Reader(std::vector<Tensor> weights, Ints numbers, const std::string& activations)
      : weights_(std::move(weights)), numbers_(std::move(numbers)) {
    for (size_t begin = 0; begin < activations.size();) {
      const size_t end = activations.find(',', begin);
      names_.push_back(activations.substr(begin, end - begin));
      begin = end + 1;
    }
  }
  Tensor tensor() { return weights_.at(next_weight_++); }
  OptionalTensor optional_tensor() { return number() ? OptionalTensor(tensor()) : std::nullopt; }
  std::vector<Tensor> tensors() {
    std::vector<Tensor> list;
    for (int64_t count = number(); count > 0; --count) list.push_back(tensor());
    return list;
  }
  int64_t number() { return numbers_.at(next_number_++); }
  Ints pair() {
    const int64_t first = number();
    return {first, number()};
  }
  OptionalString activation() {
    const std::string& name = names_.at(next_name_++);
    return name.empty() ? std::nullopt : OptionalString(name);
  }

 private:
  std::vector<Tensor> weights_;
  Ints numbers_;
  std::vector<std::string> names_;
  size_t next_weight_ = 0, next_number_ = 0, next_name_ = 0;
};

Call bound(const std::string& op, Reader r) {
  if (op == "stem_packed") {
    const Tensor panels = r.tensor(), bias = r.tensor();
    const Ints kernel = r.pair(), stride = r.pair(), padding = r.pair();
    return [=, activation = r.activation()](const Tensor& x, const OptionalTensor&) {
      return stem_packed(x, panels, bias, kernel, stride, padding, activation);
    };
  }
  if (op == "pointwise_packed") {
    const Tensor panels = r.tensor(), bias = r.tensor();
    return [=, activation = r.activation()](const Tensor& x, const OptionalTensor& residual) {
      return pointwise_packed(x, panels, bias, residual, activation);
    };
  }
  if (op == "depthwise_packed") {
    const Tensor taps = r.tensor(), bias = r.tensor();
    const Ints stride = r.pair(), padding = r.pair();
    return [=, activation = r.activation()](const Tensor& x, const OptionalTensor&) {
      return depthwise_packed(x, taps, bias, stride, padding, activation);
    };
  }
  if (op == "fire_expand_packed") {
    const Tensor panels1 = r.tensor(), bias1 = r.tensor(), panels3 = r.tensor(), bias3 = r.tensor();
    return [=](const Tensor& x, const OptionalTensor&) { return fire_expand_packed(x, panels1, bias1, panels3, bias3); };
  }
  if (op == "fire_packed") {
    const Tensor squeeze = r.tensor(), squeeze_bias = r.tensor(), panels1 = r.tensor(), bias1 = r.tensor(), panels3 = r.tensor(),
                 bias3 = r.tensor();
    return [=, winograd = r.optional_tensor()](const Tensor& x, const OptionalTensor&) {
      return fire_packed(x, squeeze, squeeze_bias, panels1, bias1, panels3, bias3, winograd);
    };
  }
  if (op == "inverted_residual_packed") {
    const OptionalTensor expand = r.optional_tensor(), expand_bias = r.optional_tensor();
    const Tensor taps = r.tensor(), depthwise_bias = r.tensor();
    const std::vector<Tensor> squeeze_excite = r.tensors();
    const Tensor project = r.tensor(), project_bias = r.tensor();
    const Ints stride = r.pair(), padding = r.pair();
    const OptionalString expand_activation = r.activation(), depthwise_activation = r.activation(), squeeze_activation = r.activation(),
                         gate_activation = r.activation(), activation = r.activation();
    return [=](const Tensor& x, const OptionalTensor& residual) {
      return inverted_residual_packed(x, expand, expand_bias, taps, depthwise_bias, squeeze_excite, project, project_bias, residual, stride,
                                      padding, expand_activation, depthwise_activation, squeeze_activation, gate_activation, activation);
    };
  }
  if (op == "max_pool") {
    const Ints stride = r.pair(), padding = r.pair();
    return [=, ceil_mode = r.number() != 0](const Tensor& x, const OptionalTensor&) { return max_pool(x, stride, padding, ceil_mode); };
  }
  check(op == "global_avg_pool", "program", "no operator ", op, " in a program");
  return [](const Tensor& x, const OptionalTensor&) { return global_avg_pool(x); };
}

class Program {
 public:
  void add(Step step) {
    slots_ = std::max({slots_, step.x + 1, step.residual + 1, step.output + 1});
    steps_.push_back(std::move(step));
  }

  // Slot 0 is the input; the last step's result is the caller's own, so it stands outside the arena.
  Tensor run(const Tensor& x) {
    Lease arena(*this);
    std::vector<OptionalTensor> values(slots_);
    values[0] = x;
    for (size_t i = 0; i < steps_.size(); ++i) {
      const Step& step = steps_[i];
      const bool last = i + 1 == steps_.size();
      const OutputPlace place(last ? nullptr : &arena.slot(step.output));
      Tensor y = step.call(*values[step.x], step.residual < 0 ? std::nullopt : values[step.residual]);
      if (last) return y;
      values[step.output] = y;
    }
    return x;
  }

 private:
  using Arena = std::vector<OutputBuffer>;

  // One arena a concurrent caller, handed on from call to call.
  class Lease {
   public:
    explicit Lease(Program& program) : program_(program) {
      const std::lock_guard<std::mutex> lock(program.mutex_);
      if (!program.idle_.empty()) {
        arena_ = std::move(program.idle_.back());
        program.idle_.pop_back();
      }
      arena_.resize(program.slots_);
    }
    ~Lease() {
      const std::lock_guard<std::mutex> lock(program_.mutex_);
      program_.idle_.push_back(std::move(arena_));
    }
    OutputBuffer& slot(int64_t index) { return arena_[index]; }

   private:
    Program& program_;
    Arena arena_;
  };

  std::vector<Step> steps_;
  int64_t slots_ = 1;
  std::mutex mutex_;
  std::vector<Arena> idle_;
};

std::mutex programs_mutex;
std::unordered_map<int64_t, std::shared_ptr<Program>> programs;
int64_t next_program = 0;

std::shared_ptr<Program> find(int64_t id) {
  const std::lock_guard<std::mutex> lock(programs_mutex);
  const auto found = programs.find(id);
  check(found != programs.end(), "program", "no program ", id);
  return found->second;
}

}  // namespace

int64_t program_new() {
  const std::lock_guard<std::mutex> lock(programs_mutex);
  programs[next_program] = std::make_shared<Program>();
  return next_program++;
}

void program_add(int64_t program, std::string op, std::vector<Tensor> weights, Ints numbers, std::string activations, int64_t x,
                 int64_t residual, int64_t output) {
  find(program)->add({bound(op, Reader(std::move(weights), std::move(numbers), activations)), x, residual, output});
}

Tensor program_run(Tensor x, int64_t program) { return find(program)->run(x); }

void program_free(int64_t program) {
  const std::lock_guard<std::mutex> lock(programs_mutex);
  programs.erase(program);
}

}  // namespace fastconv
