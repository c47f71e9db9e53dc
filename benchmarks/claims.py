"""What the papers of SqueezeNet and MobileNet claim, beside what is counted and measured here.

Nothing is trained: accuracies are cited, everything else is counted or timed on this machine with random weights.
"""

from __future__ import annotations

import statistics
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastconv import models
from fastconv.models.mobilenet_v1 import _STAGES
from fastconv.nn import DepthwiseSeparable

Timing = Callable[[dict[str, Callable[[], Any]], int], dict[str, list[float]]]

SQUEEZENET, V1, V2, V3 = "arXiv:1602.07360", "arXiv:1704.04861", "arXiv:1801.04381", "arXiv:1905.02244"
METHOD = (
    "Batch 1, fp32, random weights. File: the bytes of a saved state_dict. Multiply-adds: of convolutions and fully connected layers. "
    "Peak activations: the largest sum of the bytes of all live tensors after any operator of the plain network with batch norms folded, "
    "input included, weights and kernels' scratch left out. Accuracies are cited, not measured."
)


def alexnet() -> nn.Module:
    """torchvision's AlexNet (the one-column network of arXiv:1404.5997), in eval mode's order: x (N, 3, 224, 224) -> (N, 1000)."""
    pool = lambda: nn.MaxPool2d(3, 2)  # noqa: E731
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(inplace=True), pool()),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True), pool()),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True), pool()),
        *(nn.AdaptiveAvgPool2d(6), nn.Flatten()),
        *(nn.Linear(256 * 6 * 6, 4096), nn.ReLU(inplace=True)),
        *(nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Linear(4096, 1000)),
    )


def mobilenet_v1_full() -> nn.Module:
    """MobileNet V1 with a full 3x3 convolution in place of every depthwise-separable pair (table 4 of its paper)."""
    plan = [(32, 2)] + [(width, stride if i == 0 else 1) for width, stride, blocks in _STAGES for i in range(blocks)]
    layers: list[nn.Module] = []
    channels = 3
    for width, stride in plan:
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6(inplace=True)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


def squeezenet1_1_late_pools() -> nn.Module:
    """SqueezeNet 1.1 whose pools stand where 1.0 has them (after conv1, fire4 and fire8): the same weights, downsampled later."""
    model = models.squeezenet1_1()
    stem, pool, fires = (
        model.features[:2],
        model.features[2],
        [layer for layer in model.features[3:] if not isinstance(layer, nn.MaxPool2d)],
    )
    model.features = nn.Sequential(*stem, pool, *fires[:3], pool, *fires[3:7], pool, fires[7])
    return model


# key: label, builder, accuracy as published (top-1 percent, source)
NETWORKS: dict[str, tuple[str, Callable[[], nn.Module], tuple[float, str] | None]] = {
    "alexnet": ("AlexNet", alexnet, (57.2, SQUEEZENET)),
    "squeezenet1_0": ("SqueezeNet 1.0", models.squeezenet1_0, (57.5, SQUEEZENET)),
    "squeezenet1_1": ("SqueezeNet 1.1", models.squeezenet1_1, (58.18, "torchvision")),
    "squeezenet1_1_late_pools": ("SqueezeNet 1.1, pools late", squeezenet1_1_late_pools, None),
    "mobilenet_v1_025": ("MobileNet V1 x 0.25", lambda: models.mobilenet_v1(width_mult=0.25), (50.6, V1)),
    "mobilenet_v1_050": ("MobileNet V1 x 0.5", lambda: models.mobilenet_v1(width_mult=0.5), (63.7, V1)),
    "mobilenet_v1_075": ("MobileNet V1 x 0.75", lambda: models.mobilenet_v1(width_mult=0.75), (68.4, V1)),
    "mobilenet_v1": ("MobileNet V1", models.mobilenet_v1, (70.6, V1)),
    "mobilenet_v1_full": ("MobileNet V1, full convolutions", mobilenet_v1_full, (71.7, V1)),
    "mobilenet_v2": ("MobileNet V2", models.mobilenet_v2, (72.0, V2)),
    "mobilenet_v3_small": ("MobileNet V3 small", models.mobilenet_v3_small, (67.4, V3)),
    "mobilenet_v3_large": ("MobileNet V3 large", models.mobilenet_v3_large, (75.2, V3)),
}


def plain(model: nn.Module) -> nn.Module:
    """`model` as ordinary torch layers in eval mode: a trace, which knows no fused path."""
    return torch.fx.symbolic_trace(model.eval())


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def file_bytes(model: nn.Module) -> int:
    """Bytes of the state_dict as torch.save writes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(model.state_dict(), path)
        return path.stat().st_size


def multiply_adds(model: nn.Module, x: Tensor) -> int:
    """Multiply-adds of one call's convolutions and fully connected layers, by hooks on their modules."""
    total = 0

    def add(module: nn.Module, _: Any, out: Tensor) -> None:
        nonlocal total
        total += out.numel() * (module.weight[0].numel())

    hooks = [module.register_forward_hook(add) for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return total


class _Live(TorchDispatchMode):
    """Bytes of the storages that are alive, and their maximum. Views and in-place results share a storage and count once."""

    def __init__(self, x: Tensor, weights: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in weights}
        self.now = self.peak = 0
        self._add(x)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            weakref.finalize(storage, self._drop, key, size)
            self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return out


def peak_activation_bytes(model: nn.Module, x: Tensor) -> int:
    """The largest sum of live activations after any operator (see METHOD). `model` is a plain network in eval mode; it is not changed."""
    from torch.fx.experimental.optimization import fuse

    folded = fuse(model)  # a graph, which lets go of each value after its last use
    with torch.no_grad(), _Live(x, [*folded.parameters(), *folded.buffers()]) as live:
        folded(x)
    return live.peak


def measure(rounds: int = 5, timing: Timing | None = None, size: int = 224, tick: Callable[[], Any] | None = None) -> dict[str, Any]:
    """Count and time every network: the benchmark document's `claims` block.

    `timing(runs, rounds)` returns milliseconds per call of each run, one per round; it should let the runs take turns. The default is
    the command line's. Needs about 1 GB of memory, since all networks are held at once.
    """
    import fastconv
    from fastconv.benchmarks.measure import interleave

    torch.manual_seed(0)
    x = torch.randn(1, 3, size, size)
    channels_last = x.to(memory_format=torch.channels_last)
    rows, runs = [], {}
    for key, (label, build, accuracy) in NETWORKS.items():
        model = plain(build())
        row: dict[str, Any] = dict(key=key, label=label, parameters=parameters(model), file_bytes=file_bytes(model), ms={})
        row |= dict(multiply_adds=multiply_adds(model, x), peak_activation_bytes=peak_activation_bytes(model, x))
        row["accuracy"] = dict(top1=accuracy[0], source=accuracy[1], cited=True) if accuracy else None
        rows.append(row)
        if key not in ("alexnet", "mobilenet_v1_full"):  # full convolutions are none of fastconv's operators
            fast = fastconv.optimize(model)
            runs[key, "fastconv"] = lambda fast=fast: fast(x)
        eager = model.to(memory_format=torch.channels_last)
        runs[key, "eager_channels_last"] = lambda eager=eager: eager(channels_last)
    with torch.no_grad():
        samples = (timing or interleave)({f"{key} {engine}": run for (key, engine), run in runs.items()}, rounds)
        if tick:
            tick()
    for row in rows:
        for engine in ("eager_channels_last", "fastconv"):
            if times := samples.get(f"{row['key']} {engine}"):
                row["ms"][engine] = dict(median=statistics.median(times), samples=times)
    facts = dict(size=size, batch=1, rounds=rounds, threads=torch.get_num_threads(), method=METHOD)
    return facts | dict(models=rows, claims=claims({row["key"]: row for row in rows}))


def _speed(slow: dict[str, Any], quick: dict[str, Any], engine: str = "eager_channels_last") -> str:
    """How many times sooner `quick` is done: the median over rounds, in which both took turns."""
    pair = [(row["ms"].get(engine) or {}).get("samples") for row in (slow, quick)]
    if not all(pair):
        return "not timed"
    return f"{statistics.median(a / b for a, b in zip(*pair, strict=True)):.2f}x the speed ({engine.replace('_', ' ')})"


def claims(rows: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Each published claim beside what `rows` (by key) say."""

    def times(key: str, over: str, under: str) -> str:
        return f"{rows[over][key] / rows[under][key]:.2f}x"

    fire = models.squeezenet1_0().features[3]
    full, block = (
        mobilenet_v1_full(),
        [module for module in models.mobilenet_v1().modules() if isinstance(module, DepthwiseSeparable)],
    )
    replaced = [layer for layer in full if isinstance(layer, nn.Conv2d)][1:]
    saved = [a.weight.numel() / (b.conv_dw.weight.numel() + b.conv_pw.weight.numel()) for a, b in zip(replaced, block, strict=True)]
    connected = sum(parameters(layer) for layer in alexnet() if isinstance(layer, nn.Linear))
    pooled = parameters(models.squeezenet1_0().classifier[-1])
    v1, v1_full, v2 = rows["mobilenet_v1"], rows["mobilenet_v1_full"], rows["mobilenet_v2"]
    one, early, late = rows["squeezenet1_0"], rows["squeezenet1_1"], rows["squeezenet1_1_late_pools"]
    table = [
        ("SqueezeNet has fewer parameters than AlexNet", "50x", f"1.0: {times('parameters', 'alexnet', 'squeezenet1_0')}, 1.1: "
         f"{times('parameters', 'alexnet', 'squeezenet1_1')}; files {times('file_bytes', 'alexnet', 'squeezenet1_0')}", SQUEEZENET),
        ("with Deep Compression, to 0.47 MB", "510x", "not measured: cited only", SQUEEZENET),
        ("a 1x1 filter in place of a 3x3 one", "9x fewer parameters",
         f"{fire.expand3x3.weight.numel() / fire.expand1x1.weight.numel():.2f}x (fire2: expand3x3 over expand1x1)", SQUEEZENET),
        ("global average pooling in place of fully connected layers", "no weights",
         f"{pooled} weights; AlexNet's fully connected layers have {connected:,}, {connected / rows['alexnet']['parameters']:.1%} of it",
         SQUEEZENET),
        ("1.1 in place of 1.0: smaller stem, earlier pools", "2.4x less computation",
         f"{times('multiply_adds', 'squeezenet1_0', 'squeezenet1_1')} fewer multiply-adds, {_speed(one, early)}; "
         "cited top-1 58.09, 58.18",
         "torchvision"),
        ("late downsampling: 1.1 with pools where 1.0 has them", "higher accuracy, all else equal",
         f"costs {late['multiply_adds'] / early['multiply_adds']:.2f}x the multiply-adds, "
         f"{late['peak_activation_bytes'] / early['peak_activation_bytes']:.2f}x the peak activations; "
         f"early pools are {_speed(late, early)}; accuracy not measured", SQUEEZENET),
        ("a depthwise-separable 3x3 in place of a full one", "8 to 9x less computation",
         f"{min(saved):.2f}x to {max(saved):.2f}x per block (weights), "
         f"{v1_full['multiply_adds'] / v1['multiply_adds']:.2f}x for the network, "
         f"{_speed(v1_full, v1)}", V1),
        ("MobileNet V1 at width 0.5", "about 4x less computation (quadratic)",
         f"{times('multiply_adds', 'mobilenet_v1', 'mobilenet_v1_050')} fewer multiply-adds, {_speed(v1, rows['mobilenet_v1_050'])}", V1),
        ("V2 beside V1", "1.9x fewer multiply-adds; 113 and 75 ms on a phone",
         f"{v1['multiply_adds'] / v2['multiply_adds']:.2f}x fewer, {_speed(v1, v2)}, {_speed(v1, v2, 'fastconv')}", V2),
    ]  # fmt: skip
    return [dict(claim=claim, published=published, measured=measured, source=source) for claim, published, measured, source in table]


def print_table(block: dict[str, Any], console: Any) -> None:
    """Print `measure`'s block as two tables."""
    from rich.table import Table
    from rich.text import Text

    from fastconv.benchmarks.report.view import count, megabytes

    grid = Table(title=f"batch 1, {block['size']} x {block['size']}, {block['threads']} threads", title_justify="left")
    grid.add_column("network", no_wrap=True)
    for heading in ("parameters", "file", "multiply-adds", "peak activations", "channels_last ms", "fastconv ms", "top-1 (cited)"):
        grid.add_column(heading, justify="right")
    for row in block["models"]:
        ms = [f"{row['ms'][engine]['median']:.2f}" if engine in row["ms"] else "–" for engine in ("eager_channels_last", "fastconv")]
        cited = row["accuracy"]
        counted = (
            f"{row['parameters']:,}",
            megabytes(row["file_bytes"]),
            count(row["multiply_adds"]),
            megabytes(row["peak_activation_bytes"]),
        )
        grid.add_row(Text(row["label"]), *counted, *ms, f"{cited['top1']}% {cited['source']}" if cited else "–")
    console.print(grid)
    grid = Table("claim", "published", "measured here", "source", title="the papers' claims", title_justify="left")
    for row in block["claims"]:
        grid.add_row(*(Text(row[key]) for key in ("claim", "published", "measured", "source")))
    console.print(grid)
    console.print(Text(block["method"], style="dim"))
