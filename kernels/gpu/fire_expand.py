"""The two expands of a fire module into one output: cat([relu(conv1x1(x)), relu(conv3x3(x, padding=1))], 1), without a cat."""

import functools

import torch
import triton
import triton.language as tl

from . import launch
from .configs import Problem, matmul
from .epilogue import activate, await_previous, dot

RUNTIME = ("M", "H", "W", "image", "in_units", "units1x1", "units3x3", "o_blocks")


@triton.jit(do_not_specialize=RUNTIME)
def fire_expand_kernel(
    x_ptr, w1x1_ptr, bias1x1_ptr, w3x3_ptr, bias3x3_ptr, y_ptr,
    M, H, W, image, in_units, units1x1, units3x3, o_blocks,
    ALIGN_IN: tl.constexpr, ALIGN_1X1: tl.constexpr, ALIGN_3X3: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """One program: PIXELS of the M = N*H*W pixels by CHANNELS of each expand. x, y: NHWC; w1x1: (O, C); w3x3: (O, 3, 3, C).

    image = H*W. A neighbour of pixel m is pixel m + dh*W + dw; padding is a mask. WIDE: an image passes 2^31 elements.
    """
    C = in_units * ALIGN_IN
    O1 = units1x1 * ALIGN_1X1
    O3 = units3x3 * ALIGN_3X3
    await_previous(PDL)
    pid = tl.program_id(0)
    start = (pid // o_blocks).to(tl.int64) * PIXELS
    m = tl.arange(0, PIXELS)
    m_mask = m < M - start
    if WIDE:
        place = start % image + m
    else:
        place = (start % image).to(tl.int32) + m
    h = (place // W) % H
    w = place % W
    o = (pid % o_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    mask1 = o < O1
    mask3 = o < O3
    c = tl.arange(0, DEPTH)

    x_base = x_ptr + start * C
    w1_tile = w1x1_ptr + o[None, :] * C + c[:, None]
    w3_tile = w3x3_ptr + o[None, :] * (9 * C) + c[:, None]
    acc1 = tl.zeros((PIXELS, CHANNELS), tl.float32)
    acc3 = tl.zeros((PIXELS, CHANNELS), tl.float32)
    # the centre tap: one x tile feeds both expands
    for c0 in range(0, C, DEPTH):
        c_mask = c < C - c0
        x = tl.load(x_base + m[:, None] * C + (c0 + c)[None, :], mask=m_mask[:, None] & c_mask[None, :], other=0.0)
        w1 = tl.load(w1_tile + c0, mask=c_mask[:, None] & mask1[None, :], other=0.0)
        w3 = tl.load(w3_tile + 4 * C + c0, mask=c_mask[:, None] & mask3[None, :], other=0.0)
        acc1 = dot(x, w1, acc1, PRECISION)
        acc3 = dot(x, w3, acc3, PRECISION)
    # the other eight, as one loop so that loads are pipelined across taps
    steps = tl.cdiv(C, DEPTH)
    for step in range(8 * steps):
        tap = step // steps
        c0 = (step - tap * steps) * DEPTH
        tap = tl.where(tap < 4, tap, tap + 1)
        dh = tap // 3 - 1
        dw = tap % 3 - 1
        inside = m_mask & (h + dh >= 0) & (h + dh < H) & (w + dw >= 0) & (w + dw < W)
        c_mask = c < C - c0
        neighbour = m + dh * W + dw
        if WIDE:
            neighbour = neighbour.to(tl.int64)
        x = tl.load(x_base + neighbour[:, None] * C + (c0 + c)[None, :], mask=inside[:, None] & c_mask[None, :], other=0.0)
        w3 = tl.load(w3_tile + tap * C + c0, mask=c_mask[:, None] & mask3[None, :], other=0.0)
        acc3 = dot(x, w3, acc3, PRECISION)

    if bias1x1_ptr is not None:
        acc1 += tl.load(bias1x1_ptr + o, mask=mask1, other=0.0).to(tl.float32)[None, :]
    if bias3x3_ptr is not None:
        acc3 += tl.load(bias3x3_ptr + o, mask=mask3, other=0.0).to(tl.float32)[None, :]
    y_tile = y_ptr + start * (O1 + O3) + m[:, None] * (O1 + O3) + o[None, :]
    dtype = y_ptr.dtype.element_ty
    tl.store(y_tile, activate(acc1, "relu").to(dtype), mask=m_mask[:, None] & mask1[None, :])
    tl.store(y_tile + O1, activate(acc3, "relu").to(dtype), mask=m_mask[:, None] & mask3[None, :])


def fire_expand(
    x: torch.Tensor,
    weight1x1: torch.Tensor,
    bias1x1: torch.Tensor | None,
    weight3x3: torch.Tensor,
    bias3x3: torch.Tensor | None,
) -> torch.Tensor:
    """x (N, C, H, W), weight1x1 (E1, C, 1, 1), weight3x3 (E3, C, 3, 3) → (N, E1 + E3, H, W); one dtype: float32, float16 or bfloat16.

    A weight3x3 from `launch.kernel_order` (channels_last) is read as it is, another is copied on each call. Arguments are not checked.
    """
    n, in_channels, height, width = x.shape
    out1, out3 = weight1x1.shape[0], weight3x3.shape[0]
    result, y = launch.outputs(x, (n, out1 + out3, height, width))
    if y.numel() == 0:
        return result
    x = launch.nhwc(x)
    run = _launcher(x.device, x.dtype, launch.precision(x.dtype), launch.wide(x), n, in_channels, height, width, out1, out3)
    run(x, launch.kernel_order(weight1x1), launch.dense(bias1x1), launch.nhwc(weight3x3), launch.dense(bias3x3), y)
    return result if result is y else result.copy_(y)


@functools.lru_cache(maxsize=launch.SHAPES)
def _launcher(device, dtype, precision, wide, n, in_channels, height, width, out1, out3) -> launch.Launcher:
    kind = "tf32" if precision == "tf32" else launch.DTYPES[dtype]
    tile = matmul(Problem("fire_expand", kind, height, width, in_channels, max(out1, out3)), launch.arch(device), n)
    align_in, align1, align3 = launch.alignment(in_channels), launch.alignment(out1), launch.alignment(out3)
    pixels, o_blocks = n * height * width, triton.cdiv(max(out1, out3), tile.channels)
    return launch.Launcher(
        fire_expand_kernel, device, triton.cdiv(pixels, tile.pixels) * o_blocks,
        (pixels, height, width, height * width, in_channels // align_in, out1 // align1, out3 // align3, o_blocks),
        ALIGN_IN=align_in, ALIGN_1X1=align1, ALIGN_3X3=align3, PRECISION=precision, WIDE=wide,
        PIXELS=tile.pixels, CHANNELS=tile.channels, DEPTH=tile.depth, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
