from torch import Tensor

from fastconv.ops import _checks
from fastconv.ops._prepared import Prepared, choose, operator
from fastconv.ops._register import register

_max_pool = register("max_pool", autocast=False)


def max_pool(x: Tensor, *, stride: int | tuple[int, int] = 2, padding: int | tuple[int, int] = 0, ceil_mode: bool = False) -> Tensor:
    """Maximum over a 3x3 window, as torch.nn.MaxPool2d(3, stride, padding, ceil_mode=ceil_mode).

    x: (N, C, H, W). Returns (N, C, H', W') in x's dtype and memory format; NaN wins. padding is at most 1.
    Raises ValueError for a shape or value that does not fit, TypeError for a type or dtype.
    Specification: `fastconv.reference.max_pool`.
    """
    stride, padding = _checks.stride_padding("max_pool", stride, padding)
    _checks.max_pool(x, stride, padding, ceil_mode)
    return _max_pool(x, stride, padding, ceil_mode)


def prepare_max_pool(stride, padding, ceil_mode: bool, *, like: Tensor | None = None) -> Prepared:
    """Binds `max_pool` to its options: returns call(x). like: a tensor of the dtype and device to come, for `kernel` to name."""
    stride, padding = _checks.stride_padding("max_pool", stride, padding)
    _, label = choose("max_pool", like=like)
    return Prepared(operator("max_pool", label), (stride, padding, ceil_mode), label)
