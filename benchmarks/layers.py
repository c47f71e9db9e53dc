"""The layers of the six networks at 224 x 224 as data: reads shapes/*.txt, and writes them anew from the networks themselves:

python -m fastconv.benchmarks.layers --write
"""

import argparse
import os.path
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

SHAPES = Path(__file__).parent / "shapes"
NETWORKS = ("squeezenet1_0", "squeezenet1_1", "mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large")
# What an op's file says after `net layer N C H W Cout K stride padding activation`; `count` comes last: how many of them the network has.
EXTRA = {
    "stem": (),
    "depthwise": (),
    "pointwise": ("residual",),
    "fire_expand": (),
    "fire": ("squeeze",),
    "separable": ("depthwise_activation", "residual"),
    "inverted_residual": ("expand", "squeeze", "gate", "residual"),
}
OPS = tuple(EXTRA)
WORDS = ("net", "layer", "activation", "depthwise_activation", "gate")  # the columns that are no numbers; "none" for None
MEANING = {
    "stem": "First convolutions",
    "depthwise": "Depthwise convolutions",
    "pointwise": "Pointwise convolutions, squeeze-excitation left out,",
    "fire_expand": "Fire expands (Cout: of both expands together; K: of the larger)",
    "fire": "Fires (squeeze: channels between; Cout: of both expands together; K: of the larger)",
    "separable": "Depthwise-separable blocks (residual: 1 where the input is added)",
    "inverted_residual": "Inverted residuals (expand: channels inside, 0 without; squeeze: of the squeeze-excitation, 0 without;\n"
    "# activation: of expand and depthwise; residual: 1 where the input is added)",
}

Shape = dict[str, Any]


def columns(op: str) -> tuple[str, ...]:
    return ("net", "layer", *["N", "C", "H", "W", "Cout", "K", "stride", "padding", "activation"], *EXTRA[op], "count")


def read(op: str) -> list[Shape]:
    """The rows of shapes/<op>.txt, one a network and distinct shape: {column: int, or str or None for names and activations}.

    Raises ValueError for an op without a file, or a row that does not fit its header.
    """
    if op not in OPS:
        raise ValueError(f"layers: op must be one of {', '.join(OPS)}, got {op!r}")
    rows = []
    for number, line in enumerate((SHAPES / f"{op}.txt").read_text().splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        cells = line.split()
        if len(cells) != len(columns(op)):
            raise ValueError(f"{op}.txt:{number}: wanted {len(columns(op))} columns ({' '.join(columns(op))}), got {len(cells)}")
        rows.append({key: (None if cell == "none" else cell) if key in WORDS else int(cell) for key, cell in zip(columns(op), cells)})
    return rows


def text(op: str, rows: list[Shape]) -> str:
    """The file of these rows."""
    lines = [f"# {MEANING[op]} of the six networks at 224 x 224.", f"# {' '.join(columns(op))}"]
    lines += [" ".join("none" if row[key] is None else str(row[key]) for key in columns(op)) for row in rows]
    return "\n".join(lines) + "\n"


def of_networks(names: tuple[str, ...] = NETWORKS, *, size: int = 224) -> dict[str, list[Shape]]:
    """What `read` should give, from the plain networks: their convolutions, and the blocks that `fastconv.optimize` finds in them."""
    from fastconv.cli import networks

    counts: dict[str, Counter[tuple]] = {op: Counter() for op in OPS}
    first: dict[tuple, str] = {}
    for name in names:
        for op, layer, shape in _layers(networks.build(name, pretrained=False).model, size):
            key = (op, name, *shape.items())
            first.setdefault(key, layer)
            counts[op][key] += 1
    return {op: [{"net": key[1], "layer": first[key], **dict(key[2:]), "count": count} for key, count in counts[op].items()] for op in OPS}


def _layers(model: nn.Module, size: int) -> Iterator[tuple[str, str, Shape]]:
    """(op, layer's name, shape) of every kernel of the model's plan, and of the convolutions inside its blocks."""
    from fastconv.optimize.plan import Program

    inputs: dict[int, tuple[str, torch.Size]] = {}  # by the convolution's parameters, which is how a plan knows it
    handles = [
        module.register_forward_hook(
            lambda module, args, output, name=name: inputs.__setitem__(id(module._parameters), (name, args[0].shape))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    for handle in handles:  # a module with hooks is left out of plans
        handle.remove()

    def shape(conv: Any, last: Any = None, **extra: Any) -> Shape:
        """From `conv`'s input to `last`'s channels."""
        n, c, h, w = inputs[id(conv.weight.owner)][1]
        window = {"K": conv.shape[2], "stride": conv.stride[0], "padding": conv.padding[0]}
        return {"N": n, "C": c, "H": h, "W": w, "Cout": (last or conv).channels, **window, "activation": conv.activation, **extra}

    for node in Program(model, exact=False).graph.nodes:
        kernel = node.target
        if node.op == "placeholder" or getattr(kernel, "op", None) not in OPS:
            continue
        convs = [layer for layer in kernel.layers if layer is not None]
        names = [inputs[id(layer.weight.owner)][0] for layer in convs]
        block = ".".join(os.path.commonpath([name.replace(".", "/") for name in names]).split("/"))
        residual = int(len(node.args) > 1)
        if kernel.op == "fire":
            squeeze, one, three = convs
            both = {"Cout": one.channels + three.channels}
            yield "pointwise", names[0], shape(squeeze, residual=0)
            yield "fire_expand", block, shape(three) | both
            yield "fire", block, {**shape(three), **both, "C": squeeze.shape[1], "squeeze": squeeze.channels}
            continue
        for layer, name in zip(convs, names):
            op = "pointwise" if layer.pointwise else "depthwise" if layer.depthwise else "stem"
            added = residual if layer is convs[-1] else 0
            yield op, name, shape(layer, **({"residual": added} if op == "pointwise" else {}))
        if kernel.op == "separable":
            depthwise, last = convs
            yield (
                "separable",
                block,
                {
                    **shape(depthwise, last),
                    "activation": last.activation,
                    "depthwise_activation": depthwise.activation,
                    "residual": residual,
                },
            )
        elif kernel.op == "inverted_residual":
            expand, depthwise, last = kernel.layers
            squeeze = kernel.squeeze_excite
            whole = shape(depthwise, last, expand=expand.channels if expand else 0, squeeze=squeeze[0].channels if squeeze else 0)
            yield (
                kernel.op,
                block,
                whole
                | {"C": convs[0].shape[1] if expand else depthwise.channels}
                | {
                    "gate": squeeze[2] if squeeze else None,
                    "residual": residual,
                },
            )


def main() -> int:
    """Compares shapes/*.txt with the networks."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "--write", action="store_true", help="write shapes/*.txt; without it, only say which files differ from the networks"
    )
    write = parser.parse_args().write
    differ = []
    for op, rows in of_networks().items():
        path, wanted = SHAPES / f"{op}.txt", text(op, rows)
        if not path.exists() or path.read_text() != wanted:
            differ.append(path.name)
        if write:
            path.write_text(wanted)
    print(f"{'written' if write else 'differ'}: {', '.join(differ) or 'none'}")
    return bool(differ) and not write


if __name__ == "__main__":
    sys.exit(main())
