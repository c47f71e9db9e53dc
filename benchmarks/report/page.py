"""The HTML page: one file, no outside resource."""

import base64
import io
from pathlib import Path
from typing import Any

from fastconv.benchmarks.networks import headline
from fastconv.benchmarks.report import text


def page(document: dict[str, Any], figures: dict[str, Any]) -> str:
    """The report as HTML text, charts embedded. figures: matplotlib's, by name, as `charts` gives them."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(title=text.title, bytes=text.bytes_of)
    missing: dict[tuple[str, str], list[str]] = {}
    for cell in document["cells"]:
        for engine, why in cell["missing"].items():
            missing.setdefault((engine, why), []).append(f"{cell['network']} batch {cell['batch']}")
    return environment.get_template("page.html").render(
        document=document,
        machine=document["machine"],
        noise=document["noise"],
        quiet=document["noise"]["quiet"],
        headline=headline(document["cells"]),
        groups=text.groups(document["cells"]),
        present=text.present,
        outcome=text.outcome,
        milliseconds=text.milliseconds,
        times=text.times,
        missing=missing,
        images={name: _embedded(figure) for name, figure in figures.items()},
    )


def _embedded(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
