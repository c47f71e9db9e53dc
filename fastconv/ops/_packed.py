"""The packed twins: fake kernels and autocast. They exist only in the compiled extension, for float32 on CPU, without autograd."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastconv import _extension
from fastconv.ops import _checks
from fastconv.ops._register import library

PANEL = 16  # output channels in a panel


def _image(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    shape = (x.shape[0], channels, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)  # asks nothing of a symbolic shape


def _window(op: str, x: Tensor, bias: Tensor, kernel, stride, padding) -> Tensor:
    return _image(x, *_checks._window(op, x.shape, bias.numel(), kernel, stride, padding)[1:])


def _kernel_size(taps: Tensor) -> tuple[int, int]:
    return (3, 3) if taps.shape[0] == 9 else (5, 5)


def pack_panels(weight):
    out_channels, in_channels, kh, kw = weight.shape
    return weight.new_empty((-(-out_channels // PANEL), kh * kw * in_channels, PANEL))


def pack_strassen(weight):
    out_channels, in_channels = weight.shape[:2]
    groups, rest = out_channels // (2 * PANEL), out_channels % (2 * PANEL)
    floats = in_channels + groups * (2 * PANEL + 7 * in_channels // 2 * PANEL) + -(-rest // PANEL) * in_channels * PANEL
    return weight.new_empty((floats,))


def pack_digits(weight):
    out_channels, in_channels = weight.shape[:2]
    panels = -(-out_channels // PANEL)
    return weight.new_empty((1 + panels * (1 + -(-in_channels // 64) * 3 * PANEL), PANEL), dtype=torch.int32)


def pack_winograd(weight):
    out_channels, in_channels = weight.shape[:2]
    return weight.new_empty((-(-out_channels // PANEL), 36 * in_channels, PANEL))


def pack_stem_winograd(weight):
    return weight.new_empty((-(-weight.shape[0] // PANEL), 42 * weight.shape[2], PANEL))


def pack_taps(weight):
    return weight.new_empty((weight.shape[2] * weight.shape[3], weight.shape[0]))


def depthwise_packed(x, taps, bias, stride, padding, activation):
    return _window("depthwise", x, bias, _kernel_size(taps), stride, padding)


def pointwise_packed(x, panels, bias, residual, activation):
    return _image(x, bias.numel(), *x.shape[2:])


def fire_expand_packed(x, panels1x1, bias1x1, panels3x3, bias3x3):
    return _image(x, bias1x1.numel() + bias3x3.numel(), *x.shape[2:])


def fire_packed(x, squeeze_panels, squeeze_bias, panels1x1, bias1x1, panels3x3, bias3x3, winograd3x3=None):
    return _image(x, bias1x1.numel() + bias3x3.numel(), *x.shape[2:])


def inverted_residual_packed(
    x, expand_panels, expand_bias, taps, depthwise_bias, squeeze_excite, project_panels, project_bias, residual, stride, padding,
    expand_activation, depthwise_activation, squeeze_activation, gate_activation, activation,
):  # fmt: skip
    return _window("inverted_residual", x, project_bias, _kernel_size(taps), stride, padding)


def stem_packed(x, panels, bias, kernel_size, stride, padding, activation, winograd=None):
    return _window("stem", x, bias, kernel_size, stride, padding)


def _register(fake: Callable[..., Tensor]) -> None:
    name = fake.__name__
    torch.library.register_fake(f"fastconv::{name}", fake, lib=library)
    if name.endswith("_packed"):  # the kernels are float32's: inside an autocast region an input may come in another dtype
        torch.library.register_autocast(f"fastconv::{name}", "cpu", torch.float32, lib=library)


if _extension.available:
    for _fake in (
        pack_panels, pack_strassen, pack_digits, pack_winograd, pack_stem_winograd, pack_taps, depthwise_packed, pointwise_packed,
        fire_expand_packed, fire_packed, inverted_residual_packed, stem_packed,
    ):  # fmt: skip
        _register(_fake)
