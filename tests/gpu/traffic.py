"""Counts what a kernel loads and stores, address by address, in Triton's interpreter: independent of the model that predicts it."""

from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass
class Counts:
    """Bytes of one tensor: asked for by loads and stores, and how many distinct ones."""

    loaded: int = 0
    stored: int = 0
    read: set = field(default_factory=set)
    written: list = field(default_factory=list)


def count(monkeypatch, run, **inputs: torch.Tensor) -> dict[str, Counts]:
    """run() with every load and store counted by the tensor it falls in: an input, or "output" and "output1"... in order of allocation.

    Raises AssertionError for an access outside all of them: a kernel with an intermediate result in memory would need one.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    from fastconv.kernels.gpu import launch

    tensors = dict(inputs)
    allocate, empty = launch.outputs, torch.empty

    def outputs(*arguments):
        result, filled = allocate(*arguments)
        tensors[f"output{len(tensors) - len(inputs) or ''}"] = filled
        return result, filled

    counts: dict[str, Counts] = {}

    def owner(addresses: np.ndarray) -> Counts:
        for name, tensor in tensors.items():
            start = tensor.data_ptr()
            if start <= addresses.min() and addresses.max() < start + tensor.numel() * tensor.element_size():
                return counts.setdefault(name, Counts())
        raise AssertionError("an access outside the inputs and the output")

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def item(ptrs) -> int:
        return ptrs.get_element_ty().primitive_bitwidth // 8

    def counted_load(self, ptrs, mask, *rest):
        addresses = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)]
        if addresses.size:
            mine = owner(addresses)
            mine.loaded += addresses.size * item(ptrs)
            mine.read.update(addresses.tolist())
        return load(self, ptrs, mask, *rest)

    def counted_store(self, ptrs, value, mask, *rest):
        addresses = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)]
        if addresses.size:
            mine = owner(addresses)
            mine.stored += addresses.size * item(ptrs)
            mine.written += addresses.tolist()
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(launch, "outputs", outputs)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
    # what is allocated outside launch.outputs: the mean of a head
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, shape, **options: _kept(tensors, len(inputs), empty(shape, dtype=self.dtype))
    )
    run()
    return counts


def _kept(tensors: dict, inputs: int, tensor: torch.Tensor) -> torch.Tensor:
    tensors[f"output{len(tensors) - inputs or ''}"] = tensor
    return tensor
