"""fastconv demo: six networks on real photographs, eager torch's logits and times beside fastconv's."""

import copy
import json
from typing import Any

import click
import torch

BOUND = 1e-5


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, writable=True), default="demo.png", show_default=True, help="Bar chart to write.")
@click.option("--nets", default=None, metavar="NAME,...", help="Only these networks.  [default: all six]")
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True, help="Timing rounds per network.")
@click.option("--random", "random_weights", is_flag=True, help="Random weights: try no download.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def demo(out: str, nets: str | None, rounds: int, random_weights: bool, as_json: bool) -> None:
    """Classify real photographs with six networks, in eager torch and through fastconv, and time both.

    Exits with 1 if any network's logits differ from eager's by more than 1e-5 (relative L2 error of a photograph's logits).
    """
    from rich.console import Console

    from fastconv.cli import networks
    from fastconv.cli.machine import facts
    from fastconv.cli.report import progress, say_random, table

    names = networks.parse_names(nets)
    networks.check_folder(out, "--out")
    console = Console(width=None if Console().is_terminal else 150)
    images = networks.photographs()
    labels = networks.categories()
    results = []
    with progress() as bar:
        task = bar.add_task("", total=len(names) * (rounds + 1))
        for name in names:
            bar.update(task, description=name)
            results.append(_one(networks.build(name, pretrained=not random_weights), images, labels, rounds, lambda: bar.advance(task)))
            bar.advance(task)
    machine = facts()
    broken = [result["network"] for result in results if not result["error"] <= BOUND]
    if as_json:
        click.echo(json.dumps({"machine": machine, "error_bound": BOUND, "results": results}, indent=1))
    else:
        say_random(console, results)
        console.print(_photographs_table(results, list(images)))
        console.print(table(f"batch 1, 224 x 224, {machine['threads']} threads, {machine['cpu']}, {machine['isa'] or 'ATen'}", results))
    _chart(out, results, machine)
    click.echo(f"wrote {out}", err=True)
    if broken:
        raise click.ClickException(f"logits of {', '.join(broken)} differ from eager's by more than {BOUND:g}")


def _one(network: Any, images: dict[str, Any], labels: list[str], rounds: int, tick: Any) -> dict[str, Any]:
    import fastconv
    from fastconv.benchmarks import measure
    from fastconv.cli import networks

    x = torch.stack([networks.preprocess(image, network.name) for image in images.values()])
    fast = fastconv.optimize(network.model)
    with torch.no_grad():
        theirs, ours = network.model(x), fast(x)
        one, channels_last = x[:1].contiguous(), copy.deepcopy(network.model).to(memory_format=torch.channels_last)
        one_channels_last = one.to(memory_format=torch.channels_last)
        runs = {
            "eager": lambda: network.model(one),
            "eager_channels_last": lambda: channels_last(one_channels_last),
            "fastconv": lambda: fast(one),  # NCHW in, as most users have it
        }
        samples = measure.interleave(runs, rounds, tick)
    top, probability = ours.argmax(1), ours.softmax(1).amax(1)
    seen = {
        photo: {"category": labels[int(top[i])], "probability": float(probability[i]), "agrees": bool(top[i] == theirs[i].argmax())}
        for i, photo in enumerate(images)
    }
    return {
        "network": network.name,
        "library": network.library,
        "weights": network.weights,
        "why_random": network.why_random,
        "error": measure.relative_error(ours, theirs),
        "agreement": sum(photo["agrees"] for photo in seen.values()) / len(seen),
        "photographs": seen,
        **measure.summarise(samples),
    }


def _photographs_table(results: list[dict[str, Any]], photographs: list[str]) -> Any:
    from rich.table import Table

    grid = Table("network", *photographs, title="what fastconv sees (category, probability)", title_justify="left")
    for result in results:
        seen = [result["photographs"][photo] for photo in photographs]
        grid.add_row(result["network"], *(f"{cell['category']} {cell['probability']:.1%}" for cell in seen))
    return grid


def _chart(path: str, results: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise click.ClickException("the chart needs matplotlib: pip install matplotlib") from None
    from fastconv.cli.report import ENGINE_NAMES

    figure = Figure(figsize=(9, 1.2 + 0.8 * len(results)), layout="constrained")
    axes = figure.subplots()
    height = 0.27
    for offset, (engine, label) in enumerate(ENGINE_NAMES.items()):
        rows = [row + (offset - 1) * height for row in range(len(results))]
        bars = axes.barh(rows, [result["median_ms"][engine] for result in results], height, label=label)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.set_yticks(range(len(results)), [result["network"] for result in results])
    axes.invert_yaxis()
    axes.set_xlabel("ms per image (median), batch 1; shorter is better")
    axes.set_title(f"{machine['cpu']}, {machine['threads']} threads, {machine['isa'] or 'ATen'}, torch {machine['torch']}", fontsize=9)
    axes.legend()
    axes.margins(x=0.1)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as problem:
        raise click.ClickException(f"{path}: cannot write the chart ({problem})") from None
