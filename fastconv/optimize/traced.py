"""What torch.compile and torch.export see of a planned module (decision 13).

A compiled graph holds one call of `fastconv::planned`, which runs the module's plan as it is then: weights that change are seen as without
torch.compile. An exported graph holds `fastconv::network` (or the plan's steps) with the packed weights as they were at export.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from fastconv.ops._register import library
from fastconv.optimize.layers import Kernel, Layer

if TYPE_CHECKING:
    from fastconv.optimize.plan import Plan, Program, Ready
    from fastconv.optimize.whole import Direct

T = TypeVar("T")

_modules: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()
_counts: Counter[str] = Counter()
_lock = threading.Lock()


class _Plainly(threading.local):
    """Whether this thread asks for shapes: then planned modules inside run their plain definition."""

    on = False


_plainly = _Plainly()


class Traced(nn.Module):
    """Base of the modules that run as a plan."""

    _key: str | None = None
    _step_key: str | None = None  # of the module as it trains (trained.py)
    _captured: Program | None = None
    _plan: Plan | None = None
    _direct: Direct | None = None  # what most calls in eval mode are
    _off: ClassVar[list[Callable[[], object]]] = []  # while one of these says true, no call is

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or len(args) != 1 or kwargs:
            return super().__call__(*args, **kwargs)
        direct = self._direct
        if direct is not None and (y := direct(self, args[0])) is not None:
            return y
        y = super().__call__(*args)
        plan = self._plan
        now = plan.direct(self._off) if plan is not None else None
        if now is not direct:
            self._direct = now
        return y

    def _plan_now(self) -> Plan:
        raise NotImplementedError

    def _key_now(self, identity: int) -> str:
        """Called by Dynamo while it traces, with the id that it guards: the key of `self` in `fastconv::planned`, or "" for plain torch."""
        if runs_as_it_is():
            return ""
        # The same in every process that makes its modules in the same order, so that the compilers' caches on disk serve. A graph of the
        # cache was made for a plan of the same description, and its key names the one in this process.
        program = elsewhere(lambda: self._plan_now().program)
        if program is not self._captured:
            description = _description(program)
            if not description:
                return ""
            self._key = registered(self, description, self._key)
            self._captured = program
        _modules[self._key] = self
        return self._key

    # What torch._dynamo.assume_constant_result does; to import it takes longer (1.1 s) than fastconv without it.
    _key_now._dynamo_marked_constant = True

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_plan", "_direct", "_key", "_step_key", "_captured")}


def registered(module: nn.Module, description: str, key: str | None) -> str:
    """The key of a module in compiled graphs: `key`, its earlier one, where that is its own and of the same description. Earlier keys stay:
    a graph that was compiled for one runs again when the module is again as it was."""
    with _lock:
        if key is None or key.partition("-")[0] != description or _modules.get(key) is not module:
            key = f"{description}-{_counts[description]}"
            _counts[description] += 1
            _modules[key] = module
    return key


def runs_as_it_is() -> bool:
    """Whether a module that Dynamo traces now is to run as plain torch: under autocast and torch.func's transforms, which are in Dynamo's
    own guards, where shapes are asked for, and in a strict export."""
    transformed = torch._C._is_any_autocast_enabled() or torch._C._are_functorch_transforms_active()
    return transformed or _plainly.on or getattr(torch.compiler, "_is_exporting_flag", False)


def compiled(module: Traced, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `module.forward` returns under torch.compile. Dynamo traces through here."""
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and not (torch.is_grad_enabled() and args[0].requires_grad):
        key = module._key_now(id(module))
        if key:
            return torch.ops.fastconv.planned.default(args[0], key)
    return plain(*args, **kwargs)


def exporting() -> bool:
    """Whether torch.export traces Python as it runs, for anything but ONNX, which has none of our operators."""
    if _plainly.on or torch.compiler.is_dynamo_compiling() or not torch.compiler.is_exporting():
        return False
    return not (torch.onnx.is_in_onnx_export() or torch._C._is_any_autocast_enabled())


def snapshot(plan: Plan) -> Ready | None:
    """The plan prepared during an export, which has put fake tensors where the parameters were; None where it could not be."""
    with _real_tensors(plan.module) as found:
        ready = elsewhere(plan.prepare_portably) if found else None
    if not found:
        warnings.warn("fastconv: this export hides the module's real parameters; it is exported as plain torch", stacklevel=2)
    return ready


@contextmanager
def _real_tensors(module: nn.Module) -> Iterator[bool]:
    """Puts the tensors that an export replaced by fake ones back for a while; False, and nothing changed, where they are not known."""
    owners = [owner for child in module.modules() for owner in (child._parameters, child._buffers)]
    fakes = [(owner, name, tensor) for owner in owners for name, tensor in owner.items() if isinstance(tensor, FakeTensor)]
    known: dict[int, Tensor] = {}
    for mode in {id(fake.fake_mode): fake.fake_mode for _, _, fake in fakes}.values():
        converter = mode.fake_tensor_converter
        for real, number in converter.meta_converter.describer.lookup_tensor.items():
            known[id(converter.tensor_memo.get(number))] = real
    if not all(id(fake) in known for _, _, fake in fakes):
        yield False
        return
    try:
        for owner, name, fake in fakes:
            owner[name] = known[id(fake)]
        yield True
    finally:
        for owner, name, fake in fakes:
            owner[name] = fake


def elsewhere(work: Callable[[], T]) -> T:
    """The result of `work` in a thread of its own, where none of the modes is on that trace or fake what this one does."""
    results: list[T] = []
    problems: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if problems:
        raise problems[0]
    return results[0]


def _description(program: Program) -> str:
    """A hash of what the program computes, its weights' values aside; "" for one that no functional operator from a tensor to a tensor
    can stand for."""
    whole = program.graph is not None and program.inputs == 1 and isinstance(next(iter(reversed(program.graph.nodes))).args[0], fx.Node)
    if not (whole and program.kernels and program.functional):
        return ""
    words = []
    for node in program.graph.nodes:
        if isinstance(node.target, Kernel):
            kernel = node.target
            words.append(f"{kernel.op} {node.args} {sorted(kernel.options.items())} {kernel.squeeze_excite and kernel.squeeze_excite[2]}")
            layers = (*kernel.layers, *(kernel.squeeze_excite or ())[:2])
            words += ["-" if layer is None else _geometry(layer) for layer in layers]
        else:
            words.append(f"{node.op} {node.target} {node.args} {node.kwargs}")
    words += [f"{source.tensor().dtype} {source.tensor().device} {tuple(source.tensor().shape)}" for source in program.sources]
    return hashlib.sha256("\n".join(map(str, words)).encode()).hexdigest()[:16]


def _geometry(layer: Layer) -> str:
    parts = (layer.shape, layer.stride, layer.padding, layer.dilation, layer.groups, layer.activation, layer.norm and layer.norm.eps)
    return " ".join(map(str, parts))


def find(key: str) -> Any:
    module = _modules.get(key)
    if module is None:
        raise RuntimeError(f"planned: no module {key}: a compiled graph runs in the process, and with the module, that it was compiled for")
    return module


def _planned(x: Tensor, key: str) -> Tensor:
    module = find(key)
    with torch.no_grad():
        plan = module._plan_now()
        ready = plan.prepare()
        if ready.program is not module._captured:  # a hook or a submodule came or went, or a weight's shape changed
            if _description(ready.program) not in ("", key.partition("-")[0]):
                raise RuntimeError("planned: the module's structure has changed since torch.compile saw it: compile it again")
            module._captured = ready.program
        y = plan.follow(ready, x)
    return y.clone() if torch._C._is_alias_of(y, x) else y  # an operator's result is its own


def _planned_fake(x: Tensor, key: str) -> Tensor:
    from fastconv.optimize.plan import formatted

    plan = find(key)._plan_now()
    y = on_fakes(x, lambda: formatted(getattr(plan.module, plan.method)(x), x))
    return y.clone() if y is x else y


def on_fakes(x: Tensor, work: Callable[[], T]) -> T:
    """The result of a module's plain definition for a fake x, beside its real parameters."""
    mode = x.fake_mode
    before = mode.allow_non_fake_inputs, _plainly.on
    mode.allow_non_fake_inputs, _plainly.on = True, True
    try:
        with torch.no_grad():
            return work()
    finally:
        mode.allow_non_fake_inputs, _plainly.on = before


library.define("planned(Tensor x, str key) -> Tensor")
library.impl("planned", _planned, "CompositeExplicitAutograd")
torch.library.register_fake("fastconv::planned", _planned_fake, lib=library)
