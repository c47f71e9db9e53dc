"""A kernel bound to its weights, for inference: what an execution plan calls once per layer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastconv import _extension
from fastconv.ops import _cuda
from fastconv.ops._coverage import uncovered
from fastconv.ops._register import has_cpu_kernel, overload


class _Portable(threading.local):
    """Whether this thread packs for machines of any kind."""

    on = False


_portable = _Portable()


@contextmanager
def portable() -> Iterator[None]:
    """Weights are packed here as every machine's kernels take them at speed: for graphs that are saved."""
    before, _portable.on = _portable.on, True
    try:
        yield
    finally:
        _portable.on = before


class Prepared:
    """`prepared(x)` is `op(x, *args)`: packed weights where the compiled kernels cover the layer, plain ones elsewhere. Picklable."""

    __slots__ = ("args", "label", "op")

    def __init__(self, op: Callable[..., Tensor], args: tuple, label: str) -> None:
        self.op, self.args, self.label = op, args, label

    def __call__(self, x: Tensor) -> Tensor:
        return self.op(x, *self.args)

    @property
    def kernel(self) -> str:
        """What runs, in words; the instruction set is the one in use now."""
        return self.label.format(isa=_extension.isa())

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The weights and biases it owns or shares."""
        flat = (item for arg in self.args for item in (arg if isinstance(arg, (tuple, list)) else (arg,)))
        return tuple(item for item in flat if isinstance(item, Tensor))

    def __reduce__(self):
        op = self.op.name().removeprefix("fastconv::") if isinstance(self.op, torch._ops.OpOverload) else self.op
        return _restore, (type(self), op, self.args, self.label)


class PreparedResidual(Prepared):
    """`prepared(x, residual)` is `op(x, *args, residual, *after)`."""

    __slots__ = ("after",)

    def __init__(self, op: Callable[..., Tensor], args: tuple, label: str, after: tuple) -> None:
        super().__init__(op, args, label)
        self.after = after

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.op(x, *self.args, residual, *self.after)

    def __reduce__(self):
        restore, args = super().__reduce__()
        return restore, (*args, self.after)


class PreparedBlock(PreparedResidual):
    """A block on a GPU, which runs as one kernel or several by the size of its image; `kernel` tells how it last did.

    after: None for a block without a residual.
    """

    __slots__ = ("form",)

    def __init__(self, op: Callable[..., Tensor], args: tuple, label: str, after: tuple | None = None) -> None:
        super().__init__(op, args, label, after)
        self.form: str | None = None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.op(x, *self.args) if self.after is None else super().__call__(x, residual)
        self.form = _cuda.run("last_form", file="blocks")
        return y

    @property
    def kernel(self) -> str:
        return f"{self.label} {self.form}" if self.form else self.label


def _restore(kind: type[Prepared], op: str | Callable[..., Tensor], *args) -> Prepared:
    return kind(overload(op) if isinstance(op, str) else op, *args)


def choose(name: str, packed: str | None = None, **arguments) -> tuple[bool, str]:
    """Whether the compiled kernel serves a layer with these arguments, and the label that `explain` shows.

    name: the operator; packed: the compiled operator that would run, where that is not the operator itself.
    """
    backend = _extension.backend()
    if backend == "aten":
        return False, "ATen (FASTCONV_BACKEND=aten)"
    on_cuda = any(isinstance(value, Tensor) and value.is_cuda for value in arguments.values())
    if backend == "triton" or (backend == "auto" and on_cuda and has_triton_kernel()):
        why = _uncovered_by_triton(name, **arguments)
        if why is None:
            return False, f"{name} triton"
    else:
        why = uncovered(name, **arguments) if has_cpu_kernel(packed or name) else "no compiled kernel"
        if why is None:
            return True, f"{name} f32 {{isa}}"
    if backend != "auto":
        raise RuntimeError(f"{name}: FASTCONV_BACKEND={backend} does not cover {why}")
    return False, f"ATen ({why})"


def operator(name: str, label: str) -> Callable[..., Tensor]:
    """What a step with plain weights calls: on a GPU the Triton launcher itself, for a plan needs nothing else that the dispatcher does."""
    return getattr(_cuda, name) if label.endswith("triton") else overload(name)


def has_triton_kernel() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("fastconv::pointwise", "CUDA")


def _uncovered_by_triton(name: str, stride=None, padding=None, **arguments) -> str | None:
    weights = {key: value for key, value in arguments.items() if value is not None and ("weight" in key or key == "like")}
    if name == "stem":
        return _cuda.uncovered(weights["weight"], weights["weight"]) or _cuda.uncovered_stem(weights["weight"])
    if not weights:  # of a kernel without weights no dtype is known yet
        return None
    weight = weights["depthwise_weight"] if "depthwise_weight" in weights else next(iter(weights.values()))
    return _cuda.uncovered(weight, weight, stride, padding)


def arrange(label: str, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
    """Plain weights and biases as the kernel behind the label reads them without a copy on each call."""
    if not label.endswith("triton"):
        return weights
    from fastconv.kernels.gpu import launch

    order = launch.stem_order if label.startswith("stem") else launch.kernel_order
    return tuple(order(weight) if weight is not None and weight.dim() == 4 else weight for weight in weights)


def pack(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(panels, bias) as the packed operators take them; pack_depthwise gives (taps, bias)."""
    return torch.ops.fastconv.pack_panels(weight), _bias_or_zeros(weight, bias)


# Fewer pixels than 14x14 of a common 224x224 input gain less than they wait: for 7/4 of the weights, by Strassen's algorithm; as digits, in
# blocks with squeeze-excitation, whose products threads have in small pieces: with those of 7x7 too MobileNet V3 small took 3 to 15% longer
# on two threads, where V3 large's at 14x14 take 0.75 to 0.88 times as long.
_MOST_REDUCTION = 16 * 16


def pack_pointwise(
    weight: Tensor, bias: Tensor | None, label: str, *, exact: bool, reduction: int = 1, strassen: bool = True, gated: bool = False
) -> tuple[tuple[Tensor, Tensor], str]:
    """The same of a 1x1 convolution, unless `exact` as this machine multiplies it fastest, and the label that tells how.

    reduction: see prepare_pointwise; strassen: whether Strassen's algorithm may be used; gated: whether it stands in a block with
    squeeze-excitation.
    """
    if exact:
        return pack(weight, bias), label
    few = reduction > _MOST_REDUCTION
    if not (gated and few) and suits_digits(weight):
        return (torch.ops.fastconv.pack_digits(weight), _bias_or_zeros(weight, bias)), f"{label} digits"
    if strassen and not few and suits_strassen(weight):
        return (torch.ops.fastconv.pack_strassen(weight), _bias_or_zeros(weight, bias)), f"{label} strassen"
    return pack(weight, bias), label


def pack_depthwise(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.ops.fastconv.pack_taps(weight), _bias_or_zeros(weight, bias)


def _bias_or_zeros(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight.new_zeros(weight.shape[0]) if bias is None else bias.contiguous()


def suits_digits(weight: Tensor) -> bool:
    """Whether a 1x1 convolution gains as digits on a matrix unit: where this machine has one, its channels fill it, and its weights are of
    like size.

    The unit takes 64 inputs and 16 outputs at a time, and pixels have to be split first: on a Xeon 64 to 384 channels take 0.6 times what
    direct sums take, 512 to 512 0.36, 48 to 288 0.74; where the core's other hardware thread is busy, which halves the unit's speed, 0.8
    to 1.0, 0.9 and 1.05.

    Errors are a part of the largest weight of an output, so where the root mean square of the weights is below a twentieth of the largest
    they are left to direct sums.
    """
    outputs, inputs = weight.shape[:2]
    if _extension.isa() != "amx" or _portable.on or min(inputs, outputs) < 64 or inputs * outputs < 16384 or inputs > 2**15:
        return False
    from fastconv import _C

    dense = weight.detach().contiguous()
    # Not by torch's operators, which nothing else here needs: 1.4 MB of their code.
    return _C.relative_power(dense.data_ptr(), outputs, inputs) > 0.0025


def suits_strassen(weight: Tensor) -> bool:
    """Whether a 1x1 convolution gains by Strassen's algorithm, and its sums stay finite for every input that the kernel gives it.

    Of the 1/8 of the multiplications that it saves, its additions take the more the fewer channels there are on either side. On one core
    of a Zen 4, all in its caches: 512 to 512 channels take 0.91 times what direct sums take, 256 to 256 0.92, 128 to 128 0.95, 384 to 64
    0.99. Inside networks, where its weights are 7/4 as many to wait for, less than 256 channels gained nothing.
    """
    outputs, inputs = weight.shape[:2]
    if inputs % 32 or min(inputs, outputs) < 256:
        return False
    return bool(torch.linalg.vector_norm(weight, dim=(1, 2, 3), dtype=torch.float64).max() < 1e6)


def suits_winograd(weight: Tensor) -> bool:
    """Whether Winograd's sums stay finite for every input that the kernel gives it, all below 1e30.

    A fire's transforms enlarge inputs by up to 100 and outputs by up to 361, a stem's less, and they would make NaN of a weight's infinity.
    """
    return bool(weight.abs().sum((1, 2, 3)).max() < 1e3)
