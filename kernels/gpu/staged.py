"""A block's expanded tile in shared memory, for Hopper (sm_90), in Gluon: `separable`, `inverted_residual` and `expand_depthwise`.

A program takes STRIPS strips of RUN output rows by COLUMNS columns. The region of the image that they read lies in shared memory, DEPTH
channels at a time: loaded, or the product of x (which stays there) and the expand weights, by wgmma. The depthwise rows are then taken
from it as in `march`: a lane is a column of RUN output rows; each value, once loaded from shared memory, serves every row whose window
holds it. Their product with the project weights is accumulated in registers. So an expanded value is computed 1.3 times and not 4.5.

Plain Triton has no address of a tile in shared memory. Here every window of the lanes is a contiguous run of the region's pixels, because
of the order they lie in: first by the phase of the column (column modulo STRIDE_W), then by the row modulo RUN * STRIDE_H, then by strip,
then by column (`pixel_of`, `row_start`; docs/decisions/0019).

An idle channel of the expansion (in_channels below DEPTH_IN) holds 1 inside the image, and its weights the bias: the product is then 0
outside, as the padding of the expanded image is, and neither costs an operation for each value.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait

from . import launch

NAN = gl.constexpr(tl.PropagateNan.ALL)
RUNTIME = ("H", "W", "OH", "OW", "in_units", "between_units", "out_units", "pad_h", "pad_w", "tiles_h", "tiles_w")
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name since Triton 3.7


SINGLE = gl.constexpr("{ .reg .b32 a, b; shl.b32 a, $2, 16; and.b32 b, $2, 0xffff0000; mov.b32 $0, a; mov.b32 $1, b; }")


@gluon.constexpr_function
def clamp(dtype, activation):
    """PTX: two fp32 values to 16 bits, at least 0 and, for relu6, at most 6; NaN stays NaN."""
    kind, six = ("bf16x2", "0x40c040c0") if dtype == gl.bfloat16 else ("f16x2", "0x46004600")
    convert = f"cvt.rn.relu.{kind}.f32 $0, $2, $1;"
    return f"{{ .reg .b32 six; mov.b32 six, {six}; {convert} min.NaN.{kind} $0, $0, six; }}" if activation == "relu6" else convert


@gluon.constexpr_function
def up(n):
    """The next power of two, which tensors need."""
    return 1 << (n - 1).bit_length()


@gluon.constexpr_function
def shared(columns):
    """16-bit elements, as wgmma reads them."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * columns), element_bitwidth=16, rank=2)


@gluon.constexpr_function
def padded(rows, columns):
    """Rows 16 bytes apart: wgmma's results, four bytes a thread from eight rows, are then stored without bank conflicts."""
    return gl.PaddedSharedLayout.with_identity_for([[columns, 8]], [rows, columns], [1, 0])


@gluon.constexpr_function
def wide(columns, warps):
    """16 bytes a thread."""
    across = min(columns // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // across, across], [warps, 1], [1, 0])


@gluon.constexpr_function
def lane_layout(lanes, depth, warps):
    """16 bytes a thread, so that eight neighbouring threads read the padded rows without bank conflicts: at DEPTH 32, rows r and r + 4."""
    if depth != 32 or lanes < 8:
        return wide(depth, warps)
    rows = [[1 << bit, 0] for bit in range(3, lanes.bit_length() - 1)]
    count = warps.bit_length() - 1
    spread = rows[:count] + [[0, 0]] * (count - len(rows[:count]))
    lane = [[0, 8], [0, 16], [4, 0], [1, 0], [2, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [0, 4], *rows[count:]], lane, spread, [], [lanes, depth])


@gluon.constexpr_function
def product(slots, channels, warps):
    """wgmma's layout of the result: warps along its pixels first."""
    rows = min(warps, slots // 16)
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[rows, warps // rows], instr_shape=[16, max(8, channels * rows // warps), 16]
    )


@gluon.constexpr_function
def row_start(row, strips, period, extra, wide_columns):
    """Where, within a column phase, the region's row `row` of the first strip begins."""
    return (row % period * strips + min(row % period, extra) + row // period) * wide_columns


@gluon.jit
def pixel_of(
    p, STRIPS: gl.constexpr, PERIOD: gl.constexpr, EXTRA: gl.constexpr, ROWS: gl.constexpr, WIDE_COLUMNS: gl.constexpr,
    STRIDE_W: gl.constexpr,
):  # fmt: skip
    """(row, column) in the region of its p-th pixel, and whether there is one. The first EXTRA residues have a row beyond the strips."""
    phase = p // (ROWS * WIDE_COLUMNS)
    place = p % (ROWS * WIDE_COLUMNS) // WIDE_COLUMNS
    column = p % WIDE_COLUMNS
    late = place - EXTRA * (STRIPS + 1)
    residue = gl.where(late < 0, place // (STRIPS + 1), EXTRA + late // STRIPS)
    quotient = gl.where(late < 0, place % (STRIPS + 1), late % STRIPS)
    return quotient * PERIOD + residue, column * STRIDE_W + phase, phase < STRIDE_W


@gluon.jit
def await_previous(PDL: gl.constexpr):
    """As epilogue.await_previous, whose functions Gluon does not take."""
    if PDL:
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )  # fmt: skip


@gluon.jit
def activate(x, ACTIVATION: gl.constexpr):
    """As epilogue.activate."""
    if ACTIVATION == "relu":
        x = gl.maximum(x, 0.0, propagate_nan=NAN)
    elif ACTIVATION == "relu6":
        x = gl.minimum(gl.maximum(x, 0.0, propagate_nan=NAN), 6.0, propagate_nan=NAN)
    elif ACTIVATION == "hardswish":
        x = x * gl.minimum(gl.maximum(x + 3.0, 0.0, propagate_nan=NAN), 6.0, propagate_nan=NAN) * (1.0 / 6.0)
    elif ACTIVATION == "hardsigmoid":
        x = gl.minimum(gl.maximum(x + 3.0, 0.0, propagate_nan=NAN), 6.0, propagate_nan=NAN) * (1.0 / 6.0)
    elif ACTIVATION == "silu":
        x = x / (1.0 + gl.exp(-x))
    elif ACTIVATION == "sigmoid":
        x = 1.0 / (1.0 + gl.exp(-x))
    else:
        gl.static_assert(ACTIVATION is None, "unknown activation")
    return x


@gluon.jit
def rounded(x, ACTIVATION: gl.constexpr, dtype: gl.constexpr):
    """activate(x) in 16 bits. Two values an instruction where clamping after rounding gives the same."""
    if ACTIVATION == "relu" or ACTIVATION == "relu6":
        if dtype == gl.bfloat16:  # its name, for a constexpr is none to this function
            x = gl.inline_asm_elementwise(clamp(dtype, ACTIVATION), "=r,f,f", [x], dtype=gl.bfloat16, is_pure=True, pack=2)
        else:
            x = gl.inline_asm_elementwise(clamp(dtype, ACTIVATION), "=r,f,f", [x], dtype=gl.float16, is_pure=True, pack=2)
    else:
        x = activate(x, ACTIVATION).to(dtype)
    return x


@gluon.jit
def kept(x, keep):
    """x where keep is -1, 0 where it is 0, two values an instruction."""
    return gl.inline_asm_elementwise(
        "and.b32 $0, $1, $2;", "=r,r,r", [x.to(gl.int16, bitcast=True), keep], dtype=gl.int16, is_pure=True, pack=2
    ).to(x.dtype, bitcast=True)  # fmt: skip


@gluon.jit
def single(x):
    """x in fp32: of two bf16 values, which lie in one register, each by one instruction."""
    if x.dtype == gl.bfloat16:
        x = gl.inline_asm_elementwise(SINGLE, "=f,=f,r", [x], dtype=gl.float32, is_pure=True, pack=2)
    else:
        x = x.to(gl.float32)
    return x


@gluon.jit
def put(rows, R: gl.constexpr, tile):
    return rows[:R] + (tile,) + rows[R + 1 :]


@gluon.jit
def window(region, start, dtype: gl.constexpr, LANES: gl.constexpr, DEPTH: gl.constexpr, layout: gl.constexpr):
    """LANES pixels of the region from `start` on."""
    return region.index(start * (DEPTH // 8 + 1))._reinterpret(dtype, [LANES, DEPTH], padded(LANES, DEPTH)).load(layout)


@gluon.jit
def depthwise_row(rows, x, taps, ROW: gl.constexpr, K: gl.constexpr, STRIDE_H: gl.constexpr, RUN: gl.constexpr):
    """As march.depthwise_row, with the taps of one column."""
    for kh in gl.static_range(K):
        if kh <= ROW and (ROW - kh) % STRIDE_H == 0 and (ROW - kh) // STRIDE_H < RUN:
            w = taps[kh]
            rows = put(rows, (ROW - kh) // STRIDE_H, rows[(ROW - kh) // STRIDE_H] + x * w[None, :])
    return rows


@gluon.jit
def expand_weights(expand_ptr, expand_bias_ptr, e, c, C, E, SPARE: gl.constexpr):
    """(DEPTH, DEPTH_IN), the bias in the channel after the last if one is spare."""
    w = gl.load(expand_ptr + e[:, None] * C + c[None, :], mask=(e < E)[:, None] & (c < C)[None, :], other=0.0)
    if SPARE and expand_bias_ptr is not None:
        bias = gl.load(expand_bias_ptr + e, mask=e < E, other=0.0)
        w = gl.where((c == C)[None, :], bias[:, None], w)
    return w


@gluon.jit
def outputs(
    LAYOUT: gl.constexpr, first_h, first_w, OH, OW, O,  # noqa: E741
    STRIPS: gl.constexpr, RUN: gl.constexpr, COLUMNS: gl.constexpr, LANES: gl.constexpr, WIDE_COLUMNS: gl.constexpr,
    SLOTS: gl.constexpr, CHANNELS: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Where in an image of results each of the program's belongs, and whether it does."""
    slot = gl.arange(0, SLOTS, layout=gl.SliceLayout(1, LAYOUT))
    o = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, LAYOUT))
    strip = slot % LANES // WIDE_COLUMNS
    column = slot % LANES % WIDE_COLUMNS
    oh = first_h + strip * RUN + slot // LANES
    ow = first_w + column
    valid = (slot < RUN * LANES) & (strip < STRIPS) & (column < COLUMNS) & (oh < OH) & (ow < OW)
    if WIDE:
        oh = oh.to(gl.int64)
    return (oh * OW + ow)[:, None] * O + o[None, :], valid[:, None] & (o < O)[None, :]


@gluon.jit(do_not_specialize=RUNTIME)
def staged_kernel(
    x_ptr, expand_ptr, expand_bias_ptr, taps_ptr, depthwise_bias_ptr, project_ptr, project_bias_ptr, residual_ptr, y_ptr, sums_ptr,
    H, W, OH, OW, in_units, between_units, out_units, pad_h, pad_w, tiles_h, tiles_w,
    K: gl.constexpr, STRIDE_H: gl.constexpr, STRIDE_W: gl.constexpr,
    ALIGN_IN: gl.constexpr, ALIGN_BETWEEN: gl.constexpr, ALIGN_OUT: gl.constexpr, WIDE: gl.constexpr,
    EXPAND: gl.constexpr, PROJECT: gl.constexpr, SPARE: gl.constexpr, PARTIAL: gl.constexpr,
    EXPAND_ACTIVATION: gl.constexpr, DEPTHWISE_ACTIVATION: gl.constexpr, ACTIVATION: gl.constexpr,
    STRIPS: gl.constexpr, RUN: gl.constexpr, COLUMNS: gl.constexpr, CHANNELS: gl.constexpr, DEPTH: gl.constexpr, DEPTH_IN: gl.constexpr,
    WARPS: gl.constexpr, PDL: gl.constexpr = False,
):  # fmt: skip
    """One program: STRIPS * RUN rows by COLUMNS columns of one image's output, all its channels. x, residual, y: NHWC; taps: (K*K, E).

    EXPAND: weights (E, C) before, otherwise E = C. PROJECT: weights (O, E) after, otherwise y is the depthwise result and sums
    (N, tiles, E) in fp32 what the tile adds to its mean. SPARE: in_channels < DEPTH_IN. PARTIAL: DEPTH does not divide E.
    """
    C = in_units * ALIGN_IN
    E = between_units * ALIGN_BETWEEN
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    PERIOD: gl.constexpr = RUN * STRIDE_H
    EXTRA: gl.constexpr = K - STRIDE_H
    ROWS: gl.constexpr = STRIPS * PERIOD + EXTRA
    WIDE_COLUMNS: gl.constexpr = COLUMNS + (K - 1) // STRIDE_W
    LANES: gl.constexpr = up(STRIPS * WIDE_COLUMNS)
    PIXELS: gl.constexpr = up(STRIDE_W * ROWS * WIDE_COLUMNS)
    SLOTS: gl.constexpr = max(64, up(RUN) * LANES)
    X_DEPTH: gl.constexpr = DEPTH_IN if EXPAND else DEPTH
    gl.static_assert(EXTRA <= PERIOD, "a strip's rows reach beyond the next strip")

    await_previous(PDL)
    pid = gl.program_id(0)
    tile = pid % (tiles_h * tiles_w)
    n = (pid // (tiles_h * tiles_w)).to(gl.int64)
    first_h = tile // tiles_w * (STRIPS * RUN)
    first_w = tile % tiles_w * COLUMNS
    x_image = x_ptr + n * H * W * C

    LOAD: gl.constexpr = wide(X_DEPTH, WARPS)
    ih, iw, inside = pixel_of(
        gl.arange(0, PIXELS, layout=gl.SliceLayout(1, LOAD)), STRIPS, PERIOD, EXTRA, ROWS, WIDE_COLUMNS, STRIDE_W
    )  # fmt: skip
    ih += first_h * STRIDE_H - pad_h
    iw += first_w * STRIDE_W - pad_w
    inside = inside & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
    if WIDE:
        ih = ih.to(gl.int64)
    c = gl.arange(0, X_DEPTH, layout=gl.SliceLayout(0, LOAD))
    x_pixels = x_image + (ih * W + iw)[:, None] * C + c[None, :]

    # 16 bytes are the unit of its addresses
    region = gl.allocate_shared_memory(dtype, [(PIXELS + LANES) * (DEPTH // 8 + 1), 1, 8], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    whole = region.index(0)._reinterpret(dtype, [PIXELS, DEPTH], padded(PIXELS, DEPTH))

    TAPS: gl.constexpr = up(K * K)
    TAPS_W: gl.constexpr = wide(DEPTH, WARPS)
    taps_shared = gl.allocate_shared_memory(dtype, [TAPS, DEPTH], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    tap = gl.arange(0, TAPS, layout=gl.SliceLayout(1, TAPS_W))
    e_of_tap = gl.arange(0, DEPTH, layout=gl.SliceLayout(0, TAPS_W))
    taps_at = taps_ptr + tap[:, None] * E + e_of_tap[None, :]
    taps_tile = gl.load(taps_at, mask=(tap < K * K)[:, None] & (e_of_tap < E)[None, :], other=0.0)

    if EXPAND:
        x = gl.load(x_pixels, mask=inside[:, None] & (c < C)[None, :], other=0.0)
        if SPARE and expand_bias_ptr is not None:
            x = gl.where((c == C)[None, :], inside.to(dtype)[:, None], x)
        x_shared = gl.allocate_shared_memory(dtype, [PIXELS, DEPTH_IN], shared(DEPTH_IN))
        x_shared.store(x)
        expand_shared = gl.allocate_shared_memory(dtype, [DEPTH, DEPTH_IN], shared(DEPTH_IN))
        EXPAND_W: gl.constexpr = wide(DEPTH_IN, WARPS)
        e_row = gl.arange(0, DEPTH, layout=gl.SliceLayout(1, EXPAND_W))
        c_row = gl.arange(0, DEPTH_IN, layout=gl.SliceLayout(0, EXPAND_W))
        expand_tile = expand_weights(expand_ptr, expand_bias_ptr, e_row, c_row, C, E, SPARE)
        EXPANDED: gl.constexpr = product(PIXELS, DEPTH, WARPS)
        # outside the image: 0 by the product, unless a bias was added to it, or the activation of 0 is none
        MASKED: gl.constexpr = (expand_bias_ptr is not None and not SPARE) or EXPAND_ACTIVATION == "hardsigmoid"
        if MASKED:
            ih_e, iw_e, inside_e = pixel_of(
                gl.arange(0, PIXELS, layout=gl.SliceLayout(1, EXPANDED)), STRIPS, PERIOD, EXTRA, ROWS, WIDE_COLUMNS, STRIDE_W
            )  # fmt: skip
            ih_e += first_h * STRIDE_H - pad_h
            iw_e += first_w * STRIDE_W - pad_w
            inside_e = inside_e & (ih_e >= 0) & (ih_e < H) & (iw_e >= 0) & (iw_e < W)
            e_column = gl.arange(0, DEPTH, layout=gl.SliceLayout(0, EXPANDED))

    MARCH: gl.constexpr = lane_layout(LANES, DEPTH, WARPS)
    if PROJECT:
        O = out_units * ALIGN_OUT  # noqa: E741
        rows_shared = gl.allocate_shared_memory(dtype, [SLOTS, DEPTH], shared(DEPTH))
        project_shared = gl.allocate_shared_memory(dtype, [CHANNELS, DEPTH], shared(DEPTH))
        PROJECT_W: gl.constexpr = wide(DEPTH, WARPS)
        o_row = gl.arange(0, CHANNELS, layout=gl.SliceLayout(1, PROJECT_W))
        e_of_w = gl.arange(0, DEPTH, layout=gl.SliceLayout(0, PROJECT_W))
        project_w = project_ptr + o_row[:, None] * E + e_of_w[None, :]
        project_tile = gl.load(project_w, mask=(o_row < O)[:, None] & (e_of_w < E)[None, :], other=0.0)
        # the sums begin with bias and residual, whose pixels x has just brought into L1
        SUMS: gl.constexpr = product(SLOTS, CHANNELS, WARPS)
        y_at, y_mask = outputs(SUMS, first_h, first_w, OH, OW, O, STRIPS, RUN, COLUMNS, LANES, WIDE_COLUMNS, SLOTS, CHANNELS, WIDE)
        acc = gl.zeros((SLOTS, CHANNELS), gl.float32, layout=SUMS)
        y_image = n * OH * OW * O
        if residual_ptr is not None:
            acc += gl.load(residual_ptr + y_image + y_at, mask=y_mask, other=0.0).to(gl.float32)
        if project_bias_ptr is not None:
            o = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, SUMS))
            acc += gl.load(project_bias_ptr + o, mask=o < O, other=0.0).to(gl.float32)[None, :]
        acc = warpgroup_mma_init(acc)
    else:
        lane = gl.arange(0, LANES, layout=gl.SliceLayout(1, MARCH))
        lane_h = first_h + lane // WIDE_COLUMNS * RUN
        lane_w = first_w + lane % WIDE_COLUMNS
        y_image = y_ptr + n * OH * OW * E
        lane_valid = (lane // WIDE_COLUMNS < STRIPS) & (lane % WIDE_COLUMNS < COLUMNS) & (lane_w < OW)

    # Weights and taps are loaded a chunk ahead, once the rows have left their registers (x without an expansion is not). A barrier after
    # each of expand weights, region and rows is written.
    gl.assume(E > 0)
    for e0 in range(0, E, DEPTH):
        if EXPAND:
            expand_shared.store(expand_tile)
            fence_async_shared()
            zero = gl.zeros((PIXELS, DEPTH), gl.float32, layout=EXPANDED)
            value = warpgroup_mma(x_shared, expand_shared.permute((1, 0)), zero, is_async=True)
            if PROJECT:
                value, acc = warpgroup_mma_wait(0, deps=[value, acc])
            else:
                value = warpgroup_mma_wait(0, deps=[value])
            if expand_bias_ptr is not None and not SPARE:
                value += gl.load(expand_bias_ptr + e0 + e_column, mask=e0 + e_column < E, other=0.0).to(gl.float32)[None, :]
            if MASKED:
                value = gl.where(inside_e[:, None], value, 0.0)
            value = rounded(value, EXPAND_ACTIVATION, dtype)
            if EXPAND_ACTIVATION == "hardsigmoid":
                value = gl.where(inside_e[:, None], value, gl.zeros_like(value))
            whole.store(value)
        else:
            if PROJECT:
                acc = warpgroup_mma_wait(0, deps=[acc])
            whole.store(gl.load(x_pixels + e0, mask=inside[:, None] & (e0 + c < C)[None, :], other=0.0))
        taps_shared._reinterpret(dtype, [TAPS, DEPTH], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])).store(taps_tile)
        if PROJECT:
            project_shared.store(project_tile)
        barrier()  # here and not in the loop below

        e = e0 + gl.arange(0, DEPTH, layout=gl.SliceLayout(0, MARCH))
        first = gl.zeros((LANES, DEPTH), gl.float32, layout=MARCH)  # the bias, so that adding it costs nothing
        if depthwise_bias_ptr is not None:
            first += gl.load(depthwise_bias_ptr + e, mask=e < E, other=0.0).to(gl.float32)[None, :]
        rows = ()
        for _ in gl.static_range(RUN):
            rows = rows + (first,)
        for kw in range(K):  # not unrolled: the taps of one column stay in registers
            phase = kw % STRIDE_W * (ROWS * WIDE_COLUMNS) + kw // STRIDE_W
            taps = ()
            for kh in gl.static_range(K):
                w = taps_shared.index(kh * K + kw).load(gl.SliceLayout(0, MARCH))
                w = single(w)
                taps = taps + (w,)
            for row in gl.static_range((RUN - 1) * STRIDE_H + K):
                x_row = window(region, phase + row_start(row, STRIPS, PERIOD, EXTRA, WIDE_COLUMNS), dtype, LANES, DEPTH, MARCH)
                x_row = single(x_row)
                rows = depthwise_row(rows, x_row, taps, row, K, STRIDE_H, RUN)
        # the next chunk's, now that the rows above leave registers
        left = E - e0 - DEPTH
        taps_tile = gl.load(taps_at + e0 + DEPTH, mask=(tap < K * K)[:, None] & (e_of_tap < left)[None, :], other=0.0)
        if EXPAND:
            expand_tile = expand_weights(expand_ptr, expand_bias_ptr, e0 + DEPTH + e_row, c_row, C, E, SPARE)
        if PROJECT:
            project_tile = gl.load(project_w + e0 + DEPTH, mask=(o_row < O)[:, None] & (e_of_w < left)[None, :], other=0.0)
            if PARTIAL and EXPAND:
                keep = gl.where(e < E, -1, 0).to(gl.int16)
            for r in gl.static_range(RUN):
                d = rounded(rows[r], DEPTHWISE_ACTIVATION, dtype)
                if PARTIAL and EXPAND:  # an infinite x times the zeros that pad the expand weights is NaN
                    d = kept(d, keep[None, :])
                rows_shared.slice(r * LANES, LANES, 0).store(d)
            fence_async_shared()
            acc = warpgroup_mma(rows_shared, project_shared.permute((1, 0)), acc, is_async=True)
        else:
            total = gl.zeros((LANES, DEPTH), gl.float32, layout=MARCH)
            for r in gl.static_range(RUN):
                d = activate(rows[r], DEPTHWISE_ACTIVATION)
                oh = lane_h + r
                valid = lane_valid & (oh < OH)
                total += gl.where(valid[:, None], d, 0.0)
                if WIDE:
                    oh = oh.to(gl.int64)
                offset = (oh * OW + lane_w)[:, None] * E + e[None, :]
                gl.store(y_image + offset, d.to(dtype), mask=valid[:, None] & (e < E)[None, :])
            gl.store(sums_ptr + pid.to(gl.int64) * E + e, gl.sum(total, 0), mask=e < E)

    if PROJECT:
        OUT: gl.constexpr = wide(CHANNELS, WARPS)
        staging = gl.allocate_shared_memory(dtype, [SLOTS, CHANNELS], padded(SLOTS, CHANNELS))
        staging.store(rounded(warpgroup_mma_wait(0, deps=[acc]), ACTIVATION, dtype))
        y = staging.load(OUT)
        y_at, y_mask = outputs(OUT, first_h, first_w, OH, OW, O, STRIPS, RUN, COLUMNS, LANES, WIDE_COLUMNS, SLOTS, CHANNELS, WIDE)
        gl.store(y_ptr + y_image + y_at, y, mask=y_mask)


def separable(
    x, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, stride, padding, depthwise_activation, activation, residual, tile
) -> torch.Tensor:
    """As `separable.separable`, with a StagedTile; float16 or bfloat16."""
    weights = (None, None, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias)
    return _projected(x, weights, residual, stride, padding, (None, depthwise_activation, activation), tile)


def inverted_residual(
    x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias, residual,
    stride, padding, expand_activation, depthwise_activation, activation, tile,
) -> torch.Tensor:  # fmt: skip
    """As `inverted_residual.inverted_residual`, with a StagedTile; float16 or bfloat16."""
    weights = (expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias)
    return _projected(x, weights, residual, stride, padding, (expand_activation, depthwise_activation, activation), tile)


def expand_depthwise(
    x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, stride, padding, expand_activation, depthwise_activation, tile
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `inverted_residual.expand_depthwise`, with a StagedTile; float16 or bfloat16."""
    n, expanded = x.shape[0], expand_weight.shape[0]
    out = launch.window(x.shape[2:], depthwise_weight.shape[2], stride, padding)
    y = torch.empty((n, expanded, *out), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    sums = torch.empty((n, tile.tiles(*out), 1, expanded), dtype=torch.float32, device=x.device).permute(0, 3, 1, 2)
    if y.numel():
        weights = (expand_weight, expand_bias, depthwise_weight, depthwise_bias, None, None)
        _run(x, weights, None, y, sums, stride, padding, (expand_activation, depthwise_activation, None), tile)
    return y, sums


def _projected(x, weights, residual, stride, padding, activations, tile) -> torch.Tensor:
    """A block that ends in its projection, in the memory format of x; weights as `_run` takes them."""
    taps, project = weights[2], weights[4]
    result, y = launch.outputs(x, (x.shape[0], project.shape[0], *launch.window(x.shape[2:], taps.shape[2], stride, padding)))
    if y.numel() == 0:
        return result
    _run(x, weights, residual, y, None, stride, padding, activations, tile)
    return result if result is y else result.copy_(y)


def _run(x, weights, residual, y, sums, stride, padding, activations, tile) -> None:
    """weights: expand, depthwise and project, each with its bias; sums: for what has no projection."""
    x = launch.nhwc(x)
    expand, _, taps, _, project, _ = weights
    run = _launcher(
        tile, x.device, x.dtype, launch.wide(x, y), tuple(x.shape), tuple(y.shape[2:]), taps.shape[0], expand is not None,
        None if project is None else project.shape[0], taps.shape[2], tuple(stride), tuple(padding), activations,
    )  # fmt: skip
    ordered = [
        launch.dense(tensor) if tensor is None or tensor.dim() == 1 else launch.kernel_order(tensor) for tensor in weights
    ]  # fmt: skip
    run(x, *ordered, launch.nhwc(residual), y, sums)


@functools.lru_cache(maxsize=launch.SHAPES)
def _launcher(
    tile, device, dtype, wide, shape, out, expanded, expands, out_channels, kernel, stride, padding, activations
) -> launch.Launcher:
    n, channels, *size = shape
    depth_in = tile.depth_in(channels)
    align_in, align_between, align_out = map(launch.alignment, (channels, expanded, out_channels or 16))
    tiles_h, tiles_w = triton.cdiv(out[0], tile.strips * tile.run), triton.cdiv(out[1], tile.columns)
    return launch.Launcher(
        staged_kernel, device, n * tiles_h * tiles_w,
        (*size, *out, channels // align_in, expanded // align_between, (out_channels or 0) // align_out, *padding, tiles_h, tiles_w),
        K=kernel, STRIDE_H=stride[0], STRIDE_W=stride[1], ALIGN_IN=align_in, ALIGN_BETWEEN=align_between, ALIGN_OUT=align_out, WIDE=wide,
        EXPAND=expands, PROJECT=out_channels is not None, SPARE=expands and channels < depth_in, PARTIAL=expanded % tile.depth != 0,
        EXPAND_ACTIVATION=activations[0], DEPTHWISE_ACTIVATION=activations[1], ACTIVATION=activations[2],
        STRIPS=tile.strips, RUN=tile.run, COLUMNS=tile.columns, CHANNELS=max(16, triton.next_power_of_2(out_channels or 16)),
        DEPTH=tile.depth, DEPTH_IN=depth_in, WARPS=tile.num_warps, num_warps=tile.num_warps,
        **({"maxnreg": tile.registers} if tile.registers else {}),
    )  # fmt: skip
