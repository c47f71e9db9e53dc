"""Two recorded runs: what got slower."""

from typing import Any

from rich.console import Console
from rich.table import Table

CONTROL = "eager_channels_last"  # measured in both runs, it takes the difference of two machines, or of one machine's moods, out


def compare(old: dict[str, Any], new: dict[str, Any], threshold: float) -> list[dict[str, Any]]:
    """One row for each cell that both documents have: fastconv's time in the new run over the old one's, `change`; above 1 is slower.

    Where both measured eager channels_last, both times are taken relative to it. `slower`: by more than `threshold` (0.05: 5%), and by
    more than the new ratio's own interval explains. Raises ValueError if the documents have no cell in common.
    """
    before = {_key(cell): cell for cell in old["cells"]}
    rows = []
    for cell in new["cells"]:
        then = before.get(_key(cell))
        if then is None or "fastconv" not in cell["engines"] or "fastconv" not in then["engines"]:
            continue
        controlled = CONTROL in cell["ratios"] and CONTROL in then["ratios"]
        if controlled:
            was, now = then["ratios"][CONTROL], cell["ratios"][CONTROL]
            change, certain = was["median"] / now["median"], was["low"] / now["high"]
        else:
            was, now = then["engines"]["fastconv"], cell["engines"]["fastconv"]
            change, certain = now["median_ms"] / was["median_ms"], now["q1_ms"] / was["q3_ms"]
        rows.append(
            {
                **{key: cell[key] for key in ("network", "batch", "size", "threads", "dtype")},
                "old_ms": then["engines"]["fastconv"]["median_ms"],
                "new_ms": cell["engines"]["fastconv"]["median_ms"],
                "change": change,
                "controlled": controlled,
                "slower": change > 1 + threshold and certain > 1,
            }
        )
    if not rows:
        raise ValueError("compare: the two runs have no cell in common (network, batch, size, threads, dtype)")
    return rows


def _key(cell: dict[str, Any]) -> tuple:
    return tuple(cell[key] for key in ("network", "batch", "size", "threads", "dtype"))


def print_table(rows: list[dict[str, Any]], threshold: float, console: Console) -> None:
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
