"""Time per layer of an optimized module, beside the machine's roofs."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastconv import _extension
from fastconv.optimize.layers import Kernel, Layer
from fastconv.optimize.module import OptimizedModule

Roofs = dict[str, Any]
CALLS = 3  # of the whole module in every pass over its layers


def roofs() -> Roofs:
    """What one core reaches on the instruction set in use, measured now: {"isa", "fma_gflops", "bandwidth_gbs": {"L1", "L2", "L3", "DRAM"},
    "bytes": the working set of each, "threads": torch's threads, by which peaks multiply}.

    Raises RuntimeError without the compiled extension.
    """
    if not _extension.available:
        raise RuntimeError("profile: the roofs need the compiled extension, which is missing")
    from fastconv import _C

    sizes = working_sets()
    # Four tries: a neighbour on the machine can only make one slower.
    return {
        "isa": _C.isa(),
        "fma_gflops": max(_C.fma_gflops() for _ in range(4)),
        "bandwidth_gbs": {level: max(_C.bandwidth_gbs(size) for _ in range(4)) for level, size in sizes.items()},
        "bytes": sizes,
        "threads": torch.get_num_threads(),
    }


def working_sets() -> dict[str, int]:
    """Bytes that lie well inside each cache of this machine's first core, and well outside the last."""
    caches = {"L1": 32 << 10, "L2": 1 << 20, "L3": 32 << 20, **cache_sizes()}
    # A slice of L3 that one core can expect, well above its L2; memory past any L3 that a core could fill.
    return {
        "L1": caches["L1"] // 2,
        "L2": caches["L2"] // 2,
        "L3": max(2 * caches["L2"], min(caches["L3"] // 2, 8 << 20)),
        "DRAM": min(4 * caches["L3"], 256 << 20),
    }


def cache_sizes() -> dict[str, int]:
    """Bytes of the first core's data caches, as Linux tells them; {} elsewhere."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind in ("Data", "Unified") and size[:-1].isdigit():
            found[f"L{level}"] = int(size[:-1]) << {"K": 10, "M": 20, "G": 30}[size[-1]]
    return found


def layers(fast: OptimizedModule, x: Tensor, *, rounds: int = 20) -> list[dict[str, Any]]:
    """The rows of `profile`."""
    return profile(fast, x, rounds=rounds)["layers"]


def profile(fast: OptimizedModule, x: Tensor, *, rounds: int = 20) -> dict[str, Any]:
    """Where the time of `fast(x)` goes. x: (N, 3, H, W) float32 on the CPU.

    Returns {"layers": rows, "steps", "sum_us", "whole_us", "gflops", "percent_of_peak", "roofline"}; a row has layer, op, kernel, input,
    output (shapes), us (median over `rounds` passes), share of the sum, gflops, gbs, intensity (FLOP per byte), percent_of_peak and
    percent_of_roof, where gflops, intensity and percents are None for steps without a multiply-add of their own.

    A row's layer runs by itself, between other calls and with channels innermost. "steps" are the same layers inside the whole call, timed
    there: {"layers": names, "us", "gflops", "percent_of_peak"}, where a chain of layers whose rows never stand in memory is one step; None
    where the plan is not one call.

    FLOPs are 2 multiply-adds of the direct convolution, also where Winograd needs fewer, so that percents may pass 100. Bytes are input,
    output and weights once, whatever the caches hold. A layer's roof is the smaller of the multiply-add peak and intensity times the
    bandwidth of the smallest cache that holds its bytes (Williams, Waterman, Patterson, Roofline, CACM 2009), times threads; DRAM's is
    taken as shared. Every layer runs on its own here, one operator call (4 us) each.

    Raises ValueError if the module does not trace as a whole, RuntimeError without the compiled extension.
    """
    plan = fast.plan
    program, _, steps, _ = plan.prepare()
    if program.graph is None or steps is None:
        raise ValueError(f"profile: the model has no plan of its own: {program.problem or 'no layer that fastconv could run'}")
    nodes = [node for node in program.graph.nodes if node.op != "placeholder"]
    with torch.inference_mode():
        roof = roofs()
        shapes, times, inside, whole = _timed(fast, x, rounds)
    names = _names(nodes)
    rows = []
    for node, name, (call, _, _), (inputs, output), samples in zip(nodes, names, steps, shapes, times):
        if node.op == "output" or output is None or not inputs:
            continue
        kernel = node.target if isinstance(node.target, Kernel) else None
        multiply_adds = _multiply_adds(kernel, inputs[0]) if kernel else 0
        moved = x.element_size() * (sum(shape.numel() for shape in (*inputs, output)) + _weights(kernel))
        us = statistics.median(samples)
        row = {
            "layer": name,
            "op": kernel.op if kernel else "torch",
            "kernel": call.kernel if kernel else f"ATen {node.target if isinstance(node.target, str) else node.target.__name__}",
            "input": list(inputs[0]),
            "output": list(output),
            "us": us,
            "gbs": moved / us / 1e3,
        }
        rows.append({**row, **against(roof, multiply_adds, moved, us)})
    total = sum(row["us"] for row in rows)
    for row in rows:
        row["share"] = row["us"] / total
    work = sum((row["gflops"] or 0) * row["us"] for row in rows)
    peak = roof["fma_gflops"] * roof["threads"]
    return {
        "layers": rows,
        "steps": _steps([row for row in rows if row["op"] != "torch"], inside, peak) if inside else None,
        "sum_us": total,
        "whole_us": whole,
        "gflops": work / whole,
        "percent_of_peak": 100 * work / whole / peak,
        "roofline": roof,
    }


def against(roof: Roofs, multiply_adds: int, moved: int, us: float) -> dict[str, float | None]:
    """A layer's rate beside the roofs."""
    if multiply_adds == 0:
        return dict.fromkeys(("gflops", "intensity", "percent_of_peak", "percent_of_roof"))
    gflops, intensity = 2 * multiply_adds / us / 1e3, 2 * multiply_adds / moved
    peak = roof["fma_gflops"] * roof["threads"]
    level = next((level for level in ("L1", "L2", "L3") if moved <= 2 * roof["bytes"][level]), "DRAM")
    bandwidth = roof["bandwidth_gbs"][level] * (1 if level == "DRAM" else roof["threads"])
    return {
        "gflops": gflops,
        "intensity": intensity,
        "percent_of_peak": 100 * gflops / peak,
        "percent_of_roof": 100 * gflops / min(peak, intensity * bandwidth),
    }


def _steps(rows: list[dict[str, Any]], inside: list[tuple[int, float]], peak: float) -> list[dict[str, Any]]:
    """The call's steps: as many rows each as `inside` says, and their time."""
    steps, rest = [], iter(rows)
    for count, us in inside:
        chain = [next(rest) for _ in range(count)]
        gflops = sum((row["gflops"] or 0) * row["us"] for row in chain) / us
        steps.append({"layers": [row["layer"] for row in chain], "us": us, "gflops": gflops, "percent_of_peak": 100 * gflops / peak})
    return steps


Shapes = tuple[list[torch.Size], torch.Size | None]


def _timed(fast: OptimizedModule, x: Tensor, rounds: int) -> tuple[list[Shapes], list[list[float]], list[tuple[int, float]] | None, float]:
    """Each layer's input shapes and output shape, its microseconds in every pass, the steps of the whole call (layers, median
    microseconds) and the median of the call. A pass runs all layers one by one and then the module, so that drift meets all alike; values
    are freed as in the module."""
    program, _, steps, together = fast.plan.prepare()
    shapes: list[Shapes] = []
    times: list[list[float]] = [[] for _ in steps]
    whole, inside = [], []
    for _ in range(rounds + 2):  # two passes warm up
        values = [x, *[None] * (program.slots - 1)]
        shapes.clear()
        for samples, (call, reads, write) in zip(times, steps):
            arguments = [values[slot] for slot in reads]
            start = time.perf_counter()
            output = call(*arguments)
            samples.append((time.perf_counter() - start) * 1e6)
            shapes.append(
                ([value.shape for value in arguments if isinstance(value, Tensor)], output.shape if isinstance(output, Tensor) else None)
            )
            values[write] = output
            del arguments, output
        del values
        for _ in range(CALLS):  # the first finds the caches as single layers left them
            start = time.perf_counter()
            fast(x)
            whole.append((time.perf_counter() - start) * 1e6)
            if together:
                inside.append(together.times(x))
    medians = [(step[0][0], statistics.median(us for _, us in step)) for step in zip(*inside[2 * CALLS :])]
    return shapes, [samples[2:] for samples in times], medians or None, statistics.median(whole[2 * CALLS :])


def _multiply_adds(kernel: Kernel, shape: torch.Size) -> int:
    """Of the direct convolutions: every layer's weights times its output pixels."""
    batch, pixels, total = shape[0], list(shape[2:]), 0
    for layer in kernel.layers:
        if layer is None:
            continue
        if not layer.linear:
            pixels = [_output_size(layer, axis, size) for axis, size in enumerate(pixels)]
        total += _numel(layer) * (1 if layer.linear or not pixels else pixels[0] * pixels[1])
    for layer in (kernel.squeeze_excite or ())[:2]:
        total += _numel(layer)
    return batch * total


def _numel(layer: Layer) -> int:
    return torch.Size(layer.shape).numel()


def _output_size(layer: Layer, axis: int, size: int) -> int:
    span = layer.dilation[axis] * (layer.shape[2 + axis] - 1) + 1
    return (size + 2 * layer.padding[axis] - span) // layer.stride[axis] + 1


def _weights(kernel: Kernel | None) -> int:
    """Weights and biases, counted."""
    layers = (*kernel.layers, *(kernel.squeeze_excite or ())[:2]) if kernel else ()
    return sum(_numel(layer) + layer.channels for layer in layers if layer is not None)


def _names(nodes: list[torch.fx.Node]) -> list[str]:
    """What each step stands for: the parent of its submodules where it is theirs alone, else the first of them; a function's own name."""
    groups = [list(node.meta.get("names", ())) for node in nodes]
    names = []
    for node, group in zip(nodes, groups):
        parts = []
        for column in zip(*(name.split(".") for name in group)):
            if len(set(column)) > 1:
                break
            parts.append(column[0])
        parent = ".".join(parts)
        shared = any(name.startswith(f"{parent}.") for other in groups if other is not group for name in other)
        names.append(parent if parent and not shared else group[0] if group else node.name)
    return names
