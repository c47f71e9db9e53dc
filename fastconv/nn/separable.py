"""The depthwise-separable block of MobileNet V1 (Howard et al., 2017, https://arxiv.org/abs/1704.04861)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastconv.nn._training import run_each
from fastconv.nn._twin import describe, is_depthwise, is_pointwise, member, share
from fastconv.optimize.planned import Planned


def _plain_norm(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """The normalisation alone of timm's BatchNormAct2d, with its tensors shared."""
    plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta")
    plain._parameters.update(norm._parameters)
    plain._buffers.update(norm._buffers)
    return plain.train(norm.training)


class DepthwiseSeparable(Planned):
    """Twin of timm's `DepthwiseSeparableConv` as MobileNet V1 uses it: depthwise, norm, activation, 1x1, norm[, activation].

    x (N, in_chs, H, W) -> (N, out_chs, ceil(H / stride), ceil(W / stride)), any floating dtype. `pw_act` adds the activation after
    the 1x1; the input is added to the result when the shapes allow it, unless `noskip`.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        dw_kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        *,
        noskip: bool = False,
        pw_act: bool = False,
        act_layer: Callable[..., nn.Module] = nn.ReLU,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.has_skip = stride == 1 and in_chs == out_chs and not noskip
        padding = (stride - 1 + dilation * (dw_kernel_size - 1)) // 2
        self.conv_dw = nn.Conv2d(in_chs, in_chs, dw_kernel_size, stride, padding, dilation, groups=in_chs, bias=False)
        self.bn1 = norm_layer(in_chs)
        self.act1 = act_layer(inplace=True)
        self.conv_pw = nn.Conv2d(in_chs, out_chs, 1, bias=False)
        self.bn2 = norm_layer(out_chs)
        self.act2 = act_layer(inplace=True) if pw_act else nn.Identity()

    @classmethod
    def from_torch(cls, module: nn.Module) -> DepthwiseSeparable:
        """The same layer with the same Parameter objects, from timm's DepthwiseSeparableConv or from one of these.

        Raises TypeError or ValueError if `module` is not built so: space-to-depth, anti-aliasing, squeeze-excitation and stochastic
        depth belong to other networks and are not taken.
        """
        depthwise, pointwise = (member("DepthwiseSeparable", module, name, nn.Conv2d) for name in ("conv_dw", "conv_pw"))
        if not is_depthwise(depthwise):
            raise ValueError(f"DepthwiseSeparable: conv_dw must be depthwise, got {describe(depthwise)}")
        if not is_pointwise(pointwise):
            raise ValueError(f"DepthwiseSeparable: conv_pw must be a 1x1 convolution, got {describe(pointwise)}")
        for name in ("conv_s2d", "aa", "se", "drop_path"):
            extra = getattr(module, name, None)
            if extra is not None and not isinstance(extra, nn.Identity):
                raise ValueError(f"DepthwiseSeparable: {name} is not supported, got {type(extra).__name__}")
        module_copy = share(module)
        layer = cls.__new__(cls)
        Planned.__init__(layer)
        layer.has_skip = member("DepthwiseSeparable", module, "has_skip", bool)
        for i, conv in (("1", "conv_dw"), ("2", "conv_pw")):
            norm = member("DepthwiseSeparable", module_copy, f"bn{i}", nn.BatchNorm2d)
            if not isinstance(getattr(norm, "drop", nn.Identity()), nn.Identity):
                raise ValueError(f"DepthwiseSeparable: bn{i}.drop is not supported, got {type(norm.drop).__name__}")
            layer.add_module(conv, getattr(module_copy, conv))
            layer.add_module(f"bn{i}", _plain_norm(norm))
            activation = getattr(module_copy, f"act{i}", None)  # timm keeps it in the norm
            layer.add_module(f"act{i}", member("DepthwiseSeparable", norm, "act", nn.Module) if activation is None else activation)
        layer.training = module.training
        return layer

    def _forward(self, x: Tensor) -> Tensor:
        modules = (self.conv_dw, self.bn1, self.act1, self.conv_pw, self.bn2, self.act2)
        return run_each(x, modules, residual=self.has_skip)
