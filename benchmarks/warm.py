"""Compiles kernels ahead of measurements, in several processes: `python benchmarks/warm.py [--minutes 1.5]`.

Triton compiles in the first call and one kernel at a time, a second or two each; what tests and benchmarks of a GPU run are hundreds. Here
each process runs its share once, on as many images as are measured (few have other tiles), and the compiled kernels land in Triton's
cache directory, where later processes find them.
"""

import argparse
import contextlib
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from fastconv.benchmarks import blocks, tuner
from fastconv.kernels.gpu import configs
from fastconv.kernels.gpu.configs import ATEN, Form, Problem, Split, StagedFireTile, StagedTile, Tile

MOST = 15  # processes; each has a CUDA context of half a gigabyte
BATCH = 128


@dataclass(frozen=True)
class Job:
    """`run` compiles what `compiles` names by all that decides its code. run: can be pickled."""

    name: str
    compiles: frozenset[tuple]
    run: Callable[[], object]


@dataclass
class Report:
    """What became of the jobs; failures are "name: reason", left had no time."""

    done: int = 0
    left: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        text = f"kernels compiled ahead: {self.done} jobs in {self.seconds:.0f} s"
        text += f", {self.left} left, time was up" if self.left else ""
        return "\n".join([text, *(f"FAILED {failure}" for failure in self.failures)])


def available() -> int:
    """Processes that are worth starting: none without a GPU, or where one would only do what the caller does itself."""
    if not torch.cuda.is_available():
        return 0
    count = min(len(os.sched_getaffinity(0)) - 1, MOST)
    return count if count > 1 else 0


def distinct(jobs: Iterable[Job]) -> list[Job]:
    """Those that compile something that none before them does."""
    seen: set[tuple] = set()
    kept = []
    for job in jobs:
        if not job.compiles <= seen:
            kept.append(job)
            seen |= job.compiles
    return kept


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    job: Job | None = None
    answers: int = 0


def warm(jobs: Iterable[Job], seconds: float, workers: int | None = None) -> Report:
    """Runs the distinct jobs in `workers` processes (None: `available`) until all are done or the time is up; raises for none of them."""
    began = time.monotonic()
    count = available() if workers is None else workers
    waiting = deque(distinct(jobs)) if count and seconds > 0 else deque()
    report = Report()
    crew: dict[multiprocessing.connection.Connection, _Worker] = {}
    ending = []

    def hire() -> None:
        # spawn: a CUDA context does not survive a fork
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        crew[ours] = _Worker(process)

    try:
        for _ in range(min(count, len(waiting))):
            hire()
        while crew and (left := seconds - (time.monotonic() - began)) > 0:
            for connection in multiprocessing.connection.wait(list(crew), left):
                worker = crew[connection]
                try:
                    failure = connection.recv()
                except (EOFError, OSError):
                    del crew[connection]
                    worker.process.join()
                    if worker.job:
                        report.failures.append(f"{worker.job.name}: its process ended with {worker.process.exitcode}")
                    if waiting and worker.answers > 1:  # one that never worked would not work the next time
                        hire()
                    continue
                worker.answers += 1
                if worker.job and failure:
                    report.failures.append(f"{worker.job.name}: {failure}")
                report.done += bool(worker.job) and not failure
                worker.job = waiting.popleft() if waiting else None
                if worker.job is None:
                    ending.append(crew.pop(connection).process)
                with contextlib.suppress(OSError):  # it ended: the next turn notices
                    connection.send(worker.job and worker.job.run)
    finally:
        for process in ending:
            process.join(2)
        for process in [*ending, *(worker.process for worker in crew.values())]:
            process.kill()
            process.join()
    report.left = len(waiting) + sum(worker.job is not None for worker in crew.values())
    report.seconds = time.monotonic() - began
    return report


def _work(connection: multiprocessing.connection.Connection) -> None:
    """A process: says that it is there, then how each job went (None: well), until it gets None for a job."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, which then ends this one
    connection.send(None)
    while (run := connection.recv()) is not None:
        failure = None
        try:
            run()
        except Exception as problem:
            failure = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
        connection.send(failure)
        if failure:
            try:
                if torch.cuda.is_initialized():
                    torch.cuda.synchronize()
            except RuntimeError:  # after an illegal access nothing works in this process
                return


# What decides a kernel's code, as the launchers pass it on: its tile, alignments and constants. Sizes do not.


def _align(*channels: int) -> tuple[int, ...]:
    return tuple(math.gcd(count, 16) for count in channels)


def _plain(dtype: str) -> str:
    """Kernels without products are the same for both kinds of float32."""
    return "f32" if dtype == "tf32" else dtype


def _pointwise(arch: str, dtype: str, size: tuple[int, int], c: int, o: int, activation: str | None, residual: bool = False) -> tuple:
    return ("pointwise", dtype, configs.config(Problem("pointwise", dtype, *size, c, o), arch), _align(c, o), activation, residual)


def _depthwise(arch: str, dtype: str, size: tuple[int, int], c: int, k: int, stride: tuple[int, int], activation: str | None) -> tuple:
    tile = configs.config(Problem("depthwise", _plain(dtype), *size, c, c, k, stride), arch)
    return ("depthwise", _plain(dtype), tile, _align(c), k, stride, activation)


def _fire_expand(arch: str, dtype: str, size: tuple[int, int], c: int, o: int) -> tuple:
    return ("fire_expand", dtype, configs.config(Problem("fire_expand", dtype, *size, c, o), arch), _align(c, o))


def _fused(p: Problem, tile: Tile, activations: tuple[str | None, ...], residual: bool) -> tuple:
    if isinstance(tile, StagedTile):
        padded = (tile.depth_in(p.in_channels), configs.padded(p.out_channels), p.in_channels == tile.depth_in(p.in_channels))
        taps = (p.kernel, p.stride, (p.between or p.in_channels) % tile.depth == 0)
        return (p.op, p.dtype, tile, _align(p.in_channels, p.between, p.out_channels), padded, taps, activations, residual)
    if isinstance(tile, StagedFireTile):
        return (p.op, p.dtype, tile, _align(p.in_channels, p.between, p.out_channels), configs.padded(p.between))
    steps = 1 if p.in_channels <= tile.depth_in else 2
    taps = (p.kernel, p.stride, (p.in_channels, p.padding, p.size) if p.op.startswith("stem") else None)
    return (p.op, p.dtype, tile, _align(p.in_channels, p.between, p.out_channels), steps, taps, activations, residual)


def compiles(block: blocks.Block, form: Form, arch: str) -> frozenset[tuple]:
    """The kernels of a block in that form."""
    p, act, residual = block.problem, block.activation, block.residual
    c, e, o, size = p.in_channels, p.between, p.out_channels, (p.height, p.width)
    # the operations of both halves of a block; `blocks.Case` runs them so
    between, last = ("relu6", act) if p.op == "separable" else (act, None)
    expand = _pointwise(arch, p.dtype, p.size, c, e, act) if e else None
    mean = ("global_avg_pool", _plain(p.dtype), _align(o))
    if isinstance(form, Tile):
        own = _fused(p, form, (act, between, last), residual)
        return frozenset([own, ("global_avg_pool of sums", *mean)] if p.op == "expand_depthwise" else [own])
    if isinstance(form, Split):
        return frozenset([expand, _fused(p.after_expand, form.tile, (None, between, last), residual)])
    if p.op == "fire":
        return frozenset([_pointwise(arch, p.dtype, p.size, c, e, "relu"), _fire_expand(arch, p.dtype, p.size, e, o)])
    if p.op == "stem_pool":
        tile = configs.config(p.before_pool, arch)
        return frozenset([_fused(p.before_pool, tile, (act, between, last), residual), ("max_pool", p.dtype, _align(o))])
    if p.op == "fire_pool":
        return frozenset([_fire_expand(arch, p.dtype, p.size, c, o)])
    if p.op == "head":
        return frozenset([_pointwise(arch, p.dtype, p.size, c, o, act), mean])
    middle = _depthwise(arch, p.dtype, size, e or c, p.kernel, p.stride, between)
    if p.op == "expand_depthwise":
        return frozenset([expand, middle, mean])
    project = _pointwise(arch, p.dtype, size, e or c, o, last, residual)
    return frozenset([expand, middle, project] if expand else [middle, project])


def of_blocks(dtype: str, arch: str, ops: tuple[str, ...] = ()) -> list[Job]:
    """Every block of the networks in every form that is timed, save through cuDNN."""
    found = []
    for block in blocks.blocks(dtype, ops):
        for form in tuner.forms(block.problem, arch):
            if form != ATEN:
                name = f"{block.problem.op} {block.shape} {dtype} {configs.text(form)}"
                found.append(Job(name, compiles(block, form, arch), partial(run_block, block, form)))
    return found


def run_block(block: blocks.Block, form: Form, device: str = "cuda") -> None:
    with torch.no_grad(), tuner.precision("tf32" if block.problem.dtype == "tf32" else "ieee"):
        tuner.run_of(blocks.Case(block, BATCH, device), form)()
        _finish(device)


def of_layers(dtype_name: str, arch: str, ops: tuple[str, ...]) -> list[Job]:
    """Layers and gradients of depthwise layers, as benchmarks/gpu.py runs them."""
    from fastconv.benchmarks import gpu

    dtype = {"fp16": "f16", "fp32": "f32"}.get(dtype_name, dtype_name)
    dtype = _plain(dtype) if arch == "gfx942" else dtype  # AMD's matrix units have no tf32
    found = []
    for op in ops:
        for shape in gpu.read_shapes("depthwise" if op in gpu.GRADIENTS else op):
            c, height, width, out, k, stride, padding = shape
            size = ((height + 2 * padding - k) // stride + 1, (width + 2 * padding - k) // stride + 1)
            geometry = (c, k, (stride, stride))
            if op == "pointwise":
                kernel = _pointwise(arch, dtype, size, c, out, "relu6")
            elif op == "fire_expand":
                kernel = _fire_expand(arch, dtype, size, c, out // 2)
            elif op == gpu.GRADIENTS[1]:
                tile = configs.config(Problem(op, _plain(dtype), *size, c, c, k, (stride, stride)), arch)
                kernel = (op, _plain(dtype), tile, _align(c), k, stride)
            elif op == gpu.GRADIENTS[0] and stride == 1:  # the forward kernel, without a bias
                kernel = ("input's gradient", *_depthwise(arch, dtype, (height, width), *geometry, None))
            elif op == gpu.GRADIENTS[0]:
                tile = configs.config(Problem(op, _plain(dtype), height, width, c, c, k, (stride, stride)), arch)
                kernel = (op, _plain(dtype), tile, _align(c), k, stride)
            else:
                kernel = _depthwise(arch, dtype, size, *geometry, "relu6")
            name = f"{op} {' '.join(map(str, shape))} {dtype_name}"
            found.append(Job(name, frozenset([kernel]), partial(run_layer, op, shape, dtype_name)))
    return found


def run_layer(op: str, shape: tuple, dtype_name: str, device: str = "cuda") -> None:
    from fastconv.benchmarks import gpu

    with torch.no_grad(), tuner.precision("tf32" if dtype_name == "tf32" else "ieee"):
        ours, _, args, _ = (gpu.gradient if op in gpu.GRADIENTS else gpu.layer)(op, shape, BATCH, gpu.DTYPES[dtype_name], device)
        ours(*args)
        _finish(device)


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def of_networks(dtype: str = "bfloat16") -> list[Job]:
    """Whole networks: their squeeze-excitations are in no other job."""
    from fastconv.benchmarks import gpu

    return [Job(f"{net} {dtype}", frozenset([("network", net, dtype)]), partial(run_network, net, dtype)) for net in gpu.NETS]


def run_network(net: str, dtype: str) -> None:
    from fastconv.models import get_model
    from fastconv.optimize import optimize

    with torch.no_grad():
        fast = optimize(get_model(net).eval().cuda().to(getattr(torch, dtype)))
        fast.cuda_graphs = False
        for batch in (1, BATCH):
            x = torch.randn(batch, 3, 224, 224, device="cuda", dtype=getattr(torch, dtype))
            fast(x.contiguous(memory_format=torch.channels_last))
        torch.cuda.synchronize()


def everything(arch: str) -> list[Job]:
    """What benchmarks/gpu.py and gpu_networks.py compile, in the order in which they come to it."""
    from fastconv.benchmarks import gpu

    jobs = of_blocks("bf16", arch) + of_networks() + of_layers("bf16", arch, (*gpu.OPS, *gpu.GRADIENTS)) + of_blocks("f16", arch)
    for dtype_name in gpu.DTYPES:
        jobs += of_layers(dtype_name, arch, gpu.OPS)
    for dtype_name in gpu.DTYPES:
        jobs += of_layers(dtype_name, arch, gpu.GRADIENTS)
    return jobs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="not used: nothing but Triton's cache is written")
    parser.add_argument("--minutes", type=float, default=1.5, help="time to spend; what does not fit is left out")
    options = parser.parse_args()
    if not available():
        print("no CUDA device, or no cores to share the work: nothing was compiled ahead")
        return 0
    from fastconv.kernels.gpu import launch

    report = warm(everything(launch.arch(torch.device("cuda", 0))), 60 * options.minutes)
    print(report)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
