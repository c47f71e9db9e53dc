"""Whole networks on a GPU in every engine a user could pick: `python benchmarks/gpu_networks.py --out DIR [--minutes 3]`.

Latency (batch 1 and 8: the GPU is waited for after each call) and throughput (batch 32 to 512: calls follow each other), the first
result of a fresh process with an empty and with a filled Triton cache, and the memory of each engine. Engines take turns in each round.
Logits are checked against float64 before anything is timed; an engine that fails is named in its cell.

When time runs short, what is left out is, in this order: torch.compile's max-autotune, its reduce-overhead, batches 512, 256, 128 and 32,
first results, and networks from the end of NETWORKS.

Writes DIR/networks.json (a document of `benchmarks/report`), networks.txt and, with matplotlib and jinja2, charts and report.html.
"""

import argparse
import copy
import datetime
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastconv.benchmarks import measure
from fastconv.benchmarks.gpu import calibrated, eager_form

NETWORKS = ("mobilenet_v2", "squeezenet1_1", "mobilenet_v3_large", "mobilenet_v1", "squeezenet1_0", "mobilenet_v3_small")
LATENCY, THROUGHPUT = (1, 8), (32, 128, 256, 512)
QUICK = ("fastconv", "fastconv_no_graphs", "eager_channels_last", "eager_cudagraphs")
SLOW = ("compile_reduce_overhead", "compile_max_autotune")  # seconds to minutes to start
OURS = ("fastconv", "fastconv_no_graphs")
EXPECTED = {
    "compile_reduce_overhead": 20.0,
    "compile_max_autotune": 60.0,
}  # seconds that a cell may take, before one was timed; others as the dearest so far
ALLOWED = 2.0  # times eager's own error, or 1e-5, whichever is larger
TARGET = 2.0  # fastconv at batch 1 over the better of eager CUDA graphs and torch.compile's reduce-overhead
Call = Callable[[], Any]


def build(engine: str, model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The model as the engine runs it. model: in eval mode, channels_last, its parameters wanting no gradient."""
    if engine in OURS:
        import fastconv

        fast = fastconv.optimize(model)
        fast.cuda_graphs = engine == "fastconv"
        return fast
    model = eager_form(model)
    if engine == "eager_channels_last":
        return model
    if engine == "eager_cudagraphs":
        return graphed(model, x)
    torch._dynamo.reset()
    return torch.compile(model, mode=engine.removeprefix("compile_").replace("_", "-"), dynamic=False)


def graphed(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Eager torch as a CUDA graph, as torch's documentation captures one: its result is overwritten by the next call."""
    static = x.clone(memory_format=torch.preserve_format)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(static)

    def run(x: Tensor) -> Tensor:
        static.copy_(x)
        graph.replay()
        return y

    return run


class Device:
    """What the measurement asks of a GPU."""

    name = "cuda"

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def memory_begin(self) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def memory_peak(self) -> int:
        return torch.cuda.max_memory_allocated()


def turns(runs: dict[str, Call], rounds: int, device: Device, wait: bool, seconds: float = 0.02) -> dict[str, list[float]]:
    """Milliseconds a call, a sample a round; a sample repeats its run for `seconds`. wait: for the GPU after each call."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    repeats: dict[str, int] = {}

    def time_of(name: str, count: int) -> float:
        run = runs[name]
        device.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            run()
            if wait:
                device.synchronize()
        device.synchronize()
        return (time.perf_counter() - start) / count

    for name in runs:
        time_of(name, 5)
        repeats[name] = max(1, math.ceil(seconds / max(time_of(name, 3), 1e-6)))
    order = list(runs)
    for turn in range(rounds):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            runs[name]()
            samples[name].append(time_of(name, repeats[name]) * 1e3)
    return samples


class Bench:
    """Collects cells until the time is up; whatever fails is named, and costs nothing else."""

    def __init__(self, seconds: float, device: Device | None = None, size: int = 224, dtype: torch.dtype = torch.bfloat16) -> None:
        self.began, self.seconds = time.monotonic(), seconds
        self.device, self.size, self.dtype = device or Device(), size, dtype
        self.cells: list[dict[str, Any]] = []
        self.first: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self.wrong: list[str] = []

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    def run(
        self, networks: tuple[str, ...] = NETWORKS, latency: tuple[int, ...] = LATENCY, throughput: tuple[int, ...] = THROUGHPUT
    ) -> None:
        """In the order in which figures are worth having; the slow engines are added to cells that stand."""
        steps: list[tuple[str, Call]] = []
        for name in networks:
            steps += [(f"{name} batch {batch}", lambda n=name, b=batch: self.cell(n, b, QUICK)) for batch in latency]
        steps += [(f"{name} first result", lambda n=name: self.first_result(n)) for name in networks[:2]]
        for batch in throughput:
            steps += [(f"{name} batch {batch}", lambda n=name, b=batch: self.cell(n, b, QUICK)) for name in networks]
        for engine in SLOW:
            for batch in latency:
                for name in networks:
                    steps.append((f"{name} batch {batch} {engine}", lambda n=name, b=batch, e=engine: self.cell(n, b, (*QUICK, e))))
        costs: dict[str, float] = {}
        for what, step in steps:
            kind = what.split()[-1]  # the batch, or the engine
            if self.left() < costs.get(kind, EXPECTED.get(kind, max(costs.values(), default=5.0))):
                self.left_out.append(what)
                continue
            start = time.monotonic()
            step()
            costs[kind] = 1.2 * (time.monotonic() - start)

    def cell(self, network: str, batch: int, engines: tuple[str, ...]) -> None:
        """Times a network at one batch in all engines, and keeps what an earlier cell of the same had of others."""
        with torch.no_grad():
            model, x, wanted, allowed = self.subject(network, batch)
            runs: dict[str, Call] = {}
            rows: dict[str, dict[str, Any]] = {}
            missing: dict[str, str] = {}
            for engine in engines:
                try:
                    before = self.device.memory_begin()
                    built = build(engine, model, x)
                    for _ in range(3):  # a graph is captured in the second
                        y = built(x)
                    error = measure.relative_error(y[: len(wanted)].cpu(), wanted)
                    if not error <= allowed:
                        raise ArithmeticError(f"relative logit error {error:.1e}, allowed is {allowed:.1e}")
                    self.device.synchronize()
                    rows[engine] = {"relative_error": error, "peak_memory_mb": (self.device.memory_peak() - before) / 2**20}
                    runs[engine] = lambda built=built: built(x)
                except Exception as problem:
                    missing[engine] = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
                    if engine in OURS:
                        self.wrong.append(f"{network} batch {batch} {engine}: {missing[engine]}")
            samples = turns(runs, 9, self.device, wait=batch in LATENCY) if runs else {}
        ratios = {}
        for engine, times in samples.items():
            rows[engine] |= measure.spread(times)
            if engine not in OURS and "fastconv" in samples:
                ratios[engine] = measure.ratio(times, samples["fastconv"])
        found = {"network": network, "batch": batch, "threads": torch.get_num_threads(), "size": self.size}
        found |= {"dtype": str(self.dtype).removeprefix("torch."), "engines": rows, "ratios": ratios, "missing": missing}
        for old in self.cells:
            if (old["network"], old["batch"]) == (network, batch):
                for part in ("engines", "ratios", "missing"):
                    found[part] = old[part] | found[part]
                self.cells.remove(old)
                break
        found["best_peer"] = min(found["ratios"], key=lambda engine: found["ratios"][engine]["median"], default=None)
        self.cells.append(found)
        print(line(found), flush=True)

    def subject(self, network: str, batch: int) -> tuple[nn.Module, Tensor, Tensor, float]:
        """(model, x, float64 logits of the first images, the largest error allowed)."""
        from fastconv.models import get_model

        torch.manual_seed(0)
        x = torch.randn(batch, 3, self.size, self.size).to(self.device.name).contiguous(memory_format=torch.channels_last)
        model = get_model(network).to(self.device.name).to(memory_format=torch.channels_last).requires_grad_(False)
        some = x[:64] if batch > 1 else torch.randn(8, *x.shape[1:]).to(x.device).contiguous(memory_format=torch.channels_last)
        model = calibrated(model, some)
        few = x[:4]
        wanted = eager_form(model).double()(few.double()).cpu()
        model, x = model.to(self.dtype), x.to(self.dtype)
        own = measure.relative_error(eager_form(model)(x[:4]).cpu(), wanted)
        return model, x, wanted, max(ALLOWED * own, 1e-5)

    def first_result(self, network: str) -> None:
        """Runs FIRST with an empty Triton cache, with the one that it filled, and for eager torch."""
        with tempfile.TemporaryDirectory(prefix="fastconv-first-") as folder:
            row: dict[str, Any] = {"network": network}
            for label, engine in (("fastconv, empty cache", "fastconv"), ("fastconv", "fastconv"), ("eager_channels_last",) * 2):
                request = json.dumps([engine, network, self.device.name, self.size, str(self.dtype).removeprefix("torch.")])
                command = [sys.executable, "-c", FIRST, request]
                environment = os.environ | {"TRITON_CACHE_DIR": folder, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
                try:
                    done = subprocess.run(
                        command, env=environment, capture_output=True, text=True, check=False, timeout=max(30, self.left())
                    )
                    row[label] = json.loads(done.stdout.strip().splitlines()[-1])["seconds"]
                except (IndexError, ValueError, subprocess.TimeoutExpired):
                    row[label] = None
            self.first.append(row)
        print(f"{network}: first result {row}", flush=True)

    def document(self) -> dict[str, Any]:
        cells = copy.deepcopy(self.cells)
        for row in self.first:  # shown beside the cell of one image
            for cell in cells:
                if (cell["network"], cell["batch"]) == (row["network"], 1):
                    for engine in cell["engines"]:
                        if row.get(engine) is not None:
                            cell["engines"][engine]["first_result_s"] = row[engine]
        return {
            "schema": 1,
            "kind": "gpu-networks",
            "title": "fastconv on a GPU: whole networks",
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": " ".join([Path(sys.executable).name, *sys.argv]),
            "machine": facts(),
            "cells": cells,
            "first_results": self.first,
            "left_out": self.left_out,
            "failures": self.wrong,
            "target": target(cells),
            "seconds": time.monotonic() - self.began,
        }


def facts() -> dict[str, Any]:
    """The machine, as far as what is installed can tell."""
    try:
        from fastconv.benchmarks import machine

        return machine.block()
    except ImportError:  # click, of the command line
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        return {"gpu": gpu, "versions": {"torch": torch.__version__}}


def target(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Batch 1 beside its target, network by network; None where a rival was not measured."""
    rivals = ("eager_cudagraphs", "compile_reduce_overhead")
    reached = {}
    for cell in cells:
        if cell["batch"] == 1:
            ratios = [cell["ratios"][rival]["median"] for rival in rivals if rival in cell["ratios"]]
            reached[cell["network"]] = min(ratios) if len(ratios) == len(rivals) else None
    return {
        "what": "times the better of eager CUDA graphs and torch.compile reduce-overhead, batch 1",
        "target": TARGET,
        "reached": reached,
    }


def line(cell: dict[str, Any]) -> str:
    """One line of a table: milliseconds, and images a second of fastconv."""
    times = " ".join(f"{engine} {row['median_ms']:.3f}" for engine, row in cell["engines"].items() if "median_ms" in row)
    ours = cell["engines"].get("fastconv", {}).get("median_ms")
    rate = f"  {cell['batch'] / ours * 1e3:,.0f} images/s" if ours else ""
    lost = "".join(f"  no {engine} ({reason})" for engine, reason in cell["missing"].items())
    return f"{cell['network']:20s} batch {cell['batch']:3d} {cell['dtype']}: {times} ms{rate}{lost}"


def write(document: dict[str, Any], folder: Path) -> list[Path]:
    """networks.json, networks.txt, and charts and report.html where what draws them is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "networks.json").write_text(json.dumps(document, indent=1))
    lines = [line(cell) for cell in document["cells"]]
    goal = document["target"]
    for network, reached in goal["reached"].items():
        lines.append(
            f"{network}: {goal['what']}: target {goal['target']}, reached {'not measured' if reached is None else f'{reached:.2f}'}"
        )
    lines += [f"{row['network']}: first result, s: {row}" for row in document["first_results"]]
    lines += [f"left out, time was up: {what}" for what in document["left_out"]] + [f"FAILED {what}" for what in document["failures"]]
    (folder / "networks.txt").write_text("\n".join(lines) + "\n")
    paths = [folder / "networks.json", folder / "networks.txt"]
    try:
        from fastconv.benchmarks import report

        return paths + report.write(document, folder)
    except ImportError as problem:
        print(f"no report.html and no charts: {problem}")
        return paths


# In a fresh process, torch imported and the GPU's context made: from the import of fastconv to the first logits.
FIRST = """
import json, sys, time, torch
engine, network, device, size, dtype = json.loads(sys.argv[1])
dtype = getattr(torch, dtype)
x = torch.randn(1, 3, size, size).to(device, dtype).contiguous(memory_format=torch.channels_last).add(0).cpu().to(device)
start = time.perf_counter()
from fastconv.benchmarks.gpu_networks import build
from fastconv.models import get_model
with torch.no_grad():
    model = get_model(network).eval().to(device, dtype).to(memory_format=torch.channels_last)
    build(engine, model, x)(x).cpu()
print(json.dumps({"seconds": time.perf_counter() - start}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for networks.json, networks.txt, charts and report.html")
    parser.add_argument("--minutes", type=float, default=3, help="time to spend; what does not fit is left out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was run")
        return 0
    torch.backends.cudnn.benchmark = True
    bench = Bench(60 * options.minutes)
    bench.run()
    document = bench.document()
    for path in write(document, options.out):
        print(path)
    print((options.out / "networks.txt").read_text())
    return 1 if bench.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
