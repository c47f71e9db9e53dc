from torch import Tensor

from fastconv.ops import _checks
from fastconv.ops._prepared import Prepared, choose, operator
from fastconv.ops._register import register

_global_avg_pool = register("global_avg_pool", autocast=False)


def global_avg_pool(x: Tensor) -> Tensor:
    """Mean over all pixels: (N, C, H, W) -> (N, C, 1, 1), as torch.nn.AdaptiveAvgPool2d(1).

    Raises ValueError for a shape that does not fit, TypeError for a type or dtype.
    Specification: `fastconv.reference.global_avg_pool`.
    """
    _checks.global_avg_pool(x)
    return _global_avg_pool(x)


def prepare_global_avg_pool(*, like: Tensor | None = None) -> Prepared:
    """`global_avg_pool` as a prepared kernel: returns call(x). like: a tensor of the dtype and device to come, for `kernel` to name."""
    _, label = choose("global_avg_pool", like=like)
    return Prepared(operator("global_avg_pool", label), (), label)
