"""The network suite: whole networks through every engine, as one document (docs/benchmarks.md describes it)."""

import contextlib
import datetime
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from fastconv.benchmarks import engines, machine, measure
from fastconv.cli import networks

# Relative L2 error of the logits beyond which an engine's answer counts as wrong and is not timed; fastconv's own is stricter.
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
OUR_BOUND = 1e-5


def cell(
    name: str,
    *,
    batch: int,
    size: int,
    threads: int,
    dtype: torch.dtype = torch.float32,
    chosen: Iterable[str],
    rounds: int,
    folder: Path,
    cold: bool = False,
    device: str = "cpu",
    tick: Callable[[], Any] = lambda: None,
    table: dict[str, engines.Engine] | None = None,
) -> dict[str, Any]:
    """One network at one batch, size, thread count and dtype through the chosen engines, interleaved in this process.

    Every engine's logits are compared with eager float32's before it is timed; one that is missing, fails or is wrong stands in `missing`
    with its reason. cold: also the time to the first result and the memory of each engine, in a process of its own.
    """
    table = table or engines.table(device)
    torch.set_num_threads(threads)
    network = networks.build(name, pretrained=False)
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    runs: dict[str, engines.Call] = {}
    rows: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    with torch.no_grad():
        reference = network.model(x)
        model, x = network.model.to(dtype), x.to(dtype)
        for engine in chosen:
            request = engines.Request(name, model, x, threads, folder)
            try:
                run = engines.built(table[engine], request)
                with engines.quiet():
                    logits = run().float().cpu().reshape(reference.shape)
                error = measure.relative_error(logits, reference)
                bound = OUR_BOUND if engine == "fastconv" and dtype is torch.float32 else BOUNDS[dtype]
                if not error <= bound:
                    raise RuntimeError(f"wrong logits: relative error {error:.1e}, allowed {bound:g}")
            except Exception as problem:
                missing[engine] = (str(problem) or type(problem).__name__).splitlines()[0]
                continue
            runs[engine] = run
            rows[engine] = {
                "relative_error": error,
                "top1_agreement": float((logits.argmax(1) == reference.argmax(1)).float().mean()),
                "disk_bytes": sum(path.stat().st_size for path in request.files) or None,
                "first_result_s": None,
                "peak_memory_mb": None,
            }
        samples = measure.interleave(runs, rounds, tick)
    runs.clear()
    for engine, times in samples.items():
        rows[engine].update(measure.spread(times))
        if cold and device == "cpu" and dtype is torch.float32:
            rows[engine].update(_cold(engine, name, batch, size, threads, folder))
    ours = samples.get("fastconv")
    ratios = {engine: measure.ratio(times, ours) for engine, times in samples.items() if engine != "fastconv"} if ours else {}
    return {
        "network": name,
        "batch": batch,
        "size": size,
        "threads": threads,
        "dtype": str(dtype).removeprefix("torch."),
        "engines": rows,
        "ratios": ratios,
        "best_peer": min(ratios, key=lambda engine: ratios[engine]["median"]) if ratios else None,
        "missing": missing,
    }


def document(title: str, command: str, cells: list[dict[str, Any]], noise: measure.Noise) -> dict[str, Any]:
    """The suite's result, as report, compare and the recorded runs have it."""
    spreads = [row["q3_ms"] / row["median_ms"] - row["q1_ms"] / row["median_ms"] for c in cells if (row := c["engines"].get("fastconv"))]
    return {
        "schema": 1,
        "kind": "networks",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": command,
        "title": title,
        "machine": machine.block(),
        "noise": noise.verdict(spreads),
        "roofline": None,
        "cells": cells,
        "layers": [],
        "scaling": [],
        "claims": None,
    }


def headline(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The geometric mean over the cells of the ratio to each cell's best peer, and how many cells fastconv wins and loses.

    A cell is won or lost where the ratio's interval lies on one side of 1, else even.
    """
    best = [c["ratios"][c["best_peer"]] for c in cells if c["best_peer"]]
    return {
        "geomean": math.exp(statistics.fmean(math.log(ratio["median"]) for ratio in best)) if best else None,
        "least": min((ratio["median"] for ratio in best), default=None),
        "won": sum(ratio["low"] > 1 for ratio in best),
        "lost": sum(ratio["high"] < 1 for ratio in best),
        "cells": len(best),
    }


def scaling(chosen: list[str], batches: list[int], threads: list[int], folder: Path, rounds: int = 3) -> list[dict[str, Any]]:
    """Times of fastconv and eager channels_last against batch, threads and resolution."""
    cores = max(threads)
    points = [("batch", n, n, cores, 224) for n in batches]
    points += [("threads", n, 1, n, 224) for n in threads]
    points += [("resolution", n, 1, cores, n) for n in (128, 192, 256, 320)]
    rows = []
    for name in chosen:
        for axis, value, batch, count, size in points:
            names = ("fastconv", "eager_channels_last")
            row = cell(name, batch=batch, size=size, threads=count, chosen=names, rounds=rounds, folder=folder)
            times = {engine: timed["median_ms"] for engine, timed in row["engines"].items()}
            rows.append({"network": name, "axis": axis, "value": value, "batch": batch, "threads": count, "size": size, "engines": times})
    return rows


def _cold(engine: str, name: str, batch: int, size: int, threads: int, folder: Path) -> dict[str, float | None]:
    """Runs `main` below in a fresh process."""
    request = json.dumps([engine, name, batch, size, threads, str(folder)])
    command = [sys.executable, "-m", "fastconv.benchmarks.networks", request]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return {"first_result_s": None, "peak_memory_mb": None}


def _memory(field: str) -> float:
    """A line of this process's status, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    return math.nan


def main() -> None:
    """Seconds from importing the engine to its first result, and the memory it added at most over five calls, as a line of JSON.

    Torch is imported and the model built before the clock starts, for every engine alike; files that it converts are there already.
    """
    engine, name, batch, size, threads, folder = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    network = networks.build(name, pretrained=False)
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew: importing torch may have needed more for a moment
    before, start = _memory("VmHWM"), time.perf_counter()
    with torch.no_grad():
        run = engines.built(engines.CPU[engine], engines.Request(name, network.model, x, threads, Path(folder)))
        run()
        first = time.perf_counter() - start
        for _ in range(4):
            run()
    print(json.dumps({"first_result_s": first, "peak_memory_mb": _memory("VmHWM") - before}))


if __name__ == "__main__":
    main()
