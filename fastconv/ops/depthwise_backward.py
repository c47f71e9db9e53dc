from torch import Tensor

from fastconv.ops import _checks, _gradients
from fastconv.ops._register import register


def _input_through_aten(grad: Tensor, weight: Tensor, input_size, stride, padding) -> Tensor:
    """As the reference, which leaves ATen to guess a memory format."""
    mask = (True, False, False)
    return _gradients.convolution_backward(grad, None, weight, input_size, stride, padding, mask, grad.shape[1])[0]


_input = register("depthwise_backward_input", _input_through_aten)
_weight = register("depthwise_backward_weight", like_input=False)


def depthwise_backward_input(
    grad: Tensor, weight: Tensor, input_size: int | tuple[int, int], *, stride: int | tuple[int, int], padding: int | tuple[int, int]
) -> Tensor:
    """The gradient of `depthwise(x, weight)`, without activation, with respect to x: for an autograd function of your own.

    grad: (N, C, H', W'), of that output; weight: (C, 1, KH, KW); input_size: x's height and width, which grad's alone do not tell.
    stride, padding: an int or a pair, those of the forward call. Returns (N, C, H, W) in grad's dtype and memory format.
    Compiled kernels cover KH = KW = 3 or 5; any other size runs through ATen. It is differentiable, to any order.
    Raises ValueError for a shape, value or device that does not fit, TypeError for a type or dtype.
    A transposed convolution (Dumoulin and Visin, arXiv:1603.07285); specification: `fastconv.reference.depthwise_backward_input`.
    """
    op = "depthwise_backward_input"
    input_size = _checks.pair(op, "input_size", input_size, 1)
    stride, padding = _checks.stride_padding(op, stride, padding)
    _checks.depthwise_backward_input(grad, weight, input_size, stride, padding)
    return _input(grad, weight, input_size, stride, padding)


def depthwise_backward_weight(
    grad: Tensor, x: Tensor, kernel_size: int | tuple[int, int], *, stride: int | tuple[int, int], padding: int | tuple[int, int]
) -> Tensor:
    """The gradient of `depthwise(x, weight)`, without activation, with respect to weight: for an autograd function of your own.

    grad: (N, C, H', W'), of that output; x: (N, C, H, W); kernel_size: KH, KW, the weight's height and width.
    stride, padding: an int or a pair, those of the forward call. Returns (C, 1, KH, KW) in grad's dtype, contiguous.
    The sums over images and pixels have one fixed order; those of float16 and bfloat16 are float32's where a kernel of ours covers them.
    Compiled kernels cover KH = KW = 3 or 5; any other size runs through ATen. It is differentiable, to any order.
    Raises ValueError for a shape, value or device that does not fit, TypeError for a type or dtype.
    Specification: `fastconv.reference.depthwise_backward_weight`.
    """
    op = "depthwise_backward_weight"
    kernel_size = _checks.pair(op, "kernel_size", kernel_size, 1)
    stride, padding = _checks.stride_padding(op, stride, padding)
    _checks.depthwise_backward_weight(grad, x, kernel_size, stride, padding)
    return _weight(grad, x, kernel_size, stride, padding)
