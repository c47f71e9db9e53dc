"""Training: every layer and replaced model against the torch modules it was, outputs, all gradients and the norms' buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from harness import U, randomise_norms
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastconv
from fastconv.models._torchvision import import_torchvision

try:
    torchvision = import_torchvision()
    import timm
    from timm.models._efficientnet_blocks import DepthwiseSeparableConv, SqueezeExcite
    from timm.models._efficientnet_blocks import InvertedResidual as MBConv
    from torchvision.models import mobilenetv2, mobilenetv3, squeezenet
except ImportError as error:
    pytest.skip(f"needs torchvision and timm: {error}", allow_module_level=True)

row = torchvision.ops.Conv2dNormActivation
separable = partial(DepthwiseSeparableConv, act_layer=nn.ReLU6, pw_act=True)


def v3(channels: int, out: int, stride: int) -> nn.Module:
    """With squeeze-excitation; its hardsigmoid has no second derivative in torch."""
    config = mobilenetv3.InvertedResidualConfig(channels, 5, 40, out, True, "HS", stride, 1, 1.0)
    return mobilenetv3.InvertedResidual(config, nn.BatchNorm2d, partial(torchvision.ops.SqueezeExcitation, scale_activation=nn.Sigmoid))


# name: (original, input channels)
LAYERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "depthwise": (lambda: nn.Conv2d(24, 24, 3, padding=1, groups=24), 24),
    "depthwise-5x5-stride2": (lambda: nn.Conv2d(17, 17, 5, 2, 2, groups=17, bias=False), 17),
    "pointwise": (lambda: nn.Conv2d(19, 40, 1), 19),
    "pointwise-no-bias": (lambda: nn.Conv2d(16, 33, 1, bias=False), 16),
    "fire": (lambda: squeezenet.Fire(32, 16, 32, 32), 32),
    "fire-odd": (lambda: squeezenet.Fire(13, 5, 7, 9), 13),
    "separable": (lambda: separable(16, 24, noskip=True), 16),
    "separable-stride2": (lambda: separable(19, 33, stride=2, noskip=True), 19),
    "separable-skip": (lambda: separable(16, 16, 5), 16),
    "inverted-residual": (lambda: mobilenetv2.InvertedResidual(16, 16, 1, 6), 16),
    "inverted-residual-stride2": (lambda: mobilenetv2.InvertedResidual(12, 19, 2, 4), 12),
    "inverted-residual-no-expand": (lambda: mobilenetv2.InvertedResidual(32, 16, 1, 1), 32),
    "v3-residual": (lambda: v3(16, 16, 1), 16),
    "v3-stride2": (lambda: v3(16, 24, 2), 16),
    "separable-gate": (lambda: separable(16, 16, 5, se_layer=SqueezeExcite), 16),
    "mbconv": (lambda: MBConv(16, 16, exp_ratio=3, act_layer=nn.SiLU, se_layer=SqueezeExcite), 16),
    "mbconv-stride2": (lambda: MBConv(12, 19, 5, 2, exp_ratio=4, act_layer=nn.ReLU6), 12),
    "row-pointwise": (lambda: row(16, 40, 1, activation_layer=nn.Hardswish), 16),
    "row-linear": (lambda: row(40, 16, 1, activation_layer=None), 40),
    "row-depthwise-5x5": (lambda: row(24, 24, 5, 2, groups=24, activation_layer=nn.SiLU), 24),
    "row-image": (lambda: row(3, 16, 3, 2, activation_layer=nn.ReLU6), 3),
}
NORMED = [name for name in LAYERS if not name.startswith(("depthwise", "pointwise", "fire"))]
SIZES = {"2x13x18": (2, 13, 18), "1x7x7": (1, 7, 7), "5x1x3": (5, 1, 3), "1x29x2": (1, 29, 2)}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "squeezenet1_1": torchvision.models.squeezenet1_1,
    "mobilenet_v1": partial(timm.create_model, "mobilenetv1_100"),
    "mobilenet_v2": partial(torchvision.models.mobilenet_v2, width_mult=0.5),
    "mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    "timm_mobilenet_v3_small": partial(timm.create_model, "mobilenetv3_small_100"),
}
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
each_layer = pytest.mark.parametrize("name", LAYERS)
each_format = pytest.mark.parametrize("layout", FORMATS)
each_mode = pytest.mark.parametrize("mode", [True, False], ids=["train", "frozen"])  # frozen: norms in eval mode while gradients flow


def randomised(module: nn.Module) -> nn.Module:
    randomise_norms(module)
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return module


def pair(name: str, mode: bool = True, size: str = "2x13x18") -> tuple[nn.Module, nn.Module, Tensor]:
    """The original, its replaced copy and an input."""
    build, channels = LAYERS[name]
    original = randomised(build()).train(mode)
    layer = fastconv.replace(copy.deepcopy(original))
    assert type(layer).__module__.startswith("fastconv.")
    batch, *pixels = SIZES[size]
    return original, layer, torch.randn(batch, channels, *pixels)


def cotangent(y: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(y.shape, generator=generator).to(y.dtype)


Results = dict[str, Tensor | None]


def step(module: nn.Module, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor] = lambda module, x: module(x)) -> Results:
    """Everything that a step of training makes: the output, gradients of the input and of each parameter, buffers."""
    x = x.detach().clone().requires_grad_(x.requires_grad)  # in its memory format
    before = x.detach().clone()
    y = run(module, x)
    assert torch.equal(x, before), "the input was written to"
    y.backward(cotangent(y))
    results = {"output": y.detach(), "input.grad": x.grad}
    results |= {f"{key}.grad": parameter.grad for key, parameter in module.named_parameters()}
    return results | {key: buffer.clone() for key, buffer in module.named_buffers()}


def check(actual: Results, eager: Results, exact: Results, terms: int, factor: int = 4) -> None:
    """Fails unless each tensor is as near the float64 one as eager torch's, up to a factor, or up to the rounding that a sum of
    `terms` products leaves on average, U sqrt(terms) of its size."""
    assert actual.keys() == eager.keys() == exact.keys()
    for key, value in actual.items():
        if eager[key] is None:
            assert value is None, key
            continue
        assert value is not None, f"{key} is missing"
        assert value.shape == eager[key].shape
        assert value.dtype == eager[key].dtype
        if not value.is_floating_point():
            assert torch.equal(value, eager[key]), key
            continue
        truth = exact[key].double()
        bound = factor * (eager[key].double() - truth).norm() + U * terms**0.5 * truth.norm()
        off = (value.double() - truth).norm()
        assert off <= bound, f"{key}: {off:.3g} off, bound {bound:.3g}, eager {(eager[key].double() - truth).norm():.3g}"


def terms_of(module: nn.Module, x: Tensor) -> int:
    """The longest sum: over the weights of an output, or over images and pixels in a weight's gradient."""
    weights = [p[0].numel() for p in module.parameters() if p.dim() > 1]
    return max(x.numel() // x.shape[1], *weights)


def compare(
    original: nn.Module, layer: nn.Module, x: Tensor, run: Callable[..., Tensor] = lambda module, x: module(x), factor: int = 4
) -> None:
    double = copy.deepcopy(original).double()
    eager = step(original, x, run)
    check(step(layer, x, run), eager, step(double, x.detach().double().requires_grad_(x.requires_grad), run), terms_of(layer, x), factor)


@each_mode
@each_format
@each_layer
def test_a_step(name, layout, mode):
    for size in SIZES:
        original, layer, x = pair(name, mode, size)
        x = x.contiguous(memory_format=FORMATS[layout]).requires_grad_()
        compare(original, layer, x)


@each_format
@each_layer
def test_the_output_keeps_the_inputs_memory_format(name, layout):
    _, layer, x = pair(name)
    y = layer(x.contiguous(memory_format=FORMATS[layout]).requires_grad_())
    assert y.is_contiguous(memory_format=FORMATS[layout])
    assert not y.is_contiguous(memory_format=next(other for key, other in FORMATS.items() if key != layout))


@each_mode
@each_format
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_of_a_whole_network(name, layout, mode):
    torch.manual_seed(0)
    original = randomised(NETWORKS[name]()).train(mode)
    model = fastconv.replace(copy.deepcopy(original)).to(memory_format=FORMATS[layout])
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=FORMATS[layout]).requires_grad_()
    compare(original.to(memory_format=FORMATS[layout]), model, x)


@pytest.mark.parametrize("wanted", ["input", "parameters", "norms", "convolutions", "every other", "last"])
@each_layer
def test_only_some_gradients(name, wanted):
    for mode in (True, False):
        original, layer, x = pair(name, mode)
        for module in (original, layer):
            parameters = list(module.parameters())
            for i, parameter in enumerate(parameters):
                one = {
                    "input": False,
                    "parameters": True,
                    "norms": parameter.dim() == 1,
                    "convolutions": parameter.dim() > 1,
                    "every other": i % 2 == 1,
                    "last": i == len(parameters) - 1,
                }[wanted]
                parameter.requires_grad_(one)
        x.requires_grad_(wanted in ("input", "every other"))
        if x.requires_grad or any(parameter.requires_grad for parameter in layer.parameters()):
            compare(original, layer, x)


@pytest.mark.parametrize("name", NORMED)
def test_one_norm_frozen_by_itself(name):
    original, layer, x = pair(name)
    for module in (original, layer):
        next(part for part in module.modules() if isinstance(part, nn.BatchNorm2d)).eval()
    compare(original, layer, x.requires_grad_())


@pytest.mark.parametrize("options", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1, "momentum": 0.7}])
def test_norms_of_other_kinds(options):
    build = (
        lambda norm: row(16, 40, 1, norm_layer=norm),
        lambda norm: row(16, 16, groups=16, norm_layer=norm),
        lambda norm: mobilenetv2.InvertedResidual(16, 16, 1, 6, norm),
    )
    for one in build:
        for mode in (True, False):
            original = randomised(one(partial(nn.BatchNorm2d, **options))).train(mode)
            layer = fastconv.replace(copy.deepcopy(original))
            compare(original, layer, torch.randn(2, 16, 9, 7).requires_grad_())


@each_mode
@each_layer
def test_gradients_accumulate(name, mode):
    original, layer, x = pair(name, mode)

    def twice(module: nn.Module, x: Tensor) -> Tensor:
        module(x.flip(0)).square().mean().backward()
        return module(x)

    compare(original, layer, x.requires_grad_(), twice)


@each_layer
def test_a_layer_called_twice_in_one_graph(name):
    original, layer, x = pair(name)
    compare(original, layer, x.requires_grad_(), lambda module, x: module(x) + module(x.flip(3)).flip(3))


@pytest.mark.parametrize("reentrant", [False, True])
@each_layer
def test_checkpointed(name, reentrant):
    original, layer, x = pair(name)
    compare(original, layer, x.requires_grad_(), lambda module, x: checkpoint(module, x, use_reentrant=reentrant))


@each_mode
@each_layer
def test_without_gradients(name, mode):
    original, layer, x = pair(name, mode)
    for _ in range(2):
        with torch.no_grad():
            expected, actual = original(x), layer(x)
        assert not actual.requires_grad
        assert (actual - expected).norm() <= 1e-5 * expected.norm()
    for (key, buffer), other in zip(layer.named_buffers(), original.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, msg=key)


@each_mode
@each_layer
def test_other_cotangents(name, mode):
    """Of no memory of their own (a sum's), and in the other memory format."""
    for change in (lambda y: y.sum().expand_as(y), lambda y: y * 1, lambda y: y.transpose(2, 3).contiguous().transpose(2, 3)):
        original, layer, x = pair(name, mode)
        # What a sum sends back is the same everywhere, which a norm takes out: what is left is rounding, in either.
        compare(original, layer, x.requires_grad_(), lambda module, x, change=change: change(module(x)), factor=8)
    original, layer, x = pair(name, mode)
    grads = []
    for module in (original, layer):
        y = module(x.requires_grad_())
        grads.append(torch.autograd.grad(y, x, cotangent(y).contiguous(memory_format=torch.channels_last))[0])
    assert (grads[1] - grads[0]).norm() <= 1e-5 * grads[0].norm()


@each_layer
def test_the_graph_can_be_kept(name):
    _, layer, x = pair(name)
    tensors = [x.requires_grad_(), *layer.parameters()]
    y = layer(x)
    first = torch.autograd.grad(y, tensors, cotangent(y), retain_graph=True)
    for again in (torch.autograd.grad(y, tensors, cotangent(y), retain_graph=True), torch.autograd.grad(y, tensors, cotangent(y))):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, tensors, cotangent(y))


@each_layer
def test_a_weight_written_before_the_backward_is_noticed(name):
    _, layer, x = pair(name)
    y = layer(x.requires_grad_())
    with torch.no_grad():
        next(parameter for parameter in layer.parameters() if parameter.dim() > 1).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@each_mode
@each_layer
def test_second_derivatives(name, mode):
    """A gradient penalty, as in eager torch."""
    original, layer, x = pair(name, mode)

    def penalty(module: nn.Module, x: Tensor) -> Tensor:
        y = module(x)
        (gradient,) = torch.autograd.grad(y, x, cotangent(y), create_graph=True)
        return y * 0.5 + gradient.square().sum()

    compare(original, layer, x.requires_grad_(), penalty)


@each_mode
@each_layer
def test_gradcheck(name, mode):
    _, layer, x = pair(name, mode)
    layer.double()
    parameters = dict(layer.named_parameters())
    buffers = {key: buffer.clone() for key, buffer in layer.named_buffers()}

    def call(x: Tensor, *values: Tensor) -> Tensor:
        state = {key: buffer.clone() for key, buffer in buffers.items()}
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)) | state, (x,))

    values = [parameter.detach().clone().requires_grad_() for parameter in parameters.values()]
    x = x[:, :, :5, :4].double().requires_grad_()
    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


@each_layer
def test_autocast(name):
    """In bfloat16, gradients arrive in the parameters' dtype, at most twice as far off as eager's."""
    original, layer, x = pair(name)

    def mixed(module: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    exact = step(copy.deepcopy(original).double(), x.double().requires_grad_())
    eager, actual = step(original, x.requires_grad_(), mixed), step(layer, x.requires_grad_(), mixed)
    for key, value in actual.items():
        assert value.dtype == eager[key].dtype, key
        if value.is_floating_point():
            truth = exact[key].double()
            error = (eager[key].double() - truth).norm()
            assert (value.double() - truth).norm() <= 2 * error + 2**-9 * truth.norm(), key


@pytest.mark.parametrize("name", NORMED)
def test_one_value_a_channel_is_refused_as_in_eager(name):
    original, layer, x = pair(name)
    x = x[:1, :, :1, :1]
    for module in (original, layer):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            module(x)
