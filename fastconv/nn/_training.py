"""Training through fused kernels: convolution, batch norm and activation in a row, where only the convolutions' sums are stored.

In plain torch each layer of a MobileNet keeps two images for its backward and reads or writes one eight times or more; here each keeps one,
and what batch norm and activation make of it is made again inside the kernels that read it. Gradients follow Ioffe and Szegedy
(arXiv:1502.03167); statistics are those of torch.nn.BatchNorm2d.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from fastconv import _extension, reference
from fastconv._buffers import buffers
from fastconv.nn._conv import KernelConv2d
from fastconv.ops import _checks
from fastconv.optimize.plan import plain
from fastconv.optimize.planned import Planned
from fastconv.optimize.trace import hooked
from fastconv.optimize.trained import step

_ACTIVATIONS = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.SiLU: "silu",
    nn.Identity: None,
}
_WITHOUT_NORM = (None, "relu", "relu6")  # whose slope shows in their result
_NONE, _BATCH, _RUNNING = 0, 1, 2  # norm, as csrc/training.cpp numbers it


@dataclass(frozen=True)
class Layer:
    """A convolution, the norm after it or None, and the activation."""

    conv: nn.Conv2d
    norm: nn.BatchNorm2d | None
    activation: str | None

    @property
    def statistics(self) -> int:
        if self.norm is None:
            return _NONE
        return _BATCH if self.norm.training or self.norm.running_mean is None else _RUNNING

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        norm = self.norm
        return (self.conv.weight, self.conv.bias, *((None, None) if norm is None else (norm.weight, norm.bias)))


def run(x: Tensor, modules: nn.Sequential, residual: bool = False, add: Callable[[Tensor, Tensor], Tensor] = operator.add) -> Tensor:
    """modules(x), with x added if `residual`: through the training kernels where they cover x and every module, or as it is.

    add: how the original adds x, which counts where it has another dtype than the modules' output."""
    y = _trained(x, modules, residual)
    if y is not None:
        return y
    y = modules(x)
    return add(y, x) if residual else y


def run_each(x: Tensor, modules: Iterable[nn.Module], residual: bool = False) -> Tensor:
    """The same for modules that no Sequential holds, or for one that calls this itself."""
    y = _trained(x, modules, residual)
    if y is not None:
        return y
    y = x
    for module in modules:
        y = module(y)
    return y + x if residual else y


def run_block(x: Tensor, modules: Iterable[nn.Module], residual: bool, drop_path: nn.Module) -> Tensor:
    """The same for a block of timm's, whose stochastic depth stands before the sum."""
    if not residual or is_absent(drop_path):
        return run_each(x, modules, residual)
    return drop_path(run_each(x, modules)) + x


def is_absent(module: nn.Module) -> bool:
    """Whether an optional part of a block is not there."""
    return type(module) is nn.Identity and not hooked(module)


def _trained(x: Tensor, modules: Iterable[nn.Module], residual: bool) -> Tensor | None:
    if not trains(x):
        return None
    parts = _parts(modules)
    return formatted_like(_run_parts(x, parts, residual), x) if parts is not None and _serves(x, parts) else None


def formatted_like(y: Tensor, x: Tensor) -> Tensor:
    """y, which has its channels innermost, in x's memory format."""
    innermost = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return y if innermost else y.contiguous()


def innermost(x: Tensor) -> Tensor:
    """x as the training kernels read it, where they will: for a network, whose layers would each change the format and back."""
    return x.contiguous(memory_format=torch.channels_last) if trains(x) else x


def trains(x: Tensor) -> bool:
    """Whether x may go through the training kernels: a float32 image on the CPU, while gradients are recorded."""
    return (
        plain(x)
        and torch.is_grad_enabled()
        and x.dtype is torch.float32
        and x.is_cpu
        and x.dim() == 4
        and x.numel() > 0
        and _extension.available
        and _extension.backend() in ("auto", "cpu")
    )


# Structure.


def _flat(modules: Iterable[nn.Module]) -> list[nn.Module] | None:
    flat: list[nn.Module] = []
    for module in modules:
        if isinstance(module, nn.Sequential):
            inner = _flat(module) if not hooked(module) and _is_chain(module) else None
            if inner is None:
                return None
            flat += inner
        else:
            flat.append(module)
    return flat


def _is_chain(module: nn.Sequential) -> bool:
    """Whether its modules one after another are all that it computes."""
    kind = type(module)
    return kind.forward is nn.Sequential.forward or (
        kind.forward is Planned.forward and getattr(kind._forward, "is_chain", False)  # Conv2dNormActivation's
    )


# Squeeze-excitations: the modules from the image's means, which the kernels take over, to the factors of its channels.
_GATES = {
    "fastconv.models.mobilenet_v3.SqueezeExcitation": ("fc1", "activation", "fc2", "scale_activation"),
    "torchvision.ops.misc.SqueezeExcitation": ("fc1", "activation", "fc2", "scale_activation"),
    "timm.models._efficientnet_blocks.SqueezeExcite": ("conv_reduce", "act1", "conv_expand", "gate"),
}


def gate_modules(module: nn.Module) -> tuple[str, ...]:
    """Their names, or none where `module` is no squeeze-excitation of these."""
    kind = type(module)
    return _GATES.get(f"{kind.__module__}.{kind.__qualname__}", ())


def _is_gate(module: nn.Module) -> bool:
    if not gate_modules(module) or hooked(module):
        return False
    pool = getattr(module, "avgpool", None)  # timm's takes the mean itself
    return pool is None or (type(pool) is nn.AdaptiveAvgPool2d and pool.output_size in (1, (1, 1)) and not hooked(pool))


def _parts(modules: Iterable[nn.Module]) -> list[Layer | nn.Module] | None:
    """Layers and squeeze-excitations in order, or None where a module is neither."""
    flat = _flat(modules)
    if not flat:
        return None
    parts: list[Layer | nn.Module] = []
    i = 0
    while i < len(flat):
        conv = flat[i]
        if parts and _is_gate(conv) and isinstance(parts[-1], Layer) and parts[-1].norm is not None:
            parts.append(conv)
            i += 1
            continue
        if not _is_covered_conv(conv):
            return None
        i += 1
        norm, activation = None, None
        if i < len(flat) and type(flat[i]) is nn.BatchNorm2d:
            norm = flat[i]
            if hooked(norm) or norm.num_features != conv.out_channels:
                return None
            i += 1
        if i < len(flat) and type(flat[i]) in _ACTIVATIONS:
            if hooked(flat[i]):
                return None
            activation = _ACTIVATIONS[type(flat[i])]
            i += 1
        if norm is None and activation not in _WITHOUT_NORM:
            return None
        parts.append(Layer(conv, norm, activation))
    if not isinstance(parts[-1], Layer):
        return None
    # What stands behind a gate reads its input through it, which only a 1x1 convolution does.
    after_gates = (parts[i + 1] for i, part in enumerate(parts) if not isinstance(part, Layer))
    return parts if all(isinstance(part, Layer) and part.conv.kernel_size == (1, 1) for part in after_gates) else None


def _is_plain_conv(module: nn.Module) -> bool:
    kind = type(module)
    ours = issubclass(kind, KernelConv2d) and kind.forward is Planned.forward and kind._forward is KernelConv2d._forward
    return (kind is nn.Conv2d or (ours and not is_parametrized(module))) and not hooked(module)


def _is_covered_conv(conv: nn.Module) -> bool:
    if not (_is_plain_conv(conv) and conv.padding_mode == "zeros" and conv.dilation == (1, 1)):
        return False
    if isinstance(conv.padding, str):
        return False
    kernel, stride = conv.kernel_size, conv.stride
    if conv.groups == 1:
        if kernel == (1, 1):
            return stride == (1, 1) and conv.padding == (0, 0)
        return conv.in_channels <= 4  # a stem
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    below = conv.padding[0] < kernel[0] and conv.padding[1] < kernel[1]
    return depthwise and kernel in ((3, 3), (5, 5)) and stride[1] <= 2 and below


def _serves(x: Tensor, parts: list[Layer | nn.Module]) -> bool:
    """Whether tensors and sizes fit; what is wrong is left to torch's own modules, whose messages users know."""
    shape = tuple(x.shape)
    for number, part in enumerate(parts):
        if not isinstance(part, Layer):
            continue
        conv, norm = part.conv, part.norm
        if conv.in_channels != shape[1] or (conv.groups == 1 and conv.kernel_size != (1, 1) and (number or x.requires_grad)):
            return False
        tensors = [tensor for tensor in part.parameters if tensor is not None]
        if norm is not None and norm.running_mean is not None:
            tensors += [norm.running_mean, norm.running_var]
        if not _are_covered(tensors):
            return False
        shape = _output_shape(shape, conv)
        n, _, height, width = shape
        if height <= 0 or width <= 0 or (part.statistics == _BATCH and n * height * width == 1):
            return False
    return True


def _output_shape(shape: Sequence[int], conv: nn.Conv2d) -> tuple[int, int, int, int]:
    return shape[0], conv.out_channels, *_extents(shape[2:], conv.kernel_size, conv.stride, conv.padding)


def _extents(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> tuple[int, int]:
    """A convolution's height and width."""
    height, width = ((extent + 2 * p - k) // s + 1 for extent, k, s, p in zip(size, kernel, stride, padding, strict=True))
    return height, width


def _are_covered(tensors: Iterable[Tensor]) -> bool:
    return all(
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype is torch.float32
        and tensor.is_cpu
        and (tensor.dim() != 1 or tensor.is_contiguous())
        for tensor in tensors
    )


# Running.


def _run_parts(x: Tensor, parts: list[Layer | nn.Module], residual: bool) -> Tensor:
    added = x if residual else None
    state: tuple[Tensor, Tensor | None, Tensor | None, str | None] = (x, None, None, None)  # image, its norm, gate, activation
    layers: list[Layer] = []
    for part in parts:
        if isinstance(part, Layer):
            layers.append(part)
            continue
        # The means are torch's from here to the gate: its layers are small, and may be anything.
        y, norm, means = _Chain.apply(*state, None, tuple(layers), False, *_flat_parameters(layers))
        gate = means
        for name in gate_modules(part):
            gate = getattr(part, name)(gate)
        state, layers = (y, norm, gate, layers[-1].activation), []
    return _Chain.apply(*state, added, tuple(layers), True, *_flat_parameters(layers))


def _flat_parameters(layers: Sequence[Layer]) -> list[Tensor | None]:
    return [parameter for layer in layers for parameter in layer.parameters]


def _momentum(norm: nn.BatchNorm2d) -> float:
    """As BatchNorm2d counts batches; None: the average over all of them."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            return 1.0 / float(norm.num_batches_tracked)
    return norm.momentum or 0.0


class _Chain(torch.autograd.Function):
    """Layers in a row. `finish`: the last one's image is made, and `residual` added; otherwise its sums come back with their norm and the
    image's means, and what arrives as the sums' gradient is the image's."""

    @staticmethod
    def forward(ctx, x, norm, gate, activation, residual, layers, finish, *parameters):
        ops = torch.ops.fastconv
        images, norms = [x], [norm]
        ctx.input_activation, ctx.layers, ctx.finish, ctx.own = activation, layers, finish, residual is x
        ctx.statistics = [layer.statistics for layer in layers]
        for i, layer in enumerate(layers):
            weight, bias, gamma, beta = parameters[4 * i : 4 * i + 4]
            kind, batch_norm = ctx.statistics[i], layer.norm
            tracks = kind == _BATCH and batch_norm.running_mean is not None and batch_norm.training
            y = buffers.image(_output_shape(images[-1].shape, layer.conv))
            _, made = ops.training_conv(
                images[-1],
                norms[-1],
                gate if i == 0 else None,
                activation,
                weight,
                bias,
                layer.activation if kind == _NONE else None,
                kind,
                gamma,
                beta,
                batch_norm.running_mean if tracks or kind == _RUNNING else None,
                batch_norm.running_var if tracks or kind == _RUNNING else None,
                _momentum(batch_norm) if tracks else 0.0,
                batch_norm.eps if batch_norm is not None else 0.0,
                layer.conv.stride,
                layer.conv.padding,
                y,
            )
            images.append(y)
            norms.append(made if kind != _NONE else None)
            activation = layer.activation if kind != _NONE else None
        ctx.save_for_backward(gate, *images, *norms, *parameters)
        if not finish:
            means = ops.training_means(images[-1], norms[-1], activation)
            ctx.mark_non_differentiable(norms[-1])
            return images[-1], norms[-1], means
        if norms[-1] is None:
            return images[-1] if residual is None else images[-1] + residual
        z = buffers.image(images[-1].shape)
        ops.training_activated(images[-1], norms[-1], activation, residual, z)
        return z

    @staticmethod
    def backward(ctx, dz, _=None, dmeans=None):
        if torch.is_grad_enabled():  # create_graph: gradients that have gradients
            return _Chain.differentiable_backward(ctx, dz, dmeans)
        ops = torch.ops.fastconv
        count = len(ctx.layers)
        gate, *saved = ctx.saved_tensors
        images, norms, parameters = saved[: count + 1], saved[count + 1 : 2 * count + 2], saved[2 * count + 2 :]
        needs_x, _, needs_gate, _, needs_residual = ctx.needs_input_grad[:5]
        needed = ctx.needs_input_grad[7:]
        gradients: list[Tensor | None] = [None] * len(parameters)
        dresidual = dz if needs_residual and not ctx.own else None
        add = None
        if dmeans is not None:
            pixels = images[-1].shape[2] * images[-1].shape[3]
            add = dmeans / pixels
        dz = torch.zeros_like(images[-1]) if dz is None else dz.contiguous(memory_format=torch.channels_last)
        own = dz if ctx.own and needs_x else None  # x is added to the result: its gradient has two parts
        sums, through = None, False  # whether dz has been through the activation, and its sums
        dgate = None
        for i in reversed(range(count)):
            layer, kind = ctx.layers[i], ctx.statistics[i]
            weight, bias = parameters[4 * i : 4 * i + 2]
            needs_weight, needs_bias, needs_gamma, needs_beta = needed[4 * i : 4 * i + 4]
            earlier = needs_x or needs_gate or any(needed[: 4 * i])
            activation = None if through else layer.activation
            y, norm = images[i + 1], norms[i + 1]
            depthwise = layer.conv.groups > 1
            in_product = needs_bias and kind == _NONE and not depthwise  # its gradient comes with the product's
            if sums is None and (kind == _BATCH or (needs_bias and not in_product) or needs_gamma or needs_beta):
                sums = ops.training_gradient_sums(dz, add, y, norm, activation)
            if needs_beta:
                gradients[4 * i + 3] = sums[0].clone()
            if needs_gamma:
                gradients[4 * i + 2] = sums[1] * norm[3]
            if needs_bias and not in_product:
                # Of no norm, or a frozen one; the batch's mean takes a bias out again.
                gradients[4 * i + 1] = torch.zeros_like(bias) if kind == _BATCH else sums[0] * (1.0 if norm is None else norm[0])
            if not (earlier or needs_weight or in_product):
                break
            input_norm = norms[i]
            input_activation = ctx.layers[i - 1].activation if i else ctx.input_activation
            pointwise = layer.conv.kernel_size == (1, 1)
            dx = buffers.image(images[i].shape) if earlier else None
            _, made, dweight, dbias = ops.training_conv_backward(
                dz,
                add,
                y,
                norm,
                sums if kind == _BATCH else None,
                activation,
                images[i],
                input_norm,
                gate if i == 0 else None,
                input_activation if input_norm is not None else None,
                weight,
                own if i == 0 and pointwise else None,
                layer.conv.stride,
                layer.conv.padding,
                earlier,
                needs_weight,
                in_product,
                dx,
            )
            if in_product:
                gradients[4 * i + 1] = dbias
            if needs_weight:
                gradients[4 * i] = dweight
            if not earlier:
                break
            if i == 0:
                dgate = made if gate is not None else None
                if own is not None and not pointwise:
                    dx = dx + own
            dz, add = dx, None
            through = input_norm is not None and i > 0
            sums = made if through else None
        return (dz if needs_x else None, None, dgate if needs_gate else None, None, dresidual, None, None, *gradients)

    @staticmethod
    def differentiable_backward(ctx, dz, dmeans):
        """The same by torch's operators, from the input on."""
        count = len(ctx.layers)
        gate, *saved = ctx.saved_tensors
        x, norm, parameters = saved[0], saved[count + 1], saved[2 * count + 2 :]

        def forward(x, gate, *parameters):
            z = x
            if norm is not None:  # x stands for its image already, and so does what arrives as its gradient
                z = _StandsFor.apply(x, _activated(norm[0].view(-1, 1, 1) * x.detach() + norm[1].view(-1, 1, 1), ctx.input_activation))
            z = z if gate is None else z * gate
            for i, layer in enumerate(ctx.layers):
                weight, bias, gamma, beta = parameters[4 * i : 4 * i + 4]
                z = F.conv2d(z, weight, bias, layer.conv.stride, layer.conv.padding, 1, layer.conv.groups)
                if ctx.statistics[i] != _NONE:
                    running = (layer.norm.running_mean, layer.norm.running_var) if ctx.statistics[i] == _RUNNING else (None, None)
                    z = F.batch_norm(z, *running, gamma, beta, ctx.statistics[i] == _BATCH, 0.0, layer.norm.eps)
                z = _activated(z, layer.activation)
            if not ctx.finish:
                return z, z.mean((2, 3), keepdim=True)
            return z + x if ctx.own else z

        needed = ctx.needs_input_grad
        wanted = [needed[0], needed[2], *needed[7:]]
        arriving = dz if ctx.finish else (dz, dmeans)
        x_gradient, gate_gradient, *gradients = _vjp(forward, (x, gate, *parameters), wanted, arriving)
        residual = dz if needed[4] and not ctx.own else None
        return (x_gradient, None, gate_gradient, None, residual, None, None, *gradients)


def _activated(x: Tensor, activation: str | None) -> Tensor:
    return x if activation is None else getattr(F, activation)(x)


def _vjp(forward: Callable, inputs: Sequence[Tensor | None], wanted: Sequence[bool], arriving: Tensor | tuple) -> list[Tensor | None]:
    """Gradients of forward(*inputs) with respect to those that are wanted, with graphs of their own."""
    outputs = forward(*inputs)
    if isinstance(arriving, tuple):
        pairs = [(output, gradient) for output, gradient in zip(outputs, arriving, strict=True) if gradient is not None]
        outputs, arriving = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    asked = [value for value, want in zip(inputs, wanted, strict=True) if want]
    gradients = iter(torch.autograd.grad(outputs, asked, arriving, create_graph=True, allow_unused=True))
    return [next(gradients) if want else None for want in wanted]


class _StandsFor(torch.autograd.Function):
    """An image in place of the sums that it is made from: the image's gradient is what goes back."""

    @staticmethod
    def forward(ctx, sums, image):
        return image

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class TrainedSequential(nn.Sequential):
    """A Sequential whose runs of convolution, batch norm and activation go through the training kernels, and everything else as it is."""

    _step_key: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = step(self, x) if torch.compiler.is_dynamo_compiling() else None
        return self._forward(x) if y is None else y

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_step_key"}

    def _forward(self, x: Tensor) -> Tensor:
        if not trains(x):
            return super().forward(x)
        modules = list(self)
        i = 0
        while i < len(modules):
            end = i + 1
            if _is_stem_with_pool(modules[i : i + 3], x):
                conv, activation, pool = modules[i : i + 3]
                geometry = (_ACTIVATIONS[type(activation)], *map(_pair, (conv.stride, conv.padding, pool.stride, pool.padding)))
                x = formatted_like(_StemPool.apply(x, conv.weight, conv.bias, *geometry, pool.ceil_mode), x)
                i += 3
                continue
            if type(modules[i]) is nn.MaxPool2d and _is_covered_pool(modules[i]):
                x = formatted_like(_MaxPool.apply(x, _pair(modules[i].stride), _pair(modules[i].padding), modules[i].ceil_mode), x)
                i = end
                continue
            if (special := _special(modules[i], x)) is not None:
                x = special
                i = end
                continue
            if _is_covered_conv(modules[i]):
                while end < len(modules) and type(modules[end]) in (nn.BatchNorm2d, *_ACTIVATIONS):
                    end += 1
            x = run_each(x, modules[i:end])
            i = end
        return x

    @staticmethod
    def serves(module: nn.Sequential) -> bool:
        """Whether it holds a layer that trains faster here than by itself."""
        return any(
            _is_covered_conv(child) if isinstance(child, nn.Conv2d) else type(child) is nn.MaxPool2d and _is_covered_pool(child)
            for child in module
        )


def fire(x: Tensor, squeeze: nn.Conv2d, expand1x1: nn.Conv2d, expand3x3: nn.Conv2d, activations: Iterable[nn.Module]) -> Tensor | None:
    """A fire module's output, or None where the training kernels do not cover it."""
    convs = (squeeze, expand1x1, expand3x3)
    if not (trains(x) and all(map(_is_plain_conv, convs))):
        return None
    if not all(type(activation) is nn.ReLU and not hooked(activation) for activation in activations):
        return None
    tensors = [tensor for conv in convs for tensor in (conv.weight, conv.bias)]
    if x.shape[1] != squeeze.in_channels or not _are_covered(tensor for tensor in tensors if tensor is not None):
        return None
    return formatted_like(_Fire.apply(x, *tensors), x)


class _Fire(torch.autograd.Function):
    """Keeps its input, the squeezed image and its result."""

    @staticmethod
    def forward(ctx, x, *parameters):
        n, _, h, w = x.shape
        squeezed = buffers.image((n, parameters[0].shape[0], h, w))
        z = buffers.image((n, parameters[2].shape[0] + parameters[4].shape[0], h, w))
        torch.ops.fastconv.training_fire(x, *parameters, squeezed, z)
        ctx.save_for_backward(x, squeezed, z, *parameters)
        return z

    @staticmethod
    def backward(ctx, dz):
        x, squeezed, z, squeeze, squeeze_bias, weight1x1, bias1x1, weight3x3, bias3x3 = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = (x, squeeze, squeeze_bias, weight1x1, bias1x1, weight3x3, bias3x3)
            return tuple(_vjp(reference.fire, inputs, ctx.needs_input_grad, dz))
        dx = buffers.image(x.shape) if ctx.needs_input_grad[0] else None
        images, weights = (dz, z, x, squeezed), (squeeze, weight1x1, weight3x3)
        _, *gradients = torch.ops.fastconv.training_fire_backward(*images, *weights, dx is not None, dx)
        gradients = (dx, *gradients)
        return tuple(gradient if needed else None for gradient, needed in zip(gradients, ctx.needs_input_grad, strict=True))


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _is_covered_pool(pool: nn.MaxPool2d) -> bool:
    small = all(padding <= 1 for padding in _pair(pool.padding))
    return _pair(pool.kernel_size) == (3, 3) and small and _pair(pool.dilation) == (1, 1) and not pool.return_indices and not hooked(pool)


class _MaxPool(torch.autograd.Function):
    """Keeps its input, and finds the maxima again."""

    @staticmethod
    def forward(ctx, x, stride, padding, ceil_mode):
        ctx.save_for_backward(x)
        ctx.stride, ctx.padding, ctx.ceil_mode = stride, padding, ceil_mode
        if not x.is_contiguous(memory_format=torch.channels_last):
            return torch.ops.fastconv.max_pool(x, stride, padding, ceil_mode)
        y = buffers.image(_checks.max_pool(x, stride, padding, ceil_mode))
        torch.ops.fastconv.training_max_pool(x, stride, padding, ceil_mode, y)
        return y

    @staticmethod
    def backward(ctx, dz):
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            pool = functools.partial(F.max_pool2d, kernel_size=3, stride=ctx.stride, padding=ctx.padding, ceil_mode=ctx.ceil_mode)
            return *_vjp(pool, (x,), (True,), dz), None, None, None
        dx = buffers.image(x.shape)
        torch.ops.fastconv.training_max_pool_backward(dz, x, ctx.stride, ctx.padding, dx)
        return dx, None, None, None


def _is_stem_with_pool(modules: Sequence[nn.Module], x: Tensor) -> bool:
    """Whether these three are a first convolution, its activation and a max-pool that one pass takes: SqueezeNet's."""
    if len(modules) != 3 or not (_is_covered_conv(modules[0]) and type(modules[1]) in _ACTIVATIONS and type(modules[2]) is nn.MaxPool2d):
        return False
    conv, activation, pool = modules
    if conv.groups != 1 or conv.kernel_size == (1, 1) or max(conv.kernel_size) > 7 or x.requires_grad or x.shape[1] != conv.in_channels:
        return False
    if any(padding >= extent for padding, extent in zip(conv.padding, conv.kernel_size, strict=True)):
        return False
    if _ACTIVATIONS[type(activation)] not in _WITHOUT_NORM or hooked(activation) or not _is_covered_pool(pool):
        return False
    tensors = [conv.weight] if conv.bias is None else [conv.weight, conv.bias]
    return _are_covered(tensors) and x.numel() > 0 and all(extent >= 3 for extent in _output_shape(x.shape, conv)[2:])


class _StemPool(torch.autograd.Function):
    """Keeps its input; the convolution, SqueezeNet's largest image, is made again by rows."""

    @staticmethod
    def forward(ctx, x, weight, bias, activation, stride, padding, pool_stride, pool_padding, ceil_mode):
        ctx.save_for_backward(x, weight, bias)
        ctx.geometry, ctx.ceil_mode = (activation, stride, padding, pool_stride, pool_padding), ceil_mode
        size = _extents(x.shape[2:], weight.shape[2:], stride, padding)
        y = x.new_empty((x.shape[0], weight.shape[0], *size), device="meta")
        z = buffers.image(_checks.max_pool(y, pool_stride, pool_padding, ceil_mode))
        torch.ops.fastconv.training_stem_pool(x, weight, bias, *ctx.geometry, ceil_mode, z)
        return z

    @staticmethod
    def backward(ctx, dz):
        x, weight, bias = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            activation, stride, padding, pool_stride, pool_padding = ctx.geometry

            def forward(x, weight, bias):
                z = _activated(F.conv2d(x, weight, bias, stride, padding), activation)
                return F.max_pool2d(z, 3, pool_stride, pool_padding, ceil_mode=ctx.ceil_mode)

            return *_vjp(forward, (x, weight, bias), needed, dz), *[None] * 6
        gradients = torch.ops.fastconv.training_stem_pool_backward(dz, x, weight, bias, *ctx.geometry)
        return None, *(gradient if need else None for gradient, need in zip(gradients, needed[1:], strict=True)), *[None] * 6


def _special(module: nn.Module, x: Tensor) -> Tensor | None:
    """module(x) for a dropout or global average pool that torch is slow at, else None."""
    if hooked(module) or not trains(x):
        return None
    if type(module) is nn.Dropout and module.training and not module.inplace and 0 < module.p < 1 and x.numel() >= _DROPOUT_LEAST:
        dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        return _Dropout.apply(x, module.p) if dense and _uniform_is_bernoulli() else None
    if type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1)):
        return _MeanOfPixels.apply(x)
    return None


_DROPOUT_LEAST = 1 << 16  # elements; below, the calls cost more than they save
_DROPOUT_CHUNK = 1 << 15  # doubles, which stay in L2


def _noise(like: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """0 with probability p, else 1 / (1 - p), from the random numbers of torch.nn.functional.dropout, in the order of memory.

    Tensor.bernoulli_ draws a double for each element through a function call: 14 ns of one core; uniform_ draws the same in 5."""
    noise = _empty_like(like)
    flat = noise.as_strided((noise.numel(),), (1,))
    uniform = torch.empty(min(_DROPOUT_CHUNK, flat.numel()), dtype=torch.float64)
    for part in flat.split(_DROPOUT_CHUNK):
        torch.lt(uniform[: part.numel()].uniform_(generator=generator), 1 - p, out=part)
    return noise.div_(1 - p)


def _empty_like(x: Tensor) -> Tensor:
    image = x.dim() == 4 and x.dtype is torch.float32 and x.is_cpu and x.is_contiguous(memory_format=torch.channels_last)
    return buffers.image(x.shape) if image else torch.empty_like(x)


def _product(x: Tensor, y: Tensor) -> Tensor:
    return torch.mul(x, y, out=_empty_like(x))


@functools.cache
def _uniform_is_bernoulli() -> bool:
    """Whether this build of torch makes Tensor.bernoulli_ of the numbers that Tensor.uniform_ gives."""
    ours, theirs = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    like = torch.empty(_DROPOUT_CHUNK + 100)
    expected = torch.empty_like(like).bernoulli_(0.7, generator=theirs).div_(0.7)
    return torch.equal(_noise(like, 0.3, ours), expected) and torch.equal(ours.get_state(), theirs.get_state())


class _Dropout(torch.autograd.Function):
    """Keeps the noise, as torch.nn.functional.dropout does."""

    @staticmethod
    def forward(ctx, x, p):
        noise = _noise(x, p)
        ctx.save_for_backward(noise)
        return _product(x, noise)

    @staticmethod
    def backward(ctx, dz):
        (noise,) = ctx.saved_tensors
        return (dz * noise if torch.is_grad_enabled() else _product(dz, noise)), None


class _MeanOfPixels(torch.autograd.Function):
    """Global average pooling, whose gradient torch would first write in NCHW."""

    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        return F.adaptive_avg_pool2d(x, 1)

    @staticmethod
    def backward(ctx, dz):
        n, c, h, w = ctx.shape
        each = (dz / (h * w)).expand(n, c, h, w)
        return each if torch.is_grad_enabled() else buffers.image(ctx.shape).copy_(each)
