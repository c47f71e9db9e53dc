"""From the benchmark document (JSON, `schema: 1`) to what people look at: terminal tables, PNG charts, one self-contained HTML page.

view.py decides what is said (verdicts, order, digits); tables.py, charts.py and page.py only draw it.
"""

from pathlib import Path
from typing import Any

from fastconv.benchmarks.report.tables import print_tables
from fastconv.benchmarks.report.view import View

__all__ = ["View", "print_tables", "write"]


def write(document: dict[str, Any], folder: Path) -> list[Path]:
    """Write the charts (PNG) and report.html of `document` into `folder`, which is made if it is missing; returns their paths.

    The document's sections may be null, empty or absent. Raises ValueError if it is no such document, ImportError without matplotlib
    or jinja2.
    """
    from fastconv.benchmarks.report import charts, page

    view = View(document)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in charts.figures(view):
        paths.append(folder / f"{name}.png")
        charts.save(figure, paths[-1])
    paths.append(folder / "report.html")
    paths[-1].write_text(page.render(view), encoding="utf-8")
    return paths
