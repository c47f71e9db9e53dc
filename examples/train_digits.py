"""Trains SqueezeNet 1.1 or MobileNet V2 on scikit-learn's digits through fastconv.replace, then optimizes the result.

    python examples/train_digits.py --net mobilenet_v2 --compare-eager --out out/digits
    torchrun --nproc-per-node 2 examples/train_digits.py --net squeezenet1_1

Needs torchvision (the networks), scikit-learn (1797 images of 8 x 8, in the package) and matplotlib (the plot).
"""

from __future__ import annotations

import json
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import fastconv
from fastconv.models._torchvision import import_torchvision

# Constructor arguments, and the epochs, image size and highest learning rate that train each.
NETS: dict[str, tuple[dict[str, float], int, int, float]] = {
    "squeezenet1_1": ({"dropout": 0.0}, 25, 64, 5e-4),
    "mobilenet_v2": ({"width_mult": 0.35, "dropout": 0.0}, 30, 32, 5e-3),
}
BATCH = 64  # images a step, of all processes together
TEST = 360


def digits(size: int, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels) to train on and to test with; images (N, 3, size, size), bilinear, about -1 to 1."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    images = F.interpolate(images, (size, size), mode="bilinear").expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    labels, order = torch.from_numpy(data.target), torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return tuple((images[part], labels[part]) for part in (order[TEST:], order[:TEST]))


def build(net: str, seed: int) -> nn.Module:
    """torchvision's network for ten classes, with the weights that `seed` gives."""
    torch.manual_seed(seed)
    model = import_torchvision().models.get_model(net, num_classes=10, **NETS[net][0])
    if net == "squeezenet1_1":  # its last layer is a ReLU: a class whose logits are once below 0 everywhere never comes back
        nn.init.ones_(model.classifier[1].bias)
    return model


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (torch.cat([model(part) for part in images.split(256)]).argmax(1) == labels).float().mean().item()


def train(
    model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, lr: float, seed: int, rank: int = 0, world: int = 1, tick: Any = None
) -> list[float]:
    """Adam on batches of BATCH, each process on its share of every one; returns the loss of every step, over all processes."""
    images, labels = data
    device = images.device
    wrapped = nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None) if world > 1 else model
    optimizer = torch.optim.Adam(wrapped.parameters())
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    generator, losses = torch.Generator().manual_seed(seed), []
    wrapped.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)  # the same in every process
        for batch in order[: len(order) // BATCH * BATCH].view(-1, BATCH):
            share = batch[rank::world].to(device)
            optimizer.zero_grad()
            loss = F.cross_entropy(wrapped(images[share]), labels[share])
            loss.backward()
            optimizer.step()
            schedule.step()
            loss = loss.detach()
            if world > 1:
                dist.all_reduce(loss)
            losses.append(loss.item() / world)
            if tick:
                tick(losses[-1])
    return losses


def plot(path: Path, net: str, runs: dict[str, dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, run), style in zip(runs.items(), (dict(linewidth=1.2), dict(linewidth=3, alpha=0.35))):
        axes.plot(run["losses"], label=f"{name}: {run['accuracy']:.1%} of {TEST} test images, {run['seconds']:.0f} s", **style)
    axes.set(yscale="log", xlabel="step", ylabel="cross-entropy", title=f"{net} on scikit-learn's digits")
    axes.legend()
    figure.savefig(path, dpi=120)


@click.command()
@click.option("--net", type=click.Choice(list(NETS)), default="squeezenet1_1", show_default=True)
@click.option("--epochs", type=click.IntRange(min=1), default=None, help="[default: 25; MobileNet V2: 30]")
@click.option("--size", type=click.IntRange(min=32), default=None, help="What images are enlarged to.  [default: 64; MobileNet V2: 32]")
@click.option("--lr", type=float, default=None, help="The highest of the one-cycle schedule.  [default: 5e-4; MobileNet V2: 5e-3]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--compare-eager", is_flag=True, help="Train the unreplaced network too, from the same seed.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="out/digits", show_default=True)
def main(net: str, epochs: int | None, size: int | None, lr: float | None, seed: int, compare_eager: bool, out: Path) -> None:
    """Trains NET on scikit-learn's digits; writes its loss curve (NET.png), figures (NET.json) and weights (NET.pth) to OUT."""
    epochs, size, lr = (given or usual for given, usual in zip((epochs, size, lr), NETS[net][1:]))
    world, rank, local = (int(os.environ.get(name, fallback)) for name, fallback in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    if BATCH % world:
        raise click.UsageError(f"a batch of {BATCH} cannot be shared evenly among {world} processes")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if world > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", world))))
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo")
    console = Console(stderr=True, quiet=rank > 0)
    training, testing = (tuple(tensor.to(device) for tensor in part) for part in digits(size, seed))
    runs: dict[str, dict[str, Any]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    for name in ["fastconv", *(["eager"] if compare_eager else [])]:
        model = build(net, seed).to(device, memory_format=torch.channels_last)
        if name == "fastconv":
            model = replaced = fastconv.replace(model)
        bar = Progress(*columns, console=console, transient=True) if rank == 0 else nullcontext()
        with bar:
            task = bar.add_task(name, total=epochs * (len(training[0]) // BATCH)) if rank == 0 else None
            start = time.perf_counter()
            say = lambda loss, bar=bar, task=task, name=name: bar.update(task, advance=1, description=f"{name}: loss {loss:.3f}")  # noqa: E731
            losses = train(model, training, epochs, lr, seed, rank, world, say if rank == 0 else None)
            seconds = time.perf_counter() - start
        model.eval()
        runs[name] = {"accuracy": accuracy(model, *testing), "seconds": seconds, "losses": losses}
        right = f"{runs[name]['accuracy']:.1%} of {TEST} test images right"
        console.print(f"{name}: {right} after {epochs} epochs, {seconds:.0f} s", highlight=False)
    if rank == 0:
        fast = fastconv.optimize(replaced)
        with torch.no_grad():
            kept = (fast(testing[0]).argmax(1) == replaced(testing[0]).argmax(1)).float().mean().item()
        console.print(f"optimized: {kept:.1%} of the predictions kept", highlight=False)
        out.mkdir(parents=True, exist_ok=True)
        torch.save(replaced.state_dict(), out / f"{net}.pth")
        facts = {"net": net, "epochs": epochs, "size": size, "lr": lr, "seed": seed, "processes": world, "kept": kept}
        (out / f"{net}.json").write_text(json.dumps({**facts, "runs": runs}, indent=1))
        plot(out / f"{net}.png", net, runs)
        click.echo(out / f"{net}.png")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
