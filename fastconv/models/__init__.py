"""SqueezeNet and MobileNet with the constructor arguments, state_dict keys and shapes of torchvision (V1: of timm's mobilenetv1_100).

Every builder takes `weights`:
- None: random weights, initialised as the original does;
- the path of a checkpoint: .safetensors, or a torch.save file (read with weights_only=True), its usual wrappers accepted;
- a torchvision weights enum member, its name ("IMAGENET1K_V1") or "DEFAULT": downloaded and checked by torchvision.
Loading is strict: a missing, unexpected or misshapen entry is a ValueError that names it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fastconv.models.mobilenet_v1 import MobileNetV1, mobilenet_v1
from fastconv.models.mobilenet_v2 import MobileNetV2, mobilenet_v2
from fastconv.models.mobilenet_v3 import MobileNetV3, mobilenet_v3_large, mobilenet_v3_small
from fastconv.models.squeezenet import SqueezeNet, squeezenet1_0, squeezenet1_1

__all__ = [
    "MobileNetV1",
    "MobileNetV2",
    "MobileNetV3",
    "SqueezeNet",
    "get_model",
    "list_models",
    "mobilenet_v1",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "squeezenet1_0",
    "squeezenet1_1",
]

_BUILDERS = {
    builder.__name__: builder
    for builder in (mobilenet_v1, mobilenet_v2, mobilenet_v3_large, mobilenet_v3_small, squeezenet1_0, squeezenet1_1)
}


def list_models() -> list[str]:
    """The names `get_model` takes."""
    return sorted(_BUILDERS)


def get_model(name: str, **kwargs: Any) -> nn.Module:
    """Build the model `name` with its builder's arguments. Raises ValueError for an unknown name."""
    if name not in _BUILDERS:
        raise ValueError(f"unknown model {name!r}; available: {', '.join(list_models())}")
    return _BUILDERS[name](**kwargs)
