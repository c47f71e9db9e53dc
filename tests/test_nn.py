"""The layers against the torch, torchvision and timm modules they stand for."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from dispatched import Operators
from torch import Tensor, nn

import fastconv.nn
from fastconv import _extension
from fastconv.models._torchvision import import_torchvision
from fastconv.optimize.planned import Planned

try:
    import_torchvision()
    from timm.layers import SqueezeExcite
    from timm.models import _efficientnet_blocks as timm_blocks
    from timm.models._efficientnet_blocks import DepthwiseSeparableConv
    from torchvision.models import mobilenetv2, mobilenetv3, squeezenet
except ImportError as error:
    pytest.skip(f"needs torchvision and timm: {error}", allow_module_level=True)

needs_kernels = pytest.mark.skipif(
    not _extension.available or _extension.backend() not in ("auto", "cpu"), reason="needs the compiled kernels"
)
timm_v1 = partial(DepthwiseSeparableConv, act_layer=nn.ReLU6)
our_v1 = partial(fastconv.nn.DepthwiseSeparable, act_layer=nn.ReLU6)
timm_v3 = partial(timm_blocks.InvertedResidual, act_layer=nn.Hardswish, exp_ratio=3.5)
our_v3 = partial(fastconv.nn.MBConv, act_layer=nn.Hardswish, exp_ratio=3.5)
gate = partial(timm_blocks.SqueezeExcite, gate_layer="hard_sigmoid", force_act_layer=nn.ReLU)

# name: (ours, original, arguments, keywords, input channels)
LAYERS = {
    "DepthwiseConv2d-3x3": (fastconv.nn.DepthwiseConv2d, nn.Conv2d, (24, 24, 3), {"padding": 1, "groups": 24}, 24),
    "DepthwiseConv2d-5x5": (fastconv.nn.DepthwiseConv2d, nn.Conv2d, (17, 17, 5, 2, (2, 1)), {"groups": 17, "bias": False}, 17),
    "DepthwiseConv2d-7x7": (fastconv.nn.DepthwiseConv2d, nn.Conv2d, (8, 8, 7), {"padding": 3, "groups": 8}, 8),
    "DepthwiseConv2d-dilated": (fastconv.nn.DepthwiseConv2d, nn.Conv2d, (8, 8, 3, 1, 2, 2), {"groups": 8}, 8),
    "DepthwiseConv2d-multiplier": (fastconv.nn.DepthwiseConv2d, nn.Conv2d, (8, 16, 3), {"groups": 8}, 8),
    "DepthwiseConv2d-dense": (fastconv.nn.DepthwiseConv2d, nn.Conv2d, (8, 8, 3), {}, 8),
    "DepthwiseConv2d-reflect": (
        fastconv.nn.DepthwiseConv2d, nn.Conv2d, (8, 8, 3), {"padding": 1, "groups": 8, "padding_mode": "reflect"}, 8,
    ),
    "DepthwiseConv2d-same": (fastconv.nn.DepthwiseConv2d, nn.Conv2d, (8, 8, 3), {"padding": "same", "groups": 8}, 8),
    "DepthwiseConv2d-stride3": (fastconv.nn.DepthwiseConv2d, nn.Conv2d, (8, 8, 3), {"padding": 4, "stride": 3, "groups": 8}, 8),
    "PointwiseConv2d": (fastconv.nn.PointwiseConv2d, nn.Conv2d, (19, 40, 1), {}, 19),
    "PointwiseConv2d-no-bias": (fastconv.nn.PointwiseConv2d, nn.Conv2d, (16, 33, 1), {"bias": False}, 16),
    "PointwiseConv2d-stride2": (fastconv.nn.PointwiseConv2d, nn.Conv2d, (16, 8, 1, 2), {}, 16),
    "PointwiseConv2d-groups": (fastconv.nn.PointwiseConv2d, nn.Conv2d, (16, 8, 1), {"groups": 4}, 16),
    "PointwiseConv2d-padding": (fastconv.nn.PointwiseConv2d, nn.Conv2d, (16, 8, 1), {"padding": 1}, 16),
    "PointwiseConv2d-3x3": (fastconv.nn.PointwiseConv2d, nn.Conv2d, (16, 8, 3), {}, 16),
    "Fire": (fastconv.nn.Fire, squeezenet.Fire, (96, 16, 64, 64), {}, 96),
    "Fire-odd": (fastconv.nn.Fire, squeezenet.Fire, (13, 5, 7, 9), {}, 13),
    "DepthwiseSeparable": (our_v1, timm_v1, (32, 48), {"noskip": True, "pw_act": True}, 32),
    "DepthwiseSeparable-stride2": (our_v1, timm_v1, (32, 48), {"stride": 2, "noskip": True, "pw_act": True}, 32),
    "DepthwiseSeparable-skip": (our_v1, timm_v1, (32, 32, 5), {}, 32),
    "InvertedResidual": (fastconv.nn.InvertedResidual, mobilenetv2.InvertedResidual, (24, 24, 1, 6), {}, 24),
    "InvertedResidual-stride2": (fastconv.nn.InvertedResidual, mobilenetv2.InvertedResidual, (24, 32, 2, 6), {}, 24),
    "InvertedResidual-no-expand": (fastconv.nn.InvertedResidual, mobilenetv2.InvertedResidual, (32, 16, 1, 1), {}, 32),
    "InvertedResidual-norm": (
        fastconv.nn.InvertedResidual, mobilenetv2.InvertedResidual, (24, 24, 1, 4), {"norm_layer": partial(nn.GroupNorm, 4)}, 24,
    ),
    "MBConv": (our_v3, timm_v3, (24, 24), {"se_layer": gate}, 24),
    "MBConv-stride2": (our_v3, timm_v3, (24, 40, 5), {"stride": 2, "se_layer": gate}, 24),
    "MBConv-no-gate": (our_v3, timm_v3, (17, 17), {"noskip": True}, 17),
    "MBConv-norm": (our_v3, timm_v3, (24, 24), {"norm_layer": partial(nn.BatchNorm2d, eps=1e-3, momentum=0.3)}, 24),
    "MBConv-dilated": (our_v3, timm_v3, (24, 24), {"dilation": 2}, 24),
}  # fmt: skip
KERNELS = [name for name in LAYERS if name.partition("-")[2] in ("", "3x3", "5x5", "no-bias", "odd", "stride2", "skip", "no-expand")]
KERNELS.remove("PointwiseConv2d-stride2")
KERNELS.remove("PointwiseConv2d-3x3")


def build(name: str, mode: str = "eval") -> tuple[nn.Module, nn.Module, Tensor]:
    """Ours and the original with the same weights, and an input."""
    ours, theirs, args, kwargs, channels = LAYERS[name]
    torch.manual_seed(0)
    original = theirs(*args, **kwargs)
    for module in original.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, 0, 0.1)
    layer = ours(*args, **kwargs)
    layer.load_state_dict(original.state_dict())
    return layer.train(mode == "train"), original.train(mode == "train"), torch.randn(2, channels, 13, 18)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    return ((actual.double() - expected.double()).norm() <= tolerance * expected.double().norm()).item()


@pytest.mark.parametrize("name", LAYERS)
def test_keys_and_shapes(name):
    layer, original, _ = build(name)
    assert {key: value.shape for key, value in layer.state_dict().items()} == {
        key: value.shape for key, value in original.state_dict().items()
    }
    original.load_state_dict(layer.state_dict())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("name", LAYERS)
def test_inference(name, layout):
    layer, original, x = build(name)
    x = x.contiguous(memory_format=layout)
    with torch.no_grad():
        expected = original(x)
        assert close(layer(x), expected)
        assert close(layer(x), expected)
        assert close(layer(x[:1]), expected[:1])
        assert layer(x[:0]).shape == (0, *expected.shape[1:])
        assert close(layer(x[..., 1:-2, 3:]), original(x[..., 1:-2, 3:]))


@needs_kernels
@pytest.mark.parametrize("name", KERNELS)
def test_inference_runs_through_the_kernels(name):
    layer, _, x = build(name)
    with torch.no_grad():
        layer(x)
        with Operators() as operators:
            layer(x)
    assert any(name.startswith("fastconv::") for name in operators.names)
    assert not any("conv" in name for name in operators.names if not name.startswith("fastconv::"))
    assert not any("pack_" in name for name in operators.names), "weights are packed once"


class Stack(Planned):
    """The layers among plain ones."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            fastconv.nn.DepthwiseConv2d(16, 16, 3, padding=1, groups=16, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU6(),
            fastconv.nn.PointwiseConv2d(16, 24, 1, bias=False),
            nn.BatchNorm2d(24),
            fastconv.nn.InvertedResidual(24, 24, 1, 4),
            fastconv.nn.Fire(24, 8, 8, 8),
        )

    def _forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@needs_kernels
def test_layers_inside_a_planned_module_fuse_with_their_neighbours():
    torch.manual_seed(0)
    stack = Stack().eval()
    x = torch.randn(1, 16, 9, 9)
    with torch.no_grad():
        assert close(stack(x), stack._forward(x))
        with Operators() as operators:
            stack(x)
        steps = {call.op.name() for call, _, _ in stack._plan.prepare().steps if hasattr(call, "op")}
    assert {name for name in operators.names if "conv" in name or "norm" in name} == {"fastconv::program_run"}
    assert steps == {"fastconv::inverted_residual_packed", "fastconv::fire_packed"}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients(name, mode):
    layer, original, x = build(name, mode)
    results = []
    for module in (layer, original):
        image = x.clone().requires_grad_()
        y = module(image)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        results.append((y.detach(), image.grad, *(parameter.grad for parameter in module.parameters())))
    for actual, expected in zip(*results, strict=True):
        assert close(actual, expected, 1e-4)
    for actual, expected in zip(layer.buffers(), original.buffers(), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_from_torch_shares_the_parameters(name):
    ours, _, _, _, _ = LAYERS[name]
    kind = getattr(ours, "func", ours)
    _, original, x = build(name)
    if name.partition("-")[2] in ("multiplier", "dense", "stride2", "groups", "padding", "3x3") and kind in (
        fastconv.nn.DepthwiseConv2d, fastconv.nn.PointwiseConv2d,
    ) and name != "DepthwiseConv2d-3x3":  # fmt: skip
        with pytest.raises(ValueError, match=rf"{kind.__name__}: module must be .*, got Conv2d\("):
            kind.from_torch(original)
        return
    keys = list(original.state_dict())
    layer = kind.from_torch(original)
    assert type(layer) is kind
    assert list(layer.state_dict()) == keys
    shared = dict(original.named_parameters())
    assert all(parameter is shared[key] for key, parameter in layer.named_parameters())
    assert len(shared) == len(list(layer.parameters()))
    shared = dict(original.named_buffers())
    assert all(buffer is shared[key] for key, buffer in layer.named_buffers())
    assert not layer.training
    with torch.no_grad():
        assert close(layer(x), original(x))
        next(original.parameters()).mul_(2)  # the original's parameters are the layer's
        assert close(layer(x), original(x))
    assert layer.train().training
    assert not original.training
    assert not any(child.training for child in original.modules())
    assert kind.from_torch(layer).training  # a layer is a module of its own structure


@pytest.mark.parametrize(
    ("kind", "module", "error", "message"),
    [
        (fastconv.nn.DepthwiseConv2d, nn.Linear(3, 3), TypeError, "DepthwiseConv2d: module must be a Conv2d, got Linear"),
        (fastconv.nn.PointwiseConv2d, nn.Conv1d(3, 3, 1), TypeError, "PointwiseConv2d: module must be a Conv2d, got Conv1d"),
        (fastconv.nn.Fire, nn.ReLU(), TypeError, "Fire: ReLU.squeeze must be a Conv2d, got NoneType"),
        (fastconv.nn.InvertedResidual, nn.ReLU(), TypeError, "InvertedResidual: ReLU.conv must be a Sequential, got NoneType"),
        (fastconv.nn.DepthwiseSeparable, nn.ReLU(), TypeError, "DepthwiseSeparable: ReLU.conv_dw must be a Conv2d, got NoneType"),
        (
            fastconv.nn.InvertedResidual,
            mobilenetv3.InvertedResidual(mobilenetv3.InvertedResidualConfig(16, 3, 16, 16, True, "RE", 2, 1, 1.0), nn.BatchNorm2d),
            TypeError,
            r"InvertedResidual: InvertedResidual\.conv must be a Sequential",
        ),
        (
            fastconv.nn.DepthwiseSeparable,
            DepthwiseSeparableConv(32, 32, se_layer=SqueezeExcite),
            ValueError,
            "DepthwiseSeparable: se is not supported, got SEModule",
        ),
        (fastconv.nn.MBConv, nn.ReLU(), TypeError, "MBConv: ReLU.conv_pw must be a Conv2d, got NoneType"),
        (fastconv.nn.MBConv, timm_v3(8, 8, se_layer=SqueezeExcite), ValueError, "MBConv: se is not supported, got SEModule"),
        (fastconv.nn.MBConv, timm_v3(8, 8, s2d=1), ValueError, "MBConv: conv_s2d is not supported, got Conv2d"),
        (fastconv.nn.MBConv, timm_v3(8, 8, group_size=4), ValueError, r"MBConv: conv_dw must be depthwise, got Conv2d\(32, 32, .*groups=8"),
        (fastconv.nn.MBConv, timm_v3(8, 8, exp_kernel_size=3), ValueError, r"MBConv: conv_pw must be a 1x1 convolution, got Conv2d\(8, 32"),
        (
            fastconv.nn.MBConv,
            timm_v3(8, 8, stride=2, pad_type="same"),
            TypeError,
            "MBConv: conv_dw must be a Conv2d, got Conv2dSame",
        ),
        (
            fastconv.nn.DepthwiseSeparable,
            DepthwiseSeparableConv(32, 32, group_size=8),
            ValueError,
            r"DepthwiseSeparable: conv_dw must be depthwise, got Conv2d\(32, 32, .*groups=4",
        ),
    ],
)
def test_from_torch_refuses_another_structure(kind, module, error, message):
    with pytest.raises(error, match=message):
        kind.from_torch(module)


def test_from_torch_refuses_a_separable_whose_activation_it_does_not_see():
    block = DepthwiseSeparableConv(32, 32)
    block.bn1 = nn.BatchNorm2d(32)
    with pytest.raises(TypeError, match=r"DepthwiseSeparable: BatchNorm2d\.act must be a Module, got NoneType"):
        fastconv.nn.DepthwiseSeparable.from_torch(block)


def test_from_torch_refuses_a_changed_fire():
    fire = squeezenet.Fire(8, 4, 4, 4)
    fire.expand3x3 = nn.Conv2d(4, 4, 3)
    with pytest.raises(ValueError, match=r"Fire: expand3x3 must be a 3x3 convolution with padding 1, got Conv2d\(4, 4, "):
        fastconv.nn.Fire.from_torch(fire)
    fire = squeezenet.Fire(8, 4, 4, 4)
    fire.squeeze = nn.Conv2d(8, 4, 3, padding=1)
    with pytest.raises(ValueError, match=r"Fire: squeeze must be a 1x1 convolution, got Conv2d\(8, 4, "):
        fastconv.nn.Fire.from_torch(fire)
    fire = squeezenet.Fire(8, 4, 4, 4)
    fire.expand1x1_activation = nn.SiLU()
    with pytest.raises(TypeError, match=r"Fire: Fire.expand1x1_activation must be a ReLU, got SiLU"):
        fastconv.nn.Fire.from_torch(fire)


def test_constructor_errors():
    with pytest.raises(ValueError, match="InvertedResidual: stride must be 1 or 2, got 3"):
        fastconv.nn.InvertedResidual(8, 8, 3, 6)


@pytest.mark.parametrize("name", KERNELS)
def test_changes_are_noticed_and_copies_are_independent(name):
    layer, original, x = build(name)
    with torch.no_grad():
        before = layer(x)
        twin, thawed = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        for parameter in layer.parameters():
            parameter.mul_(1.5)
        original.load_state_dict(layer.state_dict())
        assert close(layer(x), original(x))
        assert torch.equal(twin(x), before)
        assert torch.equal(thawed(x), before)
        for key in dict(layer.named_parameters()):
            owner, _, attribute = key.rpartition(".")
            setattr(layer.get_submodule(owner), attribute, nn.Parameter(layer.get_parameter(key) * 0.7))
        original.load_state_dict(layer.state_dict())
        assert close(layer(x), original(x))
        for _ in range(3):  # a freed weight's memory is taken again by the next one
            for parameter in layer.parameters():
                parameter.data = parameter.data * 1.1
        original.load_state_dict(layer.state_dict())
        assert close(layer(x), original(x))
        layer.double()
        original.double()
        assert close(layer(x.double()), original(x.double()), 1e-12)
        layer.float()
        original.float()
        assert close(layer(x), original(x))


@pytest.mark.parametrize("name", ["DepthwiseConv2d-3x3", "PointwiseConv2d"])
def test_an_unbatched_image_runs_as_in_conv2d(name):
    layer, original, x = build(name)
    with torch.no_grad():
        assert close(layer(x[0]), original(x[0]))


@pytest.mark.parametrize("name", ["DepthwiseConv2d-3x3", "PointwiseConv2d"])
@pytest.mark.parametrize("spoil", [lambda x: x.double(), lambda x: x[:, 1:], lambda x: x[..., 0, 0]], ids=["dtype", "channels", "dims"])
def test_wrong_inputs_raise_as_in_conv2d(name, spoil):
    layer, original, x = build(name)
    with pytest.raises(RuntimeError) as expected:
        original(spoil(x))
    with pytest.raises(RuntimeError) as raised:
        layer(spoil(x))
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize("name", ["DepthwiseConv2d-3x3", "PointwiseConv2d", "Fire", "DepthwiseSeparable", "InvertedResidual"])
def test_autocast(name):
    layer, original, x = build(name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual, expected = layer(x), original(x)
    assert actual.dtype == expected.dtype
    exact = original(x).detach()
    error = (expected.double() - exact).norm()
    assert (actual.double() - exact).norm() <= 2 * error + 1e-6 * exact.norm()


@pytest.mark.parametrize("name", ["DepthwiseConv2d-3x3", "PointwiseConv2d", "Fire", "InvertedResidual"])
def test_export(name):
    layer, original, x = build(name)
    program = torch.export.export(layer, (x,))
    with torch.no_grad():
        assert close(program.module()(x), original(x))


def test_convolutions_are_conv2d():
    for kind in (fastconv.nn.DepthwiseConv2d, fastconv.nn.PointwiseConv2d):
        layer = kind(8, 8, 1, groups=1, device="meta", dtype=torch.float64)
        assert isinstance(layer, nn.Conv2d)
        assert layer.weight.device.type == "meta"
        assert layer.weight.dtype == torch.float64
