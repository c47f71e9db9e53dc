"""A module that runs as a plan in inference and as plain torch otherwise."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastconv._buffers import buffers
from fastconv.optimize.plan import Plan, plain
from fastconv.optimize.traced import Traced, compiled, exporting
from fastconv.optimize.trained import step

__all__ = ["Plan", "Planned"]


class Planned(Traced):
    """Base of the layers and models: subclasses write `_forward(x)` with submodules and torch functions, as torch.fx can trace it.

    In eval mode, when no gradient is wanted (grad mode off, or neither x nor a parameter requires it), `forward` runs the Plan of
    `_forward`; otherwise, and under autocast and torch.func, it runs `_forward` itself. torch.compile and torch.export see the plan as one
    operator. The plan follows every change of a parameter, buffer, hook or submodule, except writes that torch does not count: in place
    through `.data`, or into tensors made in inference mode. Other attributes (a stride, an eps, one submodule's train mode) are read
    once. It is a cache: absent from state_dict, and neither pickled nor copied.
    """

    _off: ClassVar = [torch.is_grad_enabled]  # a parameter may want its gradient

    def _forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _forward")

    def forward(self, x: Tensor) -> Tensor:
        if exporting() and not self.training:
            return self._plan_now()(x)
        compiling = torch.compiler.is_dynamo_compiling()
        if not (compiling or plain(x)):
            return self._forward(x)
        wanted = torch.is_grad_enabled() and (x.requires_grad or any(parameter.requires_grad for parameter in self.parameters()))
        if self.training or wanted:
            y = step(self, x) if compiling else None
            return self._forward(x) if y is None else y
        if compiling:
            return compiled(self, self._forward, x)
        return self._plan_now().run(x)

    def _plan_now(self) -> Plan:
        plan = self._plan
        if plan is None:
            plan = self._plan = Plan(self, "_forward")
        return plan

    def train(self, mode: bool = True) -> Planned:
        if any(module.training != mode for module in self.modules()):
            self._plan = self._direct = None
            if not mode:
                buffers.clear()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Planned:
        self._plan = self._direct = None
        return super()._apply(fn, recurse)

    def _replicate_for_data_parallel(self) -> Planned:
        replica = super()._replicate_for_data_parallel()
        replica.forward = replica._forward  # its weights are no parameters, which a plan needs
        replica._plan = replica._direct = None
        return replica
