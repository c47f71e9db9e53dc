"""MobileNet V2's and V3's block in one kernel, the expanded tensor never in device memory: 1x1 expand, depthwise, 1x1 project (+ residual).

A program takes the expanded channels in chunks of DEPTH. For each it multiplies the strip's input rows, once per column of the window,
by the expand weights, on tensor cores; adds the products' activations to the depthwise rows in registers; and multiplies those by the
project weights. So each expanded value is computed about K * (1 + (K - 1) / RUN) times and stored never (docs/decisions/0011).

Squeeze-excitation needs the mean of the depthwise result before the projection can start: `expand_depthwise` stops there, writes the
result and the sums of its tiles, and the projection scales what it loads (`pointwise`).
"""

import functools

import torch
import triton
import triton.language as tl

from . import launch, march
from .configs import Problem, StagedTile, config
from .epilogue import activate, await_previous, dot

RUNTIME = ("H", "W", "OH", "OW", "in_units", "between_units", "out_units", "pad_h", "pad_w", "tiles", "o_blocks", "e_blocks")


@triton.jit
def _expanded(
    x_image, expand_ptr, expand_bias_ptr, taps_ptr, depthwise_bias_ptr, top, ow, e, H, W, C, E, pad_h, pad_w,
    K: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    EXPAND_ACTIVATION: tl.constexpr, DEPTHWISE_ACTIVATION: tl.constexpr, STEPS: tl.constexpr,
    RUN: tl.constexpr, LANES: tl.constexpr, DEPTH: tl.constexpr, DEPTH_IN: tl.constexpr,
):  # fmt: skip
    """The block's depthwise rows for expanded channels e: RUN tiles (LANES, DEPTH) in fp32. STEPS: 1 where DEPTH_IN holds all C."""
    e_mask = e < E
    ci = tl.arange(0, DEPTH_IN)
    expand_bias = tl.zeros((DEPTH,), tl.float32)
    if expand_bias_ptr is not None:
        expand_bias += tl.load(expand_bias_ptr + e, mask=e_mask, other=0.0).to(tl.float32)
    if STEPS == 1:
        w = tl.load(expand_ptr + e[None, :] * C + ci[:, None], mask=(ci < C)[:, None] & e_mask[None, :], other=0.0)
    rows = march.zeros(RUN, LANES, DEPTH)
    for kw in range(K):
        iw = ow * STRIDE_W - pad_w + kw
        for row in tl.static_range((RUN - 1) * STRIDE_H + K):
            ih = top * STRIDE_H - pad_h + row
            pixel = march.inside(ih, iw, H, W)
            x_row = x_image + march.place(ih, iw, W, WIDE)[:, None] * C
            value = tl.zeros((LANES, DEPTH), tl.float32)
            if STEPS == 1:
                x = tl.load(x_row + ci[None, :], mask=pixel[:, None] & (ci < C)[None, :], other=0.0)
                value = dot(x, w, value, PRECISION)
            else:
                for c0 in range(0, C, DEPTH_IN):
                    c = c0 + ci
                    x = tl.load(x_row + c[None, :], mask=pixel[:, None] & (c < C)[None, :], other=0.0)
                    w = tl.load(expand_ptr + e[None, :] * C + c[:, None], mask=(c < C)[:, None] & e_mask[None, :], other=0.0)
                    value = dot(x, w, value, PRECISION)
            value = activate(value + expand_bias[None, :], EXPAND_ACTIVATION)
            # Padding surrounds the expanded image, not x: there it is 0, not the activation of the bias. Channels past the last are 0 for
            # their product with the padding of the project weights: an infinite x has made them NaN.
            value = tl.where(pixel[:, None] & e_mask[None, :], value, 0.0)
            rows = march.depthwise_row(rows, value, taps_ptr, e, e_mask, E, kw, row, K, STRIDE_H, RUN)
    bias = tl.zeros((DEPTH,), tl.float32)
    if depthwise_bias_ptr is not None:
        bias += tl.load(depthwise_bias_ptr + e, mask=e_mask, other=0.0).to(tl.float32)
    for r in tl.static_range(RUN):
        rows = march.put(rows, r, activate(rows[r] + bias[None, :], DEPTHWISE_ACTIVATION))
    return rows


@triton.jit(do_not_specialize=RUNTIME)
def inverted_residual_kernel(
    x_ptr, expand_ptr, expand_bias_ptr, taps_ptr, depthwise_bias_ptr, project_ptr, project_bias_ptr, residual_ptr, y_ptr,
    H, W, OH, OW, in_units, between_units, out_units, pad_h, pad_w, tiles, o_blocks,
    K: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    ALIGN_IN: tl.constexpr, ALIGN_BETWEEN: tl.constexpr, ALIGN_OUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    EXPAND_ACTIVATION: tl.constexpr, DEPTHWISE_ACTIVATION: tl.constexpr, ACTIVATION: tl.constexpr, STEPS: tl.constexpr,
    RUN: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, DEPTH_IN: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """One program: LANES columns of RUN output rows of one image, by CHANNELS. x, residual, y: NHWC; taps: (K*K, E); weights: (out, in)."""
    C = in_units * ALIGN_IN
    E = between_units * ALIGN_BETWEEN
    O = out_units * ALIGN_OUT  # noqa: E741
    await_previous(PDL)
    pid = tl.program_id(0)
    o = (pid % o_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    o_mask = o < O
    pid = pid // o_blocks
    n = (pid // tiles).to(tl.int64)
    top, ow = march.lanes(pid % tiles, OW, RUN, LANES)

    acc = march.zeros(RUN, LANES, CHANNELS)
    for e0 in range(0, E, DEPTH):
        e = e0 + tl.arange(0, DEPTH)
        rows = _expanded(
            x_ptr + n * H * W * C, expand_ptr, expand_bias_ptr, taps_ptr, depthwise_bias_ptr, top, ow, e, H, W, C, E, pad_h, pad_w,
            K, STRIDE_H, STRIDE_W, PRECISION, WIDE, EXPAND_ACTIVATION, DEPTHWISE_ACTIVATION, STEPS, RUN, LANES, DEPTH, DEPTH_IN,
        )  # fmt: skip
        w = tl.load(project_ptr + o[None, :] * E + e[:, None], mask=(e < E)[:, None] & o_mask[None, :], other=0.0)
        for r in tl.static_range(RUN):
            acc = march.put(acc, r, dot(rows[r].to(w.dtype), w, acc[r], PRECISION))

    for r in tl.static_range(RUN):
        y = acc[r]
        mask = (top + r < OH)[:, None] & o_mask[None, :]
        offset = n * OH * OW * O + march.place(top + r, ow, OW, WIDE)[:, None] * O + o[None, :]
        if project_bias_ptr is not None:
            y += tl.load(project_bias_ptr + o, mask=o_mask, other=0.0).to(tl.float32)[None, :]
        if residual_ptr is not None:
            y += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + offset, activate(y, ACTIVATION).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def expand_depthwise_kernel(
    x_ptr, expand_ptr, expand_bias_ptr, taps_ptr, depthwise_bias_ptr, y_ptr, sums_ptr,
    H, W, OH, OW, in_units, between_units, pad_h, pad_w, tiles, e_blocks,
    K: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, ALIGN_IN: tl.constexpr, ALIGN_BETWEEN: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, EXPAND_ACTIVATION: tl.constexpr, DEPTHWISE_ACTIVATION: tl.constexpr,
    STEPS: tl.constexpr, RUN: tl.constexpr, LANES: tl.constexpr, DEPTH: tl.constexpr, DEPTH_IN: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """One program: LANES columns of RUN rows of one image by DEPTH expanded channels, and their sum. y: NHWC; sums: (N, tiles, E) fp32."""
    C = in_units * ALIGN_IN
    E = between_units * ALIGN_BETWEEN
    await_previous(PDL)
    pid = tl.program_id(0)
    e = (pid % e_blocks) * DEPTH + tl.arange(0, DEPTH)
    pid = pid // e_blocks
    n = (pid // tiles).to(tl.int64)
    top, ow = march.lanes(pid % tiles, OW, RUN, LANES)
    rows = _expanded(
        x_ptr + n * H * W * C, expand_ptr, expand_bias_ptr, taps_ptr, depthwise_bias_ptr, top, ow, e, H, W, C, E, pad_h, pad_w,
        K, STRIDE_H, STRIDE_W, PRECISION, WIDE, EXPAND_ACTIVATION, DEPTHWISE_ACTIVATION, STEPS, RUN, LANES, DEPTH, DEPTH_IN,
    )  # fmt: skip
    total = tl.zeros((LANES, DEPTH), tl.float32)
    for r in tl.static_range(RUN):
        total += tl.where((top + r < OH)[:, None], rows[r], 0.0)
        mask = (top + r < OH)[:, None] & (e < E)[None, :]
        offset = n * OH * OW * E + march.place(top + r, ow, OW, WIDE)[:, None] * E + e[None, :]
        tl.store(y_ptr + offset, rows[r].to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(sums_ptr + pid.to(tl.int64) * E + e, tl.sum(total, 0), mask=e < E)


def problem(
    op: str,
    x: torch.Tensor,
    depthwise_weight: torch.Tensor,
    out_channels: int,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Problem:
    """op: "inverted_residual", or "expand_depthwise", whose output has the expanded channels."""
    channels, *size = x.shape[1:]
    kernel = depthwise_weight.shape[2]
    out = launch.window(size, kernel, stride, padding)
    geometry = (kernel, tuple(stride), tuple(padding), depthwise_weight.shape[0], tuple(size))
    return Problem(op, launch.kind(x.dtype), *out, channels, out_channels, *geometry)


def inverted_residual(
    x: torch.Tensor,
    expand_weight: torch.Tensor,
    expand_bias: torch.Tensor | None,
    depthwise_weight: torch.Tensor,
    depthwise_bias: torch.Tensor | None,
    project_weight: torch.Tensor,
    project_bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    expand_activation: str | None = "relu6",
    depthwise_activation: str | None = "relu6",
    activation: str | None = None,
    tile=None,
) -> torch.Tensor:
    """x (N, C, H, W), expand_weight (E, C, 1, 1), depthwise_weight (E, 1, K, K), project_weight (O, E, 1, 1), residual (N, O, OH, OW).

    One dtype: float32, float16 or bfloat16. Weights from `launch.kernel_order` are read as they are, others are copied on each call.
    tile: None for the one that `config` chooses. Arguments are not checked.
    """
    expanded, out_channels, kernel = expand_weight.shape[0], project_weight.shape[0], depthwise_weight.shape[2]
    tile = tile or config(problem("inverted_residual", x, depthwise_weight, out_channels, stride, padding), launch.arch(x.device))
    if isinstance(tile, StagedTile):
        from . import staged

        return staged.inverted_residual(
            x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias, residual,
            stride, padding, expand_activation, depthwise_activation, activation, tile,
        )  # fmt: skip
    n, channels, height, width = x.shape
    out_h, out_w = launch.window((height, width), kernel, stride, padding)
    result, y = launch.outputs(x, (n, out_channels, out_h, out_w))
    if y.numel() == 0:
        return result
    x = launch.nhwc(x)
    run = _launcher(
        tile, x.device, launch.precision(x.dtype), launch.wide(x, y), n, channels, expanded, out_channels, (height, width, out_h, out_w),
        kernel, tuple(stride), tuple(padding), expand_activation, depthwise_activation, activation,
    )  # fmt: skip
    run(
        x, launch.kernel_order(expand_weight), launch.dense(expand_bias), launch.kernel_order(depthwise_weight),
        launch.dense(depthwise_bias), launch.kernel_order(project_weight), launch.dense(project_bias), launch.nhwc(residual), y,
    )  # fmt: skip
    return result if result is y else result.copy_(y)


@functools.lru_cache(maxsize=launch.SHAPES)
def _launcher(
    tile, device, precision, wide, n, channels, expanded, out_channels, size, kernel, stride, padding,
    expand_activation, depthwise_activation, activation,
) -> launch.Launcher:  # fmt: skip
    align_in, align_between, align_out = map(launch.alignment, (channels, expanded, out_channels))
    tiles, o_blocks = tile.tiles(*size[2:]), triton.cdiv(out_channels, tile.channels)
    return launch.Launcher(
        inverted_residual_kernel, device, n * tiles * o_blocks,
        (*size, channels // align_in, expanded // align_between, out_channels // align_out, *padding, tiles, o_blocks),
        K=kernel, STRIDE_H=stride[0], STRIDE_W=stride[1], ALIGN_IN=align_in, ALIGN_BETWEEN=align_between, ALIGN_OUT=align_out,
        PRECISION=precision, WIDE=wide, EXPAND_ACTIVATION=expand_activation, DEPTHWISE_ACTIVATION=depthwise_activation,
        ACTIVATION=activation, STEPS=launch.steps(channels, tile.depth_in), **tile.constants, DEPTH_IN=tile.depth_in,
        **launch.options(tile),
    )  # fmt: skip


def expand_depthwise(
    x: torch.Tensor,
    expand_weight: torch.Tensor,
    expand_bias: torch.Tensor | None,
    depthwise_weight: torch.Tensor,
    depthwise_bias: torch.Tensor | None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    expand_activation: str | None = "relu6",
    depthwise_activation: str | None = "relu6",
    tile=None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first half of `inverted_residual`: ((N, E, OH, OW) channels_last, the sums of its tiles in fp32 as (N, E, tiles, 1))."""
    expanded, kernel = expand_weight.shape[0], depthwise_weight.shape[2]
    tile = tile or config(problem("expand_depthwise", x, depthwise_weight, expanded, stride, padding), launch.arch(x.device))
    if isinstance(tile, StagedTile):
        from . import staged

        return staged.expand_depthwise(
            x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, stride, padding, expand_activation, depthwise_activation, tile
        )  # fmt: skip
    n, channels, height, width = x.shape
    out_h, out_w = launch.window((height, width), kernel, stride, padding)
    x = launch.nhwc(x)
    _, y = launch.outputs(x, (n, expanded, out_h, out_w))
    tiles = tile.tiles(out_h, out_w)
    sums = torch.empty((n, tiles, 1, expanded), dtype=torch.float32, device=x.device).permute(0, 3, 1, 2)
    if y.numel() == 0:
        return y, sums
    run = _expand_depthwise_launcher(
        tile, x.device, launch.precision(x.dtype), launch.wide(x, y), n, channels, expanded, (height, width, out_h, out_w), kernel,
        tuple(stride), tuple(padding), expand_activation, depthwise_activation,
    )  # fmt: skip
    run(
        x, launch.kernel_order(expand_weight), launch.dense(expand_bias), launch.kernel_order(depthwise_weight),
        launch.dense(depthwise_bias), y, sums,
    )  # fmt: skip
    return y, sums


@functools.lru_cache(maxsize=launch.SHAPES)
def _expand_depthwise_launcher(
    tile, device, precision, wide, n, channels, expanded, size, kernel, stride, padding, expand_activation, depthwise_activation
) -> launch.Launcher:
    align_in, align_between = launch.alignment(channels), launch.alignment(expanded)
    tiles, e_blocks = tile.tiles(*size[2:]), triton.cdiv(expanded, tile.depth)
    return launch.Launcher(
        expand_depthwise_kernel, device, n * tiles * e_blocks,
        (*size, channels // align_in, expanded // align_between, *padding, tiles, e_blocks),
        K=kernel, STRIDE_H=stride[0], STRIDE_W=stride[1], ALIGN_IN=align_in, ALIGN_BETWEEN=align_between, PRECISION=precision, WIDE=wide,
        EXPAND_ACTIVATION=expand_activation, DEPTHWISE_ACTIVATION=depthwise_activation, STEPS=launch.steps(channels, tile.depth_in),
        RUN=tile.run, LANES=tile.lanes, DEPTH=tile.depth, DEPTH_IN=tile.depth_in, **launch.options(tile),
    )  # fmt: skip
