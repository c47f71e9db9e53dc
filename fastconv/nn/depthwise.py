"""Depthwise convolution."""

from __future__ import annotations

from torch import Tensor

from fastconv import ops
from fastconv.nn._conv import KernelConv2d
from fastconv.nn._twin import is_depthwise


class DepthwiseConv2d(KernelConv2d):
    """`torch.nn.Conv2d` that runs through `fastconv.ops.depthwise` when it is depthwise (groups == in_channels == out_channels), 3x3 or
    5x5, undilated and zero-padded: the same constructor arguments, state_dict and results."""

    structure = "depthwise (groups == in_channels == out_channels)"

    def _is_of_kind(self) -> bool:
        return is_depthwise(self)

    def _is_covered(self) -> bool:
        geometry = self.kernel_size in ((3, 3), (5, 5)) and self.dilation == (1, 1) and isinstance(self.padding, tuple)
        return geometry and self.padding_mode == "zeros" and is_depthwise(self)

    def _operator(self, x: Tensor, weight: Tensor) -> Tensor:
        return ops.depthwise(x, weight, self.bias, stride=self.stride, padding=self.padding)
