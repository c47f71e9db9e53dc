"""Convolution, normalisation and activation in a row."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastconv.nn._training import run_each


class Conv2dNormActivation(nn.Sequential):
    """Twin of `torchvision.ops.Conv2dNormActivation`: the convolution is "0", the norm "1", the activation "2".

    `padding=None` keeps the resolution at stride 1; `bias=None` gives the convolution a bias only when there is no norm.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        norm_layer: Callable[..., nn.Module] | None = nn.BatchNorm2d,
        activation_layer: Callable[..., nn.Module] | None = nn.ReLU,
        dilation: int = 1,
        inplace: bool | None = True,
        bias: bool | None = None,
    ) -> None:
        if padding is None:
            padding = (kernel_size - 1) // 2 * dilation
        if bias is None:
            bias = norm_layer is None
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation=dilation, groups=groups, bias=bias)
        ]
        if norm_layer is not None:
            layers.append(norm_layer(out_channels))
        if activation_layer is not None:
            layers.append(activation_layer() if inplace is None else activation_layer(inplace=inplace))
        super().__init__(*layers)
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> Tensor:
        return run_each(x, self)

    forward.is_chain = True
