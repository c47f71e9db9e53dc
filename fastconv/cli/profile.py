"""fastconv profile: where a network's time goes, layer by layer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.table import Table


@click.command()
@click.argument("model")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images per call.")
@click.option("--size", type=click.IntRange(min=32), default=224, show_default=True, help="Height and width of the input.")
@click.option("--threads", type=click.IntRange(min=1), default=None, help="Threads.  [default: torch's own choice]")
@click.option("--rounds", type=click.IntRange(min=1), default=30, show_default=True, help="Passes over all layers; times are medians.")
@click.option("--json", "path", type=click.Path(dir_okay=False, writable=True, allow_dash=True), help="Also write JSON (-: only that).")
@click.option("--chart", type=click.Path(dir_okay=False, writable=True), help="Also draw the layers (.png, .svg or .pdf).")
def profile(model: str, batch: int, size: int, threads: int | None, rounds: int, path: str | None, chart: str | None) -> None:
    """Time each layer of MODEL as optimized: its share, its percent of this machine's roofs, and the kernel that ran.

    A second table has the layers as the whole call runs them, in one step where rows go from one to the next without standing in memory.

    MODEL is one of fastconv's own names (mobilenet_v2), torchvision:NAME or timm:NAME. The roofs, fused multiply-adds and bandwidth, are
    measured in the same run, times the threads in use. Winograd layers are counted as direct convolutions and may pass 100%.
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    import fastconv
    from fastconv.cli import networks
    from fastconv.optimize import profile as profiling

    for file, option in ((path, "--json"), (chart, "--chart")):
        if file and file != "-":
            networks.check_folder(file, option)
    if threads:
        torch.set_num_threads(threads)
    fast = fastconv.optimize(networks.build_any(model))
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    try:
        result = profiling.profile(fast, x, rounds=rounds)
    except ValueError as problem:
        raise click.ClickException(str(problem)) from None
    rows = result["layers"]
    if path != "-":
        table = Table(title=f"{model}, batch {batch}, {size} x {size}, {torch.get_num_threads()} threads", title_justify="left")
        table.add_column("layer", no_wrap=True, max_width=32)
        table.add_column("kernel", no_wrap=True)
        for heading in ("input", "us", "share"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for heading in ("GFLOP/s", "% of peak", "GB/s", "% of roof"):
            table.add_column(heading, justify="right", no_wrap=True)
        longest = max(row["us"] for row in rows)
        for row in rows:
            measured = row["gflops"] is not None
            table.add_row(
                row["layer"],
                row["kernel"],
                "x".join(map(str, row["input"])),
                f"{row['us']:.0f}",
                f"{row['share']:.1%}",
                "█" * round(20 * row["us"] / longest),
                f"{row['gflops']:.0f}" if measured else "",
                f"{row['percent_of_peak']:.0f}" if measured else "",
                f"{row['gbs']:.1f}",
                f"{row['percent_of_roof']:.0f}" if measured else "",
            )
        roof = result["roofline"]
        console = Console(width=None if Console().is_terminal else 160)
        console.print(table)
        if result["steps"]:
            console.print(steps_table(result["steps"]))
        console.print(
            f"layers {result['sum_us'] / 1e3:.2f} ms, the whole call {result['whole_us'] / 1e3:.2f} ms, {result['gflops']:.0f} GFLOP/s "
            f"({result['percent_of_peak']:.0f}% of {roof['threads']} x {roof['fma_gflops']:.0f} GFLOP/s, {roof['isa']})",
            highlight=False,
        )
    if path:
        with click.open_file(path, "w") as file:
            file.write(json.dumps({"model": model, "batch": batch, "size": size, "rounds": rounds, **result}, indent=1) + "\n")
    if chart:
        draw(rows, f"{model}, batch {batch}: microseconds per layer", chart)


def steps_table(steps: list[dict]) -> Table:
    """The steps of the whole call."""
    from rich.table import Table

    table = Table(title="inside the whole call, timed there", title_justify="left")
    table.add_column("layers", no_wrap=True)
    for heading in ("us", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for heading in ("GFLOP/s", "% of peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    total, longest = sum(step["us"] for step in steps), max(step["us"] for step in steps)
    for step in steps:
        first, *rest = step["layers"]
        table.add_row(
            f"{first} to {rest[-1]}" if rest else first,
            f"{step['us']:.0f}",
            f"{step['us'] / total:.1%}",
            "█" * round(20 * step["us"] / longest),
            f"{step['gflops']:.0f}" if step["gflops"] else "",
            f"{step['percent_of_peak']:.0f}" if step["gflops"] else "",
        )
    return table


def draw(rows: list[dict], title: str, path: str) -> None:
    """Bars of time per layer, coloured by percent of the multiply-add peak, into a file.

    Raises click.ClickException without matplotlib or for a suffix that it cannot write.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise click.ClickException("--chart needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(9, 0.6 + 0.26 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = figure.colorbar(
        axes.scatter([], [], c=[], cmap="viridis", vmin=0, vmax=100), ax=axes, label="% of the multiply-add peak", shrink=0.6
    )
    percent = [row["percent_of_peak"] or 0 for row in rows]
    bars = axes.barh(range(len(rows)), [row["us"] for row in rows], color=colours.cmap([min(p, 100) / 100 for p in percent]))
    axes.bar_label(
        bars, [f"{row['us']:.0f} us, {p:.0f}%" if p else f"{row['us']:.0f} us" for row, p in zip(rows, percent)], padding=3, size=8
    )
    axes.set_yticks(range(len(rows)), [f"{row['layer']}  ({row['op']})" for row in rows], size=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as problem:
        raise click.ClickException(f"--chart: {problem}") from None
