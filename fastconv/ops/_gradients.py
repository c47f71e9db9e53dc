"""The gradients of the public operators.

All but the pools are chains of convolutions with activations. A backward walks its chain from the end. What a layer gave in the forward
pass is computed again by the operators themselves, so that between the passes only inputs stay in memory, and an output where its
activation's slope follows from it. Everything here has gradients itself: a backward has a backward, to any order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from fastconv.reference import ACTIVATIONS

aten, ops = torch.ops.aten, torch.ops.fastconv
FROM_OUTPUT = ("relu", "relu6")  # activations whose slope their output tells; the others' follows from what went in


# Two of them have no derivative of their own; these forms stand in where one may be asked for.


def _hardsigmoid_slope(grad: Tensor, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return aten.hardsigmoid_backward(grad, x)
    return torch.where((x > -3) & (x < 3), grad / 6, 0)


def _silu_slope(grad: Tensor, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return aten.silu_backward(grad, x)
    sigmoid = torch.sigmoid(x)
    return grad * (sigmoid * (1 + x * (1 - sigmoid)))


SLOPES: dict[str | None, Callable[[Tensor, Tensor], Tensor]] = {  # ATen's own, so that kinks and NaN are as there
    "relu": lambda grad, y: aten.threshold_backward(grad, y, 0),
    "relu6": lambda grad, y: aten.hardtanh_backward(grad, y, 0, 6),
    "hardswish": aten.hardswish_backward,
    "hardsigmoid": _hardsigmoid_slope,
    "silu": _silu_slope,
}


def columns(x: Tensor) -> Tensor:
    """(N, C, H, W) as a matrix, a pixel a row: a view where channels are innermost."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def mapped(x: Tensor) -> bool:
    """Whether x stands for many, under vmap: then it can tell nothing of its memory format."""
    while torch._C._functorch.is_gradtrackingtensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return torch._C._functorch.is_batchedtensor(x) or torch._C._functorch.is_legacy_batchedtensor(x)


def innermost(x: Tensor) -> bool:
    """Whether x's channels are known to lie side by side."""
    return not mapped(x) and x.stride(1) == 1


def laid_out(x: Tensor, layout: torch.memory_format) -> Tensor:
    return x if mapped(x) else x.contiguous(memory_format=layout)


def convolution_backward(grad: Tensor, x: Tensor | None, weight: Tensor, size, stride, padding, mask, groups: int = 1) -> tuple:
    """ATen's gradients of a convolution's input (of this height and width), weight and bias, those in mask; x: for the weight's alone."""
    if x is None:  # never read: its shape and memory format count
        layout = torch.channels_last if innermost(grad) else torch.contiguous_format
        shape = (grad.shape[0], groups * weight.shape[1], *size)
        x = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
    bias = [weight.shape[0]]
    return aten.convolution_backward(grad, x, weight, bias, stride, padding, (1, 1), False, (0, 0), groups, mask)


def depthwise(x: Tensor, weight: Tensor, stride, padding) -> Tensor:
    """For a kernel of any size."""
    if tuple(weight.shape[2:]) in ((3, 3), (5, 5)):
        return ops.depthwise(x, weight, None, stride, padding, None)
    return F.conv2d(x, weight, None, stride, padding, groups=x.shape[1])


@dataclass
class Layer:
    """activation(conv(x) + bias). names: of the weight and the bias in the operator's schema."""

    names: tuple[str, str]
    weight: Tensor
    bias: Tensor | None
    activation: str | None = None

    def forward(self, x: Tensor, activation: str | None) -> Tensor:
        raise NotImplementedError

    def backward(
        self, grad: Tensor, x: Callable[[], Tensor], size: torch.Size, needed: set[str], below: bool, added: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """The gradients of the parameters needed and, if anything below needs it, of x, plus `added`.

        grad: that of conv(x) + bias; size: the operator's input's, which is x's but for a 1x1 kernel.
        """
        raise NotImplementedError


@dataclass
class Depthwise(Layer):
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)

    def forward(self, x, activation):
        return ops.depthwise(x, self.weight, self.bias, self.stride, self.padding, activation)

    def backward(self, grad, x, size, needed, below, added):
        (weight, bias), found, geometry = self.names, {}, (self.stride, self.padding)
        if weight in needed:
            found[weight] = ops.depthwise_backward_weight(grad, x(), self.weight.shape[2:], *geometry)
        if bias in needed:
            found[bias] = grad.sum((0, 2, 3))
        gradient = ops.depthwise_backward_input(grad, self.weight, size, *geometry) if below else None
        return found, gradient if added is None or not below else gradient + added


@dataclass
class Dense(Layer):
    """A convolution across all channels; ATen has the best kernels for its gradients."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    def forward(self, x, activation):
        return ops.stem(x, self.weight, self.bias, self.stride, self.padding, activation)

    def backward(self, grad, x, size, needed, below, added):
        mask = (below, *(name in needed for name in self.names))
        if not any(mask):
            return {}, None
        geometry = (self.stride, self.padding)
        gradient, *parameters = convolution_backward(grad, x() if mask[1] else None, self.weight, size, *geometry, mask)
        found = {name: parameter for name, parameter in zip(self.names, parameters) if name in needed}
        return found, gradient if added is None or not below else gradient + added


@dataclass
class Pointwise(Dense):
    residual: Tensor | None = None

    def forward(self, x, activation):
        return ops.pointwise(x, self.weight, self.bias, self.residual, activation)

    def backward(self, grad, x, size, needed, below, added):
        size = grad.shape[2:]
        if not grad.is_cuda and not innermost(grad):  # oneDNN takes NCHW as it is
            return super().backward(grad, x, size, needed, below, added)
        gradient = ops.pointwise(grad, self.weight.transpose(0, 1), None, added, None) if below else None
        if not grad.is_cuda:
            return super().backward(grad, x, size, needed, False, None)[0], gradient
        (weight, bias), found = self.names, {}
        if weight in needed:  # in a fixed order, which cuDNN does not promise
            found[weight] = (columns(grad).t() @ columns(x()))[:, :, None, None]
        if bias in needed:
            found[bias] = grad.sum((0, 2, 3))
        return found, gradient


@dataclass
class Expand:
    """The two convolutions of one image whose outputs a fire concatenates."""

    one: Pointwise
    three: Dense
    activation: str = "relu"

    @property
    def names(self) -> tuple[str, ...]:
        return *self.one.names, *self.three.names

    def forward(self, x, activation):
        raise AssertionError("always a chain's last, with relu: nothing needs it again")

    def backward(self, grad, x, size, needed, below, added):
        layout = torch.channels_last if innermost(grad) else torch.contiguous_format
        one, three = (laid_out(part, layout) for part in grad.split([self.one.weight.shape[0], self.three.weight.shape[0]], 1))
        found, gradient = self.three.backward(three, x, size, needed, below, added)
        more, gradient = self.one.backward(one, x, size, needed, below, gradient)
        return found | more, gradient


def _layer(kind: type[Layer], values: dict, prefix: str = "", **more) -> Layer:
    names = f"{prefix}weight", f"{prefix}bias"
    return kind(names, values[names[0]], values[names[1]], **more)


def _geometry(values: dict) -> dict:
    return {"stride": values["stride"], "padding": values["padding"]}


def _expand(v: dict) -> Expand:
    one = Pointwise(("weight1x1", "bias1x1"), v["weight1x1"], v["bias1x1"])
    return Expand(one, Dense(("weight3x3", "bias3x3"), v["weight3x3"], v["bias3x3"], padding=(1, 1)))


# An operator's layers, from its arguments by name.
CHAINS: dict[str, Callable[[dict], list]] = {
    "depthwise": lambda v: [_layer(Depthwise, v, activation=v["activation"], **_geometry(v))],
    "pointwise": lambda v: [_layer(Pointwise, v, activation=v["activation"], residual=v["residual"])],
    "fire_expand": lambda v: [_expand(v)],
    "fire": lambda v: [_layer(Pointwise, v, "squeeze_", activation="relu"), _expand(v)],
    "separable": lambda v: [
        _layer(Depthwise, v, "depthwise_", activation=v["depthwise_activation"], **_geometry(v)),
        _layer(Pointwise, v, "pointwise_", activation=v["activation"], residual=v["residual"]),
    ],
    "inverted_residual": lambda v: [
        _layer(Pointwise, v, "expand_", activation=v["activation"]),
        _layer(Depthwise, v, "depthwise_", activation=v["activation"], **_geometry(v)),
        _layer(Pointwise, v, "project_"),
    ],
    "stem": lambda v: [_layer(Dense, v, activation=v["activation"], **_geometry(v))],
}


def _recomputed(activation: str | None) -> bool:
    """Whether a chain's last layer has to be computed again for its activation's slope."""
    return activation is not None and activation not in FROM_OUTPUT


def _keep(ctx, values: dict, y: Tensor, layers: list, needed: set[str]) -> None:
    """Saves what the backward needs: parameters always; x and a residual only where a gradient or a slope is computed from them."""
    last = layers[-1].activation
    again = _recomputed(last)
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    if len(layers) == 1 and not again and needed.isdisjoint({"weight", "weight1x1", "weight3x3"}):
        del tensors["x"]
    if not again:
        tensors.pop("residual", None)
    ctx.names = tuple(tensors)
    ctx.save_for_backward(*tensors.values(), y if last in FROM_OUTPUT else None)


class _Again:
    """The forward pass of a chain once more, as far as it is asked for. An object, not closures, whose cycle would outlive the backward."""

    def __init__(self, layers: list, x: Tensor | None, y: Tensor | None) -> None:
        self.layers, self.inputs, self.y, self.known = layers, {0: x}, y, {}

    def before(self, i: int) -> Tensor:
        """What the slope of layer i's activation follows from: what went into it, or came out."""
        layer = self.layers[i]
        if i == len(self.layers) - 1 and layer.activation in FROM_OUTPUT:
            return self.y
        if i not in self.known:
            self.known[i] = layer.forward(self.entering(i), layer.activation if layer.activation in FROM_OUTPUT else None)
        return self.known[i]

    def entering(self, i: int) -> Tensor:
        """Layer i's input."""
        if i not in self.inputs:
            activation = self.layers[i - 1].activation
            before = self.before(i - 1)
            self.inputs[i] = before if activation in FROM_OUTPUT else ACTIVATIONS[activation](before)
        return self.inputs[i]


def _chain(name: str, parameters: list[str], layout: Callable[[Tensor], torch.memory_format]) -> tuple[Callable, Callable]:
    build = CHAINS[name]

    def setup_context(ctx, inputs, output):
        values = dict(zip(parameters, inputs, strict=True))
        ctx.constants = {key: None if isinstance(value, Tensor) else value for key, value in values.items()}
        ctx.size, ctx.layout = inputs[0].shape[2:], layout(inputs[0])
        _keep(ctx, values, output, build(values), {key for key, needs in zip(parameters, ctx.needs_input_grad) if needs})

    def backward(ctx, grad):
        *saved, y = ctx.saved_tensors
        values = ctx.constants | dict(zip(ctx.names, saved, strict=True))
        layers, x = build(values), values["x"]
        alone = len(layers) == 1 and not _recomputed(layers[-1].activation)
        within = ctx.layout if alone else torch.channels_last  # what our kernels compute again is as they want it
        needed = {key for key, needs in zip(parameters, ctx.needs_input_grad) if needs}

        again = _Again(layers, laid_out(x, within) if x is not None else None, y)
        added = None
        if values.get("residual") is True:  # inverted_residual's: x itself
            added = grad = laid_out(grad, within)
        found = {}
        for i in reversed(range(len(layers))):
            layer = layers[i]
            if layer.activation is not None:
                grad = SLOPES[layer.activation](grad, again.before(i))
            grad = laid_out(grad, within)
            if i == len(layers) - 1:
                found["residual"] = grad
            below = not needed <= {*found, *layer.names}
            more, grad = layer.backward(grad, functools.partial(again.entering, i), ctx.size, needed, below, added if i == 0 else None)
            found |= more
            if not below:
                break
        if "x" in needed:
            found["x"] = laid_out(grad, ctx.layout)
        return tuple(found[key] if key in needed else None for key in parameters)

    return setup_context, backward


def _depthwise_backward_input(layout: Callable[[Tensor], torch.memory_format]) -> tuple[Callable, Callable]:
    def setup_context(ctx, inputs, output):
        grad, weight, _, *ctx.geometry = inputs
        grads, weights, *_ = ctx.needs_input_grad
        ctx.kernel_size, ctx.layout = weight.shape[2:], layout(grad)
        ctx.save_for_backward(grad if weights else None, weight if grads else None)

    def backward(ctx, gradient):  # of the result, an image of x's size
        grad, weight = ctx.saved_tensors
        grads, weights, *_ = ctx.needs_input_grad
        gradient = laid_out(gradient, ctx.layout)
        to_grad = depthwise(gradient, weight, *ctx.geometry) if grads else None
        to_weight = ops.depthwise_backward_weight(grad, gradient, ctx.kernel_size, *ctx.geometry) if weights else None
        return to_grad, to_weight, None, None, None

    return setup_context, backward


def _depthwise_backward_weight(layout: Callable[[Tensor], torch.memory_format]) -> tuple[Callable, Callable]:
    def setup_context(ctx, inputs, output):
        grad, x, _, *ctx.geometry = inputs
        grads, images, *_ = ctx.needs_input_grad
        ctx.size, ctx.layouts = x.shape[2:], (layout(grad), layout(x))
        ctx.save_for_backward(grad if images else None, x if grads else None)

    def backward(ctx, gradient):  # of the result, shaped like a weight
        grad, x = ctx.saved_tensors
        grads, images, *_ = ctx.needs_input_grad
        to_grad = laid_out(depthwise(x, gradient, *ctx.geometry), ctx.layouts[0]) if grads else None
        to_x = laid_out(ops.depthwise_backward_input(grad, gradient, ctx.size, *ctx.geometry), ctx.layouts[1]) if images else None
        return to_grad, to_x, None, None, None

    return setup_context, backward


def _max_pool(layout) -> tuple[Callable, Callable]:
    def setup_context(ctx, inputs, output):
        x, *ctx.geometry = inputs
        ctx.save_for_backward(x)

    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        stride, padding, ceil_mode = ctx.geometry
        window = ([3, 3], stride, padding, [1, 1], ceil_mode)
        _, indices = aten.max_pool2d_with_indices(x.detach(), *window)
        return aten.max_pool2d_with_indices_backward(grad, x, *window, indices), None, None, None

    return setup_context, backward


def _global_avg_pool(layout) -> tuple[Callable, Callable]:
    def setup_context(ctx, inputs, output):
        ctx.shape = inputs[0].shape

    def backward(ctx, grad):
        return ((grad / (ctx.shape[2] * ctx.shape[3])).expand(ctx.shape),)

    return setup_context, backward


OTHERS = {
    "depthwise_backward_input": _depthwise_backward_input,
    "depthwise_backward_weight": _depthwise_backward_weight,
    "max_pool": _max_pool,
    "global_avg_pool": _global_avg_pool,
}


def register(
    library: torch.library.Library,
    op: torch._ops.OpOverload,
    parameters: list[str],
    layout: Callable[[Tensor], torch.memory_format],
    specification: Callable[..., Tensor],
) -> None:
    """Gives a public operator its gradients, torch.func's too, and its forward-mode derivatives, which are the specification's.

    Not by torch.library.register_autograd, which has no torch.func and lets tangents fall without a word.
    """
    name = op._opname
    setup_context, backward = _chain(name, parameters, layout) if name in CHAINS else OTHERS[name](layout)
    defaults = [argument.default_value for argument in op._schema.arguments]

    def below(keyset, args):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Differentiable(torch.autograd.function._SingleLevelFunction):  # one level of torch.func's at a time, as the dispatcher comes by
        @staticmethod
        def forward(*args):
            with torch.set_grad_enabled(torch._C._are_functorch_transforms_active()):  # for the levels outside this one
                return below(args[-1], args[:-1])

        @staticmethod
        def setup_context(ctx, inputs, output):
            setup_context(ctx, inputs[:-1], output)

        @staticmethod
        def backward(ctx, grad):
            """Without autocast: the forward pass ran in the dtype of what was saved, and so does the backward, wherever it is called."""
            device = grad.device.type
            if not torch.is_autocast_enabled(device):
                return *backward(ctx, grad), None
            with torch.autocast(device, enabled=False):
                return *backward(ctx, grad), None

    Differentiable.__name__ = Differentiable.__qualname__ = f"fastconv_{name}"

    def autograd(keyset, *args):
        args = (*args, *defaults[len(args) :])  # the dispatcher drops trailing arguments that equal their default
        if forward_ad._current_level >= 0:
            return specification(*args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return below(keyset, args)
        if not torch._C._are_functorch_transforms_active():
            return Differentiable.apply(*args, keyset)
        with enable_single_level_autograd_function():
            return Differentiable.apply(*args, keyset)

    library.impl(name, autograd, "Autograd", with_keyset=True)
