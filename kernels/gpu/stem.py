"""A network's first layer: a dense convolution of an image with few channels, as one matrix product over (window, channel)."""

import functools

import torch
import triton
import triton.language as tl

from . import launch, march
from .configs import Problem, config, stem_steps
from .epilogue import activate, await_previous, dot

RUNTIME = ("H", "W", "OH", "OW", "stride_c", "stride_ih", "stride_iw", "out_units", "pad_h", "pad_w", "tiles", "o_blocks", "rows")


@triton.jit
def _row(x_row, ih, mask, H, ODD: tl.constexpr, EDGES: tl.constexpr, PAIRS: tl.constexpr, dtype: tl.constexpr):
    """Row ih of each lane's window. PAIRS: two elements a load; ODD: the last of them has one of the window, the count of all."""
    if EDGES:
        mask = mask & ((ih >= 0) & (ih < H))[:, None]
    x = tl.load(x_row, mask=mask, other=0)
    if PAIRS:
        if ODD > 0:
            x = tl.where((tl.arange(0, x.shape[1]) == ODD // 2)[None, :], x & 0xFFFF, x)
        x = tl.join(x.to(tl.int16), (x >> 16).to(tl.int16)).reshape(x.shape[0], 2 * x.shape[1]).to(dtype, bitcast=True)
    return x


@triton.jit(do_not_specialize=RUNTIME)
def stem_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr,
    H, W, OH, OW, stride_c, stride_ih, stride_iw, out_units, pad_h, pad_w, tiles, o_blocks, rows,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, ALIGN_OUT: tl.constexpr,
    STEPS: tl.constexpr, BY_ROWS: tl.constexpr, EDGES: tl.constexpr, PAIRS: tl.constexpr, WRAPS: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr,
    RUN: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """One program: LANES pixels of one image (RUN is 1) by CHANNELS. x: dense, NCHW or NHWC by its strides; y: NHWC.

    w: as `launch.stem_order` has it. BY_ROWS: a step is a row of the window, so that the columns' addresses are the same in all steps.
    rows: KH, at run time, for unrolled by the compiler the loads of all rows fill
    the registers. EDGES: windows may begin outside the image. PAIRS: two elements are loaded at once; needs rows of NHWC and no EDGES.
    """
    tl.static_assert(RUN == 1, "a pixel is a lane of its own")
    tl.static_assert(DEPTH == 32, "as launch.stem_order pads")
    O = out_units * ALIGN_OUT  # noqa: E741
    await_previous(PDL)
    pid = tl.program_id(0)
    o = (pid % o_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    o_mask = o < O
    pid = pid // o_blocks
    n = (pid // tiles).to(tl.int64)
    oh, ow = march.pixels(pid % tiles, OW, LANES, WRAPS)
    x_image = x_ptr + n * H * W * C
    top = oh * STRIDE_H - pad_h
    left = ow * STRIDE_W - pad_w
    if WIDE:
        stride_ih = stride_ih.to(tl.int64)

    acc = tl.zeros((LANES, CHANNELS), tl.float32)
    k = tl.arange(0, DEPTH)
    w_tile = w_ptr + o[None, :] * (STEPS * DEPTH) + k[:, None]
    if BY_ROWS:
        ODD: tl.constexpr = KW * C if KW * C % 2 else 0
        if EDGES:
            iw = left[:, None] + (k // C)[None, :]
            mask = (k < KW * C)[None, :] & (iw >= 0) & (iw < W)
        else:  # every window lies inside the image; that of a lane past the last row then is one of the last
            mask = ((2 * tl.arange(0, DEPTH // 2) if PAIRS else k) < KW * C)[None, :]
            top = tl.minimum(top, H - KH)
        place = top * stride_ih + left * stride_iw
        if PAIRS:
            x_tile = x_image.to(tl.pointer_type(tl.int32)) + (place // 2)[:, None] + tl.arange(0, DEPTH // 2)[None, :]
            stride_ih = stride_ih // 2
        else:
            x_tile = x_image + place[:, None] + (k // C * stride_iw + k % C * stride_c)[None, :]
        x = _row(x_tile, top, mask, H, ODD, EDGES, PAIRS, x_ptr.dtype.element_ty)
        for kh in range(1, rows):
            # ahead of the product, for loads of less than four bytes are not pipelined
            ahead = _row(x_tile + stride_ih * kh, top + kh, mask, H, ODD, EDGES, PAIRS, x_ptr.dtype.element_ty)
            w = tl.load(w_tile + (kh - 1) * DEPTH, mask=o_mask[None, :], other=0.0)
            acc = dot(x, w, acc, PRECISION)
            x = ahead
        w = tl.load(w_tile + (KH - 1) * DEPTH, mask=o_mask[None, :], other=0.0)
        acc = dot(x, w, acc, PRECISION)
    else:
        for step in range(STEPS):
            at = step * DEPTH + k
            ih = top[:, None] + (at // (KW * C))[None, :]
            iw = left[:, None] + (at // C % KW)[None, :]
            offset = ih * stride_ih + iw * stride_iw + (at % C)[None, :] * stride_c
            x = tl.load(x_image + offset, mask=march.inside(ih, iw, H, W) & (at < KH * KW * C)[None, :], other=0.0)
            w = tl.load(w_tile + step * DEPTH, mask=o_mask[None, :], other=0.0)
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

    One dtype: float32, float16 or bfloat16. A weight from `launch.stem_order` is read as it is, another is copied on each call.

    tile: None for the one that `config` chooses. always_nhwc: the output is channels_last
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
    size, kernel = (height, width, out_h, out_w), (kernel_h, kernel_w)
    run = _launcher(
        tile, x.device, launch.precision(x.dtype), launch.wide(x, y), x.is_contiguous(), _pairs(x, size, kernel, stride, padding),
        n, channels, out_channels, size, kernel, tuple(stride), tuple(padding), activation,
    )  # fmt: skip
    run(x, launch.stem_order(weight), launch.dense(bias), y)
    return result if result is y else result.copy_(y)


def _pairs(x: torch.Tensor, size: tuple[int, ...], kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> bool:
    """Whether every row of every window begins at a multiple of four bytes, and an element past an odd one is still x's."""
    channels, width = x.shape[1], size[1]
    even = not (width * channels % 2 or stride[1] * channels % 2 or x.data_ptr() % 4)
    inside = kernel[1] * channels % 2 == 0 or (size[3] - 1) * stride[1] + kernel[1] < width
    return x.element_size() == 2 and not x.is_contiguous() and not any(padding) and even and inside


@functools.lru_cache(maxsize=launch.SHAPES)
def _launcher(
    tile, device, precision, wide, nchw, pairs, n, channels, out_channels, size, kernel, stride, padding, activation
) -> launch.Launcher:
    height, width, out_h, out_w = size
    strides = (height * width, width, 1) if nchw else (1, width * channels, channels)
    align = launch.alignment(out_channels)
    tiles, o_blocks = tile.tiles(out_h, out_w), triton.cdiv(out_channels, tile.channels)
    steps, by_rows = stem_steps(*kernel, channels)
    wraps = (out_w + tile.lanes - 2) // out_w
    return launch.Launcher(
        stem_kernel, device, n * tiles * o_blocks,
        (*size, *strides, out_channels // align, *padding, tiles, o_blocks, kernel[0]),
        C=channels, KH=kernel[0], KW=kernel[1], STRIDE_H=stride[0], STRIDE_W=stride[1], ALIGN_OUT=align,
        STEPS=steps, BY_ROWS=by_rows, EDGES=any(padding), PAIRS=pairs and by_rows, WRAPS=wraps if wraps <= 3 else 0,
        PRECISION=precision, WIDE=wide, ACTIVATION=activation, **tile.constants, **launch.options(tile),
    )  # fmt: skip
