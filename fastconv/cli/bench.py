"""fastconv bench: whole-network times beside eager torch at a chosen batch, size and thread count."""

import json

import click


@click.command()
@click.option("--nets", default=None, metavar="NAME,...", help="Only these networks.  [default: all six]")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images per call.")
@click.option("--size", type=click.IntRange(min=32), default=224, show_default=True, help="Height and width of the input.")
@click.option("--threads", type=click.IntRange(min=1), default=None, help="Threads.  [default: torch's own choice]")
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True, help="Timing rounds per network.")
@click.option(
    "--json", "path", type=click.Path(dir_okay=False, writable=True, allow_dash=True), help="Also write JSON (-: only that, to stdout)."
)
def bench(nets: str | None, batch: int, size: int, threads: int | None, rounds: int, path: str | None) -> None:
    """Time whole networks through fastconv and in eager torch, interleaved, with random weights and inputs.

    The engines take turns inside every round; speed-ups are medians of the rounds' ratios. This is whole networks against eager only:
    per-layer benchmarks and other inference engines are not part of it yet.
    """
    import torch
    from rich.console import Console

    import fastconv
    from fastconv.cli import networks, timing
    from fastconv.cli.machine import facts
    from fastconv.cli.report import progress, table

    names = networks.parse_names(nets)
    if path:
        networks.check_folder(path, "--json")
    if threads:
        torch.set_num_threads(threads)
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    results = []
    with progress() as bar, torch.no_grad():
        task = bar.add_task("", total=len(names) * rounds)
        for name in names:
            bar.update(task, description=name)
            network = networks.build(name, pretrained=False)
            fast = fastconv.optimize(network.model)
            theirs, ours = network.model(x), fast(x)
            samples = timing.interleave(timing.engines(network, fast, x), rounds, lambda: bar.advance(task))
            results.append(
                {
                    "network": name,
                    "library": network.library,
                    "weights": network.weights,
                    "error": timing.relative_error(ours, theirs),
                    "agreement": float((ours.argmax(1) == theirs.argmax(1)).float().mean()),
                    **timing.summarise(samples),
                }
            )
    machine = facts()
    if path != "-":
        console = Console(width=None if Console().is_terminal else 150)
        title = f"batch {batch}, {size} x {size}, {machine['threads']} threads, {machine['cpu']}, {machine['isa'] or 'ATen'}; ms per call"
        console.print(table(title, results))
    if path:
        document = {"machine": machine, "batch": batch, "size": size, "rounds": rounds, "results": results}
        with click.open_file(path, "w") as file:
            file.write(json.dumps(document, indent=1) + "\n")
