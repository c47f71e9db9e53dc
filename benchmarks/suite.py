"""One row of the op suite: a layer of the networks through one engine, checked against float64 before it is timed."""

import copy
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastconv import ops, reference
from fastconv.benchmarks import layers
from fastconv.optimize import profile

ENGINES = {"fastconv": "fastconv", "eager": "eager", "eager_channels_last": "eager channels_last", "compile": "torch.compile"}
TOLERANCE = 1e-5  # of the largest output; direct float32 sums come within 1e-6, Winograd within 3e-6


class WrongResult(AssertionError):
    """An engine's output is not the layer's: there is nothing to time."""


def block(
    x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias, reduce_weight=None, reduce_bias=None,
    gate_weight=None, gate_bias=None, *, stride, padding, activation, gate, residual,
):  # fmt: skip
    """`reference.inverted_residual` with MobileNet V3's variants: no expand, squeeze-excitation."""
    y = x if expand_weight is None else reference.pointwise(x, expand_weight, expand_bias, activation=activation)
    y = reference.depthwise(y, depthwise_weight, depthwise_bias, stride=stride, padding=padding, activation=activation)
    if reduce_weight is not None:
        scale = F.conv2d(F.relu(F.conv2d(y.mean((2, 3), keepdim=True), reduce_weight, reduce_bias)), gate_weight, gate_bias)
        y = y * (torch.sigmoid(scale) if gate == "sigmoid" else F.hardsigmoid(scale))
    return reference.pointwise(y, project_weight, project_bias, residual=x if residual else None)


class Plain(nn.Module):
    """The layer in plain torch, its weights as parameters: what the other engines run and the float64 reference is made of."""

    def __init__(self, function: Callable[..., Tensor], weights: dict[str, Tensor | None], options: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.options, self.names = function, options, list(weights)
        for name, weight in weights.items():
            self.register_parameter(name, None if weight is None else nn.Parameter(weight, requires_grad=False))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        added = {} if residual is None else {"residual": residual}
        return self.function(x, **{name: getattr(self, name) for name in self.names}, **self.options, **added)


@dataclass
class Layer:
    """A layer's data: what all engines are given, and what its work amounts to."""

    inputs: tuple[Tensor, ...]
    plain: Plain
    fast: Callable[[], Tensor]
    multiply_adds: int  # of the direct convolutions
    moved: int  # bytes of inputs, output and weights, each once


def make(op: str, shape: layers.Shape) -> Layer:
    """The layer with random weights (seed 0), packed for fastconv as in an optimized model."""
    generator = torch.Generator().manual_seed(0)

    def conv(name: str, out: int, inside: int, k: int = 1) -> dict[str, Tensor]:
        weight = torch.randn(out, inside, k, k, generator=generator) * (inside * k * k) ** -0.5
        return {f"{name}weight": weight, f"{name}bias": torch.randn(out, generator=generator)}

    n, c, h, w, out, k = (shape[key] for key in ("N", "C", "H", "W", "Cout", "K"))
    window = {"stride": (shape["stride"],) * 2, "padding": (shape["padding"],) * 2}
    activation, residual = shape["activation"], shape.get("residual")
    function, options, after = getattr(reference, op), {}, ()
    if op in ("stem", "depthwise"):
        weights, options = conv("", out, c if op == "stem" else 1, k), {**window, "activation": activation}
    elif op == "pointwise":
        weights, options = conv("", out, c), {"activation": activation}
    elif op in ("fire", "fire_expand"):
        squeezed = shape["squeeze"] if op == "fire" else c
        one, three = conv("", out // 2, squeezed), conv("", out // 2, squeezed, 3)
        weights = {**(conv("squeeze_", squeezed, c) if op == "fire" else {})}
        weights |= {"weight1x1": one["weight"], "bias1x1": one["bias"], "weight3x3": three["weight"], "bias3x3": three["bias"]}
    elif op == "separable":
        weights = {**conv("depthwise_", c, 1, k), **conv("pointwise_", out, c)}
        options = {**window, "depthwise_activation": shape["depthwise_activation"], "activation": activation}
    else:
        inside = shape["expand"] or c
        weights = conv("expand_", inside, c) if shape["expand"] else {"expand_weight": None, "expand_bias": None}
        weights |= {**conv("depthwise_", inside, 1, k), **conv("project_", out, inside)}
        function, options = block, {**window, "activation": activation, "gate": shape["gate"], "residual": bool(residual)}
    last = {"memory_format": torch.channels_last}
    x = torch.randn(n, c, h, w, generator=generator)
    inputs = (x,)
    if op == "inverted_residual":
        given = {**window, "expand_activation": activation if shape["expand"] else None, "depthwise_activation": activation}
        if shape["squeeze"]:
            gates = {**conv("reduce_", shape["squeeze"], inside), **conv("gate_", inside, shape["squeeze"])}
            given["squeeze_excite"] = (*gates.values(), "relu", shape["gate"])
        call = ops.prepare_inverted_residual(*weights.values(), **given)
        weights |= gates if shape["squeeze"] else {}
        after = (x.contiguous(**last),) if residual else ()
    else:
        call = getattr(ops, f"prepare_{op}")(*weights.values(), **options)
        if residual:
            inputs = (x, torch.randn(n, out, *_output(shape), generator=generator))
    given_x = inputs[0].contiguous(**last) if op != "stem" else x  # a stem reads the image as it comes
    rest = after or tuple(t.contiguous(**last) for t in inputs[1:])
    if after:
        given_x = after[0]
    oh, ow = _output(shape)
    pixels = {"expand_weight": h * w, "reduce_weight": 1, "gate_weight": 1}
    present = {name: weight for name, weight in weights.items() if weight is not None}
    adds = sum(n * weight.numel() * pixels.get(name, oh * ow) for name, weight in present.items() if "weight" in name)
    moved = 4 * (sum(t.numel() for t in inputs) + n * out * oh * ow + sum(weight.numel() for weight in present.values()))
    return Layer(inputs, Plain(function, weights, options).eval(), lambda: call(given_x, *rest), adds, moved)


def _output(shape: layers.Shape) -> tuple[int, int]:
    return tuple((shape[axis] + 2 * shape["padding"] - shape["K"]) // shape["stride"] + 1 for axis in "HW")


def through(engine: str, layer: Layer) -> Callable[[], Tensor]:
    """A call of the layer through an engine. Each gets its weights and inputs in the format that suits it, before the clock runs."""
    if engine == "fastconv":
        return layer.fast
    plain, inputs = layer.plain, layer.inputs
    if engine != "eager":
        plain = copy.deepcopy(plain).to(memory_format=torch.channels_last)
        inputs = tuple(t.contiguous(memory_format=torch.channels_last) for t in inputs)
    if engine == "compile":
        torch._dynamo.reset()  # each layer is a program of its own: none falls back to eager at the limit of recompilations
        plain = torch.compile(plain, dynamic=False, options={"freezing": True})
    return lambda: plain(*inputs)


def check(run: Callable[[], Tensor], layer: Layer, what: str) -> float:
    """The largest error against float64, relative to the largest output. Raises WrongResult beyond TOLERANCE or with another shape."""
    wanted = copy.deepcopy(layer.plain).double()(*(t.double() for t in layer.inputs))
    y = run()
    if y.shape != wanted.shape:
        raise WrongResult(f"{what}: not timed: its shape is {tuple(y.shape)}, not {tuple(wanted.shape)}")
    error = float((y.double() - wanted).abs().max() / wanted.abs().max())
    if not error <= TOLERANCE:  # NaN is wrong, too
        raise WrongResult(f"{what}: not timed: an output is off by {error:.1e} of the largest, allowed is {TOLERANCE:.0e}")
    return error


@dataclass(frozen=True)
class Row:
    """A distinct shape of an op through one engine. networks: how many such layers each network has."""

    op: str
    shape: layers.Shape
    engine: str
    representative: bool
    networks: Counter = field(default_factory=Counter)

    @property
    def title(self) -> str:
        """C x H x W -> Cout and what else tells it from the op's other shapes."""
        shape = self.shape
        name = f"{shape['C']}x{shape['H']}x{shape['W']}-{shape['Cout']}"
        name += f"-k{shape['K']}" if shape["K"] > 1 else ""
        name += f"s{shape['stride']}p{shape['padding']}" if self.op not in ("pointwise", "fire", "fire_expand") else ""
        name += "".join(f"-{key[0]}{shape[key]}" for key in ("expand", "squeeze") if shape.get(key))
        name += f"-{shape['depthwise_activation']}" if "depthwise_activation" in shape else ""
        return f"{name}-{shape['activation'] or 'linear'}" + ("-residual" if shape.get("residual") else "")

    @property
    def id(self) -> str:
        return f"{self.title}-{'-'.join(self.networks)}-{self.engine}"

    def time(self, benchmark: Any, roof: profile.Roofs) -> dict[str, Any]:
        """Checks, then times; leaves ms, GFLOP/s, GB/s and percent of the roofline in extra_info, and returns it."""
        with torch.no_grad():
            layer = make(self.op, self.shape)
            run = through(self.engine, layer)
            error = check(run, layer, f"{self.op} {self.title}, {ENGINES[self.engine]}")
            benchmark.group = f"{self.op} {self.title}"
            benchmark(run)
        info = {"op": self.op, "shape": self.title, "engine": self.engine, "networks": dict(self.networks), "relative_error": error}
        if benchmark.stats is not None:  # --benchmark-disable
            us = statistics.median(benchmark.stats.stats.data) * 1e6
            rates = profile.against(roof, layer.multiply_adds, layer.moved, us)
            info |= {"ms": us / 1e3, "gbs": layer.moved / us / 1e3, **rates}
        benchmark.extra_info.update(info)
        return info


def rows(op: str) -> list[Row]:
    """Every distinct shape of the op through every engine, in the order of the networks. The shapes with the least, the median and the
    most multiply-adds represent the others where an engine is slow to start."""
    networks: dict[tuple, Counter] = {}
    shapes: dict[tuple, layers.Shape] = {}
    for shape in layers.read(op):
        key = tuple((name, value) for name, value in shape.items() if name not in ("net", "layer", "count"))
        shapes.setdefault(key, dict(key))
        networks.setdefault(key, Counter())[shape["net"]] += shape["count"]
    order = sorted(shapes, key=lambda key: _work(op, shapes[key]))
    few = {order[0], order[len(order) // 2], order[-1]}
    return [Row(op, shape, engine, key in few, networks[key]) for key, shape in shapes.items() for engine in ENGINES]


def _work(op: str, shape: layers.Shape) -> float:
    """Multiply-adds, up to a factor of the op."""
    height, width = _output(shape)
    inside = shape.get("expand") or shape.get("squeeze") or 1
    return height * width * shape["Cout"] * inside * (1 if op == "depthwise" else shape["C"]) * shape["K"] ** 2


def over_shapes(op: str) -> pytest.MarkDecorator:
    """Parametrises a benchmark over the op's rows."""
    return pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in rows(op)])
