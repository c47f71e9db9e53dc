"""A network's first convolution and the 3x3 max-pool after it in one kernel: SqueezeNet's largest tensor is never in device memory."""

import functools

import torch
import triton
import triton.language as tl

from . import launch, march
from .configs import Problem, config, stem_steps
from .epilogue import activate, await_previous, dot
from .max_pool import larger

RUNTIME = (
    ("H", "W", "SH", "SW", "OH", "OW", "stride_c", "stride_ih", "stride_iw", "out_units")
    + ("pad_h", "pad_w", "pool_h", "pool_w", "tiles", "o_blocks")
)  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def stem_pool_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr,
    H, W, SH, SW, OH, OW, stride_c, stride_ih, stride_iw, out_units, pad_h, pad_w, pool_h, pool_w, tiles, o_blocks,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, ALIGN_OUT: tl.constexpr,
    POOL_H: tl.constexpr, POOL_W: tl.constexpr, EDGES: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, RUN: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """One program: LANES columns of RUN pooled rows of one image by CHANNELS. x: dense, NCHW or NHWC by its strides; y: NHWC.

    SH, SW: the convolution's size; POOL_H, POOL_W: the pool's stride. A row of the convolution is computed three times over, once for each
    column of the pool's window, and serves every pooled row whose window holds it. Of a window that reaches beyond the convolution the
    nearest pixel is taken, which it holds, too. w: as `launch.stem_order` has it, in one step. EDGES: the convolution is padded.
    """
    O = out_units * ALIGN_OUT  # noqa: E741
    await_previous(PDL)
    pid = tl.program_id(0)
    o = (pid % o_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    o_mask = o < O
    pid = pid // o_blocks
    n = (pid // tiles).to(tl.int64)
    oh, ow = march.lanes(pid % tiles, OW, RUN, LANES)
    x_image = x_ptr + n * H * W * C
    if WIDE:
        stride_ih = stride_ih.to(tl.int64)
    k = tl.arange(0, DEPTH)
    dh = k // (KW * C)
    dw = k // C % KW
    inside = (k < KH * KW * C)[None, :]
    window = (dh * stride_ih + dw * stride_iw + k % C * stride_c)[None, :]
    w = tl.load(w_ptr + o[None, :] * DEPTH + k[:, None], mask=o_mask[None, :], other=0.0)
    bias = tl.zeros((CHANNELS,), tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + o, mask=o_mask, other=0.0).to(tl.float32)

    rows = ()
    for r in tl.static_range(RUN):
        for kh in tl.static_range(3):
            if r == 0 or kh + POOL_H >= 3:  # else the pooled row above has it
                sh = tl.minimum(tl.maximum(oh * POOL_H - pool_h + (r * POOL_H + kh), 0), SH - 1)
                top = sh * STRIDE_H - pad_h
                row = tl.full((LANES, CHANNELS), float("-inf"), y_ptr.dtype.element_ty)
                for kw in range(3):  # not unrolled, for the code would pass the instruction cache
                    sw = tl.minimum(tl.maximum(ow * POOL_W - pool_w + kw, 0), SW - 1)
                    left = sw * STRIDE_W - pad_w
                    mask = inside
                    if EDGES:
                        mask = mask & march.inside(top[:, None] + dh[None, :], left[:, None] + dw[None, :], H, W)
                    x = tl.load(x_image + (top * stride_ih + left * stride_iw)[:, None] + window, mask=mask, other=0.0)
                    value = dot(x, w, tl.zeros((LANES, CHANNELS), tl.float32), PRECISION) + bias[None, :]
                    row = larger(row, activate(value, ACTIVATION).to(y_ptr.dtype.element_ty))
                for below in tl.static_range(r, RUN):
                    if kh == (below - r) * POOL_H:  # the first row of its window
                        rows = rows + (row,)
                    elif kh > (below - r) * POOL_H:
                        rows = march.put(rows, below, larger(rows[below], row))

    y_image = y_ptr + n * OH * OW * O
    for r in tl.static_range(RUN):
        offset = march.place(oh + r, ow, OW, WIDE)[:, None] * O + o[None, :]
        tl.store(y_image + offset, rows[r], mask=(oh + r < OH)[:, None] & o_mask[None, :])


def serves(weight: torch.Tensor, pool_stride: tuple[int, int], pool_padding: tuple[int, int]) -> bool:
    """Whether the window is one step of the product, and the pool SqueezeNet's: others run in parts."""
    steps, _ = stem_steps(*weight.shape[2:], weight.shape[1])
    return steps == 1 and tuple(pool_stride) == (2, 2) and not any(pool_padding)


def problem(x: torch.Tensor, weight: torch.Tensor, stride: tuple[int, int], padding: tuple[int, int], size: tuple[int, int]) -> Problem:
    """size: the pooled output's; kernel, stride and padding are the convolution's."""
    channels, *image = x.shape[1:]
    geometry = (max(weight.shape[2:]), tuple(stride), tuple(padding), 0, tuple(image))
    return Problem("stem_pool", launch.kind(x.dtype), *size, channels, weight.shape[0], *geometry)


def stem_pool(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    activation: str | None,
    pool_stride: tuple[int, int],
    pool_padding: tuple[int, int],
    size: tuple[int, int],
    tile=None,
) -> torch.Tensor:
    """max_pool(stem(x)), channels_last whatever x is: the arguments of `stem.stem`, a pool's stride and padding, and the size it makes.

    tile: None for the one that `config` chooses. Arguments are not checked.
    """
    n, channels, height, width = x.shape
    out_channels, kernel = weight.shape[0], tuple(weight.shape[2:])
    result, y = launch.outputs(x, (n, out_channels, *size), True)
    if y.numel() == 0:
        return result
    x = x if x.is_contiguous() else launch.nhwc(x)
    tile = tile or config(problem(x, weight, stride, padding, size), launch.arch(x.device))
    stem = tuple((extent + 2 * p - k) // s + 1 for extent, k, s, p in zip((height, width), kernel, stride, padding))
    run = _launcher(
        tile, x.device, launch.precision(x.dtype), launch.wide(x, y), x.is_contiguous(), n, channels, out_channels,
        (height, width, *stem, *size), kernel, tuple(stride), tuple(padding), tuple(pool_stride), tuple(pool_padding), activation,
    )  # fmt: skip
    run(x, launch.stem_order(weight), launch.dense(bias), y)
    return result if result is y else result.copy_(y)


@functools.lru_cache(maxsize=launch.SHAPES)
def _launcher(
    tile, device, precision, wide, nchw, n, channels, out_channels, size, kernel, stride, padding, pool_stride, pool_padding, activation
) -> launch.Launcher:
    height, width, *_ = size
    strides = (height * width, width, 1) if nchw else (1, width * channels, channels)
    align = launch.alignment(out_channels)
    tiles, o_blocks = tile.tiles(*size[4:]), triton.cdiv(out_channels, tile.channels)
    return launch.Launcher(
        stem_pool_kernel, device, n * tiles * o_blocks,
        (*size, *strides, out_channels // align, *padding, *pool_padding, tiles, o_blocks),
        C=channels, KH=kernel[0], KW=kernel[1], STRIDE_H=stride[0], STRIDE_W=stride[1], ALIGN_OUT=align,
        POOL_H=pool_stride[0], POOL_W=pool_stride[1], EDGES=any(padding), PRECISION=precision, WIDE=wide, ACTIVATION=activation,
        **tile.constants, **launch.options(tile),
    )  # fmt: skip
