"""What runs inside a call, for tests that must tell the kernels from a fallback that gives the same numbers."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """`with Operators() as operators:` collects the names of the operators that run inside, such as "aten::convolution"."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))
