"""What torch.compile sees of a planned module that trains (decision 22).

The compiled graph holds one call of `fastconv::trained`, whose kernel runs the module as it runs without a compiler, and one of
`fastconv::trained_backward`, which goes back through the graph that autograd recorded there. That graph belongs to the storage of a tensor,
the token, which the compiled function saves between the two, and is freed with it.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import threading
import weakref
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fastconv import _extension
from fastconv._buffers import buffers
from fastconv.ops._register import library
from fastconv.optimize.plan import formatted
from fastconv.optimize.trace import hooked
from fastconv.optimize.traced import elsewhere, find, on_fakes, registered, runs_as_it_is

_numbers = itertools.count()
_swapping = threading.RLock()
_steps: weakref.WeakValueDictionary[int, _Step] = weakref.WeakValueDictionary()


class _Step(bytearray):
    """The memory of a token, and what its storage keeps alive: a module's result with its graph, and the graph's leaves."""

    result: Tensor | None
    leaves: list[Tensor]


def step(module: nn.Module, x: Tensor) -> Tensor | None:
    """module(x), which module._forward(x) computes, as one operator that has gradients, or None for plain torch: where no gradient is
    wanted, or no kernel of ours serves x. Dynamo traces through here."""
    if not (torch.is_grad_enabled() and x.is_cpu and x.dtype is torch.float32 and x.dim() == 4):
        return None
    parameters = list(module.parameters())
    wanted = [x.requires_grad] + [parameter.requires_grad for parameter in parameters]
    key = _key_now(module, id(module)) if any(wanted) else ""
    return torch.ops.fastconv.trained.default(x, parameters, wanted, key, _number(id(module)))[0] if key else None


def _key_now(module: nn.Module, identity: int) -> str:
    """Called by Dynamo while it traces, as Traced._key_now."""
    if runs_as_it_is() or not _extension.available or _extension.backend() not in ("auto", "cpu") or not _is_closed(module):
        return ""
    if torch._functorch.config.activation_memory_budget < 1:  # then operators run again in the backward, whatever they do
        return ""
    module._step_key = registered(module, _description(module), module._step_key)
    return module._step_key


def _number(identity: int) -> int:
    """A number of its own for every call in a graph, which would else become one where their inputs are equal: each moves the running
    statistics and draws random numbers. Called by Dynamo while it traces."""
    return next(_numbers)


_key_now._dynamo_marked_constant = _number._dynamo_marked_constant = True

_KNOWN = ("torch.nn.modules.", "torchvision.ops.", "timm.layers.", "timm.models._efficientnet_blocks", "fastconv.")


def _is_closed(module: nn.Module) -> bool:
    """Whether nothing but a result leaves the module and its input stays as it is: its modules are layers that are known, without hooks
    that could tell somebody else what they see, and the first does not write to its input."""
    leaves = [child for child in module.modules() if next(child.children(), None) is None and type(child) is not nn.Identity]
    if not leaves or getattr(leaves[0], "inplace", False):
        return False
    for child in module.modules():
        if child is not module and hooked(child):
            return False
        known = type(child).__module__.startswith(_KNOWN) or child is module
        if not known or isinstance(child, (nn.RNNBase, nn.MultiheadAttention)) or getattr(child, "return_indices", False):
            return False
    return True


def _description(module: nn.Module) -> str:
    """A hash of what a step computes, the parameters' values and what the graph's guards ask for aside."""
    tensors = [f"{name} {tuple(p.shape)} {p.dtype} {p.device}" for name, p in module.named_parameters()]
    return hashlib.sha256("\n".join(["step", repr(module), *tensors]).encode()).hexdigest()[:16]


class _Forward(nn.Module):
    """A module without its own hooks, which Dynamo has traced."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        return formatted(self.module._forward(x), like)


def _trained(x: Tensor, parameters: list[Tensor], wanted: list[bool], key: str, number: int) -> tuple[Tensor, Tensor]:
    module = _Forward(find(key))
    own = dict(module.named_parameters())
    if [tuple(parameter.shape) for parameter in own.values()] != [tuple(parameter.shape) for parameter in parameters]:
        raise RuntimeError("trained: the module's parameters have changed since torch.compile saw it: compile it again")
    with _autograd_on(), torch.enable_grad():
        # Aliases of what the graph gives, which need not be the module's own, and whose hooks are for the gradients that leave the graph.
        aliases = (_copy(x), *(parameter.detach() for parameter in parameters))
        image, *values = (tensor.requires_grad_(want) for tensor, want in zip(aliases, wanted, strict=True))
        with _swapping:  # the module holds them meanwhile
            y = torch.func.functional_call(module, dict(zip(own, values, strict=True)), (image, x))
    token = next(_numbers)
    memory = _Step(token.to_bytes(8, "little"))
    memory.result, memory.leaves = y, [tensor for tensor, want in zip((image, *values), wanted, strict=True) if want]
    _steps[token] = memory
    return _copy(y), torch.frombuffer(memory, dtype=torch.int64)


def _copy(image: Tensor) -> Tensor:
    """What the recorded graph keeps must not be what the compiled one has: Inductor writes to memory that it thinks nobody reads again."""
    last = image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()
    return buffers.image(image.shape).copy_(image.detach()) if last else image.detach().clone()


@functools.cache
def _dispatching() -> tuple[Any, Any]:
    return elsewhere(lambda: (torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()))


def _autograd_on() -> AbstractContextManager:
    """The dispatcher as it is outside every operator and mode: it calls a kernel with autograd excluded."""
    return torch._C._ForceDispatchKeyGuard(*_dispatching())


def _trained_fake(x: Tensor, parameters: list[Tensor], wanted: list[bool], key: str, number: int) -> tuple[Tensor, Tensor]:
    module = find(key)
    modes = [(child, child.training) for child in module.modules()]
    try:
        for child, _ in modes:
            child.training = False  # of the same shape, and no statistics move
        y = on_fakes(x, lambda: formatted(module._forward(x), x))
    finally:
        for child, mode in modes:
            child.training = mode
    return y, torch.empty(1, dtype=torch.int64)


def _trained_backward(dy: Tensor, token: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    memory = _steps.get(int(token))
    result = memory and memory.result
    if result is None:
        raise RuntimeError(
            "trained_backward: a step compiled by torch.compile goes backward once, and from the tensors that it saved: neither "
            "retain_graph=True nor saved_tensors_hooks that copy are supported"
        )
    memory.result = None
    if not result.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    with _autograd_on():
        gradients = torch.autograd.grad(result, memory.leaves, dy, allow_unused=True)
    taken = {dy.untyped_storage().data_ptr()}
    return [_own(gradient, leaf, taken) for gradient, leaf in zip(gradients, leaves, strict=True)]


def _own(gradient: Tensor | None, leaf: Tensor, taken: set[int]) -> Tensor:
    """The gradient as the fake kernel promised it: in the leaf's layout, with memory of its own."""
    if gradient is None:
        return torch.zeros_like(leaf)
    memory = gradient.untyped_storage().data_ptr()
    if memory in taken or gradient.stride() != torch.empty_like(leaf, device="meta").stride():
        return torch.empty_like(leaf).copy_(gradient)
    taken.add(memory)
    return gradient


def _trained_backward_fake(dy: Tensor, token: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(leaf) for leaf in leaves]


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, parameters, ctx.wanted, *_ = inputs
    ctx.save_for_backward(output[1], *(tensor for tensor, want in zip((x, *parameters), ctx.wanted, strict=True) if want))


def _differentiate(ctx: Any, dy: Tensor, _: None) -> tuple:
    if torch.is_grad_enabled():
        raise NotImplementedError("trained: second derivatives are not supported under torch.compile")
    token, *leaves = ctx.saved_tensors
    gradients = iter(torch.ops.fastconv.trained_backward.default(dy, token, leaves))
    dx, *others = (next(gradients) if want else None for want in ctx.wanted)
    return dx, others, None, None, None


_SCHEMA = "trained(Tensor x, Tensor[] parameters, bool[] wanted, str key, int number) -> (Tensor, Tensor)"
library.define(_SCHEMA, tags=(torch.Tag.nondeterministic_seeded,))  # not to be run again in the backward
library.define("trained_backward(Tensor dy, Tensor token, Tensor[] leaves) -> Tensor[]")
for name, kernel, fake in (("trained", _trained, _trained_fake), ("trained_backward", _trained_backward, _trained_backward_fake)):
    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastconv::{name}", fake, lib=library)
torch.library.register_autograd("fastconv::trained", _differentiate, setup_context=_save, lib=library)
