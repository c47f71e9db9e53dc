"""Registers the Triton kernels for CUDA. Triton itself is imported when the first one runs."""

import functools
import importlib
import importlib.util
import os

import torch
from torch import Tensor

from fastconv import _extension, reference
from fastconv.ops import _checks

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INT32_MAX = 2**31 - 1


def available() -> str | None:
    """None where the Triton kernels can be imported, else why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if importlib.util.find_spec("fastconv.kernels") is None:
        return "fastconv.kernels is not installed: this checkout's kernels/ folder becomes it on `pip install .` or `pip install -e .`"
    return None


def uncovered(x: Tensor, weight: Tensor, stride: tuple[int, int] | None = None, padding: tuple[int, int] | None = None) -> str | None:
    """Why the Triton kernels do not take these arguments, or None. stride and padding: depthwise only; shapes are already checked."""
    if x.dtype not in DTYPES:
        return f"{x.dtype} on CUDA"
    if x.dtype == torch.bfloat16 and x.is_cuda and _capability(x.device.index) < (8, 0):
        return "bfloat16 before sm_80"
    if weight.numel() > INT32_MAX:
        return f"a weight of {weight.numel()} elements"
    if stride is not None and max(stride) > 2:
        return f"stride {tuple(stride)}"
    if padding is not None and max(padding) >= weight.shape[2]:
        return f"padding {tuple(padding)} around a {weight.shape[2]} x {weight.shape[2]} kernel"
    return None


def uncovered_kernel(kernel_size: tuple[int, ...]) -> str | None:
    """Why the kernels of depthwise gradients, whose operators take any size, do not take this one."""
    return None if tuple(kernel_size) in ((3, 3), (5, 5)) else f"a {kernel_size[0]} x {kernel_size[1]} kernel"


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def uncovered_stem(weight: Tensor) -> str | None:
    """Why the stem's kernel, which takes pixels one by one, does not take this weight."""
    return f"{weight.shape[1]} input channels" if weight.shape[1] > 4 else None


def run(op: str, *arguments, file: str | None = None, **more) -> Tensor:
    """The launcher of `op`, in the file of its name or in another; imports triton when first called."""
    return getattr(_file(file or op), op)(*arguments, **more)


@functools.cache
def _file(name: str):
    return importlib.import_module(f"fastconv.kernels.gpu.{name}")


def check_input(op: str, x: Tensor, weight: Tensor) -> None:
    """What a plan's step still has to ask of its input, the weights being checked: raises TypeError for a dtype, ValueError else."""
    channels = weight.shape[0] if weight.shape[1] == 1 and weight.shape[2] > 1 else weight.shape[1]
    if x.dtype != weight.dtype:
        raise TypeError(f"{op}: x must be {weight.dtype}, as its weights, got {x.dtype}")
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"{op}: x must be (N, {channels}, H, W), got {tuple(x.shape)}")
    if x.device != weight.device:
        raise ValueError(f"{op}: x must be on {weight.device}, as its weights, got {x.device}")


def _run(op: str, why: str | None, file: str | None = None, **arguments) -> Tensor:
    like = next(iter(arguments.values()))  # the image that comes first: x, or a gradient
    if why is None:
        if not like.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(f"{op}: FASTCONV_BACKEND=triton runs CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1)")
        return run(op, file=file, **arguments)
    if _extension.backend() == "triton":
        raise RuntimeError(f"{op}: FASTCONV_BACKEND=triton does not cover {why}")
    y = getattr(reference, op)(**arguments)
    if op == "depthwise_backward_weight":
        return y.contiguous()
    channels_last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    return y.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def depthwise(x, weight, bias=None, stride=(1, 1), padding=(1, 1), activation=None):
    arguments = {"x": x, "weight": weight, "bias": bias, "stride": stride, "padding": padding, "activation": activation}
    _checks.depthwise(**arguments)
    return _run("depthwise", uncovered(x, weight, stride, padding), **arguments)


def depthwise_backward_input(grad, weight, input_size, stride, padding):
    arguments = {"grad": grad, "weight": weight, "input_size": input_size, "stride": stride, "padding": padding}
    _checks.depthwise_backward_input(**arguments)
    why = uncovered_kernel(weight.shape[2:]) or uncovered(grad, weight, stride, padding)
    return _run("depthwise_backward_input", why, "depthwise_backward", **arguments)


def depthwise_backward_weight(grad, x, kernel_size, stride, padding):
    arguments = {"grad": grad, "x": x, "kernel_size": kernel_size, "stride": stride, "padding": padding}
    weight = x.new_empty(_checks.depthwise_backward_weight(**arguments), device="meta")
    why = uncovered_kernel(kernel_size) or uncovered(x, weight, stride, padding)
    return _run("depthwise_backward_weight", why, "depthwise_backward", **arguments)


def pointwise(x, weight, bias=None, residual=None, activation=None):
    arguments = {"x": x, "weight": weight, "bias": bias, "residual": residual, "activation": activation}
    _checks.pointwise(**arguments)
    return _run("pointwise", uncovered(x, weight), **arguments)


def fire_expand(x, weight1x1, bias1x1, weight3x3, bias3x3):
    arguments = {"x": x, "weight1x1": weight1x1, "bias1x1": bias1x1, "weight3x3": weight3x3, "bias3x3": bias3x3}
    _checks.fire_expand(**arguments)
    return _run("fire_expand", uncovered(x, weight3x3), **arguments)


def fire(x, squeeze_weight, squeeze_bias, weight1x1, bias1x1, weight3x3, bias3x3):
    arguments = {"x": x, "squeeze_weight": squeeze_weight, "squeeze_bias": squeeze_bias}
    arguments |= {"weight1x1": weight1x1, "bias1x1": bias1x1, "weight3x3": weight3x3, "bias3x3": bias3x3}
    _checks.fire(**arguments)
    return _run("fire", uncovered(x, weight3x3) or uncovered(x, squeeze_weight), "blocks", **arguments)


def separable(
    x, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias,
    stride=(1, 1), padding=(1, 1), depthwise_activation=None, activation=None, residual=None,
):  # fmt: skip
    arguments = {"x": x, "depthwise_weight": depthwise_weight, "depthwise_bias": depthwise_bias}
    arguments |= {"pointwise_weight": pointwise_weight, "pointwise_bias": pointwise_bias, "stride": stride, "padding": padding}
    arguments |= {"depthwise_activation": depthwise_activation, "activation": activation, "residual": residual}
    _checks.separable(**arguments)
    why = uncovered(x, depthwise_weight, stride, padding) or uncovered(x, pointwise_weight)
    return _run("separable", why, "blocks", **arguments)


def inverted_residual(
    x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias,
    stride=(1, 1), padding=(1, 1), activation="relu6", residual=False,
):  # fmt: skip
    arguments = {"x": x, "expand_weight": expand_weight, "expand_bias": expand_bias}
    arguments |= {"depthwise_weight": depthwise_weight, "depthwise_bias": depthwise_bias}
    arguments |= {"project_weight": project_weight, "project_bias": project_bias, "stride": stride, "padding": padding}
    _checks.inverted_residual(**arguments, activation=activation, residual=residual)
    why = uncovered(x, depthwise_weight, stride, padding) or uncovered(x, expand_weight) or uncovered(x, project_weight)
    if why is not None:
        return _run("inverted_residual", why, **arguments, activation=activation, residual=residual)
    arguments |= {"squeeze_excite_weights": [], "residual": x if residual else None}
    arguments |= {"expand_activation": activation, "depthwise_activation": activation}
    arguments |= {"squeeze_activation": None, "gate_activation": None, "activation": None}
    return _run("inverted_residual", None, "blocks", **arguments)


def stem(x, weight, bias=None, stride=(2, 2), padding=(1, 1), activation=None):
    arguments = {"x": x, "weight": weight, "bias": bias, "stride": stride, "padding": padding, "activation": activation}
    _checks.stem(**arguments)
    return _run("stem", uncovered(x, weight) or uncovered_stem(weight), **arguments)


def max_pool(x, stride=(2, 2), padding=(0, 0), ceil_mode=False):
    _checks.max_pool(x, stride, padding, ceil_mode)
    return _run("max_pool", uncovered(x, x[:0]), x=x, stride=stride, padding=padding, ceil_mode=ceil_mode)


def global_avg_pool(x):
    _checks.global_avg_pool(x)
    return _run("global_avg_pool", uncovered(x, x[:0]), x=x)


KERNELS = (
    depthwise, depthwise_backward_input, depthwise_backward_weight, pointwise, fire_expand, fire, separable, inverted_residual, stem,
    max_pool, global_avg_pool,
)  # fmt: skip


def register() -> None:
    """Gives every operator in KERNELS its CUDA kernel, as FASTCONV_BACKEND asks.

    Raises ImportError where FASTCONV_BACKEND=triton and the kernels cannot be imported; otherwise CUDA tensors then take the reference.
    """
    backend = _extension.backend()
    if backend not in ("auto", "triton"):
        return
    missing = available()
    if missing is None:
        for kernel in KERNELS:
            torch.library.register_kernel(f"fastconv::{kernel.__name__}", "cuda", kernel)
    elif backend == "triton":
        raise ImportError(f"FASTCONV_BACKEND=triton: {missing}")
