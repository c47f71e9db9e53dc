"""What a report says: the document, with absent data tolerated, verdicts drawn and digits chosen."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

# The order in which engines are named everywhere; an engine that is not listed comes last under its own name.
ENGINE_NAMES = {
    "fastconv": "fastconv",
    "eager": "eager",
    "eager_channels_last": "eager channels_last",
    "compile": "torch.compile",
    "compile_cudagraphs": "torch.compile + CUDA graphs",
    "fastconv_no_graphs": "fastconv without graphs",
    "eager_cudagraphs": "eager + CUDA graphs",
    "compile_reduce_overhead": "torch.compile reduce-overhead",
    "compile_max_autotune": "torch.compile max-autotune",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "xnnpack": "XNNPACK",
    "ncnn": "ncnn",
    "mnn": "MNN",
}
NETWORK_NAMES = {
    "mobilenet_v1": "MobileNet V1",
    "mobilenet_v2": "MobileNet V2",
    "mobilenet_v3_small": "MobileNet V3 small",
    "mobilenet_v3_large": "MobileNet V3 large",
    "squeezenet1_0": "SqueezeNet 1.0",
    "squeezenet1_1": "SqueezeNet 1.1",
}
AXES = {  # scaling axis: heading, x label, y label
    "batch": ("Batch", "images per call", "ms per image"),
    "threads": ("Threads", "threads", "ms per call"),
    "resolution": ("Resolution", "height and width of the input", "ms per call"),
    "width": ("Width", "width multiplier", "ms per call"),
}
WON, LOST, LEVEL = "won", "lost", "level"


def engine_name(key: str) -> str:
    return ENGINE_NAMES.get(key, key)


def network_name(key: str) -> str:
    return NETWORK_NAMES.get(key, key)


def in_order(keys: Any) -> list[str]:
    """Engine keys, each once, in the order of ENGINE_NAMES."""
    known = list(ENGINE_NAMES)
    return sorted(set(keys), key=lambda key: (known.index(key) if key in known else len(known), key))


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def significant(value: float, digits: int) -> str:
    """`value` with that many significant digits, without an exponent: 0.0123, 1.23, 12.3, 123, 1234."""
    if value == 0:
        return "0"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def count(value: Any) -> str:
    """1234567 -> 1.23 M."""
    value = number(value)
    if value is None:
        return "–"
    for scale, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= scale:
            return significant(value / scale, 3) + unit
    return f"{value:g}"


def megabytes(value: Any) -> str:
    """Bytes -> "4.98 MB" (10^6 bytes)."""
    value = number(value)
    return "–" if value is None else f"{significant(value / 1e6, 3)} MB"


def geometric_mean(values: list[float]) -> float | None:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


@dataclass(frozen=True)
class Ratio:
    """A peer's time over fastconv's, round by round: above 1, fastconv is faster. low, high: the median's 95% interval."""

    median: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        """Won or lost only where the whole interval lies on one side of 1, the same rule for both."""
        low, high = self.low or self.median, self.high or self.median
        return WON if low > 1 else LOST if high < 1 else LEVEL


def _ratio(block: Any) -> Ratio | None:
    median = number(block.get("median")) if isinstance(block, dict) else number(block)
    if median is None or median <= 0:
        return None
    return Ratio(median, number(block.get("low")), number(block.get("high"))) if isinstance(block, dict) else Ratio(median, None, None)


@dataclass(frozen=True)
class Cell:
    """One network at one batch, size, thread count and dtype. `engines` holds only those that were measured."""

    network: str
    engines: dict[str, dict[str, Any]]
    ratios: dict[str, Ratio]
    missing: dict[str, str]
    best_peer: str | None

    @property
    def name(self) -> str:
        return network_name(self.network)

    @property
    def best(self) -> Ratio | None:
        return self.ratios.get(self.best_peer) if self.best_peer else None

    def median(self, engine: str) -> float | None:
        return number(self.engines.get(engine, {}).get("median_ms"))

    def value(self, engine: str, key: str) -> float | None:
        return number(self.engines.get(engine, {}).get(key))

    def measured(self, key: str) -> bool:
        return any(self.value(engine, key) is not None for engine in self.engines)


@dataclass(frozen=True)
class Group:
    """The cells measured under one setting: one table and one chart."""

    batch: Any
    threads: Any
    size: Any
    dtype: str
    cells: list[Cell] = field(default_factory=list)

    @property
    def label(self) -> str:
        parts = [
            f"batch {self.batch}",
            f"{self.threads} thread{'' if self.threads == 1 else 's'}",
            f"{self.size} × {self.size}",
            self.dtype,
        ]
        return ", ".join(parts)

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", f"batch{self.batch}-threads{self.threads}-size{self.size}-{self.dtype}".lower()).strip("-")

    @property
    def engines(self) -> list[str]:
        return in_order(key for cell in self.cells for key in [*cell.engines, *cell.missing])


def _cell(block: dict[str, Any]) -> Cell:
    engines = {k: v for k, v in (block.get("engines") or {}).items() if isinstance(v, dict) and number(v.get("median_ms")) is not None}
    ratios = {key: ratio for key, value in (block.get("ratios") or {}).items() if (ratio := _ratio(value)) and key != "fastconv"}
    missing = {key: str(reason) for key, reason in (block.get("missing") or {}).items()}
    # The best peer is the one hardest to beat.
    best = min(ratios, key=lambda key: ratios[key].median) if ratios else None
    return Cell(str(block.get("network")), engines, ratios, missing, best)


class View:
    """A document made ready to be drawn. Raises ValueError if it is not a document of schema 1."""

    def __init__(self, document: dict[str, Any]) -> None:
        if not isinstance(document, dict) or document.get("schema") != 1:
            found = document.get("schema") if isinstance(document, dict) else type(document).__name__
            raise ValueError(f"report: wanted a benchmark document with schema 1, got {found!r}")
        self.document = document
        self.title = str(document.get("title") or "fastconv benchmark")
        self.date = str(document.get("date") or "")
        self.command = str(document.get("command") or "")
        self.machine: dict[str, Any] = document.get("machine") or {}
        self.noise: dict[str, Any] = document.get("noise") or {}
        self.noisy = self.noise.get("quiet") is False
        self.roofline: dict[str, Any] = document.get("roofline") or {}
        self.layers: list[dict[str, Any]] = [row for row in document.get("layers") or [] if isinstance(row, dict)]
        self.claims: dict[str, Any] = document.get("claims") or {}
        self.groups = self._groups()
        self.cells = [cell for group in self.groups for cell in group.cells]

    def _groups(self) -> list[Group]:
        groups: dict[tuple, Group] = {}
        for block in self.document.get("cells") or []:
            if not isinstance(block, dict):
                continue
            key = tuple(block.get(name) for name in ("batch", "threads", "size", "dtype"))
            group = groups.setdefault(key, Group(*key[:3], str(key[3] or "float32")))
            group.cells.append(_cell(block))
        return list(groups.values())

    # Digits: a noisy machine gets fewer, rather than a false precision.

    def ms(self, value: float | None) -> str:
        return "–" if value is None else significant(value, 2 if self.noisy else 3)

    def times(self, value: float | None) -> str:
        return "–" if value is None else f"{value:.{1 if self.noisy else 2}f}×"

    def interval(self, ratio: Ratio | None) -> str:
        if ratio is None or ratio.low is None or ratio.high is None:
            return ""
        digits = 1 if self.noisy else 2
        return f"{ratio.low:.{digits}f} to {ratio.high:.{digits}f}"

    # What is said above everything else.

    @property
    def verdicts(self) -> dict[str, int]:
        """How many cells fastconv won, lost or drew against the best peer of each."""
        found = [cell.best.verdict for cell in self.cells if cell.best]
        return {verdict: found.count(verdict) for verdict in (WON, LOST, LEVEL)}

    @property
    def headline(self) -> float | None:
        """The geometric mean over cells of the best peer's ratio."""
        return geometric_mean([cell.best.median for cell in self.cells if cell.best])

    @property
    def lost_cells(self) -> list[tuple[Group, Cell]]:
        """Lost to the best peer, worst first."""
        lost = [(group, cell) for group in self.groups for cell in group.cells if cell.best and cell.best.verdict == LOST]
        return sorted(lost, key=lambda pair: pair[1].best.median)

    @property
    def against(self) -> list[dict[str, Any]]:
        """One row per peer: its geometric mean, extremes and verdicts over the cells where it was measured."""
        rows = []
        for engine in in_order(key for cell in self.cells for key in cell.ratios):
            ratios = [cell.ratios[engine] for cell in self.cells if engine in cell.ratios]
            medians = [ratio.median for ratio in ratios]
            found = [ratio.verdict for ratio in ratios]
            counts = {verdict: found.count(verdict) for verdict in (WON, LOST, LEVEL)}
            best = sum(cell.best_peer == engine for cell in self.cells)
            rows.append(dict(engine=engine, mean=geometric_mean(medians), least=min(medians), most=max(medians), best=best, **counts))
        return rows

    @property
    def engines(self) -> list[str]:
        return in_order(key for group in self.groups for key in group.engines)

    @property
    def missing(self) -> list[dict[str, str]]:
        """One row per engine and reason, with the cells it concerns."""
        rows: dict[tuple[str, str], list[str]] = {}
        for group in self.groups:
            for cell in group.cells:
                for engine, reason in cell.missing.items():
                    rows.setdefault((engine, reason), []).append(f"{cell.name} ({group.label})")
        total = len(self.cells)
        return [
            dict(
                engine=engine, reason=reason, where="every cell" if len(rows[engine, reason]) == total else "; ".join(rows[engine, reason])
            )
            for wanted in in_order(engine for engine, _ in rows)
            for engine, reason in rows
            if engine == wanted
        ]

    def has(self, key: str) -> bool:
        return any(cell.value(engine, key) is not None for cell in self.cells for engine in cell.engines)

    @property
    def layer_networks(self) -> dict[str, list[dict[str, Any]]]:
        networks: dict[str, list[dict[str, Any]]] = {}
        for row in self.layers:
            networks.setdefault(str(row.get("network")), []).append(row)
        return networks

    @property
    def scaling(self) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """axis -> network -> rows by value; only axes and networks with two values or more, since a point is no scaling."""
        axes: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for row in self.document.get("scaling") or []:
            if isinstance(row, dict) and number(row.get("value")) is not None and row.get("engines"):
                axes.setdefault(str(row.get("axis")), {}).setdefault(str(row.get("network")), []).append(row)
        for axis in axes:
            networks = {name: sorted(rows, key=lambda row: row["value"]) for name, rows in axes[axis].items()}
            axes[axis] = {name: rows for name, rows in networks.items() if len({row["value"] for row in rows}) > 1}
        return {axis: networks for axis, networks in axes.items() if networks}

    @staticmethod
    def scaled_time(axis: str, row: dict[str, Any], engine: str) -> float | None:
        """The time that a scaling chart shows: per image along the batch axis, per call elsewhere."""
        value = number((row.get("engines") or {}).get(engine))
        return value / row["value"] if value is not None and axis == "batch" else value

    @property
    def noise_facts(self) -> list[tuple[str, str]]:
        named = (
            ("steal_percent", "steal time"),
            ("spread_percent", "spread of fastconv's own times (IQR / median)"),
            ("neighbour_percent", "CPU time of other processes"),
        )
        return [(label, f"{number(self.noise[key]):.1f}%") for key, label in named if number(self.noise.get(key)) is not None]

    @property
    def machine_rows(self) -> list[tuple[str, str]]:
        machine = self.machine
        rows = []

        def add(label: str, value: Any) -> None:
            if value not in (None, "", [], {}):
                rows.append((label, str(value)))

        add("CPU", machine.get("cpu"))
        add("architecture", machine.get("architecture"))
        add("cores", machine.get("cores"))
        add("threads used", ", ".join(str(n) for n in sorted({group.threads for group in self.groups if group.threads is not None})))
        add("ISA in use", machine.get("isa"))
        add("ISAs compiled and supported", ", ".join(map(str, machine.get("isas") or [])))
        for level, value in (machine.get("caches") or {}).items():
            add(f"{level} cache", value)
        memory = number(machine.get("memory_gib"))
        add("memory", f"{memory:.1f} GiB" if memory is not None else None)
        gpu = machine.get("gpu")
        add("GPU", ", ".join(f"{key} {value}" for key, value in gpu.items()) if isinstance(gpu, dict) else gpu)
        add("OS", machine.get("os"))
        add("Python", machine.get("python"))
        commit = machine.get("commit")
        add("commit", f"{commit}{' with uncommitted changes' if machine.get('dirty') else ''}" if commit else None)
        return rows
