"""MobileNet V1 (Howard et al., 2017, https://arxiv.org/abs/1704.04861)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastconv.models._weights import Weights, load_weights
from fastconv.nn._channels import make_divisible
from fastconv.nn._training import innermost, run_each
from fastconv.nn.separable import DepthwiseSeparable
from fastconv.optimize.planned import Planned

# (output channels, stride of the first block, blocks)
_STAGES = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 2, 6), (1024, 2, 2))


class MobileNetV1(Planned):
    """MobileNet V1 with the state_dict keys and shapes of timm's `mobilenetv1_100`: x (N, 3, H, W) -> logits (N, num_classes)."""

    def __init__(self, num_classes: int = 1000, width_mult: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        channels = make_divisible(32 * width_mult, 8)
        self.conv_stem = nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU6(inplace=True)
        stages = []
        for width, stride, blocks in _STAGES:
            stage = []
            for i in range(blocks):
                out = make_divisible(width * width_mult, 8)
                stage.append(
                    DepthwiseSeparable(channels, out, stride=stride if i == 0 else 1, noskip=True, pw_act=True, act_layer=nn.ReLU6)
                )
                channels = out
            stages.append(nn.Sequential(*stage))
        self.blocks = nn.Sequential(*stages)
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels, num_classes)

        # timm's initialisation (that of the TensorFlow models).
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0, math.sqrt(2.0 / fan_out))
            elif isinstance(module, nn.Linear):
                bound = 1.0 / math.sqrt(module.out_features)
                nn.init.uniform_(module.weight, -bound, bound)
                nn.init.zeros_(module.bias)

    def _forward(self, x: Tensor) -> Tensor:
        x = run_each(innermost(x), (self.conv_stem, self.bn1, self.act1))
        x = torch.flatten(self.global_pool(self.blocks(x)), 1)
        return self.classifier(self.dropout(x))


def mobilenet_v1(
    *, weights: Weights = None, progress: bool = True, num_classes: int = 1000, width_mult: float = 1.0, dropout: float = 0.0
) -> MobileNetV1:
    """MobileNet V1. `weights`: see `fastconv.models`; torchvision has none for it, a path to a timm checkpoint does."""
    return load_weights(MobileNetV1(num_classes, width_mult, dropout), weights, "mobilenet_v1", progress)
