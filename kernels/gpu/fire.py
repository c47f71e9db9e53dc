"""SqueezeNet's fire module in one kernel: the squeezed tile feeds both expands, which write their slices of the concatenated output."""

import functools

import torch
import triton
import triton.language as tl

from . import launch, march
from .configs import Problem, StagedFireTile, config
from .epilogue import activate, await_previous, dot

RUNTIME = ("H", "W", "in_units", "between_units", "units1x1", "units3x3", "tiles", "o_blocks")


@triton.jit(do_not_specialize=RUNTIME)
def fire_kernel(
    x_ptr, squeeze_ptr, squeeze_bias_ptr, w1x1_ptr, bias1x1_ptr, w3x3_ptr, bias3x3_ptr, y_ptr,
    H, W, in_units, between_units, units1x1, units3x3, tiles, o_blocks,
    ALIGN_IN: tl.constexpr, ALIGN_BETWEEN: tl.constexpr, ALIGN_1X1: tl.constexpr, ALIGN_3X3: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, STEPS: tl.constexpr,
    RUN: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, DEPTH_IN: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """One program: LANES columns of RUN rows of one image by CHANNELS of each expand. x, y: NHWC; w3x3: (O, 3, 3, S); others (out, in).

    Squeezed channels come in chunks of DEPTH; each chunk is computed for the strip and its halo, once per column of the window.
    """
    C = in_units * ALIGN_IN
    S = between_units * ALIGN_BETWEEN
    O1 = units1x1 * ALIGN_1X1
    O3 = units3x3 * ALIGN_3X3
    await_previous(PDL)
    pid = tl.program_id(0)
    o = (pid % o_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    mask1 = o < O1
    mask3 = o < O3
    pid = pid // o_blocks
    n = (pid // tiles).to(tl.int64)
    top, ow = march.lanes(pid % tiles, W, RUN, LANES)
    x_image = x_ptr + n * H * W * C
    ci = tl.arange(0, DEPTH_IN)

    acc1 = march.zeros(RUN, LANES, CHANNELS)
    acc3 = march.zeros(RUN, LANES, CHANNELS)
    for s0 in range(0, S, DEPTH):
        s = s0 + tl.arange(0, DEPTH)
        s_mask = s < S
        bias = tl.zeros((DEPTH,), tl.float32)
        if squeeze_bias_ptr is not None:
            bias += tl.load(squeeze_bias_ptr + s, mask=s_mask, other=0.0).to(tl.float32)
        for kw in range(3):
            iw = ow + kw - 1
            for row in tl.static_range(RUN + 2):
                ih = top + row - 1
                pixel = march.inside(ih, iw, H, W)
                x_row = x_image + march.place(ih, iw, W, WIDE)[:, None] * C
                value = tl.zeros((LANES, DEPTH), tl.float32)
                if STEPS == 1:
                    x = tl.load(x_row + ci[None, :], mask=pixel[:, None] & (ci < C)[None, :], other=0.0)
                    w = tl.load(squeeze_ptr + s[None, :] * C + ci[:, None], mask=(ci < C)[:, None] & s_mask[None, :], other=0.0)
                    value = dot(x, w, value, PRECISION)
                else:
                    for c0 in range(0, C, DEPTH_IN):
                        c = c0 + ci
                        x = tl.load(x_row + c[None, :], mask=pixel[:, None] & (c < C)[None, :], other=0.0)
                        w = tl.load(squeeze_ptr + s[None, :] * C + c[:, None], mask=(c < C)[:, None] & s_mask[None, :], other=0.0)
                        value = dot(x, w, value, PRECISION)
                # 0 outside the image, and in channels past the last, which an infinite x has made NaN
                value = tl.where(pixel[:, None] & s_mask[None, :], activate(value + bias[None, :], "relu"), 0.0)
                value = value.to(x_ptr.dtype.element_ty)
                if row > 0 and row <= RUN:  # noqa: SIM102  # this one is decided when compiled, the next one when run
                    if kw == 1:
                        w1 = tl.load(w1x1_ptr + o[None, :] * S + s[:, None], mask=s_mask[:, None] & mask1[None, :], other=0.0)
                        acc1 = march.put(acc1, row - 1, dot(value, w1, acc1[row - 1], PRECISION))
                for kh in tl.static_range(3):
                    if row >= kh and row - kh < RUN:
                        w3 = w3x3_ptr + o[None, :] * (9 * S) + ((kh * 3 + kw) * S + s)[:, None]
                        w3 = tl.load(w3, mask=s_mask[:, None] & mask3[None, :], other=0.0)
                        acc3 = march.put(acc3, row - kh, dot(value, w3, acc3[row - kh], PRECISION))

    bias1 = tl.zeros((CHANNELS,), tl.float32)
    bias3 = tl.zeros((CHANNELS,), tl.float32)
    if bias1x1_ptr is not None:
        bias1 += tl.load(bias1x1_ptr + o, mask=mask1, other=0.0).to(tl.float32)
    if bias3x3_ptr is not None:
        bias3 += tl.load(bias3x3_ptr + o, mask=mask3, other=0.0).to(tl.float32)
    dtype = y_ptr.dtype.element_ty
    for r in tl.static_range(RUN):
        pixel = top + r < H
        y_tile = y_ptr + n * H * W * (O1 + O3) + march.place(top + r, ow, W, WIDE)[:, None] * (O1 + O3) + o[None, :]
        tl.store(y_tile, activate(acc1[r] + bias1[None, :], "relu").to(dtype), mask=pixel[:, None] & mask1[None, :])
        tl.store(y_tile + O1, activate(acc3[r] + bias3[None, :], "relu").to(dtype), mask=pixel[:, None] & mask3[None, :])


def problem(x: torch.Tensor, squeeze_weight: torch.Tensor, weight1x1: torch.Tensor, weight3x3: torch.Tensor) -> Problem:
    channels, *size = x.shape[1:]
    out = max(weight1x1.shape[0], weight3x3.shape[0])
    return Problem("fire", launch.kind(x.dtype), *size, channels, out, 3, (1, 1), (1, 1), squeeze_weight.shape[0])


def fire(
    x: torch.Tensor,
    squeeze_weight: torch.Tensor,
    squeeze_bias: torch.Tensor | None,
    weight1x1: torch.Tensor,
    bias1x1: torch.Tensor | None,
    weight3x3: torch.Tensor,
    bias3x3: torch.Tensor | None,
    tile=None,
) -> torch.Tensor:
    """x (N, C, H, W), squeeze_weight (S, C, 1, 1), weight1x1 (E1, S, 1, 1), weight3x3 (E3, S, 3, 3) → (N, E1 + E3, H, W).

    One dtype: float32, float16 or bfloat16. Weights from `launch.kernel_order` are read as they are, others are copied on each call.
    tile: None for the one that `config` chooses. Arguments are not checked.
    """
    tile = tile or config(problem(x, squeeze_weight, weight1x1, weight3x3), launch.arch(x.device))
    if isinstance(tile, StagedFireTile):
        from . import staged_fire

        return staged_fire.fire(x, squeeze_weight, squeeze_bias, weight1x1, bias1x1, weight3x3, bias3x3, tile)
    n, channels, height, width = x.shape
    squeezed, out1, out3 = squeeze_weight.shape[0], weight1x1.shape[0], weight3x3.shape[0]
    result, y = launch.outputs(x, (n, out1 + out3, height, width))
    if y.numel() == 0:
        return result
    x = launch.nhwc(x)
    run = _launcher(tile, x.device, launch.precision(x.dtype), launch.wide(x, y), n, channels, height, width, squeezed, out1, out3)
    run(
        x, launch.kernel_order(squeeze_weight), launch.dense(squeeze_bias), launch.kernel_order(weight1x1), launch.dense(bias1x1),
        launch.nhwc(weight3x3), launch.dense(bias3x3), y,
    )  # fmt: skip
    return result if result is y else result.copy_(y)


@functools.lru_cache(maxsize=launch.SHAPES)
def _launcher(tile, device, precision, wide, n, channels, height, width, squeezed, out1, out3) -> launch.Launcher:
    align_in, align_between, align1, align3 = map(launch.alignment, (channels, squeezed, out1, out3))
    tiles, o_blocks = tile.tiles(height, width), triton.cdiv(max(out1, out3), tile.channels)
    return launch.Launcher(
        fire_kernel, device, n * tiles * o_blocks,
        (height, width, channels // align_in, squeezed // align_between, out1 // align1, out3 // align3, tiles, o_blocks),
        ALIGN_IN=align_in, ALIGN_BETWEEN=align_between, ALIGN_1X1=align1, ALIGN_3X3=align3, PRECISION=precision, WIDE=wide,
        STEPS=launch.steps(channels, tile.depth_in), **tile.constants, DEPTH_IN=tile.depth_in, **launch.options(tile),
    )  # fmt: skip
