"""Finds fastconv's kernels in an FX graph, by structure: what is computed from what, never by class names.

`match` rewrites the graph in place. First every node is read: a convolution or linear map becomes a Layer, an activation in any
spelling becomes its function, identities go away. Then layers absorb their neighbours (batch norm, activation, residual) and are
joined into blocks. A value is absorbed only when it has a single user, a residual only when its shape is proven equal to the sum's.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastconv.optimize.layers import ACTIVATIONS, Kernel, Layer, Norm, Source, kernel_of
from fastconv.optimize.trace import hooked

# A symbolic shape: (batch, channels, space) of an image, (batch, features) of a vector. `space` lists what has changed height and
# width on the way from the input; () is 1x1. Equal symbols mean equal sizes.
Shape = tuple[Any, ...]


class Hazard(Exception):
    """The module writes into a value that something else may read later, so calls cannot be moved."""


_FUNCTIONS = {**ACTIVATIONS, "sigmoid": torch.sigmoid}
_ACTIVATION_MODULES = {
    nn.ReLU.forward: "relu",
    nn.Hardswish.forward: "hardswish",
    nn.Hardsigmoid.forward: "hardsigmoid",
    nn.SiLU.forward: "silu",
    nn.Sigmoid.forward: "sigmoid",
}
_ACTIVATION_CALLS = {
    **{function: name for name, function in _FUNCTIONS.items()},
    **dict.fromkeys((torch.relu, torch.relu_, F.relu_, "relu", "relu_"), "relu"),
    **dict.fromkeys((torch.sigmoid_, F.sigmoid, "sigmoid", "sigmoid_"), "sigmoid"),
}
_CLAMPS = (torch.clamp, torch.clamp_, "clamp", "clamp_", F.hardtanh, F.hardtanh_)
_DROPOUT_MODULES = (nn.Dropout.forward, nn.Dropout2d.forward, nn.AlphaDropout.forward, nn.FeatureAlphaDropout.forward)
_DROPOUT_CALLS = (F.dropout, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout)
_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
_MUL = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_DIV = (operator.truediv, operator.itruediv, torch.div, "div", "div_")
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_SPLITS = ("chunk", "split", torch.chunk, torch.split)
_OUT_OF_PLACE = {operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul, operator.itruediv: operator.truediv}


def match(graph: fx.Graph, root: nn.Module) -> list[str]:
    """Rewrites `graph`: what fastconv takes becomes call_function nodes whose target is a Kernel; the rest stays as it is.

    Every node's meta tells the modules it stands for ("names") and, of those that stay, why ("reason"). Returns the names of the
    modules that do nothing in eval mode.
    Raises Hazard, with the graph half rewritten, when in-place operations of the module forbid it.
    """
    reader = _Reader(graph, root)
    for node in list(graph.nodes):
        reader.read(node)
    for node in reversed(graph.nodes):  # weights of what is now a layer, sizes that only a reshape asked for
        if not node.users and (node.op == "get_attr" or _calls(node, ("size", "dim", getattr, operator.getitem))):
            graph.erase_node(node)
    for step in (_absorb, _join_inverted_residual, _join_separable, _join_fire):
        for node in list(graph.nodes):
            if not node._erased:
                step(node)
    for node in graph.nodes:
        if isinstance(node.target, Layer):
            node.target = kernel_of(node.target)
    return reader.identities


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return (value, value)
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(item, int) for item in value):
        return tuple(value)
    return None


def _calls(node: Any, targets: Iterable[Any]) -> bool:
    """Whether `node` calls one of the functions, or the methods named by a string."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return False
    return any(node.target == target if isinstance(target, str) else node.target is target for target in targets)


def _arguments(node: fx.Node, names: str, **defaults: Any) -> dict[str, Any] | None:
    """The node's arguments by name; None when it has others."""
    order = names.split()
    values = {**dict.fromkeys(order), **defaults, **dict(zip(order, node.args)), **node.kwargs}
    return values if len(node.args) <= len(order) and values.keys() <= set(order) else None


def _activation(node: fx.Node, module: nn.Module | None) -> str | None:
    """The activation that a single call is."""
    if module is not None:
        return _activation_of_module(module)
    if _calls(node, _ACTIVATION_CALLS):
        return _ACTIVATION_CALLS[node.target]
    if _calls(node, _CLAMPS):
        names = "input min_val max_val inplace" if node.target in (F.hardtanh, F.hardtanh_) else "input min max"
        values = _arguments(node, names)
        return values and _clamp(*list(values.values())[1:3])
    return None


def _activation_of_module(module: nn.Module) -> str | None:
    if type(module).forward is nn.Hardtanh.forward:
        return _clamp(module.min_val, module.max_val)
    return _ACTIVATION_MODULES.get(type(module).forward)


def _inplace_argument(node: fx.Node) -> bool:
    try:
        return inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments.get("inplace", False) is not False
    except (TypeError, ValueError):  # not a Python function, so none with such an argument
        return False


def _single(node: fx.Node) -> bool:
    return len(node.users) == 1


def _layer(node: Any) -> Layer | None:
    """The layer that `node` computes from a single input."""
    return node.target if isinstance(node, fx.Node) and isinstance(node.target, Layer) and len(node.args) == 1 else None


def _image(node: Any) -> Shape | None:
    shape = node.meta.get("shape") if isinstance(node, fx.Node) else None
    return shape if shape and len(shape) == 3 else None


def _become(node: fx.Node, target: Any, args: tuple, absorbed: Iterable[fx.Node] = ()) -> None:
    """Makes `node` compute `target` of `args`, in place of itself and of the `absorbed` nodes (latest first)."""
    node.op, node.target, node.args, node.kwargs = "call_function", target, args, {}
    for other in absorbed:
        node.meta["names"] = other.meta["names"] + node.meta["names"]
        if not other.users:
            other.graph.erase_node(other)


class _Reader:
    """Reads nodes in order, knowing the shapes of the values before them."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.root = root
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.index = {node: i for i, node in enumerate(graph.nodes)}
        self.identities: list[str] = []
        self.inputs = [node for node in graph.nodes if node.op == "placeholder"]

    def read(self, node: fx.Node) -> None:
        node.meta["names"] = self.names(node)
        module = self.modules[node.target] if node.op == "call_module" else None
        if node.op == "placeholder":
            if len(self.inputs) == 1:
                node.meta.update(shape=(node, node, node), assumed=True)
            return
        if node.op in ("get_attr", "output"):
            return
        if module is not None and hooked(module):
            node.meta["reason"] = "it has hooks"
            return
        self.check_writes(node, module)
        x = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if x is not None and self.identity(node, module):
            self.identities += node.meta["names"]
            node.replace_all_uses_with(x)
            node.graph.erase_node(node)
            return
        if x is None:
            self.cat(node)
            return
        if x.meta.get("shape") is None and self.takes_images(node, module):  # told by its reader; the plan checks it as it runs
            x.meta.update(shape=(x, x, x), assumed=True)
        for reading in (
            self.activation,
            self.convolution,
            self.linear,
            self.norm,
            self.pool,
            self.mean_of_means,
            self.reshape,
            self.arithmetic,
        ):
            if reading(node, x, module):
                return
        self.unknown(node, x, module)

    # What a node is

    def names(self, node: fx.Node) -> list[str]:
        """The module that a node stands for, if it is the node's own: called whole, or without submodules."""
        if node.op == "call_module":
            return [node.target]
        if node.op not in ("call_function", "call_method"):
            return []
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        owner = stack[-1][0] if stack else ""
        return [] if self.modules[owner]._modules else [owner]

    def takes_images(self, node: fx.Node, module: nn.Module | None) -> bool:
        return isinstance(module, (nn.Conv2d, nn.BatchNorm2d, *_POOLS)) or _calls(node, (F.conv2d, torch.conv2d, F.max_pool2d))

    def check_writes(self, node: fx.Node, module: nn.Module | None) -> None:
        """Turns an in-place call into its out-of-place twin, which is the same while nothing reads the old value afterwards."""
        name = type(module).__name__ if module else getattr(node.target, "__name__", str(node.target))
        if "out" in node.kwargs:
            raise Hazard(f"{name} writes into its argument out")
        if module is not None:
            writes = getattr(module, "inplace", False) and not isinstance(module, nn.modules.dropout._DropoutNd)
        elif getattr(node.target, "__module__", "") == "torch.nn.functional":
            writes = _inplace_argument(node) and not _calls(node, _DROPOUT_CALLS)
        else:
            writes = node.target in _OUT_OF_PLACE or (name.endswith("_") and not name.endswith("__"))
        if not writes:
            return
        written = node.args[0] if node.args else None
        if not (isinstance(written, fx.Node) and written.meta.get("fresh")):
            raise Hazard(f"{name} writes into a value that may be shared")
        if any(self.index[user] > self.index[node] for user in written.users):
            raise Hazard(f"{name} writes into a value that is read later")
        if node.target in _OUT_OF_PLACE:
            node.target = _OUT_OF_PLACE[node.target]
        elif node.op == "call_method" and hasattr(Tensor, name[:-1]):
            node.target = name[:-1]
        elif not (_single(written) or _activation(node, module)):  # an activation becomes its function
            raise Hazard(f"{name} writes into a value with other readers")

    def identity(self, node: fx.Node, module: nn.Module | None) -> bool:
        if module is not None:
            forward = type(module).forward
            return forward is nn.Identity.forward or (forward in _DROPOUT_MODULES and not module.training)
        if _calls(node, _DROPOUT_CALLS):
            return node.kwargs.get("training", True) is False or (len(node.args) > 2 and node.args[2] is False)
        if node.op == "call_function" and getattr(node.target, "__name__", "") == "stochastic_depth":  # torchvision wraps it for FX
            return node.kwargs.get("training", True) is False or (len(node.args) > 3 and node.args[3] is False)
        return False

    def source(self, node: Any) -> Source | None:
        """The parameter or buffer that a get_attr node fetches."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        prefix, _, key = node.target.rpartition(".")
        return _source(self.modules.get(prefix), key)

    # The readings: each returns whether it knew the node

    def activation(self, node: fx.Node, x: fx.Node, module: nn.Module | None) -> bool:
        name = _activation(node, module)
        if name is None and _calls(node, _MUL) and len(node.args) == 2 and not node.kwargs:
            name, x = self.product(*node.args) or (None, x)
        elif _calls(node, _DIV) and node.args[1:] == (6,) and not node.kwargs:
            name, x = self.hard(x) or (None, x)
        if name is None:
            return False
        _become(node, _FUNCTIONS[name], (x,), _between(node, x))
        node.meta.update(activation=name, shape=x.meta.get("shape"), fresh=True)
        return True

    def product(self, a: Any, b: Any) -> tuple[str, fx.Node] | None:
        """x * sigmoid(x) is silu, x * hardsigmoid(x) is hardswish, relu6(x + 3) * (1/6) is hardsigmoid."""
        for x, gate in ((a, b), (b, a)):
            if isinstance(gate, fx.Node) and gate.meta.get("activation") in ("sigmoid", "hardsigmoid") and gate.args[0] is x:
                return ("silu" if gate.meta["activation"] == "sigmoid" else "hardswish"), x
            if isinstance(gate, float) and math.isclose(gate, 1 / 6) and (shifted := _relu6_of_plus_3(x)):
                return "hardsigmoid", shifted
        return None

    def hard(self, x: fx.Node) -> tuple[str, fx.Node] | None:
        """relu6(x + 3) / 6 is hardsigmoid, x * relu6(x + 3) / 6 is hardswish."""
        if shifted := _relu6_of_plus_3(x):
            return "hardsigmoid", shifted
        if _calls(x, _MUL) and len(x.args) == 2 and not x.kwargs:
            for value, gate in (x.args, x.args[::-1]):
                if isinstance(value, fx.Node) and _relu6_of_plus_3(gate) is value:
                    return "hardswish", value
        return None

    def convolution(self, node: fx.Node, x: fx.Node, module: nn.Module | None) -> bool:
        if isinstance(module, nn.Conv2d):
            if type(module).forward is not nn.Conv2d.forward or type(module)._conv_forward is not nn.Conv2d._conv_forward:
                node.meta["reason"] = f"{type(module).__name__} has a forward of its own"
                return False
            if module.padding_mode != "zeros":
                node.meta["reason"] = f"padding_mode {module.padding_mode!r}"
                return False
            weight, bias = _source(module, "weight"), _source(module, "bias")
            if weight is None or (bias is None and module.bias is not None):
                node.meta["reason"] = "its weight is computed"
                return False
            geometry = (module.stride, module.padding, module.dilation, module.groups)
        elif _calls(node, (F.conv2d, torch.conv2d)):
            values = _arguments(node, "input weight bias stride padding dilation groups", stride=1, padding=0, dilation=1, groups=1)
            if values is None:
                return False
            weight, bias = self.source(values["weight"]), self.source(values["bias"])
            if weight is None or (bias is None and values["bias"] is not None):
                return False
            geometry = tuple(values[name] for name in ("stride", "padding", "dilation", "groups"))
        else:
            return False
        if _image(x) is None:
            node.meta["reason"] = "its input is not known to be a batch of images"
            return False
        shape = tuple(weight.tensor().shape)
        stride, padding, dilation, groups = geometry
        stride, dilation = _pair(stride), _pair(dilation)
        if padding == "valid":
            padding = 0
        if padding == "same" and dilation and all(d * (k - 1) % 2 == 0 for d, k in zip(dilation, shape[2:])):
            padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, shape[2:]))
        padding = _pair(padding)
        if not (stride and padding and dilation and isinstance(groups, int)):
            node.meta["reason"] = "its padding is not symmetric"
            return False
        layer = Layer(weight, bias, shape, stride, padding, dilation, groups)
        _become(node, layer, (x,))
        node.meta.update(shape=_convolved(x, shape[0], shape[2:], stride, padding, dilation), fresh=True)
        return True

    def linear(self, node: fx.Node, x: fx.Node, module: nn.Module | None) -> bool:
        if module is not None and type(module).forward is nn.Linear.forward:
            weight, bias = _source(module, "weight"), _source(module, "bias")
            known = bias is not None or module.bias is None
        elif _calls(node, (F.linear,)) and (values := _arguments(node, "input weight bias")):
            weight, bias = self.source(values["weight"]), self.source(values["bias"])
            known = bias is not None or values["bias"] is None
        else:
            return False
        shape = x.meta.get("shape")
        if weight is None or not known or shape is None or len(shape) != 2:
            node.meta["reason"] = "its input is not known to be a batch of vectors"
            return False
        _become(node, Layer(weight, bias, tuple(weight.tensor().shape)), (x,))
        node.meta.update(shape=(shape[0], weight.tensor().shape[0]), fresh=True)
        return True

    def norm(self, node: fx.Node, x: fx.Node, module: nn.Module | None) -> bool:
        activation = None
        if isinstance(module, nn.BatchNorm2d):
            if module.training or module.running_mean is None:
                node.meta["reason"] = "it normalises by the batch"
                return False
            if type(module).forward is not nn.BatchNorm2d.forward:
                known, activation = self.timm_norm(node, module)
                if not known:
                    node.meta["reason"] = f"{type(module).__name__} has a forward of its own"
                    return False
            sources = [_source(module, key) for key in ("running_mean", "running_var", "weight", "bias")]
            given = (True, True, module.weight is not None, module.bias is not None)
            eps = module.eps
        elif _calls(node, (F.batch_norm,)):
            names = "input running_mean running_var weight bias training momentum eps"
            values = _arguments(node, names, training=False, momentum=0.1, eps=1e-5)
            if values is None or values["training"] is not False:
                return False
            keys = ("running_mean", "running_var", "weight", "bias")
            sources = [self.source(values[key]) for key in keys]
            given = (True, True, *(values[key] is not None for key in keys[2:]))
            eps = values["eps"]
        else:
            return False
        if _image(x) is None or any(is_given and source is None for source, is_given in zip(sources, given)) or eps < 0:
            return False  # ATen refuses an eps below 0
        node.meta.update(norm=Norm(*sources, eps), activation=activation, shape=x.meta["shape"], fresh=True)
        return True

    def timm_norm(self, node: fx.Node, module: nn.Module) -> tuple[bool, str | None]:
        """timm's norms that hold a dropout and an activation: whether this is one whose parts are known, and the activation."""
        parts = dict(module.named_children())
        if not type(module).__module__.startswith("timm.") or parts.keys() != {"drop", "act"} or any(map(hooked, parts.values())):
            return False, None
        drop, act = parts["drop"], parts["act"]
        if type(drop).forward is not nn.Identity.forward:
            return False, None
        name = _activation_of_module(act)
        node.meta["names"] += [f"{node.target}.{part}" for part in parts]
        return type(act).forward is nn.Identity.forward or name in ACTIVATIONS, name

    def pool(self, node: fx.Node, x: fx.Node, module: nn.Module | None) -> bool:
        if _image(x) is None:
            return False
        if module is not None and type(module).forward is nn.MaxPool2d.forward:
            values = {key: getattr(module, key) for key in ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")}
        elif _calls(node, (F.max_pool2d, torch.max_pool2d)):
            names = "input kernel_size stride padding dilation ceil_mode return_indices"
            values = _arguments(node, names, padding=0, dilation=1, ceil_mode=False, return_indices=False)
        else:
            return self.global_pool(node, x, module)
        if values is None or values["return_indices"] is not False:
            return False
        window, dilation, padding = (_pair(values[key]) for key in ("kernel_size", "dilation", "padding"))
        stride = window if values["stride"] in (None, []) else _pair(values["stride"])
        if window is None or stride is None or dilation is None or padding is None:
            return False
        ceil_mode = bool(values["ceil_mode"])
        node.meta.update(shape=_convolved(x, x.meta["shape"][1], window, stride, padding, dilation, ceil_mode), fresh=True)
        if (window, dilation) != ((3, 3), (1, 1)) or stride not in ((1, 1), (2, 2)):
            node.meta["reason"] = f"a {window[0]}x{window[1]} window with stride {stride[0]}x{stride[1]}"
            return True
        _become(node, Kernel("max_pool", options={"stride": stride, "padding": padding, "ceil_mode": ceil_mode}), (x,))
        return True

    def global_pool(self, node: fx.Node, x: fx.Node, module: nn.Module | None) -> bool:
        keep = True
        if module is not None and type(module).forward is nn.AdaptiveAvgPool2d.forward:
            size = module.output_size
        elif _calls(node, (F.adaptive_avg_pool2d,)):
            size = (_arguments(node, "input output_size") or {}).get("output_size")
        elif _calls(node, (F.avg_pool2d,)) and (values := _arguments(node, "input kernel_size")):
            if not _is_size_of_pixels(values["kernel_size"], x):
                return False
            size = 1
        elif (mean := _mean(node)) and sorted(axis % 4 for axis in mean[0]) == [2, 3]:
            size, keep = 1, mean[1]
        else:
            return False
        if _pair(size) != (1, 1):
            node.meta["reason"] = "it pools to more than one pixel"
            return False
        self.become_global_pool(node, x, keep)
        return True

    def mean_of_means(self, node: fx.Node, x: fx.Node, module: nn.Module | None) -> bool:
        """y.mean(3).mean(2), as networks older than means over several axes have it."""
        inner, outer = _mean(x), _mean(node)
        if not (inner and outer and _single(x) and _image(x.args[0])) or inner[1] or outer[1]:
            return False
        if inner[0][0] % 4 not in (2, 3) or len(inner[0]) > 1 or [axis % 3 for axis in outer[0]] != [2]:
            return False
        self.become_global_pool(node, x.args[0], keep=False)
        node.graph.erase_node(x)
        return True

    def become_global_pool(self, node: fx.Node, x: fx.Node, keep: bool) -> None:
        """keep: whether the result is (N, C, 1, 1); (N, C) if not."""
        batch, channels, _ = x.meta["shape"]
        _become(node, Kernel("global_avg_pool"), (x,))
        node.meta.update(shape=(batch, channels, ()), fresh=True)
        if not keep:
            with node.graph.inserting_after(node):
                flat = node.graph.call_function(torch.flatten, (node, 1))
            self.index[flat] = self.index[node]
            node.replace_all_uses_with(flat, delete_user_cb=lambda user: user is not flat)
            flat.meta.update(names=[], shape=(batch, channels), reshape=True, fresh=True)

    def reshape(self, node: fx.Node, x: fx.Node, module: nn.Module | None) -> bool:
        """Between (N, C, 1, 1) or (N, C, H, W) and vectors, however it is written."""
        shape = x.meta.get("shape") or ()
        target = None
        if module is not None and type(module).forward is nn.Flatten.forward:
            target = (module.start_dim, module.end_dim)
        elif _calls(node, (torch.flatten, "flatten")) and (values := _arguments(node, "input start_dim end_dim", start_dim=0, end_dim=-1)):
            target = (values["start_dim"], values["end_dim"])
        elif _calls(node, (torch.reshape, "view", "reshape")):
            sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
            if shape and len(sizes) in (2, 4) and _size(sizes[0]) == (shape[0], 0):
                pixel = shape[2:] in ((), ((),))  # (N, C) or (N, C, 1, 1)
                channels = sizes[1] == -1 or (pixel and (sizes[1] == shape[1] or _size(sizes[1]) == (shape[1], 1)))
                if len(sizes) == 2 and channels:
                    target = (1, -1)
                elif pixel and channels and tuple(sizes[2:]) == (1, 1):
                    _become(node, _unflatten, (x,))
                    node.meta.update(shape=(*shape[:2], ()), reshape=True)
                    return True
            if target is None and len(sizes) in (2, 4):
                node.meta["shape"] = (node, node, node) if len(sizes) == 4 else (node, node)
                return True
        if target == (1, -1) and len(shape) == 3:
            _become(node, torch.flatten, (x, 1))
            node.meta.update(shape=(shape[0], shape[1] if shape[2] == () else node), reshape=True)
            return True
        return False

    def arithmetic(self, node: fx.Node, x: fx.Node, module: nn.Module | None) -> bool:
        if not _calls(node, (*_ADD, *_MUL, *_DIV)) or len(node.args) != 2 or node.kwargs:
            return False
        if isinstance(node.args[1], (int, float)):
            node.meta.update(shape=x.meta.get("shape"), fresh=True)
            return True
        if _calls(node, _DIV) or not isinstance(node.args[1], fx.Node):
            return False
        a, b = (arg.meta.get("shape") for arg in node.args)
        if a is None or b is None:
            return False
        if a == b:
            shape = a
        elif len(a) == len(b) == 3:
            same_image = a[:2] == b[:2]
            shape = a if same_image and b[2] == () else b if same_image and a[2] == () else (node, node, node)
        else:
            return False
        node.meta.update(shape=shape, fresh=True, **({"sum": True} if _calls(node, _ADD) else {"product": True}))
        return True

    def cat(self, node: fx.Node) -> None:
        values = _arguments(node, "tensors dim", dim=0) if _calls(node, (torch.cat, torch.concat)) else None
        if not values or not isinstance(values["tensors"], (tuple, list)) or values["dim"] not in (1, -3):
            return
        shapes = [_image(tensor) for tensor in values["tensors"]]
        if all(shapes):
            channels = [shape[1] for shape in shapes]
            total = sum(channels) if all(isinstance(count, int) for count in channels) else node
            node.meta.update(shape=(shapes[0][0], total, shapes[0][2]), fresh=True, cat=list(values["tensors"]))

    def unknown(self, node: fx.Node, x: fx.Node, module: nn.Module | None) -> None:
        """Of the calls that stay as they are, some are known to take images to images."""
        if type(module).__module__ == "torch.nn.modules.activation" and not isinstance(module, nn.MultiheadAttention):
            node.meta.update(shape=x.meta.get("shape"), fresh=True)
        elif isinstance(module, (*_POOLS, nn.Upsample, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)):
            node.meta.update(shape=_image(x) and (node, node, node), fresh=True)
        elif _calls(node, ("expand_as",)) and isinstance(node.args[1], fx.Node):
            node.meta["shape"] = node.args[1].meta.get("shape")
        elif _calls(node, ("contiguous",)):
            node.meta["shape"] = x.meta.get("shape")
        elif _calls(node, (operator.getitem,)):
            part = isinstance(node.args[1], int) and _calls(x, _SPLITS) and _image(x.args[0])
            slices = isinstance(node.args[1], tuple) and _image(x) and all(isinstance(index, slice) for index in node.args[1])
            if part or slices:
                node.meta["shape"] = (node, node, node)


def _mean(node: Any) -> tuple[list[int], bool] | None:
    """The axes and keepdim of a mean."""
    values = _arguments(node, "input dim keepdim", keepdim=False) if _calls(node, (torch.mean, "mean")) else None
    axes = values and ([values["dim"]] if isinstance(values["dim"], int) else values["dim"])
    if not (isinstance(axes, (tuple, list)) and all(isinstance(axis, int) for axis in axes) and isinstance(values["keepdim"], bool)):
        return None
    return list(axes), values["keepdim"]


def _is_size_of_pixels(size: Any, x: fx.Node) -> bool:
    """Whether `size` is x.size()[2:] or x.shape[2:]."""
    if not (_calls(size, (operator.getitem,)) and size.args[1] in (slice(2, None), slice(-2, None), slice(2, 4))):
        return False
    sizes = size.args[0]
    asked = (_calls(sizes, ("size",)) and len(sizes.args) == 1) or (_calls(sizes, (getattr,)) and sizes.args[1:] == ("shape",))
    return asked and sizes.args[0] is x


def _unflatten(x: Tensor) -> Tensor:
    """(N, C) or (N, C, 1, 1) -> (N, C, 1, 1)"""
    return x.reshape(*x.shape[:2], 1, 1)


def _source(module: nn.Module | None, key: str) -> Source | None:
    """The parameter or buffer `key` that `module` itself holds."""
    for owner in (module._parameters, module._buffers) if module is not None else ():
        if owner.get(key) is not None:
            return Source(owner, key)
    return None


def _clamp(low: Any, high: Any) -> str | None:
    return {(0, 6): "relu6", (0, None): "relu"}.get((low, high))


def _relu6_of_plus_3(node: Any) -> fx.Node | None:
    """x when `node` is relu6(x + 3)."""
    if isinstance(node, fx.Node) and node.meta.get("activation") == "relu6":
        shifted = node.args[0]
        if _calls(shifted, _ADD) and shifted.args[1:] == (3,) and not shifted.kwargs:
            return shifted.args[0]
    return None


def _between(node: fx.Node, x: fx.Node) -> list[fx.Node]:
    """The nodes that only `node` uses, from its arguments back to `x`, latest first."""
    found: list[fx.Node] = []
    for argument in node.all_input_nodes:
        if argument is not x and all(user is node or user in found for user in argument.users):
            found += [argument, *(inner for inner in _between(argument, x) if inner not in found)]
    return found


def _size(node: Any) -> tuple[Any, int] | None:
    """(the symbol of the measured axis, axis) when `node` is x.size(0 or 1) or x.shape[0 or 1]."""
    axis, sized = None, None
    if _calls(node, ("size",)) and len(node.args) == 2:
        sized, axis = node.args
    elif _calls(node, (operator.getitem,)) and isinstance(node.args[1], int):
        sizes, axis = node.args
        if (_calls(sizes, ("size",)) and len(sizes.args) == 1) or (_calls(sizes, (getattr,)) and sizes.args[1:] == ("shape",)):
            sized = sizes.args[0]
    shape = sized.meta.get("shape") if isinstance(sized, fx.Node) else None
    return (shape[axis], axis) if shape and axis in (0, 1) else None


def _convolved(x: fx.Node, channels: Any, window: tuple, stride: tuple, padding: tuple, dilation: tuple, ceil_mode: bool = False) -> Shape:
    """The symbolic shape after a sliding window: floor((H + a) / s) + 1 rows for a = 2 padding - dilation (window - 1) - 1."""
    batch, _, space = x.meta["shape"]
    grow = tuple(2 * p - d * (k - 1) - 1 for p, d, k in zip(padding, dilation, window))
    if grow == (-1, -1) and stride == (1, 1):
        return (batch, channels, space)
    return (batch, channels, (space, grow, stride, ceil_mode and stride != (1, 1)))


# Layers take in what follows them


def _absorb(node: fx.Node) -> None:
    x = node.args[0] if node.args else None
    norm, activation = node.meta.get("norm"), node.meta.get("activation")
    if norm is not None:
        layer = _layer(x)
        if layer and _single(x) and not layer.linear and layer.norm is None and layer.activation is None:
            _become(node, replace(layer, norm=norm, activation=activation), x.args, [x])
            node.meta.update(norm=None, activation=None)
    elif activation in ACTIVATIONS and isinstance(x, fx.Node) and isinstance(x.target, Layer):
        if _single(x) and x.target.activation is None:
            _become(node, replace(x.target, activation=activation), x.args, [x])
            node.meta["activation"] = None
    elif node.meta.get("sum") and node.args[0].meta["shape"] == node.args[1].meta["shape"] and node.args[0] is not node.args[1]:
        # Of two 1x1 convolutions the one after a depthwise takes the other's result: it is the end of a block.
        for value, residual in sorted((node.args, node.args[::-1]), key=lambda pair: _depthwise_before(pair[0]) is None):
            layer = _layer(value)
            if layer and layer.pointwise and layer.activation is None and _single(value):
                _become(node, layer, (value.args[0], residual), [value])
                return


# Layers join into blocks


def _strip(node: fx.Node, absorbed: list[fx.Node]) -> fx.Node:
    """The value before any change between (N, C) and (N, C, 1, 1)."""
    while node.meta.get("reshape") and _single(node):
        absorbed.append(node)
        node = node.args[0]
    return node


def _squeeze_excite(product: fx.Node) -> tuple[fx.Node, tuple[Layer, Layer, str], list[fx.Node]] | None:
    """y, (reduce, expand, gate) and the nodes in between when `product` is y * gate(expand(reduce(mean(y)))), y of a depthwise layer."""
    for y, node in (product.args, product.args[::-1]):
        absorbed: list[fx.Node] = []
        if _calls(node, ("expand_as",)) and node.args[1] is y and _single(node):
            absorbed.append(node)
            node = node.args[0]
        node = _strip(node, absorbed)
        gate = node.meta.get("activation")
        if gate in ("sigmoid", "hardsigmoid") and _single(node):
            absorbed.append(node)
            node = _strip(node.args[0], absorbed)
        layers: list[Layer] = []
        while len(layers) < 2 and (layer := _layer(node)) and (layer.pointwise or layer.linear) and _single(node):
            layers.append(layer)
            absorbed.append(node)
            node = _strip(node.args[0], absorbed)
        if len(layers) < 2 or not (isinstance(node.target, Kernel) and node.target.op == "global_avg_pool" and node.args[0] is y):
            continue
        absorbed.append(node)
        expand, reduce = layers
        if gate is None and expand.activation == "hardsigmoid":
            gate, expand = "hardsigmoid", replace(expand, activation=None)
        depthwise = _layer(y)
        alone = all(user is product or user in absorbed for user in y.users)
        if gate and expand.activation is None and reduce.activation and depthwise and depthwise.depthwise and alone:
            return y, (reduce, expand, gate), absorbed
    return None


def _depthwise_before(node: Any) -> tuple[fx.Node, tuple[Layer, Layer, str] | None, list[fx.Node]] | None:
    """The depthwise layer whose output a 1x1 layer takes, perhaps through squeeze-excitation, and the nodes to absorb."""
    if not (isinstance(node, fx.Node) and isinstance(node.target, Layer) and node.target.pointwise):
        return None
    x = node.args[0]
    if not _single(x):
        return None
    if x.meta.get("product") and (found := _squeeze_excite(x)):
        depthwise, squeeze_excite, absorbed = found
        return depthwise, squeeze_excite, [x, *absorbed, depthwise]
    layer = _layer(x)
    return (x, None, [x]) if layer and layer.depthwise else None


def _join_inverted_residual(node: fx.Node) -> None:
    found = _depthwise_before(node)
    if found is None:
        return
    depthwise, squeeze_excite, absorbed = found
    expand = depthwise.args[0]
    layer = _layer(expand)
    # Where the 1x1 after the depthwise does not narrow, as in MobileNet V1, the 1x1 before it ends the previous block.
    if layer and layer.pointwise and _single(expand) and (squeeze_excite or node.target.channels < layer.channels):
        kernel = _block(layer, depthwise.target, node.target, squeeze_excite)
        _become(node, kernel, (expand.args[0], *node.args[1:]), [*absorbed, expand])


def _join_separable(node: fx.Node) -> None:
    found = _depthwise_before(node)
    if found is None:
        return
    depthwise, squeeze_excite, absorbed = found
    first, last = depthwise.target, node.target
    if squeeze_excite:
        kernel = _block(None, first, last, squeeze_excite)
    else:
        options = {"stride": first.stride, "padding": first.padding}
        options |= {"depthwise_activation": first.activation, "activation": last.activation}
        kernel = Kernel("separable", (first, last), options)
    _become(node, kernel, (depthwise.args[0], *node.args[1:]), absorbed)


def _block(expand: Layer | None, depthwise: Layer, project: Layer, squeeze_excite: tuple[Layer, Layer, str] | None) -> Kernel:
    options = {
        "stride": depthwise.stride,
        "padding": depthwise.padding,
        "expand_activation": expand.activation if expand else None,
        "depthwise_activation": depthwise.activation,
        "activation": project.activation,
    }
    return Kernel("inverted_residual", (expand, depthwise, project), options, squeeze_excite)


def _join_fire(node: fx.Node) -> None:
    pair = node.meta.get("cat")
    if not pair or len(pair) != 2 or pair[0] is pair[1]:
        return
    one, three = layers = [_layer(value) for value in pair]
    if not all(layer and layer.activation == "relu" and _single(value) for layer, value in zip(layers, pair)):
        return
    geometry = (three.shape[2:], three.stride, three.padding, three.dilation, three.groups)
    x = pair[0].args[0]
    if not one.pointwise or geometry != ((3, 3), (1, 1), (1, 1), (1, 1), 1) or pair[1].args[0] is not x:
        return
    absorbed = sorted(pair, reverse=True)
    squeeze = _layer(x)
    if squeeze and squeeze.pointwise and squeeze.activation == "relu" and len(x.users) == 2:
        _become(node, Kernel("fire", (squeeze, one, three)), x.args, [*absorbed, x])
    else:
        _become(node, Kernel("fire_expand", (one, three)), (x,), absorbed)
