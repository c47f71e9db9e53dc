"""fastconv tune: measures which tile, and which form, each block is fastest with on this machine's GPU."""

import json
import statistics
import time

import click


@click.command()
@click.option(
    "--out", type=click.Path(dir_okay=False, writable=True), help="Table to write; FASTCONV_TUNED=FILE then makes fastconv use it."
)
@click.option("--dtype", type=click.Choice(["bf16", "f16", "f32", "tf32"]), default="bf16", show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=128, show_default=True, help="Images per call.")
@click.option("--minutes", type=click.FloatRange(min=0), default=10, show_default=True, help="Time to spend; blocks beyond are left out.")
@click.option("--model", "only_model", is_flag=True, help="Measure nothing: print what the model chooses, and its bytes beside the floor.")
@click.option(
    "--arch", type=click.Choice(["sm_80", "sm_90", "gfx942"]), default=None, help="With --model: the architecture.  [default: sm_90]"
)
def tune(out: str | None, dtype: str, batch: int, minutes: float, only_model: bool, arch: str | None) -> None:
    """Time every block of the six networks with each tile worth trying, fused and in parts, and write down the fastest.

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
    from fastconv.cli.networks import check_folder

    check_folder(out, "--out")
    table = measure(dtype, batch, 60 * minutes, console)
    with click.open_file(out, "w") as file:
        file.write(json.dumps(table, indent=1) + "\n")
    console.print(f"{len(table['choices'])} choices for {table['device']} in {out}; FASTCONV_TUNED={out} makes fastconv use them")


def worth_trying(problem, arch: str) -> list:
    """The shipped tiles that the model holds at most three times as slow as its best, best first."""
    from fastconv.kernels.gpu import model

    times = {tile: model.fused_seconds(problem, tile, arch) for tile in model.candidates(problem, arch)}
    return [tile for tile in sorted(times, key=times.get) if times[tile] <= 3 * min(times.values())]


def measure(dtype: str, batch: int, seconds: float, console, clock=None, device: str = "cuda") -> dict:
    """The table of what was fastest; blocks that `seconds` leave no time for are missing. clock: times a call, in microseconds."""
    import torch

    from fastconv.benchmarks import blocks
    from fastconv.kernels.gpu import launch, tuned

    arch = launch.arch(torch.device(device, 0) if device == "cuda" else torch.device(device))
    clock = clock or cuda_clock
    began = time.monotonic()
    table = {"device": torch.cuda.get_device_name() if device == "cuda" else device, "arch": arch, "dtype": dtype, "batch": batch}
    table |= {"torch": torch.__version__, "choices": {}, "microseconds": {}}
    with torch.no_grad():
        for block in blocks.blocks(dtype):
            if block.problem.op == "stem" or tuned.key(block.problem) in table["choices"]:
                continue
            if time.monotonic() - began > seconds:
                break
            case = blocks.Case(block, batch, device)
            times = {tile: clock(lambda case=case, tile=tile: case.fused(tile)) for tile in worth_trying(block.problem, arch)}
            times[None] = clock(case.parts)
            best = min(times, key=times.get)
            name = tuned.key(block.problem)
            table["choices"][name] = tuned.row(best)
            table["microseconds"][name] = {"fused": min(us for tile, us in times.items() if tile), "parts": times[None]}
            console.print(f"{name:70s} {times[best]:9.1f} us  {'in parts' if best is None else best}", highlight=False)
    return table


def cuda_clock(run, repeats: int = 20) -> float:
    """The median of CUDA-event times in microseconds, after three calls to warm up."""
    import torch

    for _ in range(3):
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(start.elapsed_time(end) for start, end in events)


def show(rows: list[dict], arch: str, console) -> None:
    """The model's table: kilobytes an image through device memory, and what the kernel's loads ask the caches for."""
    from rich.table import Table

    table = Table(title=f"{arch}: the model, not a measurement; kB an image, weights left out", title_justify="left")
    for heading in ("network", "block", "op", "shape", "runs"):
        table.add_column(heading, no_wrap=True)
    for heading in ("floor", "fused", "parts", "saved", "loads"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        form = "in parts" if row["tile"] is None else "x".join(map(str, row["tile"]))
        kilobytes = [f"{row[name] / 1e3:.0f}" for name in ("floor", "fused", "parts")]
        saved = f"{row['parts'] / row['fused']:.1f}x" if row["op"] != "stem" else ""
        table.add_row(row["net"], row["layer"], row["op"], row["shape"], form, *kilobytes, saved, f"{row['issued'] / 1e3:.0f}")
    console.print(table)
