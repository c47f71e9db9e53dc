"""A GPU's driver as Triton sees one, without a GPU: kernels get as far as their launch, which is recorded.

Their results are whatever memory held. `install` belongs in a child process, for Triton keeps what it was given.
"""

import os

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

launches: list[tuple[str, tuple]] = []  # each kernel's name and the arguments of its run
signatures: dict[int, dict] = {}  # the arguments' types of each kernel that was compiled, by its number


class Driver:
    """One GPU of sm_90. `index`: the current device, as tensors on the CPU name theirs."""

    index = None

    def get_current_device(self):
        return self.index

    def get_current_stream(self, index):
        return 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    # What a kernel asks for that was really compiled: a place for its binary, and something that launches it.

    @property
    def utils(self):
        return self

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

    def load_binary(self, name, binary, shared, device):
        return object(), hash(binary), 255, 0, 1024

    def launcher_cls(self, source, metadata):
        return lambda *arguments: launches.append((metadata.name, arguments))


class Kernel:
    """In place of triton's CompiledKernel: what JITFunction.run uses of it. number: which compilation it came from."""

    count = 0

    def __init__(self, source, options):
        Kernel.count += 1
        signatures[Kernel.count] = source.signature
        self.name, self.function, self.packed_metadata = source.fn.__name__, Kernel.count, (options["num_warps"], 1, 0)
        self.signature = source.signature

    def launch_metadata(self, *arguments):
        return None

    def run(self, *arguments):
        launches.append((self.name, arguments))


def install(compiler: bool = False) -> None:
    """Before a kernel of fastconv's first runs. compiler: whether kernels are compiled."""
    triton.runtime.driver.set_active(Driver())
    if not compiler:
        triton.compiler.compile = lambda source, target=None, options=None, **_: Kernel(source, options)
    from fastconv.kernels.gpu import blocks, depthwise_backward, launch, stem  # noqa: F401  # decorated as for a GPU

    launch.arch = lambda device: "sm_90"
    os.environ["TRITON_INTERPRET"] = "1"  # what FASTCONV_BACKEND=triton asks for before it takes tensors on the CPU


class Others(TorchDispatchMode):
    """Counts torch's own operators that a GPU would run a kernel for: neither views nor allocations."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        returns = func._schema.returns
        view = bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
        if name.startswith("aten::") and not view and not name.startswith(("aten::empty", "aten::new_empty")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def pointers(arguments: tuple) -> tuple:
    """The arguments of a run with tensors as addresses."""
    return tuple(value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments)
