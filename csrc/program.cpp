// A whole network as one call: the steps of a plan by one team of threads, with their intermediate results in an arena.
//
// Images go through the network in small groups, one thread each, so that intermediate results stay in the caches whatever the batch. Where
// images have become small the groups grow, and more of them share what is read of the weights. Images that are left over, or a batch
// smaller than the team, are split among the threads layer by layer.
//
// Memory that a call leaves behind waits for the next one, so that steady state allocates nothing: glibc gives large blocks back to the
// system and takes them again, one page fault per 4 KiB (SqueezeNet 1.1's stem alone: 0.5 ms with its pages, 5.3 ms without).
#include <algorithm>
#include <charconv>
#include <chrono>
#include <iterator>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <unordered_map>

#include "csrc/ops.h"

namespace fastconv {

namespace {

// One more when a packed operator's arguments or the order of packed weights in memory change: exported models hold both.
constexpr const char* PROGRAM_FORMAT = "fastconv 2";

// A step's arguments in the order of its operator's schema: the weights from the program's list, everything else as the step's words.
class Reader {
 public:
  Reader(const std::vector<Tensor>& weights, size_t& next_weight, std::vector<std::string> words)
      : weights_(weights), next_weight_(next_weight), words_(std::move(words)) {}
  Tensor tensor() {
    check(next_weight_ < weights_.size(), "network", "the program wants more than its ", weights_.size(), " weights");
    return weights_[next_weight_++];
  }
  OptionalTensor optional_tensor() { return number() ? OptionalTensor(tensor()) : std::nullopt; }
  std::vector<Tensor> tensors() {
    std::vector<Tensor> list;
    for (int64_t count = number(); count > 0; --count) list.push_back(tensor());
    return list;
  }
  const std::string& word() {
    check(next_word_ < words_.size(), "network", "a step of the program ends early: ", *this);
    return words_[next_word_++];
  }
  int64_t number() {
    const std::string& text = word();
    int64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    check(error == std::errc{} && end == text.data() + text.size(), "network", "wanted a number, got '", text, "' in ", *this);
    return value;
  }
  Ints pair() {
    const int64_t first = number();
    return {first, number()};
  }
  OptionalString activation() {
    const std::string& name = word();
    return name == "none" ? std::nullopt : OptionalString(name);
  }
  void finish() const { check(next_word_ == words_.size(), "network", "a step of the program does not end: ", *this); }
  friend std::ostream& operator<<(std::ostream& text, const Reader& reader) {
    for (size_t i = 0; i < reader.words_.size(); ++i) text << (i ? " " : "'") << reader.words_[i];
    return text << "'";
  }

 private:
  const std::vector<Tensor>& weights_;
  size_t& next_weight_;
  std::vector<std::string> words_;
  size_t next_word_ = 0;
};

StepPointer make_step(const std::string& op, Reader& r) {
  if (op == "stem_packed") {
    const Tensor panels = r.tensor(), bias = r.tensor();
    const Ints kernel = r.pair(), stride = r.pair(), padding = r.pair();
    const Activation activation = parse_activation("stem", "activation", r.activation());
    return stem_step(panels, bias, kernel, stride, padding, activation, r.optional_tensor());
  }
  if (op == "pointwise_packed") {
    const Tensor panels = r.tensor(), bias = r.tensor();
    return pointwise_step(panels, bias, parse_activation("pointwise", "activation", r.activation()));
  }
  if (op == "depthwise_packed") {
    const Tensor taps = r.tensor(), bias = r.tensor();
    const Ints stride = r.pair(), padding = r.pair();
    return depthwise_step(taps, bias, stride, padding, parse_activation("depthwise", "activation", r.activation()));
  }
  if (op == "fire_expand_packed") {
    const Tensor panels1 = r.tensor(), bias1 = r.tensor(), panels3 = r.tensor(), bias3 = r.tensor();
    return fire_expand_step(panels1, bias1, panels3, bias3);
  }
  if (op == "fire_packed") {
    const Tensor squeeze = r.tensor(), squeeze_bias = r.tensor(), panels1 = r.tensor(), bias1 = r.tensor(), panels3 = r.tensor(),
                 bias3 = r.tensor();
    return fire_step(squeeze, squeeze_bias, panels1, bias1, panels3, bias3, r.optional_tensor());
  }
  if (op == "inverted_residual_packed") {
    const OptionalTensor expand = r.optional_tensor(), expand_bias = r.optional_tensor();
    const Tensor taps = r.tensor(), depthwise_bias = r.tensor();
    const std::vector<Tensor> squeeze_excite = r.tensors();
    const Tensor project = r.tensor(), project_bias = r.tensor();
    const Ints stride = r.pair(), padding = r.pair();
    OptionalString names[5];  // expand, depthwise, squeeze, gate, project
    for (OptionalString& name : names) name = r.activation();
    return block_step("inverted_residual", {expand, expand_bias, taps, depthwise_bias, squeeze_excite, project, project_bias},
                      parse_activations(names[0], names[1], names[2], names[3], names[4]), stride, padding);
  }
  if (op == "max_pool") {
    const Ints stride = r.pair(), padding = r.pair();
    return max_pool_step(stride, padding, r.number() != 0);
  }
  check(op == "global_avg_pool", "network", "no operator ", op, " in a program");
  return global_avg_pool_step();
}

class Program {
  using Clock = std::vector<double>;  // microseconds of every step

 public:
  // Values count from 0, the input, and every step makes one of its own; residual -1: none.
  void add(StepPointer step, int64_t x, int64_t residual) {
    check(x >= 0 && x < values_ && residual >= -1 && residual < values_, "network", "step ", values_, " of the program reads values ", x,
          " and ", residual, ", of which there are ", values_);
    if (steps_.empty()) first_op_ = step->op();
    steps_.push_back({std::move(step), x, residual, values_++});
  }

  bool empty() const { return steps_.empty(); }
  // After the last add().
  void settle() {
    join();
    place();
  }

  // The last step's result is the caller's own, so it stands outside the arena. flat: (N, C) of (N, C, 1, 1). clock: gets the time of every
  // step.
  Tensor run(const Tensor& x, bool flat = false, Clock* clock = nullptr) {
    check_packed_image(first_op_, x);
    const int64_t batch = x.size(0);
    const std::shared_ptr<const Layout> planned = layout_for({1, x.size(1), x.size(2), x.size(3)});
    const Layout& layout = *planned;
    const Shape& last = layout.shapes.back();
    const bool direct = !is_channels_last(x) && x.is_contiguous() && reads_nchw();
    const Image image(x, direct);
    check(!flat || last.h * last.w == 1, "program", "only an output of one pixel can be flat, got ", last);
    Tensor result = flat ? floats({batch, last.c}) : fastconv::empty({batch, last.c, last.h, last.w}, MemoryFormat::ChannelsLast);
    advise_huge_pages(reinterpret_cast<uintptr_t>(result.mutable_data_ptr()), result.numel() * sizeof(float));
    const Pixels images{image.data, shape_like(x), x.size(1), direct};
    const Target results{static_cast<float*>(result.mutable_data_ptr()), {batch, last.c, last.h, last.w}, last.c};
    Lease arenas(*this);
    in_parallel(batch * layout.multiply_adds, [&](const Parallel& parallel) {
      const int64_t threads = parallel.threads(), whole = batch - batch % threads;
      arenas.resize(threads + 2);
      for (int64_t n = 0, end = 0; n < whole; n = end) {
        end = std::min(n + MOST_IMAGES * threads, whole);
        run_phases(layout, part(images, {n, end}), part(results, {n, end}), arenas, parallel, clock);
      }
      for (int64_t n = whole; n < batch; ++n)
        run_steps(layout, {0, count()}, part(images, {n, n + 1}), part(results, {n, n + 1}), arenas[0], parallel, clock);
    });
    return result;
  }

  // Of every step of a run: how many steps of the text it is, and the microseconds it took.
  Tensor times(const Tensor& x) {
    Clock clock(steps_.size());
    run(x, false, &clock);
    Tensor rows = floats({static_cast<int64_t>(steps_.size()), 2});
    float* to = static_cast<float*>(rows.mutable_data_ptr());
    for (size_t i = 0; i < steps_.size(); ++i) {
      *to++ = static_cast<float>(steps_[i].step->length());
      *to++ = static_cast<float>(clock[i]);
    }
    return rows;
  }

 private:
  // A group's largest intermediate result, in and out, should stay in a core's share of L3 (4 MiB).
  static constexpr int64_t GROUP_FLOATS = 1024 * 1024;
  // Images that a thread has in hand, and groups of small ones: 4 keep two pieces a thread, for one that is held up.
  static constexpr int64_t MOST_IMAGES = 8, MOST_SMALL = 4;
  // What makes images small: floats of one that the first such step reads, and that any later one reads and writes.
  static constexpr int64_t SMALL_INPUT = 40 * 1024, SMALL_STEP = 80 * 1024, VECTOR_STEP = 4 * 1024;

  struct Placed {
    StepPointer step;
    int64_t x, residual, output;  // values; slots of the arena once place() has run
    bool writes_blocks = false;   // and who reads it takes them
    bool alone = false;           // of what steps before it made, `x` is all that it and later ones read
  };

  // Weights of a later matrix-vector product, which products from step `from` on fetch: so many multiply-adds.
  struct Ahead {
    const PackedPointwise* weights;
    int64_t from, work;
  };

  // The sizes of one image's way through the network.
  struct Layout {
    std::vector<Shape> shapes;  // of the input, then of every step's output
    int64_t most_floats = 1, multiply_adds = 0;
    std::vector<Ahead> ahead;
    int64_t small, vectors;  // the steps from which on images are small, and no more than vectors
  };

  // Steps whose output only the next one reads become one with it, where that can use rows as they are made.
  void join() {
    for (size_t i = 0; i + 1 < steps_.size();) {
      Placed &first = steps_[i], &next = steps_[i + 1];
      const int64_t made = first.output;
      const bool alone = next.x == made && (next.residual < 0 || next.residual == made) && first.residual < 0 && !read_after(i + 1, made);
      if (!alone || !first.step->makes_rows() || !next.step->take(first.step, next.residual == made)) {
        ++i;
        continue;
      }
      next.x = first.x;
      next.residual = -1;
      steps_.erase(steps_.begin() + i);
    }
  }

  bool read_after(size_t i, int64_t value) const {
    return std::any_of(steps_.begin() + i + 1, steps_.end(),
                       [&](const Placed& later) { return later.x == value || later.residual == value; });
  }

  // Values to slots, after join(): what a chain reads lasts to its end. A slot is free again when the last step that reads its value has
  // run, so an output never takes the place of what its own step reads. Slot 0 is the input's.
  void place() {
    std::vector<size_t> last(values_, 0);
    for (size_t i = 0; i < steps_.size(); ++i)
      for (const int64_t value : {steps_[i].x, steps_[i].residual})
        if (value >= 0) last[value] = i;
    for (size_t i = 1; i < steps_.size(); ++i) {
      const auto done = [&](int64_t value) { return value == steps_[i].x || last[value] < i; };
      steps_[i].alone = done(0) && std::all_of(steps_.begin(), steps_.begin() + i, [&](const Placed& made) { return done(made.output); });
    }
    for (Placed& made : steps_)
      made.writes_blocks = &made != &steps_.back() && made.step->writes_blocks() &&
                           std::all_of(steps_.begin(), steps_.end(),
                                       [&](const Placed& reader) { return reader.x != made.output || reader.step->reads_blocks(); });
    std::vector<int64_t> slots(values_, 0), free;
    for (size_t i = 0; i < steps_.size(); ++i) {
      Placed& step = steps_[i];
      const int64_t x = step.x, residual = step.residual, output = step.output;
      if (free.empty()) free.push_back(slots_++);
      slots[output] = free.back();
      free.pop_back();
      if (x != 0 && last[x] == i) free.push_back(slots[x]);
      if (residual > 0 && residual != x && last[residual] == i) free.push_back(slots[residual]);
      if (last[output] <= i) free.push_back(slots[output]);  // nobody reads it
      step = {std::move(step.step), slots[x], residual < 0 ? residual : slots[residual], slots[output], step.writes_blocks, step.alone};
    }
  }

  Layout plan(const Shape& x) const {
    Layout layout;
    layout.shapes.push_back(x);
    std::vector<Shape> at(slots_, x);
    std::vector<int64_t> work;           // multiply-adds of each step that can fetch beside them
    std::vector<int64_t> reads, floats;  // of one image: what each step reads, and that and what it writes
    for (const Placed& placed : steps_) {
      const Shape in = at[placed.x], out = placed.step->output(in);
      if (placed.residual >= 0) {
        const Shape& added = at[placed.residual];
        check(added.image() == out.image() && added.c == out.c && added.h == out.h, placed.step->op(),
              "residual must have the output's shape ", out, ", got ", added);
      }
      layout.shapes.push_back(out);
      reads.push_back(in.image());
      floats.push_back(in.image() + out.image());
      const int64_t multiply_adds = placed.step->multiply_adds(in, out);
      const PackedPointwise* const streamed = placed.step->streams(in);
      if (streamed) {  // fetched as late as can be, so that they are still in L2
        Ahead ahead{streamed, static_cast<int64_t>(work.size()), 0};
        while (ahead.from > 0 && !fetchable(*streamed, ahead.work)) ahead.work += work[--ahead.from];
        layout.ahead.push_back(ahead);
      }
      work.push_back(streamed ? 0 : multiply_adds);
      layout.multiply_adds += multiply_adds;
      at[placed.output] = out;
    }
    layout.small = layout.vectors = count();
    for (int64_t i = count() - 1, most = 0; i > 0; --i) {
      most = std::max(most, floats[i]);
      if (!steps_[i].alone) continue;
      if (most <= VECTOR_STEP) layout.vectors = i;
      if (most <= SMALL_STEP && reads[i] <= SMALL_INPUT) layout.small = i;
    }
    for (int64_t i = 0; i < layout.small; ++i) layout.most_floats = std::max(layout.most_floats, floats[i]);
    return layout;
  }

  // The last one is kept: making it asks every step, 2 to 5 us that calls of one size need not spend.
  std::shared_ptr<const Layout> layout_for(const Shape& x) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (layout_ && layout_->shapes.front() == x) return layout_;
    }
    auto layout = std::make_shared<const Layout>(plan(x));
    const std::lock_guard<std::mutex> lock(mutex_);
    return layout_ = std::move(layout);
  }

  bool reads_nchw() const {
    return std::all_of(steps_.begin(), steps_.end(),
                       [](const Placed& placed) { return placed.residual != 0 && (placed.x != 0 || placed.step->reads_nchw()); });
  }

  int64_t count() const { return static_cast<int64_t>(steps_.size()); }

  static Pixels part(Pixels images, Range range) {
    images.data += range.begin * (images.nchw ? images.shape.image() : images.shape.h * images.shape.w * images.strides.pixel);
    images.shape.n = range.size();
    return images;
  }
  static Target part(Target images, Range range) {
    images.data += range.begin * images.shape.h * images.shape.w * images.strides.pixel;
    images.shape.n = range.size();
    return images;
  }

  // What a step makes of so many images, and the floats that it takes in an arena.
  Target made_by(const Layout& layout, int64_t step, int64_t images) const {
    Shape shape = layout.shapes[step + 1];
    shape.n = images;
    return {nullptr, shape, steps_[step].writes_blocks ? blocked(images * shape.h * shape.w) : Strides(shape.c)};
  }
  int64_t floats_of(int64_t step, const Target& made) const {
    const int64_t pixels = made.shape.n * made.shape.h * made.shape.w;
    return steps_[step].writes_blocks ? blocked_floats(pixels, made.shape.c) : ceil_div(pixels * made.shape.c, PANEL) * PANEL;
  }

  class Lease;
  // As many images for every thread: in groups whose results stay in the caches, then in larger ones, and at last all of them in each step.
  void run_phases(const Layout& layout, const Pixels& x, const Target& out, Lease& arenas, const Parallel& parallel, Clock* clock) const {
    const int64_t images = x.shape.n, threads = parallel.threads();
    if (images == 1) return run_steps(layout, {0, count()}, x, out, arenas[0], parallel, clock);
    const int64_t begins[] = {0, layout.small, layout.vectors, count()};
    const int64_t groups[] = {std::clamp<int64_t>(GROUP_FLOATS / layout.most_floats, 1, std::max<int64_t>(1, images / (4 * threads))),
                              std::clamp<int64_t>(images / (2 * threads), 1, MOST_SMALL), images};
    Pixels from = x;
    for (int phase = 0; phase < 3; ++phase) {
      const Range steps{begins[phase], begins[phase + 1]};
      if (steps.size() == 0) continue;
      Target to = out;
      if (steps.end < count()) {
        to = made_by(layout, steps.end - 1, images);
        to.data = arenas[threads + phase].floats(floats_of(steps.end - 1, to));
      }
      const int64_t group = groups[phase];
      if (group == images) {
        run_steps(layout, steps, from, to, arenas[0], parallel, clock);
      } else {
        std::vector<Clock> clocks(clock ? threads : 0, Clock(steps_.size()));
        parallel.pieces(images, ceil_div(images, group), [&](Range piece, int64_t worker) {
          for (int64_t n = piece.begin; n < piece.end; n += group) {
            const Range some{n, std::min(n + group, piece.end)};
            run_steps(layout, steps, part(from, some), part(to, some), arenas[worker], Parallel{}, clock ? &clocks[worker] : nullptr);
          }
        });
        for (const Clock& each : clocks)
          for (size_t i = 0; i < steps_.size(); ++i) (*clock)[i] += each[i] / threads;
      }
      from = {to.data, to.shape, to.strides};
    }
  }

  // Some steps one after the other; those between the first's input and the last's output have theirs in the arena.
  void run_steps(const Layout& layout, Range steps, const Pixels& from, const Target& to, Arena& arena, const Parallel& parallel,
                 Clock* clock) const {
    std::vector<Target> made;
    made.reserve(steps.size());
    std::vector<int64_t> floats(slots_, 0), offsets(slots_, 0);
    for (int64_t i = steps.begin; i + 1 < steps.end; ++i) {
      made.push_back(made_by(layout, i, from.shape.n));
      int64_t& most = floats[steps_[i].output];
      most = std::max(most, floats_of(i, made.back()));
    }
    made.push_back(to);
    int64_t total = 0;
    for (int64_t slot = 1; slot < slots_; total += floats[slot++]) offsets[slot] = total;
    float* const base = arena.floats(total);
    Stream own;  // where there is no team, whose threads have theirs
    std::optional<Fetching> fetching;
    if (!parallel.team) fetching.emplace(own);
    const bool one_image = from.shape.n == 1 && steps.size() == count();  // a group's images share what they read
    std::vector<Pixels> values(slots_);
    values[steps_[steps.begin].x] = from;
    for (int64_t i = steps.begin; i < steps.end; ++i) {
      const Placed& placed = steps_[i];
      Target& target = made[i - steps.begin];
      if (i + 1 < steps.end) target.data = base + offsets[placed.output];
      if (one_image)
        for (const Ahead& ahead : layout.ahead)
          if (ahead.from == i) fetch_ahead(*ahead.weights, ahead.work, false, parallel);
      const auto start = clock ? std::chrono::steady_clock::now() : std::chrono::steady_clock::time_point{};
      placed.step->run(values[placed.x], placed.residual < 0 ? Pixels{} : values[placed.residual], target, parallel);
      if (clock) (*clock)[i] += std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
      values[placed.output] = {target.data, target.shape, target.strides};
    }
  }

  // Arenas, one a thread, of one concurrent caller, handed on from call to call.
  class Lease {
   public:
    explicit Lease(Program& program) : program_(program) {
      const std::lock_guard<std::mutex> lock(program.mutex_);
      if (!program.idle_.empty()) {
        arenas_ = std::move(program.idle_.back());
        program.idle_.pop_back();
      }
    }
    ~Lease() {
      try {
        const std::lock_guard<std::mutex> lock(program_.mutex_);
        program_.idle_.push_back(std::move(arenas_));
      } catch (const std::bad_alloc&) {  // then the next call makes its own
      }
    }
    void resize(int64_t threads) {
      if (static_cast<int64_t>(arenas_.size()) < threads) arenas_.resize(threads);
    }
    Arena& operator[](int64_t worker) { return arenas_[worker]; }

   private:
    Program& program_;
    std::vector<Arena> arenas_;
  };

  std::vector<Placed> steps_;
  const char* first_op_ = "program";
  int64_t values_ = 1, slots_ = 1;
  std::mutex mutex_;
  std::vector<std::vector<Arena>> idle_;
  std::shared_ptr<const Layout> layout_;
};

// What a program runs from: its text, "format; step; step ...". A step is its operator, the values that it reads (x, and the residual or
// -1) and the operator's other arguments in the order of its schema: numbers (a flag for an optional tensor, a count for a list) and names
// of activations; the tensors come from `weights`, in order. Value 0 is the input, value i what step i makes, the last one the result.
std::shared_ptr<Program> compile(const std::vector<Tensor>& weights, const std::string& text) {
  std::istringstream steps(text);
  std::string step;
  std::getline(steps, step, ';');
  check(step == PROGRAM_FORMAT, "network", "the program has format '", step, "', this version of fastconv reads '", PROGRAM_FORMAT,
        "': export the model again");
  const auto program = std::make_shared<Program>();
  size_t next_weight = 0;
  while (std::getline(steps, step, ';')) {
    std::istringstream line(step);
    Reader reader(weights, next_weight, {std::istream_iterator<std::string>(line), std::istream_iterator<std::string>()});
    const std::string op = reader.word();
    const int64_t x = reader.number(), residual = reader.number();
    program->add(make_step(op, reader), x, residual);
    reader.finish();
  }
  check(!program->empty(), "network", "the program has no steps");  // its result would be its input
  check(next_weight == weights.size(), "network", "the program takes ", next_weight, " weights, got ", weights.size());
  program->settle();
  return program;
}

// Compiled programs of `network`, the latest used last. A program reads its weights where they lie and copies nothing out of them, so one
// that was compiled for the same text over the same memory serves, whatever has been written there meanwhile.
class Cache {
 public:
  std::shared_ptr<Program> find(const std::vector<Tensor>& weights, const std::string& text) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = std::find_if(entries_.rbegin(), entries_.rend(), [&](const Entry& entry) { return entry.fits(weights, text); });
      if (found != entries_.rend()) {
        std::rotate(found.base() - 1, found.base(), entries_.end());
        return entries_.back().program;
      }
    }
    Entry entry{text, {weights.begin(), weights.end()}, compile(weights, text)};
    const std::lock_guard<std::mutex> lock(mutex_);
    if (entries_.size() == MOST) entries_.erase(entries_.begin());
    entries_.push_back(std::move(entry));
    return entries_.back().program;
  }

 private:
  static constexpr size_t MOST = 16;  // what it keeps alive: as many networks' weights and arenas

  struct Place {
    const void* data;
    Ints shape;
    ScalarType type;
    Place(const Tensor& tensor)
        : data(tensor.const_data_ptr()), shape(tensor.sizes().begin(), tensor.sizes().end()), type(tensor.scalar_type()) {}
    bool holds(const Tensor& tensor) const {
      const auto sizes = tensor.sizes();
      return tensor.is_cpu() && tensor.const_data_ptr() == data && tensor.scalar_type() == type && tensor.is_contiguous() &&
             std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
    }
  };
  struct Entry {
    std::string text;
    std::vector<Place> weights;
    std::shared_ptr<Program> program;
    bool fits(const std::vector<Tensor>& tensors, const std::string& other) const {
      return text == other && std::equal(weights.begin(), weights.end(), tensors.begin(), tensors.end(),
                                         [](const Place& place, const Tensor& tensor) { return place.holds(tensor); });
    }
  };
  std::mutex mutex_;
  std::vector<Entry> entries_;
};

std::mutex programs_mutex;
std::unordered_map<int64_t, std::shared_ptr<Program>> programs;
int64_t next_program = 0;

std::shared_ptr<Program> find_program(int64_t program) {
  const std::lock_guard<std::mutex> lock(programs_mutex);
  const auto at = programs.find(program);
  check(at != programs.end(), "program", "no program ", program);
  return at->second;
}

}  // namespace

Tensor network(Tensor x, std::vector<Tensor> weights, std::string program) {
  static Cache* const cache = new Cache;  // its tensors are not freed after torch at the process's end
  return cache->find(weights, program)->run(x);
}

int64_t program_new(std::vector<Tensor> weights, std::string program) {
  std::shared_ptr<Program> compiled = compile(weights, program);
  const std::lock_guard<std::mutex> lock(programs_mutex);
  programs[next_program] = std::move(compiled);
  return next_program++;
}

Tensor program_run(Tensor x, int64_t program, bool flat) { return find_program(program)->run(x, flat); }

Tensor program_times(Tensor x, int64_t program) { return find_program(program)->times(x); }

void program_free(int64_t program) {
  const std::lock_guard<std::mutex> lock(programs_mutex);
  programs.erase(program);
}

}  // namespace fastconv
