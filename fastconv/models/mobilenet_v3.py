"""MobileNet V3, small and large (Howard et al., 2019, https://arxiv.org/abs/1905.02244)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fastconv.models._layers import init_weights
from fastconv.models._weights import Weights, load_weights
from fastconv.nn._channels import make_divisible
from fastconv.nn._training import innermost, run
from fastconv.nn._twin import is_depthwise, is_pointwise, member
from fastconv.nn.conv_norm import Conv2dNormActivation
from fastconv.optimize.planned import Planned


class SqueezeExcitation(nn.Module):
    """Twin of `torchvision.ops.SqueezeExcitation` (Hu et al., 2017, https://arxiv.org/abs/1709.01507)."""

    def __init__(
        self,
        input_channels: int,
        squeeze_channels: int,
        activation: Callable[..., nn.Module] = nn.ReLU,
        scale_activation: Callable[..., nn.Module] = nn.Sigmoid,
    ) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(input_channels, squeeze_channels, 1)
        self.fc2 = nn.Conv2d(squeeze_channels, input_channels, 1)
        self.activation = activation()
        self.scale_activation = scale_activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x))))) * x


@dataclass
class InvertedResidualConfig:
    """One row of tables 1 and 2 of the paper; the channel counts are scaled by `width_mult` on construction."""

    input_channels: int
    kernel: int
    expanded_channels: int
    out_channels: int
    use_se: bool
    activation: str
    stride: int
    dilation: int
    width_mult: float

    def __post_init__(self) -> None:
        self.input_channels = self.adjust_channels(self.input_channels, self.width_mult)
        self.expanded_channels = self.adjust_channels(self.expanded_channels, self.width_mult)
        self.out_channels = self.adjust_channels(self.out_channels, self.width_mult)
        self.use_hs = self.activation == "HS"

    @staticmethod
    def adjust_channels(channels: int, width_mult: float) -> int:
        return make_divisible(channels * width_mult, 8)


class InvertedResidual(Planned):
    """Twin of `torchvision.models.mobilenetv3.InvertedResidual`: expand, depthwise, squeeze-excitation, linear projection.

    Raises ValueError for a stride other than 1 or 2.
    """

    def __init__(
        self,
        cnf: InvertedResidualConfig,
        norm_layer: Callable[..., nn.Module],
        se_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if cnf.stride not in (1, 2):
            raise ValueError(f"InvertedResidual: stride must be 1 or 2, got {cnf.stride}")
        self.use_res_connect = cnf.stride == 1 and cnf.input_channels == cnf.out_channels
        self.out_channels = cnf.out_channels
        se_layer = se_layer or partial(SqueezeExcitation, scale_activation=nn.Hardsigmoid)
        conv = partial(Conv2dNormActivation, norm_layer=norm_layer, activation_layer=nn.Hardswish if cnf.use_hs else nn.ReLU)
        layers: list[nn.Module] = []
        if cnf.expanded_channels != cnf.input_channels:
            layers.append(conv(cnf.input_channels, cnf.expanded_channels, 1))
        layers.append(
            conv(
                cnf.expanded_channels,
                cnf.expanded_channels,
                cnf.kernel,
                stride=1 if cnf.dilation > 1 else cnf.stride,
                dilation=cnf.dilation,
                groups=cnf.expanded_channels,
            )
        )
        if cnf.use_se:
            layers.append(se_layer(cnf.expanded_channels, make_divisible(cnf.expanded_channels // 4, 8)))
        layers.append(conv(cnf.expanded_channels, cnf.out_channels, 1, activation_layer=None))
        self.block = nn.Sequential(*layers)

    @classmethod
    def _adopt(cls, module: nn.Module) -> InvertedResidual:
        """Makes `module` itself one of these, or raises TypeError or ValueError and leaves it as it was."""
        chain = member("InvertedResidual", module, "block", nn.Sequential)
        member("InvertedResidual", module, "use_res_connect", bool)
        if len(module._modules) > 1:
            raise ValueError(f"InvertedResidual: its only child must be block, got {', '.join(module._modules)}")
        convs = [part[0] for part in chain if isinstance(part, nn.Sequential) and len(part)]
        if not (convs and all(isinstance(conv, nn.Conv2d) for conv in convs) and is_pointwise(convs[-1]) and any(map(is_depthwise, convs))):
            raise ValueError("InvertedResidual: block must hold rows of convolution, norm and activation, a depthwise one and a projection")
        module.__class__ = cls
        module.out_channels = convs[-1].out_channels
        return module

    def _forward(self, x: Tensor) -> Tensor:
        return run(x, self.block, residual=self.use_res_connect, add=operator.iadd)


class MobileNetV3(Planned):
    """Twin of `torchvision.models.MobileNetV3`: x (N, 3, H, W) -> logits (N, num_classes).

    Raises ValueError if `inverted_residual_setting` is empty, TypeError if it holds anything but InvertedResidualConfig.
    """

    def __init__(
        self,
        inverted_residual_setting: Sequence[InvertedResidualConfig],
        last_channel: int,
        num_classes: int = 1000,
        block: Callable[..., nn.Module] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        if not inverted_residual_setting:
            raise ValueError("MobileNetV3: inverted_residual_setting must not be empty")
        for row in inverted_residual_setting:
            if not isinstance(row, InvertedResidualConfig):
                raise TypeError(
                    f"MobileNetV3: inverted_residual_setting must be a list of InvertedResidualConfig, got {type(row).__name__}"
                )
        block = block or InvertedResidual
        norm_layer = norm_layer or partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)
        conv = partial(Conv2dNormActivation, norm_layer=norm_layer, activation_layer=nn.Hardswish)
        first, last = inverted_residual_setting[0].input_channels, inverted_residual_setting[-1].out_channels
        self.features = nn.Sequential(
            conv(3, first, 3, stride=2), *(block(row, norm_layer) for row in inverted_residual_setting), conv(last, 6 * last, 1)
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(6 * last, last_channel),
            nn.Hardswish(inplace=True),
            nn.Dropout(p=dropout, inplace=True),
            nn.Linear(last_channel, num_classes),
        )
        init_weights(self)

    def _forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(innermost(x))), 1))


def _large(width_mult: float, reduced_tail: bool, dilated: bool) -> tuple[list[InvertedResidualConfig], int]:
    row = partial(InvertedResidualConfig, width_mult=width_mult)
    divider, dilation = 2 if reduced_tail else 1, 2 if dilated else 1
    return [
        row(16, 3, 16, 16, False, "RE", 1, 1),
        row(16, 3, 64, 24, False, "RE", 2, 1),
        row(24, 3, 72, 24, False, "RE", 1, 1),
        row(24, 5, 72, 40, True, "RE", 2, 1),
        row(40, 5, 120, 40, True, "RE", 1, 1),
        row(40, 5, 120, 40, True, "RE", 1, 1),
        row(40, 3, 240, 80, False, "HS", 2, 1),
        row(80, 3, 200, 80, False, "HS", 1, 1),
        row(80, 3, 184, 80, False, "HS", 1, 1),
        row(80, 3, 184, 80, False, "HS", 1, 1),
        row(80, 3, 480, 112, True, "HS", 1, 1),
        row(112, 3, 672, 112, True, "HS", 1, 1),
        row(112, 5, 672, 160 // divider, True, "HS", 2, dilation),
        row(160 // divider, 5, 960 // divider, 160 // divider, True, "HS", 1, dilation),
        row(160 // divider, 5, 960 // divider, 160 // divider, True, "HS", 1, dilation),
    ], InvertedResidualConfig.adjust_channels(1280 // divider, width_mult)


def _small(width_mult: float, reduced_tail: bool, dilated: bool) -> tuple[list[InvertedResidualConfig], int]:
    row = partial(InvertedResidualConfig, width_mult=width_mult)
    divider, dilation = 2 if reduced_tail else 1, 2 if dilated else 1
    return [
        row(16, 3, 16, 16, True, "RE", 2, 1),
        row(16, 3, 72, 24, False, "RE", 2, 1),
        row(24, 3, 88, 24, False, "RE", 1, 1),
        row(24, 5, 96, 40, True, "HS", 2, 1),
        row(40, 5, 240, 40, True, "HS", 1, 1),
        row(40, 5, 240, 40, True, "HS", 1, 1),
        row(40, 5, 120, 48, True, "HS", 1, 1),
        row(48, 5, 144, 48, True, "HS", 1, 1),
        row(48, 5, 288, 96 // divider, True, "HS", 2, dilation),
        row(96 // divider, 5, 576 // divider, 96 // divider, True, "HS", 1, dilation),
        row(96 // divider, 5, 576 // divider, 96 // divider, True, "HS", 1, dilation),
    ], InvertedResidualConfig.adjust_channels(1024 // divider, width_mult)


def mobilenet_v3_large(
    *,
    weights: Weights = None,
    progress: bool = True,
    num_classes: int = 1000,
    width_mult: float = 1.0,
    reduced_tail: bool = False,
    dilated: bool = False,
    block: Callable[..., nn.Module] | None = None,
    norm_layer: Callable[..., nn.Module] | None = None,
    dropout: float = 0.2,
) -> MobileNetV3:
    """MobileNet V3 large. `reduced_tail` halves the last stages' channels, `dilated` keeps the last stage's resolution.
    `weights`: see `fastconv.models`."""
    model = MobileNetV3(*_large(width_mult, reduced_tail, dilated), num_classes, block, norm_layer, dropout)
    return load_weights(model, weights, "mobilenet_v3_large", progress)


def mobilenet_v3_small(
    *,
    weights: Weights = None,
    progress: bool = True,
    num_classes: int = 1000,
    width_mult: float = 1.0,
    reduced_tail: bool = False,
    dilated: bool = False,
    block: Callable[..., nn.Module] | None = None,
    norm_layer: Callable[..., nn.Module] | None = None,
    dropout: float = 0.2,
) -> MobileNetV3:
    """MobileNet V3 small. `reduced_tail` halves the last stages' channels, `dilated` keeps the last stage's resolution.
    `weights`: see `fastconv.models`."""
    model = MobileNetV3(*_small(width_mult, reduced_tail, dilated), num_classes, block, norm_layer, dropout)
    return load_weights(model, weights, "mobilenet_v3_small", progress)
