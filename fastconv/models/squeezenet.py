"""SqueezeNet 1.0 and 1.1 (Iandola et al., 2016, https://arxiv.org/abs/1602.07360)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastconv.models._weights import Weights, load_weights
from fastconv.nn._training import TrainedSequential, formatted_like, innermost, trains
from fastconv.nn.fire import Fire
from fastconv.optimize.planned import Planned


class SqueezeNet(Planned):
    """Twin of `torchvision.models.SqueezeNet`: x (N, 3, H, W) -> logits (N, num_classes).

    Raises ValueError for a version other than "1_0" and "1_1".
    """

    def __init__(self, version: str = "1_0", num_classes: int = 1000, dropout: float = 0.5) -> None:
        super().__init__()
        self.num_classes = num_classes
        if version == "1_0":
            self.features = TrainedSequential(
                nn.Conv2d(3, 96, kernel_size=7, stride=2),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
                Fire(96, 16, 64, 64),
                Fire(128, 16, 64, 64),
                Fire(128, 32, 128, 128),
                nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
                Fire(256, 32, 128, 128),
                Fire(256, 48, 192, 192),
                Fire(384, 48, 192, 192),
                Fire(384, 64, 256, 256),
                nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
                Fire(512, 64, 256, 256),
            )
        elif version == "1_1":
            self.features = TrainedSequential(
                nn.Conv2d(3, 64, kernel_size=3, stride=2),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
                Fire(64, 16, 64, 64),
                Fire(128, 16, 64, 64),
                nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
                Fire(128, 32, 128, 128),
                Fire(256, 32, 128, 128),
                nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
                Fire(256, 48, 192, 192),
                Fire(384, 48, 192, 192),
                Fire(384, 64, 256, 256),
                Fire(512, 64, 256, 256),
            )
        else:
            raise ValueError(f'SqueezeNet: version must be "1_0" or "1_1", got {version!r}')
        last = nn.Conv2d(512, num_classes, kernel_size=1)
        self.classifier = TrainedSequential(nn.Dropout(p=dropout), last, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1)))

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if module is last:
                    nn.init.normal_(module.weight, mean=0.0, std=0.01)
                else:
                    nn.init.kaiming_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def _features(self, x: Tensor) -> Tensor:
        if not trains(x):
            return self.features(x)
        return formatted_like(self.features(innermost(x)), x)  # dropout draws in the order of memory

    def _forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.classifier(self._features(x)), 1)


def squeezenet1_0(*, weights: Weights = None, progress: bool = True, num_classes: int = 1000, dropout: float = 0.5) -> SqueezeNet:
    """SqueezeNet 1.0. `weights`: see `fastconv.models`."""
    return load_weights(SqueezeNet("1_0", num_classes, dropout), weights, "squeezenet1_0", progress)


def squeezenet1_1(*, weights: Weights = None, progress: bool = True, num_classes: int = 1000, dropout: float = 0.5) -> SqueezeNet:
    """SqueezeNet 1.1, with 2.4 times less computation than 1.0. `weights`: see `fastconv.models`."""
    return load_weights(SqueezeNet("1_1", num_classes, dropout), weights, "squeezenet1_1", progress)
