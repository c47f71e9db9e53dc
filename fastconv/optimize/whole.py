"""A plan as one operator call: all steps in C++, intermediate results in memory that stays from call to call."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules
from torch.utils.hooks import RemovableHandle

from fastconv import _extension
from fastconv.ops._network import FORMAT, encode
from fastconv.ops._prepared import Prepared, PreparedResidual
from fastconv.optimize.layers import Kernel

# What csrc/program.cpp knows.
_OPS = {
    f"fastconv::{name}"
    for name in (
        "stem_packed",
        "pointwise_packed",
        "depthwise_packed",
        "fire_expand_packed",
        "fire_packed",
        "inverted_residual_packed",
        "max_pool",
        "global_avg_pool",
    )
}

# While these are as they are here, a module's call does nothing but run it: no hooks on every module, no compiling, export, tracing,
# forward-mode differentiation, autocast or torch.func.
_EMPTY = [getattr(modules, f"_global_{which}_hooks") for which in ("forward_pre", "forward", "backward_pre", "backward")]
_FIXED = [(torch.compiler, "_is_compiling_flag", False), (torch.compiler, "_is_exporting_flag", False), (forward_ad, "_current_level", -1)]
_OFF = [torch._C._is_any_autocast_enabled, torch._C._are_functorch_transforms_active, torch._C._get_tracing_state]

# `call(module, x)`: what the module in eval mode makes of x, or None where it has to see to the call itself.
Direct = Callable[[nn.Module, Tensor], "Tensor | None"]


class Whole:
    """`whole(x)` is all of a plan's steps in one call of `fastconv::program_run`, to the same bits as one by one.

    Intermediate results stand in an arena, one per thread that calls at a time, which lives as long as the plan.
    `network(x)` is the same through `fastconv::network`, which takes weights and program as arguments: for graphs that outlive the plan.
    """

    def __init__(self, weights: list[Tensor], program: str, flatten: bool) -> None:
        self.weights, self.program, self.flatten = weights, program, flatten
        self.number = torch.ops.fastconv.program_new(weights, program)
        from fastconv import _C

        weakref.finalize(self, _C.program_free, self.number)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.fastconv.program_run.default(x, self.number, self.flatten)

    def direct(self, watch: object, off: list[Callable[[], object]]) -> Direct | None:
        """The same in one step, as long as `watch`, a _C.Watch, sees no change and no function in `off` says true. None where results are
        images, to be put in x's format."""
        from fastconv import _C

        if not self.flatten:
            return None
        fixed = [*_FIXED, (RemovableHandle, "next_id", RemovableHandle.next_id)]  # no hook has been registered since
        op = torch.ops.fastconv.program_run.default._op
        return _C.Direct(self, watch, op, (self.number, self.flatten), _EMPTY, fixed, [*_OFF, *off])

    def times(self, x: Tensor) -> list[tuple[int, float]]:
        """What the steps of one call take: (layers that the call chained into one step, microseconds), in order."""
        return [(int(layers), us) for layers, us in torch.ops.fastconv.program_times.default(x, self.number).tolist()]

    def network(self, x: Tensor) -> Tensor:
        y = torch.ops.fastconv.network.default(x, self.weights, self.program)
        return y[:, :, 0, 0] if self.flatten else y

    @staticmethod
    def serves(x: Tensor) -> bool:
        # Each question costs microseconds: between calls its answer leaves the caches.
        return x.dtype is torch.float32 and x.is_cpu and x.dim() == 4


def whole(graph: fx.Graph, calls: list[object]) -> Whole | None:
    """The whole graph as one call, or None where a step is no compiled kernel. calls: the prepared steps, in the graph's order."""
    if not _extension.available:
        return None
    nodes = list(graph.nodes)
    if [node.op for node in nodes].count("placeholder") != 1 or nodes[0].op != "placeholder" or nodes[-1].op != "output":
        return None
    result = nodes[-1].args[0]
    if not isinstance(result, fx.Node):
        return None
    same: dict[fx.Node, fx.Node] = {}  # a flattened (N, C, 1, 1) is the same memory
    flat: set[fx.Node] = set()
    steps: list[tuple[fx.Node, str, list[Tensor], list[str], list[fx.Node]]] = []
    for node, call in zip(nodes[1:-1], calls):
        inputs = [same.get(argument, argument) for argument in (node.args if isinstance(node.target, Kernel) else node.all_input_nodes)]
        if _is_flatten(node):
            same[node] = inputs[0]
            flat.add(node)
            continue
        described = _described(node, call)
        if described is None:
            return None
        if node.target.op == "linear":
            if node.args[0] not in flat:
                return None
            flat.add(node)
        elif any(argument in flat for argument in node.args):
            return None
        steps.append((node, *described, inputs))
    if not steps or steps[-1][0] is not same.get(result, result):
        return None
    values = {nodes[0]: 0}
    weights: list[Tensor] = []
    program = [FORMAT]
    for number, (node, op, tensors, words, inputs) in enumerate(steps, 1):
        places = [values[argument] for argument in inputs]
        values[node] = number
        weights += tensors
        program.append(" ".join([op, str(places[0]), str(places[1] if len(places) > 1 else -1), *words]))
    return Whole(weights, ";".join(program), flatten=result in flat)


def _is_flatten(node: fx.Node) -> bool:
    """Whether the node flattens the pixels of a global average pool, of which there is one an image."""
    shape = node.meta.get("shape")
    inputs = node.all_input_nodes
    pooled = len(inputs) == 1 and isinstance(inputs[0].target, Kernel) and inputs[0].target.op == "global_avg_pool"
    return bool(pooled and node.meta.get("reshape") and shape is not None and len(shape) == 2)


def _described(node: fx.Node, call: object) -> tuple[str, list[Tensor], list[str]] | None:
    """A prepared step as a program has it: (operator, weights, words)."""
    if not isinstance(node.target, Kernel) or not isinstance(call, Prepared):
        return None
    args = list(call.args)
    if node.target.op == "linear":
        op = torch.ops.fastconv.pointwise_packed.default
        if "f32" not in call.label or len(args) != 3:
            return None
    elif isinstance(call.op, torch._ops.OpOverload) and call.op.name() in _OPS and "f32" in call.label:
        op = call.op
        args += call.after if isinstance(call, PreparedResidual) else ()
    else:
        return None
    return op.name().removeprefix("fastconv::"), *encode(op._schema, args)
