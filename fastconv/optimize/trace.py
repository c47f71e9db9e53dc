"""From a module to an FX graph: traces what traces, and names the submodules that do not."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Container, Iterator

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError

# torch.fx patches nn.Module.__call__ for the whole process while it traces: one trace at a time, and other threads pass through.
_tracing = threading.RLock()


def hooked(module: nn.Module) -> bool:
    """Whether calling `module` runs something else than its class's forward."""
    if "forward" in module.__dict__:
        return True
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


class Untraceable(Exception):
    """A forward that torch.fx cannot turn into a graph; says why."""


class Tracer(fx.Tracer):
    """Keeps torch.nn's modules, convolutions and normalisations of any class, hooked modules and `leaves` whole."""

    def __init__(self, leaves: Container[nn.Module]) -> None:
        super().__init__()
        self.leaves = leaves
        self.thread = threading.get_ident()

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        whole = isinstance(module, (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm))
        whole = whole and not hasattr(module, "_forward")  # fastconv's own convolutions trace to conv2d
        return whole or module in self.leaves or hooked(module) or super().is_leaf_module(module, name)

    def call_module(self, module: nn.Module, forward, args, kwargs):
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(module, forward, args, kwargs)

    def getattr(self, attr, value, parameter_proxy_cache):
        if threading.get_ident() != self.thread:
            return value
        return super().getattr(attr, value, parameter_proxy_cache)

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        """Placeholders for the arguments that a call must give; the others keep their defaults, as in a call that leaves them out."""
        inputs = []
        for parameter in list(inspect.signature(root_fn).parameters.values())[1:]:
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
                raise TraceError(f"{parameter.name} must be given by keyword")
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD) and parameter.default is parameter.empty:
                inputs.append(self.create_proxy("placeholder", parameter.name, (), {}))
        return root_fn, [self.root, *inputs]

    def create_arg(self, value):
        # A tensor made inside forward may be random: as a constant of the graph it would be frozen.
        if isinstance(value, torch.Tensor) and not any(value is known for known in self._registered()):
            raise TraceError("its forward makes a tensor")
        if isinstance(value, dict) and type(value) is not dict:
            raise TraceError(f"its forward makes a {type(value).__name__}")
        return super().create_arg(value)

    def _registered(self) -> Iterator[torch.Tensor]:
        yield from self.root.parameters()
        yield from self.root.buffers()


def trace(module: nn.Module, leaves: dict[nn.Module, str]) -> fx.Graph:
    """The graph of `module`. Submodules that do not trace are added to `leaves`, with the reason, and stay whole in the graph.

    Raises Untraceable if the forward of `module` itself cannot be traced.
    """
    try:
        return _attempt(module, leaves)
    except Untraceable:
        before = len(leaves)
        for name, child in module.named_children():
            if Tracer(leaves).is_leaf_module(child, name):
                continue
            try:
                trace(child, leaves)
            except Untraceable as problem:
                leaves[child] = str(problem)
        if len(leaves) == before:
            raise
        return _attempt(module, leaves)


def _attempt(module: nn.Module, leaves: dict[nn.Module, str]) -> fx.Graph:
    if "forward" in module.__dict__:
        raise Untraceable("its forward was replaced")
    with _tracing:
        try:
            return Tracer(leaves).trace(module)
        except Exception as problem:  # whatever a forward raises when it is given a Proxy
            raise Untraceable(str(problem).partition("\n")[0] or type(problem).__name__) from problem
