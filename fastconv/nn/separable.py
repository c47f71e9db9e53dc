"""The depthwise-separable block of MobileNet V1 (Howard et al., 2017, https://arxiv.org/abs/1704.04861)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastconv.nn._timm import adopt, check_optional
from fastconv.nn._training import is_absent, run_block
from fastconv.nn._twin import describe, is_depthwise, is_pointwise, member, share
from fastconv.optimize.planned import Planned


class DepthwiseSeparable(Planned):
    """Twin of timm's `DepthwiseSeparableConv` as MobileNet V1 uses it: depthwise, norm, activation, 1x1, norm[, activation].

    x (N, in_chs, H, W) -> (N, out_chs, ceil(H / stride), ceil(W / stride)), any floating dtype. `pw_act` adds the activation after
    the 1x1; the input is added to the result when the shapes allow it, unless `noskip`. `se`, between the two, and `drop_path`, before the
    sum, are there where `from_torch` and `fastconv.replace` found them.
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
        self.se = nn.Identity()
        self.conv_pw = nn.Conv2d(in_chs, out_chs, 1, bias=False)
        self.bn2 = norm_layer(out_chs)
        self.act2 = act_layer(inplace=True) if pw_act else nn.Identity()
        self.drop_path = nn.Identity()

    @classmethod
    def from_torch(cls, module: nn.Module) -> DepthwiseSeparable:
        """The same layer with the same Parameter objects, from timm's DepthwiseSeparableConv or from one of these.

        Raises TypeError or ValueError if `module` is not built so: space-to-depth, anti-aliasing and other gates than
        SqueezeExcite belong to other networks and are not taken.
        """
        return cls._adopt(share(module))

    @classmethod
    def _adopt(cls, module: nn.Module) -> DepthwiseSeparable:
        """Makes `module` itself one of these, or raises as `from_torch` does and leaves it as it was."""
        depthwise, pointwise = (member("DepthwiseSeparable", module, name, nn.Conv2d) for name in ("conv_dw", "conv_pw"))
        if not is_depthwise(depthwise):
            raise ValueError(f"DepthwiseSeparable: conv_dw must be depthwise, got {describe(depthwise)}")
        if not is_pointwise(pointwise):
            raise ValueError(f"DepthwiseSeparable: conv_pw must be a 1x1 convolution, got {describe(pointwise)}")
        check_optional("DepthwiseSeparable", module)
        adopt(module, cls, norms=2)
        return module

    def _forward(self, x: Tensor) -> Tensor:
        gate = () if is_absent(self.se) else (self.se,)
        modules = (self.conv_dw, self.bn1, self.act1, *gate, self.conv_pw, self.bn2, self.act2)
        return run_block(x, modules, self.has_skip, self.drop_path)
