"""The fire module of SqueezeNet (Iandola et al., 2016, https://arxiv.org/abs/1602.07360)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastconv.nn._training import fire
from fastconv.nn._twin import describe, is_pointwise, member, share
from fastconv.optimize.planned import Planned


class Fire(Planned):
    """Twin of `torchvision.models.squeezenet.Fire`: a 1x1 squeeze feeding a 1x1 and a 3x3 expand, concatenated.

    x (N, inplanes, H, W) -> (N, expand1x1_planes + expand3x3_planes, H, W), any floating dtype.
    In eval mode without gradients the whole module is one kernel.
    """

    def __init__(self, inplanes: int, squeeze_planes: int, expand1x1_planes: int, expand3x3_planes: int) -> None:
        super().__init__()
        self.inplanes = inplanes
        self.squeeze = nn.Conv2d(inplanes, squeeze_planes, kernel_size=1)
        self.squeeze_activation = nn.ReLU(inplace=True)
        self.expand1x1 = nn.Conv2d(squeeze_planes, expand1x1_planes, kernel_size=1)
        self.expand1x1_activation = nn.ReLU(inplace=True)
        self.expand3x3 = nn.Conv2d(squeeze_planes, expand3x3_planes, kernel_size=3, padding=1)
        self.expand3x3_activation = nn.ReLU(inplace=True)

    @classmethod
    def from_torch(cls, module: nn.Module) -> Fire:
        """The same layer with the same Parameter objects. Raises TypeError or ValueError if `module` is not a fire module."""
        return cls._adopt(share(module))

    @classmethod
    def _adopt(cls, module: nn.Module) -> Fire:
        """Makes `module` itself one of these, or raises as `from_torch` does and leaves it as it was."""
        for name in ("squeeze", "expand1x1", "expand3x3"):
            conv = member("Fire", module, name, nn.Conv2d)
            member("Fire", module, f"{name}_activation", nn.ReLU)
            if name == "expand3x3":
                right = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups) == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
                if not right or conv.padding_mode != "zeros":
                    raise ValueError(f"Fire: expand3x3 must be a 3x3 convolution with padding 1, got {describe(conv)}")
            elif not is_pointwise(conv):
                raise ValueError(f"Fire: {name} must be a 1x1 convolution, got {describe(conv)}")
        module.__class__ = cls
        module.inplanes = module.squeeze.in_channels
        return module

    def _forward(self, x: Tensor) -> Tensor:
        activations = (self.squeeze_activation, self.expand1x1_activation, self.expand3x3_activation)
        trained = fire(x, self.squeeze, self.expand1x1, self.expand3x3, activations)
        if trained is not None:
            return trained
        x = self.squeeze_activation(self.squeeze(x))
        return torch.cat([self.expand1x1_activation(self.expand1x1(x)), self.expand3x3_activation(self.expand3x3(x))], 1)
