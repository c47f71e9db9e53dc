"""Gives every public operator what its schema does not: fake kernel, autograd, autocast, and a kernel for any device.

The dispatcher is the only switch. Below autograd and autocast it picks, per device: the compiled kernel (CPU), the Triton kernel
(CUDA), or the CompositeExplicitAutograd kernel registered here. A forced backend replaces these kernels, never the callers.
"""

import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from fastconv import _extension, reference
from fastconv.ops import _checks, _coverage, _cuda, _gradients, _schemas, _vmap

library = torch.library.Library("fastconv", "FRAGMENT")
if not _extension.available:
    _schemas.define(library)


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout of every public operator's output: that of its input, NCHW where both describe it."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def overload(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.fastconv, name).default


def has_cpu_kernel(name: str) -> bool:
    return _extension.available and torch._C._dispatch_has_kernel_for_dispatch_key(f"fastconv::{name}", "CPU")


def register(
    name: str, composite: Callable[..., Tensor] | None = None, autocast: bool = True, like_input: bool = True
) -> Callable[..., Tensor]:
    """Registers the Python half of a public operator; returns what the public function calls.

    composite: the operator in terms of other fastconv operators, so that each part finds its device's best kernel.
    like_input: the output has the first argument's memory format; else it is contiguous.
    """
    op = overload(name)
    parameters = [argument.name for argument in op._schema.arguments]
    defaults = {argument.name: argument.default_value for argument in op._schema.arguments if argument.has_default_value()}
    specification = getattr(reference, name)
    output_shape = getattr(_checks, name)

    def bind(args: tuple) -> dict:
        return defaults | dict(zip(parameters, args, strict=False))  # the dispatcher drops trailing arguments that equal their default

    def layout(x):
        return memory_format(x) if like_input else torch.contiguous_format

    def kernel(*args):
        bound = bind(args)
        output_shape(**bound)
        compute = composite if composite and _extension.backend() != "aten" else specification
        return compute(**bound).contiguous(memory_format=layout(args[0]))

    def fake(*args):
        x = args[0]
        return torch.empty(output_shape(**bind(args)), dtype=x.dtype, device=x.device, memory_format=layout(x))

    torch.library.register_fake(f"fastconv::{name}", fake, lib=library)
    _gradients.register(library, op, parameters, memory_format, lambda *args: specification(**bind(args)))
    _vmap.register(library, op, parameters)
    if autocast:
        _register_autocast(op, name, "cpu")
        _register_autocast(op, name, "cuda")
    return _register_kernels(op, name, kernel, bind)


def _register_kernels(op: torch._ops.OpOverload, name: str, kernel: Callable, bind: Callable[[tuple], dict]) -> Callable[..., Tensor]:
    backend = _extension.backend()
    if backend == "cpu" and has_cpu_kernel(name):

        def refuse(x, *args):
            raise RuntimeError(f"{name}: FASTCONV_BACKEND=cpu does not cover {x.dtype} on {x.device.type}")

        library.impl(name, refuse, "CompositeExplicitAutograd")
        return _covered_only(op, name, bind)

    library.impl(name, kernel, "CompositeExplicitAutograd")
    if backend in ("auto", "cpu"):
        return op

    def interpret(*args):
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(f"{name}: FASTCONV_BACKEND=triton runs CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1)")
        return getattr(_cuda, name)(*args) if hasattr(_cuda, name) else kernel(*args)

    with warnings.catch_warnings():  # torch warns that a kernel is replaced: that is what was asked for
        warnings.simplefilter("ignore", UserWarning)
        library.impl(name, interpret if backend == "triton" else kernel, "CPU")
    return op


def _covered_only(op: torch._ops.OpOverload, name: str, bind: Callable[[tuple], dict]) -> Callable[..., Tensor]:
    def call(*args):
        why = _coverage.uncovered(name, **bind(args))
        if why:
            raise RuntimeError(f"{name}: FASTCONV_BACKEND=cpu does not cover {why}")
        return op(*args)

    return call


def _register_autocast(op: torch._ops.OpOverload, name: str, device_type: str) -> None:
    """As for torch's convolutions: casts to the region's dtype. torch.library.register_autocast would fix that dtype here."""
    key = f"Autocast{device_type.upper()}"
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(value, dtype):
        eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if eligible and value.device.type == device_type else value

    def kernel(*args):
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*(cast(value, dtype) for value in args))

    library.impl(name, kernel, key)
