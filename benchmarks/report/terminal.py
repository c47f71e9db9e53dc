"""The rich tables of `fastconv bench`."""

from typing import Any

from rich.console import Console
from rich.table import Table

from fastconv.benchmarks.networks import headline
from fastconv.benchmarks.report import text


def print_tables(document: dict[str, Any], console: Console) -> None:
    """One table a batch and thread count: every engine's median, and fastconv against the best of the others."""
    quiet = document["noise"]["quiet"]
    for name, cells in text.groups(document["cells"]).items():
        shown = text.present(cells)
        table = Table(title=f"{name}; ms per call, median", title_justify="left")
        table.add_column("network", no_wrap=True)
        for engine in shown:
            table.add_column(text.title(engine), justify="right", style="bold" if engine == "fastconv" else "")
        for heading in ("vs best", "95% interval", "best rival", "logit error"):
            table.add_column(heading, justify="right", no_wrap=True)
        for cell in cells:
            timed = cell["engines"]
            row = [text.milliseconds(timed[engine]["median_ms"], quiet) if engine in timed else "-" for engine in shown]
            if cell["best_peer"]:
                ratio = cell["ratios"][cell["best_peer"]]
                colour = {"faster": "green", "slower": "red", "even": "yellow"}[text.outcome(ratio)]
                row += [
                    f"[{colour}]{text.times(ratio['median'], quiet)}[/]",
                    f"{ratio['low']:.2f} to {ratio['high']:.2f}",
                    text.title(cell["best_peer"]),
                ]
            else:
                row += ["", "", ""]
            error = timed.get("fastconv", {}).get("relative_error")
            table.add_row(cell["network"], *row, "" if error is None else f"{error:.1e}")
        console.print(table)
    summary = headline(document["cells"])
    if summary["cells"]:
        console.print(
            f"fastconv against the best rival of each cell: geometric mean {summary['geomean']:.2f}x, least {summary['least']:.2f}x; "
            f"faster in {summary['won']}, slower in {summary['lost']} of {summary['cells']} cells",
            highlight=False,
        )
    reasons = {(engine, why) for cell in document["cells"] for engine, why in cell["missing"].items()}
    for engine, why in sorted(reasons):
        console.print(f"left out: {text.title(engine)}: {why}", style="yellow", markup=False)
    if not quiet:
        console.print(f"noisy machine: {'; '.join(document['noise']['reasons'])}. Times are rounded more coarsely.", style="bold yellow")


def print_comparison(rows: list[dict[str, Any]], threshold: float, console: Console) -> None:
    """What `compare` found."""
    table = Table(title=f"against the recorded run; a change above {1 + threshold:.2f} fails", title_justify="left")
    for heading in ("network", "batch", "threads", "then ms", "now ms", "change", ""):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for row in rows:
        verdict = "[red]slower[/]" if row["slower"] else ""
        note = verdict if row["controlled"] else f"{verdict} (no common control)"
        cells = (str(row["batch"]), str(row["threads"]), f"{row['old_ms']:.2f}", f"{row['new_ms']:.2f}", f"{row['change']:.2f}")
        table.add_row(row["network"], *cells, note)
    console.print(table)
