"""Times our models and optimized ones with and without torch.compile(fullgraph=True), in turns. Usage:

    python benchmarks/compiled.py [--nets mobilenet_v2,...] [--batches 1,16] [--training] [--threads 2] [--rounds 15] [--json FILE]

A ratio is the compiled call's time over the plain one's, the median over the rounds: at most 1 where compiling costs nothing.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, where it is no installed package

import fastconv
from fastconv.benchmarks.measure import Noise, interleave, ratio, spread

SIZE = 224


def inference(module: nn.Module, x: Tensor) -> Callable[[], Any]:
    def run() -> None:
        with torch.no_grad():
            module(x)

    return run


def step(module: nn.Module, x: Tensor, parameters: list[nn.Parameter]) -> Callable[[], Any]:
    target = torch.randint(0, 1000, (x.shape[0],))

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
        nn.functional.cross_entropy(module(x), target).backward()

    return run


def pairs(net: str, batch: int, training: bool) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """What to run plain and compiled, by name."""
    x = torch.randn(batch, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    model = fastconv.models.get_model(net).to(memory_format=torch.channels_last)
    torch._dynamo.reset()
    if training:
        parameters = list(model.train().parameters())
        return {"model, a step": (step(model, x, parameters), step(torch.compile(model, fullgraph=True), x, parameters))}
    modules = {"model": model.eval(), "optimized": fastconv.optimize(model)}
    return {name: (inference(module, x), inference(torch.compile(module, fullgraph=True), x)) for name, module in modules.items()}


@click.command()
@click.option(
    "--nets", default=",".join(fastconv.models.list_models()), metavar="NAME,...", help="Only these networks.  [default: all six]"
)
@click.option("--batches", default="1,16", show_default=True, metavar="N,...")
@click.option("--training/--inference", default=False, help="A step (forward, loss, backward) instead.")
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=15, show_default=True)
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the figures here.")
def main(nets: str, batches: str, training: bool, threads: int, rounds: int, path: Path | None) -> None:
    """Time calls with and without torch.compile in turns."""
    torch.set_num_threads(threads)
    table = Table("network", "batch", "what", "plain, ms", "compiled, ms", "compiled / plain (95%)")
    record: dict[str, Any] = {"threads": threads, "rounds": rounds, "torch": torch.__version__, "cells": []}
    with Noise() as noise:
        for net in nets.split(","):
            for batch in map(int, batches.split(",")):
                for name, (plain, compiled) in pairs(net, batch, training).items():
                    samples = interleave({"plain": plain, "compiled": compiled}, rounds)
                    times = {way: spread(values) for way, values in samples.items()}
                    cost = ratio(samples["compiled"], samples["plain"])
                    record["cells"].append({"net": net, "batch": batch, "what": name, **times, "ratio": cost})
                    medians = (f"{times[way]['median_ms']:.3g}" for way in ("plain", "compiled"))
                    table.add_row(net, str(batch), name, *medians, f"{cost['median']:.3f} ({cost['low']:.3f} to {cost['high']:.3f})")
    plains = [cell["plain"] for cell in record["cells"]]
    record["noise"] = noise.verdict([(times["q3_ms"] - times["q1_ms"]) / times["median_ms"] for times in plains])
    Console().print(table)
    if not record["noise"]["quiet"]:
        Console().print(f"not a quiet machine: {'; '.join(record['noise']['reasons'])}")
    if path:
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
