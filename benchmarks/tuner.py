"""Times each block with each tile worth trying, split, in parts and through cuDNN: what `fastconv tune` writes down."""

import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fastconv.benchmarks import blocks
from fastconv.kernels.gpu import model, tuned
from fastconv.kernels.gpu.configs import ATEN, BLOCKS, Form, Problem, Split, Tile, text

WARM = 0.4  # of the time, at most, to compile kernels ahead in several processes


def worth_trying(problem: Problem, arch: str) -> list[Tile]:
    """The shipped tiles that the model holds at most three times as slow as its best, best first."""
    times = {tile: model.fused_seconds(problem, tile, arch) for tile in model.candidates(problem, arch)}
    return [tile for tile in sorted(times, key=times.get) if times[tile] <= 3 * min(times.values())]


def forms(problem: Problem, arch: str) -> list[Form]:
    """What there is to time of a block; cuDNN last, save for squeeze-excitation's first half, whose sums only our kernels keep."""
    found: list[Form] = list(worth_trying(problem, arch))
    if problem.op == "inverted_residual":
        found += [Split(tile) for tile in worth_trying(problem.after_expand, arch)]
    if problem.op != "stem":
        found.append(None)
    return found if problem.op == "expand_depthwise" else [*found, ATEN]


def run_of(case: blocks.Case, form: Form) -> Callable[[], object]:
    """The case's block in that form."""
    if isinstance(form, Tile):
        return lambda: case.fused(form)
    if isinstance(form, Split):
        return lambda: case.split(form.tile)
    return case.parts if form is None else case.plain


def measure(dtype: str, batch: int, seconds: float, say: Callable[[str], None], clock=None, device: str = "cuda") -> dict:
    """The table of what was fastest; blocks that `seconds` leave no time for are missing. clock: times a call, in microseconds."""
    from fastconv.kernels.gpu import launch

    arch = launch.arch(torch.device(device, 0) if device == "cuda" else torch.device(device))
    clock = clock or cuda_clock
    began = time.monotonic()
    if device == "cuda":
        from fastconv.benchmarks import warm

        ahead = warm.warm(warm.of_blocks(dtype, arch, tuple(op for op in BLOCKS if op != "stem")), WARM * seconds)
        if ahead.done or ahead.failures:
            say(str(ahead))
    table = {"device": torch.cuda.get_device_name() if device == "cuda" else device, "arch": arch, "dtype": dtype, "batch": batch}
    table |= {"torch": torch.__version__, "choices": {}, "microseconds": {}}
    torch.backends.cudnn.benchmark = device == "cuda"
    with torch.no_grad(), precision("tf32" if dtype == "tf32" else "ieee"):
        for block in blocks.blocks(dtype):
            if block.problem.op == "stem" or tuned.key(block.problem) in table["choices"]:
                continue
            if time.monotonic() - began > seconds:
                break
            case = blocks.Case(block, batch, device)
            times = {form: clock(run_of(case, form)) for form in forms(block.problem, arch)}
            best = min(times, key=times.get)
            name = tuned.key(block.problem)
            table["choices"][name] = tuned.row(best)
            table["microseconds"][name] = {
                "fused": min(us for form, us in times.items() if isinstance(form, Tile)),
                "split": min((us for form, us in times.items() if isinstance(form, Split)), default=None),
                "parts": times[None],
                "cuDNN": times.get(ATEN),
            }
            say(f"{name:70s} {times[best]:9.1f} us  {text(best)}")
    return table


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """torch's switch for fp32 products, which the kernels follow."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = name
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def merged(file: Path, table: dict) -> dict:
    """`table` with what `file` has of the same architecture and not measured anew: another dtype, a block that time was short for."""
    try:
        old = json.loads(file.read_text())
        if old["arch"] == table["arch"]:
            return table | {name: old[name] | table[name] for name in ("choices", "microseconds")}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no table yet
    return table


CALLS = 10  # in a graph: launched one by one from Python, kernels of less than 25 us would wait for their launches
GRAPH_US = 1000.0  # of calls beyond this, fewer


def cuda_clock(run: Callable[[], object], repeats: int = 20) -> float:
    """Microseconds a call, as `timed` has them."""
    return timed(run, repeats)[0]


def timed(run: Callable[[], object], repeats: int, before: Callable[[], object] | None = None) -> tuple[float, bool]:
    """(microseconds a call, whether from a CUDA graph): the median of `repeats` replays of a graph of several calls.

    The L2 cache is not flushed between the calls of a graph: networks run their layers back to back, so a layer finds there what the
    one before it left, and what is larger than the cache comes from memory here as there.

    What cannot be captured is timed call by call, after `before`; a time is then that of its launches, where those take longer.
    """
    for _ in range(2):
        run()
    once = _between(run, 1)[0]
    calls = max(1, min(CALLS, round(GRAPH_US / max(once, 1e-3))))
    graph = _captured(run, calls)
    if graph is None:
        return statistics.median(_between(run, repeats, before)), False
    graph.replay()
    return statistics.median(_between(graph.replay, repeats)) / calls, True


def _between(run: Callable[[], object], repeats: int, before: Callable[[], object] | None = None) -> list[float]:
    """Microseconds between CUDA events around each of `repeats` runs."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        if before:
            before()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in events]


def _captured(run: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph | None:
    """A graph of `calls` runs, or None where something in them forbids it."""
    collects, stream = gc.isenabled(), torch.cuda.current_stream()
    gc.disable()  # a collected tensor or event may call what a capture forbids
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                run()
    except Exception:
        torch.cuda.synchronize()
        return None
    finally:
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own
        if collects:
            gc.enable()
    return graph
