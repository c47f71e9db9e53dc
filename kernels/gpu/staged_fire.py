"""SqueezeNet's fire module in one kernel on Hopper (sm_90), its squeezed tile in shared memory, in Gluon.

A program takes 14 x 14 outputs of one image. It squeezes the 16 x 16 pixels that they read, once, into shared memory; the nine windows of
the 3x3 expand, and the one of the 1x1, are then runs of 256 of those pixels, 16 a row, and the left operands of wgmma from registers.
Each block of CHANNELS results goes straight to its place in the concatenation.
"""

import functools

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait

from . import launch
from .configs import SIDE, StagedFireTile, padded
from .staged import activate, await_previous, barrier, product, shared, wide
from .staged import padded as padded_rows

RUNTIME = ("H", "W", "in_units", "between_units", "units_1x1", "units_3x3", "tiles_h", "tiles_w")


@gluon.constexpr_function
def in_order(step, taps):
    """The tap of a step, as `fire_expand` goes through them, the centre first: sums then have the same bits in both."""
    return (4, 0, 1, 2, 3, 5, 6, 7, 8)[step] if taps == 9 else 0


@gluon.constexpr_function
def window_start(tap, side):
    """The region's pixel that a tap of the first output meets."""
    return tap // 3 * side + tap % 3


@gluon.jit
def window_operand(region, START: gl.constexpr, dtype: gl.constexpr, PIXELS: gl.constexpr, DEPTH: gl.constexpr, layout: gl.constexpr):
    """PIXELS rows of the region from START on, as wgmma takes them from registers."""
    return region.index(START * (DEPTH // 8 + 1))._reinterpret(dtype, [PIXELS, DEPTH], padded_rows(PIXELS, DEPTH)).load(layout)


@gluon.jit
def tap_weights(weights_shared, last_shared, TAP: gl.constexpr, CHANNELS: gl.constexpr):
    """Those of a tap. Nine as rows of one allocation would be no power of two, and as its first index a barrier between each two stores."""
    return last_shared if TAP == 8 else weights_shared.slice(TAP * CHANNELS, CHANNELS, 0)


@gluon.jit
def expand(
    region, weights_shared, last_shared, w_ptr, bias_ptr, y_image, pixel, valid, first, O, E, stride_y, offset_y,  # noqa: E741
    TAPS: gl.constexpr, dtype: gl.constexpr, SIDE: gl.constexpr, PIXELS: gl.constexpr, CHANNELS: gl.constexpr, BETWEEN: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """CHANNELS results from `first` on: relu(window @ weights + bias), stored. w: (O, TAPS, E); TAPS: 1 or 9."""
    RESULT: gl.constexpr = product(PIXELS, CHANNELS, WARPS)
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=RESULT, k_width=2)
    WEIGHTS: gl.constexpr = wide(BETWEEN, WARPS)
    OUT: gl.constexpr = wide(CHANNELS, WARPS)
    o_row = first + gl.arange(0, CHANNELS, layout=gl.SliceLayout(1, WEIGHTS))
    e = gl.arange(0, BETWEEN, layout=gl.SliceLayout(0, WEIGHTS))
    mask = (o_row < O)[:, None] & (e < E)[None, :]
    for tap in gl.static_range(TAPS):
        w = gl.load(w_ptr + (o_row * TAPS + tap)[:, None] * E + e[None, :], mask=mask, other=0.0)
        tap_weights(weights_shared, last_shared, tap, CHANNELS).store(w)
    fence_async_shared()
    barrier()
    acc = warpgroup_mma_init(gl.zeros((PIXELS, CHANNELS), gl.float32, layout=RESULT))
    x = window_operand(region, window_start(4, SIDE), dtype, PIXELS, BETWEEN, OPERAND)
    for step in gl.static_range(TAPS):
        w = tap_weights(weights_shared, last_shared, in_order(step, TAPS), CHANNELS)
        acc = warpgroup_mma(x, w.permute((1, 0)), acc, is_async=True)
        if step + 1 < TAPS:  # the next window while the product runs, which reads x until the wait
            following = window_operand(region, window_start(in_order(step + 1, TAPS), SIDE), dtype, PIXELS, BETWEEN, OPERAND)
            acc, x = warpgroup_mma_wait(0, deps=[acc, x])
            acc = warpgroup_mma_init(acc)
            x = following
    y, x = warpgroup_mma_wait(0, deps=[acc, x])
    if bias_ptr is not None:
        o_column = first + gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, RESULT))
        y += gl.load(bias_ptr + o_column, mask=o_column < O, other=0.0).to(gl.float32)[None, :]
    y = gl.convert_layout(activate(y, "relu").to(dtype), OUT)
    o = first + gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, OUT))
    gl.store(y_image + pixel[:, None] * stride_y + (offset_y + o)[None, :], y, mask=valid[:, None] & (o < O)[None, :])


@gluon.jit(do_not_specialize=RUNTIME)
def staged_fire_kernel(
    x_ptr, squeeze_ptr, squeeze_bias_ptr, w1_ptr, bias1_ptr, w3_ptr, bias3_ptr, y_ptr,
    H, W, in_units, between_units, units_1x1, units_3x3, tiles_h, tiles_w,
    ALIGN_IN: gl.constexpr, ALIGN_BETWEEN: gl.constexpr, ALIGN_1X1: gl.constexpr, ALIGN_3X3: gl.constexpr, WIDE: gl.constexpr,
    SIDE: gl.constexpr, CHANNELS: gl.constexpr, BETWEEN: gl.constexpr, DEPTH_IN: gl.constexpr, WARPS: gl.constexpr,
    PDL: gl.constexpr = False,
):  # fmt: skip
    """x (N, H, W, C), y (N, H, W, O1 + O3), squeeze (E, C), w1 (O1, E), w3 (O3, 3, 3, E). SIDE: of the region, two more than of a tile."""
    C = in_units * ALIGN_IN
    E = between_units * ALIGN_BETWEEN
    O1 = units_1x1 * ALIGN_1X1
    O3 = units_3x3 * ALIGN_3X3
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    PIXELS: gl.constexpr = SIDE * SIDE

    await_previous(PDL)
    pid = gl.program_id(0)
    tile = pid % (tiles_h * tiles_w)
    n = (pid // (tiles_h * tiles_w)).to(gl.int64)
    first_h = tile // tiles_w * (SIDE - 2)
    first_w = tile % tiles_w * (SIDE - 2)

    LOAD: gl.constexpr = wide(DEPTH_IN, WARPS)
    p = gl.arange(0, PIXELS, layout=gl.SliceLayout(1, LOAD))
    ih = first_h - 1 + p // SIDE
    iw = first_w - 1 + p % SIDE
    inside = (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
    if WIDE:
        ih = ih.to(gl.int64)
    c = gl.arange(0, DEPTH_IN, layout=gl.SliceLayout(0, LOAD))
    x_pixels = x_ptr + n * H * W * C + (ih * W + iw)[:, None] * C + c[None, :]
    SQUEEZE_W: gl.constexpr = wide(DEPTH_IN, WARPS)
    e_row = gl.arange(0, BETWEEN, layout=gl.SliceLayout(1, SQUEEZE_W))
    c_row = gl.arange(0, DEPTH_IN, layout=gl.SliceLayout(0, SQUEEZE_W))
    squeeze_w = squeeze_ptr + e_row[:, None] * C + c_row[None, :]

    # what the last windows read beyond the region belongs to no output
    region = gl.allocate_shared_memory(
        dtype, [(PIXELS + 4 * SIDE) * (BETWEEN // 8 + 1), 1, 8], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )  # fmt: skip
    x_shared = gl.allocate_shared_memory(dtype, [PIXELS, DEPTH_IN], shared(DEPTH_IN))
    squeeze_shared = gl.allocate_shared_memory(dtype, [BETWEEN, DEPTH_IN], shared(DEPTH_IN))

    SQUEEZED: gl.constexpr = product(PIXELS, BETWEEN, WARPS)
    acc = gl.zeros((PIXELS, BETWEEN), gl.float32, layout=SQUEEZED)
    x = gl.load(x_pixels, mask=inside[:, None] & (c < C)[None, :], other=0.0)
    w = gl.load(squeeze_w, mask=(e_row < E)[:, None] & (c_row < C)[None, :], other=0.0)
    for c0 in range(0, C, DEPTH_IN):
        x_shared.store(x)
        squeeze_shared.store(w)
        fence_async_shared()
        token = warpgroup_mma(x_shared, squeeze_shared.permute((1, 0)), acc, is_async=True)
        left = C - c0 - DEPTH_IN
        x = gl.load(x_pixels + c0 + DEPTH_IN, mask=inside[:, None] & (c < left)[None, :], other=0.0)
        w = gl.load(squeeze_w + c0 + DEPTH_IN, mask=(e_row < E)[:, None] & (c_row < left)[None, :], other=0.0)
        acc = warpgroup_mma_wait(0, deps=[token])
    if squeeze_bias_ptr is not None:
        e = gl.arange(0, BETWEEN, layout=gl.SliceLayout(0, SQUEEZED))
        acc += gl.load(squeeze_bias_ptr + e, mask=e < E, other=0.0).to(gl.float32)[None, :]
    p = gl.arange(0, PIXELS, layout=gl.SliceLayout(1, SQUEEZED))
    ih = first_h - 1 + p // SIDE
    iw = first_w - 1 + p % SIDE
    inside = (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
    e = gl.arange(0, BETWEEN, layout=gl.SliceLayout(0, SQUEEZED))
    # padding surrounds the squeezed image; channels past the last are 0 for the padding of the next weights
    squeezed = gl.where(inside[:, None] & (e < E)[None, :], activate(acc, "relu"), 0.0)
    region.index(0)._reinterpret(dtype, [PIXELS, BETWEEN], padded_rows(PIXELS, BETWEEN)).store(squeezed.to(dtype))

    weights_shared = gl.allocate_shared_memory(dtype, [8 * CHANNELS, BETWEEN], shared(BETWEEN))
    last_shared = gl.allocate_shared_memory(dtype, [CHANNELS, BETWEEN], shared(BETWEEN))
    OUT: gl.constexpr = wide(CHANNELS, WARPS)
    p = gl.arange(0, PIXELS, layout=gl.SliceLayout(1, OUT))
    oh = first_h + p // SIDE
    ow = first_w + p % SIDE
    valid = (p // SIDE < SIDE - 2) & (p % SIDE < SIDE - 2) & (oh < H) & (ow < W)
    if WIDE:
        oh = oh.to(gl.int64)
    pixel = oh * W + ow
    y_image = y_ptr + n * H * W * (O1 + O3)
    for first in range(0, O1, CHANNELS):
        expand(
            region, weights_shared, last_shared, w1_ptr, bias1_ptr, y_image, pixel, valid, first, O1, E, O1 + O3, 0,
            1, dtype, SIDE, PIXELS, CHANNELS, BETWEEN, WARPS,
        )  # fmt: skip
    for first in range(0, O3, CHANNELS):
        expand(
            region, weights_shared, last_shared, w3_ptr, bias3_ptr, y_image, pixel, valid, first, O3, E, O1 + O3, O1,
            9, dtype, SIDE, PIXELS, CHANNELS, BETWEEN, WARPS,
        )  # fmt: skip


def fire(x, squeeze_weight, squeeze_bias, weight1x1, bias1x1, weight3x3, bias3x3, tile: StagedFireTile) -> torch.Tensor:
    """As `fire.fire`, with a StagedFireTile; float16 or bfloat16."""
    n, channels, height, width = x.shape
    result, y = launch.outputs(x, (n, weight1x1.shape[0] + weight3x3.shape[0], height, width))
    if y.numel() == 0:
        return result
    x = launch.nhwc(x)
    counts = (channels, squeeze_weight.shape[0], weight1x1.shape[0], weight3x3.shape[0])
    weights = [squeeze_weight, squeeze_bias, weight1x1, bias1x1, weight3x3, bias3x3]
    ordered = [launch.dense(tensor) if tensor is None or tensor.dim() == 1 else launch.kernel_order(tensor) for tensor in weights]
    _launcher(tile, x.device, x.dtype, launch.wide(x, y), n, height, width, counts)(x, *ordered, y)
    return result if result is y else result.copy_(y)


@functools.lru_cache(maxsize=launch.SHAPES)
def _launcher(tile, device, dtype, wide_image, n, height, width, counts) -> launch.Launcher:
    aligns = [launch.alignment(count) for count in counts]
    tiles_h, tiles_w = triton.cdiv(height, SIDE - 2), triton.cdiv(width, SIDE - 2)
    units = [count // align for count, align in zip(counts, aligns)]
    return launch.Launcher(
        staged_fire_kernel, device, n * tiles_h * tiles_w,
        (height, width, *units, tiles_h, tiles_w),
        ALIGN_IN=aligns[0], ALIGN_BETWEEN=aligns[1], ALIGN_1X1=aligns[2], ALIGN_3X3=aligns[3], WIDE=wide_image,
        SIDE=SIDE, CHANNELS=tile.channels, BETWEEN=padded(counts[1]), DEPTH_IN=tile.depth_in, WARPS=tile.num_warps,
        num_warps=tile.num_warps, **({"maxnreg": tile.registers} if tile.registers else {}),
    )  # fmt: skip
