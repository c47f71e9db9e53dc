"""MobileNet V2 (Sandler et al., 2018, https://arxiv.org/abs/1801.04381)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastconv.models._layers import init_weights
from fastconv.models._weights import Weights, load_weights
from fastconv.nn._channels import make_divisible
from fastconv.nn._training import innermost
from fastconv.nn.conv_norm import Conv2dNormActivation
from fastconv.nn.inverted_residual import InvertedResidual
from fastconv.optimize.planned import Planned

# expand ratio, output channels, blocks, stride of the first block (table 2 of the paper)
_SETTING = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class MobileNetV2(Planned):
    """Twin of `torchvision.models.MobileNetV2`: x (N, 3, H, W) -> logits (N, num_classes).

    Raises ValueError if `inverted_residual_setting` is not a list of [expand ratio, channels, blocks, stride].
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width_mult: float = 1.0,
        inverted_residual_setting: Sequence[Sequence[int]] | None = None,
        round_nearest: int = 8,
        block: Callable[..., nn.Module] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        block = block or InvertedResidual
        norm_layer = norm_layer or nn.BatchNorm2d
        setting = _SETTING if inverted_residual_setting is None else inverted_residual_setting
        if not setting or any(len(row) != 4 for row in setting):
            raise ValueError(
                f"MobileNetV2: inverted_residual_setting must be rows of (expand ratio, channels, blocks, stride), got {setting}"
            )
        channels = make_divisible(32 * width_mult, round_nearest)
        self.last_channel = make_divisible(1280 * max(1.0, width_mult), round_nearest)
        features: list[nn.Module] = [Conv2dNormActivation(3, channels, stride=2, norm_layer=norm_layer, activation_layer=nn.ReLU6)]
        for expand_ratio, width, blocks, stride in setting:
            out = make_divisible(width * width_mult, round_nearest)
            for i in range(blocks):
                features.append(block(channels, out, stride if i == 0 else 1, expand_ratio=expand_ratio, norm_layer=norm_layer))
                channels = out
        features.append(Conv2dNormActivation(channels, self.last_channel, 1, norm_layer=norm_layer, activation_layer=nn.ReLU6))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(p=dropout), nn.Linear(self.last_channel, num_classes))
        init_weights(self)

    def _forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.features(innermost(x)), (1, 1))
        return self.classifier(torch.flatten(x, 1))


def mobilenet_v2(
    *,
    weights: Weights = None,
    progress: bool = True,
    num_classes: int = 1000,
    width_mult: float = 1.0,
    inverted_residual_setting: Sequence[Sequence[int]] | None = None,
    round_nearest: int = 8,
    block: Callable[..., nn.Module] | None = None,
    norm_layer: Callable[..., nn.Module] | None = None,
    dropout: float = 0.2,
) -> MobileNetV2:
    """MobileNet V2. `weights`: see `fastconv.models`."""
    model = MobileNetV2(num_classes, width_mult, inverted_residual_setting, round_nearest, block, norm_layer, dropout)
    return load_weights(model, weights, "mobilenet_v2", progress)
