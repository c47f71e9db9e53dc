"""Squeeze-excitation between the two halves of a block: three small kernels on (N, channels), and the projection that applies the gate."""

import torch

from .depthwise import depthwise
from .global_avg_pool import global_avg_pool
from .inverted_residual import expand_depthwise
from .pointwise import pointwise


def squeeze_excite(
    x: torch.Tensor,
    expand_weight: torch.Tensor | None,
    expand_bias: torch.Tensor | None,
    depthwise_weight: torch.Tensor,
    depthwise_bias: torch.Tensor | None,
    gate_weights: tuple[torch.Tensor | None, ...],
    project_weight: torch.Tensor,
    project_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    expand_activation: str | None,
    depthwise_activation: str | None,
    squeeze_activation: str | None,
    gate_activation: str | None,
    activation: str | None,
    fused: bool = True,
) -> torch.Tensor:
    """A block with squeeze-excitation, split at its pooling. x (N, C, H, W); expand_weight (E, C, 1, 1) or None; gate_weights: two 1x1
    weights and their biases; gate_activation: "sigmoid" or "hardsigmoid". Arguments are not checked.

    fused: expand and depthwise in one kernel, which also sums its tiles; otherwise one after the other, and the sums take a pass.
    """
    if expand_weight is not None and fused:
        y, sums = expand_depthwise(
            x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, stride, padding, expand_activation, depthwise_activation
        )
    else:
        y = x if expand_weight is None else pointwise(x, expand_weight, expand_bias, None, expand_activation)
        y = sums = depthwise(y, depthwise_weight, depthwise_bias, stride, padding, depthwise_activation)
    mean = global_avg_pool(sums, y.shape[2] * y.shape[3], x.dtype)
    w1, b1, w2, b2 = gate_weights
    gate = pointwise(pointwise(mean, w1, b1, None, squeeze_activation), w2, b2, None, gate_activation)
    return pointwise(y, project_weight, project_bias, residual, activation, gate)
