"""Timing that a drifting machine cannot bias: the engines take turns inside every round, and ratios are taken round by round."""

import copy
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fastconv.cli.networks import Network


def interleave(runs: dict[str, Callable[[], Any]], rounds: int, tick: Callable[[], Any] = lambda: None) -> dict[str, list[float]]:
    """Milliseconds per call of each run, one sample a round; a sample repeats its run for at least 20 ms."""
    repeats = {}
    for name, run in runs.items():
        for _ in range(3):
            run()
        start = time.perf_counter()
        run()
        repeats[name] = max(1, math.ceil(0.02 / max(time.perf_counter() - start, 1e-6)))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for turn in range(rounds):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            run = runs[name]
            run()  # its weights come back into the caches that the others filled
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            samples[name].append((time.perf_counter() - start) / repeats[name] * 1e3)
        tick()
    return samples


def summarise(samples: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, fastconv's speed-up over each other engine (the median of the rounds' ratios), and the samples themselves."""
    fast = samples["fastconv"]
    return {
        "median_ms": {name: statistics.median(times) for name, times in samples.items()},
        "speedup": {
            name: statistics.median(other / ours for other, ours in zip(times, fast, strict=True))
            for name, times in samples.items()
            if name != "fastconv"
        },
        "samples_ms": samples,
    }


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest relative L2 error of a row of logits; inf where ours has a NaN that theirs has not."""
    difference = (ours.double() - theirs.double()).norm(dim=1) / theirs.double().norm(dim=1)
    return float(difference.nan_to_num(nan=math.inf).max())


def engines(network: Network, fast: torch.nn.Module, x: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """The network as eager NCHW, eager channels_last, and through fastconv (NCHW in, as most users have it)."""
    channels_last = copy.deepcopy(network.model).to(memory_format=torch.channels_last)
    x_channels_last = x.to(memory_format=torch.channels_last)
    return {"eager": lambda: network.model(x), "eager_channels_last": lambda: channels_last(x_channels_last), "fastconv": lambda: fast(x)}
