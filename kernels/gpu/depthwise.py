"""Depthwise convolution, 3x3 and 5x5: y[n, oh, ow, c] = sum over kh, kw of x[n, oh*s - p + kh, ow*s - p + kw, c] * w[c, kh, kw]."""

import functools

import torch
import triton
import triton.language as tl

from . import launch, march
from .configs import DepthwiseTile, Problem, config
from .epilogue import activate, await_previous

RUNTIME = ("H", "W", "OH", "OW", "c_units", "pad_h", "pad_w", "tiles", "c_blocks")


@triton.jit
def column(
    rows, x_image, taps_ptr, top, ow, c, c_mask, H, W, C, pad_h, pad_w, kw,
    K: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, WIDE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """`rows` with what column kw of the window adds: each row of the strip loaded once, for every output row whose window holds it."""
    iw = ow * STRIDE_W - pad_w + kw
    for row in tl.static_range((RUN - 1) * STRIDE_H + K):
        ih = top * STRIDE_H - pad_h + row
        mask = march.inside(ih, iw, H, W)[:, None] & c_mask[None, :]
        x = tl.load(x_image + march.place(ih, iw, W, WIDE)[:, None] * C + c[None, :], mask=mask, other=0.0)
        rows = march.depthwise_row(rows, x, taps_ptr, c, c_mask, C, kw, row, K, STRIDE_H, RUN)
    return rows


@triton.jit(do_not_specialize=RUNTIME)
def depthwise_kernel(
    x_ptr, taps_ptr, bias_ptr, y_ptr,
    H, W, OH, OW, c_units, pad_h, pad_w, tiles, c_blocks,
    K: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, RUN: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """One program: LANES columns of RUN output rows of one image, by CHANNELS. x, y: NHWC; taps: (K*K, C).

    At stride 1 a pixel is loaded K (RUN - 1 + K) / RUN times, not K*K; those loads meet in L1. WIDE: an image passes 2^31 elements.
    """
    C = c_units * ALIGN
    await_previous(PDL)
    # channel blocks vary fastest, so that neighbouring programs share the pixels' memory sectors
    pid = tl.program_id(0)
    c = (pid % c_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    c_mask = c < C
    pid = pid // c_blocks
    n = (pid // tiles).to(tl.int64)
    top, ow = march.lanes(pid % tiles, OW, RUN, LANES)
    x_image = x_ptr + n * H * W * C

    rows = march.zeros(RUN, LANES, CHANNELS)
    if K == 3:  # unrolled: at stride 1 a loop takes up to 21% longer (H100, bf16, batch 128)
        for kw in tl.static_range(K):
            rows = column(rows, x_image, taps_ptr, top, ow, c, c_mask, H, W, C, pad_h, pad_w, kw, K, STRIDE_H, STRIDE_W, WIDE, RUN)
    else:  # unrolled, a 5x5 took up to 35% longer, with all 255 registers instead of 160
        for kw in range(K):
            rows = column(rows, x_image, taps_ptr, top, ow, c, c_mask, H, W, C, pad_h, pad_w, kw, K, STRIDE_H, STRIDE_W, WIDE, RUN)

    bias = tl.zeros((CHANNELS,), tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + c, mask=c_mask, other=0.0).to(tl.float32)
    y_image = y_ptr + n * OH * OW * C
    for r in tl.static_range(RUN):
        y = activate(rows[r] + bias[None, :], ACTIVATION).to(y_ptr.dtype.element_ty)
        mask = (top + r < OH)[:, None] & c_mask[None, :]
        tl.store(y_image + march.place(top + r, ow, OW, WIDE)[:, None] * C + c[None, :], y, mask=mask)


def depthwise(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    activation: str | None = None,
    tile: DepthwiseTile | None = None,
) -> torch.Tensor:
    """x (N, C, H, W), weight (C, 1, K, K) with K 3 or 5, bias (C,); one dtype: float32, float16 or bfloat16.

    A weight from `launch.kernel_order` is read as it is, another is copied on each call. tile: None for the one that `config` chooses.
    Arguments are not checked.
    """
    n, channels, height, width = x.shape
    kernel = weight.shape[2]
    out_h, out_w = launch.window((height, width), kernel, stride, padding)
    result, y = launch.outputs(x, (n, channels, out_h, out_w))
    if y.numel() == 0:
        return result
    x = launch.nhwc(x)
    size = (height, width, out_h, out_w)
    run = _launcher(tile, x.device, x.dtype, launch.wide(x, y), n, channels, size, kernel, tuple(stride), tuple(padding), activation)
    run(x, launch.kernel_order(weight), launch.dense(bias), y)
    return result if result is y else result.copy_(y)


@functools.lru_cache(maxsize=launch.SHAPES)
def _launcher(tile, device, dtype, wide, n, channels, size, kernel, stride, padding, activation) -> launch.Launcher:
    geometry = (kernel, stride, padding, 0, size[:2])
    tile = tile or config(Problem("depthwise", launch.DTYPES[dtype], *size[2:], channels, channels, *geometry), launch.arch(device))
    align = launch.alignment(channels)
    tiles, c_blocks = tile.tiles(*size[2:]), triton.cdiv(channels, tile.channels)
    return launch.Launcher(
        depthwise_kernel, device, n * tiles * c_blocks,
        (*size, channels // align, *padding, tiles, c_blocks),
        K=kernel, STRIDE_H=stride[0], STRIDE_W=stride[1], ALIGN=align, WIDE=wide, ACTIVATION=activation,
        **tile.constants, **launch.options(tile),
    )  # fmt: skip
