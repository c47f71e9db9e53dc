"""Pointwise (1x1) convolution."""

from __future__ import annotations

from torch import Tensor

from fastconv import ops
from fastconv.nn._conv import KernelConv2d
from fastconv.nn._twin import is_pointwise


class PointwiseConv2d(KernelConv2d):
    """`torch.nn.Conv2d` that runs through `fastconv.ops.pointwise` when it is 1x1 with stride 1, no padding and one group: the same
    constructor arguments, state_dict and results."""

    structure = "a 1x1 convolution with stride 1, no padding and one group"

    def _is_of_kind(self) -> bool:
        return is_pointwise(self)

    def _is_covered(self) -> bool:
        return is_pointwise(self)

    def _operator(self, x: Tensor, weight: Tensor) -> Tensor:
        return ops.pointwise(x, weight, self.bias)
