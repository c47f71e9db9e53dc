"""fastconv.replace: the layers of a model become fastconv's in place, and everything made from the model before keeps working."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from functools import partial

import pytest
import torch
from harness import randomise_norms
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastconv
from fastconv import models
from fastconv.models._torchvision import import_torchvision
from fastconv.models.mobilenet_v3 import InvertedResidual as InvertedResidualV3
from fastconv.nn import Conv2dNormActivation, DepthwiseConv2d, DepthwiseSeparable, Fire, InvertedResidual, MBConv, PointwiseConv2d
from fastconv.nn._training import TrainedSequential

try:
    torchvision = import_torchvision()
    import timm
    from timm.models import _efficientnet_blocks as timm_blocks
    from timm.models._efficientnet_blocks import DepthwiseSeparableConv
    from torchvision.models import mobilenetv2, mobilenetv3, squeezenet
except ImportError as error:
    pytest.skip(f"needs torchvision and timm: {error}", allow_module_level=True)

OURS = (Conv2dNormActivation, DepthwiseConv2d, DepthwiseSeparable, Fire, InvertedResidual, InvertedResidualV3, MBConv, PointwiseConv2d)
timm_v1 = partial(DepthwiseSeparableConv, act_layer=nn.ReLU6, noskip=True, pw_act=True)

# name: (builder, how many of each of our layers it gets)
NETWORKS = {
    "squeezenet1_0": (torchvision.models.squeezenet1_0, {Fire: 8, PointwiseConv2d: 1}),
    "squeezenet1_1": (torchvision.models.squeezenet1_1, {Fire: 8, PointwiseConv2d: 1}),
    "mobilenet_v1": (partial(timm.create_model, "mobilenetv1_100"), {DepthwiseSeparable: 13}),
    # 17 blocks with an expansion and a depthwise row each, the first without the former; stem and head.
    "mobilenet_v2": (torchvision.models.mobilenet_v2, {InvertedResidual: 17, Conv2dNormActivation: 16 + 17 + 2}),
    # Blocks, and the rows inside and around them; the squeeze-excitations' 1x1 convolutions, of one pixel, stay torch's.
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, {InvertedResidualV3: 11, Conv2dNormActivation: 34}),
    "mobilenet_v3_large": (torchvision.models.mobilenet_v3_large, {InvertedResidualV3: 15, Conv2dNormActivation: 46}),
    # The 1x1 convolutions are V2's head; V3's last block and head.
    "timm_mobilenet_v2": (partial(timm.create_model, "mobilenetv2_100"), {DepthwiseSeparable: 1, MBConv: 16, PointwiseConv2d: 1}),
    "timm_mobilenet_v3_large": (
        partial(timm.create_model, "mobilenetv3_large_100"),
        {DepthwiseSeparable: 1, MBConv: 14, PointwiseConv2d: 2},
    ),
    "timm_mobilenet_v3_small": (
        partial(timm.create_model, "mobilenetv3_small_100"),
        {DepthwiseSeparable: 1, MBConv: 10, PointwiseConv2d: 2},
    ),
}
each_network = pytest.mark.parametrize(
    "name", ["squeezenet1_1", "mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small", "timm_mobilenet_v3_small"]
)


def randomise(model: nn.Module) -> nn.Module:
    randomise_norms(model)
    return model


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(NETWORKS[name][0]())


def ours(model: nn.Module) -> Counter[type]:
    return Counter(type(module) for module in model.modules() if type(module) in OURS)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() <= tolerance * expected.double().norm()).item()


def tensors(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(tensor)) for name, tensor in (*model.named_parameters(), *model.named_buffers())]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_that_has_a_twin_becomes_it(name):
    model = build(name)
    assert fastconv.replace(model) is model
    assert ours(model) == NETWORKS[name][1]


@each_network
def test_tensors_names_and_modes_stay_the_very_same(name):
    model, untouched = build(name), build(name)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 != 0)
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    before, keys = tensors(model), list(model.state_dict())
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    kept = {id(module): (path, module.training) for path, module in model.named_modules()}
    fastconv.replace(model)
    assert tensors(model) == before
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    for path, module in model.named_modules():
        if type(module) in OURS or isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            assert kept[id(module)] == (path, module.training)
    assert list(model.state_dict()) == keys
    untouched.load_state_dict(model.state_dict())
    model.load_state_dict(untouched.state_dict())
    assert list(untouched.state_dict()) == keys


@each_network
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-9), (torch.float32, 5e-3)], ids=["float64", "float32"])
def test_an_optimizer_made_before_trains_the_replaced_model_as_the_original(name, dtype, near):
    """In float32 rounding takes a few inputs over the kinks of their activations: after one step, plain torch itself is up to 4e-3 from
    float64 here (channels_last), the kernels up to 8e-4."""
    original, model = build(name).to(dtype), build(name).to(dtype)
    x, target = torch.randn(4, 3, 64, 64, dtype=dtype), torch.randint(1000, (4,))
    losses = []
    for network, change in ((original, lambda network: network), (model, fastconv.replace)):
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
        change(network)
        torch.manual_seed(1)  # dropout
        for _ in range(2):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[0] != losses[1]
    assert losses[2] == pytest.approx(losses[0], rel=min(near, 1e-5))
    assert losses[3] == pytest.approx(losses[1], rel=near)
    start = build(name).to(dtype).state_dict()
    for (key, actual), expected in zip(model.state_dict().items(), original.state_dict().values()):
        if actual.is_floating_point():
            assert dtype == torch.float32 or close(actual, expected, near), key
        else:
            assert torch.equal(actual, expected), key
    moved = sum(not torch.equal(value, start[key]) for key, value in model.state_dict().items())
    assert moved > 0.9 * len(start)


@each_network
def test_inference(name):
    original, model = build(name).eval(), fastconv.replace(build(name)).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert close(model(x), original(x))


@each_network
def test_optimize_takes_a_replaced_model_to_the_same_kernels(name):
    original, model = build(name).eval(), fastconv.replace(build(name)).eval()
    fast, x = fastconv.optimize(model), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert close(fast(x), original(x))
    kernels = {row.name: row.kernel for row in fastconv.explain(fast).rows}
    for row in fastconv.explain(original).rows:  # timm's norms hold their activation
        assert kernels.get(row.name, row.kernel) == row.kernel, row.name


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v2"])
def test_revert_undoes_optimize_and_not_replace(name):
    model = fastconv.replace(build(name))
    plain = fastconv.revert(fastconv.optimize(model))
    assert ours(plain) == ours(model) == ours(fastconv.revert(model))
    assert list(plain.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), model.state_dict().values()))
    assert not {id(parameter) for parameter in plain.parameters()} & {id(parameter) for parameter in model.parameters()}
    with torch.no_grad():  # back to the library's classes: its own model, with these weights
        original = build(name).eval()
        for parameter in original.parameters():
            parameter.zero_()
        original.load_state_dict(plain.state_dict())
        x = torch.randn(1, 3, 64, 64)
        assert close(original(x), plain.eval()(x))


@each_network
def test_replacing_again_changes_nothing(name):
    model = fastconv.replace(build(name))
    before = [(path, type(module), id(module)) for path, module in model.named_modules()]
    assert fastconv.replace(model) is model
    assert [(path, type(module), id(module)) for path, module in model.named_modules()] == before


@pytest.mark.parametrize("name", models.list_models())
def test_our_own_models_stay_what_they_are(name):
    model = randomise(models.get_model(name)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        blocks = {path: type(module) for path, module in model.named_modules() if type(module) in OURS}
        assert fastconv.replace(model) is model
        assert close(model(x), before)
    assert blocks.items() <= {path: type(module) for path, module in model.named_modules()}.items()


def conv_norm(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), *layers)


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (lambda: squeezenet.Fire(8, 4, 4, 4), Fire),
        (lambda: mobilenetv2.InvertedResidual(8, 8, 1, 6), InvertedResidual),
        (lambda: mobilenetv2.InvertedResidual(8, 16, 2, 1), InvertedResidual),
        (lambda: timm_v1(8, 16, stride=2), DepthwiseSeparable),
        (lambda: DepthwiseSeparableConv(8, 8), DepthwiseSeparable),
        (lambda: DepthwiseSeparableConv(8, 8, se_layer=timm_blocks.SqueezeExcite), DepthwiseSeparable),
        (lambda: timm_blocks.InvertedResidual(8, 8, exp_ratio=6), MBConv),
        (lambda: timm_blocks.InvertedResidual(8, 16, 5, 2, exp_ratio=3, se_layer=timm_blocks.SqueezeExcite), MBConv),
        (lambda: torchvision.ops.Conv2dNormActivation(8, 12), Conv2dNormActivation),
        (lambda: torchvision.ops.Conv2dNormActivation(8, 12, activation_layer=None), Conv2dNormActivation),
        (lambda: conv_norm(nn.Hardswish()), Conv2dNormActivation),
        (lambda: nn.Conv2d(8, 8, 5, 2, 2, groups=8), DepthwiseConv2d),
        (lambda: nn.Conv2d(8, 12, 1), PointwiseConv2d),
        (lambda: nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Flatten()), TrainedSequential),
        (lambda: nn.Sequential(nn.Tanh(), nn.MaxPool2d(3, 2)), TrainedSequential),
    ],
)
def test_a_model_that_is_one_layer(build, kind):
    original, layer = build(), build()
    layer.load_state_dict(original.state_dict())
    layer.note = "the user's own attribute"
    assert fastconv.replace(layer) is layer
    assert type(layer) is kind
    assert layer.note == "the user's own attribute"
    x = torch.randn(2, 8, 9, 7)
    for mode in (True, False):
        assert close(layer.train(mode)(x), original.train(mode)(x))
    for actual, expected in zip(layer.buffers(), original.buffers(), strict=True):
        torch.testing.assert_close(actual, expected)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is kind
        assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Conv2d(8, 8, 3),
        lambda: nn.Conv2d(8, 8, 7, padding=3, groups=8),
        lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8),
        lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="reflect"),
        lambda: nn.Conv2d(8, 16, 1, stride=2),
        lambda: nn.Conv2d(8, 16, 1, groups=4),
        lambda: nn.LazyConv2d(8, 1),
        lambda: nn.Conv1d(8, 8, 1),
        lambda: nn.Linear(8, 8),
        lambda: conv_norm(nn.Dropout(0.1)),
        lambda: conv_norm(nn.ReLU(), nn.MaxPool2d(2)),
        lambda: nn.Sequential(nn.Conv2d(8, 12, 3), nn.GroupNorm(4, 12), nn.ReLU()),
        lambda: nn.Sequential(nn.Conv2d(8, 12, 3), nn.ReLU()),
        lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 1)),
        lambda: torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1))),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_no_layer_stands_for_stays(build):
    module = build()
    before = [type(child) for child in module.modules()]
    assert fastconv.replace(module) is module
    assert [type(child) for child in module.modules()] == before


@pytest.mark.parametrize(
    "build",
    [
        partial(timm_blocks.InvertedResidual, 8, 8, exp_ratio=2, drop_path_rate=0.5, se_layer=timm_blocks.SqueezeExcite),
        partial(DepthwiseSeparableConv, 8, 8, drop_path_rate=0.5),
    ],
)
def test_stochastic_depth_drops_what_it_did(build):
    """Whole images' blocks, half of them here; from the same random numbers."""
    torch.manual_seed(0)
    original = randomise(build())
    layer = fastconv.replace(copy.deepcopy(original))
    assert type(layer) in OURS
    x = torch.randn(16, 8, 9, 7)
    results = []
    for module in (original, layer):
        torch.manual_seed(1)
        image = x.clone().requires_grad_()
        y = module(image)
        dropped = [torch.equal(out, image) for out, image in zip(y, x)]
        assert 0 < sum(dropped) < 16
        y.square().sum().backward()
        results.append((y, image.grad, *(parameter.grad for parameter in module.parameters()), torch.tensor(dropped)))
    for actual, expected in zip(*results, strict=True):
        assert close(actual, expected, 1e-4)
    assert close(layer.eval()(x), original.eval()(x))


class OwnFire(nn.Module):
    """SqueezeNet's fire as many write it."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, 4, 1)
        self.squeeze_activation = nn.ReLU(inplace=True)
        self.expand1x1 = nn.Conv2d(4, channels // 2, 1)
        self.expand1x1_activation = nn.ReLU(inplace=True)
        self.expand3x3 = nn.Conv2d(4, channels // 2, 3, padding=1)
        self.expand3x3_activation = nn.ReLU(inplace=True)

    def forward(self, x):
        squeezed = self.squeeze_activation(self.squeeze(x))
        left = self.expand1x1_activation(self.expand1x1(squeezed))
        return torch.cat((left, self.expand3x3_activation(self.expand3x3(squeezed))), dim=1)


class WithBypass(OwnFire):
    def forward(self, x):
        return x + super().forward(x)


class Swapped(OwnFire):
    def forward(self, x):
        x = self.squeeze_activation(self.squeeze(x))
        return torch.cat([self.expand3x3_activation(self.expand3x3(x)), self.expand1x1_activation(self.expand1x1(x))], 1)


class NoisyInTraining(OwnFire):
    def forward(self, x):
        return super().forward(x * 2 if self.training else x)


class WithDropout(OwnFire):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class WithoutActivation(OwnFire):
    def forward(self, x):
        x = self.squeeze(x)
        return torch.cat([self.expand1x1_activation(self.expand1x1(x)), self.expand3x3_activation(self.expand3x3(x))], 1)


class ByTheData(OwnFire):
    def forward(self, x):
        return super().forward(x) if x.mean() > 0 else x


class WithAMethod(OwnFire):
    def cost(self):
        return sum(parameter.numel() for parameter in self.parameters())


def test_a_fire_of_ones_own_class():
    own, copied = OwnFire(), OwnFire()
    copied.load_state_dict(own.state_dict())
    assert type(fastconv.replace(own)) is Fire
    x = torch.randn(2, 8, 9, 7)
    assert close(own(x), copied(x))


@pytest.mark.parametrize("kind", [WithBypass, Swapped, NoisyInTraining, WithDropout, WithoutActivation, ByTheData, WithAMethod])
def test_a_block_that_computes_something_else_keeps_its_class(kind):
    block = kind()
    original = copy.deepcopy(block)
    fastconv.replace(block)
    assert type(block) is kind
    assert ours(block) == {PointwiseConv2d: 2}  # its layers are taken by themselves
    x = torch.randn(2, 8, 9, 7)
    for mode in (True, False):
        torch.manual_seed(0)
        expected = original.train(mode)(x)
        torch.manual_seed(0)
        assert close(block.train(mode)(x), expected)


class ResidualAlways(mobilenetv2.InvertedResidual):
    def forward(self, x):
        return x - self.conv(x)


def test_an_inverted_residual_that_subtracts_keeps_its_class():
    block = fastconv.replace(ResidualAlways(8, 8, 1, 6))
    assert type(block) is ResidualAlways
    assert ours(block) == {Conv2dNormActivation: 2, PointwiseConv2d: 1}


def v3_block(kind: type[nn.Module] = mobilenetv3.InvertedResidual) -> nn.Module:
    return kind(mobilenetv3.InvertedResidualConfig(8, 3, 24, 8, True, "RE", 1, 1, 1.0), nn.BatchNorm2d)


class SubtractsInV3(mobilenetv3.InvertedResidual):
    def forward(self, x):
        return self.block(x) - x


def dropped_path() -> nn.Module:
    """EfficientNet's block: V3's, whose result is left out now and then."""
    config = torchvision.models.efficientnet.MBConvConfig(3, 3, 1, 8, 8, 1)
    return torchvision.models.efficientnet.MBConv(config, 0.0, nn.BatchNorm2d)


@pytest.mark.parametrize("build", [lambda: v3_block(SubtractsInV3), dropped_path])
def test_what_looks_like_a_block_of_v3_keeps_its_class(build):
    block = build()
    kind = type(block)
    assert type(fastconv.replace(block)) is kind
    assert ours(block)[Conv2dNormActivation] == 3
    assert type(fastconv.replace(v3_block())) is InvertedResidualV3


def test_a_forward_replaced_on_the_module_stays():
    block = squeezenet.Fire(8, 4, 4, 4)
    block.forward = lambda x: x
    fastconv.replace(block)
    assert type(block) is squeezenet.Fire
    assert ours(block) == {PointwiseConv2d: 2}
    x = torch.randn(1, 8, 5, 5)
    assert block(x) is x


def test_shared_modules_stay_shared():
    fire, conv = squeezenet.Fire(8, 4, 4, 4), nn.Conv2d(8, 8, 1)
    model = nn.Sequential(fire, conv, nn.Sequential(fire, conv), fire)
    fastconv.replace(model)
    assert model[0] is model[2][0] is model[3] is fire
    assert model[1] is model[2][1] is conv
    assert (type(fire), type(conv)) == (Fire, PointwiseConv2d)
    assert len(list(model.parameters())) == 8
    original = nn.Sequential(*(copy.deepcopy(layer) for layer in (fire, conv, fire, conv, fire)))
    x = torch.randn(1, 8, 5, 5)
    assert close(model(x), original(x))


def test_references_held_elsewhere_see_the_replaced_layers():
    model = torchvision.models.squeezenet1_1()
    held = [module for module in model.modules() if isinstance(module, squeezenet.Fire)]
    wrapped = nn.parallel.DataParallel(model)
    fastconv.replace(wrapped)
    assert all(type(module) is Fire for module in held)
    assert wrapped.module is model


# Hooks


def test_a_hook_inside_a_sequential_sees_what_it_saw():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(8, 4, 1))
    original, seen, expected = copy.deepcopy(model), [], []
    for net, values in ((model, seen), (original, expected)):
        for i in (1, 2):
            net[i].register_forward_hook(lambda module, args, y, values=values: values.append(y.detach()))
    assert type(fastconv.replace(model)) is TrainedSequential
    x = torch.randn(2, 3, 17, 16)
    assert close(model(x), original(x))
    assert len(seen) == len(expected) == 2
    assert all(map(close, seen, expected))


def test_a_layers_own_hooks_stay_with_it():
    model, seen = torchvision.models.squeezenet1_1(), []
    fire = model.features[3]
    handles = [
        fire.register_forward_hook(lambda module, args, output: seen.append(("forward", type(module), output.shape))),
        fire.register_forward_pre_hook(lambda module, args: seen.append(("pre", type(module), args[0].shape))),
        fire.register_full_backward_hook(lambda module, grads, outputs: seen.append(("backward", type(module), outputs[0].shape))),
        fire.register_state_dict_post_hook(lambda module, state, prefix, metadata: seen.append(("state", type(module), prefix))),
    ]
    fastconv.replace(model)
    x = torch.randn(1, 3, 64, 64)
    model(x).sum().backward()
    model.state_dict()
    assert [name for name, _, _ in seen] == ["pre", "forward", "backward", "state"]
    assert {kind for _, kind, _ in seen} == {Fire}
    model.eval()
    with torch.no_grad():
        model(x)
    assert [name for name, _, _ in seen[4:]] == ["pre", "forward"]
    for handle in handles[:3]:
        handle.remove()
    model.train()(x).sum().backward()
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("build", "inner", "parts"),
    [
        (lambda: squeezenet.Fire(8, 4, 4, 4), "squeeze", {PointwiseConv2d: 2}),
        (lambda: mobilenetv2.InvertedResidual(8, 8, 1, 6), "conv.1", {Conv2dNormActivation: 2, PointwiseConv2d: 1}),
        (lambda: mobilenetv2.InvertedResidual(8, 8, 1, 6), "conv.1.1", {Conv2dNormActivation: 1, DepthwiseConv2d: 1, PointwiseConv2d: 1}),
        (lambda: timm_v1(8, 16), "bn1", {DepthwiseConv2d: 1, PointwiseConv2d: 1}),
        (lambda: torchvision.ops.Conv2dNormActivation(8, 12, 1), "1", {PointwiseConv2d: 1}),
    ],
)
def test_a_hook_inside_a_block_keeps_it_in_parts_and_sees_what_it_saw(build, inner, parts):
    original, block = build(), build()
    block.load_state_dict(original.state_dict())
    seen = []
    for module in (original, block):
        module.get_submodule(inner).register_forward_hook(lambda module, args, output: seen.append((args[0].detach(), output.detach())))
    fastconv.replace(block)
    assert ours(block) == parts
    x = torch.randn(2, 8, 9, 7)
    for mode in (True, False):
        seen.clear()
        expected = original.train(mode)(x)
        actual = block.train(mode)(x)
        assert close(actual, expected)
        assert len(seen) == 2
        assert all(close(b, a) for a, b in zip(*seen))


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("build", "inner"),
    [
        (lambda: squeezenet.Fire(8, 4, 4, 4), "expand3x3"),
        (lambda: mobilenetv2.InvertedResidual(8, 8, 1, 6), "conv.1.0"),
        (lambda: timm_v1(8, 16), "conv_pw"),
        (lambda: torchvision.ops.Conv2dNormActivation(8, 12, 1), "0"),
    ],
)
def test_a_hook_registered_later_is_called_too(build, inner, mode):
    layer, calls = fastconv.replace(build()).train(mode), []
    assert type(layer) in OURS
    x = torch.randn(2, 8, 9, 7)
    layer(x)
    handle = layer.get_submodule(inner).register_forward_hook(lambda module, args, output: calls.append(output))
    with torch.set_grad_enabled(mode):
        y = layer(x)
    assert len(calls) == 1
    if mode:
        y.sum().backward()
    handle.remove()
    layer(x)
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_by_hook_keeps_training_its_own_parameters():
    conv, original = (torch.nn.utils.weight_norm(nn.Conv2d(8, 12, 1)) for _ in range(2))
    original.load_state_dict(conv.state_dict())
    x = torch.randn(2, 8, 5, 5)
    model = fastconv.replace(nn.Sequential(conv))
    for module in (model, original):
        module(x).square().sum().backward()
    assert type(conv) is PointwiseConv2d
    assert close(conv.weight_g.grad, original.weight_g.grad)
    assert close(conv.weight_v.grad, original.weight_v.grad)


def test_a_plan_made_before_follows():
    model = models.squeezenet1_1().eval()
    model.features[3] = squeezenet.Fire(64, 16, 64, 64).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        fastconv.replace(model)
        assert type(model.features[3]) is Fire
        assert close(model(x), before)
        model.features[3].squeeze.weight.mul_(2)
        assert not close(model(x), before)
        assert close(model(x), model._forward(x))


# Errors


@pytest.mark.parametrize("model", ["mobilenet_v2", None, squeezenet.Fire], ids=["string", "None", "class"])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(TypeError, match=rf"^replace: model must be a torch\.nn\.Module, got {type(model).__name__}$"):
        fastconv.replace(model)


def test_an_optimized_model_is_refused():
    fast = fastconv.optimize(squeezenet.Fire(8, 4, 4, 4))
    with pytest.raises(TypeError, match=r"replace: model must not be optimized \(fastconv.revert undoes it\), it is an OptimizedModule"):
        fastconv.replace(fast)
    conv = nn.Conv2d(8, 8, 1)
    with pytest.raises(TypeError, match=r"'1' is an OptimizedModule"):
        fastconv.replace(nn.Sequential(conv, fast))
    assert type(conv) is nn.Conv2d  # nothing was changed
    assert type(fastconv.replace(fastconv.revert(fast))) is Fire


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (nn.ReLU(), TypeError, "Conv2dNormActivation: module must be a Sequential, got ReLU"),
        (nn.Sequential(), ValueError, r"module must hold a convolution, norm\[, activation\], got 0 modules"),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), TypeError, r"module\[0\] must be a Conv2d, got Linear"),
        (nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU()), TypeError, r"module\[1\] must be a BatchNorm2d, got ReLU"),
        (conv_norm(nn.Dropout()), TypeError, r"module\[2\] must be an activation, got Dropout"),
    ],
)
def test_conv_norm_from_torch_refuses_another_structure(module, error, message):
    with pytest.raises(error, match=message):
        Conv2dNormActivation.from_torch(module)
    assert type(module) is not Conv2dNormActivation


def test_conv_norm_from_torch_shares_the_parameters():
    original = torchvision.ops.Conv2dNormActivation(8, 12, activation_layer=nn.ReLU6).eval()
    layer = Conv2dNormActivation.from_torch(original)
    assert type(original) is torchvision.ops.Conv2dNormActivation
    assert tensors(layer) == tensors(original)
    assert layer.out_channels == 12
    x = torch.randn(2, 8, 9, 7)
    with torch.no_grad():
        assert close(layer(x), original(x))
    assert Conv2dNormActivation.from_torch(layer) is not layer


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2"])
def test_norms_can_become_synchronised_afterwards(name):
    original = build(name).eval()
    # timm's own keeps the activation in its stem's norm, which torch's drops.
    convert = timm.layers.convert_sync_batchnorm if name == "mobilenet_v1" else nn.SyncBatchNorm.convert_sync_batchnorm
    model = convert(fastconv.replace(copy.deepcopy(original)))
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in model.modules()) > 20
    assert ours(model) == NETWORKS[name][1]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert close(model(x), original(x))
    assert close(model(x), original(x))
