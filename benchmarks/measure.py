"""Timing that a drifting machine cannot bias: engines take turns inside every round, and ratios are taken round by round.

Before its turn an engine waits until the process's threads have gone to sleep: other engines' pools spin after their last call (ONNX
Runtime's 40 ms, libgomp's 10 ms on the machine of the first recorded runs) and would take half of a small machine from their successor.
"""

import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

SAMPLE_SECONDS = 0.02
SETTLE_SECONDS = 0.15
# A machine is called noisy from here on, in percent: of all cores' time, of one core, of the median.
STEAL, NEIGHBOUR, SPREAD = 1.0, 10.0, 8.0


def settle() -> None:
    """Returns when the process used less than a tenth of a core for 5 ms, or after 150 ms."""
    end = time.perf_counter() + SETTLE_SECONDS
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(0.005)
        if time.process_time() - before < 0.0005:
            return


def interleave(runs: dict[str, Callable[[], Any]], rounds: int, tick: Callable[[], Any] = lambda: None) -> dict[str, list[float]]:
    """Milliseconds per call of each run, one sample a round; a sample repeats its run for at least 20 ms. The order rotates."""
    repeats = {}
    for name, run in runs.items():
        for _ in range(3):
            run()
        start = time.perf_counter()
        run()
        repeats[name] = max(1, math.ceil(SAMPLE_SECONDS / max(time.perf_counter() - start, 1e-6)))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for turn in range(rounds):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            run = runs[name]
            settle()
            run()  # its weights come back into the caches that the others filled, its threads wake up
            run()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            samples[name].append((time.perf_counter() - start) / repeats[name] * 1e3)
        tick()
    return samples


def spread(samples: list[float]) -> dict[str, Any]:
    """Median, quartiles and minimum of one engine's samples, in ms, and the samples themselves."""
    low, middle, high = (float(value) for value in np.percentile(samples, (25, 50, 75)))
    return {"median_ms": middle, "q1_ms": low, "q3_ms": high, "min_ms": min(samples), "samples_ms": samples}


def ratio(theirs: list[float], ours: list[float], resamples: int = 2000) -> dict[str, float]:
    """Median of the rounds' ratios theirs / ours, above 1 where ours is faster, and the 95% bootstrap interval of that median."""
    ratios = np.array(theirs) / np.array(ours)
    draws = np.random.default_rng(0).integers(0, len(ratios), (resamples, len(ratios)))
    low, high = np.percentile(np.median(ratios[draws], axis=1), (2.5, 97.5))
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}


def summarise(samples: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, fastconv's speed-up over each other engine (the median of the rounds' ratios), and the samples themselves."""
    others = {name: times for name, times in samples.items() if name != "fastconv"}
    return {
        "median_ms": {name: statistics.median(times) for name, times in samples.items()},
        "speedup": {name: ratio(times, samples["fastconv"], 1)["median"] for name, times in others.items()},
        "samples_ms": samples,
    }


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest relative L2 error of a row of logits; inf where ours has a NaN that theirs has not."""
    difference = (ours.double() - theirs.double()).norm(dim=1) / theirs.double().norm(dim=1)
    return float(difference.nan_to_num(nan=math.inf).max())


class Noise:
    """Watches the machine from `with` to the end of it: time stolen by the hypervisor, and time taken by other processes."""

    def __enter__(self) -> "Noise":
        self.start, self.elapsed = self._now(), time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        self.end, self.elapsed = self._now(), time.perf_counter() - self.elapsed

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds of all cores: busy with processes, stolen, and this process's and its children's own."""
        own = sum(os.times()[:4])
        try:
            ticks = [int(word) / os.sysconf("SC_CLK_TCK") for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        except OSError:  # no Linux: nothing is known
            return own, 0.0, own
        user, nice, system, _idle, _wait, irq, soft, steal = ticks
        return user + nice + system + irq + soft, steal, own

    def verdict(self, spreads: list[float]) -> dict[str, Any]:
        """The report's noise block. spreads: interquartile range over median of fastconv's samples, one a cell."""
        busy, steal, own = (end - start for start, end in zip(self.start, self.end))
        capacity = self.elapsed * (os.cpu_count() or 1)
        figures = {
            "steal_percent": 100 * steal / capacity,
            "neighbour_percent": max(0.0, 100 * (busy - own) / self.elapsed),
            "spread_percent": 100 * statistics.median(spreads) if spreads else 0.0,
        }
        reasons = []
        if figures["steal_percent"] > STEAL:
            reasons.append(f"the hypervisor took {figures['steal_percent']:.1f}% of the cores' time")
        if figures["neighbour_percent"] > NEIGHBOUR:
            reasons.append(f"other processes took {figures['neighbour_percent']:.0f}% of a core")
        if figures["spread_percent"] > SPREAD:
            reasons.append(f"half of fastconv's samples lie {figures['spread_percent']:.0f}% of the median or more apart")
        return {**figures, "quiet": not reasons, "reasons": reasons}
