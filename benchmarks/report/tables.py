"""The document as terminal tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fastconv.benchmarks.report.view import LEVEL, LOST, WON, Cell, Group, View, engine_name, megabytes, number, significant

COLORS = {WON: "green", LOST: "bold red", LEVEL: "yellow"}
COSTS = {  # key of an engine's block: heading, how it is written
    "first_result_s": ("time to first result, s", lambda value: significant(value, 2)),
    "peak_memory_mb": ("peak memory, MB", lambda value: f"{value:.0f}"),
    "disk_bytes": ("on disk", megabytes),
    "relative_error": ("logit error against eager (relative L2)", lambda value: f"{value:.0e}"),
}


def print_tables(document: dict[str, Any], console: Console) -> None:
    """Print the headline, one table per setting, costs and missing engines. Raises ValueError for another kind of document."""
    view = View(document)
    if view.noisy:
        reasons = "; ".join(map(str, view.noise.get("reasons") or ["its noise passed the limit"]))
        text = f"The machine was noisy: {reasons}.\nTimes are given with fewer digits; do not quote them."
        console.print(Panel(Text(text), style="yellow", expand=False))
    if view.headline is not None:
        counts = view.verdicts
        line = Text(f"fastconv is {view.times(view.headline)} the best peer of each cell (geometric mean of {sum(counts.values())}): ")
        for verdict, color in COLORS.items():
            line.append(f"{counts[verdict]} {verdict}", color).append(", " if verdict != LEVEL else "")
        console.print(line)
    for group in view.groups:
        console.print(_times(view, group))
    for key, (heading, write) in COSTS.items():
        if view.has(key):
            console.print(_costs(view, key, heading, write))
    for row in view.missing:
        console.print(Text(f"{engine_name(row['engine'])} is missing ({row['where']}): {row['reason']}", style="yellow"))
    if view.claims:
        from fastconv.benchmarks import claims

        claims.print_table(view.claims, console)


def _times(view: View, group: Group) -> Table:
    grid = Table(title=Text(f"{group.label}; median ms, and its ratio to fastconv's"), title_justify="left")
    grid.add_column("network", no_wrap=True)
    for engine in group.engines:
        grid.add_column(Text(engine_name(engine)), justify="right", style="bold" if engine == "fastconv" else "")
    grid.add_column("best peer", no_wrap=True)
    for cell in group.cells:
        grid.add_row(Text(cell.name), *(_time(view, cell, engine) for engine in group.engines), _verdict(view, cell))
    return grid


def _time(view: View, cell: Cell, engine: str) -> Text:
    if engine not in cell.engines:
        return Text("missing" if engine in cell.missing else "–", style="dim")
    text = Text(view.ms(cell.median(engine)))
    low, high = cell.value(engine, "q1_ms"), cell.value(engine, "q3_ms")
    if low is not None and high is not None:
        text.append(f"\nIQR {view.ms(high - low)}", "dim")
    if ratio := cell.ratios.get(engine):
        text.append(f"\n{view.times(ratio.median)}", COLORS[ratio.verdict])
    return text


def _verdict(view: View, cell: Cell) -> Text:
    if not cell.best:
        return Text("–", style="dim")
    text = Text(f"{engine_name(cell.best_peer)}\n{view.times(cell.best.median)} {cell.best.verdict}", COLORS[cell.best.verdict])
    if interval := view.interval(cell.best):
        text.append(f"\n{interval}", "dim")
    return text


def _costs(view: View, key: str, heading: str, write: Any) -> Table:
    engines = [engine for engine in view.engines if any(number(cell.value(engine, key)) is not None for cell in view.cells)]
    grid = Table(title=Text(heading), title_justify="left")
    grid.add_column("network", no_wrap=True)
    for engine in engines:
        grid.add_column(Text(engine_name(engine)), justify="right", style="bold" if engine == "fastconv" else "")
    for group in view.groups:
        for cell in group.cells:
            values = [cell.value(engine, key) for engine in engines]
            if cell.measured(key):
                name = Text(f"{cell.name}, batch {group.batch}, {group.threads} thr")
                grid.add_row(name, *("–" if value is None else write(value) for value in values))
    return grid
