"""Options, roofs and tables of the op suite (pytest benchmarks)."""

import io

import pytest
import torch
from rich.console import Console
from rich.table import Table

from fastconv.benchmarks import roofline
from fastconv.benchmarks.suite import ENGINES, Row

ROWS = pytest.StashKey[list[dict]]()
ROOFS = pytest.StashKey[dict]()
# Engines take turns shape by shape; 0.2 s each keeps all seven files within minutes. Given on the command line, the option wins.
SECONDS_A_ROW = "0.2"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastconv")
    group.addoption(
        "--engines",
        metavar="NAME,...",
        help=f"Only these of {', '.join(ENGINES)}, on every shape. Default: all, but compile (seconds a shape to compile) on the "
        "representative shapes of each op alone.",
    )
    group.addoption("--threads", type=int, default=1, help="torch's threads; default: 1")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("threads") < 1:
        raise pytest.UsageError(f"--threads: wanted 1 or more, got {config.getoption('threads')}")
    unknown = set(_engines(config)) - set(ENGINES)
    if unknown:
        raise pytest.UsageError(f"--engines: unknown {', '.join(sorted(unknown))}; engines: {', '.join(ENGINES)}")
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("the op suite needs pytest-benchmark: pip install 'fastconv[bench]'")
    if not any(str(argument).startswith("--benchmark-max-time") for argument in config.invocation_params.args):
        config.option.benchmark_max_time = type(config.option.benchmark_max_time)(SECONDS_A_ROW)
    config.stash[ROWS] = []
    torch.set_num_threads(config.getoption("threads"))


def _engines(config: pytest.Config) -> list[str]:
    return [name.strip() for name in (config.getoption("engines") or "").split(",") if name.strip()]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = _engines(config)

    def wanted(item: pytest.Item) -> bool:
        row = getattr(item, "callspec", None) and item.callspec.params.get("row")
        if not isinstance(row, Row):
            return True
        return row.engine in chosen if chosen else row.engine != "compile" or row.representative

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


@pytest.fixture(scope="session")
def roof(request: pytest.FixtureRequest) -> dict:
    """The active instruction set's peak and the bandwidths, measured in this run, as `profile.against` takes them."""
    from fastconv import _C

    measured = request.config.stash[ROOFS] = roofline.measure()
    isa = _C.isa()
    bandwidth = {key: measured[key] for key in ("bandwidth_gbs", "bytes")}
    return {"isa": isa, "fma_gflops": measured["isa"][isa]["fma_gflops"], **bandwidth, "threads": torch.get_num_threads()}


@pytest.fixture
def time_row(request: pytest.FixtureRequest, benchmark, roof):
    """Calls a row's `time` and keeps what it says for the tables."""
    return lambda row: request.config.stash[ROWS].append(row.time(benchmark, roof))


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    """Beside the machine block, not in it: a comparison warns when that differs, and a measured roof always does."""
    output_json["roofline"] = config.stash.get(ROOFS, None)
    output_json["threads"] = torch.get_num_threads()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    timed = [row for row in config.stash.get(ROWS, []) if "ms" in row]
    if not timed:
        return
    text = io.StringIO()
    console = Console(file=text, width=160)
    for op in dict.fromkeys(row["op"] for row in timed):
        console.print(table(op, [row for row in timed if row["op"] == op]))
    measured = config.stash[ROOFS]
    peaks = ", ".join(f"{isa} {value['fma_gflops']:.0f}" for isa, value in measured["isa"].items())
    bandwidth = ", ".join(f"{level} {value:.0f}" for level, value in measured["bandwidth_gbs"].items())
    console.print(f"Roofs of one core, measured in this run: multiply-adds {peaks} GFLOP/s; reads {bandwidth} GB/s.", highlight=False)
    console.print("GFLOP/s count the direct convolution: Winograd (fire) may pass 100%. n: how many such layers each network has.")
    terminalreporter.write_line("")
    terminalreporter.write(text.getvalue())


def table(op: str, rows: list[dict]) -> Table:
    """A line a shape: every engine's milliseconds, then what fastconv's amount to."""
    engines = [engine for engine in ENGINES if any(row["engine"] == engine for row in rows)]
    grid = Table(title=f"{op}: median ms", title_justify="left")
    grid.add_column("shape", no_wrap=True)
    for heading in (*(ENGINES[engine] for engine in engines), "vs best other", "GFLOP/s", "GB/s", "% of roof"):
        grid.add_column(heading, justify="right")
    grid.add_column("networks (n)")
    for shape in dict.fromkeys(row["shape"] for row in rows):
        found = {row["engine"]: row for row in rows if row["shape"] == shape}
        ours, others = found.get("fastconv"), [row["ms"] for engine, row in found.items() if engine != "fastconv"]
        faster = min(others) / ours["ms"] if ours and others else None
        grid.add_row(
            shape,
            *(f"{found[engine]['ms']:.3f}" if engine in found else "" for engine in engines),
            "" if faster is None else f"[{'green' if faster >= 1 else 'red'}]{faster:.2f}x[/]",
            *(f"{ours[key]:.{digits}f}" if ours else "" for key, digits in (("gflops", 1), ("gbs", 1), ("percent_of_roof", 0))),
            ", ".join(f"{net} ({count})" for net, count in next(iter(found.values()))["networks"].items()),
        )
    return grid
