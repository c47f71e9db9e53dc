import torch
from torch import Tensor

from fastconv.ops import _checks
from fastconv.ops._prepared import Prepared, PreparedBlock, arrange, choose, operator, pack, pack_pointwise, suits_winograd
from fastconv.ops._register import overload, register


def _parts(x, squeeze_weight, squeeze_bias, weight1x1, bias1x1, weight3x3, bias3x3):
    squeezed = torch.ops.fastconv.pointwise(x, squeeze_weight, squeeze_bias, None, "relu")
    return torch.ops.fastconv.fire_expand(squeezed, weight1x1, bias1x1, weight3x3, bias3x3)


_fire = register("fire", _parts)


def fire(
    x: Tensor,
    squeeze_weight: Tensor,
    squeeze_bias: Tensor | None,
    weight1x1: Tensor,
    bias1x1: Tensor | None,
    weight3x3: Tensor,
    bias3x3: Tensor | None,
) -> Tensor:
    """SqueezeNet's fire module: a 1x1 squeeze with relu, then `fire_expand`.

    x: (N, C, H, W); squeeze_weight: (S, C, 1, 1); weight1x1: (C1, S, 1, 1); weight3x3: (C3, S, 3, 3); biases: (S,), (C1,), (C3,).
    Returns (N, C1 + C3, H, W) in x's dtype and memory format.
    Raises ValueError for a shape or device that does not fit, TypeError for a type or dtype.
    SqueezeNet (Iandola et al., arXiv:1602.07360); specification: `fastconv.reference.fire`.
    """
    _checks.fire(x, squeeze_weight, squeeze_bias, weight1x1, bias1x1, weight3x3, bias3x3)
    return _fire(x, squeeze_weight, squeeze_bias, weight1x1, bias1x1, weight3x3, bias3x3)


def prepare_fire(
    squeeze_weight: Tensor,
    squeeze_bias: Tensor | None,
    weight1x1: Tensor,
    bias1x1: Tensor | None,
    weight3x3: Tensor,
    bias3x3: Tensor | None,
    *,
    exact: bool = False,
) -> Prepared:
    """Binds `fire` to its weights: returns call(x).

    Unless `exact`, the CPU kernel computes the 3x3 expand by Winograd where that is less work.
    """
    weights = {
        "squeeze_weight": squeeze_weight,
        "squeeze_bias": squeeze_bias,
        "weight1x1": weight1x1,
        "bias1x1": bias1x1,
        "weight3x3": weight3x3,
        "bias3x3": bias3x3,
    }
    compiled, label = choose("fire", "fire_packed", **weights)
    if not compiled:
        kind = PreparedBlock if label.endswith("triton") else Prepared
        return kind(operator("fire", label), arrange(label, *weights.values()), label)
    winograd = torch.ops.fastconv.pack_winograd(weight3x3) if not exact and suits_winograd(weight3x3) else None
    if winograd is not None:
        label = f"{label} winograd"
    squeeze, squeeze_label = pack_pointwise(squeeze_weight, squeeze_bias, label, exact=exact, strassen=False)
    expand, expand_label = pack_pointwise(weight1x1, bias1x1, label, exact=exact, strassen=False)
    args = (*squeeze, *expand, *pack(weight3x3, bias3x3), winograd)
    return Prepared(overload("fire_packed"), args, max(squeeze_label, expand_label, key=len))
