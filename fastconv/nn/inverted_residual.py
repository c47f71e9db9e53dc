"""The inverted residual of MobileNet V2 (Sandler et al., 2018, https://arxiv.org/abs/1801.04381)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastconv.nn._training import run
from fastconv.nn._twin import describe, is_depthwise, is_pointwise, member, share
from fastconv.nn.conv_norm import Conv2dNormActivation
from fastconv.optimize.planned import Planned


class InvertedResidual(Planned):
    """Twin of `torchvision.models.mobilenetv2.InvertedResidual`: 1x1 expand, 3x3 depthwise, linear 1x1 projection.

    x (N, inp, H, W) -> (N, oup, ceil(H / stride), ceil(W / stride)), any floating dtype; x is added when stride is 1 and inp == oup.
    Raises ValueError for a stride other than 1 or 2.
    """

    def __init__(self, inp: int, oup: int, stride: int, expand_ratio: float, norm_layer: Callable[..., nn.Module] | None = None) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"InvertedResidual: stride must be 1 or 2, got {stride}")
        norm_layer = norm_layer or nn.BatchNorm2d
        hidden = round(inp * expand_ratio)
        self.stride = stride
        self.use_res_connect = stride == 1 and inp == oup
        self.out_channels = oup
        layers: list[nn.Module] = []
        if expand_ratio != 1:
            layers.append(Conv2dNormActivation(inp, hidden, 1, norm_layer=norm_layer, activation_layer=nn.ReLU6))
        layers += [
            Conv2dNormActivation(hidden, hidden, stride=stride, groups=hidden, norm_layer=norm_layer, activation_layer=nn.ReLU6),
            nn.Conv2d(hidden, oup, 1, bias=False),
            norm_layer(oup),
        ]
        self.conv = nn.Sequential(*layers)

    @classmethod
    def from_torch(cls, module: nn.Module) -> InvertedResidual:
        """The same layer with the same Parameter objects. Raises TypeError or ValueError if `module` is not an inverted residual
        of MobileNet V2."""
        return cls._adopt(share(module))

    @classmethod
    def _adopt(cls, module: nn.Module) -> InvertedResidual:
        """Makes `module` itself one of these, or raises as `from_torch` does and leaves it as it was."""
        chain = member("InvertedResidual", module, "conv", nn.Sequential)
        member("InvertedResidual", module, "use_res_connect", bool)
        if len(chain) not in (3, 4):
            raise ValueError(f"InvertedResidual: conv must hold [expand,] depthwise, projection and norm, got {len(chain)} modules")
        *blocks, project, _ = chain
        convs = [block[0] if isinstance(block, nn.Sequential) else block for block in (*blocks, project)]
        for conv in convs:
            if not isinstance(conv, nn.Conv2d):
                raise TypeError(f"InvertedResidual: conv must hold convolution blocks and a projection, got {type(conv).__name__}")
        if not is_depthwise(convs[-2]):
            raise ValueError(f"InvertedResidual: the convolution before the projection must be depthwise, got {describe(convs[-2])}")
        for conv in (*convs[:-2], project):
            if not is_pointwise(conv):
                raise ValueError(f"InvertedResidual: expand and projection must be 1x1 convolutions, got {describe(conv)}")
        module.__class__ = cls
        module.stride = convs[-2].stride[0]
        module.out_channels = project.out_channels
        return module

    def _forward(self, x: Tensor) -> Tensor:
        return run(x, self.conv, residual=self.use_res_connect)
