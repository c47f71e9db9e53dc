"""Classifies every image of a folder, on as many processes as it is started with.

    python examples/classify_folder.py photographs --out predictions.csv
    torchrun --nproc-per-node 2 examples/classify_folder.py photographs --weights checkpoint.pth --out predictions.json

Process r of n takes every n-th image, on its part of this machine's cores. The results stand in the order of the file names, the same
to the bit for any number of processes: an image's logits do not depend on the batch it stands in.
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import click
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track

import fastconv
from fastconv.cli import networks

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def classify(model: torch.nn.Module, net: str, files: list[Path], batch: int, topk: int, progress: bool) -> list[dict]:
    """A row per file: its name and its `topk` classes with probabilities, or why it could not be read."""
    device = next(model.parameters()).device
    rows = []
    batches = [files[i : i + batch] for i in range(0, len(files), batch)]
    console = Console(stderr=True)
    for part in track(batches, "classifying", console=console, transient=True) if progress else batches:
        images, readable = [], []
        for file in part:
            row = {"file": file.name}
            rows.append(row)
            try:
                images.append(networks.preprocess(networks.read_image(file), net))
                readable.append(row)
            except click.ClickException as problem:
                row["error"] = problem.message
        if images:
            with torch.no_grad():
                top = model(torch.stack(images).to(device)).softmax(1).topk(topk)
            for row, classes, probabilities in zip(readable, top.indices.tolist(), top.values.tolist()):
                row["top"] = [{"class": index, "probability": value} for index, value in zip(classes, probabilities)]
    return rows


def write(path: Path, rows: list[dict]) -> None:
    """JSON, or CSV with a line for each of an image's classes, by the name's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
        return
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "rank", "class", "probability", "error"])
        for row in rows:
            if "error" in row:
                table.writerow([row["file"], "", "", "", row["error"]])
            for rank, top in enumerate(row.get("top", ()), 1):
                table.writerow([row["file"], rank, top["class"], top["probability"], ""])


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--net", default="mobilenet_v3_large", show_default=True, help="One of fastconv.models.")
@click.option("--weights", default=None, help="A .pth or .safetensors file, or DEFAULT.  [default: random, seed 0]")
@click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--topk", type=click.IntRange(1, 1000), default=5, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default="predictions.csv", show_default=True, help=".csv or .json")
def main(folder: Path, net: str, weights: str | None, batch: int, topk: int, out: Path) -> None:
    """Classifies every image in FOLDER and writes their classes to OUT, in the order of their names."""
    if out.suffix not in (".csv", ".json"):
        raise click.BadParameter(f"must end in .csv or .json, got {out}", param_hint="--out")
    networks.check_name(net)
    world, rank, local = (int(os.environ.get(name, fallback)) for name, fallback in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    # Each process on its own cores' worth of threads: together as many as there are cores.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise click.ClickException(f"{folder}: no images ({', '.join(sorted(SUFFIXES))})")
    if world > 1:
        dist.init_process_group("gloo")  # only the rows travel
    torch.manual_seed(0)
    model = fastconv.models.get_model(net).eval() if weights is None else networks.load(net, weights)
    rows = classify(fastconv.optimize(model.to(device)), net, files[rank::world], batch, topk, progress=rank == 0)
    shares: list[list[dict] | None] = [rows]
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, rows)
    if rank == 0:
        write(out, [shares[i % world][i // world] for i in range(len(files))])
        click.echo(f"{len(files)} images, {world} processes of {torch.get_num_threads()} threads: wrote {out}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
