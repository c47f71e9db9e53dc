"""3x3 max-pool: y[n, oh, ow, c] = max over kh, kw of x[n, oh*s - p + kh, ow*s - p + kw, c] inside the image."""

import functools

import torch
import triton
import triton.language as tl

from . import launch, march
from .configs import PoolTile, Problem, config
from .epilogue import await_previous

RUNTIME = ("H", "W", "OH", "OW", "units", "pad_h", "pad_w", "tiles", "c_blocks")


@triton.jit
def larger(a, b):
    """NaN wins; of zeros +0. Back in the inputs' type at once: two halves then are one instruction, where comparing as ATen does is six."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL).to(a.dtype)


@triton.jit(do_not_specialize=RUNTIME)
def max_pool_kernel(
    x_ptr, y_ptr, H, W, OH, OW, units, pad_h, pad_w, tiles, c_blocks,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    RUN: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """One program: LANES columns of RUN output rows of one image by CHANNELS. x, y: NHWC.

    The maximum over a row's three columns serves every output row whose window holds that row.
    """
    C = units * ALIGN
    await_previous(PDL)
    pid = tl.program_id(0)
    c = (pid % c_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    c_mask = c < C
    pid = pid // c_blocks
    n = (pid // tiles).to(tl.int64)
    oh, ow = march.lanes(pid % tiles, OW, RUN, LANES)
    x_image = x_ptr + n * H * W * C
    top = oh * STRIDE_H - pad_h
    left = ow * STRIDE_W - pad_w

    rows = ()
    for r in tl.static_range(RUN):
        for kh in tl.static_range(3):
            if r == 0 or kh + STRIDE_H >= 3:  # else the output row above has it
                ih = top + (r * STRIDE_H + kh)
                for kw in tl.static_range(3):
                    mask = march.inside(ih, left + kw, H, W)[:, None] & c_mask[None, :]
                    offset = march.place(ih, left + kw, W, WIDE)[:, None] * C + c[None, :]
                    x = tl.load(x_image + offset, mask=mask, other=float("-inf"))
                    row = x if kw == 0 else larger(row, x)  # noqa: F821
                for below in tl.static_range(r, RUN):
                    if kh == (below - r) * STRIDE_H:  # the first row of its window
                        rows = rows + (row,)
                    elif kh > (below - r) * STRIDE_H:
                        rows = march.put(rows, below, larger(rows[below], row))

    y_image = y_ptr + n * OH * OW * C
    for r in tl.static_range(RUN):
        offset = march.place(oh + r, ow, OW, WIDE)[:, None] * C + c[None, :]
        tl.store(y_image + offset, rows[r], mask=(oh + r < OH)[:, None] & c_mask[None, :])


def pooled(extent: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """Windows of 3 along an axis; with ceil_mode the last may end outside, and must begin inside."""
    out = (extent + 2 * padding - 3 + (stride - 1 if ceil_mode else 0)) // stride + 1
    return out - 1 if ceil_mode and (out - 1) * stride >= extent + padding else out


def problem(x: torch.Tensor, stride: tuple[int, int], padding: tuple[int, int], size: tuple[int, int]) -> Problem:
    """size: the output's."""
    channels, *image = x.shape[1:]
    return Problem("max_pool", launch.DTYPES[x.dtype], *size, channels, channels, 3, tuple(stride), tuple(padding), 0, tuple(image))


def max_pool(
    x: torch.Tensor,
    stride: tuple[int, int] = (2, 2),
    padding: tuple[int, int] = (0, 0),
    ceil_mode: bool = False,
    tile: PoolTile | None = None,
) -> torch.Tensor:
    """x (N, C, H, W), float32, float16 or bfloat16; padding up to 1. tile: None for the one that `config` chooses.

    Arguments are not checked.
    """
    n, channels, height, width = x.shape
    size = tuple(pooled(*axis, ceil_mode) for axis in zip((height, width), stride, padding))
    if channels > 1 and launch.memory_format(x) is torch.contiguous_format:  # planes are images of one channel: nothing is copied
        planes = x.reshape(n * channels, 1, height, width)
        return max_pool(planes, stride, padding, ceil_mode, tile).view(n, channels, *size)
    result, y = launch.outputs(x, (n, channels, *size))
    if y.numel() == 0:
        return result
    x = launch.nhwc(x)
    tile = tile or config(problem(x, stride, padding, size), launch.arch(x.device))
    _launcher(tile, x.device, launch.wide(x, y), n, channels, (height, width, *size), tuple(stride), tuple(padding))(x, y)
    return result if result is y else result.copy_(y)


@functools.lru_cache(maxsize=launch.SHAPES)
def _launcher(tile, device, wide, n, channels, size, stride, padding) -> launch.Launcher:
    align = launch.alignment(channels)
    tiles, c_blocks = tile.tiles(*size[2:]), triton.cdiv(channels, tile.channels)
    return launch.Launcher(
        max_pool_kernel, device, n * tiles * c_blocks,
        (*size, channels // align, *padding, tiles, c_blocks),
        STRIDE_H=stride[0], STRIDE_W=stride[1], ALIGN=align, WIDE=wide, **tile.constants, num_warps=tile.num_warps,
    )  # fmt: skip
