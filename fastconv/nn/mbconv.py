"""The inverted residual as timm builds it: MobileNet V2 (Sandler et al., 2018, https://arxiv.org/abs/1801.04381) and V3 (Howard et al.,
2019, https://arxiv.org/abs/1905.02244), MnasNet, EfficientNet."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastconv.nn._channels import make_divisible
from fastconv.nn._conv import KernelConv2d
from fastconv.nn._timm import adopt, check_optional
from fastconv.nn._training import is_absent, run_block
from fastconv.nn._twin import describe, is_depthwise, is_pointwise, member, share
from fastconv.optimize.planned import Planned


class MBConv(Planned):
    """Twin of timm's `InvertedResidual`: 1x1 expand, depthwise, squeeze-excitation where there is one, linear 1x1 projection, each with its
    norm, and an activation after the first two.

    x (N, in_chs, H, W) -> (N, out_chs, ceil(H / stride), ceil(W / stride)), any floating dtype; x is added when the shapes allow it, unless
    `noskip`. se_layer: called with the expanded channels. `drop_path`, before the sum, is there where `from_torch` and `fastconv.replace`
    found it.
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
        exp_ratio: float = 1.0,
        act_layer: Callable[..., nn.Module] = nn.ReLU,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        se_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.has_skip = stride == 1 and in_chs == out_chs and not noskip
        mid_chs = make_divisible(in_chs * exp_ratio)
        padding = (stride - 1 + dilation * (dw_kernel_size - 1)) // 2
        self.conv_pw = nn.Conv2d(in_chs, mid_chs, 1, bias=False)
        self.bn1 = norm_layer(mid_chs)
        self.act1 = act_layer(inplace=True)
        self.conv_dw = nn.Conv2d(mid_chs, mid_chs, dw_kernel_size, stride, padding, dilation, groups=mid_chs, bias=False)
        self.bn2 = norm_layer(mid_chs)
        self.act2 = act_layer(inplace=True)
        self.se = nn.Identity() if se_layer is None else se_layer(mid_chs, act_layer=act_layer)
        self.conv_pwl = nn.Conv2d(mid_chs, out_chs, 1, bias=False)
        self.bn3 = norm_layer(out_chs)
        self.act3 = nn.Identity()
        self.drop_path = nn.Identity()

    @classmethod
    def from_torch(cls, module: nn.Module) -> MBConv:
        """The same layer with the same Parameter objects, from timm's InvertedResidual or from one of these.

        Raises TypeError or ValueError if `module` is not built so: space-to-depth, anti-aliasing and other gates than
        SqueezeExcite are not taken, nor convolutions that are no plain Conv2d (TensorFlow's padding, weights of their own for each image).
        """
        return cls._adopt(share(module))

    @classmethod
    def _adopt(cls, module: nn.Module) -> MBConv:
        """Makes `module` itself one of these, or raises as `from_torch` does and leaves it as it was."""
        check_optional("MBConv", module)
        convs = {name: member("MBConv", module, name, nn.Conv2d) for name in ("conv_pw", "conv_dw", "conv_pwl")}
        for name, conv in convs.items():
            if not (type(conv) is nn.Conv2d or isinstance(conv, KernelConv2d)):
                raise TypeError(f"MBConv: {name} must be a Conv2d, got {type(conv).__name__}")
            right, kind = (is_depthwise, "depthwise") if name == "conv_dw" else (is_pointwise, "a 1x1 convolution")
            if not right(conv):
                raise ValueError(f"MBConv: {name} must be {kind}, got {describe(conv)}")
        adopt(module, cls, norms=3)
        return module

    def _forward(self, x: Tensor) -> Tensor:
        gate = () if is_absent(self.se) else (self.se,)
        modules = (
            *(self.conv_pw, self.bn1, self.act1),
            *(self.conv_dw, self.bn2, self.act2, *gate),
            *(self.conv_pwl, self.bn3, self.act3),
        )
        return run_block(x, modules, self.has_skip, self.drop_path)
