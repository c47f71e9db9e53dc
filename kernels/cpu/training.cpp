#include "kernels/cpu/training.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/scratch.h"

namespace fastconv {

namespace {

constexpr int64_t STRIP_FLOATS = 96 * 1024;  // of a strip's inputs and outputs: half of L2

// Pixels in strips that the shapes alone decide, `inputs` and `outputs` a pixel. `whole_images`: a strip stays within an image, for what is
// summed by image.
struct Strips {
  int64_t in_image, per, number;  // per: strips that an image, or all pixels, make
  Strips(int64_t pixels, int64_t inputs, int64_t outputs, int64_t image_pixels, bool whole_images)
      : in_image(whole_images ? image_pixels : pixels) {
    // Weights beyond L2, and sums of their gradient, come from L3 for each strip: then as many pixels as are worth it, in strips that share
    // out evenly (SqueezeNet 1.1's last convolution, 1000 x 512: 24 to 21 ms backward).
    const bool wide = inputs * outputs > WIDE;
    const int64_t each = std::clamp<int64_t>(STRIP_FLOATS / (inputs + outputs), wide ? 112 : 28, 448) / 28 * 28;
    per = ceil_div(in_image, each);
    if (wide && per > 4) per = ceil_div(per, 4) * 4;
    number = in_image ? pixels / in_image * per : 0;
  }
  Range operator[](int64_t i) const {
    const int64_t first = i / per * in_image, part = i % per;
    return {first + begin(part), first + begin(part + 1)};
  }
  int64_t most() const { return per ? std::min(in_image, in_image / per + TILE) : 0; }

 private:
  static constexpr int64_t WIDE = 256 * 1024, TILE = 14;
  int64_t begin(int64_t part) const { return part == per ? in_image : part * in_image / per / TILE * TILE; }  // whole tiles of pixels
};

int64_t padded(int64_t channels) { return panels_for(channels) * PANEL; }
// Rows of a scratch strip: an odd number of cache lines apart, so that a column's pixels spread over all cache sets.
int64_t strip_stride(int64_t channels) { return (panels_for(channels) | 1) * PANEL; }

// A range of pixels through a batch, image by image where that is `needed`: f(image, pixels).
template <class F>
void by_image(Range pixels, int64_t image_pixels, bool needed, const F& f) {
  if (!needed) return f(int64_t{0}, pixels);
  for_each_image(pixels, image_pixels,
                 [&](int64_t n, Range part) { f(n, Range{n * image_pixels + part.begin, n * image_pixels + part.end}); });
}

Activated at(Activated image, int64_t pixel, int64_t n) {
  image.y += pixel * image.stride;
  if (image.gate) image.gate += n * image.channels;
  return image;
}
Gradient at(Gradient g, int64_t pixel, int64_t n) {
  g.dz += pixel * g.dz_stride;
  g.y += pixel * g.y_stride;
  if (g.add) g.add += n * g.channels;
  return g;
}

void make_gradient(const Gradient& g, Range pixels, int64_t image_pixels, float* to, Strides strides) {
  by_image(pixels, image_pixels, g.add != nullptr, [&](int64_t n, Range part) {
    kernels().gradient(at(g, part.begin, n), part.size(), to + (part.begin - pixels.begin) * strides.pixel, strides);
  });
}

// Sums, in double and in their order, over `number` parts that are `stride` floats apart.
void add_sums(const float* parts, int64_t number, int64_t size, int64_t stride, float* out, const Parallel& parallel) {
  parallel.split(size, 256, 16, [&](Range range) {
    std::vector<double> sums(range.size());
    for (int64_t i = 0; i < number; ++i)
      for (int64_t j = 0; j < range.size(); ++j) sums[j] += parts[i * stride + range.begin + j];
    for (int64_t j = 0; j < range.size(); ++j) out[range.begin + j] = static_cast<float>(sums[j]);
  });
}

// Sums over `runs` of a product's parts, (outputs, inputs up to whole vectors) each.
void add_products(const float* parts, int64_t runs, int64_t outputs, int64_t inputs, float* out, const Parallel& parallel) {
  const int64_t stride = padded(inputs), product = outputs * stride;
  parallel.split(outputs, ceil_div(4096, inputs), 1, [&](Range range) {
    for (int64_t n = range.begin; n < range.end; ++n) {
      float* const to = out + n * inputs;
      const float* const in = parts + n * stride;
      std::memcpy(to, in, inputs * sizeof(float));
      for (int64_t r = 1; r < runs; ++r)
        for (int64_t j = 0; j < inputs; ++j) to[j] += in[r * product + j];
    }
  });
}

// Means and squares about them, of parts of count(i) pixels each, (2, channels) a part, to those of the whole (Chan et al., 1979).
template <class Count>
void join_moments(const float* parts, int64_t number, int64_t channels, int64_t pixels, const Count& count, const Statistics& out,
                  const Parallel& parallel) {
  parallel.split(channels, 128, 16, [&](Range range) {
    std::vector<double> mean(range.size()), squares(range.size());
    for (int64_t i = 0; i < number; ++i) {
      const double weight = static_cast<double>(count(i)) / pixels;
      for (int64_t j = 0; j < range.size(); ++j) mean[j] += weight * parts[2 * i * channels + range.begin + j];
    }
    for (int64_t i = 0; i < number; ++i) {
      const double weight = count(i);
      const float* part = parts + 2 * i * channels + range.begin;
      for (int64_t j = 0; j < range.size(); ++j) {
        const double d = part[j] - mean[j];
        squares[j] += part[channels + j] + weight * d * d;
      }
    }
    for (int64_t j = 0; j < range.size(); ++j) {
      out.mean[range.begin + j] = static_cast<float>(mean[j]);
      out.variance[range.begin + j] = static_cast<float>(squares[j] / pixels);
    }
  });
}

// Rows of an image that a thread makes as it goes, blocked, in a ring: `next` is the first not made yet.
struct Ring {
  float* data;
  int64_t rows, width, channels, next;
  Strides strides;
  int64_t row_stride;
  Ring(int64_t rows, int64_t width, int64_t channels)
      : data(nullptr), rows(rows), width(width), channels(channels), next(0), strides(blocked(rows * width)), row_stride(width * PANEL) {}
  int64_t floats() const { return blocked_floats(rows * width, channels); }
  float* row(int64_t h) const { return data + h % rows * row_stride; }
};

}  // namespace

void PixelRows::rows(Range pixels, float* to, Strides to_strides) const {
  by_image(pixels, image_pixels_, image_.gate != nullptr, [&](int64_t n, Range part) {
    kernels().activated(at(image_, part.begin, n), part.size(), to + (part.begin - pixels.begin) * to_strides.pixel, to_strides);
  });
}

const float* PixelRows::in_place(int64_t& stride) const {
  if (!image_.plain()) return nullptr;
  stride = image_.stride;
  return image_.y;
}

void WindowRows::rows(Range pixels, float* to, Strides to_strides) const {
  const Windows& w = windows_;
  const int64_t image_pixels = w.out_height * w.out_width, row = w.kernel_w * w.channels, rest = padded(depth()) - depth();
  // Inside the image by whole lines: copies and zeros of a length that is not known call a function each, a fifth of a stem's gradient.
  const int64_t lines = ceil_div(row, PANEL) * PANEL;
  const bool roomy = depth() - row + lines <= to_strides.pixel && depth() + PANEL <= to_strides.pixel;
  for (int64_t p = pixels.begin; p < pixels.end; ++p, to += to_strides.pixel) {
    const int64_t n = p / image_pixels, h = p % image_pixels / w.out_width * w.stride_h - w.pad_h,
                  x = p % w.out_width * w.stride_w - w.pad_w;
    const float* const from = w.x + ((n * w.height + h) * w.width + x) * w.channels;
    const bool inside = h >= 0 && x >= 0 && h + w.kernel_h <= w.height && x + w.kernel_w <= w.width;
    // the last line ends in the image, too
    if (roomy && inside && ((h + w.kernel_h - 1) * w.width + x) * w.channels + lines <= w.height * w.width * w.channels) {
      for (int64_t kh = 0; kh < w.kernel_h; ++kh)
        for (int64_t j = 0; j < lines; j += PANEL)
          std::memcpy(to + kh * row + j, from + kh * w.width * w.channels + j, PANEL * sizeof(float));
      std::memset(to + depth(), 0, PANEL * sizeof(float));
      continue;
    }
    const int64_t left = std::clamp<int64_t>(-x, 0, w.kernel_w), right = std::clamp<int64_t>(w.width - x, left, w.kernel_w);
    for (int64_t kh = 0; kh < w.kernel_h; ++kh) {
      float* const out = to + kh * row;
      if (h + kh < 0 || h + kh >= w.height) {
        std::memset(out, 0, row * sizeof(float));
        continue;
      }
      std::memset(out, 0, left * w.channels * sizeof(float));
      std::memcpy(out + left * w.channels, from + (kh * w.width + left) * w.channels, (right - left) * w.channels * sizeof(float));
      std::memset(out + right * w.channels, 0, (w.kernel_w - right) * w.channels * sizeof(float));
    }
    std::memset(to + depth(), 0, rest * sizeof(float));
  }
}

void run_training_product(const InputRows& input, int64_t pixels, const PackedPointwise& weights, float* y, const Statistics& statistics,
                          const Parallel& parallel) {
  const Kernels& k = kernels();
  const int64_t depth = input.depth(), channels = weights.out_channels;
  const Strips strips(pixels, depth, channels, pixels, false);
  float* const parts = shared_scratch.floats(std::max<int64_t>(strips.number, 1) * 2 * channels);
  int64_t stride = 0;
  const float* const in_place = input.in_place(stride);
  parallel.split(strips.number, 1, 1, [&](Range range) {
    const int64_t scratch_stride = strip_stride(depth);
    float* const scratch = in_place ? nullptr : private_scratch.floats(strips.most() * scratch_stride);
    for (int64_t i = range.begin; i < range.end; ++i) {
      const Range strip = strips[i];
      if (!in_place) input.rows(strip, scratch, scratch_stride);
      float* const out = y + strip.begin * channels;
      Pointwise call{in_place ? in_place + strip.begin * stride : scratch,
                     in_place ? stride : scratch_stride,
                     depth,
                     channels,
                     weights.panels,
                     {weights.bias, nullptr, 0, weights.activation},
                     out,
                     channels};
      // The next strip's lines of y come meanwhile (all of MobileNet V2's products: 89 to 84 ms of a core).
      if (i + 1 < range.end) call.soon = {y + strips[i + 1].begin * channels, y + strips[i + 1].end * channels};
      k.pointwise(call, {0, strip.size()}, {0, panels_for(channels)});
      if (statistics.mean) k.moments(out, channels, strip.size(), channels, parts + 2 * i * channels, parts + (2 * i + 1) * channels);
    }
  });
  if (statistics.mean)
    join_moments(parts, strips.number, channels, pixels, [&](int64_t i) { return strips[i].size(); }, statistics, parallel);
}

void run_product_backward(const ProductBackward& op, const Parallel& parallel) {
  const Kernels& k = kernels();
  const int64_t pixels = op.batch * op.image_pixels, outputs = op.gradient.channels, inputs = op.inputs;
  const bool sums_by_image = op.through.kind == Through::gate;
  const Strips strips(pixels, inputs, outputs, op.image_pixels, sums_by_image);
  // Runs of strips share a partial sum of the weights' gradient: enough runs for the threads, few enough to add up at little cost.
  const int64_t product = outputs * padded(inputs);
  const int64_t runs = std::min(strips.number, std::clamp<int64_t>(512 * 1024 / product, 4, 16));
  const int64_t through_floats = op.through.kind == Through::activation ? 2 * inputs : sums_by_image ? inputs : 0;
  const int64_t bias_floats = op.dbias ? outputs : 0;
  float* const products = shared_scratch.floats(runs * product + strips.number * (through_floats + bias_floats));
  float* const through_sums = products + runs * product;
  float* const bias_sums = through_sums + strips.number * through_floats;
  std::memset(through_sums, 0, strips.number * (through_floats + bias_floats) * sizeof(float));

  parallel.pieces(runs, runs, [&](Range run, int64_t) {
    const Strides dy_strides = blocked(strips.most());
    const int64_t z_stride = strip_stride(inputs), dy_floats = blocked_floats(strips.most(), outputs);
    float* const dy = private_scratch.floats(dy_floats + strips.most() * z_stride);
    float* const z = dy + dy_floats;
    for (int64_t r = run.begin; r < run.end; ++r) {
      float* const sums = products + r * product;
      if (op.dweight) std::memset(sums, 0, product * sizeof(float));
      for (int64_t i = r * strips.number / runs; i < (r + 1) * strips.number / runs; ++i) {
        const Range strip = strips[i];
        make_gradient(op.gradient, strip, op.image_pixels, dy, dy_strides);
        if (op.dbias) k.sum_pixels(dy, dy_strides, strip.size(), outputs, bias_sums + i * outputs);
        float* const dx = op.transposed_panels ? op.dx + strip.begin * inputs : nullptr;
        if (op.dweight) {
          op.input->rows(strip, z, z_stride);
          // dx's lines come meanwhile: stores that miss L2 took twice as long as their product (SqueezeNet 1.1's squeezes: 15.7 to 12.7
          // ms).
          const Fetch soon = dx ? Fetch{dx, dx + strip.size() * inputs} : Fetch{};
          k.product_gradient({dy, dy_strides, z, z_stride, strip.size(), outputs, inputs, sums, padded(inputs), soon});
        }
        if (!dx) continue;
        k.pointwise({dy,
                     dy_strides,
                     outputs,
                     inputs,
                     op.transposed_panels,
                     {op.zeros, op.residual ? op.residual + strip.begin * inputs : nullptr, inputs, Activation::none},
                     dx,
                     inputs},
                    {0, strip.size()}, {0, panels_for(inputs)});
        float* const part = through_sums + i * through_floats;
        if (op.through.kind == Through::activation)
          k.through_activation(at(op.through.image, strip.begin, 0), strip.size(), op.through.mean, dx, inputs, part, part + inputs);
        else if (sums_by_image)
          k.through_gate(at(op.through.image, strip.begin, strip.begin / op.image_pixels), strip.size(), dx, inputs, part);
      }
    }
  });

  if (op.dweight) add_products(products, runs, outputs, inputs, op.dweight, parallel);
  if (op.dbias) add_sums(bias_sums, strips.number, outputs, outputs, op.dbias, parallel);
  if (op.through.kind == Through::activation) add_sums(through_sums, strips.number, 2 * inputs, 2 * inputs, op.through.sums, parallel);
  if (sums_by_image) {
    const int64_t each = strips.number / op.batch;
    for (int64_t n = 0; n < op.batch; ++n)
      add_sums(through_sums + n * each * inputs, each, inputs, inputs, op.through.sums + n * inputs, Parallel{});
  }
}

void run_stem_pool_backward(const StemPoolBackward& op, const Parallel& parallel) {
  const Kernels& k = kernels();
  const Stem& stem = op.stem;
  const StemRows source(stem, op.image_stride, parallel.threads());
  const WindowRows windows(op.windows);
  const int64_t outputs = stem.out_channels, inputs = windows.depth(), width = stem.out_width, row = width * outputs;
  // A band's rows and their gradient are two strips; a row that two bands read is made for both.
  const int64_t rows = std::max<int64_t>(STRIP_FLOATS / row, 3), most = (rows - 3) / op.pool.stride_h + 1;
  const int64_t bands = ceil_div(op.pool.out_height, most), each = ceil_div(op.pool.out_height, bands), units = op.batch * bands;
  const int64_t strip = std::clamp<int64_t>(STRIP_FLOATS / (inputs + outputs), 28, 448) / 28 * 28;
  const int64_t product = outputs * padded(inputs);
  const int64_t runs = std::max<int64_t>(1, std::min(units, std::clamp<int64_t>(512 * 1024 / product, 4, 16)));  // of no image, zeros
  float* const products = shared_scratch.floats(runs * product + units * 2 * outputs);
  float* const bias_sums = products + runs * product;
  std::memset(products, 0, (runs * product + units * 2 * outputs) * sizeof(float));

  parallel.pieces(runs, runs, [&](Range run, int64_t worker) {
    const int64_t dy_stride = strip_stride(outputs), window_stride = strip_stride(inputs);
    const int64_t band_floats = ((each - 1) * op.pool.stride_h + 3) * row;
    float* const z = private_scratch.floats(2 * band_floats + strip * (dy_stride + window_stride));
    float* const dz = z + band_floats;
    float* const dy = dz + band_floats;
    float* const window = dy + strip * dy_stride;
    for (int64_t r = run.begin; r < run.end; ++r)
      for (int64_t u = r * units / runs; u < (r + 1) * units / runs; ++u) {
        const int64_t n = u / bands;
        const Range pooled{u % bands * op.pool.out_height / bands, (u % bands + 1) * op.pool.out_height / bands};
        const int64_t top = pooled.begin * op.pool.stride_h - op.pool.pad_h;
        const Range band{std::max<int64_t>(top, 0), std::min(top + (pooled.size() - 1) * op.pool.stride_h + 3, stem.out_height)};
        source.rows(n, band, z, outputs, worker);
        MaxPoolGradient pool = op.pool;
        pool.x = z;
        pool.dx = dz;
        pool.dy += (n * op.pool.out_height + pooled.begin) * op.pool.out_width * outputs;
        pool.height = band.size();
        pool.out_height = pooled.size();
        pool.pad_h = band.begin - top;
        k.max_pool_gradient(pool);
        const Gradient whole{dz,      outputs, nullptr, z,      outputs, outputs, nullptr, nullptr, stem.epilogue.activation,
                             nullptr, nullptr, nullptr, nullptr};
        const int64_t first = (n * stem.out_height + band.begin) * width;
        for (int64_t p = 0; p < band.size() * width; p += strip) {
          const int64_t pixels = std::min(strip, band.size() * width - p);
          const Gradient part = at(whole, p, 0);
          k.gradient_sums(part, pixels, nullptr, bias_sums + 2 * u * outputs, bias_sums + (2 * u + 1) * outputs);
          k.gradient(part, pixels, dy, dy_stride);
          windows.rows({first + p, first + p + pixels}, window, window_stride);
          k.product_gradient({dy, dy_stride, window, window_stride, pixels, outputs, inputs, products + r * product, padded(inputs)});
        }
      }
  });
  add_products(products, runs, outputs, inputs, op.dweight, parallel);
  add_sums(bias_sums, units, outputs, 2 * outputs, op.dbias, parallel);
}

void run_window_backward(const WindowBackward& op, const Parallel& parallel) {
  const Kernels& k = kernels();
  // Whole blocks of channels: the kernels that make the buffer write whole vectors.
  const int64_t channels = padded(op.gradient.channels), image_pixels = op.height * op.width;
  const int64_t tiles_h = ceil_div(op.height, 4), row_floats = (ceil_div(op.width, 4) * 4 + 2) * channels;
  const int64_t most = std::clamp<int64_t>(STRIP_FLOATS / 4 / row_floats, 1, tiles_h);  // rows of tiles at a time
  const int64_t pieces = ceil_div(tiles_h, most);
  parallel.split(op.batch * pieces, 1, 1, [&](Range range) {
    for (int64_t i = range.begin; i < range.end; ++i) {
      const int64_t n = i / pieces;
      const Range tile_rows{i % pieces * tiles_h / pieces, (i % pieces + 1) * tiles_h / pieces};
      const Range rows{tile_rows.begin * 4, std::min(tile_rows.end * 4, op.height)};
      const int64_t buffer_rows = tile_rows.size() * 4 + 2;
      float* const buffer = private_scratch.floats(buffer_rows * row_floats);
      for (int64_t r = 0; r < buffer_rows; ++r) {
        const int64_t h = rows.begin - 1 + r;
        float* const to = buffer + r * row_floats;
        if (h < 0 || h >= op.height || channels != op.gradient.channels) std::memset(to, 0, row_floats * sizeof(float));
        if (h < 0 || h >= op.height) continue;
        std::memset(to, 0, channels * sizeof(float));
        k.gradient(at(op.gradient, n * image_pixels + h * op.width, n), op.width, to + channels, channels);
        std::memset(to + (op.width + 1) * channels, 0, (row_floats - (op.width + 1) * channels) * sizeof(float));
      }
      float* const dx = op.dx + (n * image_pixels + rows.begin * op.width) * op.inputs;
      PaddedConv conv{buffer, channels, row_floats, channels, op.inputs, rows.size(), op.width, 3, 3, op.panels, {op.zeros}, dx, op.inputs};
      if (!k.all_moderate(buffer, buffer_rows * row_floats)) {
        k.padded_conv(conv, {0, rows.size()}, {0, panels_for(op.inputs)});
        continue;
      }
      conv.panels = op.winograd;
      const int64_t tiles = tile_rows.size() * ceil_div(op.width, 4);
      k.winograd(conv, {0, tiles}, {0, panels_for(op.inputs)}, tile_scratch.floats(k.winograd_scratch(conv, tiles)));
    }
  });
}

namespace {

// Rows of tiles, no more than TILES of them at a time, of which as many make a strip: their transformed inputs and gradients, and the 36
// sums, stand in L2 together. A long row of tiles is cut.
struct TileStrips {
  static constexpr int64_t TILES = 32, SUMS = 64 * 64;  // SUMS: inputs x outputs of a plane
  int64_t rows, across, tiles, units, each, number;     // tiles: of a unit, the most
  TileStrips(int64_t batch, int64_t height, int64_t width) {
    rows = ceil_div(height, 4);
    const int64_t row = ceil_div(width, 4);
    across = ceil_div(row, TILES);
    tiles = ceil_div(row, across);
    units = batch * rows * across;
    each = TILES / tiles;
    number = ceil_div(units, each);
  }
};

}  // namespace

void run_window_gradient(const WindowGradient& op, const Parallel& parallel) {
  const Kernels& k = kernels();
  const TileStrips strips(op.batch, op.height, op.width);
  const int64_t inputs = op.inputs, outputs = op.gradient.channels, image_pixels = op.height * op.width, row_tiles = ceil_div(op.width, 4);
  // Outputs go in blocks, each with transformed inputs of its own: all sums at once would not fit L2.
  const int64_t panels = panels_for(outputs), most = std::clamp<int64_t>(TileStrips::SUMS / (padded(inputs) * PANEL), 1, 4);
  const int64_t blocks = ceil_div(panels, most), block = ceil_div(panels, blocks) * PANEL;
  const int64_t runs = std::min(strips.number, std::max<int64_t>(16 / blocks, 4));
  const int64_t taps_stride = blocks * block, taps = 9 * inputs * taps_stride;
  float* const parts = shared_scratch.floats(runs * (taps + taps_stride));  // a run's taps, and its bias

  parallel.pieces(runs * blocks, runs * blocks, [&](Range pieces, int64_t) {
    const int64_t in = padded(inputs), plane_tiles = strips.each * strips.tiles;
    const int64_t z_row = (4 * strips.tiles + 2) * in, dy_row = 4 * strips.tiles * block, window_stride = padded(9 * inputs);
    constexpr int64_t WINDOWS = 16;
    const int64_t z_tile = in | PANEL, dy_tile = block | PANEL;  // an odd number of cache lines, as strips
    float* const sums = private_scratch.floats(36 * (inputs * block + plane_tiles * (z_tile + dy_tile)) + 6 * z_row + 4 * dy_row + block +
                                               WINDOWS * window_stride);
    float* const z_tiles = sums + 36 * inputs * block;
    float* const dy_tiles = z_tiles + 36 * plane_tiles * z_tile;
    float* const z = dy_tiles + 36 * plane_tiles * dy_tile;
    float* const dy = z + 6 * z_row;
    float* const strip_bias = dy + 4 * dy_row;
    float* const windows = strip_bias + block;
    const WindowRows rows({op.z, op.height, op.width, inputs, op.height, op.width, 3, 3, 1, 1, 1, 1});
    std::vector<double> bias(block);
    for (int64_t piece = pieces.begin; piece < pieces.end; ++piece) {
      const int64_t run = piece / blocks, first_output = piece % blocks * block;
      float* const part = parts + run * (taps + taps_stride) + first_output;
      for (int64_t i = 0; i < 9 * inputs; ++i) std::memset(part + i * taps_stride, 0, block * sizeof(float));
      std::memset(sums, 0, 36 * inputs * block * sizeof(float));
      std::fill(bias.begin(), bias.end(), 0.0);
      Gradient gradient = op.gradient;
      gradient.dz += first_output;
      gradient.y += first_output;
      gradient.channels = std::min(block, outputs - first_output);
      for (int64_t strip = run * strips.number / runs; strip < (run + 1) * strips.number / runs; ++strip) {
        int64_t done = 0;
        std::memset(strip_bias, 0, block * sizeof(float));
        for (int64_t unit = strip * strips.each; unit < std::min(strips.units, (strip + 1) * strips.each); ++unit) {
          const int64_t n = unit / (strips.rows * strips.across), h = unit / strips.across % strips.rows * 4;
          const int64_t part_of_row = unit % strips.across;
          const int64_t first = part_of_row * row_tiles / strips.across, tiles = (part_of_row + 1) * row_tiles / strips.across - first;
          const int64_t w = first * 4, width = std::min(op.width - w, tiles * 4), height = std::min<int64_t>(op.height - h, 4);
          for (int64_t i = 0; i < 4; ++i) {
            float* const to = dy + i * dy_row;
            if (i < height) k.gradient(at(gradient, n * image_pixels + (h + i) * op.width + w, n), width, to, block);
            const int64_t real = i < height ? width : 0;
            std::memset(to + real * block, 0, (tiles * 4 - real) * block * sizeof(float));
            // Lanes beyond the last panel's outputs hold zeros; panels beyond them nothing yet.
            if (const int64_t own = padded(gradient.channels); own < block)
              for (int64_t p = 0; p < real; ++p) std::memset(to + p * block + own, 0, (block - own) * sizeof(float));
          }
          for (int64_t i = 0; i < 6; ++i) {
            float* to = z + i * z_row;
            const int64_t row = h - 1 + i, left = std::max<int64_t>(w - 1, 0), right = std::min(op.width, w + tiles * 4 + 1);
            std::memset(to, 0, (tiles * 4 + 2) * in * sizeof(float));
            if (row < 0 || row >= op.height) continue;
            const float* const from = op.z + (n * image_pixels + row * op.width) * inputs;
            for (int64_t x = left; x < right; ++x) std::memcpy(to + (x - w + 1) * in, from + x * inputs, inputs * sizeof(float));
          }
          bool moderate = true;
          for (int64_t i = 0; i < 6; ++i) moderate = moderate && k.all_moderate(z + i * z_row, (tiles * 4 + 2) * in);
          for (int64_t i = 0; i < 4; ++i) moderate = moderate && k.all_moderate(dy + i * dy_row, tiles * 4 * block);
          if (moderate) {
            k.window_inputs({z, in, z_row, in, tiles, z_tiles + done * z_tile, z_tile, plane_tiles * z_tile});
            k.window_gradients({dy, block, dy_row, block, tiles, dy_tiles + done * dy_tile, dy_tile, plane_tiles * dy_tile});
            done += tiles;
            continue;
          }
          for (int64_t i = 0; i < height; ++i) {
            const int64_t pixel = n * image_pixels + (h + i) * op.width + w;
            k.sum_pixels(dy + i * dy_row, block, width, block, strip_bias);
            for (int64_t p = 0; p < width; p += WINDOWS) {
              const int64_t count = std::min(WINDOWS, width - p);
              rows.rows({pixel + p, pixel + p + count}, windows, window_stride);
              k.product_gradient({windows, window_stride, dy + i * dy_row + p * block, block, count, 9 * inputs, block, part, taps_stride});
            }
          }
        }
        for (int64_t i = 0; i < 36; ++i)
          k.product_gradient({z_tiles + i * plane_tiles * z_tile, z_tile, dy_tiles + i * plane_tiles * dy_tile, dy_tile, done, inputs,
                              block, sums + i * inputs * block, block});
        // Row and column 1 of A are ones: that plane holds each tile's sum.
        k.sum_pixels(dy_tiles + 7 * plane_tiles * dy_tile, dy_tile, done, block, strip_bias);
        for (int64_t j = 0; j < block; ++j) bias[j] += strip_bias[j];
      }
      k.window_taps(sums, inputs, block, part, taps_stride);
      float* const bias_part = parts + run * (taps + taps_stride) + taps + first_output;
      for (int64_t j = 0; j < block; ++j) bias_part[j] = static_cast<float>(bias[j]);
    }
  });

  parallel.split(panels, 1, 1, [&](Range range) {
    for (int64_t n = range.begin * PANEL; n < std::min(range.end * PANEL, outputs); n += PANEL) {
      const int64_t lanes = std::min(PANEL, outputs - n);
      for (int64_t k = 0; k < inputs; ++k)
        for (int64_t tap = 0; tap < 9; ++tap) {
          float sum[PANEL] = {};
          for (int64_t r = 0; r < runs; ++r) {
            const float* const from = parts + r * (taps + taps_stride) + (tap * inputs + k) * taps_stride + n;
            for (int64_t j = 0; j < PANEL; ++j) sum[j] += from[j];
          }
          for (int64_t j = 0; j < lanes; ++j) op.dweight[((n + j) * inputs + k) * 9 + tap] = sum[j];
        }
    }
  });
  add_sums(parts + taps, runs, outputs, taps + taps_stride, op.dbias, parallel);
}

namespace {

// Rows of an image that one piece of a depthwise convolution makes: all, or as many as leave enough pieces for the threads of a large
// machine.
int64_t rows_a_piece(int64_t batch, int64_t height) {
  constexpr int64_t PIECES = 32, LEAST = 8;  // of fewer rows, the halo would cost a quarter
  return std::min(height, std::max(LEAST, ceil_div(height, ceil_div(PIECES, std::max<int64_t>(batch, 1)))));
}

// Rows that are made at a time: whole pairs (depthwise.h), in strips that stay in L2 together with their rings.
int64_t rows_a_step(int64_t width, int64_t channels) { return std::max<int64_t>(2, STRIP_FLOATS / 4 / (width * channels) / 2 * 2); }

}  // namespace

void run_training_depthwise(const Activated& image, const Depthwise& geometry, int64_t batch, int64_t out_height,
                            const Statistics& statistics, const Parallel& parallel) {
  const Kernels& k = kernels();
  const int64_t channels = geometry.channels, height = geometry.height, width = geometry.width, out_width = geometry.out_width;
  const int64_t rows = rows_a_piece(batch, out_height), pieces = ceil_div(out_height, rows), step = rows_a_step(out_width, channels);
  float* const parts = shared_scratch.floats(std::max<int64_t>(batch * pieces, 1) * 2 * channels);
  parallel.split(batch * pieces, 1, 1, [&](Range range) {
    Ring ring(std::min(height, (step - 1) * geometry.stride_h + geometry.kernel + 1), width, channels);
    ring.data = private_scratch.floats(ring.floats());
    for (int64_t i = range.begin; i < range.end; ++i) {
      const int64_t n = i / pieces, begin = i % pieces * out_height / pieces, end = (i % pieces + 1) * out_height / pieces;
      float* const out = geometry.out + (n * out_height + begin) * out_width * channels;
      ring.next = std::max<int64_t>(0, begin * geometry.stride_h - geometry.pad_h);
      for (int64_t h = begin; h < end; h += step) {
        const int64_t last = std::min(end, h + step);
        for (const int64_t needed = std::min(height, (last - 1) * geometry.stride_h - geometry.pad_h + geometry.kernel); ring.next < needed;
             ++ring.next)
          k.activated(at(image, (n * height + ring.next) * width, n), width, ring.row(ring.next), ring.strides);
        Depthwise op = geometry;
        op.x = ring.data;
        op.x_strides = ring.strides;
        op.x_row_stride = ring.row_stride;
        op.ring_rows = ring.rows;
        op.out = out + (h - begin) * out_width * channels;
        op.out_strides = channels;
        op.out_row_stride = out_width * channels;
        k.depthwise(op, {h, last}, {0, channels});
      }
      if (statistics.mean)
        k.moments(out, channels, (end - begin) * out_width, channels, parts + 2 * i * channels, parts + (2 * i + 1) * channels);
    }
  });
  if (statistics.mean)
    join_moments(
        parts, batch * pieces, channels, batch * out_height * out_width,
        [&](int64_t i) { return ((i % pieces + 1) * out_height / pieces - i % pieces * out_height / pieces) * out_width; }, statistics,
        parallel);
}

void run_depthwise_backward(const DepthwiseBackward& op, const Parallel& parallel) {
  const Kernels& k = kernels();
  const int64_t channels = op.channels, taps = op.kernel * op.kernel;
  // A piece makes the input gradient of its rows, and the weights' from the output rows that start among them.
  const int64_t rows = rows_a_piece(op.batch, op.height), pieces = ceil_div(op.height, rows), step = rows_a_step(op.width, channels);
  // dy with zeros between its pixels and rows: the input gradient is a convolution of stride 1 over it, with the taps flipped.
  const int64_t spread_height = (op.out_height - 1) * op.stride_h + 1, spread_width = (op.out_width - 1) * op.stride_w + 1;
  const int64_t weight_floats = op.dweight ? taps * padded(channels) : 0;
  const int64_t through_floats = op.through.kind == Through::activation ? 2 * channels : 0;
  const int64_t number = op.batch * pieces;
  float* const weight_sums = shared_scratch.floats(std::max<int64_t>(number, 1) * (weight_floats + through_floats));
  float* const through_sums = weight_sums + number * weight_floats;
  std::memset(weight_sums, 0, number * (weight_floats + through_floats) * sizeof(float));

  parallel.split(number, 1, 1, [&](Range range) {
    // Both rings hold what a step reads: its own rows, and the kernel's reach on either side.
    Ring dy(std::min(spread_height, step + op.kernel), spread_width, channels);
    Ring z(std::min(op.height, step + op.kernel), op.width, channels);
    const int64_t z_floats = op.dweight ? z.floats() : 0;
    dy.data = private_scratch.floats(dy.floats() + z_floats);
    z.data = dy.data + dy.floats();
    const bool spread = op.stride_h > 1 || op.stride_w > 1;
    if (spread) std::memset(dy.data, 0, dy.floats() * sizeof(float));
    for (int64_t i = range.begin; i < range.end; ++i) {
      const int64_t n = i / pieces, begin = i % pieces * op.height / pieces, end = (i % pieces + 1) * op.height / pieces;
      // Input row h meets spread rows h + pad - kernel + 1 to h + pad; output row o meets input rows o * stride - pad and on.
      const int64_t reach = op.pad_h - op.kernel + 1;
      dy.next = std::max<int64_t>(0, begin + reach);
      int64_t oh = ceil_div(begin, op.stride_h);
      z.next = std::max<int64_t>(0, oh * op.stride_h - op.pad_h);
      for (int64_t h = begin; h < end; h += step) {
        const int64_t last = std::min(end, h + step);
        // Output rows that start here; the image's last rows take those that start in its padding.
        const int64_t oh_end = last == op.height ? op.out_height : std::min(op.out_height, ceil_div(last, op.stride_h));
        const int64_t dy_needed = std::min(spread_height, std::max(last + op.pad_h, (oh_end - 1) * op.stride_h + 1));
        for (; dy.next < dy_needed; ++dy.next) {
          float* const to = dy.row(dy.next);
          if (dy.next % op.stride_h == 0) {
            const int64_t pixel = (n * op.out_height + dy.next / op.stride_h) * op.out_width;
            k.gradient(at(op.gradient, pixel, n), op.out_width, to, {op.stride_w * PANEL, dy.strides.block});
          } else {
            for (int64_t c = 0; c < channels; c += PANEL) std::memset(to + dy.strides.at(0, c), 0, dy.row_stride * sizeof(float));
          }
        }
        if (op.dweight && oh < oh_end) {
          const int64_t z_needed = std::min(op.height, (oh_end - 1) * op.stride_h - op.pad_h + op.kernel);
          for (; z.next < z_needed; ++z.next)
            k.activated(at(op.image, (n * op.height + z.next) * op.width, n), op.width, z.row(z.next), z.strides);
          const DepthwiseGradient weights{.z = z.data,
                                          .dy = dy.data,
                                          .z_strides = z.strides,
                                          .dy_strides = dy.strides,
                                          .z_row_stride = z.row_stride,
                                          .dy_row_stride = dy.row_stride,
                                          .z_ring_rows = z.rows,
                                          .dy_ring_rows = dy.rows,
                                          .height = op.height,
                                          .width = op.width,
                                          .channels = channels,
                                          .out_width = op.out_width,
                                          .kernel = op.kernel,
                                          .stride_h = op.stride_h,
                                          .stride_w = op.stride_w,
                                          .pad_h = op.pad_h,
                                          .pad_w = op.pad_w,
                                          .sums = weight_sums + i * weight_floats,
                                          .sums_stride = padded(channels)};
          k.depthwise_gradient(weights, {oh, oh_end});
        }
        oh = std::max(oh, oh_end);
        if (!op.flipped_taps) continue;
        float* const dx = op.dx + (n * op.height + h) * op.width * channels;
        k.depthwise({dy.data, dy.strides, dy.row_stride, dy.rows, spread_height, spread_width, channels, op.width, op.kernel, 1, 1,
                     op.kernel - 1 - op.pad_h, op.kernel - 1 - op.pad_w, op.flipped_taps, op.zeros, Activation::none, dx, channels,
                     op.width * channels},
                    {h, last}, {0, channels});
        float* const part = through_sums + i * through_floats;
        if (op.through.kind == Through::activation)
          k.through_activation(at(op.through.image, (n * op.height + h) * op.width, n), (last - h) * op.width, op.through.mean, dx,
                               channels, part, part + channels);
      }
    }
  });

  if (op.dweight) {
    std::vector<float> sums(weight_floats);
    add_sums(weight_sums, number, weight_floats, weight_floats, sums.data(), parallel);
    for (int64_t tap = 0; tap < taps; ++tap)
      std::memcpy(op.dweight + tap * channels, sums.data() + tap * padded(channels), channels * sizeof(float));
  }
  if (op.through.kind == Through::activation) add_sums(through_sums, number, through_floats, through_floats, op.through.sums, parallel);
}

void run_activated(const Activated& image, int64_t pixels, const float* residual, float* z, const Parallel& parallel) {
  parallel.split(pixels, ceil_div(16 * 1024, image.channels), 4, [&](Range range) {
    const int64_t offset = range.begin * image.channels;
    kernels().activated_exactly(at(image, range.begin, 0), range.size(), residual ? residual + offset : nullptr, image.channels, z + offset,
                                image.channels);
  });
}

void run_activated_means(const Activated& image, int64_t batch, int64_t image_pixels, float* means, const Parallel& parallel) {
  const Kernels& k = kernels();
  const Strips strips(batch * image_pixels, image.channels, 0, image_pixels, true);
  const int64_t each = batch ? strips.number / batch : 0;
  parallel.split(batch, 1, 1, [&](Range range) {
    const int64_t stride = strip_stride(image.channels), width = padded(image.channels);
    float* const strip = private_scratch.floats(strips.most() * stride + width);
    float* const sums = strip + strips.most() * stride;
    std::vector<double> total(image.channels);
    for (int64_t n = range.begin; n < range.end; ++n) {
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t i = n * each; i < (n + 1) * each; ++i) {
        k.activated(at(image, strips[i].begin, n), strips[i].size(), strip, stride);
        std::memset(sums, 0, width * sizeof(float));
        k.sum_pixels(strip, stride, strips[i].size(), image.channels, sums);
        for (int64_t c = 0; c < image.channels; ++c) total[c] += sums[c];
      }
      for (int64_t c = 0; c < image.channels; ++c) means[n * image.channels + c] = static_cast<float>(total[c] / image_pixels);
    }
  });
}

void run_gradient_sums(const Gradient& gradient, int64_t batch, int64_t image_pixels, const float* mean, float* sums,
                       const Parallel& parallel) {
  const int64_t channels = gradient.channels;
  const Strips strips(batch * image_pixels, channels, 0, image_pixels, gradient.add != nullptr);
  float* const parts = shared_scratch.floats(std::max<int64_t>(strips.number, 1) * 2 * channels);
  std::memset(parts, 0, strips.number * 2 * channels * sizeof(float));
  parallel.split(strips.number, 1, 1, [&](Range range) {
    for (int64_t i = range.begin; i < range.end; ++i)
      kernels().gradient_sums(at(gradient, strips[i].begin, strips[i].begin / image_pixels), strips[i].size(), mean,
                              parts + 2 * i * channels, parts + (2 * i + 1) * channels);
  });
  add_sums(parts, strips.number, 2 * channels, 2 * channels, sums, parallel);
}

}  // namespace fastconv
