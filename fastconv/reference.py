"""What each operator computes, in plain torch: the specification that every kernel is tested against.

Any dtype, device and memory format. Arguments are those of `fastconv.ops.<name>`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = int | tuple[int, int]

ACTIVATIONS = {
    None: lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "silu": F.silu,
}


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: Pair = 1, padding: Pair = 1, activation: str | None = None
) -> Tensor:
    """activation(conv(x) + bias), one K x K filter per channel."""
    return ACTIVATIONS[activation](F.conv2d(x, weight, bias, stride, padding, groups=x.shape[1]))


def pointwise(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """activation(conv1x1(x) + bias + residual)."""
    y = F.conv2d(x, weight, bias)
    return ACTIVATIONS[activation](y if residual is None else y + residual)


def fire_expand(x: Tensor, weight1x1: Tensor, bias1x1: Tensor | None, weight3x3: Tensor, bias3x3: Tensor | None) -> Tensor:
    """The two expands of a fire module, concatenated: cat([relu(conv1x1(x)), relu(conv3x3(x))], 1)."""
    return torch.cat([F.relu(F.conv2d(x, weight1x1, bias1x1)), F.relu(F.conv2d(x, weight3x3, bias3x3, padding=1))], 1)


def fire(
    x: Tensor,
    squeeze_weight: Tensor,
    squeeze_bias: Tensor | None,
    weight1x1: Tensor,
    bias1x1: Tensor | None,
    weight3x3: Tensor,
    bias3x3: Tensor | None,
) -> Tensor:
    """SqueezeNet's fire module: a 1x1 squeeze with relu, then the two expands."""
    return fire_expand(F.relu(F.conv2d(x, squeeze_weight, squeeze_bias)), weight1x1, bias1x1, weight3x3, bias3x3)


def separable(
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    *,
    stride: Pair = 1,
    padding: Pair = 1,
    depthwise_activation: str | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """MobileNet V1's block: depthwise, then pointwise."""
    y = depthwise(x, depthwise_weight, depthwise_bias, stride=stride, padding=padding, activation=depthwise_activation)
    return pointwise(y, pointwise_weight, pointwise_bias, residual=residual, activation=activation)


def inverted_residual(
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    *,
    stride: Pair = 1,
    padding: Pair = 1,
    activation: str | None = "relu6",
    residual: bool = False,
) -> Tensor:
    """MobileNet V2's block: pointwise and depthwise, each with the activation, then a linear pointwise (+ x)."""
    y = pointwise(x, expand_weight, expand_bias, activation=activation)
    y = depthwise(y, depthwise_weight, depthwise_bias, stride=stride, padding=padding, activation=activation)
    return pointwise(y, project_weight, project_bias, residual=x if residual else None)


def stem(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: Pair = 2, padding: Pair = 1, activation: str | None = None
) -> Tensor:
    """activation(conv(x) + bias), a dense convolution of an image with few channels."""
    return ACTIVATIONS[activation](F.conv2d(x, weight, bias, stride, padding))


def max_pool(x: Tensor, *, stride: Pair = 2, padding: Pair = 0, ceil_mode: bool = False) -> Tensor:
    """Maximum over a 3x3 window."""
    return F.max_pool2d(x, 3, stride, padding, ceil_mode=ceil_mode)


def global_avg_pool(x: Tensor) -> Tensor:
    """Mean over all pixels: (N, C, H, W) -> (N, C, 1, 1)."""
    return x.mean((2, 3), keepdim=True)


def depthwise_backward_input(grad: Tensor, weight: Tensor, input_size: Pair, *, stride: Pair, padding: Pair) -> Tensor:
    """The gradient of depthwise(x, weight), without activation, with respect to an x of height and width `input_size`."""
    shape = (*grad.shape[:2], *_pair(input_size))
    return torch.nn.grad.conv2d_input(shape, weight, grad, stride, padding, groups=grad.shape[1])


def depthwise_backward_weight(grad: Tensor, x: Tensor, kernel_size: Pair, *, stride: Pair, padding: Pair) -> Tensor:
    """The gradient of depthwise(x, weight), without activation, with respect to a weight of height and width `kernel_size`."""
    shape = (x.shape[1], 1, *_pair(kernel_size))
    return torch.nn.grad.conv2d_weight(x, shape, grad, stride, padding, groups=x.shape[1])


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
