"""A run's document as tables in the terminal, PNG charts and one self-contained HTML page."""

import json
from pathlib import Path
from typing import Any

from fastconv.benchmarks.report.charts import charts
from fastconv.benchmarks.report.page import page
from fastconv.benchmarks.report.terminal import print_comparison, print_tables

__all__ = ["print_comparison", "print_tables", "write"]


def write(document: dict[str, Any], folder: Path) -> list[Path]:
    """Writes run.json, a PNG per chart and report.html into `folder`, made if need be; returns their paths.

    Raises OSError where the folder cannot be written, ImportError without matplotlib or jinja2.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "run.json"]
    written[0].write_text(json.dumps(document, indent=1) + "\n")
    figures = charts(document)
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=130)
        written.append(path)
    path = folder / "report.html"
    path.write_text(page(document, figures))
    return [*written, path]
