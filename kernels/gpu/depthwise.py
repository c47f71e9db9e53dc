"""Depthwise convolution, 3x3 and 5x5: y[n, oh, ow, c] = sum over kh, kw of x[n, oh*s - p + kh, ow*s - p + kw, c] * w[c, kh, kw]."""

import functools

import torch
import triton
import triton.language as tl

from . import launch
from .configs import Problem, config
from .epilogue import activate

RUNTIME = ("H", "W", "OH", "OW", "c_units", "pad_h", "pad_w", "tiles_h", "tiles_w", "c_blocks")


@triton.jit(do_not_specialize=RUNTIME)
def depthwise_kernel(
    x_ptr, taps_ptr, bias_ptr, y_ptr,
    H, W, OH, OW, c_units, pad_h, pad_w, tiles_h, tiles_w, c_blocks,
    K: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS x COLS output pixels of one image by CHANNELS. x, y: NHWC; taps: (K*K, C).

    Every tap reads its shifted tile from global memory; the K*K reads of a pixel meet in L1. WIDE: an image passes 2^31 elements.
    """
    C = c_units * ALIGN
    # channel blocks vary fastest, so that neighbouring programs share the pixels' memory sectors
    pid = tl.program_id(0)
    c_block = pid % c_blocks
    pid = pid // c_blocks
    tile_w = pid % tiles_w
    pid = pid // tiles_w
    tile_h = pid % tiles_h
    n = (pid // tiles_h).to(tl.int64)

    pixel = tl.arange(0, ROWS * COLS)
    oh = tile_h * ROWS + pixel // COLS
    ow = tile_w * COLS + pixel % COLS
    c = c_block * CHANNELS + tl.arange(0, CHANNELS)
    c_mask = c < C

    x_image = x_ptr + n * H * W * C
    acc = tl.zeros((ROWS * COLS, CHANNELS), tl.float32)
    for kh in tl.static_range(K):
        ih = oh * STRIDE_H - pad_h + kh
        h_mask = (ih >= 0) & (ih < H)
        if WIDE:
            ih = ih.to(tl.int64)
        for kw in tl.static_range(K):
            iw = ow * STRIDE_W - pad_w + kw
            inside = h_mask & (iw >= 0) & (iw < W)
            offset = (ih * W + iw)[:, None] * C + c[None, :]
            x = tl.load(x_image + offset, mask=inside[:, None] & c_mask[None, :], other=0.0)
            w = tl.load(taps_ptr + (kh * K + kw) * C + c, mask=c_mask, other=0.0)
            acc += x.to(tl.float32) * w.to(tl.float32)[None, :]

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + c, mask=c_mask, other=0.0).to(tl.float32)[None, :]
    y = activate(acc, ACTIVATION).to(y_ptr.dtype.element_ty)
    if WIDE:
        oh = oh.to(tl.int64)
    offset = (oh * OW + ow)[:, None] * C + c[None, :]
    mask = ((oh < OH) & (ow < OW))[:, None] & c_mask[None, :]
    tl.store(y_ptr + n * OH * OW * C + offset, y, mask=mask)


def depthwise(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    activation: str | None = None,
) -> torch.Tensor:
    """x (N, C, H, W), weight (C, 1, K, K) with K 3 or 5, bias (C,); one dtype: float32, float16 or bfloat16. Arguments are not checked.

    A weight from `launch.kernel_order` is read as it is, another is copied on each call.
    """
    n, channels, height, width = x.shape
    kernel = weight.shape[2]
    out_h = (height + 2 * padding[0] - kernel) // stride[0] + 1
    out_w = (width + 2 * padding[1] - kernel) // stride[1] + 1
    result, y = launch.outputs(x, (n, channels, out_h, out_w))
    if y.numel() == 0:
        return result
    x = launch.nhwc(x)
    size = (height, width, out_h, out_w)
    run = _launcher(x.device, x.dtype, launch.wide(x, y), n, channels, size, kernel, tuple(stride), tuple(padding), activation)
    run(x, launch.kernel_order(weight), launch.dense(bias), y)
    return result if result is y else result.copy_(y)


@functools.lru_cache(maxsize=launch.SHAPES)
def _launcher(device, dtype, wide, n, channels, size, kernel, stride, padding, activation) -> launch.Launcher:
    _, _, out_h, out_w = size
    tile = config(Problem("depthwise", launch.DTYPES[dtype], out_h, out_w, channels, channels), launch.arch(device))
    align = launch.alignment(channels)
    tiles_h, tiles_w, c_blocks = triton.cdiv(out_h, tile.rows), triton.cdiv(out_w, tile.cols), triton.cdiv(channels, tile.channels)
    return launch.Launcher(
        depthwise_kernel, device, n * tiles_h * tiles_w * c_blocks,
        (*size, channels // align, *padding, tiles_h, tiles_w, c_blocks),
        K=kernel, STRIDE_H=stride[0], STRIDE_W=stride[1], ALIGN=align, WIDE=wide, ACTIVATION=activation,
        ROWS=tile.rows, COLS=tile.cols, CHANNELS=tile.channels, num_warps=tile.num_warps,
    )  # fmt: skip
