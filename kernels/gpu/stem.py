"""A network's first layer: a dense convolution of an image with few channels, as one matrix product over (window, channel)."""

import functools

import torch
import triton
import triton.language as tl

from . import launch, march
from .configs import Problem, config
from .epilogue import activate, dot

RUNTIME = ("H", "W", "OH", "OW", "stride_c", "stride_ih", "stride_iw", "out_units", "pad_h", "pad_w", "tiles", "o_blocks")


@triton.jit(do_not_specialize=RUNTIME)
def stem_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr,
    H, W, OH, OW, stride_c, stride_ih, stride_iw, out_units, pad_h, pad_w, tiles, o_blocks,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, ALIGN_OUT: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr,
    RUN: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One program: LANES pixels of one image (RUN is 1) by CHANNELS. x: dense, NCHW or NHWC by its strides; w: (O, KH, KW, C); y: NHWC."""
    tl.static_assert(RUN == 1, "a pixel is a lane of its own")
    O = out_units * ALIGN_OUT  # noqa: E741
    pid = tl.program_id(0)
    o = (pid % o_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    o_mask = o < O
    pid = pid // o_blocks
    n = (pid // tiles).to(tl.int64)
    oh, ow = march.lanes(pid % tiles, OW, RUN, LANES)
    x_image = x_ptr + n * H * W * C
    top = oh * STRIDE_H - pad_h
    left = ow * STRIDE_W - pad_w

    acc = tl.zeros((LANES, CHANNELS), tl.float32)
    for k0 in range(0, KH * KW * C, DEPTH):
        k = k0 + tl.arange(0, DEPTH)
        ih = top[:, None] + (k // (KW * C))[None, :]
        iw = left[:, None] + (k // C % KW)[None, :]
        if WIDE:
            ih = ih.to(tl.int64)
        offset = ih * stride_ih + iw * stride_iw + (k % C)[None, :] * stride_c
        x = tl.load(x_image + offset, mask=march.inside(ih, iw, H, W) & (k < KH * KW * C)[None, :], other=0.0)
        w = tl.load(w_ptr + o[None, :] * (KH * KW * C) + k[:, None], mask=(k < KH * KW * C)[:, None] & o_mask[None, :], other=0.0)
        acc = dot(x, w, acc, PRECISION)

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o, mask=o_mask, other=0.0).to(tl.float32)[None, :]
    offset = n * OH * OW * O + march.place(oh, ow, OW, WIDE)[:, None] * O + o[None, :]
    tl.store(y_ptr + offset, activate(acc, ACTIVATION).to(y_ptr.dtype.element_ty), mask=(oh < OH)[:, None] & o_mask[None, :])


def problem(x: torch.Tensor, weight: torch.Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Problem:
    """The kernel's larger side stands for both."""
    channels, *size = x.shape[1:]
    out = [(extent + 2 * p - k) // s + 1 for extent, k, s, p in zip(size, weight.shape[2:], stride, padding)]
    geometry = (max(weight.shape[2:]), tuple(stride), tuple(padding), 0, tuple(size))
    return Problem("stem", launch.kind(x.dtype), *out, channels, weight.shape[0], *geometry)


def stem(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: tuple[int, int] = (2, 2),
    padding: tuple[int, int] = (1, 1),
    activation: str | None = None,
    tile=None,
    always_nhwc: bool = False,
) -> torch.Tensor:
    """x (N, C, H, W), C up to 4, read as it lies (NCHW or channels_last); weight (O, C, KH, KW), bias (O,) → (N, O, OH, OW).

    One dtype: float32, float16 or bfloat16. tile: None for the one that `config` chooses. always_nhwc: the output is channels_last
    also where x is not, so that a network of the kernels reads its image as it comes and copies nothing. Arguments are not checked.
    """
    n, channels, height, width = x.shape
    out_channels, kernel_h, kernel_w = weight.shape[0], *weight.shape[2:]
    out_h = (height + 2 * padding[0] - kernel_h) // stride[0] + 1
    out_w = (width + 2 * padding[1] - kernel_w) // stride[1] + 1
    result, y = launch.outputs(x, (n, out_channels, out_h, out_w), always_nhwc)
    if y.numel() == 0:
        return result
    x = x if x.is_contiguous() else launch.nhwc(x)
    tile = tile or config(problem(x, weight, stride, padding), launch.arch(x.device))
    run = _launcher(
        tile, x.device, launch.precision(x.dtype), launch.wide(x, y), x.is_contiguous(), n, channels, out_channels,
        (height, width, out_h, out_w), (kernel_h, kernel_w), tuple(stride), tuple(padding), activation,
    )  # fmt: skip
    run(x, launch.nhwc(weight), launch.dense(bias), y)
    return result if result is y else result.copy_(y)


@functools.lru_cache(maxsize=launch.SHAPES)
def _launcher(tile, device, precision, wide, nchw, n, channels, out_channels, size, kernel, stride, padding, activation) -> launch.Launcher:
    height, width, out_h, out_w = size
    strides = (height * width, width, 1) if nchw else (1, width * channels, channels)
    align = launch.alignment(out_channels)
    tiles, o_blocks = tile.tiles(out_h, out_w), triton.cdiv(out_channels, tile.channels)
    return launch.Launcher(
        stem_kernel, device, n * tiles * o_blocks,
        (*size, *strides, out_channels // align, *padding, tiles, o_blocks),
        C=channels, KH=kernel[0], KW=kernel[1], STRIDE_H=stride[0], STRIDE_W=stride[1], ALIGN_OUT=align,
        PRECISION=precision, WIDE=wide, ACTIVATION=activation, **tile.constants, **launch.options(tile),
    )  # fmt: skip
