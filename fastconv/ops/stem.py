import torch
from torch import Tensor

from fastconv.ops import _checks, _cuda
from fastconv.ops._prepared import Prepared, arrange, choose, pack, suits_winograd
from fastconv.ops._register import overload, register

_stem = register("stem")


def stem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 2,
    padding: int | tuple[int, int] = 1,
    activation: str | None = None,
) -> Tensor:
    """A network's first layer: activation(conv(x) + bias), a dense convolution of an image.

    x: (N, Cin, H, W), an image as it is loaded, NCHW or channels_last; weight: (Cout, Cin, KH, KW); bias: (Cout,).
    Returns (N, Cout, H', W') in x's dtype and memory format. The compiled kernel covers Cin up to 4.
    Raises ValueError for a shape, value or device that does not fit, TypeError for a type or dtype.
    Specification: `fastconv.reference.stem`.
    """
    stride, padding = _checks.stride_padding("stem", stride, padding)
    _checks.stem(x, weight, bias, stride, padding, activation)
    return _stem(x, weight, bias, stride, padding, activation)


def prepare_stem(weight: Tensor, bias: Tensor | None, *, stride, padding, activation: str | None, exact: bool = False) -> Prepared:
    """Binds `stem` to its weights: returns call(x).

    Unless `exact`, the CPU kernel computes a stem 7 wide of stride 2 over RGB (SqueezeNet 1.0's) by Winograd's F(4, 4) along its rows.
    """
    stride, padding = _checks.stride_padding("stem", stride, padding)
    compiled, label = choose("stem", "stem_packed", weight=weight, bias=bias, stride=stride, padding=padding)
    if not compiled:
        op = _triton_stem if label.endswith("triton") else overload("stem")
        return Prepared(op, (*arrange(label, weight, bias), stride, padding, activation), label)
    transforms = not exact and weight.shape[1] == 3 and weight.shape[3] == 7 and stride[1] == 2 and suits_winograd(weight)
    winograd = torch.ops.fastconv.pack_stem_winograd(weight) if transforms else None
    args = (*pack(weight, bias), tuple(weight.shape[2:]), stride, padding, activation, winograd)
    return Prepared(overload("stem_packed"), args, label if winograd is None else f"{label} winograd")


def _triton_stem(x: Tensor, *args) -> Tensor:
    """Its output is channels_last whatever x is, as the compiled kernel's."""
    _cuda.check_input("stem", x, args[0])
    return _cuda.run("stem", x, *args, always_nhwc=True)
