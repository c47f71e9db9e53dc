"""The mutants of `make mutants`: what is replaced by what, what that breaks, and the test that ought to notice.

Tests: "exact ISA OPERATOR" and "check_kernels ISA" are the programs of tests/core, "check_team" another; "pytest ..." are pytest's
arguments, run with an extension of the scalar kernels where the mutant is in C++.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    file: str
    breaks: str
    find: str
    replace: str
    test: str


def core(file: str, test: str, breaks: str, find: str, replace: str) -> Mutant:
    return Mutant(f"kernels/cpu/{file}", breaks, find, replace, test)


def binding(file: str, test: str, breaks: str, find: str, replace: str) -> Mutant:
    return Mutant(f"csrc/{file}", breaks, find, replace, f"pytest {test}")


def python(file: str, test: str, breaks: str, find: str, replace: str) -> Mutant:
    return Mutant(f"fastconv/{file}", breaks, find, replace, f"pytest {test}")


TILES_TEST = "pytest tests/test_training_kernels.py -k tiles"
KERNELS_TEST = "pytest tests/test_training_kernels.py tests/test_training.py"

DEPTHWISE = [
    core(
        "depthwise.h",
        "exact avx2 depthwise",
        "halo one row low",
        "oh * op.stride_h - op.pad_h + i;",
        "oh * op.stride_h - op.pad_h + i + 1;",
    ),
    core(
        "depthwise.h",
        "exact avx2 depthwise",
        "reads the row below the image",
        "h < 0 || h >= op.height ? nullptr",
        "h < 0 || h > op.height ? nullptr",
    ),
    core(
        "depthwise.h",
        "exact avx2 depthwise",
        "reads the row above the image",
        "h < 0 || h >= op.height ? nullptr",
        "h >= op.height ? nullptr",
    ),
    core("depthwise.h", "exact avx2 inverted_residual", "wrong ring row", "op.x + h % op.ring_rows", "op.x + (h + 1) % op.ring_rows"),
    core("depthwise.h", "exact avx2 depthwise", "swapped paddings", "column * STRIDE - op.pad_w,", "column * STRIDE - op.pad_h,"),
    core(
        "depthwise.h",
        "exact avx2 depthwise",
        "swapped strides",
        "oh * op.stride_h - op.pad_h + i;",
        "oh * op.stride_w - op.pad_h + i;",
    ),
    core("depthwise.h", "exact avx2 depthwise", "reads a column to the right", "j < first || j >= last", "j < first || j > last"),
    core("depthwise.h", "exact avx2 depthwise", "reads a column to the left", "j < first || j >= last", "j + 1 < first || j >= last"),
    core(
        "depthwise.h",
        "exact avx2 depthwise",
        "takes the right edge for the inside",
        "(TILE - 1) * STRIDE + K <= op.width;",
        "(TILE - 1) * STRIDE + K <= op.width + 1;",
    ),
    core("depthwise.h", "exact avx2 depthwise", "takes the left edge for the inside", "complete && left >= 0", "complete && left >= -1"),
    core("depthwise.h", "exact avx2 depthwise", "no tail mask for one missing lane", "if (lanes < W)\n", "if (lanes < W - 1)\n"),
    core(
        "depthwise.h",
        "exact avx2 depthwise",
        "transposed taps",
        "((i - r * STRIDE) * K + kw) * channels",
        "(kw * K + i - r * STRIDE) * channels",
    ),
    core("depthwise.h", "exact avx2 depthwise", "lost bias", "sum[r][t] = start;", "sum[r][t] = vec{};"),
    core(
        "depthwise.h",
        "exact avx2 depthwise",
        "no second pass for hardsigmoid",
        "if (in_second_pass(op.activation))\n      for",
        "if (false)\n      for",
    ),
    core(
        "depthwise.h",
        "exact avx512 depthwise",
        "second row of a pair in the wrong place",
        "put(to + r * op.out_row_stride +",
        "put(to + r * op.x_row_stride +",
    ),
    core(
        "depthwise.h",
        "exact avx512 depthwise",
        "pairs of rows for any stride",
        "DEPTHWISE_ROWS == 2 && op.stride_h == STRIDE",
        "DEPTHWISE_ROWS == 2",
    ),
    core(
        "depthwise.h", "exact avx2 depthwise", "only the last row decides on edges", "complete = complete && rows[i]", "complete = rows[i]"
    ),
    core(
        "depthwise.h",
        "exact avx2 depthwise",
        "swapped loops over tiles and channels",
        "one(column + (by_tile ? i : j) * TILE",
        "one(column + (by_tile ? j : i) * TILE",
    ),
    core(
        "depthwise.h",
        "exact avx2 depthwise",
        "shorter pieces one column early",
        "pieces.longer * (pieces.size + 1), pieces.shorter",
        "pieces.longer * pieces.size, pieces.shorter",
    ),
]

TILES = [
    core("tile.h", "exact avx2 pointwise", "the last odd input left out", "if (k < rows.depth) {", "if (k + 1 < rows.depth) {"),
    core("tile.h", "exact avx2 pointwise", "the last two inputs left out", "if (k + 2 <= rows.depth) {", "if (k + 2 < rows.depth) {"),
    core("tile.h", "exact avx2 pointwise", "reads one input past the end", "step_pair(k, 0, true);", "step_pair(k, 0, false);"),
    core(
        "tile.h",
        "exact avx2 pointwise",
        "lost residual",
        "if (to.epilogue.residual) {\n#pragma",
        "if (to.epilogue.residual && false) {\n#pragma",
    ),
    core(
        "tile.h",
        "exact avx2 pointwise",
        "residual by the output's stride",
        "to.epilogue.residual += MR * to.epilogue.residual_strides.pixel;",
        "to.epilogue.residual += MR * to.out_strides.pixel;",
    ),
    core(
        "tile.h",
        "exact avx2 pointwise",
        "reads the bias past its end",
        "load_up_to(to.epilogue.bias + v * W, columns - v * W)",
        "load(to.epilogue.bias + v * W)",
    ),
    core(
        "tile.h",
        "exact avx2 pointwise",
        "writes past the last channel",
        "store_first(p, y, static_cast<int>(columns - v * W < W ? columns - v * W : W));",
        "store(p, y);",
    ),
    core("tile.h", "exact avx2 pointwise", "forgets longer pieces", "longer = count % pieces;", "longer = 0;"),
    core("tile.h", "exact avx2 pointwise", "next block too late", "if (read % PANEL == 0)", "if (read % (2 * PANEL) == 0)"),
    core("tile.h", "exact avx2 pointwise", "rows of a triple mixed up", "(r % 3 * stride + u)", "(r % 2 * stride + u)"),
    core("tile.h", "exact avx2 pointwise", "bias of the first columns for all", "to.epilogue.bias += column;", ""),
    core(
        "tile.h",
        "exact avx2 pointwise",
        "residual of the wrong columns",
        "to.epilogue.residual += to.epilogue.residual_strides.at(0, column);",
        "to.epilogue.residual += to.out_strides.at(0, column);",
    ),
    core(
        "tile.h",
        "exact avx2 pointwise",
        "columns up to the panel's end",
        "const int64_t whole = pair ? (panels.end - 1) * PANEL : end;",
        "const int64_t whole = pair ? (panels.end - 1) * PANEL : panels.end * PANEL;",
    ),
    core(
        "tile.h",
        "exact avx2 pointwise",
        "output tiles one row too near",
        "to.out_step ? to.out_step : MR * to.out_strides.pixel;",
        "to.out_step ? to.out_step : (MR - 1) * to.out_strides.pixel;",
    ),
    core(
        "tile.h",
        "exact avx2 pointwise",
        "hardswish of one vector only",
        "for (int v = 0; v < PLAIN; ++v) sum[r][v] = activate(",
        "for (int v = 0; v < 1; ++v) sum[r][v] = activate(",
    ),
    core(
        "tile.h",
        "exact avx512 pointwise",
        "weights of the wrong lane",
        "panel[v] = to.panels + (v * W / PANEL) *",
        "panel[v] = to.panels + (v * W / PANEL + 1) *",
    ),
    core(
        "pointwise.h",
        "exact avx2 pointwise",
        "output by channels, not by its stride",
        "op.out + m * op.out_strides.pixel",
        "op.out + m * op.out_channels",
    ),
    core(
        "pointwise.h",
        "exact avx2 pointwise",
        "residual of the first rows for all",
        "to.epilogue.residual += m * to.epilogue.residual_strides.pixel;",
        ";",
    ),
    core(
        "pointwise.h",
        "exact avx2 pointwise",
        "blocked rows one off",
        "x + first * PANEL, op.x_strides.block",
        "x + (first + 1) * PANEL, op.x_strides.block",
    ),
    core("epilogue.h", "exact avx2 pointwise", "relu6 up to 5", "Activation::relu6 ? 6.0f", "Activation::relu6 ? 5.0f"),
    core(
        "epilogue.h",
        "exact avx2 pointwise",
        "relu6 without a lower bound",
        "low(activation == Activation::relu || activation == Activation::relu6 ? 0.0f",
        "low(activation == Activation::relu ? 0.0f",
    ),
    core(
        "epilogue.h",
        "exact avx2 pointwise",
        "wrong clamp order in hardswish",
        "return v * at_most(at_least(v + 3.0f, vec{}), splat(6.0f)) * (1.0f / 6.0f);",
        "return v * at_most(at_least(v, vec{}) + 3.0f, splat(6.0f)) * (1.0f / 6.0f);",
    ),
    core("epilogue.h", "exact avx2 pointwise", "no second pass at all", "return activation == Activation::hardsigmoid ||", "return"),
    core(
        "kernels.h",
        "exact avx2 pointwise",
        "channels within a block counted twice",
        "p * pixel + c / PANEL * block + c % PANEL; }",
        "p * pixel + c / PANEL * block + c; }",
    ),
    core(
        "kernels.h",
        "exact avx2 pointwise",
        "panels paired at one channel less",
        "channels % PANEL <= PAIRED; }",
        "channels % PANEL < PAIRED; }",
    ),
]

VECTORS = [
    core("simd.h", "exact avx2 pointwise", "tail mask one lane wide", "_mm256_set1_epi32(n)", "_mm256_set1_epi32(n + 1)"),
    core("simd.h", "exact avx2 pointwise", "tail mask one lane short", "_mm256_set1_epi32(n)", "_mm256_set1_epi32(n - 1)"),
    core("simd.h", "exact avx512 pointwise", "AVX-512 tail mask one lane short", "0xffffu >> (W - n)", "0x7fffu >> (W - n)"),
    core("simd.h", "exact avx2 depthwise", "whole load of a vector less one", "n >= W ? load(p)", "n >= W - 1 ? load(p)"),
    core("simd.h", "exact avx2 pointwise", "whole store of a vector less one", "n >= W ? store(p, v)", "n >= W - 1 ? store(p, v)"),
    core(
        "simd.h",
        "exact avx2 pointwise",
        "halves of a paired panel exchanged",
        "__builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +",
        "__builtin_shufflevector(a, b, 8, 10, 12, 14, 0, 2, 4, 6) +",
    ),
    core(
        "simd.h", "exact scalar pointwise", "a pair where one input is left", "one ? sizeof(float) : 2 * sizeof(float)", "2 * sizeof(float)"
    ),
    core(
        "simd.h", "check_kernels avx2", "the maximum forgets a NaN", "_mm256_cmp_ps(b, b, _CMP_UNORD_Q)", "_mm256_cmp_ps(b, b, _CMP_EQ_UQ)"
    ),
    core(
        "simd.h",
        "pytest tests/test_depthwise.py -k test_activations",
        "relu makes 0 of NaN",
        "at_least(vec v, vec low) { return v < low ? low : v; }",
        "at_least(vec v, vec low) { return v > low ? v : low; }",
    ),
]

CONVOLUTIONS = [
    core("conv.h", "exact avx2 fire_expand", "reads a column to the right", "iw < op.width;", "iw <= op.width;"),
    core("conv.h", "exact avx2 fire_expand", "reads the row above", "ih >= 0 && ih < op.height", "ih >= -1 && ih < op.height"),
    core(
        "conv.h",
        "exact avx2 fire_expand",
        "rows and columns of the window exchanged",
        "op.pad_h + tap / op.kernel_w, iw = ow * op.stride_w - op.pad_w + tap % op.kernel_w",
        "op.pad_h + tap % op.kernel_w, iw = ow * op.stride_w - op.pad_w + tap / op.kernel_w",
    ),
    core("conv.h", "exact avx2 fire_expand", "the first pixel where padding is", "* op.x_stride : op.zeros;", "* op.x_stride : op.x;"),
    core("conv.h", "check_kernels avx2", "the output's width for the input's", "(ih * op.width + iw)", "(ih * op.out_width + iw)"),
    core("conv.h", "exact avx2 fire", "padded rows one pixel apart", "op.out + h * op.out_width *", "op.out + h * (op.out_width + 1) *"),
    core(
        "conv.h",
        "exact avx2 fire",
        "a tap row short",
        "op.kernel_h, tap_row, op.x_row_stride}",
        "op.kernel_h - 1, tap_row, op.x_row_stride}",
    ),
    core(
        "stem.h",
        "exact avx2 stem",
        "reads rows above the image",
        "if (ih < 0 || ih >= op.height || last == first) {",
        "if (ih >= op.height || last == first) {",
    ),
    core(
        "stem.h",
        "exact avx2 stem",
        "copies a column too many",
        "end = op.width + op.pad_w < width ? op.width + op.pad_w : width;",
        "end = op.width + op.pad_w + 1 < width ? op.width + op.pad_w + 1 : width;",
    ),
    core(
        "stem.h",
        "exact avx2 stem",
        "channels and rows of the buffer exchanged",
        "static_cast<int32_t>((kh * op.in_channels + c) * width + kw)",
        "static_cast<int32_t>((c * op.kernel_h + kh) * width + kw)",
    ),
    core("stem.h", "exact avx2 stem", "a step of 2 for stride 1", "if (op.stride_w == 2) return", "if (op.stride_w == 1) return"),
    core("stem.h", "exact avx2 stem", "output rows by the input's width", "op.out + oh * op.out_width *", "op.out + oh * op.width *"),
    core(
        "pool.h",
        "check_kernels avx2",
        "a window's last column left out",
        "left + 3 > op.width ? op.width : left + 3;\n    vec",
        "left + 3 > op.width ? op.width : left + 2;\n    vec",
    ),
    core("pool.h", "check_kernels avx2", "a stale column shared", "known = w1 - w0 > 1 ? w1 - 1 : -1;", "known = w1 - 1;"),
]

WINOGRAD = [
    core("winograd.h", "exact avx2 fire", "a sign of the input transform", "out[4] = c - e;", "out[4] = c + e;"),
    core("winograd.h", "exact avx2 fire", "a factor of the input transform", "out[5] = 4.0f * d[1] - 5.0f", "out[5] = 4.0f * d[1] - 4.0f"),
    core("winograd.h", "exact avx2 fire", "a term of the output transform", "out[3] = b + 8.0f * d + m[5];", "out[3] = b + 8.0f * d;"),
    core(
        "winograd.h",
        "exact avx2 fire",
        "tiles two rows apart",
        "op.x + tile / tiles_w * 4 * op.x_row_stride",
        "op.x + tile / tiles_w * 2 * op.x_row_stride",
    ),
    core("winograd.h", "exact avx2 fire", "writes below the image", "if (i >= height) break;", ""),
    core("winograd.h", "exact avx2 fire", "writes right of the image", "if (j < width) store_up_to", "if (j <= width) store_up_to"),
    core("winograd.h", "exact avx2 fire", "lost bias", "clamp(to[j] + bias)", "clamp(to[j])"),
    core("winograd.h", "exact avx2 fire", "planes mixed up", "load(sums + (i * 6 + j) * plane)", "load(sums + (j * 6 + i) * plane)"),
    core(
        "winograd.h",
        "pytest tests/test_fire.py -k test_winograd_keeps_bits_nonfinite_values_and_overflow",
        "NaN taken for a moderate number",
        "~((v < 1e30f) & (v > -1e30f))",
        "(v > 1e30f) | (v < -1e30f)",
    ),
    core(
        "pack.h", "exact avx2 fire", "a sign of the weight transform", "{-1.0 / 6, 1.0 / 6, -1.0 / 6},", "{-1.0 / 6, -1.0 / 6, -1.0 / 6},"
    ),
    core(
        "pack.h",
        "exact avx2 fire",
        "Winograd panels of the wrong channel",
        "((g * PANEL + j) * in_channels + c) * 9",
        "((g * PANEL + c % PANEL) * in_channels + c) * 9",
    ),
]

PACKING = [
    core(
        "pack.h",
        "exact avx2 fire_expand",
        "inputs and outputs of a weight exchanged",
        "weight[(n * in_channels + c) * taps + tap]",
        "weight[(c * out_channels + n) * taps + tap]",
    ),
    core("pack.h", "exact avx2 depthwise", "taps and channels exchanged", "weight[c * taps + tap];", "weight[tap * channels + c];"),
    core(
        "pack.h",
        "exact avx2 pointwise",
        "panels of eight channels not paired",
        "out_channels - first <= PAIRED",
        "out_channels - first < PAIRED",
    ),
    core(
        "pack.h",
        "exact avx2 pointwise",
        "inputs of a pair exchanged",
        "weight[j * in_channels + k + i] :",
        "weight[j * in_channels + k + (k + 1 < in_channels ? 1 - i : i)] :",
    ),
]

BLOCKS = [
    core(
        "blocks.cpp",
        "exact avx2 depthwise",
        "the next image by the output's rows",
        "op.x += n * image.height * image.x_row_stride;\n      op.out += (n * out_height + part.begin)",
        "op.x += n * out_height * image.x_row_stride;\n      op.out += (n * out_height + part.begin)",
    ),
    core(
        "blocks.cpp",
        "exact avx2 depthwise",
        "a piece's rows from the top",
        "op.out += (n * out_height + part.begin) *",
        "op.out += (n * out_height) *",
    ),
    core(
        "blocks.h",
        "exact avx2 depthwise",
        "rows of the second image not counted anew",
        "f(n, Range{row - n * height, end - n * height});",
        "f(n, Range{row, end});",
    ),
    core("blocks.cpp", "exact avx2 stem", "the first image for all", "op.x += n * image_stride;", "op.x += 0;"),
    core(
        "blocks.cpp",
        "exact avx2 fire_expand",
        "images of a convolution one pixel apart",
        "op.x += n * image.height * image.width * image.x_stride;",
        "op.x += n * image.x_stride;",
    ),
    core("blocks.cpp", "exact avx2 fire", "the strip a row low", "const int64_t h = first - 1 + i;", "const int64_t h = first + i;"),
    core(
        "blocks.cpp",
        "exact avx2 fire",
        "the strip's right border is old data",
        "(width - op.width - 1) * squeeze * sizeof(float)",
        "(width - op.width - 2) * squeeze * sizeof(float)",
    ),
    core("blocks.cpp", "exact avx2 fire", "the strip's left border is old data", "std::memset(row, 0, squeeze * sizeof(float));", ""),
    core(
        "blocks.cpp",
        "exact avx2 fire",
        "the 3x3's slice over the 1x1's",
        "return out + op.out_strides.at(0, op.expand1x1.out_channels); }",
        "return out; }",
    ),
    core(
        "blocks.cpp",
        "exact avx2 inverted_residual",
        "a ring too small for its window",
        "ceil_div((step - 1) * op.stride_h + op.kernel + 1, 2) * 2",
        "ceil_div((step - 1) * op.stride_h + op.kernel - 1, 2) * 2",
    ),
    core(
        "blocks.cpp",
        "exact avx2 inverted_residual",
        "a ring's rows made of the first ones",
        "image(n) + run->begin * op.width * op.x_strides.pixel;",
        "image(n);",
    ),
    core(
        "blocks.cpp",
        "exact avx2 inverted_residual",
        "a stale ring of the rows before",
        "if (image != n || row != first_row)",
        "if (image != n)",
    ),
    core(
        "blocks.cpp",
        "exact avx2 inverted_residual",
        "wrong slot of the ring",
        "const int64_t slot = next % slots,",
        "const int64_t slot = (next + 1) % slots,",
    ),
    core(
        "blocks.cpp",
        "exact avx2 separable",
        "residual of the first pixels for all",
        "op.residual ? op.residual + first_pixel * op.residual_strides.pixel : nullptr",
        "op.residual",
    ),
    core(
        "blocks.cpp",
        "exact avx2 inverted_residual",
        "the second image's middle in the wrong place",
        "middle_strides.at(n * out_pixels, channel)",
        "middle_strides.at(n * in_pixels, channel)",
    ),
    core(
        "blocks.cpp",
        "exact avx2 pointwise",
        "a piece's last pixel left out",
        "Range{row * pixels / rows, (row + 1) * pixels / rows}",
        "Range{row * pixels / rows, (row + 1) * pixels / rows - 1}",
    ),
    core(
        "blocks.cpp",
        "exact avx2 pointwise",
        "a piece's panels counted in groups",
        "std::min((column + 1) * groups / columns * group, panels)",
        "std::min((column + 1) * groups / columns, panels)",
    ),
    core(
        "blocks.cpp",
        "exact avx2 inverted_residual",
        "depthwise rows by the input's width",
        "op.width * x_strides.pixel,\n            ring_rows,",
        "op.out_width * x_strides.pixel,\n            ring_rows,",
    ),
    core(
        "blocks.cpp",
        "pytest tests/test_global_avg_pool.py",
        "means over a pixel too many",
        "means[c] /= static_cast<float>(count);",
        "means[c] /= static_cast<float>(count + 1);",
    ),
    core(
        "blocks.cpp",
        "pytest tests/test_inverted_residual.py -k test_squeeze_excitation",
        "the first image's gates for all",
        "scales + n * lanes + range.begin);",
        "scales + range.begin);",
    ),
    core(
        "blocks.cpp", "pytest tests/test_whole.py", "a max-pool's ring of two rows", "const int64_t slots = 3;", "const int64_t slots = 2;"
    ),
    core(
        "parallel.h",
        "check_team",
        "the last piece of a share lost",
        "end = (t + 1) * pieces / threads_;\n",
        "end = (t + 1) * pieces / threads_ - (t > 0 ? 1 : 0);\n",
    ),
    core("parallel.h", "check_team", "a stolen piece run twice", "other.end.fetch_sub(1) - 1, worker)", "other.end.fetch_sub(1), worker)"),
    core("parallel.h", "check_team", "a failure forgotten", "if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));", ""),
    core(
        "parallel.h",
        "check_team",
        "pieces not at whole units",
        "f(Range{range.begin * unit, std::min(range.end * unit, count)});",
        "f(Range{range.begin * unit, std::min(range.end * unit + 1, count)});",
    ),
]

TRAINING = [
    core("winograd_gradient.h", TILES_TEST, "a sign of the gradient transform", "out[4] = c - e;", "out[4] = c + e;"),
    core("winograd_gradient.h", TILES_TEST, "a factor of the tap transform", "a + c * (1.0f / 24.0f)", "a + c * (1.0f / 12.0f)"),
    core("winograd_gradient.h", TILES_TEST, "taps put where they are added", "store(tap, load(tap) + to[j]);", "store(tap, to[j]);"),
    core("training.cpp", TILES_TEST, "a tile's halo one row low", "row = h - 1 + i, left", "row = h + i, left"),
    core("training.cpp", TILES_TEST, "the bias from another plane", "dy_tiles + 7 * plane_tiles", "dy_tiles + 8 * plane_tiles"),
    core(
        "training.cpp",
        TILES_TEST,
        "infinite gradients through the tiles",
        "moderate && k.all_moderate(z + i",
        "true || k.all_moderate(z + i",
    ),
    core(
        "training.cpp",
        TILES_TEST,
        "the last run left out",
        "for (int64_t r = 0; r < runs; ++r) {\n            const float* const from",
        "for (int64_t r = 0; r + 1 < runs; ++r) {\n            const float* const from",
    ),
    core("training.cpp", TILES_TEST, "a cut row starts with the row", "w = first * 4, width", "w = 0 * first, width"),
    core("gradient.h", KERNELS_TEST, "relu's slope at zero", "return t <= 0.0f ? vec{} : dz;", "return t < 0.0f ? vec{} : dz;"),
    core("gradient.h", KERNELS_TEST, "hardswish's slope", "dz * (t * (1.0f / 3.0f) + 0.5f)", "dz * (t * (1.0f / 6.0f) + 0.5f)"),
    core("gradient.h", KERNELS_TEST, "variance about a first guess of the mean", "all - sums * sums * each", "all"),
    core(
        "gradient.h", KERNELS_TEST, "the last of several maxima", "(value > best) | (value != value)", "(value >= best) | (value != value)"
    ),
    core(
        "gradient.h",
        KERNELS_TEST,
        "the gradient's mean not subtracted",
        "factor * ((dz - offset) - (y - mean) * slope)",
        "factor * (dz - (y - mean) * slope)",
    ),
    core("training.cpp", KERNELS_TEST, "means of parts joined unweighted", "static_cast<double>(count(i)) / pixels", "1.0 / number"),
    core("training.cpp", KERNELS_TEST, "rows of a stride-2 gradient not spread", "if (dy.next % op.stride_h == 0) {", "if (true) {"),
    core(
        "training.cpp",
        KERNELS_TEST,
        "a strip's sums lost at an image's end",
        "return {first + begin, first + (i % per + 1) * in_image / per};",
        "return {first + begin, first + ((i % per + 1) * in_image - 1) / per};",
    ),
]

BINDINGS = [
    binding(
        "tensor.cpp",
        "tests/test_depthwise.py -k layouts",
        "channels_last asked of the wrong axes",
        "for (const int64_t d : {1, 3, 2, 0}) {",
        "for (const int64_t d : {1, 2, 3, 0}) {",
    ),
    binding(
        "tensor.cpp",
        "tests/test_depthwise.py -k layouts",
        "any layout read as channels_last",
        "direct || is_channels_last(x) ? x :",
        "direct || true ? x :",
    ),
    binding(
        "tensor.cpp",
        "tests/test_depthwise.py -k sizes",
        "an output row too few",
        "return (size + 2 * padding - kernel) / stride + 1;",
        "return (size + padding - kernel) / stride + 1;",
    ),
    binding(
        "tensor.cpp",
        "tests/test_stem.py -k sizes",
        "the window's height for its width",
        "taps = weight.size(2) * weight.size(3);\n  Tensor panels",
        "taps = weight.size(2) * weight.size(2);\n  Tensor panels",
    ),
    binding(
        "tensor.cpp",
        "tests/test_depthwise.py -k any_strides",
        "a strided bias read as dense",
        "bias ? to_contiguous(*bias) : zeros(channels)",
        "bias ? *bias : zeros(channels)",
    ),
    binding(
        "tensor.cpp",
        "tests/test_depthwise.py -k layouts",
        "the result in the wrong format",
        "return convert_ ? reordered(tensor_, MemoryFormat::Contiguous) : tensor_;",
        "return tensor_;",
    ),
    binding(
        "ops.cpp",
        "tests/test_faults.py -k address_space",
        "memory that ran out names no operator",
        'throw fastconv::OutOfMemory(#name ": out of memory");',
        "throw;",
    ),
    binding(
        "depthwise.cpp",
        "tests/test_depthwise.py -k sizes",
        "swapped strides",
        "stride_[0],\n                          stride_[1],",
        "stride_[1],\n                          stride_[0],",
    ),
    binding(
        "depthwise.cpp",
        "tests/test_depthwise.py -k sizes",
        "swapped paddings",
        "padding_[0],\n                          padding_[1],",
        "padding_[1],\n                          padding_[0],",
    ),
    binding(
        "depthwise.cpp",
        "tests/test_depthwise.py -k beyond",
        "a stride that no kernel has",
        "return stride[1] <= 2 &&",
        "return stride[1] <= 3 &&",
    ),
    binding(
        "depthwise.cpp",
        "tests/test_depthwise.py -k channels",
        "lost bias",
        "bias_or_zeros(bias, x.size(1)), stride, padding, parsed), x",
        "zeros(x.size(1)), stride, padding, parsed), x",
    ),
    binding(
        "pointwise.cpp",
        "tests/test_pointwise.py -k 'activations or residual or channels'",
        "lost residual",
        "run_step(PointwiseStep(pack_panels(weight), bias_or_zeros(bias, weight.size(0)), parsed), x, residual, Output::like_input)",
        "run_step(PointwiseStep(pack_panels(weight), bias_or_zeros(bias, weight.size(0)), parsed), x, std::nullopt, Output::like_input)",
    ),
    binding(
        "fire.cpp",
        "tests/test_fire_expand.py",
        "the second slice in the wrong place",
        "out.data + out.strides.at(0, out1_);",
        "out.data + out.strides.at(0, out3_);",
    ),
    binding("stem.cpp", "tests/test_stem.py", "rows of NCHW as of channels_last", "last ? in.w * in.c : in.w,", "in.w * in.c,"),
    binding(
        "pool.cpp",
        "tests/test_max_pool.py -k size",
        "a window that starts outside",
        "(out - 1) * stride >= size + padding) --out;",
        "(out - 1) * stride > size + padding) --out;",
    ),
    binding(
        "inverted_residual.cpp",
        "tests/test_inverted_residual.py -k activations",
        "the first activation for all",
        "activations_.depthwise,\n            gate,",
        "activations_.project,\n            gate,",
    ),
    binding(
        "inverted_residual.cpp",
        "tests/test_inverted_residual.py -k squeeze",
        "the gate's activation for the squeeze's",
        "channels_, reduced_, activations_.squeeze}",
        "channels_, reduced_, activations_.gate}",
    ),
    binding(
        "program.cpp",
        "tests/test_whole.py tests/test_random_networks.py",
        "a slot freed while a residual waits in it",
        "if (x != 0 && last[x] == i) free.push_back(slots[x]);",
        "if (x != 0) free.push_back(slots[x]);",
    ),
    binding(
        "program.cpp",
        "tests/test_whole.py tests/test_random_networks.py",
        "a chain over a value that others read",
        "first.residual < 0 && !read_after(i + 1, made);",
        "first.residual < 0;",
    ),
    binding(
        "program.cpp",
        "tests/test_whole.py tests/test_random_networks.py",
        "the first image for all",
        "values[0] = {x + images.begin * in.image(), in, in.c, nchw};",
        "values[0] = {x, in, in.c, nchw};",
    ),
    binding(
        "program.cpp",
        "tests/test_whole.py tests/test_random_networks.py",
        "NCHW read by a step that cannot",
        "return std::all_of(steps_.begin(), steps_.end(),\n                       [](const Placed& placed)",
        "return std::any_of(steps_.begin(), steps_.end(),\n                       [](const Placed& placed)",
    ),
    binding(
        "program.cpp",
        "tests/test_whole.py tests/test_random_networks.py",
        "images left over not run",
        "for (int64_t n = whole; n < batch; ++n)",
        "for (int64_t n = whole + 1; n < batch; ++n)",
    ),
    binding(
        "watch.cpp",
        "tests/test_optimize.py -k follows",
        "stale packed weights: versions not asked",
        "if (version_of(tensor) != version) return false;",
        "",
    ),
    binding(
        "watch.cpp",
        "tests/test_optimize.py -k follows",
        "stale packed weights: addresses not asked",
        "if (address_of(tensor) != address) return false;",
        "",
    ),
    binding(
        "watch.cpp",
        "tests/test_optimize.py -k follows",
        "stale packed weights: replaced tensors not seen",
        "if (now != place.tensor) return false;",
        "",
    ),
]

PLANS = [
    python(
        "optimize/layers.py",
        "tests/test_optimize.py -k structure",
        "batch norm without eps",
        "(_wide(self.norm.var) + self.norm.eps).rsqrt()",
        "_wide(self.norm.var).rsqrt()",
    ),
    python(
        "optimize/layers.py",
        "tests/test_optimize.py -k structure",
        "the mean added",
        "-_wide(norm.mean) if self.bias is None",
        "_wide(norm.mean) if self.bias is None",
    ),
    python("optimize/layers.py", "tests/test_optimize.py -k structure", "a shift that is not scaled", "shift = shift * scale\n", ""),
    python(
        "optimize/layers.py",
        "tests/test_optimize.py -k structure",
        "lost bias of a normed convolution",
        "else _wide(self.bias) - _wide(norm.mean)",
        "else -_wide(norm.mean)",
    ),
    python(
        "optimize/layers.py",
        "tests/test_optimize.py -k 'near or structure'",
        "grouped taken for depthwise",
        "and self.groups == channels\n",
        "",
    ),
    python(
        "optimize/layers.py",
        "tests/test_optimize.py -k 'near or structure'",
        "strided 1x1 taken for pointwise",
        "geometry == ((1, 1), (1, 1), (0, 0), 1)",
        "(geometry[0], *geometry[2:]) == ((1, 1), (0, 0), 1)",
    ),
    python(
        "optimize/match.py",
        "tests/test_optimize.py -k near",
        "a norm after an activation folded",
        "and layer.norm is None and layer.activation is None:",
        "and layer.norm is None:",
    ),
    python(
        "optimize/match.py",
        "tests/test_optimize.py -k near",
        "a norm of a value that others read folded",
        "if layer and _single(x) and not layer.linear",
        "if layer and not layer.linear",
    ),
    python(
        "optimize/match.py",
        "tests/test_optimize.py -k near",
        "an activation of a value that others read",
        "if _single(x) and x.target.activation is None:",
        "if x.target.activation is None:",
    ),
    python(
        "optimize/match.py",
        "tests/test_optimize.py -k near",
        "a residual after the activation",
        "layer.pointwise and layer.activation is None and _single(value)",
        "layer.pointwise and _single(value)",
    ),
    python(
        "optimize/match.py",
        "tests/test_optimize.py -k near",
        "a residual of another shape",
        'node.args[0].meta["shape"] == node.args[1].meta["shape"] and node.args[0] is not',
        "node.args[0] is not",
    ),
    python(
        "optimize/match.py",
        "tests/test_optimize.py -k 'near or structure'",
        "the gate of another value",
        'node.target.op == "global_avg_pool" and node.args[0] is y)',
        'node.target.op == "global_avg_pool")',
    ),
    python("optimize/match.py", "tests/test_optimize.py -k 'near or structure'", "relu6 up to 5", '{(0, 6): "relu6"', '{(0, 5): "relu6"'),
    python(
        "optimize/match.py",
        "tests/test_optimize.py -k structure",
        "silu and hardswish exchanged",
        '("silu" if gate.meta["activation"] == "sigmoid" else "hardswish")',
        '("hardswish" if gate.meta["activation"] == "sigmoid" else "silu")',
    ),
    python(
        "optimize/match.py",
        "tests/test_optimize.py -k 'near or structure'",
        "a fire of two inputs",
        "geometry != ((3, 3), (1, 1), (1, 1), (1, 1), 1) or pair[1].args[0] is not x:",
        "geometry != ((3, 3), (1, 1), (1, 1), (1, 1), 1):",
    ),
    python(
        "optimize/match.py",
        "tests/test_optimize.py -k 'near or structure'",
        "a squeeze that others read",
        'squeeze.activation == "relu" and len(x.users) == 2:',
        'squeeze.activation == "relu":',
    ),
    python(
        "optimize/match.py",
        "tests/test_optimize.py -k writes",
        "a write into what is read later",
        "if any(self.index[user] > self.index[node] for user in written.users):",
        "if False:",
    ),
    python(
        "optimize/match.py",
        "tests/test_optimize.py -k same_shape",
        "dilation forgotten in a shape",
        "tuple(2 * p - d * (k - 1) - 1 for",
        "tuple(2 * p - (k - 1) - 1 for",
    ),
    python(
        "optimize/match.py",
        "tests/test_optimize.py -k dropout_in_training",
        "dropout in training mode left out",
        "(forward in _DROPOUT_MODULES and not module.training)",
        "(forward in _DROPOUT_MODULES)",
    ),
    python(
        "optimize/plan.py",
        "tests/test_optimize.py -k follows",
        "stale packed weights: only new ones packed",
        "keep = changed is not None and not any(",
        "keep = changed is not None and any(",
    ),
    python(
        "optimize/plan.py",
        "tests/test_optimize.py -k hooks",
        "hooks that come later not seen",
        "if [hooked(child) for child in self.modules] != self.hooks:",
        "if False:",
    ),
    python(
        "optimize/plan.py",
        "tests/test_optimize.py tests/test_random_networks.py",
        "a slot reused before its last reader",
        "if last[argument] is node]",
        "]",
    ),
    python(
        "optimize/plan.py",
        "tests/test_optimize.py -k 'gradients or modes'",
        "a plan where gradients are wanted",
        "not (grad and x.requires_grad)",
        "not False",
    ),
    python(
        "optimize/plan.py",
        "tests/test_optimize.py -k autocast",
        "a plan under autocast",
        "and not torch._C._is_any_autocast_enabled()\n",
        "",
    ),
    python(
        "optimize/plan.py",
        "tests/test_optimize.py -k function_transforms",
        "a plan under vmap",
        "and not torch._C._are_functorch_transforms_active()\n",
        "",
    ),
    python(
        "optimize/plan.py",
        "tests/test_optimize.py -k memory_format",
        "always channels_last",
        "last = x.dim() == 4 and not x.is_contiguous() and",
        "last = True or",
    ),
    python(
        "ops/_checks.py",
        "tests/test_depthwise.py -k errors",
        "a stride of 0 let through",
        "if both[0] < minimum or both[1] < minimum:",
        "if both[0] < minimum - 1 or both[1] < minimum - 1:",
    ),
    python(
        "ops/_checks.py",
        "tests/test_depthwise.py -k registrations",
        "a fake output row too many",
        "out = (extent + 2 * p - k +",
        "out = (extent + 3 * p - k +",
    ),
    python("models/_weights.py", "tests/test_models.py -k pickle", "pickles run", "weights_only=True)", "weights_only=False)"),
    python(
        "models/_weights.py",
        "tests/test_models.py -k checkpoint",
        "missing keys let through",
        '*(f"{key} is missing" for key in result.missing_keys if key not in wrong)]',
        "*()]",
    ),
]

MUTANTS = [*DEPTHWISE, *TILES, *VECTORS, *CONVOLUTIONS, *WINOGRAD, *PACKING, *BLOCKS, *TRAINING, *BINDINGS, *PLANS]
