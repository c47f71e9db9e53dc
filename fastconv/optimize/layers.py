"""What a plan is made of: layers with their batch norm folded in, and the kernels that run one or several of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastconv import ops

Pair = tuple[int, int]

# What the kernels can apply to their outputs.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "silu": F.silu,
}


@dataclass(frozen=True, eq=False)
class Source:
    """Where a parameter or buffer lives: its module's dictionary and the key in it."""

    owner: dict[str, Tensor | None]
    key: str

    def tensor(self) -> Tensor:
        return self.owner[self.key]

    def place(self) -> tuple[int, str]:
        return id(self.owner), self.key


@dataclass(frozen=True, eq=False)
class Norm:
    """Batch norm in eval mode."""

    mean: Source
    var: Source
    weight: Source | None
    bias: Source | None
    eps: float


@dataclass(frozen=True, eq=False)
class Layer:
    """activation(norm(conv(x))), or the same with a linear map; also its own kernel where it is not part of a larger one."""

    weight: Source
    bias: Source | None
    shape: tuple[int, ...]
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    norm: Norm | None = None
    activation: str | None = None

    @property
    def channels(self) -> int:
        return self.shape[0]

    @property
    def linear(self) -> bool:
        return len(self.shape) == 2

    @property
    def depthwise(self) -> bool:
        """Whether `fastconv.ops.depthwise` covers it."""
        if self.linear:
            return False
        channels, depth, k, k2 = self.shape
        return (
            depth == 1
            and self.groups == channels
            and (k, k2) in ((3, 3), (5, 5))
            and self.stride in ((1, 1), (2, 2))
            and self.dilation == (1, 1)
            and max(self.padding) < k
        )

    @property
    def pointwise(self) -> bool:
        geometry = (self.shape[2:], self.stride, self.padding, self.groups)
        return not self.linear and geometry == ((1, 1), (1, 1), (0, 0), 1)

    @property
    def stem(self) -> bool:
        """Whether the kernel for images covers it."""
        return (
            not self.linear
            and self.groups == 1
            and self.dilation == (1, 1)
            and self.shape[1] <= 4
            and 1 < max(self.shape[2:]) <= 7
            and self.padding[0] < self.shape[2]
            and self.padding[1] < self.shape[3]
        )

    def uncovered(self) -> str:
        """Why a convolution that no kernel takes is none of theirs."""
        k, k2 = self.shape[2:]
        if self.dilation != (1, 1):
            return f"dilation {self.dilation[0]}x{self.dilation[1]}"
        if self.groups == 1:
            stride = f" with stride {self.stride[0]}x{self.stride[1]}" if (k, k2) == (1, 1) else ""
            return f"a dense {k}x{k2} convolution{stride} of {self.shape[1]} channels"
        if self.groups != self.channels or self.shape[1] != 1:
            return f"groups {self.groups}"
        stride, padding = (f"{first}x{second}" for first, second in (self.stride, self.padding))
        return f"a depthwise {k}x{k2} convolution with stride {stride} and padding {padding}"

    def sources(self) -> list[Source]:
        tensors = [self.weight, self.bias]
        if self.norm:
            tensors += [self.norm.mean, self.norm.var, self.norm.weight, self.norm.bias]
        return [source for source in tensors if source is not None]

    def factors(self) -> Tensor:
        """gamma / sqrt(var + eps) in float64, on the CPU, since not every device has it."""
        scale = (_wide(self.norm.var) + self.norm.eps).rsqrt()
        return scale if self.norm.weight is None else scale * _wide(self.norm.weight)

    def foldable(self) -> bool:
        """Whether weights times the norm's factors give the sums times them: infinite ones give Inf there, and NaN here."""
        return self.norm is None or bool(self.factors().isfinite().all())

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight w s and bias beta + (b - mean) s with s = gamma / sqrt(var + eps), computed in float64; as they are without a norm."""
        weight = self.weight.tensor().detach()
        bias = None if self.bias is None else self.bias.tensor().detach()
        if self.norm is None:
            return weight, bias
        norm, scale = self.norm, self.factors()
        shift = -_wide(norm.mean) if self.bias is None else _wide(self.bias) - _wide(norm.mean)
        shift = shift * scale
        if norm.bias is not None:
            shift = shift + _wide(norm.bias)
        # By parts: a large weight in float64, twice, would be most of the memory that optimizing a network needs.
        scaled, rows = torch.empty_like(weight), max(1, _FOLDED_AT_ONCE // max(1, weight[0].numel()))
        for part, some, by in zip(scaled.split(rows), weight.split(rows), scale.split(rows), strict=True):
            part.copy_(some.to("cpu", torch.float64) * by.view(-1, *[1] * (len(self.shape) - 1)))
        return scaled, shift.to(weight.device, weight.dtype)

    def check(self) -> None:
        """Raises ValueError if a bias or a norm does not fit the weight: broadcast, it would give some number."""
        for vector in self.sources()[1:]:
            if vector.tensor().shape != (self.channels,):
                raise ValueError(f"optimize: {vector.key} must be ({self.channels},), got {tuple(vector.tensor().shape)}")


_FOLDED_AT_ONCE = 1 << 16  # numbers


def _wide(source: Source) -> Tensor:
    return source.tensor().detach().to("cpu", torch.float64)


class Conv2d:
    """A convolution that no kernel covers, with its batch norm folded, through ATen."""

    kernel = "ATen conv2d"

    def __init__(self, weight: Tensor, bias: Tensor | None, layer: Layer) -> None:
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.bias = bias
        self.geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        self.activation = ACTIVATIONS.get(layer.activation)

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.conv2d(x, self.weight, self.bias, *self.geometry)
        return self.activation(y, inplace=True) if self.activation else y


@dataclass(frozen=True, eq=False)
class Kernel:
    """One call of fastconv: the operation `op` over its layers (None where an optional one is missing)."""

    op: str
    layers: tuple[Layer | None, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    squeeze_excite: tuple[Layer, Layer, str] | None = None

    def every_layer(self) -> list[Layer]:
        return [layer for layer in (*self.layers, *(self.squeeze_excite or ())[:2]) if layer is not None]

    def sources(self) -> list[Source]:
        return [source for layer in self.every_layer() for source in layer.sources()]

    @property
    def reduction(self) -> int:
        """Pixels of the input to one of the output."""
        stride = self.layers[0].stride if self.op == "conv2d" else self.options.get("stride", (1, 1))
        return stride[0] * stride[1]

    def prepare(self, like: Tensor | None, exact: bool, reduction: int) -> Callable[..., Tensor]:
        """The callable that owns the folded and packed weights.

        like: a tensor of the device and dtype of kernels without weights; reduction: pixels of the network's input to one of the output.
        """
        if not self.layers:
            return getattr(ops, f"prepare_{self.op}")(**self.options, like=like)
        if self.op == "conv2d":
            return Conv2d(*self.layers[0].folded(), self.layers[0])
        weights = [tensor for layer in self.layers for tensor in (layer.folded() if layer else (None, None))]
        options = dict(self.options)
        if self.op in ("fire", "stem", "pointwise", "separable", "inverted_residual"):
            options["exact"] = exact
        if self.op in ("pointwise", "separable", "inverted_residual"):
            options["reduction"] = reduction
        if self.squeeze_excite:
            reduce, expand, gate = self.squeeze_excite
            w1, b1, w2, b2 = (*_as_conv(reduce), *_as_conv(expand))
            options["squeeze_excite"] = (w1, b1, w2, b2, reduce.activation, gate)
        return getattr(ops, f"prepare_{self.op}")(*weights, **options)


def _as_conv(layer: Layer) -> tuple[Tensor, Tensor | None]:
    weight, bias = layer.folded()
    return weight.reshape(*weight.shape[:2], 1, 1), bias


def kernel_of(layer: Layer) -> Kernel:
    """The kernel for a layer on its own."""
    if layer.linear:
        return Kernel("linear", (layer,), {"activation": layer.activation})
    if layer.pointwise:
        return Kernel("pointwise", (layer,), {"activation": layer.activation})
    options = {"stride": layer.stride, "padding": layer.padding, "activation": layer.activation}
    if layer.depthwise:
        return Kernel("depthwise", (layer,), options)
    if layer.stem:
        return Kernel("stem", (layer,), options)
    return Kernel("conv2d", (layer,))
