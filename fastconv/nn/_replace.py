"""Turns the layers of an existing model into fastconv's, in place."""

from __future__ import annotations

import operator
from typing import Any, TypeVar

import torch
from torch import fx, nn

from fastconv.models.mobilenet_v3 import InvertedResidual as InvertedResidualV3
from fastconv.nn._conv import KernelConv2d
from fastconv.nn._training import TrainedSequential
from fastconv.nn.conv_norm import Conv2dNormActivation
from fastconv.nn.depthwise import DepthwiseConv2d
from fastconv.nn.fire import Fire
from fastconv.nn.inverted_residual import InvertedResidual
from fastconv.nn.mbconv import MBConv
from fastconv.nn.pointwise import PointwiseConv2d
from fastconv.nn.separable import DepthwiseSeparable
from fastconv.optimize.layers import Kernel, Layer, Norm, Source
from fastconv.optimize.match import Hazard, match
from fastconv.optimize.module import OptimizedModule
from fastconv.optimize.trace import Untraceable, hooked, trace

M = TypeVar("M", bound=nn.Module)
Kinds = tuple[type[nn.Module], ...]

_BLOCKS: Kinds = (Fire, InvertedResidual, InvertedResidualV3, MBConv, DepthwiseSeparable)
_ROWS: Kinds = (Conv2dNormActivation,)
_KINDS: Kinds = (*_BLOCKS, *_ROWS, DepthwiseConv2d, PointwiseConv2d)


def replace(model: M) -> M:
    """Makes every layer of `model` that `fastconv.nn` has a twin of that twin, in place, for training; returns `model`.

    A module becomes its twin by changing its class, as PyTorch's fully_shard does: the module, its submodules, Parameters, buffers, modes,
    hooks and state_dict keys stay the very same objects and names, so optimizers, wrappers and checkpoints made before keep working.
    Outermost first: Fire, InvertedResidual (torchvision's MobileNet V2 and V3), MBConv (timm's) and DepthwiseSeparable (V1) blocks, also
    of your own class with the same attributes, once a trace shows that the twin computes the same; then Sequentials of convolution, batch
    norm and activation; then depthwise and 1x1 convolutions; last the Sequentials that hold a stem, a 1x1 convolution or a 3x3 max pool,
    as SqueezeNet's. Within a block only Sequentials of the first kind are replaced, as its constructor would have it.

    Left alone: what no twin fits; classes with methods of their own, whose behaviour a twin would drop; modules whose forward was
    replaced; blocks and Sequentials with a hook on a module inside them (their inner layers are then taken one by one, so that the hook
    sees what it saw). A module's own hooks stay with its twin. Calling it again changes nothing.

    Raises TypeError if `model` is no torch.nn.Module, or is or holds a result of `fastconv.optimize`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace: model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, OptimizedModule):
            place = f"{name!r} is" if name else "it is"
            raise TypeError(f"replace: model must not be optimized (fastconv.revert undoes it), {place} an OptimizedModule")
    _walk(model, _KINDS, set())
    return model


def _walk(module: nn.Module, kinds: Kinds, seen: set[tuple[nn.Module, Kinds]]) -> None:
    if (module, kinds) in seen or isinstance(module, torch.jit.ScriptModule):
        return
    seen.add((module, kinds))
    kind = type(module) if type(module) in kinds else next((kind for kind in kinds if _become(module, kind)), None)
    inside = kinds if kind is None else _ROWS if kind in _BLOCKS else ()
    for child in module._modules.values():
        if child is not None and inside:
            _walk(child, inside, seen)
    if kinds is _KINDS and type(module) is nn.Sequential and "forward" not in module.__dict__ and TrainedSequential.serves(module):
        module.__class__ = TrainedSequential


def _become(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Makes `module` a `kind` if that changes nothing but how it is computed; returns whether it did."""
    if "forward" in module.__dict__ or any(map(hooked, list(module.modules())[1:])):
        return False
    try:
        if issubclass(kind, KernelConv2d):
            if type(module) is not nn.Conv2d or not kind._is_covered(module):
                return False
        elif kind in _ROWS:
            if not _keeps(module, nn.Sequential):
                return False
        elif not _keeps(module, nn.Module) or not _same(module, kind._adopt(_skeleton(module))):
            return False
        kind._adopt(module)
    except (TypeError, ValueError):  # it is built otherwise
        return False
    return True


def _keeps(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a twin keeps all that the classes below `base` define: a constructor, and over nn.Module a forward."""
    forward = {"forward", "feature_info"} if base is nn.Module else set()  # what timm asks when it builds a network
    for cls in type(module).__mro__:
        if cls is base:
            return True
        own = {name for name in vars(cls) if not (name.startswith("__") and name.endswith("__"))}
        if not own <= forward or {"__call__", "__getattr__", "__setattr__"} & vars(cls).keys():
            return False
    return False


def _skeleton(module: nn.Module) -> nn.Module:
    """A copy of the tree alone: without hooks, its tensors shared."""
    copies: dict[nn.Module, nn.Module] = {}

    def copied(module: nn.Module) -> nn.Module:
        if module not in copies:
            copy = copies[module] = type(module).__new__(type(module))
            nn.Module.__init__(copy)
            hooks = copy.__dict__.copy()
            copy.__dict__.update(module.__dict__)
            copy.__dict__.update({name: value for name, value in hooks.items() if "hook" in name})
            copy.__dict__["_modules"] = {name: child and copied(child) for name, child in module._modules.items()}
        return copies[module]

    return copied(module)


def _same(module: nn.Module, twin: nn.Module) -> bool:
    """Whether both compute the same from the same tensors, in training and in eval mode. `twin` is a skeleton of `module`."""
    for training in (True, False):
        computed = _computed(_skeleton(module), training)
        if computed is None or computed != _computed(twin, training):
            return False
    return True


def _computed(module: nn.Module, training: bool) -> list[tuple] | None:
    """The steps of the matched graph, to compare; None if it has none."""
    for part in module.modules():  # norms as in eval mode, where timm's tell their activation
        part.training = training and not isinstance(part, nn.BatchNorm2d)
    whole = {part: "stochastic depth" for name, part in module.named_children() if name == "drop_path"}  # draws, which no graph may
    try:
        graph = trace(module, whole)
        match(graph, module)
    except (Untraceable, Hazard):
        return None
    number = {node: ("value", i) for i, node in enumerate(graph.nodes)}
    steps = []
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), number.__getitem__)
        if node.target is operator.add and len(node.all_input_nodes) == 2:  # the same sum, whichever comes first
            args = tuple(sorted(args))
        steps.append((node.op, None if node.op == "placeholder" else _told(node.target), args, kwargs))
    return steps


def _told(target: Any) -> Any:
    """A node's target; of a kernel what it computes, of which tensors."""
    if isinstance(target, Source):
        return id(target.tensor())
    if isinstance(target, (Kernel, Layer, Norm)):
        return type(target).__name__, [_told(value) for value in vars(target).values()]
    return [_told(value) for value in target] if isinstance(target, tuple) else target
