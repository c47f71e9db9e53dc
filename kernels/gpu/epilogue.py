"""Device code every kernel shares: its start, the activation, and a dot product that is right in Triton's interpreter too."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def await_previous(PDL: tl.constexpr):
    """Programmatic dependent launch, from Hopper on: the next kernel may be launched while this one runs, and waits here until its
    predecessor has ended and its results are in memory. Nothing is read or written before. (CUDA C++ Programming Guide, 4.5.)"""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _clamp(x, low: tl.constexpr, high: tl.constexpr):
    # propagate_nan costs nothing (one max.NaN instruction) and keeps relu(NaN) NaN, as in ATen
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """`ACTIVATION` of an fp32 tile: None, "relu", "relu6", "hardswish", "hardsigmoid", "silu", or a gate's "sigmoid"."""
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "relu6":
        x = _clamp(x, 0.0, 6.0)
    elif ACTIVATION == "hardswish":
        x = x * _clamp(x + 3.0, 0.0, 6.0) * (1.0 / 6.0)
    elif ACTIVATION == "hardsigmoid":
        x = _clamp(x + 3.0, 0.0, 6.0) * (1.0 / 6.0)
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "sigmoid":
        x = 1.0 / (1.0 + tl.exp(-x))
    else:
        tl.static_assert(ACTIVATION is None, "unknown activation")
    return x


@triton.jit
def dot(x, w, acc, PRECISION: tl.constexpr):
    """acc + x @ w in fp32."""
    if INTERPRETED:  # which multiplies the raw bits of bf16 operands
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    return tl.dot(x, w, acc, input_precision=PRECISION)
