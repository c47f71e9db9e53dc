import torch
import torch.nn.functional as F
from torch import Tensor

from fastconv.ops import _checks
from fastconv.ops._prepared import Prepared, PreparedResidual, arrange, choose, operator, pack, pack_pointwise
from fastconv.ops._register import overload, register
from fastconv.reference import ACTIVATIONS

_pointwise = register("pointwise")


def pointwise(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """1x1 convolution with bias, residual and activation: activation(conv(x) + bias + residual).

    x: (N, Cin, H, W); weight: (Cout, Cin, 1, 1); bias: (Cout,); residual: (N, Cout, H, W), any strides.
    Returns (N, Cout, H, W) in x's dtype and memory format.
    activation: None, "relu", "relu6", "hardswish", "hardsigmoid" or "silu".
    Raises ValueError for a shape, value or device that does not fit, TypeError for a type or dtype.
    Specification: `fastconv.reference.pointwise`.
    """
    _checks.pointwise(x, weight, bias, residual, activation)
    return _pointwise(x, weight, bias, residual, activation)


def prepare_pointwise(
    weight: Tensor, bias: Tensor | None, *, activation: str | None, exact: bool = False, reduction: int = 1
) -> PreparedResidual:
    """Binds `pointwise` to its weights: returns call(x, residual=None).

    exact: by direct sums in fp32, not as digits by a matrix unit, nor by Strassen's algorithm.
    reduction: pixels of the network's input to one of the output, which tells how many there will be.
    """
    compiled, label = choose("pointwise", "pointwise_packed", weight=weight, bias=bias)
    if not compiled:
        return PreparedResidual(operator("pointwise", label), arrange(label, weight, bias), label, (activation,))
    args, label = pack_pointwise(weight, bias, label, exact=exact, reduction=reduction)
    return PreparedResidual(overload("pointwise_packed"), args, label, (activation,))


def prepare_linear(weight: Tensor, bias: Tensor | None, *, activation: str | None) -> Prepared:
    """Binds a fully connected layer, weight (Cout, Cin), to its weights: returns call(x) on (N, Cin). It is a pointwise of one pixel."""
    compiled, label = choose("pointwise", "pointwise_packed", weight=weight, bias=bias)
    if not compiled:
        return Prepared(_linear, (weight, bias, activation), label if label.startswith("ATen") else "ATen (linear)")
    return Prepared(_linear_packed, (*pack(weight[:, :, None, None], bias), activation), label)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    return ACTIVATIONS[activation](F.linear(x, weight, bias))


def _linear_packed(x: Tensor, panels: Tensor, bias: Tensor, activation: str | None) -> Tensor:
    return torch.ops.fastconv.pointwise_packed.default(x[:, :, None, None], panels, bias, None, activation)[:, :, 0, 0]
