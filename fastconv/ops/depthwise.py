from torch import Tensor

from fastconv.ops import _checks
from fastconv.ops._prepared import Prepared, arrange, choose, operator, pack_depthwise
from fastconv.ops._register import overload, register

_depthwise = register("depthwise")


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 1,
    activation: str | None = None,
) -> Tensor:
    """Depthwise convolution with bias and activation: activation(conv(x) + bias), one K x K filter per channel.

    x: (N, C, H, W); weight: (C, 1, K, K), K = 3 or 5; bias: (C,). Returns (N, C, H', W') in x's dtype and memory format.
    stride, padding: an int or a pair. activation: None, "relu", "relu6", "hardswish", "hardsigmoid" or "silu".
    Raises ValueError for a shape, value or device that does not fit, TypeError for a type or dtype.
    The filter of MobileNet (Howard et al., arXiv:1704.04861); specification: `fastconv.reference.depthwise`.
    """
    stride, padding = _checks.stride_padding("depthwise", stride, padding)
    _checks.depthwise(x, weight, bias, stride, padding, activation)
    return _depthwise(x, weight, bias, stride, padding, activation)


def prepare_depthwise(weight: Tensor, bias: Tensor | None, *, stride, padding, activation: str | None) -> Prepared:
    """Binds `depthwise` to its weights: returns call(x)."""
    stride, padding = _checks.stride_padding("depthwise", stride, padding)
    compiled, label = choose("depthwise", "depthwise_packed", weight=weight, bias=bias, stride=stride, padding=padding)
    if not compiled:
        return Prepared(operator("depthwise", label), (*arrange(label, weight, bias), stride, padding, activation), label)
    return Prepared(overload("depthwise_packed"), (*pack_depthwise(weight, bias), stride, padding, activation), label)
