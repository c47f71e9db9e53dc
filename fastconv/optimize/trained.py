"""What torch.compile sees of a planned module that trains (decision 22).

The compiled graph holds one call of `fastconv::trained`, whose kernel runs the module as it runs without a compiler, and one of
`fastconv::trained_backward`, which goes back through the graph that autograd recorded there. That graph belongs to the storage of a tensor,
the token, which the compiled function saves between the two, and is freed with it.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import weakref
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fastconv import _extension
from fastconv._buffers import buffers
from fastconv.ops._register import library
from fastconv.optimize.plan import formatted
from fastconv.optimize.traced import elsewhere, find, on_fakes, registered, runs_as_it_is

_numbers = itertools.count()
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
    parameters = _parameters(module)
    key = _key_now(module, id(module)) if x.requires_grad or parameters else ""
    return torch.ops.fastconv.trained.default(x, parameters, x.requires_grad, key)[0] if key else None


def _key_now(module: nn.Module, identity: int) -> str:
    """Called by Dynamo while it traces, as Traced._key_now."""
    if runs_as_it_is() or not _extension.available or _extension.backend() not in ("auto", "cpu"):
        return ""
    module._step_key = registered(module, _description(module), module._step_key)
    return module._step_key


_key_now._dynamo_marked_constant = True


def _description(module: nn.Module) -> str:
    """A hash of what a step computes, the parameters' values aside."""
    tensors = [f"{name} {tuple(p.shape)} {p.dtype} {p.device} {p.requires_grad}" for name, p in module.named_parameters()]
    modes = [child.training for child in module.modules()]
    return hashlib.sha256("\n".join(["step", repr(module), *tensors, str(modes)]).encode()).hexdigest()[:16]


def _parameters(module: nn.Module) -> list[Tensor]:
    """Those that a step has gradients for. Dynamo traces through here."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


class _Forward(nn.Module):
    """A module without its own hooks, which Dynamo has traced."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return formatted(self.module._forward(x), x)


def _trained(x: Tensor, parameters: list[Tensor], needs_x: bool, key: str) -> tuple[Tensor, Tensor]:
    module = _Forward(find(key))
    leaves = _parameters(module)
    if [tuple(leaf.shape) for leaf in leaves] != [tuple(parameter.shape) for parameter in parameters]:
        raise RuntimeError("trained: the module's parameters have changed since torch.compile saw it: compile it again")
    with _autograd_on(), torch.enable_grad():
        x = _copy(x).requires_grad_(needs_x)
        if any(leaf._backward_hooks for leaf in leaves):  # they are for the gradients that come out of the compiled graph
            names = {id(parameter): name for name, parameter in module.named_parameters()}
            others = {names[id(leaf)]: leaf.detach().requires_grad_() for leaf in leaves}
            leaves = list(others.values())
            y = torch.func.functional_call(module, others, (x,))
        else:
            y = module(x)
    number = next(_numbers)
    memory = _Step(number.to_bytes(8, "little"))
    memory.result, memory.leaves = y, [x, *leaves] if needs_x else leaves
    _steps[number] = memory
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


def _trained_fake(x: Tensor, parameters: list[Tensor], needs_x: bool, key: str) -> tuple[Tensor, Tensor]:
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
        raise RuntimeError("trained_backward: a step compiled by torch.compile goes backward once: retain_graph=True is not supported")
    memory.result = None
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
    x, parameters, ctx.needs_x, _ = inputs
    ctx.save_for_backward(output[1], *([x] if ctx.needs_x else []), *parameters)


def _differentiate(ctx: Any, dy: Tensor, _: None) -> tuple:
    if torch.is_grad_enabled():
        raise NotImplementedError("trained: second derivatives are not supported under torch.compile")
    token, *leaves = ctx.saved_tensors
    gradients = torch.ops.fastconv.trained_backward.default(dy, token, leaves)
    dx = gradients.pop(0) if ctx.needs_x else None
    return dx, gradients, None, None


_SCHEMA = "trained(Tensor x, Tensor[] parameters, bool needs_x, str key) -> (Tensor, Tensor)"
# Two calls draw different numbers, and each moves the running statistics: neither may be taken for the other.
library.define(_SCHEMA, tags=(torch.Tag.nondeterministic_seeded,))
library.define("trained_backward(Tensor dy, Tensor token, Tensor[] leaves) -> Tensor[]")
for name, kernel, fake in (("trained", _trained, _trained_fake), ("trained_backward", _trained_backward, _trained_backward_fake)):
    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastconv::{name}", fake, lib=library)
torch.library.register_autograd("fastconv::trained", _differentiate, setup_context=_save, lib=library)
