"""Charts. Each is drawn panel by panel: a PNG has all panels in a grid, the page has one SVG a panel, so that it reads on a phone too."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fastconv.benchmarks.report.view import AXES, LOST, WON, Cell, Group, View, engine_name, in_order, network_name, number

INK, MUTED, GRID, PAPER, ACCENT, WIN, LOSS = "#1b2128", "#66707b", "#e4e2dd", "#fffefc", "#d9480f", "#0b7268", "#b01e68"
# The page gives each of these colours a light and a dark value.
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--card", ACCENT: "--accent", WIN: "--win", LOSS: "--loss"}
BAR, BEST_BAR = "#a9b4c0", "#5d7186"
VARIABLES |= {BAR: "--bar", BEST_BAR: "--bar-best"}

# Lines: fastconv in the accent colour, rivals muted (mid-lightness, to read on dark and light), each with a marker of its own.
LINES = {
    "fastconv": (ACCENT, "o", "-"),
    "eager": ("#8b96a3", "s", ":"),
    "eager_channels_last": ("#6f7f90", "D", "--"),
    "compile": ("#8f7fb8", "^", "-."),
    "compile_cudagraphs": ("#b58fb8", "<", "-."),
    "onnxruntime": ("#3f87b5", "v", "-"),
    "openvino": ("#7a6ad0", "P", "-"),
    "xnnpack": ("#2f9e8f", "X", "-"),
    "ncnn": ("#a08a2c", "p", "-"),
    "mnn": ("#b56a94", "h", "-"),
}
OPS = {  # Okabe and Ito's colours, told apart by shape as well
    "inverted_residual": ("#d9480f", "o"),
    "separable": ("#0072b2", "s"),
    "fire": ("#009e73", "D"),
    "pointwise": ("#56a3d9", "^"),
    "depthwise": ("#cc79a7", "v"),
    "fire_expand": ("#b59f00", "P"),
    "stem": ("#7a5c99", "X"),
}
STYLE = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 8.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.facecolor": PAPER,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "xtick.color": MUTED,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "svg.fonttype": "none",
}
PANEL = (4.6, 2.75)  # inches
Draw = Callable[[Any], None]


def line_style(engine: str) -> dict[str, Any]:
    color, marker, dash = LINES.get(engine, ("#8b96a3", ".", "-"))
    ours = engine == "fastconv"
    return dict(
        color=color, marker=marker, linestyle=dash, linewidth=2.6 if ours else 1.3, markersize=6 if ours else 4.5, zorder=5 if ours else 3
    )


def op_style(op: str) -> dict[str, Any]:
    color, marker = OPS.get(op, ("#8b96a3", "."))
    return dict(color=color, marker=marker)


# Panels


def bars(axes: Any, view: View, cell: Cell) -> None:
    """Every engine of a cell, fastest on top, whichever that is; a line over the quartiles."""
    engines = sorted(cell.engines, key=lambda engine: cell.median(engine))
    times = [cell.median(engine) for engine in engines]
    for row, (engine, time) in enumerate(zip(engines, times, strict=True)):
        color = ACCENT if engine == "fastconv" else BEST_BAR if engine == cell.best_peer else BAR
        axes.barh(row, time, 0.68, color=color)
        low, high = cell.value(engine, "q1_ms"), cell.value(engine, "q3_ms")
        if low is not None and high is not None:
            axes.plot([low, high], [row, row], color=INK, linewidth=1.1, solid_capstyle="butt")
        end = max(time, high or time)
        weight = "bold" if engine == "fastconv" else "normal"
        axes.annotate(view.ms(time), (end, row), (4, 0), textcoords="offset points", va="center", fontsize=8.5, fontweight=weight)
    axes.set_yticks(range(len(engines)), [engine_name(engine) for engine in engines])
    for label, engine in zip(axes.get_yticklabels(), engines, strict=True):
        if engine == "fastconv":
            label.set(color=ACCENT, fontweight="bold")
    axes.invert_yaxis()
    axes.set_xlim(0, max([*times, 1e-9]) * 1.14)
    axes.grid(axis="x")
    axes.spines["bottom"].set_visible(False)
    axes.set_xlabel("ms per call, median; shorter is better")
    axes.set_title(cell.name)
    if cell.best:
        verdict = cell.best.verdict
        said = {WON: "", LOST: "lost: "}.get(verdict, "level: ")
        color = {WON: WIN, LOST: LOSS}.get(verdict, MUTED)
        text = f"{said}{view.times(cell.best.median)} vs {engine_name(cell.best_peer)}"
        axes.set_title(text, loc="right", fontsize=8.5, color=color)


def roofs(view: View) -> tuple[dict[str, float], dict[str, float]]:
    """Multiply-add peaks by ISA (GFLOP/s) and bandwidths by level (GB/s), those that were measured, for the threads that the layers ran on.

    Peaks and caches are each core's own and multiply; DRAM is shared.
    """
    cores = roof_threads(view) / (number(view.roofline.get("threads")) or 1)
    peaks = {str(isa): number((block or {}).get("fma_gflops")) for isa, block in (view.roofline.get("isa") or {}).items()}
    bandwidths = {str(level): number(value) for level, value in (view.roofline.get("bandwidth_gbs") or {}).items()}
    return (
        {isa: peak * cores for isa, peak in peaks.items() if peak and peak > 0},
        {level: value * (1 if level == "DRAM" else cores) for level, value in bandwidths.items() if value and value > 0},
    )


def roof_threads(view: View) -> float:
    """Threads that the layers ran on; those of the roofs where the rows do not say."""
    return max((number(row.get("threads")) or 0 for row in view.layers), default=0) or number(view.roofline.get("threads")) or 1


def placed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Layers with a place on the roofline."""
    return [row for row in rows if (number(row.get("intensity")) or 0) > 0 and (number(row.get("gflops")) or 0) > 0]


def roofline(axes: Any, view: View, name: str, rows: list[dict[str, Any]]) -> None:
    """GFLOP/s over FLOP per byte, both logarithmic, under the roofs measured in the same run; a marker's area is its share of the time."""
    peaks, bandwidths = roofs(view)
    everything = placed(view.layers)  # all panels share their limits, so that networks compare
    low = min(row["intensity"] for row in everything) / 1.8
    high = max(row["intensity"] for row in everything) * 1.8
    top = max([*peaks.values(), *(row["gflops"] for row in everything)])
    bottom = min(row["gflops"] for row in everything) / 2.5
    isa = view.machine.get("isa")
    peak = peaks.get(isa) or max(peaks.values(), default=top)
    for level, bandwidth in bandwidths.items():
        end = min(high, peak / bandwidth)
        if end <= low:
            continue
        axes.plot([low, end], [low * bandwidth, end * bandwidth], color=MUTED, linewidth=1, zorder=2)
        start = max(low, bottom / bandwidth) * 1.08
        place = (start, start * bandwidth)
        paper = dict(facecolor=PAPER, edgecolor="none", pad=1)  # the line stops for its name
        axes.annotate(level, place, fontsize=7, color=MUTED, ha="left", va="center", bbox=paper, annotation_clip=True)
    for key, value in peaks.items():
        used = key == isa
        if not used and abs(value / peak - 1) < 0.1:  # its line and name would cover the other's
            continue
        axes.axhline(value, color=MUTED if used else GRID, linewidth=1.3 if used else 0.9, zorder=2)
        axes.annotate(
            f"{key} {value:.0f}", (high, value), (-3, 2), textcoords="offset points", fontsize=7, color=MUTED, ha="right", va="bottom"
        )
    for op in dict.fromkeys(str(row.get("op")) for row in rows):
        chosen = [row for row in placed(rows) if str(row.get("op")) == op]
        sizes = [18 + 260 * min(1.0, number(row.get("share")) or 0) for row in chosen]
        x, y = [row["intensity"] for row in chosen], [row["gflops"] for row in chosen]
        axes.scatter(x, y, s=sizes, alpha=0.8, linewidths=0.4, edgecolors=PAPER, zorder=4, **op_style(op))
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, top * 1.9))
    plain = matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(plain)
        axis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.grid(which="major")
    axes.set_xlabel("FLOP per byte")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(network_name(name))


def scaling(axes: Any, view: View, axis: str, name: str, rows: list[dict[str, Any]]) -> None:
    """Time over batch, threads, resolution or width, a line per engine."""
    for engine in reversed(in_order(key for row in rows for key in row["engines"])):
        points = [(row["value"], time) for row in rows if (time := view.scaled_time(axis, row, engine)) is not None and time > 0]
        if points:
            axes.plot(*zip(*points, strict=True), **line_style(engine))
    values = sorted({row["value"] for row in rows})
    if axis in ("batch", "threads"):
        axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="y")
    _, x_label, y_label = AXES.get(axis, (axis, axis, "ms per call"))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(network_name(name))


# Which panels there are


def bar_panels(view: View, group: Group) -> list[Draw]:
    return [lambda axes, cell=cell: bars(axes, view, cell) for cell in group.cells if cell.engines]


def roofline_panels(view: View) -> list[Draw]:
    networks = {name: rows for name, rows in view.layer_networks.items() if placed(rows)}
    return [lambda axes, name=name, rows=rows: roofline(axes, view, name, rows) for name, rows in networks.items()]


def scaling_panels(view: View, axis: str) -> list[Draw]:
    return [lambda axes, name=name, rows=rows: scaling(axes, view, axis, name, rows) for name, rows in view.scaling[axis].items()]


def engine_keys(engines: list[str]) -> list[Line2D]:
    return [Line2D([], [], label=engine_name(engine), **line_style(engine)) for engine in engines]


def op_keys(view: View) -> list[Line2D]:
    ops = list(dict.fromkeys(str(row.get("op")) for row in placed(view.layers)))
    return [Line2D([], [], linestyle="", markersize=6, label=op, **op_style(op)) for op in ops]


def scaling_engines(view: View, axis: str) -> list[str]:
    return in_order(engine for rows in view.scaling[axis].values() for row in rows for engine in row["engines"])


# Files and fragments


def _caption(view: View) -> str:
    said = [str(view.machine.get("cpu") or ""), str(view.machine.get("isa") or ""), view.date[:10]]
    noisy = "NOISY MACHINE: read with care. " if view.noisy else ""
    return noisy + ", ".join(part for part in said if part)


def grid(view: View, title: str, panels: list[Draw], keys: list[Line2D]) -> Figure:
    """One figure of all panels."""
    columns = 1 if len(panels) == 1 else 2 if len(panels) in (2, 4) else 3
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(PANEL[0] * columns, 6), PANEL[1] * rows + 0.9 + 0.3 * bool(keys)), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for place, draw in zip(axes, panels, strict=False):
            draw(place)
        for place in axes[len(panels) :]:
            place.set_axis_off()
        if keys:  # the caption is the key's title, so that neither lies on the other
            columns = min(len(keys), 3 * columns)
            key = figure.legend(
                handles=keys, loc="outside lower left", ncols=columns, title=_caption(view), title_fontsize=8, alignment="left"
            )
            key.get_title().set_color(MUTED)
        else:
            figure.supxlabel(_caption(view), x=0.012, ha="left", fontsize=8, color=MUTED)
    return figure


def figures(view: View) -> Iterator[tuple[str, Figure]]:
    """Each chart's file name (without .png) and figure."""
    for group in view.groups:
        if panels := bar_panels(view, group):
            yield f"networks-{group.slug}", grid(view, f"Time per call: {group.label}", panels, [])
    if panels := roofline_panels(view):
        yield "roofline", grid(view, "Every layer of fastconv under the roofs of this machine", panels, op_keys(view))
    for axis in view.scaling:
        heading = AXES.get(axis, (axis,))[0]
        slug = re.sub(r"[^a-z0-9]+", "-", axis.lower()).strip("-")
        yield (
            f"scaling-{slug}",
            grid(view, f"Scaling: {heading.lower()}", scaling_panels(view, axis), engine_keys(scaling_engines(view, axis))),
        )


def save(figure: Figure, path: Path) -> None:
    """Write a PNG."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=130)


def svg(draw: Draw, name: str, size: tuple[float, float] = PANEL) -> str:
    """One panel as an <svg> element whose colours are the page's variables. `name` keeps the ids of a page's charts apart."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        return _fragment(figure)


def legend(keys: list[Line2D], name: str) -> str:
    """The key of a row of panels as an <svg> element."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        columns = 3
        figure = Figure(figsize=(PANEL[0], 0.12 + 0.22 * math.ceil(len(keys) / columns)))
        figure.legend(handles=keys, loc="center left", ncols=columns, borderpad=0, handlelength=2.2, columnspacing=1.2)
        return _fragment(figure)


def _fragment(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="\1" role="img">', text, count=1
    )
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text
