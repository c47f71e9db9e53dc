"""Times a whole training step (forward, loss, backward, SGD with momentum) beside eager torch and torch.compile, in turns. Usage:

    python benchmarks/training.py [--nets mobilenet_v2,...] [--batch 16] [--threads 2] [--rounds 15] [--json FILE]

Every way of running has a process of its own; in each round they take one step each. Ratios are medians over the rounds, that way's time
over fastconv's; memory is the process's peak beyond what it had before its first step.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table

WAYS = {
    "fastconv": "fastconv.models",
    "replace": "fastconv.replace(torchvision's or timm's)",
    "eager_channels_last": "torchvision's or timm's, channels_last",
    "eager": "the same, NCHW",
    "compile": "the same, channels_last, torch.compile",
}
NETS = "mobilenet_v1,mobilenet_v2,mobilenet_v3_large,mobilenet_v3_small,squeezenet1_0,squeezenet1_1"
WORKER = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
way, name, batch, threads = sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
import torch
from torch import nn
torch.set_num_threads(threads)
torch.manual_seed(0)
if way in ("fastconv", "replace"):
    import fastconv
if way == "fastconv":
    model = fastconv.models.get_model(name)
else:
    from fastconv.models._torchvision import import_torchvision
    torchvision = import_torchvision()
    if name == "mobilenet_v1":
        import timm
        model = timm.create_model("mobilenetv1_100")
    else:
        model = torchvision.models.get_model(name)
layout = torch.contiguous_format if way == "eager" else torch.channels_last
model = model.train().to(memory_format=layout)
if way == "replace":
    model = fastconv.replace(model)
run = torch.compile(model) if way == "compile" else model
x = torch.randn(batch, 3, 224, 224).to(memory_format=layout)
target = torch.randint(0, 1000, (batch,))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
print("ready", flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    loss = nn.functional.cross_entropy(run(x), target)
    loss.backward()
    optimizer.step()
    print((time.perf_counter() - start) * 1e3, peak() - before, flush=True)
"""
PAUSE = 0.05  # seconds; libgomp's threads spin for 10 ms after their last loop
ROOT = Path(__file__).resolve().parents[1]


def measure(net: str, ways: list[str], batch: int, threads: int, rounds: int) -> dict[str, dict[str, float | list[float]]]:
    """Milliseconds of every step, and megabytes, by way; a way that does not run is left out."""
    command = [sys.executable, "-c", WORKER, str(ROOT)]
    workers = {
        way: subprocess.Popen([*command, way, net, str(batch), str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for way in ways
    }
    for way in [way for way, worker in workers.items() if worker.stdout.readline().strip() != "ready"]:
        workers.pop(way).kill()
    results: dict[str, dict] = {way: {"steps": [], "memory": 0.0} for way in workers}
    for number in track(range(rounds + 2), description=net, transient=True):
        for way, worker in workers.items():
            worker.stdin.write("step\n")
            worker.stdin.flush()
            milliseconds, memory = map(float, worker.stdout.readline().split())
            if number >= 2:  # warm
                results[way]["steps"].append(milliseconds)
            results[way]["memory"] = memory
            time.sleep(PAUSE)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return results


@click.command()
@click.option("--nets", default=NETS, metavar="NAME,...", help="Only these networks.  [default: all six]")
@click.option("--ways", default=",".join(WAYS), show_default=True, metavar="NAME,...")
@click.option("--batch", default=16, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=15, show_default=True)
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the figures here.")
def main(nets: str, ways: str, batch: int, threads: int, rounds: int, path: Path | None) -> None:
    """Time a whole training step in turns."""
    chosen = ways.split(",")
    unknown = [way for way in chosen if way not in WAYS]
    if unknown or "fastconv" not in chosen:
        raise click.BadParameter(f"must be of {', '.join(WAYS)}, with fastconv, got {ways!r}", param_hint="--ways")
    table = Table("network", *(f"{way}: ms, MB" for way in chosen), "best rival / fastconv", title=f"a training step, batch {batch}")
    record: dict = {"batch": batch, "threads": threads, "rounds": rounds, "machine": platform.processor() or platform.machine(), "nets": {}}
    for net in nets.split(","):
        results = measure(net, chosen, batch, threads, rounds)
        if "fastconv" not in results:
            raise click.ClickException(f"fastconv does not train {net} here; its own message stands above")
        medians = {way: statistics.median(result["steps"]) for way, result in results.items()}
        rivals = [way for way in results if way not in ("fastconv", "replace")]
        ratios = {
            way: statistics.median(theirs / ours for theirs, ours in zip(results[way]["steps"], results["fastconv"]["steps"], strict=True))
            for way in rivals
        }
        record["nets"][net] = {
            way: {"ms": medians[way], "memory_mb": result["memory"], "ratio": ratios.get(way), "steps": result["steps"]}
            for way, result in results.items()
        }
        cells = [f"{medians[way]:.0f}, {results[way]['memory']:.0f}" if way in results else "-" for way in chosen]
        best = min(ratios, key=ratios.get) if ratios else None
        table.add_row(net, *cells, f"{ratios[best]:.2f} ({best})" if best else "-")
    Console().print(table)
    if path:
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
