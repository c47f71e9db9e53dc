"""The drop-in module: a model's copy that runs as a plan."""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
from torch import Tensor, nn

from fastconv.optimize import graphs
from fastconv.optimize.graphs import Graphs
from fastconv.optimize.plan import Plan
from fastconv.optimize.traced import Traced, compiled

_making = threading.Lock()


class OptimizedModule(Traced):
    """What `optimize` returns. Holds the model's copy, whose parameters, buffers, submodules and hooks are its own, under the same names:
    state_dict, load_state_dict, to, parameters, deepcopy and pickle are those of the copy.

    cuda_graphs: whether calls with CUDA tensors are captured as CUDA graphs and replayed; FASTCONV_CUDA_GRAPHS=0 turns it off everywhere.
    reuse_outputs: whether such a call may return a buffer that the next call with inputs of the same shape overwrites."""

    cuda_graphs: bool = True
    reuse_outputs: bool = False
    _graphs: Graphs | None = None

    def __init__(self, model: nn.Module, *, exact: bool = False) -> None:
        super().__init__()
        # The dictionaries themselves, so that what is set here or there is seen on both sides.
        self.__dict__.update({name: value for name, value in model.__dict__.items() if name in self.__dict__})
        self.__dict__["_original"] = model
        self.exact = exact

    @property
    def plan(self) -> Plan:
        plan = self._plan
        if plan is None:
            plan = self._plan = Plan(self._original, exact=self.exact)
        return plan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            return self._original.forward(*args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            return compiled(self, self._original.forward, *args, **kwargs)
        plan = self.plan
        if args and type(args[0]) is Tensor and graphs.backend.serves(args[0]) and not kwargs and not torch.compiler.is_compiling():
            if self.cuda_graphs and graphs.enabled:
                return self._graphs_of(plan)(args, self.reuse_outputs)
            self._graphs = None
        return plan(*args, **kwargs)

    def _graphs_of(self, plan: Plan) -> Graphs:
        made = self._graphs
        if made is None or made.plan is not plan:
            with _making:
                made = self._graphs
                if made is None or made.plan is not plan:
                    made = self._graphs = Graphs(plan)
        return made

    def cuda_graph_report(self) -> list[str]:
        """One line for each kind of input that has a CUDA graph, or that cannot have one and why."""
        return self._graphs.report() if self._graphs is not None else []

    def _plan_now(self) -> Plan:
        return self.plan

    def train(self, mode: bool = True) -> OptimizedModule:
        if any(module.training != mode for module in self.modules()):
            self._plan = self._graphs = self._direct = None
        self._original.train(mode)
        self.training = mode
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> OptimizedModule:
        self._plan = self._graphs = self._direct = None
        self._original._apply(fn, recurse)
        return self

    def _replicate_for_data_parallel(self) -> OptimizedModule:
        raise RuntimeError("DataParallel cannot replicate an optimized module: optimize a copy of the model on each device")

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._original.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # as a submodule of a module that loads
        self._original._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"of {type(self._original).__name__}"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_original" not in self.__dict__:  # while it is unpickled
                raise
            return getattr(self._original, name)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "_graphs"}


def optimize(model: nn.Module, *, dtype: torch.dtype | None = None, exact: bool = False, share: bool = False) -> OptimizedModule:
    """A copy of `model` for inference, in eval mode, that runs through fastconv's kernels; `model` itself is not touched.

    `fast(x)` returns what `model.eval()(x)` returns, up to rounding (logits within 1e-5 relative in float32): convolutions with their
    batch norm and activation, depthwise-separable blocks, inverted residuals with squeeze-excitation, fires, stems, 3x3 max pools,
    global average pools and classifiers are found by structure, whatever classes they come in; `explain` tells each submodule's fate.
    Layers that no kernel takes, and submodules with hooks, run as they are. x: (N, C, H, W), NCHW or channels_last; the output keeps
    its memory format.

    Inference only: in train mode, and where x requires a gradient, the copy runs as plain torch; parameters get no gradients otherwise.
    Under autocast, torch.func and ONNX export it runs as plain torch too; torch.compile and torch.export take its kernels.
    Parameters and buffers may change at any time (load_state_dict, in-place updates, `.to()`); only writes that torch does not count
    go unnoticed: in place through `.data`, or into tensors made in inference mode. Other attributes (a stride, an eps, one submodule's
    train mode) are read once. Hooks that are registered later keep their submodule out of the kernels. Threads may share the module.

    dtype: a floating dtype to cast the copy to; its inputs must then have that dtype.
    exact: only kernels that add up products directly. Otherwise a fire's 3x3 expand goes through Winograd's F(4x4, 3x3), with 2e-6 to
        3e-6 of the largest output as its error, a 7 wide first layer of stride 2 through F(4, 4) along its rows (1e-6), and 1x1
        convolutions of 256 channels and more, down to a sixteenth of a 224x224 image's height and width, through one step of Strassen's
        algorithm (1.5e-6 to 5e-6), or, where the CPU has a matrix unit, those of 64 and more as digits (as accurate as direct sums, but
        relative to the largest numbers that meet); logits are then within 1e-5 relative, with exact within 1e-6.
    share: the parameters and buffers are the model's own, not copies, which saves their memory (MobileNet V3 large: 21 MB). Training the
        model further then shows in `fast`, and what is done to the one's tensors, `.to()` and load_state_dict too, is done to the other's.
    Raises TypeError if `model` is no torch.nn.Module or holds a sparse tensor, `dtype` is no floating dtype, `exact` or `share` no bool,
    ValueError if a layer's bias or norm does not fit its convolution, or a shared tensor is not of `dtype`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize: model must be a torch.nn.Module, got {type(model).__name__}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"optimize: dtype must be a floating torch.dtype, got {dtype!r}")
    for name, flag in (("exact", exact), ("share", share)):
        if not isinstance(flag, bool):
            raise TypeError(f"optimize: {name} must be True or False, got {flag!r}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.layout != torch.strided:  # which torch cannot copy
            raise TypeError(f"optimize: {name} must be a dense Tensor, got {tensor.layout}")
        if share and dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype:
            raise ValueError(f"optimize: {name} must be {dtype} to be shared, got {tensor.dtype}")
    shared = [*model.parameters(), *model.buffers()] if share else []
    fast = OptimizedModule(_reverted(copy.deepcopy(model, {id(tensor): tensor for tensor in shared})).eval(), exact=exact)
    if dtype is not None:
        fast.to(dtype)
    fast.plan.prepare()
    return fast


def revert(module: nn.Module) -> nn.Module:
    """A copy of an optimized module in its original architecture, with its own, unfolded parameters.

    `module` may also hold optimized modules at any depth, or none. Raises TypeError if it is no torch.nn.Module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"revert: module must be a torch.nn.Module, got {type(module).__name__}")
    return _reverted(copy.deepcopy(module))


def _reverted(module: nn.Module) -> nn.Module:
    if isinstance(module, OptimizedModule):
        return _reverted(module._original)
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _reverted(child)
    return module
