from torch import Tensor

from fastconv.ops import _checks
from fastconv.ops._prepared import Prepared, arrange, choose, operator, pack
from fastconv.ops._register import overload, register

_fire_expand = register("fire_expand")


def fire_expand(x: Tensor, weight1x1: Tensor, bias1x1: Tensor | None, weight3x3: Tensor, bias3x3: Tensor | None) -> Tensor:
    """The two expands of a fire module, concatenated: cat([relu(conv1x1(x)), relu(conv3x3(x, padding=1))], 1).

    x: (N, C, H, W); weight1x1: (C1, C, 1, 1); weight3x3: (C3, C, 3, 3); biases: (C1,) and (C3,).
    Returns (N, C1 + C3, H, W) in x's dtype and memory format.
    Raises ValueError for a shape or device that does not fit, TypeError for a type or dtype.
    SqueezeNet (Iandola et al., arXiv:1602.07360); specification: `fastconv.reference.fire_expand`.
    """
    _checks.fire_expand(x, weight1x1, bias1x1, weight3x3, bias3x3)
    return _fire_expand(x, weight1x1, bias1x1, weight3x3, bias3x3)


def prepare_fire_expand(weight1x1: Tensor, bias1x1: Tensor | None, weight3x3: Tensor, bias3x3: Tensor | None) -> Prepared:
    """Binds `fire_expand` to its weights: returns call(x)."""
    weights = {"weight1x1": weight1x1, "bias1x1": bias1x1, "weight3x3": weight3x3, "bias3x3": bias3x3}
    compiled, label = choose("fire_expand", "fire_expand_packed", **weights)
    if not compiled:
        return Prepared(operator("fire_expand", label), arrange(label, *weights.values()), label)
    return Prepared(overload("fire_expand_packed"), (*pack(weight1x1, bias1x1), *pack(weight3x3, bias3x3)), label)
