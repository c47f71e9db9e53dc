"""Device code of the block kernels: lanes that march down the image with a few rows of results in registers.

A lane is a column of RUN output rows; a program has LANES of them, neighbours in a row first. Rows live in a tuple of RUN tiles
(LANES, channels), so that an input row, once loaded or computed, serves every output row whose window holds it by its index alone:
moving it costs nothing, where a tile of pixels would have to pass through shared memory. Indices are compile-time constants.
"""

import triton
import triton.language as tl


@triton.jit
def zeros(RUN: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr):
    """RUN tiles of zeros."""
    rows = ()
    for _ in tl.static_range(RUN):
        rows = rows + (tl.zeros((LANES, CHANNELS), tl.float32),)
    return rows


@triton.jit
def put(rows, R: tl.constexpr, tile):
    """`rows` with tile R replaced."""
    return rows[:R] + (tile,) + rows[R + 1 :]


@triton.jit
def lanes(tile, OW, RUN: tl.constexpr, LANES: tl.constexpr):
    """(first output row, output column) of each lane of a tile. Lanes past the last strip begin at or below the image's end."""
    lane = tile * LANES + tl.arange(0, LANES)
    return lane // OW * RUN, lane % OW


@triton.jit
def pixels(tile, OW, LANES: tl.constexpr, WRAPS: tl.constexpr):
    """`lanes` of one row each. WRAPS: how many image rows a tile may pass into, 0 for any number: then each lane costs a division."""
    if WRAPS == 0:
        return lanes(tile, OW, 1, LANES)
    first = tile * LANES
    at = first % OW + tl.arange(0, LANES)
    down = (at >= OW).to(tl.int32)
    for wrap in tl.static_range(2, WRAPS + 1):
        down += (at >= wrap * OW).to(tl.int32)
    return first // OW + down, at - down * OW


@triton.jit
def inside(ih, iw, H, W):
    return (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)


@triton.jit
def place(h, w, W, WIDE: tl.constexpr):
    """The pixel's number in its image. WIDE: an image passes 2^31 elements."""
    if WIDE:
        h = h.to(tl.int64)
    return h * W + w


@triton.jit
def depthwise_row(
    rows, x, taps_ptr, c, c_mask, C, kw, ROW: tl.constexpr, K: tl.constexpr, STRIDE_H: tl.constexpr, RUN: tl.constexpr
):  # fmt: skip
    """Adds input row ROW of a strip, at column kw of the window, to every output row whose window holds it. taps: (K*K, C)."""
    for kh in tl.static_range(K):
        if kh <= ROW and (ROW - kh) % STRIDE_H == 0 and (ROW - kh) // STRIDE_H < RUN:
            w = tl.load(taps_ptr + (kh * K + kw) * C + c, mask=c_mask, other=0.0)
            rows = put(rows, (ROW - kh) // STRIDE_H, rows[(ROW - kh) // STRIDE_H] + x.to(tl.float32) * w.to(tl.float32)[None, :])
    return rows
