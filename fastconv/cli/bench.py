"""fastconv bench: whole networks beside the other engines, interleaved; JSON, tables, charts and a page."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

CACHE = Path("~/.cache/fastconv-peers")
QUICK = "fastconv,eager,eager_channels_last"


def _numbers(_context: click.Context, option: click.Parameter, value: str | None) -> list[int] | None:
    """A comma-separated list of counts."""
    if value is None:
        return None
    try:
        numbers = [int(word) for word in value.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise click.BadParameter(f"must be whole numbers from 1, separated by commas, got {value!r}", param=option)
    return numbers


@click.command()
@click.option("--nets", default=None, metavar="NAME,...", help="Only these networks.  [default: all six]")
@click.option("--engines", "chosen", default=QUICK, metavar="NAME,...", show_default=True, help="Engines to time; all: every rival.")
@click.option("--batch", "batches", default="1", show_default=True, callback=_numbers, metavar="N,...", help="Images per call.")
@click.option("--size", type=click.IntRange(min=32), default=224, show_default=True, help="Height and width of the input.")
@click.option("--threads", default=None, callback=_numbers, metavar="N,...", help="Thread counts.  [default: torch's own choice]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True, help="Timing rounds per cell.")
@click.option("--pin", is_flag=True, help="Pin the process to its first core: one thread for engines that take every core they see.")
@click.option("--cold", is_flag=True, help="Also each engine's first result and memory at the smallest batch, in fresh processes.")
@click.option("--layers", is_flag=True, help="Also the time of every layer, under the machine's measured roofs.")
@click.option("--scaling", is_flag=True, help="Also times against batch, threads and resolution.")
@click.option("--claims", is_flag=True, help="Also the papers' claims as numbers.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for run.json, the charts and report.html.")
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    default=CACHE,
    show_default=True,
    help="Converted models.",
)
@click.option("--json", "path", type=click.Path(dir_okay=False, writable=True, allow_dash=True), help="Also write JSON (-: only that).")
@click.option(
    "--compare", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A recorded run; fails where this one is slower."
)
@click.option("--threshold", type=click.FloatRange(min=0), default=5.0, show_default=True, help="Percent slower that --compare allows.")
def bench(
    nets: str | None,
    chosen: str,
    batches: list[int],
    size: int,
    threads: list[int] | None,
    dtype: str,
    device: str,
    rounds: int,
    pin: bool,
    cold: bool,
    layers: bool,
    scaling: bool,
    claims: bool,
    out: Path | None,
    cache: Path,
    path: str | None,
    compare: Path | None,
    threshold: float,
) -> None:
    """Time whole networks through fastconv and the engines it competes with, interleaved, with random weights and inputs.

    The engines take turns inside every round; ratios are medians of the rounds' ratios, with their 95% interval. Every engine's logits are
    checked before it is timed. An engine that is not installed is named and left out.
    """
    if pin:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import torch
    from rich.console import Console

    from fastconv.benchmarks import engines, measure
    from fastconv.benchmarks import networks as suite
    from fastconv.cli import networks
    from fastconv.cli.report import progress

    names = networks.parse_names(nets)
    table = engines.table(device)
    wanted = [name for name in table if chosen == "all" or name in [word.strip() for word in chosen.split(",")]]
    unknown = {word.strip() for word in chosen.split(",")} - set(engines.CPU) - set(engines.CUDA) - {"all"}
    if unknown or not wanted:
        raise click.BadParameter(
            f"unknown engine {', '.join(sorted(unknown)) or chosen!r}; engines: {', '.join(table)}", param_hint="--engines"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("--device cuda: torch sees no GPU on this machine")
    if path:
        networks.check_folder(path, "--json")
    old = _recorded(compare) if compare else None
    before = torch.get_num_threads()
    threads = threads or [1 if pin else before]
    cache = cache.expanduser()
    cells = []
    try:
        with progress() as bar, measure.Noise() as noise:
            task = bar.add_task("", total=len(names) * len(batches) * len(threads) * rounds)
            for count in threads:
                for batch in batches:
                    for name in names:
                        bar.update(task, description=f"{name} batch {batch}")
                        cells.append(
                            suite.cell(
                                name,
                                batch=batch,
                                size=size,
                                threads=count,
                                dtype=getattr(torch, dtype),
                                chosen=wanted,
                                rounds=rounds,
                                folder=cache,
                                cold=cold and batch == min(batches),
                                device=device,
                                tick=lambda: bar.advance(task),
                            )
                        )
        torch.set_num_threads(max(threads))
        document = suite.document("Whole networks, every engine", _command(), cells, noise)
        _more(document, names, max(threads), cache, layers, scaling, claims)
    finally:
        torch.set_num_threads(before)
    if path != "-":
        from fastconv.benchmarks.report import print_tables

        print_tables(document, Console(width=None if Console().is_terminal else 200))
    if path:
        with click.open_file(path, "w") as file:
            file.write(json.dumps(document, indent=1) + "\n")
    if out:
        _write(document, out)
    if old:
        _judge(old, document, threshold / 100, err=path == "-")
    wrong = [f"{cell['network']}: {cell['missing']['fastconv']}" for cell in cells if "fastconv" in cell["missing"]]
    if wrong:
        raise click.ClickException("; ".join(wrong))


def _more(document: dict[str, Any], names: list[str], threads: int, cache: Path, layers: bool, scaling: bool, claims: bool) -> None:
    """The document's other parts, as asked."""
    import torch

    import fastconv
    from fastconv.cli import networks

    if layers:
        from fastconv.benchmarks import roofline
        from fastconv.optimize import profile

        document["roofline"] = roofline.measure()
        x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
        for name in names:
            fast = fastconv.optimize(networks.build(name, pretrained=False).model)
            document["layers"] += [{"network": name, "threads": threads, **row} for row in profile.layers(fast, x)]
    if scaling:
        from fastconv.benchmarks.networks import scaling as measured

        document["scaling"] = measured(names, [1, 4, 16], list(range(1, threads + 1)), cache)
    if claims:
        from fastconv.benchmarks import claims as papers

        document["claims"] = papers.measure()


def _command() -> str:
    """What repeats this run."""
    return " ".join(["fastconv", *sys.argv[1:]]) if Path(sys.argv[0]).stem in ("fastconv", "__main__") else "fastconv bench"


def _recorded(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as problem:
        raise click.ClickException(f"--compare: {path} is not JSON ({problem})") from None
    if not isinstance(document, dict) or document.get("schema") != 1 or document.get("kind") != "networks":
        raise click.ClickException(f"--compare: {path} is no run of fastconv bench with schema 1")
    return document


def _write(document: dict[str, Any], folder: Path) -> None:
    try:
        from fastconv.benchmarks import report
    except ImportError as problem:
        raise click.ClickException(f"--out needs matplotlib and jinja2 ({problem}): pip install matplotlib jinja2") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        run = folder / "run.json"
        run.write_text(json.dumps(document, indent=1) + "\n")
        for path in (run, *report.write(document, folder)):
            click.echo(f"wrote {path}", err=True)
    except OSError as problem:
        raise click.ClickException(f"--out: cannot write {folder} ({problem})") from None


def _judge(old: dict[str, Any], new: dict[str, Any], threshold: float, err: bool) -> None:
    """Prints what changed; fails where something is slower."""
    from rich.console import Console

    from fastconv.benchmarks.compare import compare, print_table

    try:
        rows = compare(old, new, threshold)
    except ValueError as problem:
        raise click.ClickException(str(problem)) from None
    print_table(rows, threshold, Console(stderr=err, width=None if Console().is_terminal else 120))
    slower = [f"{row['network']} batch {row['batch']} ({row['change']:.2f}x)" for row in rows if row["slower"]]
    if slower:
        raise click.ClickException(f"slower than the recorded run: {', '.join(slower)}")
