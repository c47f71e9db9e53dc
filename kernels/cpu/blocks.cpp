#include "kernels/cpu/blocks.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/pack.h"
#include "kernels/cpu/scratch.h"

namespace fastconv {

namespace {

// Below this many multiply-adds (half a microsecond) a loop's opening and closing costs more than it saves, and so do smaller pieces.
constexpr int64_t SERIAL_WORK = 64 * 1024;
// What a float of L3, or of another thread's cache, costs in multiply-adds: matrix-vector products and pools wait for them.
constexpr int64_t FLOAT_WORK = 8;
// Floats of intermediate results, and of weights, that may be expected to stay in L2 (768 KiB and 512 KiB).
constexpr int64_t L2_FLOATS = 192 * 1024, L2_WEIGHTS = 128 * 1024;
// And in L1 beside the weights of a chunk of columns (28 KiB).
constexpr int64_t L1_FLOATS = 7 * 1024;
// Of the depthwise rows of a block that goes depth first (384 KiB), and in so many steps at most.
constexpr int64_t BAND_FLOATS = 96 * 1024, MOST_STEPS = 16;

// Pieces of `count` things whose work is `each` multiply-adds: f(range).
template <class F>
void split(const Parallel& parallel, int64_t count, int64_t each, const F& f) {
  parallel.split(count, ceil_div(SERIAL_WORK, std::max<int64_t>(each, 1)), 1, f);
}

// Pieces of two panels or one, as many panels a thread as can be: f(panels).
template <class F>
void split_panels(const Parallel& parallel, int64_t channels, const F& f) {
  const int64_t panels = panels_for(channels), threads = parallel.threads();
  parallel.pieces(panels, std::min(panels, ceil_div(ceil_div(panels, 2), threads) * threads), [&](Range range, int64_t) { f(range); });
}

// Whether threads split the channels rather than the pixels: the inputs of the other thread's pixels come from its cache, dirty, which
// costs about four times as much a byte as weights that both read from L3 and that are fetched ahead.
bool by_channels(int64_t pixels, int64_t channels) { return channels > 4 * pixels; }

// Pieces of an M x N product over `depth`: f(pixels, panels). Pixels share weights, panels share inputs, and neighbouring pieces go to one
// thread: a share of the pixels, or of the panels. Where that gives too few pieces, or weights too large for L2 would stream once a piece,
// the other side is split as well.
template <class F>
void split_product(const Parallel& parallel, int64_t pixels, int64_t depth, int64_t out_channels, const F& f) {
  const int64_t panels = panels_for(out_channels), work = std::max(pixels, FLOAT_WORK) * depth * out_channels;
  if (!parallel.team || work < SERIAL_WORK) return f(Range{0, pixels}, Range{0, panels});
  const int64_t tile = kernels().tile_pixels, group = pixels <= 4 ? 4 : 2;  // panels at a time: pointwise.h
  const int64_t tiles = ceil_div(pixels, tile), groups = ceil_div(panels, group);
  const int64_t most = parallel.number_for(work, SERIAL_WORK);
  const bool by_panels = by_channels(pixels, out_channels);
  int64_t rows, columns;
  if (by_panels) {
    columns = std::min(parallel.number_for(groups, 1), most);
    rows = columns >= 4 * parallel.threads() ? 1 : std::clamp<int64_t>(std::min(most, 8 * parallel.threads()) / columns, 1, tiles);
  } else if (depth * out_channels > L2_WEIGHTS && tiles >= parallel.threads()) {
    rows = parallel.threads();
    columns = std::clamp<int64_t>(std::min(most, 16 * rows) / rows, 1, groups);
  } else {
    rows = std::min(parallel.number_for(tiles, 4), most);
    columns = rows >= 4 * parallel.threads() ? 1 : std::clamp<int64_t>(std::min(most, 8 * parallel.threads()) / rows, 1, groups);
    if (rows == 1 && columns > parallel.threads()) columns -= columns % parallel.threads();
  }
  parallel.pieces(rows * columns, rows * columns, [&](Range piece, int64_t) {
    const int64_t row = by_panels ? piece.begin % rows : piece.begin / columns,
                  column = by_panels ? piece.begin / rows : piece.begin % columns;
    // Whole tiles where there are many, equal parts where there are few: 49 pixels are 24 + 25, not 28 + 21.
    const bool whole = tiles >= 8 * rows;
    // Whole groups where a thread has all of them, else equal parts: 10 panels are 5 + 5, not 6 + 4.
    const bool grouped = rows % parallel.threads() == 0 || by_panels;
    f(whole ? Range{row * tiles / rows * tile, std::min((row + 1) * tiles / rows * tile, pixels)}
            : Range{row * pixels / rows, (row + 1) * pixels / rows},
      grouped ? Range{column * groups / columns * group, std::min((column + 1) * groups / columns * group, panels)}
              : Range{column * panels / columns, (column + 1) * panels / columns});
  });
}

Pointwise product(const PackedPointwise& weights, const float* x, Strides x_strides, float* out, Strides out_strides,
                  const float* residual = nullptr, Strides residual_strides = 0) {
  Pointwise op{x,
               x_strides,
               weights.in_channels,
               weights.out_channels,
               weights.panels,
               {weights.bias, residual, residual_strides, weights.activation},
               out,
               out_strides};
  op.packing = weights.packing;
  return op;
}

// Pairs of pixels in a strip, of so many in all: those that stay in L2, transformed, beside the weights (352 KiB).
int64_t strip_pairs(int64_t in_channels, int64_t pairs) {
  constexpr int64_t STRIP_FLOATS = 88 * 1024, MOST = 56;
  const int64_t most = std::clamp<int64_t>(STRIP_FLOATS / (7 * in_channels / 2), 1, MOST), strips = ceil_div(pairs, most);
  return pairs > 0 ? ceil_div(pairs, strips) : 1;
}

// Memory for so many transformed pairs, and behind them for the kernel.
struct StrassenScratch {
  float *transformed, *scratch;
  StrassenScratch(int64_t in_channels, int64_t pairs) {
    const int64_t floats = kernels().strassen_floats(in_channels, pairs);
    transformed = strassen_scratch.floats(floats + kernels().strassen_scratch(in_channels));
    scratch = transformed + floats;
  }
};

// Weights as digits without a matrix unit, or of pixels that are not for it: panel by panel as plain ones.
void multiply_unpacked(const Pointwise& op, Range pixels, Range panels) {
  const int64_t floats = op.in_channels * PANEL;
  float* const memory = unpack_scratch.floats(2 * floats);
  for (int64_t g = panels.begin; g < panels.end; ++g) {
    const int64_t column = g * PANEL;
    unpack_digits_panel(op.digits(), g, memory + floats, memory);
    Pointwise plain = op;
    plain.packing = Packing::panels;
    plain.panels = memory;
    plain.out_channels = std::min(PANEL, op.out_channels - column);
    plain.epilogue.bias += column;
    if (plain.epilogue.residual) plain.epilogue.residual += plain.epilogue.residual_strides.at(0, column);
    plain.out += plain.out_strides.at(0, column);
    plain.more_pixels = 0;
    plain.soon = {};
    kernels().pointwise(plain, pixels, {0, 1});
  }
}

int64_t next_input_id() {
  static std::atomic<int64_t> last{0};
  return last.fetch_add(1, std::memory_order_relaxed) + 1;
}

// Pixels at a time, in equal strips: as digits in L2 (512 KiB), where each panel of weights, in L1, meets them one after the other.
int64_t digit_strip(const Pointwise& op, int64_t pixels) {
  constexpr int64_t STRIP_FLOATS = 128 * 1024, TILE = DigitPixels::ROWS;
  const int64_t most = std::max<int64_t>(STRIP_FLOATS / op.digits().panel_floats(), 1) * TILE;
  return ceil_div(ceil_div(pixels, ceil_div(pixels, most)), TILE) * TILE;
}

// Panels of pixels that stand split.
void multiply_split(const Pointwise& op, Range pixels, Range panels, const DigitPixels& digits) {
  kernels().digits_multiply(op, pixels, panels, digits);
  const char *const marks = digits.extraordinary(), *const end = marks + pixels.size();
  for (const char* at = marks; (at = static_cast<const char*>(std::memchr(at, 1, end - at)));) {
    const char* const next = std::find(at, end, 0);
    multiply_unpacked(op, {pixels.begin + (at - marks), pixels.begin + (next - marks)}, panels);
    at = next;
  }
}

// What the calling thread has split last.
struct Split {
  int64_t input_id = 0, floats = 0;  // of the memory asked for, which stands while it is the same
  Range pixels{0, 0};
  bool operator==(const Split& other) const {
    return input_id == other.input_id && floats == other.floats && pixels.begin == other.pixels.begin && pixels.end == other.pixels.end;
  }
};
thread_local Split split_last;

void multiply_digits(const Pointwise& op, Range pixels, Range panels) {
  const Kernels& k = kernels();
  if (!k.digits_multiply) return multiply_unpacked(op, pixels, panels);
  if (pixels.size() <= 0) return;
  const int64_t at_once = digit_strip(op, pixels.size());
  const int64_t floats = DigitPixels{nullptr, op.in_channels, at_once}.floats();
  for (int64_t first = pixels.begin; first < pixels.end; first += at_once) {
    const Range strip{first, std::min(first + at_once, pixels.end)};
    const DigitPixels digits{digit_scratch.floats(floats), op.in_channels, strip.size()};
    const Split now{op.input_id, floats, strip};
    if (!op.input_id || !(now == split_last)) k.digits_split(op, strip, digits);
    split_last = now;
    multiply_split(op, strip, panels, digits);
  }
}

// A product by the calling thread.
void multiply(const Pointwise& op, Range pixels, Range panels) {
  const Kernels& k = kernels();
  if (op.packing == Packing::panels) return k.pointwise(op, pixels, panels);
  if (op.packing == Packing::digits) return multiply_digits(op, pixels, panels);
  const Range pairs = op.pairs(pixels);
  const int64_t at_once = strip_pairs(op.in_channels, pairs.size());
  const StrassenScratch memory(op.in_channels, at_once);
  for (int64_t pair = pairs.begin; pair < pairs.end; pair += at_once) {
    const Range strip{pair, std::min(pair + at_once, pairs.end)};
    k.strassen_transform(op, strip, memory.transformed);
    k.strassen_multiply(op, strip, panels, memory.transformed, memory.scratch);
  }
}

// The strip that each thread of a loop has transformed last.
class StrassenStrips {
 public:
  StrassenStrips(const Pointwise& op, Range pairs, int64_t strips, int64_t threads)
      : op_(op), pairs_(pairs), strips_(strips), last_(threads, -1) {}
  void multiply(int64_t strip, Range panels, int64_t worker) {
    const Kernels& k = kernels();
    const Range pairs{pairs_.begin + strip * pairs_.size() / strips_, pairs_.begin + (strip + 1) * pairs_.size() / strips_};
    const StrassenScratch memory(op_.in_channels, ceil_div(pairs_.size(), strips_));
    if (last_[worker] != strip) k.strassen_transform(op_, pairs, memory.transformed);
    last_[worker] = strip;
    k.strassen_multiply(op_, pairs, panels, memory.transformed, memory.scratch);
  }

 private:
  const Pointwise op_;
  const Range pairs_;
  const int64_t strips_;
  std::vector<int64_t> last_;
};

// Strips of pairs, and parts of the panels: few strips, for each is transformed by every thread that multiplies it, and reads all weights.
// A thread has neighbouring parts of one strip after the other.
void run_strassen(const Pointwise& op, int64_t pixels, const Parallel& parallel) {
  const int64_t threads = parallel.threads(), groups = ceil_div(op.out_channels, StrassenWeights::GROUP);
  const Range pairs = op.pairs({0, pixels});
  const bool by_panels = pairs.size() < kernels().tile_pixels * threads;
  const int64_t shares = by_panels ? 1 : threads, share_pairs = ceil_div(pairs.size(), shares);
  const int64_t strips = shares * ceil_div(share_pairs, strip_pairs(op.in_channels, share_pairs));
  // Two groups at a time where there are enough: pointwise tiles are two panels wide.
  const int64_t twos = ceil_div(groups, 2), most = std::max<int64_t>(Parallel::PIECES * threads / strips, 1);
  const int64_t columns = !parallel.team ? 1 : by_panels ? std::min(groups, ceil_div(twos, threads) * threads) : std::min(twos, most);
  const int64_t unit = by_panels ? 1 : 2, units = by_panels ? groups : twos;
  const int64_t each = by_panels && columns % threads == 0 ? columns / threads : columns;  // columns of one strip, then of the next
  StrassenStrips work(op, pairs, strips, threads);
  parallel.pieces(strips * columns, strips * columns, [&](Range pieces, int64_t worker) {
    for (int64_t piece = pieces.begin; piece < pieces.end; ++piece) {
      const int64_t run = piece / each, strip = run % strips, column = run / strips * each + piece % each;
      const Range panels{column * units / columns * unit * 2, (column + 1) * units / columns * unit * 2};
      work.multiply(strip, {panels.begin, std::min(panels.end, panels_for(op.out_channels))}, worker);
    }
  });
}

}  // namespace

void fetch_ahead(const PackedPointwise& weights, int64_t work, bool urgent, const Parallel& parallel) {
  if (!fetchable(weights, work) || (!urgent && !fetches_for_vectors())) return;
  const int64_t steps = std::max<int64_t>(work / kernels().step_work, 1);
  parallel.fetch({weights.panels, weights.panels + weights.floats()}, ceil_div(weights.floats(), steps * PANEL) * PANEL, urgent);
}

// Of few pixels none are paired: with pairs among 4 MobileNet V1 took 1.2 to 1.8 times as long, among 16 from a fifth more to 3% less, by
// what else the memory was busy with, among 36 and 64 from 4% more to 4% less, among more less in any case.
int64_t pairs_within(int64_t image, int64_t part) {
  constexpr int64_t FEW = 32;
  return image < FEW ? 1 : part % 2 == 0 ? 2 : part;
}

void run_pointwise(const Pointwise& op, int64_t pixels, const Parallel& parallel) {
  if (op.packing == Packing::strassen) return run_strassen(op, pixels, parallel);
  Pointwise numbered = op;
  if (op.packing == Packing::digits) numbered.input_id = next_input_id();
  split_product(parallel, pixels, op.in_channels, op.out_channels, [&](Range range, Range panels) { multiply(numbered, range, panels); });
}

void run_conv(const Conv& image, int64_t batch, const Parallel& parallel) {
  const Kernels& k = kernels();
  const int64_t pixels = image.out_height * image.out_width;
  for (int64_t n = 0; n < batch; ++n) {
    Conv op = image;
    op.x += n * image.height * image.width * image.x_stride;
    op.out += n * pixels * image.out_strides.pixel;
    split_product(parallel, pixels, op.kernel_h * op.kernel_w * op.in_channels, op.out_channels,
                  [&](Range range, Range panels) { k.conv(op, range, panels); });
  }
}

void run_depthwise(const Depthwise& image, int64_t batch, int64_t out_height, const Parallel& parallel) {
  const Kernels& k = kernels();
  split(parallel, batch * out_height, image.out_width * image.channels * image.kernel * image.kernel, [&](Range rows) {
    for_each_image(rows, out_height, [&](int64_t n, Range part) {
      Depthwise op = image;
      op.x += n * image.height * image.x_row_stride;
      op.out += (n * out_height + part.begin) * image.out_row_stride;
      k.depthwise(op, part, {0, image.channels});
    });
  });
}

namespace {

void stem_rows(const Stem& op, Range rows, StemRing& ring) {
  const Kernels& k = kernels();
  float* const scratch = tile_scratch.floats(op.scratch_floats());
  if (!op.winograd) return k.stem(op, rows, scratch);
  ring.data = stem_scratch.floats(k.stem_ring_floats(op));
  k.stem_winograd(op, rows, ring, scratch);
}

}  // namespace

void run_stem(const Stem& image, int64_t batch, int64_t image_stride, const Parallel& parallel) {
  const int64_t each = image.out_width * image.out_channels * image.kernel_h * image.kernel_w * image.in_channels;
  split(parallel, batch * image.out_height, each, [&](Range rows) {
    StemRing ring;
    for_each_image(rows, image.out_height, [&](int64_t n, Range part) {
      Stem op = image;
      op.x += n * image_stride;
      op.out += n * image.out_height * image.out_width * image.out_strides.pixel;
      stem_rows(op, part, ring);
    });
  });
}

namespace {

// Where a thread's ring of input rows stands: who goes on at `row` of the same image need not make its halo again.
struct alignas(64) Ring {
  int64_t image = -1, row = 0, next = 0;  // next output row, and next input row to make

  void seek(int64_t n, int64_t first_row, int64_t first_input) {
    if (image != n || row != first_row) *this = {n, first_row, std::max<int64_t>(0, first_input)};
  }
  // Makes the input rows up to `last`: make(rows, first slot) for runs that are contiguous in a ring of `slots` rows.
  template <class F>
  void fill(int64_t last, int64_t slots, const F& make) {
    while (next < last) {
      const int64_t slot = next % slots, count = std::min(last - next, slots - slot);
      make(Range{next, next + count}, slot);
      next += count;
    }
  }
};

}  // namespace

void StemRows::rows(int64_t image, Range rows, float* to, Strides strides, int64_t worker) const {
  Stem op = image_;
  op.x += image * image_stride_;
  op.out = to - rows.begin * op.out_width * strides.pixel;
  op.out_strides = strides;
  stem_rows(op, rows, rings_[worker]);
}

void run_max_pool(const MaxPool& image, int64_t batch, int64_t out_height, const RowSource* source, const Parallel& parallel) {
  const Kernels& k = kernels();
  if (source) {
    std::vector<Ring> rings(parallel.threads());
    const int64_t slots = 3;
    const Strides strides = blocked(slots * image.width);
    for (int64_t n = 0; n < batch; ++n)
      parallel.pieces(out_height, parallel.number_for(out_height, 2), [&](Range rows, int64_t worker) {
        MaxPool op = image;
        float* ring = private_scratch.floats(blocked_floats(slots * image.width, image.channels));
        op.x = ring;
        op.x_strides = strides;
        op.x_row_stride = image.width * strides.pixel;
        op.ring_rows = slots;
        op.out += n * out_height * image.out_width * image.out_strides.pixel;
        Ring& at = rings[worker];
        at.seek(n, rows.begin, rows.begin * op.stride_h - op.pad_h);
        for (int64_t oh = rows.begin; oh < rows.end; ++oh) {
          at.next = std::max(at.next, oh * op.stride_h - op.pad_h);  // strides past 3 skip rows
          at.fill(std::min(oh * op.stride_h - op.pad_h + 3, op.height), slots,
                  [&](Range made, int64_t slot) { source->rows(n, made, ring + slot * op.x_row_stride, strides, worker); });
          k.max_pool(op, {oh, oh + 1});
        }
        at.row = rows.end;
      });
    return;
  }
  split(parallel, batch * out_height, image.out_width * image.channels * 9, [&](Range rows) {
    for_each_image(rows, out_height, [&](int64_t n, Range part) {
      MaxPool op = image;
      op.x += n * image.height * image.x_row_stride;
      op.out += n * out_height * image.out_width * image.out_strides.pixel;
      k.max_pool(op, part);
    });
  });
}

namespace {

// means = sum over pixels / count, of so many channels.
void average(const float* x, Strides strides, int64_t pixels, int64_t count, int64_t channels, float* means) {
  std::fill(means, means + channels, 0.0f);
  kernels().sum_pixels(x, strides, pixels, channels, means);
  for (int64_t c = 0; c < channels; ++c) means[c] /= static_cast<float>(count);
}

}  // namespace

void run_global_avg_pool(const float* x, Strides x_strides, int64_t batch, int64_t pixels, int64_t channels, float* out,
                         Strides out_strides, const Parallel& parallel) {
  const int64_t blocks = panels_for(channels);
  split(parallel, batch * blocks, pixels * PANEL * FLOAT_WORK, [&](Range tasks) {
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t n = task / blocks, c = task % blocks * PANEL;
      average(x + x_strides.at(n * pixels, c), x_strides, pixels, pixels, std::min(PANEL, channels - c), out + out_strides.at(n, c));
    }
  });
}

namespace {

// Output rows [rows.begin, rows.end) of one fire module. The squeeze strip stands in `buffer` with its zero border; both expands read it
// there and write their slices of the concatenated output.
struct FireStrip {
  const Fire& op;
  int64_t squeeze, out_channels;
  bool winograd;
  int64_t unit;   // rows a strip's begin is a multiple of: tiles lie on a grid fixed to the image
  int64_t width;  // of the buffer, in pixels

  explicit FireStrip(const Fire& op)
      : op(op),
        squeeze(op.squeeze.out_channels),
        out_channels(op.expand1x1.out_channels + op.expand3x3_channels),
        winograd(op.winograd3x3 && wins(op.height, op.width)),
        unit(winograd ? 4 : 1),
        width(ceil_div(op.width, unit) * unit + 2) {}

  // 36 products a tile against 9 a pixel, with a fifth more for the transforms.
  static bool wins(int64_t height, int64_t width) { return ceil_div(height, 4) * ceil_div(width, 4) * 36 * 6 < height * width * 9 * 5; }

  int64_t row_floats() const { return width * squeeze; }
  int64_t buffer_rows(int64_t rows) const { return ceil_div(rows, unit) * unit + 2; }

  // Rows [part.begin, part.end) of the buffer, whose row 0 is the image's row `first` - 1.
  void fill(const float* x, int64_t first, Range part, float* buffer) const {
    for (int64_t i = part.begin; i < part.end; ++i) {
      const int64_t h = first - 1 + i;
      float* row = buffer + i * row_floats();
      if (h < 0 || h >= op.height) {
        std::memset(row, 0, row_floats() * sizeof(float));
        continue;
      }
      std::memset(row, 0, squeeze * sizeof(float));
      std::memset(row + (op.width + 1) * squeeze, 0, (width - op.width - 1) * squeeze * sizeof(float));
      Pointwise call = product(op.squeeze, x + h * op.width * op.x_strides.pixel, op.x_strides, row + squeeze, squeeze);
      if (i + 1 < part.end && h + 1 < op.height) call.more_pixels = op.width;
      multiply(call, {0, op.width}, {0, panels_for(squeeze)});
    }
  }

  // Rows of image n, whose buffer begins a row before them, to op.squeezed.
  void keep(const float* buffer, int64_t n, Range rows) const {
    if (!op.squeezed) return;
    const int64_t row = op.width * squeeze;
    for (int64_t i = 0; i < rows.size(); ++i)
      std::memcpy(op.squeezed + (n * op.height + rows.begin + i) * row, buffer + (i + 1) * row_floats() + squeeze, row * sizeof(float));
  }

  void expand1x1(const float* buffer, Range rows, Range panels, float* out) const {
    for (int64_t i = 0; i < rows.size(); ++i) {
      const float* row = buffer + (i + 1) * row_floats() + squeeze;
      float* to = out + (rows.begin + i) * op.width * op.out_strides.pixel;
      multiply(product(op.expand1x1, row, squeeze, to, op.out_strides), {0, op.width}, panels);
    }
  }
  float* slice3x3(float* out) const { return out + op.out_strides.at(0, op.expand1x1.out_channels); }

  // Both expands of rows whose buffer begins a row before them.
  void expand(const float* buffer, Range rows, float* out) const {
    expand1x1(buffer, rows, {0, panels_for(op.expand1x1.out_channels)}, out);
    expand3x3(buffer, rows.size(), slice3x3(out) + rows.begin * op.width * op.out_strides.pixel);
  }

  int64_t tiles_w() const { return ceil_div(op.width, 4); }
  int64_t tiles() const { return ceil_div(op.height, 4) * tiles_w(); }

  // The whole image's, its tiles split among the threads: of 49, two threads have 24 and 25, where 7 rows of them are 3 and 4.
  void expand_by_tiles(const float* buffer, float* out, const Parallel& parallel) const {
    const int64_t number = parallel.number_for(ceil_div(tiles(), kernels().tile_pixels), 1);
    parallel.pieces(number, number, [&](Range piece, int64_t) {
      const auto part = [&](int64_t all) { return Range{piece.begin * all / number, piece.end * all / number}; };
      const Range rows = part(op.height);
      expand1x1(buffer + rows.begin * row_floats(), rows, {0, panels_for(op.expand1x1.out_channels)}, out);
      expand_tiles(buffer, op.height, part(tiles()), slice3x3(out));
    });
  }

  // The whole image's, its panels split among the threads: tiles are transformed once.
  void expand_by_panels(const float* buffer, float* out, const Parallel& parallel) const {
    const Kernels& k = kernels();
    const int64_t panels1x1 = panels_for(op.expand1x1.out_channels), panels3x3 = panels_for(op.expand3x3_channels);
    const int64_t tile_rows = ceil_div(op.height, 4), tiles_w = this->tiles_w();
    const PaddedConv conv = direct(buffer, op.height, slice3x3(out)), tiled = this->tiled(buffer, op.height, slice3x3(out));
    std::vector<char> transforms(tile_rows, 0);  // which rows of tiles go through Winograd
    float* transformed = nullptr;
    if (winograd) {
      transformed = step_scratch[0].floats(k.winograd_transformed(tiled));
      parallel.split(tile_rows, 1, 1, [&](Range range) {
        for (int64_t t = range.begin; t < range.end; ++t)
          if ((transforms[t] = moderate(buffer, {t, t + 1}))) k.winograd_transform(tiled, {t * tiles_w, (t + 1) * tiles_w}, transformed);
      });
    }
    const bool all = winograd && std::all_of(transforms.begin(), transforms.end(), [](char row) { return row; });
    // Pieces of two panels of one expand and as large a part of the other's.
    const int64_t pairs = ceil_div(std::max(panels1x1, panels3x3), 2);
    parallel.split(pairs, 1, 1, [&](Range range) {
      const auto part = [&](int64_t panels) { return Range{range.begin * panels / pairs, range.end * panels / pairs}; };
      const Range three = part(panels3x3);
      expand1x1(buffer, {0, op.height}, part(panels1x1), out);
      if (!winograd) return k.padded_conv(conv, {0, op.height}, three);
      float* sums = tile_scratch.floats(k.winograd_sums);
      if (all) return k.winograd_multiply(tiled, {0, tiles()}, three, transformed, sums);
      for (int64_t t = 0; t < tile_rows; ++t)
        if (transforms[t])
          k.winograd_multiply(tiled, {t * tiles_w, (t + 1) * tiles_w}, three, transformed, sums);
        else
          k.padded_conv(conv, {t * 4, std::min(t * 4 + 4, op.height)}, three);
    });
  }

 private:
  PaddedConv direct(const float* buffer, int64_t rows, float* out) const {
    return {buffer,
            squeeze,
            row_floats(),
            squeeze,
            op.expand3x3_channels,
            rows,
            op.width,
            3,
            3,
            op.panels3x3,
            {op.bias3x3, nullptr, 0, Activation::relu},
            out,
            op.out_strides};
  }
  PaddedConv tiled(const float* buffer, int64_t rows, float* out) const {
    PaddedConv conv = direct(buffer, rows, out);
    conv.panels = op.winograd3x3;
    return conv;
  }
  // NaN, infinities and huge numbers propagate as in a direct sum, so rows of tiles that hold one are for that.
  bool moderate(const float* buffer, Range tile_rows) const {
    return kernels().all_moderate(buffer + tile_rows.begin * 4 * row_floats(), (tile_rows.size() * 4 + 2) * row_floats());
  }

  // `rows` rows of output.
  void expand3x3(const float* buffer, int64_t rows, float* out) const {
    if (winograd) return expand_tiles(buffer, rows, {0, ceil_div(rows, 4) * tiles_w()}, out);
    kernels().padded_conv(direct(buffer, rows, out), {0, rows}, {0, panels_for(op.expand3x3_channels)});
  }

  // Tiles of so many rows of output. A row of tiles that goes directly is whole: it belongs to who has its first tile.
  void expand_tiles(const float* buffer, int64_t rows, Range tiles, float* out) const {
    const Kernels& k = kernels();
    const PaddedConv conv = direct(buffer, rows, out), tiled = this->tiled(buffer, rows, out);
    const Range panels{0, panels_for(op.expand3x3_channels)}, tile_rows{tiles.begin / tiles_w(), ceil_div(tiles.end, tiles_w())};
    float* scratch = tile_scratch.floats(k.winograd_scratch(tiled, tiles.size()));
    if (moderate(buffer, tile_rows)) return k.winograd(tiled, tiles, panels, scratch);
    for (int64_t t = tile_rows.begin; t < tile_rows.end; ++t) {
      const Range part{std::max(t * tiles_w(), tiles.begin), std::min((t + 1) * tiles_w(), tiles.end)};
      if (moderate(buffer, {t, t + 1}))
        k.winograd(tiled, part, panels, scratch);
      else if (part.begin == t * tiles_w())
        k.padded_conv(conv, {t * 4, std::min(t * 4 + 4, rows)}, panels);
    }
  }
};

}  // namespace

void run_fire(const Fire& op, const Parallel& parallel) {
  const FireStrip strip(op);
  const int64_t pixels = op.height * op.width, in_floats = pixels * op.x_strides.pixel, out_floats = pixels * op.out_strides.pixel;
  const int64_t units = ceil_div(op.height, strip.unit), threads = parallel.threads();
  if (op.batch < threads) {
    // The threads share the squeezed image. Panels are split where rows, or tiles, are too few for even parts.
    const int64_t rows = strip.buffer_rows(op.height);
    float* buffer = shared_scratch.floats(rows * strip.row_floats());
    const bool few = strip.winograd ? strip.tiles() < 8 * threads : units < 4 * threads;
    const bool by_panels = few || (!strip.winograd && strip.out_channels > pixels);
    for (int64_t n = 0; n < op.batch; ++n) {
      split(parallel, rows, op.width * op.squeeze.in_channels * strip.squeeze,
            [&](Range part) { strip.fill(op.x + n * in_floats, 0, part, buffer); });
      strip.keep(buffer, n, {0, op.height});
      float* out = op.out + n * out_floats;
      if (by_panels)
        strip.expand_by_panels(buffer, out, parallel);
      else if (strip.winograd)
        strip.expand_by_tiles(buffer, out, parallel);
      else
        parallel.split(units, 1, 1, [&](Range range) {
          strip.expand(buffer + range.begin * strip.unit * strip.row_floats(),
                       {range.begin * strip.unit, std::min(range.end * strip.unit, op.height)}, out);
        });
    }
    return;
  }
  const int64_t most = std::max<int64_t>(1, L2_FLOATS / 2 / (strip.row_floats() * strip.unit));  // units in a strip that stays in L2
  parallel.pieces(op.batch * units, parallel.number_for(op.batch * units, std::min(most, units)), [&](Range all, int64_t) {
    for (int64_t u = all.begin; u < all.end;) {
      const int64_t n = u / units, first = u - n * units, last = std::min({first + most, units, first + all.end - u});
      const Range rows{first * strip.unit, std::min(last * strip.unit, op.height)};
      float* buffer = private_scratch.floats(strip.buffer_rows(rows.size()) * strip.row_floats());
      strip.fill(op.x + n * in_floats, rows.begin, {0, strip.buffer_rows(rows.size())}, buffer);
      strip.keep(buffer, n, rows);
      strip.expand(buffer, rows, op.out + n * out_floats);
      u += last - first;
    }
  });
}

namespace {

struct Block {
  const InvertedResidual& op;
  int64_t in_pixels, out_pixels;

  explicit Block(const InvertedResidual& op) : op(op), in_pixels(op.height * op.width), out_pixels(op.out_height * op.out_width) {}

  int64_t weight_floats() const { return op.channels * ((op.expands() ? op.in_channels : 0) + op.project.out_channels); }
  int64_t middle_floats() const { return ((op.expands() ? in_pixels : 0) + out_pixels) * panels_for(op.channels) * PANEL; }
  const float* image(int64_t n) const { return op.x + n * in_pixels * op.x_strides.pixel; }

  Depthwise depthwise(const float* x, Strides x_strides, int64_t ring_rows, float* out, Strides out_strides) const {
    return {x,
            x_strides,
            op.width * x_strides.pixel,
            ring_rows,
            op.height,
            op.width,
            op.channels,
            op.out_width,
            op.kernel,
            op.stride_h,
            op.stride_w,
            op.pad_h,
            op.pad_w,
            op.taps,
            op.depthwise_bias,
            op.depthwise_activation,
            out,
            out_strides,
            op.out_width * out_strides.pixel};
  }

  // The rows that neighbouring output rows read as well: another thread may have made them, and one by one its lines are slow to come
  // (14x14x384: 16 of 61 us).
  void fetch_halo(const float* x, Strides strides, Range rows, int64_t all) const {
    const auto fetch = [&](int64_t begin, int64_t end) {
      for (int64_t block = 0; block < panels_for(op.channels); ++block)
        for (int64_t pixel = std::max<int64_t>(begin, 0) * op.width; pixel < std::min(end, op.height) * op.width; ++pixel)
          __builtin_prefetch(x + strides.at(pixel, block * PANEL), 0, 2);
    };
    const int64_t halo = op.kernel - op.stride_h, first = rows.begin * op.stride_h - op.pad_h;
    if (rows.begin > 0) fetch(first, first + halo);
    if (rows.end < all) fetch(rows.end * op.stride_h - op.pad_h, rows.end * op.stride_h - op.pad_h + halo);
  }

  // What the depthwise convolution of these channels reads beside the image: a line or two in each of K x K rows, which no stream brings.
  void fetch_taps(Range channels) const {
    const auto fetch = [&](const float* row) {
      for (int64_t c = channels.begin; c < channels.end; c += PANEL) __builtin_prefetch(row + c, 0, 2);
    };
    for (int64_t tap = 0; tap < op.kernel * op.kernel; ++tap) fetch(op.taps + tap * op.channels);
    fetch(op.depthwise_bias);
  }

  // While the expansion multiplies, the gate's weights come, for whose matrix-vector products the threads would wait.
  void fetch_gate(int64_t pixels, const Parallel& parallel) const {
    if (!op.gates() || !op.expands()) return;
    for (const PackedPointwise* each : {&op.squeeze_excite.expand, &op.squeeze_excite.reduce})  // each goes before what is there
      fetch_ahead(*each, pixels * op.in_channels * op.channels, true, parallel);
  }

  // To pixels of `to`, the first of which is the batch's `first_pixel`.
  Pointwise project(const float* x, Strides x_strides, float* to, Strides to_strides, int64_t first_pixel) const {
    Pointwise call = product(op.project, x, x_strides, to, to_strides,
                             op.residual ? op.residual + first_pixel * op.residual_strides.pixel : nullptr, op.residual_strides);
    call.pairs_within = pairs_within(out_pixels, op.channels * op.project.out_channels <= L2_WEIGHTS ? op.out_width : out_pixels);
    return call;
  }

  // Whether a thread's rows are many enough for a ring of its own, whose halo it makes anew: 7 for a 3x3 kernel (MobileNet V2's blocks at
  // 14x14, two threads: 3 to 14%), 14 for a 5x5.
  bool worth_halo(int64_t threads) const { return threads == 1 || 2 * op.out_height >= 7 * (op.kernel - 1) * threads; }

  // Whether blocks go depth first, the rows split among so many threads.
  bool depth_first(int64_t threads) const { return !op.gates() && weight_floats() <= L2_WEIGHTS && worth_halo(threads); }

  // How so many images at once go to the depthwise convolution's output: split over channels, whose weights stream once then; through
  // rings of expanded rows; or layer by layer.
  // (With squeeze-excitation a split over channels saves two loops' ends, the expansion's and the means'.)
  bool splits_channels(int64_t count, int64_t threads) const {
    return threads > 1 && !op.gates() ? by_channels(count * in_pixels, op.channels) : op.channels > count * in_pixels;
  }
  bool in_rings(int64_t count, int64_t threads) const {
    return !splits_channels(count, threads) && op.expands() && weight_floats() <= L2_WEIGHTS && worth_halo(threads);
  }

  // Output rows at a time: 28 pixels are two full tiles of 14, and the depthwise convolution makes two rows at once. Strides past the
  // kernel leave rows out: one at a time, so that those between two windows are not made.
  int64_t step() const { return op.stride_h > op.kernel ? 1 : std::min(op.out_height, std::max<int64_t>(2, 28 / op.out_width)); }

  // Output rows of a piece: two steps, for a band, where the threads' shares stay equal.
  int64_t piece(int64_t threads) const {
    const int64_t least = std::max<int64_t>(2, step());
    return !op.source && op.out_height % (2 * least * threads) == 0 ? 2 * least : least;
  }

  // Depth first: a few output rows at a time go expand -> depthwise -> project, the rows between standing in a ring, and out to `to`.
  // Without `to` the depthwise convolution writes its rows of the whole image `middle` and the projection is left out.
  void rows(int64_t n, Range rows, Ring& at, int64_t worker, Scratch& scratch, float* to, Strides to_strides, float* middle = nullptr,
            Strides middle_strides = 0) const {
    const Kernels& k = kernels();
    const bool ringed = op.expands() || op.source, buffered = op.expands() && op.source;
    const int64_t step = this->step(), row_floats = op.width * PANEL;
    // Rows are made in pairs: an even number of slots, with room for one row more than is used, never parts a pair.
    const int64_t slots = ringed ? ceil_div((step - 1) * op.stride_h + op.kernel + 1, 2) * 2 : op.height;
    // A band of steps goes through the panels group by group, so that a group's rows and weights stay in L1 from one step to the next: 1%
    // of MobileNet V2 and V3-L on one thread. What a source makes is made for one step at a time.
    const int64_t all_panels = panels_for(op.channels), window = ((step - 1) * op.stride_h + op.kernel) * row_floats;
    const int64_t most_steps =
        middle ? MOST_STEPS : std::clamp<int64_t>(BAND_FLOATS / (all_panels * PANEL * op.out_width * step), 1, MOST_STEPS);
    // Not as many as this call's rows: the ring outlives the call, so its memory must not grow or move.
    const int64_t band_rows = op.source ? step : std::min(most_steps * step, ceil_div(op.out_height, step) * step);
    const Strides ring_strides = blocked(slots * op.width), strip_strides = blocked(band_rows * op.out_width);
    const int64_t ring_floats = ringed ? blocked_floats(slots * op.width, op.channels) : 0;
    const int64_t strip_floats = middle ? 0 : blocked_floats(band_rows * op.out_width, op.channels);
    const int64_t input_floats = buffered ? blocked_floats(slots * op.width, op.in_channels) : 0;
    float* const ring = scratch.floats(ring_floats + strip_floats + input_floats);
    float* const strip = ring + ring_floats;
    float* const input = strip + strip_floats;
    // Panels are expanded and go on to the depthwise convolution while they are in L1: two of MobileNet V2's 112 pixels a row (4% of the
    // time to 24 channels at 56x56), eight of 14.
    const int64_t group = op.expands() ? std::max<int64_t>(L1_FLOATS / window / 2 * 2, 2) : all_panels;
    struct Step {
      Range out, made[2];  // output rows, and new rows of the ring for them, in runs that are contiguous there
      int64_t runs;
    } steps[MOST_STEPS];
    at.seek(n, rows.begin, rows.begin * op.stride_h - op.pad_h);
    for (int64_t band = rows.begin; band < rows.end; band += band_rows) {
      const int64_t band_end = std::min(band + band_rows, rows.end);
      int64_t count = 0;
      for (int64_t oh = band; oh < band_end; oh += step) {
        Step& now = steps[count++];
        now = {{oh, std::min(oh + step, band_end)}, {}, 0};
        const int64_t first = oh * op.stride_h - op.pad_h,
                      last = std::min((now.out.end - 1) * op.stride_h - op.pad_h + op.kernel, op.height);
        if (!ringed) continue;
        at.next = std::max({at.next, first, int64_t{0}});  // strides past the kernel skip rows
        at.fill(std::min(ceil_div(last, 2) * 2, op.height), slots, [&](Range run, int64_t slot) {
          if (op.source) op.source->rows(n, run, (buffered ? input : ring) + slot * row_floats, ring_strides, worker);
          if (op.expands()) now.made[now.runs++] = run;
        });
      }
      float* const out = middle ? middle + band * op.out_width * middle_strides.pixel : strip;
      const Strides out_strides = middle ? middle_strides : strip_strides;
      const auto expansion = [&](const Range& run) {
        const int64_t row = run.begin % slots * row_floats;
        const float* from = buffered ? input + row : image(n) + run.begin * op.width * op.x_strides.pixel;
        return product(op.expand, from, buffered ? ring_strides : op.x_strides, ring + row, ring_strides);
      };
      // As digits, the runs' inputs are split once for all groups.
      const bool splits = op.expands() && op.expand.packing == Packing::digits && k.digits_split;
      DigitPixels digits[2 * MOST_STEPS];
      if (splits) {
        int64_t floats = 0;
        const auto each_run = [&](const auto& f) {
          for (int64_t s = 0; s < count; ++s)
            for (int64_t i = 0; i < steps[s].runs; ++i) f(digits[2 * s + i], steps[s].made[i]);
        };
        each_run([&](DigitPixels& to, const Range& run) {
          to = {nullptr, op.in_channels, run.size() * op.width};
          floats += to.floats();
        });
        float* memory = band_scratch.floats(floats);
        each_run([&](DigitPixels& to, const Range& run) {
          to.data = memory;
          memory += to.floats();
          k.digits_split(expansion(run), {0, to.pixels}, to);
        });
      }
      for (int64_t panel = 0; panel < all_panels; panel += group) {
        const Range panels{panel, std::min(panel + group, all_panels)};
        for (const Step* now = steps; now < steps + count; ++now) {
          for (int64_t i = 0; i < now->runs; ++i) {
            const Range pixels{0, now->made[i].size() * op.width};
            if (splits)
              multiply_split(expansion(now->made[i]), pixels, panels, digits[2 * (now - steps) + i]);
            else
              multiply(expansion(now->made[i]), pixels, panels);
          }
          float* const to_rows = out + (now->out.begin - band) * op.out_width * out_strides.pixel;
          const Depthwise call = ringed ? depthwise(ring, ring_strides, slots, to_rows, out_strides)
                                        : depthwise(image(n), op.x_strides, op.height, to_rows, out_strides);
          k.depthwise(call, now->out, {panels.begin * PANEL, std::min(panels.end * PANEL, op.channels)});
        }
      }
      if (!to) continue;
      float* const first_out = to + (band - rows.begin) * op.out_width * to_strides.pixel;
      const Range panels{0, panels_for(op.project.out_channels)};
      Pointwise call = project(out, out_strides, first_out, to_strides, n * out_pixels + band * op.out_width);
      if (!op.residual_is_source) {
        multiply(call, {0, (band_end - band) * op.out_width}, panels);
        continue;
      }
      for (int64_t row = band; row < band_end; ++row) {  // the ring's rows are neighbours only up to its end
        call.epilogue.residual = ring + row % slots * row_floats;
        call.epilogue.residual_strides = ring_strides;
        multiply(call, {0, op.out_width}, panels);
        call.x += op.out_width * out_strides.pixel;
        call.out += op.out_width * to_strides.pixel;
      }
    }
    at.row = rows.end;
  }
  void rows(int64_t n, Range range, Ring& at, int64_t worker) const {
    rows(n, range, at, worker, private_scratch, op.out + (n * out_pixels + range.begin * op.out_width) * op.out_strides.pixel,
         op.out_strides);
  }

  // Layer by layer over whole images, each layer split over the team; a thread keeps its channels or rows through the first two.
  void images(Range batch, const Parallel& parallel, Scratch& scratch) const {
    const Kernels& k = kernels();
    const int64_t count = batch.size(), pixels = count * in_pixels, channels = op.channels;
    const int64_t threads = parallel.threads();
    const bool by_panels = splits_channels(count, threads), in_rows = in_rings(count, threads);
    const Strides expanded_strides = blocked(pixels), middle_strides = blocked(count * out_pixels);
    const int64_t expanded_floats = op.expands() && !in_rows ? blocked_floats(pixels, channels) : 0;
    const int64_t middle_floats = blocked_floats(count * out_pixels, channels);
    const int64_t lanes = panels_for(channels) * PANEL, reduced = op.gates() ? op.squeeze_excite.reduce.out_channels : 0;
    const int64_t row_sums_floats = op.gates() ? count * op.out_height * lanes : 0;
    float* expanded = scratch.floats(expanded_floats + middle_floats + row_sums_floats + count * (2 * lanes + reduced));
    float* middle = expanded + expanded_floats;
    const float* x = image(batch.begin);
    const auto middle_of = [&](int64_t n, int64_t channel) { return middle + middle_strides.at(n * out_pixels, channel); };

    const Range all_rows{0, count * op.out_height};
    const SqueezeExcite* gate = op.gates() ? &op.squeeze_excite : nullptr;
    float* row_sums = middle + middle_floats;
    float* means = row_sums + row_sums_floats;
    float* scales = means + count * lanes;
    float* hidden = scales + count * lanes;
    // Means are sums of rows' sums, in whatever order the rows were made.
    const auto sum_rows = [&](int64_t n, Range rows, Range range) {
      if (gate)
        k.sum_rows(middle_of(n, range.begin) + rows.begin * op.out_width * middle_strides.pixel, middle_strides, op.out_width, rows.size(),
                   range.size(), row_sums + (n * op.out_height + rows.begin) * lanes + range.begin, lanes);
    };
    const auto run_depthwise = [&](Range image_rows, Range range) {
      for_each_image(image_rows, op.out_height, [&](int64_t n, Range part) {
        const Strides from = op.expands() ? expanded_strides : op.x_strides;
        const float* source = (op.expands() ? expanded : x) + n * in_pixels * from.pixel;
        if (threads > 1 && !by_panels) fetch_halo(source, from, part, op.out_height);
        float* out = middle_of(n, 0) + part.begin * op.out_width * middle_strides.pixel;
        k.depthwise(depthwise(source, from, op.height, out, middle_strides), part, range);
        sum_rows(n, part, range);
      });
    };
    Pointwise expansion = product(op.expand, x, op.x_strides, expanded, expanded_strides);
    if (op.expand.packing == Packing::digits) expansion.input_id = next_input_id();
    const auto expand = [&](Range range, Range panels) { multiply(expansion, range, panels); };
    fetch_gate(pixels, parallel);
    const auto channels_of = [&](Range panels) { return Range{panels.begin * PANEL, std::min(panels.end * PANEL, channels)}; };
    const auto pool = [&](Range range) {
      for (int64_t n = 0; n < count; ++n)
        average(row_sums + n * op.out_height * lanes + range.begin, lanes, op.out_height, out_pixels, range.size(),
                means + n * lanes + range.begin);
    };
    const auto scale = [&](int64_t n, Range rows, Range range) {
      k.scale_channels(middle_of(n, range.begin) + rows.begin * op.out_width * middle_strides.pixel, middle_strides,
                       rows.size() * op.out_width, range.size(), scales + n * lanes + range.begin);
    };
    const int64_t first = batch.begin * out_pixels;
    const Pointwise last = project(middle, middle_strides, op.out + first * op.out_strides.pixel, op.out_strides, first);
    const auto project_rows = [&](Range rows) {
      multiply(last, {rows.begin * op.out_width, rows.end * op.out_width}, {0, panels_for(op.project.out_channels)});
    };
    // Whether a thread goes on to the projection of the rows that it made or scaled: enough of them for even shares, weights that stay in
    // L2.
    const bool by_rows = !by_panels && channels * op.project.out_channels <= L2_WEIGHTS && all_rows.size() >= 7 * threads;
    const auto split_rows = [&](const auto& f) {
      parallel.pieces(all_rows.size(), parallel.number_for(all_rows.size(), 2), [&](Range rows, int64_t) { f(rows); });
    };

    const int64_t depthwise_work = op.out_width * channels * op.kernel * op.kernel;
    if (by_panels) {
      split_panels(parallel, channels, [&](Range panels) {  // channels never meet before the projection: no barrier between
        fetch_taps(channels_of(panels));
        if (op.expands()) expand({0, pixels}, panels);
        run_depthwise(all_rows, channels_of(panels));
        if (gate) pool(channels_of(panels));
      });
    } else if (in_rows) {
      std::vector<Ring> rings(parallel.threads());
      for (int64_t n = 0; n < count; ++n)
        parallel.pieces(op.out_height, parallel.number_for(op.out_height, piece(threads)), [&](Range part, int64_t worker) {
          rows(batch.begin + n, part, rings[worker], worker, private_scratch, nullptr, 0, middle_of(n, 0), middle_strides);
          sum_rows(n, part, {0, channels});
        });
    } else {
      if (op.expands()) split_product(parallel, pixels, op.in_channels, channels, expand);
      if (by_rows && !gate)
        return split_rows([&](Range rows) {
          run_depthwise(rows, {0, channels});
          project_rows(rows);
        });
      split(parallel, all_rows.size(), depthwise_work, [&](Range range) { run_depthwise(range, {0, channels}); });
    }

    if (gate) {
      if (!by_panels) pool({0, channels});  // few sums: cheaper than another loop
      run_pointwise(product(gate->reduce, means, lanes, hidden, reduced), count, parallel);
      const Pointwise scaling = product(gate->expand, hidden, reduced, scales, lanes);
      if (by_rows)
        run_pointwise(scaling, count, parallel);
      else
        split_panels(parallel, channels, [&](Range panels) {
          k.pointwise(scaling, {0, count}, panels);
          for (int64_t n = 0; n < count; ++n) scale(n, {0, op.out_height}, channels_of(panels));
        });
    }
    if (by_rows)
      return split_rows([&](Range rows) {
        if (gate) for_each_image(rows, op.out_height, [&](int64_t n, Range part) { scale(n, part, {0, channels}); });
        project_rows(rows);
      });
    run_pointwise(last, count * out_pixels, parallel);
  }

  // Whole images by one thread: depth first while the weights fit L2, else as many images at a time as do.
  void serial(Range batch) const {
    if (depth_first(1)) {
      Ring ring;
      for (int64_t n = batch.begin; n < batch.end; ++n) rows(n, {0, op.out_height}, ring, 0);
      return;
    }
    const int64_t group = std::max<int64_t>(1, L2_FLOATS / middle_floats());
    for (int64_t n = batch.begin; n < batch.end; n += group) {
      const Range images{n, std::min(n + group, batch.end)};
      // The memory that other blocks' rings left in L2, where this one needs no ring itself: 4% of MobileNet V2.
      this->images(images, Parallel{}, in_rings(images.size(), 1) ? shared_scratch : private_scratch);
    }
  }
};

class BlockRows : public RowSource {
 public:
  BlockRows(const InvertedResidual& op, int64_t threads, int level) : op_(op), block_(op_), rings_(threads), level_(level) {}
  void rows(int64_t image, Range rows, float* to, Strides strides, int64_t worker) const override {
    block_.rows(image, rows, rings_[worker], worker, ring_scratch[level_], to, strides);
  }

 private:
  const InvertedResidual op_;
  const Block block_;
  mutable std::vector<Ring> rings_;  // one a worker
  const int level_;
};

}  // namespace

bool worth_chaining(const InvertedResidual& block, int64_t threads) {
  if (block.gates() || Block(block).weight_floats() > L2_WEIGHTS) return false;
  // An expansion makes halos dear: chained on two threads MobileNet V2 and V3-L lost 4%, on one they gained 2% and 5%.
  return threads == 1 || (!block.expands() && !block.residual_is_source && block.out_height >= 28 * threads);
}
bool worth_chaining(int64_t pool_out_height, int64_t threads) { return threads == 1 || pool_out_height >= 14 * threads; }

std::unique_ptr<RowSource> block_rows(const InvertedResidual& block, int64_t threads, int level) {
  return std::make_unique<BlockRows>(block, threads, level);
}

void run_inverted_residual(const InvertedResidual& op, const Parallel& parallel) {
  const Block block(op);
  const int64_t threads = parallel.threads();
  if (!parallel.team) return block.serial({0, op.batch});
  const int64_t whole = op.source ? 0 : op.batch - op.batch % threads;  // these go image by image; the rest is split within each image
  parallel.pieces(whole, std::min(whole, 4 * threads), [&](Range images, int64_t) { block.serial(images); });
  for (int64_t n = whole; n < op.batch; ++n) {
    if (op.source || block.depth_first(threads)) {
      std::vector<Ring> rings(threads);
      const int64_t number = parallel.number_for(op.out_height, block.piece(threads));
      parallel.pieces(op.out_height, number, [&](Range rows, int64_t worker) { block.rows(n, rows, rings[worker], worker); });
    } else {
      block.images({n, n + 1}, parallel, shared_scratch);
    }
  }
}

}  // namespace fastconv
