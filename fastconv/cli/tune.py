"""fastconv tune: measures in which form, and with which tile, each block is fastest on this machine's GPU."""

import json
from pathlib import Path

import click


@click.command()
@click.option(
    "--out",
    type=click.Path(dir_okay=False, writable=True),
    help="Table to write or add to; FASTCONV_TUNED=FILE then makes fastconv use it.",
)
@click.option("--dtype", type=click.Choice(["bf16", "f16", "f32", "tf32"]), default="bf16", show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=128, show_default=True, help="Images per call.")
@click.option("--minutes", type=click.FloatRange(min=0), default=10, show_default=True, help="Time to spend; blocks beyond are left out.")
@click.option("--model", "only_model", is_flag=True, help="Measure nothing: print what the model chooses, and its bytes beside the floor.")
@click.option(
    "--arch", type=click.Choice(["sm_80", "sm_90", "gfx942"]), default=None, help="With --model: the architecture.  [default: sm_90]"
)
def tune(out: str | None, dtype: str, batch: int, minutes: float, only_model: bool, arch: str | None) -> None:
    """Time every block of the six networks with each tile worth trying, split, in parts and through cuDNN, and write down the fastest.

    The model of traffic, arithmetic and registers leaves out tiles that it holds more than three times as slow as its best.
    """
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 160)
    if only_model:
        from fastconv.benchmarks import blocks

        show(blocks.modelled(arch or "sm_90", dtype), arch or "sm_90", console)
        return
    if arch:
        raise click.UsageError("--arch goes with --model: what is measured is this machine's GPU")
    import torch

    from fastconv.ops import _cuda

    if not torch.cuda.is_available():
        raise click.ClickException("torch sees no GPU on this machine: nothing was measured (--model prints what the model chooses)")
    if missing := _cuda.available():
        raise click.ClickException(missing)
    if not out:
        raise click.UsageError("--out FILE says where the table goes")
    from fastconv.benchmarks import tuner
    from fastconv.cli.networks import check_folder

    check_folder(out, "--out")
    table = tuner.measure(dtype, batch, 60 * minutes, lambda line: console.print(line, highlight=False))
    table = tuner.merged(Path(out), table)
    with click.open_file(out, "w") as file:
        file.write(json.dumps(table, indent=1) + "\n")
    console.print(f"{len(table['choices'])} choices for {table['device']} in {out}; FASTCONV_TUNED={out} makes fastconv use them")


def show(rows: list[dict], arch: str, console) -> None:
    """The model's table: kilobytes an image through device memory, and what the kernel's loads ask the caches for."""
    from rich.table import Table

    table = Table(title=f"{arch}: the model, not a measurement; kB an image, weights left out", title_justify="left")
    for heading in ("network", "block", "op", "shape", "runs"):
        table.add_column(heading, no_wrap=True)
    for heading in ("floor", "fused", "split", "parts", "saved", "loads"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        kilobytes = [f"{row[name] / 1e3:.0f}" if name in row else "" for name in ("floor", "fused", "split", "parts")]
        saved = f"{row['parts'] / row['fused']:.1f}x" if row["op"] != "stem" else ""
        table.add_row(row["net"], row["layer"], row["op"], row["shape"], row["form"], *kilobytes, saved, f"{row['issued'] / 1e3:.0f}")
    console.print(table)
