"""The layers of a block through torch's own operators (cuDNN), with the launchers' arguments: for shapes where those are faster."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    None: lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "silu": F.silu,
}


def depthwise(x, weight, bias=None, stride=(1, 1), padding=(1, 1), activation=None) -> torch.Tensor:
    return ACTIVATIONS[activation](F.conv2d(x, weight, bias, stride, padding, groups=x.shape[1]))


def pointwise(x, weight, bias=None, residual=None, activation=None) -> torch.Tensor:
    y = F.conv2d(x, weight, bias)
    return ACTIVATIONS[activation](y if residual is None else y + residual)


def fire_expand(x, weight1x1, bias1x1, weight3x3, bias3x3) -> torch.Tensor:
    return torch.cat([F.relu(F.conv2d(x, weight1x1, bias1x1)), F.relu(F.conv2d(x, weight3x3, bias3x3, padding=1))], 1)
