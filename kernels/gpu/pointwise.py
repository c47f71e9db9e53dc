"""Pointwise (1x1) convolution, a matrix product over pixels:

y[m, o] = activation(sum over c of x[m, c] * w[o, c] + bias[o] + residual[m, o]), w scaled by a gate per image and channel if there is one
"""

import functools

import torch
import triton
import triton.language as tl

from . import launch
from .configs import Problem, matmul
from .epilogue import activate, await_previous, dot

RUNTIME = ("M", "image", "in_units", "out_units", "o_blocks")


@triton.jit(do_not_specialize=RUNTIME)
def pointwise_kernel(
    x_ptr, gate_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr,
    M, image, in_units, out_units, o_blocks,
    ALIGN_IN: tl.constexpr, ALIGN_OUT: tl.constexpr, PRECISION: tl.constexpr, ACTIVATION: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """One program: PIXELS of the M = N*H*W pixels by CHANNELS output channels. x, residual, y: NHWC; w: (Cout, Cin), as torch keeps it.

    gate: (N, Cin), what each of an image's `image` pixels is multiplied by. A program's pixels then are of one image, and the gate
    multiplies its weights, which are fewer than its pixels and need no product of their own for each.
    """
    C = in_units * ALIGN_IN
    O = out_units * ALIGN_OUT  # noqa: E741
    await_previous(PDL)
    # blocks of output channels vary fastest, so that the programs sharing an x tile run together and find it in L2
    pid = tl.program_id(0)
    m = tl.arange(0, PIXELS)
    if gate_ptr is not None:
        tiles = tl.cdiv(image, PIXELS)
        n = (pid // o_blocks // tiles).to(tl.int64)
        first = pid // o_blocks % tiles * PIXELS
        start = n.to(tl.int64) * image + first
        m_mask = m < image - first
    else:
        start = (pid // o_blocks).to(tl.int64) * PIXELS
        m_mask = m < M - start
    o = (pid % o_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    o_mask = o < O
    c = tl.arange(0, DEPTH)

    x_tile = x_ptr + start * C + m[:, None] * C + c[None, :]
    w_tile = w_ptr + o[None, :] * C + c[:, None]
    acc = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for c0 in range(0, C, DEPTH):
        c_mask = c < C - c0
        x = tl.load(x_tile + c0, mask=m_mask[:, None] & c_mask[None, :], other=0.0)
        w = tl.load(w_tile + c0, mask=c_mask[:, None] & o_mask[None, :], other=0.0)
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + n * C + c0 + c, mask=c_mask, other=0.0).to(tl.float32)
            w = (w.to(tl.float32) * gate[:, None]).to(w.dtype)
        acc = dot(x, w, acc, PRECISION)

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o, mask=o_mask, other=0.0).to(tl.float32)[None, :]
    offset = m[:, None] * O + o[None, :]
    mask = m_mask[:, None] & o_mask[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + start * O + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + start * O + offset, activate(acc, ACTIVATION).to(y_ptr.dtype.element_ty), mask=mask)


def pointwise(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (N, Cin, H, W), weight (Cout, Cin, 1, 1), bias (Cout,), residual (N, Cout, H, W), gate (N, Cin, 1, 1), one dtype.

    float32, float16 or bfloat16. The gate multiplies x, here by way of the weights. Arguments are not checked.
    """
    n, in_channels, height, width = x.shape
    out_channels = weight.shape[0]
    result, y = launch.outputs(x, (n, out_channels, height, width))
    if y.numel() == 0:
        return result
    x = launch.nhwc(x)
    run = _launcher(x.device, x.dtype, launch.precision(x.dtype), n, in_channels, height, width, out_channels, activation, gate is not None)
    run(x, launch.dense(gate), launch.kernel_order(weight), launch.dense(bias), launch.nhwc(residual), y)
    return result if result is y else result.copy_(y)


@functools.lru_cache(maxsize=launch.SHAPES)
def _launcher(device, dtype, precision, n, in_channels, height, width, out_channels, activation, gated) -> launch.Launcher:
    kind = "tf32" if precision == "tf32" else launch.DTYPES[dtype]
    tile = matmul(Problem("pointwise", kind, height, width, in_channels, out_channels), launch.arch(device), n)
    align_in, align_out = launch.alignment(in_channels), launch.alignment(out_channels)
    image, o_blocks = height * width, triton.cdiv(out_channels, tile.channels)
    tiles = n * triton.cdiv(image, tile.pixels) if gated else triton.cdiv(n * image, tile.pixels)
    return launch.Launcher(
        pointwise_kernel, device, tiles * o_blocks,
        (n * image, image, in_channels // align_in, out_channels // align_out, o_blocks),
        ALIGN_IN=align_in, ALIGN_OUT=align_out, PRECISION=precision, ACTIVATION=activation,
        PIXELS=tile.pixels, CHANNELS=tile.channels, DEPTH=tile.depth, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
