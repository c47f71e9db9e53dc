"""What `demo` and `bench` print alike."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ENGINE_NAMES = {"eager": "eager NCHW", "eager_channels_last": "eager channels_last", "fastconv": "fastconv"}


def progress() -> Progress:
    """A bar on stderr, gone when done."""
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def say_random(console: Console, results: list[dict[str, Any]]) -> None:
    """Says which networks have no trained weights, and why."""
    without: dict[str, list[str]] = {}
    for result in results:
        if result["weights"].startswith("random"):
            without.setdefault(result["why_random"] or "asked for", []).append(result["network"])
    for why, names in without.items():
        console.print(f"Random weights ({why}): {', '.join(names)}.", style="yellow", markup=False)
    if without:
        console.print("Their errors and times are real; the categories they name are meaningless.", style="yellow")


def table(title: str, results: list[dict[str, Any]]) -> Table:
    """One row per network: error, agreement where photographs were classified, medians, speed-ups."""
    grid = Table(title=title, title_justify="left")
    grid.add_column("network", no_wrap=True)
    grid.add_column("weights")
    for heading in ("logit error", "same top-1", "eager ms", "channels_last ms", "fastconv ms", "vs eager", "vs channels_last"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        times, speedup = result["median_ms"], result["speedup"]
        grid.add_row(
            result["network"],
            result["weights"],
            f"{result['error']:.1e}",
            f"{result['agreement']:.0%}",
            f"{times['eager']:.2f}",
            f"{times['eager_channels_last']:.2f}",
            f"[bold]{times['fastconv']:.2f}[/]",
            f"{speedup['eager']:.2f}x",
            f"{speedup['eager_channels_last']:.2f}x",
        )
    return grid
