"""Pairs of steps that may be one kernel on a GPU: a stem or a fire and the max-pool after it, a last convolution and the mean."""

from __future__ import annotations

from torch import Tensor, fx

from fastconv.ops import _cuda
from fastconv.ops._prepared import Prepared, PreparedBlock
from fastconv.optimize.layers import Kernel

PAIRS = {("stem", "max_pool"): "stem_pool", ("fire", "max_pool"): "fire_pool", ("pointwise", "global_avg_pool"): "head"}


def join(graph: fx.Graph, calls: list[object]) -> list[object]:
    """The prepared steps, in the graph's order, with each such pair joined where a Triton kernel takes it: the first step then hands on its
    input, the second does the work of both. A value is joined over only when nothing else reads it."""
    nodes = [node for node in graph.nodes if node.op != "placeholder"]
    calls = list(calls)
    place = {node: i for i, node in enumerate(nodes)}
    for node in nodes:
        before = node.args[0] if len(node.args) == 1 and isinstance(node.args[0], fx.Node) else None
        if before is None or len(before.users) != 1 or not (isinstance(node.target, Kernel) and isinstance(before.target, Kernel)):
            continue
        name = PAIRS.get((before.target.op, node.target.op))
        first, second = calls[place[before]] if before in place else None, calls[place[node]]
        if name and len(before.args) == 1 and isinstance(first, Prepared) and first.label.endswith("triton"):
            args = first.args + (getattr(first, "after", None) or ()) + second.args
            label = f"{name} triton"
            calls[place[before]], calls[place[node]] = Prepared(_same, (), label), PreparedBlock(_JOINED[name], args, label)
    return calls


def joined(call: object) -> bool:
    """Whether `join` made the step."""
    return isinstance(call, Prepared) and (call.op is _same or call.op in _JOINED.values())


def _same(x: Tensor) -> Tensor:
    return x


def _fire_pool(x: Tensor, *args) -> Tensor:
    _cuda.check_input("fire", x, args[0])
    return _cuda.run("fire_pool", x, *args, file="blocks")


def _stem_pool(x: Tensor, *args) -> Tensor:
    _cuda.check_input("stem", x, args[0])
    return _cuda.run("stem_pool", x, *args, file="blocks")


def _head(x: Tensor, *args) -> Tensor:
    _cuda.check_input("pointwise", x, args[0])
    return _cuda.run("head", x, *args, file="blocks")


_JOINED = {"stem_pool": _stem_pool, "fire_pool": _fire_pool, "head": _head}
