"""The charts, each a matplotlib figure."""

from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastconv.benchmarks.report import text

# Okabe and Ito's palette, which colour-blind readers tell apart; fastconv has the strong one, the others are muted.
FASTCONV = "#d55e00"
RIVALS = {
    "eager": "#c9ced6",
    "eager_channels_last": "#9aa3b0",
    "compile": "#6b7685",
    "compile_graphs": "#4a5563",
    "onnxruntime": "#56b4e9",
    "openvino": "#0072b2",
    "xnnpack": "#009e73",
    "ncnn": "#cc79a7",
    "mnn": "#f0e442",
}
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "font.family": "sans-serif"}


def colour(engine: str) -> str:
    return FASTCONV if engine == "fastconv" else RIVALS.get(engine, "#888888")


def charts(document: dict[str, Any]) -> dict[str, Figure]:
    """Every chart that the document has data for, by file name."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figures = {}
        for name, cells in text.groups(document["cells"]).items():
            slug = name.replace(" x ", "x").replace(",", "").replace(" ", "-")
            figures[f"networks-{slug}"] = _bars(name, cells)
        if document["layers"] and document["roofline"]:
            figures["roofline"] = _roofline(document)
        for axis in ("batch", "threads", "resolution"):
            rows = [row for row in document["scaling"] if row["axis"] == axis]
            if rows:
                figures[f"scaling-{axis}"] = _scaling(axis, rows)
        for figure in figures.values():
            FigureCanvasAgg(figure)
        return figures


def _bars(name: str, cells: list[dict[str, Any]]) -> Figure:
    """Time relative to fastconv's, one panel a network; the absolute median on each bar."""
    shown = text.present(cells)
    columns = min(3, len(cells))
    rows = -(-len(cells) // columns)
    figure = Figure(figsize=(3.5 * columns, 0.7 + (0.26 * len(shown) + 0.55) * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, cell in zip(panels, cells):
        timed = [engine for engine in reversed(shown) if engine in cell["engines"]]
        medians = [cell["engines"][engine]["median_ms"] for engine in timed]
        below = [median - cell["engines"][engine]["q1_ms"] for median, engine in zip(medians, timed)]
        above = [cell["engines"][engine]["q3_ms"] - median for median, engine in zip(medians, timed)]
        bars = panel.barh(
            [text.title(engine) for engine in timed],
            medians,
            xerr=[below, above],
            color=[colour(engine) for engine in timed],
            error_kw={"elinewidth": 0.8, "ecolor": "#444444"},
        )
        for bar, engine, median in zip(bars, timed, medians):
            end = cell["engines"][engine]["q3_ms"]
            weight = "bold" if engine == "fastconv" else "normal"
            label = f" {median:.3g}"
            panel.text(end, bar.get_y() + bar.get_height() / 2, label, va="center", size=7.5, weight=weight)
        panel.set_title(cell["network"], loc="left", size=9.5, weight="bold")
        panel.tick_params(axis="y", length=0, labelsize=7.5)
        panel.tick_params(axis="x", labelsize=7)
        panel.margins(x=0.14)
    for panel in panels[len(cells) :]:
        panel.set_visible(False)
    figure.suptitle(f"{name}: ms per call, median and quartiles; shorter is better", x=0.01, ha="left", size=10)
    return figure


def _roofline(document: dict[str, Any]) -> Figure:
    roof = document["roofline"]
    isa = document["machine"].get("isa")
    peak = roof["isa"].get(isa, next(iter(roof["isa"].values())))["fma_gflops"]
    layers = [row for row in document["layers"] if row["gflops"]]
    threads = document["layers"][0].get("threads", 1)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    low, high = min(row["intensity"] for row in layers) / 2, max(row["intensity"] for row in layers) * 2
    axes.plot([low, high], [peak * threads] * 2, color="#222222", linewidth=1.2)
    axes.text(high, peak * threads * 1.04, f"multiply-add peak, {threads} x {peak:.0f} GFLOP/s", ha="right", size=8)
    for level, style in (("L2", "-"), ("L3", "--"), ("DRAM", ":")):
        bandwidth = roof["bandwidth_gbs"][level] * (1 if level == "DRAM" else threads)
        corner = min(high, peak * threads / bandwidth)
        if corner <= low:  # above everything shown
            continue
        axes.plot(
            [low, corner],
            [low * bandwidth, corner * bandwidth],
            style,
            color="#777777",
            linewidth=1,
            label=f"{level}: {bandwidth:.0f} GB/s",
        )
    marks = dict(zip(sorted({row["network"] for row in layers}), "osD^vP"))
    palette = dict(zip(marks, ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")))
    for network, mark in marks.items():
        rows = [row for row in layers if row["network"] == network]
        sizes = [12 + 250 * row["share"] for row in rows]
        x, y = [row["intensity"] for row in rows], [row["gflops"] for row in rows]
        axes.scatter(x, y, s=sizes, marker=mark, color=palette[network], alpha=0.75, linewidth=0, label=network)
    axes.set(xscale="log", yscale="log", xlim=(low, high), xlabel="FLOP per byte (input, weights and output once)", ylabel="GFLOP/s")
    axes.set_ylim(top=peak * threads * 1.6)
    axes.set_title("Every layer under the machine's roofs; area: share of its network's time", loc="left", size=10)
    legend = axes.legend(fontsize=7.5, frameon=False, loc="lower right", ncols=2)
    for handle in legend.legend_handles:
        if hasattr(handle, "set_sizes"):
            handle.set_sizes([25])
    return figure


def _scaling(axis: str, rows: list[dict[str, Any]]) -> Figure:
    """Time an image (per megapixel for resolutions) against one axis; flat is proportional."""
    names = list(dict.fromkeys(row["network"] for row in rows))
    figure = Figure(figsize=(3.5 * min(3, len(names)), 0.4 + 2.4 * -(-len(names) // 3)), layout="constrained")
    panels = figure.subplots(-(-len(names) // 3), min(3, len(names)), squeeze=False).flatten()
    for panel, name in zip(panels, names):
        for engine in ("eager_channels_last", "fastconv"):
            points = [row for row in rows if row["network"] == name and engine in row["engines"]]
            scale = [row["batch"] * (row["size"] / 224) ** 2 for row in points]
            values = [row["engines"][engine] / factor for row, factor in zip(points, scale)]
            panel.plot([row["value"] for row in points], values, marker="o", markersize=3, color=colour(engine), label=text.title(engine))
        panel.set_title(name, loc="left", size=9.5, weight="bold")
        panel.set_ylim(bottom=0)
        panel.set_xticks([row["value"] for row in points], [str(row["value"]) for row in points], size=7)
        panel.tick_params(axis="y", labelsize=7)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    panels[0].legend(fontsize=7, frameon=False)
    unit = "ms per image" if axis != "resolution" else "ms per image, times (224 / size)^2"
    figure.suptitle(f"{unit} against {axis}", x=0.01, ha="left", size=10)
    return figure
