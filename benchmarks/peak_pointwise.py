"""Percent of the core's fused multiply-add peak that the pointwise kernel reaches, per 1x1 shape of the six networks and per ISA.

One thread; weights packed before, as in an optimized model; bias and relu6 in the epilogue. The peak is measured beside every shape (14
independent chains of fused multiply-adds on the same ISA), so that a drift of the machine's clock cancels. Usage:

    python benchmarks/peak_pointwise.py [--isa avx512] [--nets mobilenet_v2] [--budget 0.2] [--json FILE]
"""

import json
from collections import Counter
from pathlib import Path

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fastconv._C as extension
from fastconv.benchmarks import layers


def shapes(nets: tuple[str, ...]) -> dict[tuple[int, int, int], Counter[str]]:
    """(pixels, in channels, out channels) -> how many such layers each network has, in the file's order."""
    found: dict[tuple[int, int, int], Counter[str]] = {}
    for row in layers.read("pointwise"):
        if not nets or row["net"] in nets:
            found.setdefault((row["N"] * row["H"] * row["W"], row["C"], row["Cout"]), Counter())[row["net"]] += row["count"]
    return found


def measure(shape: tuple[int, int, int], budget: float) -> dict[str, float]:
    """Best of several short runs for both, taking turns: a neighbour on the machine can only make a run slower."""
    peak, reached = 0.0, 0.0
    for _ in range(4):
        peak = max(peak, extension.fma_gflops())
        reached = max(reached, extension.pointwise_gflops(*shape, budget=budget / 4))
    return {"gflops": reached, "peak_gflops": peak, "percent": 100 * reached / peak}


def whole_networks(rows: list[dict], isa: str, peak: float) -> str:
    """All 1x1 layers of each network together: their operations over the sum of their times, in percent of the peak."""
    operations, seconds = Counter(), Counter()
    for row in rows:
        work = 2 * row["pixels"] * row["in_channels"] * row["out_channels"]
        for net, count in row["networks"].items():
            operations[net] += count * work
            seconds[net] += count * work / (row[isa]["gflops"] * 1e9)
    return ", ".join(f"{net} {100 * operations[net] / seconds[net] / 1e9 / peak:.0f}%" for net in operations)


@click.command()
@click.option("--isa", "isas", multiple=True, help="Only these instruction sets; default: all this CPU supports.")
@click.option("--nets", multiple=True, help="Only layers of these networks.")
@click.option("--budget", default=0.2, show_default=True, help="Seconds a shape and ISA.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write the rows there too.")
def main(isas: tuple[str, ...], nets: tuple[str, ...], budget: float, json_path: str | None) -> None:
    """Prints GFLOP/s and percent of the measured peak, one row a shape, one column an ISA."""
    isas = isas or tuple(extension.isas())
    table = Table("pixels", "in", "out", *(f"{isa} GFLOP/s" for isa in isas), *(f"{isa} % of peak" for isa in isas), "networks")
    rows = []
    for shape, users in track(shapes(nets).items(), description="pointwise"):
        cells = {}
        for isa in isas:
            extension.set_isa(isa)
            cells[isa] = measure(shape, budget)
        rows.append({"pixels": shape[0], "in_channels": shape[1], "out_channels": shape[2], "networks": users, **cells})
        table.add_row(
            *map(str, shape),
            *(f"{cells[isa]['gflops']:.1f}" for isa in isas),
            *(f"{cells[isa]['percent']:.0f}" for isa in isas),
            " ".join(users),
        )
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    for isa in isas:
        percents = sorted(row[isa]["percent"] for row in rows)
        peak = max(row[isa]["peak_gflops"] for row in rows)
        below = sum(percent < 80 for percent in percents)
        console.print(
            f"{isa}: peak {peak:.1f} GFLOP/s a core; median {percents[len(percents) // 2]:.0f}% of it, least {percents[0]:.0f}%, "
            f"{below} of {len(percents)} shapes below 80%\n  all 1x1 layers of a network together: {whole_networks(rows, isa, peak)}"
        )
    if json_path:
        Path(json_path).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
