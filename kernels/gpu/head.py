"""A network's last convolution and the mean over its pixels in one kernel: the convolution's output is never in device memory.

y[n, o] = mean over p of activation(sum over c of x[n, p, c] * w[o, c] + bias[o])
"""

import functools

import torch
import triton
import triton.language as tl

from . import launch
from .configs import Problem, config
from .epilogue import activate, await_previous, dot

RUNTIME = ("image", "in_units", "out_units", "o_blocks")


@triton.jit(do_not_specialize=RUNTIME)
def head_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr,
    image, in_units, out_units, o_blocks,
    ALIGN_IN: tl.constexpr, ALIGN_OUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """One program: all `image` pixels of one image, PIXELS at a time, by CHANNELS. x: NHWC; w: (O, C); y: (N, O)."""
    C = in_units * ALIGN_IN
    O = out_units * ALIGN_OUT  # noqa: E741
    await_previous(PDL)
    pid = tl.program_id(0)
    o = (pid % o_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    o_mask = o < O
    n = (pid // o_blocks).to(tl.int64)
    x_image = x_ptr + n * image * C
    m = tl.arange(0, PIXELS)
    ci = tl.arange(0, DEPTH)
    bias = tl.zeros((CHANNELS,), tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + o, mask=o_mask, other=0.0).to(tl.float32)

    total = tl.zeros((CHANNELS,), tl.float32)
    for p0 in range(0, image, PIXELS):
        p = p0 + m
        p_mask = p < image
        if WIDE:
            p = p.to(tl.int64)
        acc = tl.zeros((PIXELS, CHANNELS), tl.float32)
        for c0 in range(0, C, DEPTH):
            c = c0 + ci
            x = tl.load(x_image + p[:, None] * C + c[None, :], mask=p_mask[:, None] & (c < C)[None, :], other=0.0)
            w = tl.load(w_ptr + o[None, :] * C + c[:, None], mask=(c < C)[:, None] & o_mask[None, :], other=0.0)
            acc = dot(x, w, acc, PRECISION)
        total += tl.sum(tl.where(p_mask[:, None], activate(acc + bias[None, :], ACTIVATION), 0.0), 0)
    tl.store(y_ptr + n * O + o, (total / image).to(y_ptr.dtype.element_ty), mask=o_mask)


def problem(x: torch.Tensor, weight: torch.Tensor) -> Problem:
    channels, height, width = x.shape[1:]
    return Problem("head", launch.kind(x.dtype), height, width, channels, weight.shape[0])


def head(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = None, tile=None) -> torch.Tensor:
    """global_avg_pool(pointwise(x)): x (N, C, H, W), weight (O, C, 1, 1), bias (O,) → (N, O, 1, 1); float32, float16 or bfloat16.

    tile: None for the one that `config` chooses. Arguments are not checked.
    """
    n, channels, height, width = x.shape
    out_channels = weight.shape[0]
    y = x.new_empty((n, out_channels, 1, 1))
    if y.numel() == 0:
        return y
    x = launch.nhwc(x)
    tile = tile or config(problem(x, weight), launch.arch(x.device))
    run = _launcher(tile, x.device, launch.precision(x.dtype), launch.wide(x), n, channels, height * width, out_channels, activation)
    run(x, launch.kernel_order(weight), launch.dense(bias), y)
    return y


@functools.lru_cache(maxsize=launch.SHAPES)
def _launcher(tile, device, precision, wide, n, channels, image, out_channels, activation) -> launch.Launcher:
    align_in, align_out = launch.alignment(channels), launch.alignment(out_channels)
    o_blocks = triton.cdiv(out_channels, tile.channels)
    return launch.Launcher(
        head_kernel, device, n * o_blocks,
        (image, channels // align_in, out_channels // align_out, o_blocks),
        ALIGN_IN=align_in, ALIGN_OUT=align_out, PRECISION=precision, WIDE=wide, ACTIVATION=activation,
        PIXELS=tile.lanes, CHANNELS=tile.channels, DEPTH=tile.depth, **launch.options(tile),
    )  # fmt: skip
