"""Argument checks: each function raises on a bad argument and returns the output's shape.

They serve the public functions (checked before the dispatcher, so a Python caller reads a Python error) and the fake kernels.
"""

import torch
from torch import Tensor

from fastconv.reference import ACTIVATIONS

Shape = tuple[int, int, int, int]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # torch's smaller ones have no convolution
LIMIT = 2**31  # of strides and paddings: the kernels' sizes stay within 64 bits


def pair(op: str, name: str, value: object, minimum: int) -> tuple[int, int]:
    """An int or a pair of ints, as a pair."""
    both = tuple(value) if isinstance(value, (tuple, list, torch.Size)) else (value, value)
    if len(both) != 2 or not all(isinstance(one, (int, torch.SymInt)) and not isinstance(one, bool) for one in both):
        raise TypeError(f"{op}: {name} must be an int or a pair of ints, got {value!r}")
    if both[0] < minimum or both[1] < minimum:
        raise ValueError(f"{op}: {name} must be at least {minimum}, got {value!r}")
    if both[0] >= LIMIT or both[1] >= LIMIT:
        raise ValueError(f"{op}: {name} must be below 2^31, got {value!r}")
    return both


def stride_padding(op: str, stride: object, padding: object) -> tuple[tuple[int, int], tuple[int, int]]:
    return pair(op, "stride", stride, 1), pair(op, "padding", padding, 0)


def _activation(op: str, value: object, name: str = "activation") -> None:
    if not (value is None or isinstance(value, str)) or value not in ACTIVATIONS:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(str, ACTIVATIONS))}, got {value!r}")


def _flag(op: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {type(value).__name__}")


def _tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{op}: {name} must be a dense Tensor, got {'a nested one' if value.is_nested else value.layout}")


def image(op: str, x: Tensor, name: str = "x") -> Shape:
    _tensor(op, name, x)
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} must be (N, C, H, W), got {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.shape[1] == 0 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{op}: {name} must have channels and pixels, got {tuple(x.shape)}")
    return tuple(x.shape)


def _like(op: str, name: str, tensor: object, x: Tensor, first: str = "x") -> None:
    _tensor(op, name, tensor)
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} must be on {first}'s device, {x.device}, got {tensor.device}")
    # Autocast casts all of them to one dtype, below this check.
    if tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{op}: {name} must have {first}'s dtype, {x.dtype}, got {tensor.dtype}")


def _bias(op: str, name: str, bias: Tensor | None, x: Tensor, channels: int) -> None:
    if bias is None:
        return
    _like(op, name, bias, x)
    if bias.shape != (channels,):
        raise ValueError(f"{op}: {name} must be ({channels},), got {tuple(bias.shape)}")


def _residual(op: str, residual: Tensor | None, x: Tensor, shape: Shape) -> None:
    if residual is None:
        return
    _like(op, "residual", residual, x)
    if residual.shape != shape:
        raise ValueError(f"{op}: residual must have the output's shape, {tuple(shape)}, got {tuple(residual.shape)}")


def _window(op: str, shape: Shape, channels: int, kernel: tuple, stride: tuple, padding: tuple, ceil_mode: bool = False) -> Shape:
    """The output's shape for a window sliding over an image of the given shape."""
    size = []
    for extent, k, s, p in zip(shape[2:], kernel, stride, padding, strict=True):
        out = (extent + 2 * p - k + (s - 1 if ceil_mode else 0)) // s + 1
        size.append(torch.sym_min(out, (extent + p - 1) // s + 1) if ceil_mode else out)  # the last window must start inside the image
    if size[0] < 1 or size[1] < 1:
        raise ValueError(f"{op}: the output would have no pixels: input {tuple(shape)}, kernel {tuple(kernel)}, padding {tuple(padding)}")
    return shape[0], channels, size[0], size[1]


def _depthwise(op: str, shape: Shape, x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, prefix: str = "") -> Shape:
    _like(op, prefix + "weight", weight, x)
    channels = shape[1]
    if weight.shape != (channels, 1, 3, 3) and weight.shape != (channels, 1, 5, 5):
        # The channel count is spelled out only when the rest of the shape is right, so the message names what is wrong.
        wanted = channels if tuple(weight.shape[1:]) in ((1, 3, 3), (1, 5, 5)) else "C"
        raise ValueError(f"{op}: {prefix}weight must be ({wanted}, 1, 3, 3) or ({wanted}, 1, 5, 5), got {tuple(weight.shape)}")
    _bias(op, prefix + "bias", bias, x, channels)
    return _window(op, shape, channels, weight.shape[2:], stride, padding)


def _dense(op: str, shape: Shape, x: Tensor, weight: Tensor, bias: Tensor | None, size: int, names: tuple[str, str]) -> Shape:
    """A dense size x size convolution that keeps the image's size."""
    _like(op, names[0], weight, x)
    if weight.dim() != 4 or weight.shape[0] == 0 or weight.shape[1:] != (shape[1], size, size):
        raise ValueError(f"{op}: {names[0]} must be (Cout, {shape[1]}, {size}, {size}), got {tuple(weight.shape)}")
    _bias(op, names[1], bias, x, weight.shape[0])
    return shape[0], weight.shape[0], shape[2], shape[3]


def _expand(op: str, shape: Shape, x: Tensor, weight1x1, bias1x1, weight3x3, bias3x3) -> Shape:
    one = _dense(op, shape, x, weight1x1, bias1x1, 1, ("weight1x1", "bias1x1"))
    three = _dense(op, shape, x, weight3x3, bias3x3, 3, ("weight3x3", "bias3x3"))
    return shape[0], one[1] + three[1], shape[2], shape[3]


def depthwise(x, weight, bias, stride, padding, activation) -> Shape:
    shape = image("depthwise", x)
    _activation("depthwise", activation)
    return _depthwise("depthwise", shape, x, weight, bias, stride, padding)


def pointwise(x, weight, bias, residual, activation) -> Shape:
    shape = image("pointwise", x)
    _activation("pointwise", activation)
    shape = _dense("pointwise", shape, x, weight, bias, 1, ("weight", "bias"))
    _residual("pointwise", residual, x, shape)
    return shape


def fire_expand(x, weight1x1, bias1x1, weight3x3, bias3x3) -> Shape:
    return _expand("fire_expand", image("fire_expand", x), x, weight1x1, bias1x1, weight3x3, bias3x3)


def fire(x, squeeze_weight, squeeze_bias, weight1x1, bias1x1, weight3x3, bias3x3) -> Shape:
    shape = _dense("fire", image("fire", x), x, squeeze_weight, squeeze_bias, 1, ("squeeze_weight", "squeeze_bias"))
    return _expand("fire", shape, x, weight1x1, bias1x1, weight3x3, bias3x3)


def separable(
    x, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, stride, padding, depthwise_activation, activation, residual
) -> Shape:
    shape = image("separable", x)
    _activation("separable", depthwise_activation, "depthwise_activation")
    _activation("separable", activation)
    shape = _depthwise("separable", shape, x, depthwise_weight, depthwise_bias, stride, padding, "depthwise_")
    shape = _dense("separable", shape, x, pointwise_weight, pointwise_bias, 1, ("pointwise_weight", "pointwise_bias"))
    _residual("separable", residual, x, shape)
    return shape


def inverted_residual(
    x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias, stride, padding, activation, residual
) -> Shape:
    op = "inverted_residual"
    shape = given = image(op, x)
    _activation(op, activation)
    shape = _dense(op, shape, x, expand_weight, expand_bias, 1, ("expand_weight", "expand_bias"))
    shape = _depthwise(op, shape, x, depthwise_weight, depthwise_bias, stride, padding, "depthwise_")
    shape = _dense(op, shape, x, project_weight, project_bias, 1, ("project_weight", "project_bias"))
    _flag(op, "residual", residual)
    if residual and shape != given:
        raise ValueError(f"{op}: a residual needs an output of x's shape, {given}, got {tuple(shape)}")
    return shape


def stem(x, weight, bias, stride, padding, activation) -> Shape:
    shape = image("stem", x)
    _activation("stem", activation)
    _like("stem", "weight", weight, x)
    if weight.dim() != 4 or weight.numel() == 0 or weight.shape[1] != shape[1]:
        raise ValueError(f"stem: weight must be (Cout, {shape[1]}, KH, KW), got {tuple(weight.shape)}")
    _bias("stem", "bias", bias, x, weight.shape[0])
    return _window("stem", shape, weight.shape[0], weight.shape[2:], stride, padding)


def max_pool(x, stride, padding, ceil_mode) -> Shape:
    shape = image("max_pool", x)
    _flag("max_pool", "ceil_mode", ceil_mode)
    if max(padding) > 1:
        raise ValueError(f"max_pool: padding must be at most 1, half of the window, got {tuple(padding)}")
    return _window("max_pool", shape, shape[1], (3, 3), stride, padding, ceil_mode)


def global_avg_pool(x) -> Shape:
    shape = image("global_avg_pool", x)
    return shape[0], shape[1], 1, 1


def _gradient(op: str, grad: Tensor, wanted: Shape) -> None:
    if tuple(grad.shape) != wanted:
        raise ValueError(f"{op}: grad must have the output's shape, {tuple(wanted)}, got {tuple(grad.shape)}")


def depthwise_backward_input(grad, weight, input_size, stride, padding) -> Shape:
    op = "depthwise_backward_input"
    batch, channels = image(op, grad, "grad")[:2]
    _like(op, "weight", weight, grad, "grad")
    if weight.dim() != 4 or weight.numel() == 0 or weight.shape[:2] != (channels, 1):
        raise ValueError(f"{op}: weight must be ({channels}, 1, KH, KW), got {tuple(weight.shape)}")
    shape = (batch, channels, *input_size)
    _gradient(op, grad, _window(op, shape, channels, weight.shape[2:], stride, padding))
    return shape


def depthwise_backward_weight(grad, x, kernel_size, stride, padding) -> Shape:
    op = "depthwise_backward_weight"
    image(op, grad, "grad")
    _like(op, "x", x, grad, "grad")
    shape = image(op, x)
    _gradient(op, grad, _window(op, shape, shape[1], kernel_size, stride, padding))
    return shape[1], 1, *kernel_size
