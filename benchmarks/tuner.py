"""Times each block with each tile worth trying, split, in parts and through cuDNN: what `fastconv tune` writes down."""

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fastconv.benchmarks import blocks
from fastconv.kernels.gpu import model, tuned
from fastconv.kernels.gpu.configs import ATEN, BlockTile, Form, Problem, Split, text


def worth_trying(problem: Problem, arch: str) -> list[BlockTile]:
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
    if isinstance(form, BlockTile):
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
    table = {"device": torch.cuda.get_device_name() if device == "cuda" else device, "arch": arch, "dtype": dtype, "batch": batch}
    table |= {"torch": torch.__version__, "choices": {}, "microseconds": {}}
    torch.backends.cudnn.benchmark = device == "cuda"
    with torch.no_grad(), _precision("tf32" if dtype == "tf32" else "ieee"):
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
                "fused": min(us for form, us in times.items() if isinstance(form, BlockTile)),
                "split": min((us for form, us in times.items() if isinstance(form, Split)), default=None),
                "parts": times[None],
                "cuDNN": times.get(ATEN),
            }
            say(f"{name:70s} {times[best]:9.1f} us  {text(best)}")
    return table


@contextlib.contextmanager
def _precision(name: str) -> Iterator[None]:
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


def cuda_clock(run, repeats: int = 20) -> float:
    """The median of CUDA-event times in microseconds, after three calls to warm up."""
    for _ in range(3):
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(start.elapsed_time(end) for start, end in events)
