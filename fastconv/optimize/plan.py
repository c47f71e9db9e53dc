"""The execution plan of a module: a flat list of kernel calls, and the watch over the tensors they were made from."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils.hooks import RemovableHandle

from fastconv import _extension
from fastconv.ops._prepared import Prepared, portable
from fastconv.optimize.gpu import join, joined
from fastconv.optimize.layers import Kernel, Source
from fastconv.optimize.match import Hazard, match
from fastconv.optimize.memory import Block
from fastconv.optimize.trace import Untraceable, hooked, trace
from fastconv.optimize.traced import exporting, snapshot
from fastconv.optimize.whole import Direct, Whole, whole

# What to call, from which slots, into which slot.
Step = tuple[Any, tuple[int, ...], int]

_version = operator.attrgetter("_version")
# What takes images in any memory format; other code that stays as it is may ask for views that only the default format allows.
_ANY_FORMAT_MODULES = {
    f"torch.nn.modules.{name}"
    for name in ("activation", "batchnorm", "conv", "dropout", "instancenorm", "normalization", "padding", "pooling", "upsampling")
}
_ANY_FORMAT_METHODS = {"add", "chunk", "contiguous", "dim", "div", "expand_as", "flatten", "mean", "mul", "reshape", "size", "split", "sub"}
_ANY_FORMAT_FUNCTIONS = {
    *(getattr, operator.getitem, operator.add, operator.sub, operator.mul, operator.truediv),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.cat, torch.concat, torch.flatten, torch.reshape, torch.mean, torch.sigmoid),
    *(F.relu, F.relu6, F.hardswish, F.hardsigmoid, F.silu, F.leaky_relu, F.elu, F.gelu, F.softmax, F.pad, F.interpolate),
    *(torch.conv2d, F.conv2d, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d),
}


def plain(x: Any) -> bool:
    """Whether x is an ordinary dense tensor, outside autocast, forward-mode differentiation, torch.func, torch.compile, export and
    jit tracing, and without hooks on every module: where a plan computes just what the module would."""
    return (
        type(x) is Tensor
        and x.layout is torch.strided
        and not torch.compiler.is_compiling()
        and not torch._C._is_any_autocast_enabled()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._get_tracing_state()
        and forward_ad._current_level < 0
        and not (_global_forward_hooks or _global_forward_pre_hooks)
    )


def _version_or_none(tensor: Tensor) -> int | None:
    try:
        return tensor._version
    except RuntimeError:  # made in inference mode: it counts no versions
        return None


def _states(tensors: list[Tensor]) -> list[tuple[int, int, int | None]]:
    return [(id(tensor), tensor.data_ptr(), _version_or_none(tensor)) for tensor in tensors]


class Watch:
    """Notices when the parameters, buffers, submodules or hooks that a plan was made from have changed."""

    def __init__(self, module: nn.Module, sources: list[Source]) -> None:
        sources = list({source.place(): source for source in sources}.values())
        self.places = [source.place() for source in sources]
        self.owners, self.keys = [source.owner for source in sources], [source.key for source in sources]
        self.tensors = [source.tensor() for source in sources]
        states = self.states = _states(self.tensors)
        self.held = [tensor.detach() for tensor in self.tensors]  # their memory is not given to the next weight while this watch lasts
        # A weight moved by `.to()` keeps its identity and version, not its address.
        self.counted = [tensor for tensor, state in zip(self.tensors, states) if state[2] is not None]
        self.versions = [state[2] for state in states if state[2] is not None]
        self.addressed = [tensor for tensor, state in zip(self.tensors, states) if tensor.dim() > 1 or state[2] is None]
        self.addresses = [state[1] for tensor, state in zip(self.tensors, states) if tensor.dim() > 1 or state[2] is None]
        self.shapes = [tensor.shape for tensor in self.tensors]
        self.modules = list(module.modules())
        self.children = [child._modules for child in self.modules if child._modules]
        self.children_then = [dict(children) for children in self.children]
        self.hooks = [hooked(child) for child in self.modules]
        self.handles = RemovableHandle.next_id
        # The same comparisons in C++, which takes a third of the time; unless another thread writes meanwhile, and both saw other states.
        self.quick = None
        if _extension.available:
            from fastconv import _C

            quick = _C.Watch(self.tensors, self.owners, self.keys, self.counted, self.addressed, self.children)
            self.quick = quick if _states(self.tensors) == states else None

    def same_structure(self) -> bool:
        if self.children != self.children_then:
            return False
        if any(owner.get(key) is None for owner, key in zip(self.owners, self.keys)):  # removed, or computed from others by now
            return False
        if self.handles != RemovableHandle.next_id:
            if [hooked(child) for child in self.modules] != self.hooks:
                return False
            self.handles = RemovableHandle.next_id
        return True

    def unchanged(self) -> bool:
        if self.quick is not None and self.handles == RemovableHandle.next_id:
            return self.quick.unchanged()
        return (
            list(map(_version, self.counted)) == self.versions
            and all(map(operator.is_, map(dict.get, self.owners, self.keys), self.tensors))
            and list(map(Tensor.data_ptr, self.addressed)) == self.addresses
            and self.same_structure()
        )

    def changed(self, new: Watch) -> set[tuple[int, str]]:
        """The places whose tensors differ in `new`, a later watch over the same places."""
        return {place for place, then, now in zip(self.places, self.states, new.states) if then != now}


class Program:
    """What was found in a module: the matched graph and its steps, or, where the module does not trace, its children's plans.

    `problem` says why the module as a whole has no graph. Nothing here depends on the values of parameters.
    """

    def __init__(self, module: nn.Module, exact: bool) -> None:
        self.exact = exact
        self.graph: fx.Graph | None = None
        self.identities: list[str] = []
        self.leaves: dict[nn.Module, str] = {}
        self.children: dict[str, Plan] = {}
        self.problem: str | None = None
        self.stand_in: nn.Module | None = None
        self.images: list[int] = []
        self.inputs = self.slots = 0
        self.functional = True  # no step has effects, or chance, or is code that nothing is known of
        self.steps: list[Step] = []
        try:
            graph = trace(module, self.leaves)
            self.identities = match(graph, module)
        except (Untraceable, Hazard) as problem:
            self.problem = str(problem)
            self.stand_in = self._descend(module, "")
        else:
            self.graph = graph
            self._schedule(module)

    @property
    def kernels(self) -> list[Kernel]:
        return [call for call, _, _ in self.steps if isinstance(call, Kernel)]

    @property
    def sources(self) -> list[Source]:
        return [source for kernel in self.kernels for source in kernel.sources()]

    @property
    def useful(self) -> bool:
        return bool(self.kernels or self.children)

    def _schedule(self, module: nn.Module) -> None:
        """Numbers the values; a step writes over a value that is used for the last time, so that memory is freed in time."""
        modules = dict(module.named_modules(remove_duplicate=False))
        stand_ins = {}
        for name, leaf in modules.items():
            if leaf in self.leaves and leaf not in stand_ins and (stand_in := self._descend(leaf, f"{name}.")):
                stand_ins[leaf] = stand_in
        modules = {name: stand_ins.get(leaf, leaf) for name, leaf in modules.items()}
        last = {argument: node for node in self.graph.nodes for argument in node.all_input_nodes}
        slots: dict[fx.Node, int] = {}
        free: list[int] = []
        for node in self.graph.nodes:
            if node.op == "placeholder":
                slots[node] = self.slots
                self.slots += 1
                self.inputs += 1
                if node.meta.get("assumed"):
                    self.images.append(slots[node])
                continue
            kernel = isinstance(node.target, Kernel)
            arguments = node.args if kernel else node.all_input_nodes
            reads = tuple(slots[argument] for argument in arguments)
            free += [slots[argument] for argument in node.all_input_nodes if last[argument] is node]
            if not free:
                free.append(self.slots)
                self.slots += 1
            slots[node] = free.pop()
            if node not in last:
                free.append(slots[node])
            call = node.target if kernel else _call(node, modules)
            self.functional &= kernel or _function(node, modules)[1]
            self.steps.append((_checked(call) if node.meta.get("assumed") else call, reads, slots[node]))
        self.result = slots[node]

    def _descend(self, module: nn.Module, prefix: str) -> nn.Module | None:
        """A shallow twin of `module`, with the same tensors, whose children run their own plans; None if there is nothing to plan."""
        children: dict[str, nn.Module | None] = {}
        for name, child in module._modules.items():
            children[name] = child
            if child is None or hooked(child):
                continue
            plan = Plan(child, exact=self.exact)
            if plan.program.useful:
                self.children[prefix + name] = plan
                children[name] = _twin(child, forward=plan)
                if plan.program.stand_in is not None:
                    children[name].__dict__["_modules"] = plan.program.stand_in._modules
        return _twin(module, _modules=children) if children != module._modules else None


def _twin(module: nn.Module, **attributes: Any) -> nn.Module:
    twin = type(module).__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__.update(attributes)
    return twin


def _nodes(tree: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(tree, found.append)
    return found


def _rebuild(tree: Any, values: dict[fx.Node, Any]) -> Any:
    """`tree` of FX arguments with its nodes replaced by their values."""
    if isinstance(tree, fx.Node):
        return values[tree]
    if isinstance(tree, tuple):
        items = [_rebuild(item, values) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if isinstance(tree, list):
        return [_rebuild(item, values) for item in tree]
    if isinstance(tree, dict):
        return {key: _rebuild(item, values) for key, item in tree.items()}
    if isinstance(tree, slice):
        return slice(*(_rebuild(item, values) for item in (tree.start, tree.stop, tree.step)))
    return tree


def _call(node: fx.Node, modules: dict[str, nn.Module]) -> Callable[..., Any]:
    """The step for a node that no kernel took: a function of its input values, in the order of `node.all_input_nodes`."""
    nodes = node.all_input_nodes
    if node.op == "get_attr":
        owner, _, name = node.target.rpartition(".")
        return lambda: getattr(modules[owner], name)
    if node.op == "output":
        tree = node.args[0]
        return (lambda value: value) if isinstance(tree, fx.Node) else lambda *values: _rebuild(tree, dict(zip(nodes, values)))
    function, free = _function(node, modules)
    args, kwargs = node.args, node.kwargs
    if list(args) == nodes and not kwargs:
        call = function
    elif len(nodes) == 1 and args and args[0] is nodes[0] and not _nodes((args[1:], kwargs)):
        rest = args[1:]
        call = lambda x: function(x, *rest, **kwargs)  # noqa: E731
    else:

        def call(*values: Any) -> Any:
            known = dict(zip(nodes, values))
            return function(*_rebuild(args, known), **_rebuild(kwargs, known))

    return call if free else lambda *values: call(*map(_contiguous, values))


def _function(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[Any, bool]:
    """What the node calls, and whether that is known to take images in any memory format, without effects."""
    if node.op == "call_module":
        module = modules[node.target]
        return module, type(module).__module__ in _ANY_FORMAT_MODULES and not (hooked(module) or module.training)
    if node.op == "call_method":
        return _method(node.target), node.target in _ANY_FORMAT_METHODS
    return node.target, node.op != "call_function" or node.target in _ANY_FORMAT_FUNCTIONS


class _NoImages(Exception):
    """A value that a convolution reads is no batch of images."""


def _checked(call: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*values: Any) -> Any:
        value = call(*values)
        if not (isinstance(value, Tensor) and value.dim() == 4):
            raise _NoImages
        return value

    return checked


def _method(name: str) -> Callable[..., Any]:
    return lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) and value.dim() == 4 else value


def formatted(value: Any, x: Tensor) -> Any:
    """`value` with its images in the memory format of `x`, the input."""
    if isinstance(value, Tensor):
        if value.dim() != 4:
            return value
        last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        return value.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(formatted(item, x) for item in value))
    if type(value) in (tuple, list):
        return type(value)(formatted(item, x) for item in value)
    if type(value) is dict:
        return {key: formatted(item, x) for key, item in value.items()}
    return value


class Ready(NamedTuple):
    """A program with its kernels' weights folded and packed. Immutable, so that threads can share it."""

    program: Program
    watch: Watch
    steps: list[Step] | None
    whole: Whole | None = None


class Plan:
    """Runs `module` (in eval mode) through fastconv's kernels, without gradients.

    `plan(*args)` gives what the module's `method`, its forward, gives. Weights are folded and packed on the first call and again,
    layer by layer, when the module's tensors change; a changed submodule or hook makes a new program. Calls that a plan does not
    serve (keywords, arguments with default values, tensors that want gradients, inputs that are not batches of images) go to the
    module's `method`. Threads may share a plan. exact: only kernels that add up products directly.
    """

    def __init__(self, module: nn.Module, method: str = "forward", *, exact: bool = False) -> None:
        self.module = module
        self.method = method
        self.exact = exact
        self._ready: Ready | None = None
        self._program: Program | None = None
        self._direct: tuple[Ready, int, Direct | None] | None = None
        self._lock = threading.RLock()

    @property
    def program(self) -> Program:
        """The program, found on first use; without weights yet."""
        with self._lock:
            if self._ready is not None:
                return self._ready.program
            if self._program is None:
                self._program = Program(self.module, self.exact)
            return self._program

    def prepare(self) -> Ready:
        """The program with weights as they are now."""
        ready = self._ready
        if ready is not None and ready.watch.unchanged():
            return ready
        with self._lock:
            if self._ready is None or not self._ready.watch.unchanged():
                # Outside inference mode, for the packed tensors outlive it.
                with torch.inference_mode(False), torch.no_grad():
                    ready = self._renewed(self._ready)
                    for device in {tensor.device for tensor in ready.watch.tensors if tensor.is_cuda}:
                        torch.cuda.current_stream(device).synchronize()  # the next to read the weights may be on another stream
                    self._ready = ready
            return self._ready

    def prepare_portably(self) -> Ready:
        """The same with weights packed as every machine's kernels take them."""
        ready = self.prepare()
        calls = [call for call, _, _ in ready.steps or () if isinstance(call, Prepared)]
        if not any(tensor.dtype == torch.int32 for call in calls for tensor in call.tensors):  # digits, in any part of a block
            return ready
        with self._lock, torch.inference_mode(False), torch.no_grad(), portable():
            return self._renewed(None)

    def _renewed(self, old: Ready | None) -> Ready:
        program = old.program if old and old.watch.same_structure() else None
        watch = program and Watch(self.module, program.sources)
        if program is None or watch.shapes != old.watch.shapes:
            old = None
            program = self._program or Program(self.module, self.exact)
            self._program = None
            watch = Watch(self.module, program.sources)
        layers = [layer for call, _, _ in program.steps if isinstance(call, Kernel) for layer in call.every_layer()]
        for layer in layers:
            layer.check()
        if not program.kernels or any(tensor.is_meta for tensor in watch.tensors) or not all(layer.foldable() for layer in layers):
            return Ready(program, watch, None)
        like = next(iter(watch.tensors), None)
        changed = old.watch.changed(watch) if old and old.steps else None
        keeps = [
            isinstance(call, Kernel)
            and changed is not None
            and not any(source.place() in changed for source in call.sources())
            and not joined(old.steps[i][0])  # which holds its neighbour's weights
            for i, (call, _, _) in enumerate(program.steps)
        ]
        fresh = [call for (call, _, _), keep in zip(program.steps, keeps) if isinstance(call, Kernel) and not keep]
        block = Block(sum(layer.weight.tensor().nbytes for call in fresh for layer in call.every_layer() if layer.weight.tensor().is_cpu))
        steps = []
        reductions = [1] * program.slots
        for i, (call, reads, write) in enumerate(program.steps):
            reductions[write] = max((reductions[slot] for slot in reads), default=1) * (call.reduction if isinstance(call, Kernel) else 1)
            if keeps[i]:
                call = old.steps[i][0]
            elif isinstance(call, Kernel):
                call = call.prepare(like, self.exact, reductions[write])
                block.take(call)
            steps.append((call, reads, write))
        block.finish()
        if program.graph is not None:
            calls = join(program.graph, [call for call, _, _ in steps])
            steps = [(call, reads, write) for call, (_, reads, write) in zip(calls, steps)]
        return Ready(program, watch, steps, whole(program.graph, [call for call, _, _ in steps]) if program.graph else None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        grad = torch.is_grad_enabled()
        if not kwargs and args and exporting() and all(isinstance(x, Tensor) and not x.requires_grad for x in args):
            ready = snapshot(self)
            if ready is not None:
                return self.follow(ready, *args, whole=Whole.network)
        if kwargs or not args or not all(plain(x) and not (grad and x.requires_grad) for x in args):
            return getattr(self.module, self.method)(*args, **kwargs)
        return self.run(*args)

    def direct(self, off: list[Callable[[], object]]) -> Direct | None:
        """`Whole.direct` for the weights that were last prepared and the hooks that there are now; off: always the same."""
        ready, handles = self._ready, RemovableHandle.next_id
        if ready is None or ready.whole is None or ready.watch.quick is None or ready.watch.handles != handles:
            return None
        if self._direct is None or self._direct[0] is not ready or self._direct[1] != handles:
            self._direct = ready, handles, ready.whole.direct(ready.watch.quick, off)
        return self._direct[2]

    def run(self, *args: Tensor) -> Any:
        """The call itself, for plain tensors that want no gradient."""
        return self.follow(self.prepare(), *args)

    def follow(self, ready: Ready, *args: Tensor, whole: Callable[[Whole, Tensor], Tensor] = Whole.__call__) -> Any:
        """The same with weights as `prepare` gave them; whole: how to call the plan as one operator."""
        program, _, steps, together = ready
        if together is not None and len(args) == 1 and together.serves(args[0]):
            result = whole(together, args[0])
            return result if together.flatten else formatted(result, args[0])
        if program.stand_in is not None:
            return getattr(program.stand_in, self.method)(*args)
        if steps is None or len(args) != program.inputs or any(args[i].dim() != 4 for i in program.images):
            return getattr(self.module, self.method)(*args)
        values = [*args, *[None] * (program.slots - len(args))]
        try:
            for call, reads, write in steps:
                values[write] = call(*[values[i] for i in reads])
        except _NoImages:
            return getattr(self.module, self.method)(*args)
        return formatted(values[program.result], args[0])
