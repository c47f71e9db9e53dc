"""torch.vmap over the public operators: gradients of several outputs at once (is_grads_batched, Jacobians) map over their backwards."""

from __future__ import annotations

import torch
from torch import Tensor

IMAGES = ("x", "residual", "grad")


def register(library: torch.library.Library, op: torch._ops.OpOverload, parameters: list[str]) -> None:
    """A mapped dimension of images joins their batch, or their channels where the operator sums over it; a mapped weight means a loop."""
    dim = 1 if op._opname == "depthwise_backward_weight" else 0
    out = 0  # a weight's first dimension is the images' second

    def rule(info, in_dims, *args):
        if any(isinstance(at, int) and name not in IMAGES for name, at in zip(parameters, in_dims, strict=False)):

            def one(i):
                return op(*(value.select(at, i) if isinstance(at, int) else value for value, at in zip(args, in_dims)))

            return torch.stack([one(i) for i in range(info.batch_size)]), 0

        def join(name, value, at):
            if name not in IMAGES or not isinstance(value, Tensor):
                return value
            value = value.expand(info.batch_size, *value.shape) if at is None else value.movedim(at, 0)
            return value.movedim(0, dim).flatten(dim, dim + 1)

        joined = op(*(join(*each) for each in zip(parameters, args, in_dims, strict=False)))
        return joined.unflatten(out, (info.batch_size, joined.shape[out] // info.batch_size)), out

    torch.library.register_vmap(f"fastconv::{op._opname}", rule, lib=library)
