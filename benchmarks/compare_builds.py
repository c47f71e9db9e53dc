"""Times whole networks in several builds of fastconv, in turns: what a change of the kernels brought. Usage:

    python benchmarks/compare_builds.py OLD NEW [MORE...] [--threads 2] [--batch 1] [--nets mobilenet_v2] [--rounds 25]

Each argument is a folder that holds a built package (`git worktree add OLD COMMIT && cd OLD && python setup.py build_ext --inplace`). Every
build runs in a process of its own; in each round they take turns, with a pause between while the threads of the one before fall asleep.
Ratios are medians over the rounds, the first build's time over this one's. Two copies of one build differ by up to 1.5%: memory pages
fall differently in each process.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table

WORKER = """
import sys, time
sys.path.insert(0, sys.argv[1])
import torch, fastconv
threads, batch = int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
torch.manual_seed(0)
nets = {name: fastconv.optimize(fastconv.models.get_model(name).eval()) for name in sys.argv[4].split(",")}
x = torch.randn(batch, 3, 224, 224)
print(fastconv.__file__, flush=True)
with torch.no_grad():
    for line in sys.stdin:
        fast, repeats = nets[line.strip()], max(1, 8 // batch)
        fast(x), fast(x)
        start = time.perf_counter()
        for _ in range(repeats):
            fast(x)
        print((time.perf_counter() - start) / repeats * 1e3, flush=True)
"""
NETS = "mobilenet_v1,mobilenet_v2,mobilenet_v3_large,mobilenet_v3_small,squeezenet1_0,squeezenet1_1"
PAUSE = 0.02  # seconds; libgomp's threads spin for 10 ms after their last loop


def start(folder: Path, threads: int, batch: int, nets: str) -> subprocess.Popen:
    """A process that times one network of this build for every line that it is sent."""
    command = [sys.executable, "-c", WORKER, str(folder.resolve()), str(threads), str(batch), nets]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/")
    package = worker.stdout.readline().strip()
    if not package or folder.resolve() not in Path(package).resolve().parents:
        raise click.ClickException(f"{folder} holds no built fastconv (got {package or 'an error'})")
    return worker


@click.command()
@click.argument("builds", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--threads", default=2, show_default=True)
@click.option("--batch", default=1, show_default=True)
@click.option("--nets", default=NETS, metavar="NAME,...", show_default="all six")
@click.option("--rounds", default=25, show_default=True)
def main(builds: tuple[Path, ...], threads: int, batch: int, nets: str, rounds: int) -> None:
    """Prints each network's median time in every build, and the ratio to the first."""
    workers = [start(folder, threads, batch, nets) for folder in builds]
    table = Table("network", *(f"{folder}, ms" for folder in builds), *(f"{builds[0]} / {folder}" for folder in builds[1:]))
    for net in track(nets.split(","), description=f"batch {batch}, {threads} threads"):
        times: list[list[float]] = [[] for _ in workers]
        for _ in range(rounds):
            for worker, measured in zip(workers, times):
                time.sleep(PAUSE)
                print(net, file=worker.stdin, flush=True)
                measured.append(float(worker.stdout.readline()))
        ratios = [statistics.median(first / own for first, own in zip(times[0], measured)) for measured in times[1:]]
        table.add_row(net, *(f"{statistics.median(measured):.3f}" for measured in times), *(f"{ratio:.3f}" for ratio in ratios))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    main()
