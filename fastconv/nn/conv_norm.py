"""Convolution, normalisation and activation in a row."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastconv.nn._conv import KernelConv2d
from fastconv.nn._training import run_each
from fastconv.nn._twin import share
from fastconv.optimize.planned import Planned


class Conv2dNormActivation(Planned, nn.Sequential):
    """Twin of `torchvision.ops.Conv2dNormActivation`: the convolution is "0", the norm "1", the activation "2".

    x (N, in_channels, H, W) -> (N, out_channels, H', W'), any floating dtype; in eval mode without gradients one kernel where one covers
    the convolution. `padding=None` keeps the resolution at stride 1; `bias=None` gives the convolution a bias only when there is no norm.
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

    @classmethod
    def from_torch(cls, module: nn.Module) -> Conv2dNormActivation:
        """The same layer with the same Parameter objects, from a Sequential of Conv2d, BatchNorm2d and, if it has one, an activation.

        Raises TypeError or ValueError if `module` is not built so."""
        return cls._adopt(share(module))

    @classmethod
    def _adopt(cls, module: nn.Module) -> Conv2dNormActivation:
        """Makes `module` itself one of these, or raises as `from_torch` does and leaves it as it was."""
        if not isinstance(module, nn.Sequential):
            raise TypeError(f"Conv2dNormActivation: module must be a Sequential, got {type(module).__name__}")
        if len(module) not in (2, 3):
            raise ValueError(f"Conv2dNormActivation: module must hold a convolution, norm[, activation], got {len(module)} modules")
        conv, norm, *activation = module
        if not (type(conv) is nn.Conv2d or isinstance(conv, KernelConv2d)):
            raise TypeError(f"Conv2dNormActivation: module[0] must be a Conv2d, got {type(conv).__name__}")
        if type(norm) is not nn.BatchNorm2d:
            raise TypeError(f"Conv2dNormActivation: module[1] must be a BatchNorm2d, got {type(norm).__name__}")
        if activation and type(activation[0]).__module__ != "torch.nn.modules.activation":
            raise TypeError(f"Conv2dNormActivation: module[2] must be an activation, got {type(activation[0]).__name__}")
        module.__class__ = cls
        module.out_channels = conv.out_channels
        return module

    def _forward(self, x: Tensor) -> Tensor:
        return run_each(x, self)

    _forward.is_chain = True  # its modules one after another, nothing else (fastconv/nn/_training.py)
