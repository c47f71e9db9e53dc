"""Gradients of the depthwise convolution, 3x3 and 5x5, with fp32 sums in a fixed order.

Input: dx[n, ih, iw, c] = sum over kh, kw of g[n, (ih + p - kh) / s, (iw + p - kw) / s, c] * w[c, kh, kw], where s divides.
Weight: dw[c, kh, kw] = sum over n, oh, ow of g[n, oh, ow, c] * x[n, oh*s - p + kh, ow*s - p + kw, c].
"""

import torch
import triton
import triton.language as tl

from . import launch
from .configs import Problem, config
from .depthwise import depthwise
from .march import inside, place, put, zeros

INPUT_RUNTIME = ("H", "W", "OH", "OW", "c_units", "pad_h", "pad_w", "tiles_h", "tiles_w", "c_blocks")
WEIGHT_RUNTIME = ("H", "W", "OH", "OW", "c_units", "pad_h", "pad_w", "tiles", "all_tiles", "steps", "c_blocks")
SUM_RUNTIME = ("splits", "c_units", "c_blocks")
PROGRAMS = 1024  # of the weight's first stage, at most: several a multiprocessor, whose sums the second stage still reads quickly
SPLITS, CHANNELS = 32, 32  # of the second stage's tile


@triton.jit(do_not_specialize=INPUT_RUNTIME)
def depthwise_backward_input_kernel(
    grad_ptr, taps_ptr, dx_ptr,
    H, W, OH, OW, c_units, pad_h, pad_w, tiles_h, tiles_w, c_blocks,
    K: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS x COLS positions of one image by CHANNELS. grad, dx: NHWC; taps: (K*K, C).

    Position (i, j) stands for the STRIDE_H x STRIDE_W pixels from (i * STRIDE_H - pad_h, j * STRIDE_W - pad_w) on: which taps reach a
    pixel depends on its place among them alone, so every tap is known when compiled, and a gradient, once loaded, serves all of them.
    """
    C = c_units * ALIGN
    pid = tl.program_id(0)
    c = pid % c_blocks * CHANNELS + tl.arange(0, CHANNELS)
    pid = pid // c_blocks
    tile_w = pid % tiles_w
    pid = pid // tiles_w
    tile_h = pid % tiles_h
    n = (pid // tiles_h).to(tl.int64)

    position = tl.arange(0, ROWS * COLS)
    i = tile_h * ROWS + position // COLS
    j = tile_w * COLS + position % COLS
    c_mask = c < C

    grad_image = grad_ptr + n * OH * OW * C
    sums = zeros(STRIDE_H * STRIDE_W, ROWS * COLS, CHANNELS)
    for dh in tl.static_range((K + STRIDE_H - 1) // STRIDE_H):
        for dw in tl.static_range((K + STRIDE_W - 1) // STRIDE_W):
            mask = inside(i - dh, j - dw, OH, OW)[:, None] & c_mask[None, :]
            g = tl.load(grad_image + place(i - dh, j - dw, OW, WIDE)[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
            for at in tl.static_range(STRIDE_H * STRIDE_W):
                if dh * STRIDE_H + at // STRIDE_W < K and dw * STRIDE_W + at % STRIDE_W < K:
                    tap = (dh * STRIDE_H + at // STRIDE_W) * K + dw * STRIDE_W + at % STRIDE_W
                    w = tl.load(taps_ptr + tap * C + c, mask=c_mask, other=0.0).to(tl.float32)
                    sums = put(sums, at, sums[at] + g * w[None, :])

    for at in tl.static_range(STRIDE_H * STRIDE_W):
        ih = i * STRIDE_H - pad_h + at // STRIDE_W
        iw = j * STRIDE_W - pad_w + at % STRIDE_W
        mask = inside(ih, iw, H, W)[:, None] & c_mask[None, :]
        pixel = place(ih, iw, W, WIDE)
        tl.store(dx_ptr + n * H * W * C + pixel[:, None] * C + c[None, :], sums[at].to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=WEIGHT_RUNTIME)
def depthwise_backward_weight_kernel(
    grad_ptr, x_ptr, sums_ptr,
    H, W, OH, OW, c_units, pad_h, pad_w, tiles, all_tiles, steps, c_blocks,
    K: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    TAP_ROWS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: `steps` tiles of PIXELS output pixels, TAP_ROWS rows of taps, CHANNELS. grad, x: NHWC; sums: (splits, K*K, C), fp32.

    Every pixel of a tile keeps sums of its own until the end, so that no step passes values between threads.
    """
    C = c_units * ALIGN
    pid = tl.program_id(0)
    # programs that differ only in their taps read the same pixels: neighbours, so that the L2 cache serves all but one
    first = pid % (K // TAP_ROWS) * TAP_ROWS
    pid = pid // (K // TAP_ROWS)
    c = pid % c_blocks * CHANNELS + tl.arange(0, CHANNELS)
    split = pid // c_blocks
    c_mask = c < C

    sums = zeros(TAP_ROWS * K, PIXELS, CHANNELS)
    for tile in range(split * steps, min(split * steps + steps, all_tiles)):
        n = (tile // tiles).to(tl.int64)
        pixel = tile % tiles * PIXELS + tl.arange(0, PIXELS)
        oh = pixel // OW
        ow = pixel % OW
        mask = (oh < OH)[:, None] & c_mask[None, :]
        g = tl.load(grad_ptr + n * OH * OW * C + place(oh, ow, OW, WIDE)[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        for kh in tl.static_range(TAP_ROWS):
            ih = oh * STRIDE_H - pad_h + first + kh
            for kw in tl.static_range(K):
                iw = ow * STRIDE_W - pad_w + kw
                valid = inside(ih, iw, H, W)[:, None] & mask
                x = tl.load(x_ptr + n * H * W * C + place(ih, iw, W, WIDE)[:, None] * C + c[None, :], mask=valid, other=0.0)
                # a tap on the border adds nothing, not even an infinite gradient times zero
                product = tl.where(valid, g * x.to(tl.float32), 0.0)
                sums = put(sums, kh * K + kw, sums[kh * K + kw] + product)

    for tap in tl.static_range(TAP_ROWS * K):
        row = split * (K * K) + first * K + tap
        tl.store(sums_ptr + row * C + c, tl.sum(sums[tap], 0), mask=c_mask)


@triton.jit(do_not_specialize=SUM_RUNTIME)
def depthwise_backward_sum_kernel(
    sums_ptr, dw_ptr, splits, c_units, c_blocks, TAPS: tl.constexpr, ALIGN: tl.constexpr, SPLITS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """The second stage, one program a tap and CHANNELS: the sums of all splits. sums: (splits, TAPS, C), fp32; dw: (C, TAPS)."""
    C = c_units * ALIGN
    pid = tl.program_id(0)
    tap = pid // c_blocks
    c = pid % c_blocks * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((SPLITS, CHANNELS), tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        mask = (split < splits)[:, None] & (c < C)[None, :]
        total += tl.load(sums_ptr + (split * TAPS + tap)[:, None] * C + c[None, :], mask=mask, other=0.0)
    tl.store(dw_ptr + c * TAPS + tap, tl.sum(total, 0).to(dw_ptr.dtype.element_ty), mask=c < C)


def depthwise_backward_input(
    grad: torch.Tensor, weight: torch.Tensor, input_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> torch.Tensor:
    """grad (N, C, OH, OW), weight (C, 1, K, K) with K 3 or 5; one dtype: float32, float16 or bfloat16; stride 1 or 2. Not checked."""
    n, channels, out_h, out_w = grad.shape
    kernel, (height, width) = weight.shape[2], input_size
    if max(stride) == 1:  # the forward kernel, its taps from the other end
        return depthwise(grad, weight.flip((2, 3)), None, stride, (kernel - 1 - padding[0], kernel - 1 - padding[1]))
    taps = launch.kernel_order(weight).flatten(1).t()
    result, dx = launch.outputs(grad, (n, channels, height, width))
    if dx.numel() == 0:
        return result
    grad = launch.nhwc(grad)
    problem = Problem("depthwise_backward_input", launch.DTYPES[grad.dtype], height, width, channels, channels)
    tile = config(problem, launch.arch(grad.device))
    tiles_h = triton.cdiv((height - 1 + padding[0]) // stride[0] + 1, tile.rows)
    tiles_w = triton.cdiv((width - 1 + padding[1]) // stride[1] + 1, tile.cols)
    align, c_blocks = launch.alignment(channels), triton.cdiv(channels, tile.channels)
    with launch.on(grad):
        depthwise_backward_input_kernel[(n * tiles_h * tiles_w * c_blocks,)](
            grad, taps, dx,
            height, width, out_h, out_w, channels // align, *padding, tiles_h, tiles_w, c_blocks,
            K=kernel, STRIDE_H=stride[0], STRIDE_W=stride[1], ALIGN=align, WIDE=max(grad.numel(), dx.numel()) // n > launch.INT32_MAX,
            ROWS=tile.rows, COLS=tile.cols, CHANNELS=tile.channels, num_warps=tile.num_warps,
        )  # fmt: skip
    return result if result is dx else result.copy_(dx)


def depthwise_backward_weight(
    grad: torch.Tensor, x: torch.Tensor, kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> torch.Tensor:
    """grad (N, C, OH, OW), x (N, C, H, W), one dtype: float32, float16 or bfloat16; kernel_size 3 or 5, stride 1 or 2. Not checked.

    The splits depend on the shapes alone: the same bits on every device and in every run.
    """
    n, channels, height, width = x.shape
    out_h, out_w = grad.shape[2:]
    kernel = kernel_size[0]
    dw = torch.empty((channels, 1, kernel, kernel), dtype=grad.dtype, device=grad.device)
    if n == 0:
        return dw.zero_()
    grad, x = launch.nhwc(grad), launch.nhwc(x)
    problem = Problem("depthwise_backward_weight", launch.DTYPES[x.dtype], out_h, out_w, channels, channels, kernel)
    tile = config(problem, launch.arch(x.device))
    align, c_blocks, tiles = launch.alignment(channels), triton.cdiv(channels, tile.channels), triton.cdiv(out_h * out_w, tile.pixels)
    groups = c_blocks * (kernel // tile.tap_rows)
    steps = triton.cdiv(n * tiles, max(PROGRAMS // groups, 1))
    splits = triton.cdiv(n * tiles, steps)
    sums = torch.empty((splits, kernel * kernel, channels), dtype=torch.float32, device=x.device)
    with launch.on(x):
        depthwise_backward_weight_kernel[(splits * groups,)](
            grad, x, sums,
            height, width, out_h, out_w, channels // align, *padding, tiles, n * tiles, steps, c_blocks,
            K=kernel, STRIDE_H=stride[0], STRIDE_W=stride[1], ALIGN=align, WIDE=max(grad.numel(), x.numel()) // n > launch.INT32_MAX,
            TAP_ROWS=tile.tap_rows, PIXELS=tile.pixels, CHANNELS=tile.channels, num_warps=tile.num_warps,
        )  # fmt: skip
        c_blocks = triton.cdiv(channels, CHANNELS)
        depthwise_backward_sum_kernel[(kernel * kernel * c_blocks,)](
            sums, dw, splits, channels // align, c_blocks, TAPS=kernel * kernel, ALIGN=align, SPLITS=SPLITS, CHANNELS=CHANNELS
        )  # fmt: skip
    return dw
