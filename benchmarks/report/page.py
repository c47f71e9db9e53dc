"""The document as one self-contained HTML page: no script, font, image or style comes from elsewhere."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from fastconv.benchmarks.report import charts
from fastconv.benchmarks.report.tables import COSTS
from fastconv.benchmarks.report.view import AXES, View, count, engine_name, megabytes, network_name, number, significant


def render(view: View) -> str:
    """The page's text. Whatever the document says is escaped; only our own charts are put in as markup."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(engine=engine_name, network=network_name, count=count, megabytes=megabytes, number=number)
    environment.filters["sig"] = lambda value, digits=3: "–" if number(value) is None else significant(number(value), digits)
    environment.filters["percent"] = lambda value: "–" if number(value) is None else f"{number(value):.0f}%"
    return environment.get_template("page.html.jinja").render(
        view=view,
        bars=[(group, _panels(charts.bar_panels(view, group), group.slug)) for group in view.groups],
        roofline=_panels(charts.roofline_panels(view), "roofline"),
        roofline_key=_legend(charts.op_keys(view), "ops"),
        roofs=charts.roofs(view),
        roof_threads=charts.roof_threads(view),
        scaling=[
            (
                AXES.get(axis, (axis,))[0],
                _panels(charts.scaling_panels(view, axis), f"scaling-{axis}"),
                _legend(charts.engine_keys(charts.scaling_engines(view, axis)), f"key-{axis}"),
            )
            for axis in view.scaling
        ],
        costs=[(key, heading, write) for key, (heading, write) in COSTS.items() if view.has(key)],
    )


def _panels(draws: list[charts.Draw], name: str) -> list[Markup]:
    return [Markup(charts.svg(draw, f"{name}-{index}")) for index, draw in enumerate(draws)]


def _legend(keys: list, name: str) -> Markup | None:
    return Markup(charts.legend(keys, name)) if keys else None
