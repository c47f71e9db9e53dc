"""What the layers share when they are made from an existing module."""

from __future__ import annotations

import copy
from itertools import chain
from typing import TypeVar

import torch

T = TypeVar("T")
M = TypeVar("M", bound=torch.nn.Module)


def share(module: M) -> M:
    """A copy of `module` (its tree, modes and hooks) that holds the very same Parameter and buffer objects."""
    if not isinstance(module, torch.nn.Module):  # for the layer to refuse, in its own words
        return module
    return copy.deepcopy(module, {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())})


def member(layer: str, module: torch.nn.Module, name: str, kind: type[T]) -> T:
    """The attribute `name` of `module`; TypeError when there is none or it is not a `kind`."""
    found = getattr(module, name, None)
    if not isinstance(found, kind):
        raise TypeError(f"{layer}: {type(module).__name__}.{name} must be a {kind.__name__}, got {type(found).__name__}")
    return found


def is_depthwise(conv: torch.nn.Conv2d) -> bool:
    """One filter for each input channel."""
    return conv.groups == conv.in_channels == conv.out_channels


def is_pointwise(conv: torch.nn.Conv2d) -> bool:
    """1x1, dense, one output pixel for each input pixel."""
    return conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding in ((0, 0), "same", "valid") and conv.groups == 1


def describe(conv: torch.nn.Conv2d) -> str:
    """`conv` in the words of its constructor."""
    return f"Conv2d({conv.extra_repr()})"
