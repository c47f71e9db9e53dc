"""Tells which kernel took each submodule of a model, or why it was left alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from fastconv.optimize.layers import Kernel
from fastconv.optimize.module import OptimizedModule, revert
from fastconv.optimize.plan import Plan, Program
from fastconv.optimize.trace import hooked

PYTORCH, NONE = "PyTorch", "none"


@dataclass(frozen=True)
class Row:
    """One submodule: its name and class, the kernel that took it, and with which others, or why it was left to PyTorch."""

    name: str
    type: str
    kernel: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """`rows` has a Row for each submodule, in the order of `named_modules`; as a string it is a table."""

    rows: list[Row]

    def __str__(self) -> str:
        table = [("module", "type", "kernel", "notes"), *((row.name, row.type, row.kernel, row.reason) for row in self.rows)]
        widths = [max(len(cells[column]) for cells in table) for column in range(3)]
        return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths)), cells[3]]).rstrip() for cells in table)


def explain(model: nn.Module) -> Explanation:
    """One row for each submodule of `model`: the kernel that runs it and what it is fused with, or why it was left alone.

    A model that is not optimized is explained as `optimize` would do it; it is not changed. Raises TypeError if it is no torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: model must be a torch.nn.Module, got {type(model).__name__}")
    plan = model.plan if isinstance(model, OptimizedModule) and not model.training else Plan(revert(model).eval())
    fates = _fates(plan)
    rows = []
    for name, module in plan.module.named_modules(remove_duplicate=False):
        if name or not module._modules:
            rows.append(Row(name, type(module).__name__, *(_block(name, fates) if module._modules else fates[name].row(name))))
    return Explanation(rows)


@dataclass(frozen=True, eq=False)
class _Fate:
    """What became of one or several leaf modules. `group` holds those that went together."""

    kernel: str
    reason: str
    group: tuple[str, ...] = ()

    def row(self, name: str) -> tuple[str, str]:
        partners = [other for other in self.group if other != name]
        return self.kernel, "; ".join(filter(None, [self.reason, f"with {_shortened(partners)}" if partners else ""]))


def _fates(plan: Plan) -> dict[str, _Fate]:
    """The fate of each leaf module of the plan's module, by name."""
    program, _, steps, _ = plan.prepare()
    names = [name for name, module in plan.module.named_modules(remove_duplicate=False) if not module._modules]
    modules = dict(plan.module.named_modules(remove_duplicate=False))
    fates: dict[str, _Fate] = {name: _Fate(NONE, "does nothing in eval mode") for name in program.identities}
    if program.graph is not None:
        prepared = iter(steps or program.steps)
        for node in program.graph.nodes:
            if node.op == "placeholder":
                continue
            call, _, _ = next(prepared)
            group = tuple(node.meta["names"])
            if isinstance(node.target, Kernel):
                reason = node.target.layers[0].uncovered() if node.target.op == "conv2d" else ""
                fate = _Fate(call.op if isinstance(call, Kernel) else call.kernel, reason, group)
            else:
                leaf = program.leaves.get(modules[node.target]) if node.op == "call_module" else None
                fate = _Fate(PYTORCH, _left_alone(node, leaf))
            fates.update(dict.fromkeys(group, fate))
    for name, child in program.children.items():
        for inner, fate in _fates(child).items():
            group = tuple(f"{name}.{member}" if member else name for member in fate.group)
            fates[f"{name}.{inner}" if inner else name] = _Fate(fate.kernel, fate.reason, group)
    same = {id(modules[name]): fate for name, fate in fates.items() if name in modules}
    for name in names:
        if name not in fates:
            fates[name] = same.get(id(modules[name])) or _outside(name, program, modules)
    return fates


def _left_alone(node: fx.Node, leaf: str | None) -> str:
    """Why the node's modules stay as they are."""
    if leaf is not None:
        return f"does not trace: {leaf}"
    if "reason" in node.meta:
        return node.meta["reason"]
    if node.meta.get("reshape"):
        return "only changes the shape"
    if node.meta.get("norm") or node.meta.get("activation"):
        return "does not follow a layer that only it reads"
    return "no kernel for it"


def _outside(name: str, program: Program, modules: dict[str, nn.Module]) -> _Fate:
    """The fate of a module that is not in the graph."""
    outer = name
    while outer:
        outer = outer.rpartition(".")[0]
        if outer and hooked(modules[outer]):
            return _Fate(PYTORCH, f"inside {outer}, which has hooks")
        if modules[outer] in program.leaves:
            return _Fate(PYTORCH, f"inside {outer}, which does not trace: {program.leaves[modules[outer]]}")
    return _Fate(PYTORCH, f"the model does not trace: {program.problem}") if program.problem else _Fate(NONE, "not called in eval mode")


def _block(name: str, fates: dict[str, _Fate]) -> tuple[str, str]:
    """What became of a module with submodules."""
    own = fates.get(name)
    members = [other for other in fates if other.startswith(f"{name}.") or (other == name and own.group)]
    kernels = {(fates[member].kernel, fates[member].group) for member in members if fates[member].group}
    alone = [fates[member] for member in members if fates[member].kernel == PYTORCH]
    if not kernels and own is not None:
        return own.row(name)
    if not kernels:
        reasons = {fate.reason for fate in alone}
        return (PYTORCH, reasons.pop() if len(reasons) == 1 else "") if alone else (NONE, "")
    notes = [f"{len(alone)} of {len(members)} left to PyTorch"] if alone else []
    if len(kernels) > 1:
        return f"{len(kernels)} kernels", "; ".join(notes)
    kernel, group = kernels.pop()
    partners = [other for other in group if other not in members]
    return kernel, "; ".join([*notes, *([f"with {_shortened(partners)}"] if partners else [])])


def _shortened(names: list[str]) -> str:
    """Names in a row, without those of parts of modules that are in it too, and with their common parent said once."""
    names = [name for name in names if name.rpartition(".")[0] not in names]
    parent = ""
    for parts in zip(*(name.split(".")[:-1] for name in names)):
        if len(set(parts)) > 1:
            break
        parent += f"{parts[0]}."
    if len(names) == 1 or not parent:
        return ", ".join(names)
    return f"{', '.join(name.removeprefix(parent) for name in names)} of {parent.removesuffix('.')}"
