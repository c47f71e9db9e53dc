"""Mean over an image's pixels, or over sums that other kernels left of them: y[n, c] = sum over p of x[n, p, c] / pixels."""

import functools

import torch
import triton
import triton.language as tl

from . import launch
from .epilogue import await_previous

LONG = 128  # rows
# (PIXELS, CHANNELS), whether rows are many: 12 instead of 18 us for 784 of 72 channels (H100, bf16, batch 256)
TILES = {False: (16, 64), True: (64, 32)}
RUNTIME = ("rows", "pixels", "units", "c_blocks")


@triton.jit(do_not_specialize=RUNTIME)
def global_avg_pool_kernel(
    x_ptr, y_ptr, rows, pixels, units, c_blocks,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """One program: all `rows` of one image by CHANNELS. x: (N, rows, C); y: (N, C)."""
    C = units * ALIGN
    await_previous(PDL)
    pid = tl.program_id(0)
    c = (pid % c_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    n = (pid // c_blocks).to(tl.int64)
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for p0 in range(0, rows, PIXELS):
        p = p0 + tl.arange(0, PIXELS)
        mask = (p < rows)[:, None] & (c < C)[None, :]
        if WIDE:
            p = p.to(tl.int64)
        total += tl.load(x_ptr + n * rows * C + p[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + n * C + c, (tl.sum(total, 0) / pixels).to(y_ptr.dtype.element_ty), mask=c < C)


def global_avg_pool(x: torch.Tensor, pixels: int | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """x (N, C, H, W), float32, float16 or bfloat16 → (N, C, 1, 1).

    pixels: what to divide the sum by, if not by H * W; dtype: the output's, if not x's. Arguments are not checked.
    """
    n, channels, height, width = x.shape
    y = x.new_empty((n, channels, 1, 1), dtype=dtype)
    if y.numel() == 0:
        return y
    x = launch.nhwc(x)
    _launcher(x.device, x.dtype, y.dtype, launch.wide(x), n, channels, height * width, pixels or height * width)(x, y)
    return y


@functools.lru_cache(maxsize=launch.SHAPES)
def _launcher(device, dtype, out_dtype, wide, n, channels, rows, pixels) -> launch.Launcher:
    in_step, wide_block = TILES[rows >= LONG]
    align, c_blocks = launch.alignment(channels), triton.cdiv(channels, wide_block)
    return launch.Launcher(
        global_avg_pool_kernel, device, n * c_blocks,
        (rows, pixels, channels // align, c_blocks),
        ALIGN=align, WIDE=wide, PIXELS=in_step, CHANNELS=wide_block,
    )  # fmt: skip
