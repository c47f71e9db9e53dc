import torch
from torch import Tensor

from fastconv.ops import _checks
from fastconv.ops._prepared import PreparedBlock, PreparedResidual, arrange, choose, operator, pack_depthwise, pack_pointwise
from fastconv.ops._register import overload, register


def _parts(
    x, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, stride, padding, depthwise_activation, activation, residual
):
    y = torch.ops.fastconv.depthwise(x, depthwise_weight, depthwise_bias, stride, padding, depthwise_activation)
    return torch.ops.fastconv.pointwise(y, pointwise_weight, pointwise_bias, residual, activation)


_separable = register("separable", _parts)


def separable(
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 1,
    depthwise_activation: str | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """MobileNet V1's block: `depthwise` with its activation, then `pointwise` with bias, residual and activation.

    x: (N, C, H, W); depthwise_weight: (C, 1, K, K), K = 3 or 5; pointwise_weight: (Cout, C, 1, 1); biases: (C,) and (Cout,);
    residual: of the output's shape. Returns (N, Cout, H', W') in x's dtype and memory format.
    Raises ValueError for a shape, value or device that does not fit, TypeError for a type or dtype.
    MobileNets (Howard et al., arXiv:1704.04861); specification: `fastconv.reference.separable`.
    """
    stride, padding = _checks.stride_padding("separable", stride, padding)
    args = (
        x, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, stride, padding, depthwise_activation, activation, residual,
    )  # fmt: skip
    _checks.separable(*args)
    return _separable(*args)


def prepare_separable(
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    *,
    stride,
    padding,
    depthwise_activation: str | None,
    activation: str | None,
    exact: bool = False,
    reduction: int = 1,
) -> PreparedResidual:
    """Binds `separable` to its weights: returns call(x, residual=None). exact, reduction: see prepare_pointwise."""
    stride, padding = _checks.stride_padding("separable", stride, padding)
    weights = {
        "depthwise_weight": depthwise_weight,
        "depthwise_bias": depthwise_bias,
        "pointwise_weight": pointwise_weight,
        "pointwise_bias": pointwise_bias,
    }
    compiled, label = choose("separable", "inverted_residual_packed", **weights, stride=stride, padding=padding)
    if not compiled:
        args = (*arrange(label, *weights.values()), stride, padding, depthwise_activation, activation)
        kind = PreparedBlock if label.endswith("triton") else PreparedResidual
        return kind(operator("separable", label), args, label, ())
    project, label = pack_pointwise(pointwise_weight, pointwise_bias, label, exact=exact, reduction=reduction)
    args = (None, None, *pack_depthwise(depthwise_weight, depthwise_bias), [], *project)
    after = (stride, padding, None, depthwise_activation, None, None, activation)
    return PreparedResidual(overload("inverted_residual_packed"), args, label, after)
