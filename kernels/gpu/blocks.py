"""Whole blocks, each as one kernel, as two, one per layer, or through cuDNN: whichever `configs.choice` holds fastest. No kernels."""

import threading
from collections.abc import Callable

import torch

from . import aten, launch
from . import fire as fires
from . import fire_pool as fire_pools
from . import head as heads
from . import inverted_residual as inverted_residuals
from . import separable as separables
from . import stem_pool as stem_pools
from .configs import ATEN, Problem, Split, Tile, choice, few, text
from .depthwise import depthwise
from .fire_expand import fire_expand
from .global_avg_pool import global_avg_pool
from .max_pool import max_pool, pooled
from .pointwise import pointwise
from .squeeze_excite import squeeze_excite
from .stem import stem

_last = threading.local()


def chosen(problem: Problem, x: torch.Tensor) -> tuple[Tile | Split | None, tuple[Callable, Callable, Callable]]:
    """(the tile of the one kernel, `Split` or None; depthwise, pointwise and fire_expand for a block in parts)."""
    arch = launch.arch(x.device)
    form = few(problem, choice(problem, arch), arch, x.shape[0])
    _last.form = text(form)
    if form == ATEN:
        return None, (aten.depthwise, aten.pointwise, aten.fire_expand)
    return form, (depthwise, pointwise, fire_expand)


def last_form() -> str:
    """How this thread's last block ran: its tile, "split" and the tile of its second kernel, "in parts" or "through cuDNN"."""
    return _last.form


def _like(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y, channels_last, in the memory format of x."""
    return y.contiguous(memory_format=launch.memory_format(x))


def separable(
    x, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, stride, padding, depthwise_activation, activation, residual
) -> torch.Tensor:
    """The arguments of `fastconv.ops.separable`, not checked."""
    tile, (depthwise, pointwise, _) = chosen(separables.problem(x, depthwise_weight, pointwise_weight, stride, padding), x)
    if tile:
        return separables.separable(
            x, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias,
            stride, padding, depthwise_activation, activation, residual, tile,
        )  # fmt: skip
    y = depthwise(launch.nhwc(x), depthwise_weight, depthwise_bias, stride, padding, depthwise_activation)
    return _like(pointwise(y, pointwise_weight, pointwise_bias, residual, activation), x)


def inverted_residual(
    x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, squeeze_excite_weights, project_weight, project_bias, residual,
    stride, padding, expand_activation, depthwise_activation, squeeze_activation, gate_activation, activation,
) -> torch.Tensor:  # fmt: skip
    """A MobileNet block as a plan has it: expand_weight may be None; squeeze_excite_weights: [] or [w1, b1, w2, b2]; residual: a tensor."""
    halves = (x, expand_weight, expand_bias, depthwise_weight, depthwise_bias)
    if squeeze_excite_weights:
        _last.form = text(None)  # unless there is an expand to choose for
        half = inverted_residuals.problem("expand_depthwise", x, depthwise_weight, depthwise_weight.shape[0], stride, padding)
        fused = expand_weight is not None and chosen(half, x)[0] is not None
        y = squeeze_excite(
            *halves, tuple(squeeze_excite_weights), project_weight, project_bias, residual, stride, padding,
            expand_activation, depthwise_activation, squeeze_activation, gate_activation, activation, fused,
        )  # fmt: skip
        return _like(y, x)
    if expand_weight is None:
        return separable(
            x, depthwise_weight, depthwise_bias, project_weight, project_bias, stride, padding, depthwise_activation, activation, residual
        )
    whole = inverted_residuals.problem("inverted_residual", x, depthwise_weight, project_weight.shape[0], stride, padding)
    form, (depthwise, pointwise, _) = chosen(whole, x)
    if isinstance(form, Tile):
        return inverted_residuals.inverted_residual(
            *halves, project_weight, project_bias, residual, stride, padding, expand_activation, depthwise_activation, activation, form
        )
    y = pointwise(launch.nhwc(x), expand_weight, expand_bias, None, expand_activation)
    if form:
        y = separables.separable(
            y, depthwise_weight, depthwise_bias, project_weight, project_bias,
            stride, padding, depthwise_activation, activation, residual, form.tile,
        )  # fmt: skip
        return _like(y, x)
    y = depthwise(y, depthwise_weight, depthwise_bias, stride, padding, depthwise_activation)
    return _like(pointwise(y, project_weight, project_bias, residual, activation), x)


def fire(x, squeeze_weight, squeeze_bias, weight1x1, bias1x1, weight3x3, bias3x3) -> torch.Tensor:
    """The arguments of `fastconv.ops.fire`, not checked."""
    tile, (_, pointwise, fire_expand) = chosen(fires.problem(x, squeeze_weight, weight1x1, weight3x3), x)
    if tile:
        return fires.fire(x, squeeze_weight, squeeze_bias, weight1x1, bias1x1, weight3x3, bias3x3, tile)
    squeezed = pointwise(launch.nhwc(x), squeeze_weight, squeeze_bias, None, "relu")
    return _like(fire_expand(squeezed, weight1x1, bias1x1, weight3x3, bias3x3), x)


def fire_pool(x, squeeze_weight, squeeze_bias, weight1x1, bias1x1, weight3x3, bias3x3, stride, padding, ceil_mode) -> torch.Tensor:
    """max_pool(fire(x)): the arguments of `fastconv.ops.fire`, then those of `fastconv.ops.max_pool`; not checked."""
    size = [pooled(*geometry, ceil_mode) for geometry in zip(x.shape[2:], stride, padding)]
    tile, _ = chosen(fire_pools.problem(x, weight1x1, weight3x3, stride, padding, tuple(size)), x)
    if tile:
        squeezed = pointwise(launch.nhwc(x), squeeze_weight, squeeze_bias, None, "relu")
        y = fire_pools.fire_pool(squeezed, weight1x1, bias1x1, weight3x3, bias3x3, stride, padding, tuple(size), tile)
    else:  # the fire in the form that is fastest for it
        y = fire(launch.nhwc(x), squeeze_weight, squeeze_bias, weight1x1, bias1x1, weight3x3, bias3x3)
        y = max_pool(y, stride, padding, ceil_mode)
    return _like(y, x)


def stem_pool(x, weight, bias, stride, padding, activation, pool_stride, pool_padding, ceil_mode) -> torch.Tensor:
    """max_pool(stem(x)), channels_last: the arguments of `fastconv.ops.stem`, then those of `fastconv.ops.max_pool`; not checked."""
    _last.form = text(None)  # unless one kernel can be chosen
    tile = None
    if stem_pools.serves(weight, pool_stride, pool_padding):
        size = launch.window(x.shape[2:], weight.shape[2], stride, padding)
        size = tuple(pooled(*geometry, ceil_mode) for geometry in zip(size, pool_stride, pool_padding))
        tile, _ = chosen(stem_pools.problem(x, weight, stride, padding, size), x)
    if tile:
        return stem_pools.stem_pool(x, weight, bias, stride, padding, activation, pool_stride, pool_padding, size, tile)
    return max_pool(stem(x, weight, bias, stride, padding, activation, always_nhwc=True), pool_stride, pool_padding, ceil_mode)


def head(x, weight, bias, activation) -> torch.Tensor:
    """global_avg_pool(pointwise(x)), (N, O, 1, 1); not checked."""
    tile, (_, pointwise, _) = chosen(heads.problem(x, weight), x)
    if tile:
        return heads.head(x, weight, bias, activation, tile)
    return global_avg_pool(pointwise(launch.nhwc(x), weight, bias, None, activation))
