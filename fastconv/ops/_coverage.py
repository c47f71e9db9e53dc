"""What the compiled CPU kernels cover. Everything else runs through ATen, or is refused when the backend is forced."""

import torch
from torch import Tensor


def uncovered(name: str, **arguments) -> str | None:
    """Why the compiled kernel of an operator does not take these arguments (weights, and x where there is one), or None."""
    for value in arguments.values():
        if isinstance(value, Tensor) and (value.device.type != "cpu" or value.dtype != torch.float32):
            return f"{str(value.dtype).removeprefix('torch.')} on {value.device.type}"
    weight = arguments["weight"] if name in ("depthwise", "depthwise_backward_input", "stem") else arguments.get("depthwise_weight")
    if name == "depthwise_backward_weight":
        channels, kernel = 1, tuple(arguments["kernel_size"])
    elif weight is not None:
        channels, kernel = weight.shape[1], tuple(weight.shape[2:])
    else:
        return None
    stride, padding = tuple(arguments["stride"]), tuple(arguments["padding"])
    if name == "stem":
        if channels > 4:
            return f"{channels} input channels"
        if not 1 < max(kernel) <= 7:
            return f"a {kernel[0]} x {kernel[1]} kernel"
        if padding[0] >= kernel[0] or padding[1] >= kernel[1]:
            return f"padding {padding} around a {kernel[0]} x {kernel[1]} kernel"
    else:
        if kernel not in ((3, 3), (5, 5)):
            return f"a {kernel[0]} x {kernel[1]} kernel"
        if stride[1] > 2:
            return f"stride {stride}"
        if max(padding) >= kernel[0]:
            return f"padding {padding} around a {kernel[0]} x {kernel[1]} kernel"
    return None
