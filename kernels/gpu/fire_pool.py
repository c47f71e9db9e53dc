"""fire_expand and the 3x3 max-pool after it in one kernel: the concatenated output, SqueezeNet's largest, is never in device memory."""

import functools

import torch
import triton
import triton.language as tl

from . import launch, march
from .configs import Problem, config
from .epilogue import activate, await_previous, dot

RUNTIME = ("H", "W", "OH", "OW", "in_units", "units1x1", "units3x3", "pad_h", "pad_w", "tiles", "o_blocks")


@triton.jit(do_not_specialize=RUNTIME)
def fire_pool_kernel(
    x_ptr, w1x1_ptr, bias1x1_ptr, w3x3_ptr, bias3x3_ptr, y_ptr,
    H, W, OH, OW, in_units, units1x1, units3x3, pad_h, pad_w, tiles, o_blocks,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, ALIGN_IN: tl.constexpr, ALIGN_1X1: tl.constexpr, ALIGN_3X3: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, RUN: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """One program: LANES pooled pixels of one image (RUN is 1) by CHANNELS of each expand. x, y: NHWC; w3x3: (O, 3, 3, C).

    Each pixel of a pooling window is computed as `fire_expand` does, 9 / (STRIDE_H * STRIDE_W) times in all.
    """
    tl.static_assert(RUN == 1, "a pooled pixel is a lane of its own")
    C = in_units * ALIGN_IN
    O1 = units1x1 * ALIGN_1X1
    O3 = units3x3 * ALIGN_3X3
    await_previous(PDL)
    pid = tl.program_id(0)
    o = (pid % o_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    mask1 = o < O1
    mask3 = o < O3
    pid = pid // o_blocks
    n = (pid // tiles).to(tl.int64)
    oh, ow = march.lanes(pid % tiles, OW, RUN, LANES)
    x_image = x_ptr + n * H * W * C
    ci = tl.arange(0, DEPTH)
    steps = tl.cdiv(C, DEPTH)
    bias1 = tl.zeros((CHANNELS,), tl.float32)
    bias3 = tl.zeros((CHANNELS,), tl.float32)
    if bias1x1_ptr is not None:
        bias1 += tl.load(bias1x1_ptr + o, mask=mask1, other=0.0).to(tl.float32)
    if bias3x3_ptr is not None:
        bias3 += tl.load(bias3x3_ptr + o, mask=mask3, other=0.0).to(tl.float32)

    best1 = tl.full((LANES, CHANNELS), float("-inf"), tl.float32)
    best3 = tl.full((LANES, CHANNELS), float("-inf"), tl.float32)
    for tap in range(9):
        h = oh * STRIDE_H - pad_h + tap // 3
        w = ow * STRIDE_W - pad_w + tap % 3
        pixel = march.inside(h, w, H, W)
        acc1 = tl.zeros((LANES, CHANNELS), tl.float32)
        acc3 = tl.zeros((LANES, CHANNELS), tl.float32)
        for step in range(steps):
            c = step * DEPTH + ci
            x = x_image + march.place(h, w, W, WIDE)[:, None] * C + c[None, :]
            x = tl.load(x, mask=pixel[:, None] & (c < C)[None, :], other=0.0)
            w1 = tl.load(w1x1_ptr + o[None, :] * C + c[:, None], mask=(c < C)[:, None] & mask1[None, :], other=0.0)
            acc1 = dot(x, w1, acc1, PRECISION)
        for step in range(9 * steps):
            neighbour = step // steps
            c = (step - neighbour * steps) * DEPTH + ci
            ih = h + neighbour // 3 - 1
            iw = w + neighbour % 3 - 1
            x = x_image + march.place(ih, iw, W, WIDE)[:, None] * C + c[None, :]
            x = tl.load(x, mask=march.inside(ih, iw, H, W)[:, None] & (c < C)[None, :], other=0.0)
            w3 = w3x3_ptr + o[None, :] * (9 * C) + (neighbour * C + c)[:, None]
            w3 = tl.load(w3, mask=(c < C)[:, None] & mask3[None, :], other=0.0)
            acc3 = dot(x, w3, acc3, PRECISION)
        value1 = tl.where(pixel[:, None], activate(acc1 + bias1[None, :], "relu"), float("-inf"))
        value3 = tl.where(pixel[:, None], activate(acc3 + bias3[None, :], "relu"), float("-inf"))
        best1 = tl.maximum(best1, value1, propagate_nan=tl.PropagateNan.ALL)
        best3 = tl.maximum(best3, value3, propagate_nan=tl.PropagateNan.ALL)

    y_tile = y_ptr + n * OH * OW * (O1 + O3) + march.place(oh, ow, OW, WIDE)[:, None] * (O1 + O3) + o[None, :]
    dtype = y_ptr.dtype.element_ty
    tl.store(y_tile, best1.to(dtype), mask=(oh < OH)[:, None] & mask1[None, :])
    tl.store(y_tile + O1, best3.to(dtype), mask=(oh < OH)[:, None] & mask3[None, :])


def problem(
    x: torch.Tensor,
    weight1x1: torch.Tensor,
    weight3x3: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    size: tuple[int, int],
) -> Problem:
    """x: the image, squeezed or not."""
    out = max(weight1x1.shape[0], weight3x3.shape[0])
    geometry = (3, tuple(stride), tuple(padding), 0, tuple(x.shape[2:]))
    return Problem("fire_pool", launch.kind(x.dtype), *size, weight3x3.shape[1], out, *geometry)


def fire_pool(
    x: torch.Tensor,
    weight1x1: torch.Tensor,
    bias1x1: torch.Tensor | None,
    weight3x3: torch.Tensor,
    bias3x3: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    size: tuple[int, int],
    tile=None,
) -> torch.Tensor:
    """max_pool(fire_expand(x)): x (N, C, H, W) is the squeezed image; stride and padding are the pool's, size its output's (OH, OW).

    weight1x1 (E1, C, 1, 1), weight3x3 (E3, C, 3, 3) → (N, E1 + E3, *size); one dtype: float32, float16 or bfloat16. Weights from
    `launch.kernel_order` are read as they are, others are copied on each call. Arguments are not checked.
    """
    n, channels, height, width = x.shape
    out1, out3 = weight1x1.shape[0], weight3x3.shape[0]
    result, y = launch.outputs(x, (n, out1 + out3, *size))
    if y.numel() == 0:
        return result
    x = launch.nhwc(x)
    tile = tile or config(problem(x, weight1x1, weight3x3, stride, padding, size), launch.arch(x.device))
    run = _launcher(
        tile, x.device, launch.precision(x.dtype), launch.wide(x, y), n, channels, (height, width, *size), out1, out3,
        tuple(stride), tuple(padding),
    )  # fmt: skip
    run(x, launch.kernel_order(weight1x1), launch.dense(bias1x1), launch.nhwc(weight3x3), launch.dense(bias3x3), y)
    return result if result is y else result.copy_(y)


@functools.lru_cache(maxsize=launch.SHAPES)
def _launcher(tile, device, precision, wide, n, channels, size, out1, out3, stride, padding) -> launch.Launcher:
    align_in, align1, align3 = map(launch.alignment, (channels, out1, out3))
    tiles, o_blocks = tile.tiles(*size[2:]), triton.cdiv(max(out1, out3), tile.channels)
    return launch.Launcher(
        fire_pool_kernel, device, n * tiles * o_blocks,
        (*size, channels // align_in, out1 // align1, out3 // align3, *padding, tiles, o_blocks),
        STRIDE_H=stride[0], STRIDE_W=stride[1], ALIGN_IN=align_in, ALIGN_1X1=align1, ALIGN_3X3=align3,
        PRECISION=precision, WIDE=wide, **tile.constants, **launch.options(tile),
    )  # fmt: skip
