"""A module's CUDA graphs: one for each kind of input, captured once and replayed, so that a call costs one launch and not one a kernel.

The first call with a kind of input runs as it would without graphs: kernels are compiled and loaded, libraries choose. The second is
captured. So one-off shapes, and calls between which weights change, never pay for a capture. docs/decisions/0015.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fastconv.optimize.plan import Plan, Ready, plain
from fastconv.optimize.trace import hooked

CAPACITY = 8  # graphs of a module; each keeps its intermediate results' addresses in the pool that all of them share
SEEN = 64  # kinds of input that a module remembers to have run once
LARGEST = 16 << 20  # bytes of input; beyond, a GPU is busy for longer than the launches take, and copying the input is no longer free

Key = tuple[Any, ...]


def _switched_on() -> bool:
    value = os.environ.get("FASTCONV_CUDA_GRAPHS") or "1"
    if value not in ("0", "1"):
        raise RuntimeError(f"FASTCONV_CUDA_GRAPHS must be 0 or 1, got {value!r}")
    return value == "1"


enabled = _switched_on()  # read once, as all of fastconv's variables are


class Cuda:
    """One module's graphs on one GPU, as torch.cuda has them. They share a memory pool and a stream to be captured on, so that none may
    run before the last one is done: `begin` and `end` stand around a replay and the copies that belong to it."""

    _capturing = threading.Lock()  # torch captures one graph at a time

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.done = torch.cuda.Event()

    @staticmethod
    def serves(x: Tensor) -> bool:
        return x.is_cuda

    @staticmethod
    def capturing(device: torch.device) -> bool:
        """Whether the caller is capturing a graph of its own."""
        if torch.cuda.current_device() == device.index:
            return torch.cuda.is_current_stream_capturing()
        with torch.cuda.device(device):
            return torch.cuda.is_current_stream_capturing()

    def capture(self, record: Callable[[], Any], warm_up: Callable[[], Any] | None) -> tuple[Callable[[], None], Any]:
        """(replay, what `record` returned); tensors made by `record` lie in the pool. warm_up: what has to run first in this thread."""
        with self._capturing, torch.cuda.device(self.device), _no_collection():
            here = torch.cuda.current_stream()
            self.stream.wait_stream(here)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(self.stream):
                if warm_up is not None:
                    warm_up()
                # thread_local: other threads go on allocating memory
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    result = record()
                except BaseException:
                    with contextlib.suppress(RuntimeError):  # it tells what is told already
                        graph.capture_end()
                    raise
                graph.capture_end()
            here.wait_stream(self.stream)
        return graph.replay, result

    def begin(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.done)

    def end(self) -> None:
        self.done.record(torch.cuda.current_stream(self.device))

    def drain(self) -> None:
        self.done.synchronize()


backend = Cuda


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """A collected tensor or event may call what a capture forbids."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class Captured(NamedTuple):
    """A graph, what it reads and what it writes."""

    inputs: list[Tensor]
    replay: Callable[[], None]
    result: Any


class Refused(Exception):
    """Why calls of a module, or of one kind, run without a graph."""


class Graphs:
    """`graphs(args)` is `plan(*args)`, replayed where it was captured.

    A graph holds for the weights that it was captured with: when the plan prepares others, all are dropped. It reads a buffer of its
    own, into which the inputs are copied, and results are copied out, unless `reuse_outputs` asks for the buffer itself.
    Threads may share it; calls on different streams wait for each other on the GPU, not on the CPU.
    """

    def __init__(self, plan: Plan, capacity: int = CAPACITY) -> None:
        self.plan = plan
        self.capacity = capacity
        self.captured: OrderedDict[Key, Captured] = OrderedDict()
        self.refused: dict[Key, str] = {}
        self.reason: str | None = None  # why no call can be captured
        self._seen: OrderedDict[Key, int] = OrderedDict()  # kind -> the thread that ran it first
        self._devices: dict[torch.device, Cuda] = {}
        self._ready: Ready | None = None
        self._loose: list[tuple[dict, str, Tensor, int]] = []
        self._lock = threading.RLock()
        self._warned = False

    def __call__(self, args: tuple[Tensor, ...], reuse_outputs: bool = False) -> Any:
        key = self._key(args)
        if key is None:
            return self.plan(*args)
        with self._lock:
            last = self.captured.get(key)
            if last is not None and not self._records():
                # Whether the weights are still those of the graph is asked while the GPU works, for it is most of a call's time on the
                # CPU. If they are not, this result is nobody's, and the call begins anew.
                result = self._replayed(last, args, reuse_outputs)
            graph = self._graph(key, args)
            if graph is not None:
                return result if graph is last else self._replayed(graph, args, reuse_outputs)
        return self.plan(*args)

    def _replayed(self, graph: Captured, args: tuple[Tensor, ...], reuse_outputs: bool) -> Any:
        device = self._devices[args[0].device]
        device.begin()
        for static, x in zip(graph.inputs, args):
            static.copy_(x)
        graph.replay()
        result = graph.result if reuse_outputs else _copied(graph.result)
        device.end()
        return result

    def __del__(self) -> None:
        # Weights may lie in memory of other streams than those that replay.
        with contextlib.suppress(Exception):  # while the interpreter ends
            for device in self._devices.values():
                device.drain()

    def report(self) -> list[str]:
        """One line for each kind of input that has a graph, or is refused one."""
        with self._lock:
            lines = [f"{_described(key)}: captured" for key in self.captured]
            lines += [f"{_described(key)}: no graph, {reason}" for key, reason in self.refused.items()]
        return lines + ([f"no graphs: {self.reason}"] if self.reason else [])

    def _key(self, args: tuple[Tensor, ...]) -> Key | None:
        """What a graph depends on besides weights; None for a call that cannot have one."""
        grad = torch.is_grad_enabled()
        if not all(plain(x) and backend.serves(x) and not (grad and x.requires_grad) for x in args):
            return None
        first = args[0]
        size = sum(x.numel() * x.element_size() for x in args)
        if not 0 < size <= LARGEST or any(x.device != first.device for x in args) or backend.capturing(first.device):
            return None
        key = tuple((x.shape, x.dtype, x.device, _channels_last(x)) for x in args)
        return (*key, torch.are_deterministic_algorithms_enabled(), *(_precision() if first.dtype is torch.float32 else ()))

    def _graph(self, key: Key, args: tuple[Tensor, ...]) -> Captured | None:
        """The graph of a kind of input; None where it has none, or not yet."""
        ready = self.plan.prepare()
        if ready is not self._ready or not self._same_loose():
            self._renew(ready)
        program = ready.program
        if self.reason is not None or key in self.refused or len(args) != program.inputs or any(args[i].dim() != 4 for i in program.images):
            return None
        if self._records():
            return None
        graph = self.captured.get(key)
        if graph is not None:
            self.captured.move_to_end(key)
            return graph
        if key not in self._seen:
            self._seen[key] = threading.get_ident()
            if len(self._seen) > SEEN:
                self._seen.popitem(last=False)
            return None
        try:
            graph = self._capture(args, warm=self._seen[key] == threading.get_ident())
        except Exception as problem:
            self._refuse(key, str(problem).partition("\n")[0] or type(problem).__name__)
            return None
        self.captured[key] = graph
        if len(self.captured) > self.capacity:
            self.captured.popitem(last=False)
        return graph

    def _records(self) -> bool:
        """Whether autograd would record a step of the plan."""
        return torch.is_grad_enabled() and any(tensor.requires_grad for _, _, tensor, _ in self._loose)

    def _capture(self, args: tuple[Tensor, ...], warm: bool) -> Captured:
        device = self._devices.get(args[0].device)
        if device is None:
            device = self._devices[args[0].device] = backend(args[0].device)

        def record() -> tuple[list[Tensor], Any]:
            # In the pool too: memory that is freed there goes to this module's graphs alone, and they run one after the other.
            inputs = [torch.empty_like(x, memory_format=_FORMATS[_channels_last(x)]) for x in args]
            return inputs, self.plan.run(*inputs)

        # Outside inference mode, for the buffers outlive it.
        with torch.inference_mode(False), torch.no_grad():
            replay, (inputs, result) = device.capture(record, None if warm else lambda: self.plan.run(*args))
        if (foreign := _foreign(result)) is not None:
            raise Refused(f"its output holds a {foreign}")
        return Captured(inputs, replay, result)

    def _renew(self, ready: Ready) -> None:
        for device in self._devices.values():
            device.drain()  # what the last replays read is freed now, on whatever stream it was made
        self.captured.clear()
        self.refused.clear()
        self._seen.clear()
        self._ready = ready
        self._loose, self.reason = [], None
        try:
            self._loose = _loose(ready, self.plan.module)
        except Refused as problem:
            self.reason = str(problem)

    def _same_loose(self) -> bool:
        """Whether the tensors that steps read by themselves are where they were; their values may have changed."""
        return all(owner.get(name) is tensor and tensor.data_ptr() == address for owner, name, tensor, address in self._loose)

    def _refuse(self, key: Key, reason: str) -> None:
        self.refused[key] = reason
        if not self._warned:
            self._warned = True
            text = f"fastconv: calls with {_described(key)} run without a CUDA graph ({reason})"
            warnings.warn(f"{text}; `cuda_graphs = False` on the module asks for that", RuntimeWarning, stacklevel=8)


_FORMATS = {True: torch.channels_last, False: torch.contiguous_format}


def _channels_last(x: Tensor) -> bool:
    """Which of two memory formats x counts as: it is copied, so other strides do not matter."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _precision() -> tuple[str, str]:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision


def _described(key: Key) -> str:
    inputs = (item for item in key if isinstance(item, tuple))
    return " and ".join(f"{tuple(shape)} {str(dtype).removeprefix('torch.')}{' channels_last' * last}" for shape, dtype, _, last in inputs)


def _loose(ready: Ready, module: torch.nn.Module) -> list[tuple[dict, str, Tensor, int]]:
    """The parameters and buffers that the plan does not keep a copy of: (owner, name, tensor, address).

    Raises Refused for a plan that runs a module's own Python code, which a graph would replay as it went once.
    """
    program, steps = ready.program, ready.steps
    if program.graph is None or steps is None:
        raise Refused(program.problem or "nothing in it runs through a kernel")
    if program.leaves:
        raise Refused(f"part of it does not trace: {next(iter(program.leaves.values()))}")
    modules = dict(module.named_modules(remove_duplicate=False))
    found = []
    for node in program.graph.nodes:
        if node.op == "call_module":
            leaf = modules[node.target]
            if hooked(leaf):
                raise Refused(f"{node.target} has hooks")
            owners = [owner for child in leaf.modules() for owner in (child._parameters, child._buffers)]
            found += [(owner, name) for owner in owners for name, tensor in owner.items() if tensor is not None]
        elif node.op == "get_attr":
            found.append(_owner(node, modules))
    return [(owner, name, owner[name], owner[name].data_ptr()) for owner, name in found]


def _owner(node: fx.Node, modules: dict[str, torch.nn.Module]) -> tuple[dict, str]:
    path, _, name = node.target.rpartition(".")
    owner = next((part for part in (modules[path]._parameters, modules[path]._buffers) if isinstance(part.get(name), Tensor)), None)
    if owner is None:
        raise Refused(f"it reads {node.target}, which is no parameter or buffer")
    return owner, name


def _copied(value: Any) -> Any:
    """`value`, of which `_foreign` knows every part, with its tensors cloned."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_copied, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(_copied, value))
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value


def _foreign(value: Any) -> str | None:
    """The type of a part that may hold tensors unseen; None where there is none."""
    if value is None or isinstance(value, (bool, int, float, str)) or type(value) is Tensor:
        return None
    if type(value) in (tuple, list) or (isinstance(value, tuple) and hasattr(value, "_fields")):
        return next(filter(None, map(_foreign, value)), None)
    if type(value) is dict:
        return next(filter(None, map(_foreign, value.values())), None)
    return type(value).__name__
