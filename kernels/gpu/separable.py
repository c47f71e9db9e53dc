"""Depthwise, activation and pointwise in one kernel (MobileNet V1's block): the depthwise result is never in device memory.

y[n, p, o] = activation(sum over c of d[n, p, c] * w[o, c] + bias[o] + residual[n, p, o]), d = depthwise_activation(depthwise(x) + its bias)
"""

import functools

import torch
import triton
import triton.language as tl

from . import launch, march
from .configs import Problem, StagedTile, config
from .epilogue import activate, await_previous, dot

RUNTIME = ("H", "W", "OH", "OW", "in_units", "out_units", "pad_h", "pad_w", "tiles", "o_blocks")


@triton.jit(do_not_specialize=RUNTIME)
def separable_kernel(
    x_ptr, taps_ptr, depthwise_bias_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr,
    H, W, OH, OW, in_units, out_units, pad_h, pad_w, tiles, o_blocks,
    K: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, ALIGN_IN: tl.constexpr, ALIGN_OUT: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, DEPTHWISE_ACTIVATION: tl.constexpr, ACTIVATION: tl.constexpr,
    RUN: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """One program: LANES columns of RUN output rows of one image, by CHANNELS. x, residual, y: NHWC; taps: (K*K, C); w: (O, C).

    For each DEPTH input channels: the depthwise rows in registers, then their product with the pointwise weights.
    """
    C = in_units * ALIGN_IN
    O = out_units * ALIGN_OUT  # noqa: E741
    await_previous(PDL)
    # blocks of output channels vary fastest: the programs that share an input tile run together and find it in L2
    pid = tl.program_id(0)
    o = (pid % o_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    o_mask = o < O
    pid = pid // o_blocks
    n = (pid // tiles).to(tl.int64)
    top, ow = march.lanes(pid % tiles, OW, RUN, LANES)
    x_image = x_ptr + n * H * W * C

    acc = march.zeros(RUN, LANES, CHANNELS)
    for c0 in range(0, C, DEPTH):
        c = c0 + tl.arange(0, DEPTH)
        c_mask = c < C
        rows = march.zeros(RUN, LANES, DEPTH)
        for kw in range(K):  # not unrolled: the taps of a column at a time stay in registers
            iw = ow * STRIDE_W - pad_w + kw
            for row in tl.static_range((RUN - 1) * STRIDE_H + K):
                ih = top * STRIDE_H - pad_h + row
                mask = march.inside(ih, iw, H, W)[:, None] & c_mask[None, :]
                x = tl.load(x_image + march.place(ih, iw, W, WIDE)[:, None] * C + c[None, :], mask=mask, other=0.0)
                rows = march.depthwise_row(rows, x, taps_ptr, c, c_mask, C, kw, row, K, STRIDE_H, RUN)
        w = tl.load(w_ptr + o[None, :] * C + c[:, None], mask=c_mask[:, None] & o_mask[None, :], other=0.0)
        for r in tl.static_range(RUN):
            d = rows[r]
            if depthwise_bias_ptr is not None:
                d += tl.load(depthwise_bias_ptr + c, mask=c_mask, other=0.0).to(tl.float32)[None, :]
            d = activate(d, DEPTHWISE_ACTIVATION).to(w.dtype)
            acc = march.put(acc, r, dot(d, w, acc[r], PRECISION))

    for r in tl.static_range(RUN):
        y = acc[r]
        mask = (top + r < OH)[:, None] & o_mask[None, :]
        offset = n * OH * OW * O + march.place(top + r, ow, OW, WIDE)[:, None] * O + o[None, :]
        if bias_ptr is not None:
            y += tl.load(bias_ptr + o, mask=o_mask, other=0.0).to(tl.float32)[None, :]
        if residual_ptr is not None:
            y += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + offset, activate(y, ACTIVATION).to(y_ptr.dtype.element_ty), mask=mask)


def problem(
    x: torch.Tensor, depthwise_weight: torch.Tensor, pointwise_weight: torch.Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> Problem:
    channels, *size = x.shape[1:]
    kernel = depthwise_weight.shape[2]
    out = launch.window(size, kernel, stride, padding)
    geometry = (kernel, tuple(stride), tuple(padding), 0, tuple(size))
    return Problem("separable", launch.kind(x.dtype), *out, channels, pointwise_weight.shape[0], *geometry)


def separable(
    x: torch.Tensor,
    depthwise_weight: torch.Tensor,
    depthwise_bias: torch.Tensor | None,
    pointwise_weight: torch.Tensor,
    pointwise_bias: torch.Tensor | None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    depthwise_activation: str | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    tile=None,
) -> torch.Tensor:
    """x (N, C, H, W), depthwise_weight (C, 1, K, K), pointwise_weight (O, C, 1, 1), residual (N, O, OH, OW); float32, float16 or bfloat16.

    Weights from `launch.kernel_order` are read as they are, others are copied on each call. tile: None for the one that `config` chooses.
    Arguments are not checked.
    """
    tile = tile or config(problem(x, depthwise_weight, pointwise_weight, stride, padding), launch.arch(x.device))
    if isinstance(tile, StagedTile):
        from . import staged

        return staged.separable(
            x, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias,
            stride, padding, depthwise_activation, activation, residual, tile,
        )  # fmt: skip
    n, channels, height, width = x.shape
    out_channels, kernel = pointwise_weight.shape[0], depthwise_weight.shape[2]
    out_h, out_w = launch.window((height, width), kernel, stride, padding)
    result, y = launch.outputs(x, (n, out_channels, out_h, out_w))
    if y.numel() == 0:
        return result
    x = launch.nhwc(x)
    run = _launcher(
        tile, x.device, launch.precision(x.dtype), launch.wide(x, y), n, channels, out_channels, (height, width, out_h, out_w), kernel,
        tuple(stride), tuple(padding), depthwise_activation, activation,
    )  # fmt: skip
    run(
        x, launch.kernel_order(depthwise_weight), launch.dense(depthwise_bias), launch.kernel_order(pointwise_weight),
        launch.dense(pointwise_bias), launch.nhwc(residual), y,
    )  # fmt: skip
    return result if result is y else result.copy_(y)


@functools.lru_cache(maxsize=launch.SHAPES)
def _launcher(
    tile, device, precision, wide, n, channels, out_channels, size, kernel, stride, padding, depthwise_activation, activation
) -> launch.Launcher:
    align_in, align_out = launch.alignment(channels), launch.alignment(out_channels)
    tiles, o_blocks = tile.tiles(*size[2:]), triton.cdiv(out_channels, tile.channels)
    return launch.Launcher(
        separable_kernel, device, n * tiles * o_blocks,
        (*size, channels // align_in, out_channels // align_out, *padding, tiles, o_blocks),
        K=kernel, STRIDE_H=stride[0], STRIDE_W=stride[1], ALIGN_IN=align_in, ALIGN_OUT=align_out, PRECISION=precision, WIDE=wide,
        DEPTHWISE_ACTIVATION=depthwise_activation, ACTIVATION=activation, **tile.constants, **launch.options(tile),
    )  # fmt: skip
