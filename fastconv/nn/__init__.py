"""Drop-in layers: the constructor arguments and state_dict keys of the torch, torchvision or timm modules they replace."""

from fastconv.nn.conv_norm import Conv2dNormActivation
from fastconv.nn.depthwise import DepthwiseConv2d
from fastconv.nn.fire import Fire
from fastconv.nn.inverted_residual import InvertedResidual
from fastconv.nn.mbconv import MBConv
from fastconv.nn.pointwise import PointwiseConv2d
from fastconv.nn.separable import DepthwiseSeparable

__all__ = ["Conv2dNormActivation", "DepthwiseConv2d", "DepthwiseSeparable", "Fire", "InvertedResidual", "MBConv", "PointwiseConv2d"]
