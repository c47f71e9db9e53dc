"""The operators. Each is `torch.ops.fastconv.<name>` underneath and `fastconv.reference.<name>` by specification.

`prepare_<name>` binds an operator to already folded weights, packed where the compiled kernels cover the layer.
"""

import torch

from fastconv import _extension
from fastconv.ops import _cuda
from fastconv.ops import _network as _network  # registers, as _packed does, fake kernels
from fastconv.ops import _packed as _packed
from fastconv.ops._prepared import Prepared
from fastconv.ops.depthwise import depthwise, prepare_depthwise
from fastconv.ops.depthwise_backward import depthwise_backward_input, depthwise_backward_weight
from fastconv.ops.fire import fire, prepare_fire
from fastconv.ops.fire_expand import fire_expand, prepare_fire_expand
from fastconv.ops.global_avg_pool import global_avg_pool, prepare_global_avg_pool
from fastconv.ops.inverted_residual import inverted_residual, prepare_inverted_residual
from fastconv.ops.max_pool import max_pool, prepare_max_pool
from fastconv.ops.pointwise import pointwise, prepare_linear, prepare_pointwise
from fastconv.ops.separable import prepare_separable, separable
from fastconv.ops.stem import prepare_stem, stem

__all__ = [
    "Prepared",
    "depthwise",
    "depthwise_backward_input",
    "depthwise_backward_weight",
    "fire",
    "fire_expand",
    "global_avg_pool",
    "inverted_residual",
    "max_pool",
    "pointwise",
    "prepare_depthwise",
    "prepare_fire",
    "prepare_fire_expand",
    "prepare_global_avg_pool",
    "prepare_inverted_residual",
    "prepare_linear",
    "prepare_max_pool",
    "prepare_pointwise",
    "prepare_separable",
    "prepare_stem",
    "separable",
    "stem",
]

if _extension.backend() == "triton" or torch.backends.cuda.is_built():  # asking for a device would start CUDA, and break later forks
    _cuda.register()
