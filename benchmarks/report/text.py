"""How figures are worded, alike in terminal and page."""

from typing import Any

from fastconv.benchmarks import engines

TITLES = {name: engine.title for table in (engines.CUDA, engines.CPU) for name, engine in table.items()}


def title(engine: str) -> str:
    return TITLES.get(engine, engine)


def milliseconds(value: float, quiet: bool) -> str:
    """Three digits on a quiet machine, two on a noisy one."""
    digits = 3 if quiet else 2
    if value >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{value:#.{digits}g}"


def times(value: float, quiet: bool) -> str:
    return f"{value:.2f}x" if quiet else f"{value:.1f}x"


def cell_name(cell: dict[str, Any]) -> str:
    threads = "1 thread" if cell["threads"] == 1 else f"{cell['threads']} threads"
    dtype = "" if cell["dtype"] == "float32" else f", {cell['dtype']}"
    size = "" if cell["size"] == 224 else f", {cell['size']} x {cell['size']}"
    return f"batch {cell['batch']}, {threads}{size}{dtype}"


def groups(cells: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Cells that differ only in their network, together."""
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        found.setdefault(cell_name(cell), []).append(cell)
    return found


def outcome(ratio: dict[str, float]) -> str:
    """faster, slower, or even where the interval holds 1."""
    return "faster" if ratio["low"] > 1 else "slower" if ratio["high"] < 1 else "even"


def present(cells: list[dict[str, Any]]) -> list[str]:
    """The engines that some cell has timed, in the suite's order."""
    seen = {engine for cell in cells for engine in cell["engines"]}
    return [engine for engine in TITLES if engine in seen and engine != "fastconv"] + (["fastconv"] if "fastconv" in seen else [])


def bytes_of(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:.1f} MB"
