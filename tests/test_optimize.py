"""optimize and revert: same results on models as they come, the given model untouched, and plans that follow every change."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastconv.models import mobilenet_v2, squeezenet1_1
from fastconv.models._torchvision import import_torchvision
from fastconv.optimize import explain, optimize, revert
from fastconv.optimize.layers import Kernel
from fastconv.optimize.module import OptimizedModule
from fastconv.optimize.plan import Plan
from fastconv.optimize.planned import Planned

CHANNELS_LAST = torch.channels_last


def randomise(model: nn.Module) -> nn.Module:
    """Normalisation that does something, so that folding it wrongly shows."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.8, 1.2)
                nn.init.normal_(module.bias, 0, 0.1)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


@torch.no_grad()
def run(model: nn.Module, *args, **kwargs):
    return model(*args, **kwargs)


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def kernels(fast: OptimizedModule) -> Counter:
    return Counter(kernel.op for kernel in fast.plan.program.kernels)


# Models as they come

MODELS = {
    "mobilenet_v2": dict(stem=1, separable=1, inverted_residual=16, pointwise=1, global_avg_pool=1, linear=1),
    "mobilenet_v3_large": dict(stem=1, separable=1, inverted_residual=14, pointwise=1, global_avg_pool=1, linear=2),
    "mobilenet_v3_small": dict(stem=1, inverted_residual=11, pointwise=1, global_avg_pool=1, linear=2),
    "squeezenet1_0": dict(stem=1, max_pool=3, fire=8, pointwise=1, global_avg_pool=1),
    "squeezenet1_1": dict(stem=1, max_pool=3, fire=8, pointwise=1, global_avg_pool=1),
    "mnasnet1_0": dict(stem=1, separable=1, inverted_residual=16, pointwise=1, global_avg_pool=1, linear=1),
    "efficientnet_b0": dict(stem=1, inverted_residual=16, pointwise=1, global_avg_pool=1, linear=1),
    "mobilenetv1_100": dict(stem=1, separable=13, global_avg_pool=1, linear=1),
    "mobilenetv4_conv_small": dict(
        stem=1, conv2d=2, pointwise=5, depthwise=3, inverted_residual=11, separable=1, global_avg_pool=1, linear=1
    ),
}
OTHERS = ["mobilenetv3_large_100", "mobilenetv2_100", "efficientnet_lite0", "tf_efficientnet_b0", "shufflenet_v2_x0_5", "resnet18"]


def create(name: str) -> nn.Module:
    try:
        torchvision = import_torchvision()
        import timm
    except ImportError as problem:
        pytest.skip(f"needs torchvision and timm: {problem}")
    library = torchvision.models.get_model if name in torchvision.models.list_models() else timm.create_model
    return randomise(library(name))


@pytest.fixture(scope="module", params=MODELS)
def pair(request) -> tuple[str, nn.Module, OptimizedModule]:
    torch.manual_seed(0)
    model = create(request.param)
    return request.param, model, optimize(model)


def test_logits(pair):
    _, model, fast = pair
    for height, width in ((224, 224), (97, 131)):
        x = torch.randn(3, 3, height, width)
        expected = run(model, x)
        for batch in (1, 3):
            assert error(run(fast, x[:batch]), expected[:batch]) < 1e-5
    assert error(run(fast, x.to(memory_format=CHANNELS_LAST)), expected) < 1e-5


def test_kernels_of_known_models(pair):
    name, _, fast = pair
    assert kernels(fast) == Counter(MODELS[name])


def test_state_dict_is_the_models(pair):
    _, model, fast = pair
    ours, theirs = fast.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert [name for name, _ in fast.named_modules()] == [name for name, _ in model.named_modules()]


@pytest.mark.parametrize("name", OTHERS)
def test_logits_of_other_models(name):
    model = create(name)
    fast = optimize(model)
    x = torch.randn(2, 3, 97, 131)
    assert error(run(fast, x), run(model, x)) < 1e-5
    assert len(fast.plan.program.kernels) > 10


def test_photographs():
    data = pytest.importorskip("skimage.data")
    model = create("mobilenet_v3_small")
    fast = optimize(model)
    for photograph in (data.astronaut(), data.coffee(), data.chelsea()):
        image = torch.from_numpy(photograph).permute(2, 0, 1)[None] / 255
        x = F.interpolate(image, size=(224, 224), mode="bilinear", antialias=True)
        x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        assert error(run(fast, x), run(model, x)) < 1e-5


# Hand-written networks: classes of no library, spellings of all kinds


class Net(nn.Module):
    """A module with the given submodules, and a forward written as a function of it and x."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.steps = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(self, x)


def conv(cin: int, cout: int, k: int = 1, **options) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, k, padding=options.pop("padding", k // 2), **options)


def depthwise(channels: int, k: int = 3, **options) -> nn.Conv2d:
    return conv(channels, channels, k, groups=channels, **options)


def residual(net: nn.Module, x: Tensor) -> Tensor:
    return x + net.n3(net.project(F.relu6(net.n2(net.middle(F.relu6(net.n1(net.expand(x))))))))


def block(expand=None, middle=None, project=None, forward=residual, **modules) -> Net:
    """An inverted residual whose parts can be replaced."""
    parts = dict(expand=expand or conv(8, 24), n1=nn.BatchNorm2d(24), middle=middle or depthwise(24))
    parts |= dict(n2=nn.BatchNorm2d(24), project=project or conv(24, 8), n3=nn.BatchNorm2d(8))
    return Net(forward, **{**parts, **modules})


def excited(gate: Callable[[nn.Module, Tensor], Tensor], **modules: nn.Module) -> Net:
    """An inverted residual whose depthwise output is multiplied by gate(net, y)."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y = F.hardswish(net.middle(F.hardswish(net.expand(x))))
        return net.project(y * gate(net, y))

    return block(forward=forward, **{"fc1": conv(24, 6), "fc2": conv(6, 24), **modules})


def fire(forward: Callable[[nn.Module, Tensor], Tensor], three: nn.Module | None = None) -> Net:
    return Net(forward, squeeze=conv(8, 4), one=conv(4, 12), three=three or conv(4, 12, 3))


def expands(net: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([F.relu(net.one(x)), F.relu(net.three(x))], 1)


def senet_gate(net: nn.Module, y: Tensor) -> Tensor:
    b, c, _, _ = y.size()
    return net.fc(F.adaptive_avg_pool2d(y, 1).view(b, c)).view(b, c, 1, 1).expand_as(y)


def written_out_hardswish(x: Tensor) -> Tensor:
    return x * F.relu6(x + 3) / 6


MATCHED = {
    "conv": (lambda: conv(8, 16), "pointwise"),
    "conv_relu": (lambda: nn.Sequential(conv(8, 16), nn.ReLU()), "pointwise"),
    "conv_without_bias_norm_clamp": (
        lambda: Net(lambda m, x: m.n(m.c(x)).clamp(0, 6), c=conv(8, 16, bias=False), n=nn.BatchNorm2d(16)),
        "pointwise",
    ),
    "norm_without_affine": (lambda: nn.Sequential(conv(8, 16), nn.BatchNorm2d(16, affine=False)), "pointwise"),
    "hardtanh_dropout_identity": (
        lambda: nn.Sequential(conv(8, 16), nn.Identity(), nn.Hardtanh(0, 6, inplace=True), nn.Dropout(0.5), nn.Identity()),
        "pointwise",
    ),
    "functional": (lambda: Net(lambda m, x: F.silu(F.conv2d(x, m.c.weight, m.c.bias), inplace=True), c=conv(8, 16)), "pointwise"),
    "functional_norm": (
        lambda: Net(
            lambda m, x: F.batch_norm(m.c(x), m.n.running_mean, m.n.running_var, m.n.weight, m.n.bias).relu_(),
            c=conv(8, 16),
            n=nn.BatchNorm2d(16),
        ),
        "pointwise",
    ),
    "swish": (lambda: Net(lambda m, x: (lambda y: y * torch.sigmoid(y))(m.c(x)), c=conv(8, 16)), "pointwise"),
    "swish_in_place": (lambda: Net(lambda m, x: (lambda y: y.mul_(y.sigmoid()))(m.c(x)), c=conv(8, 16)), "pointwise"),
    "written_out_hardswish": (lambda: Net(lambda m, x: written_out_hardswish(m.c(x)), c=conv(8, 16)), "pointwise"),
    "hardswish_of_relu6": (lambda: Net(lambda m, x: (lambda y: y * (F.relu6(y + 3.0) / 6.0))(m.c(x)), c=conv(8, 16)), "pointwise"),
    "hardsigmoid_in_place": (lambda: Net(lambda m, x: m.c(x).add_(3.0).clamp_(0.0, 6.0).div_(6.0), c=conv(8, 16)), "pointwise"),
    "same_padding": (lambda: depthwise(8, 5, padding="same"), "depthwise"),
    "depthwise_stride_2": (lambda: nn.Sequential(depthwise(8, stride=2), nn.BatchNorm2d(8), nn.Hardswish()), "depthwise"),
    "depthwise_uneven_padding": (lambda: depthwise(8, 5, padding=(0, 3)), "depthwise"),
    "residual_relu": (lambda: Net(lambda m, x: F.relu(x + m.b(F.relu(m.a(x)))), a=conv(8, 24), b=conv(24, 8)), "pointwise pointwise"),
    "residual_in_place": (
        lambda: Net(lambda m, x: m.b(m.a(x)).add_(x).relu_(), a=conv(8, 24), b=conv(24, 8)),
        "pointwise pointwise",
    ),
    "residual_of_shortcut": (
        lambda: Net(
            lambda m, x: m.b(m.a(x)) + m.c(x),
            a=depthwise(8, stride=2),
            b=conv(8, 24),
            c=nn.Conv2d(8, 24, 1, stride=2),
        ),
        "separable conv2d",
    ),
    "separable": (lambda: nn.Sequential(depthwise(8), nn.BatchNorm2d(8), nn.ReLU6(), conv(8, 16), nn.ReLU6()), "separable"),
    "separable_bare": (lambda: nn.Sequential(depthwise(8), conv(8, 16)), "separable"),
    "two_separables": (
        lambda: nn.Sequential(depthwise(8), nn.ReLU(), conv(8, 16), nn.ReLU(), depthwise(16), nn.ReLU(), conv(16, 32), nn.ReLU()),
        "separable separable",
    ),
    "inverted_residual": (block, "inverted_residual"),
    "inverted_residual_stride_2": (
        lambda: block(middle=depthwise(24, 5, stride=2), forward=lambda m, x: m.n3(m.project(F.relu(m.middle(F.relu(m.n1(m.expand(x)))))))),
        "inverted_residual",
    ),
    "squeeze_excite": (
        lambda: excited(lambda m, y: F.hardsigmoid(m.fc2(F.relu(m.fc1(F.adaptive_avg_pool2d(y, 1)))))),
        "inverted_residual",
    ),
    "squeeze_excite_by_mean": (
        lambda: excited(lambda m, y: m.fc2(F.silu(m.fc1(y.mean((2, 3), keepdim=True)))).sigmoid()),
        "inverted_residual",
    ),
    "squeeze_excite_of_linear": (
        lambda: excited(senet_gate, fc=nn.Sequential(nn.Linear(24, 6, bias=False), nn.ReLU(), nn.Linear(6, 24, bias=False), nn.Sigmoid())),
        "inverted_residual",
    ),
    "squeeze_excite_without_expand": (
        lambda: Net(
            lambda m, x: (lambda y: m.p(y * m.b(m.a(y.mean([-1, -2], True)).relu()).sigmoid()))(m.d(x)),
            d=depthwise(8),
            a=conv(8, 2),
            b=conv(2, 8),
            p=conv(8, 16),
        ),
        "inverted_residual",
    ),
    "fire": (lambda: fire(lambda m, x: expands(m, F.relu(m.squeeze(x)))), "fire"),
    "fire_expand": (lambda: fire(lambda m, x: expands(m, m.squeeze(x))), "pointwise fire_expand"),
    "fire_with_squeeze_read_twice": (
        lambda: fire(lambda m, x: (lambda s: (expands(m, s), s))(F.relu(m.squeeze(x)))),
        "pointwise fire_expand",
    ),
    "stem": (lambda: nn.Sequential(nn.Conv2d(8, 3, 1), nn.Conv2d(3, 16, 7, stride=2, padding=3), nn.ReLU()), "pointwise stem"),
    "pools_and_classifier": (
        lambda: nn.Sequential(
            conv(8, 8),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            nn.AdaptiveAvgPool2d((1, 1)),
            nn.Flatten(),
            nn.Linear(8, 12),
            nn.Hardswish(),
            nn.Dropout(),
            nn.Linear(12, 4),
        ),
        "pointwise max_pool global_avg_pool linear linear",
    ),
    "mean_of_means": (
        lambda: Net(lambda m, x: m.f(m.c(x).mean(3).mean(-1)), c=conv(8, 8), f=nn.Linear(8, 4)),
        "pointwise global_avg_pool linear",
    ),
    "average_of_all_pixels": (
        lambda: Net(lambda m, x: (lambda y: m.f(F.avg_pool2d(y, y.size()[2:]).flatten(1)))(m.c(x)), c=conv(8, 8), f=nn.Linear(8, 4)),
        "pointwise global_avg_pool linear",
    ),
    "classifier_by_view": (
        lambda: Net(lambda m, x: m.f(F.adaptive_avg_pool2d(m.c(x), 1).view(x.size(0), -1)), c=conv(8, 8), f=nn.Linear(8, 4)),
        "pointwise global_avg_pool linear",
    ),
}


@pytest.mark.parametrize("name", MATCHED)
def test_matched_by_structure(name):
    make, expected = MATCHED[name]
    model = randomise(make())
    fast = optimize(model)
    x = torch.randn(2, 8, 13, 10)
    for given in (x, x.to(memory_format=CHANNELS_LAST)):
        actual, wanted = run(fast, given), run(model, given)
        for one, other in zip(*((result if isinstance(result, tuple) else (result,)) for result in (actual, wanted))):
            assert error(one, other) < 1e-6
    assert kernels(fast) == Counter(expected.split())


@pytest.mark.parametrize(("padding", "fused"), [(2, True), (1, False)])
def test_a_residual_needs_the_same_shape(padding, fused):
    """Around a dilated convolution: the sum is the 1x1's where the padding keeps the size, and broadcasts where one pixel is left."""
    model = randomise(
        Net(
            lambda m, x: (lambda y: m.b(m.middle(y)) + y)(m.a(x)),
            a=conv(8, 8),
            middle=conv(8, 8, 3, dilation=2, padding=padding),
            b=conv(8, 8),
        )
    )
    fast = optimize(model)
    x = torch.randn(2, 8, 3, 3)
    assert error(run(fast, x), run(model, x)) < 1e-6
    last = next(reversed([node for node in fast.plan.program.graph.nodes if isinstance(node.target, Kernel)]))
    assert (len(last.args) == 2) == fused


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Standardised(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Shifted(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def leaky(net: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([F.relu(net.one(x)), F.leaky_relu(net.three(x))], 1)


NEAR_MISSES = {
    "own_forward": (lambda: nn.Sequential(Scaled(8, 8, 1), conv(8, 8)), "pointwise"),
    "own_conv_forward": (lambda: nn.Sequential(Standardised(8, 8, 1), conv(8, 8)), "pointwise"),
    "own_norm": (lambda: nn.Sequential(conv(8, 8), Shifted(8)), "pointwise"),
    "reflect": (lambda: nn.Sequential(conv(8, 8, 3, padding_mode="reflect"), nn.ReLU(), conv(8, 8)), "pointwise"),
    "reflect_depthwise": (lambda: block(middle=depthwise(24, padding_mode="reflect")), "pointwise pointwise"),
    "even_same_padding": (lambda: nn.Conv2d(8, 8, 4, padding="same"), ""),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(conv(8, 8)), ""),
    "dilation": (lambda: block(middle=depthwise(24, dilation=2, padding=2)), "pointwise conv2d pointwise"),
    "groups": (lambda: block(middle=conv(24, 24, 3, groups=12)), "pointwise conv2d pointwise"),
    "grouped_expand": (lambda: block(expand=conv(8, 24, groups=2)), "conv2d separable"),
    "channel_multiplier": (lambda: conv(8, 16, 3, groups=8), "conv2d"),
    "depthwise_7x7": (lambda: depthwise(8, 7), "conv2d"),
    "strided_1x1": (lambda: conv(8, 16, stride=2), "conv2d"),
    "padded_1x1": (lambda: conv(8, 16, padding=1), "conv2d"),
    "norm_of_the_batch": (lambda: nn.Sequential(conv(8, 8), nn.BatchNorm2d(8, track_running_stats=False)), "pointwise"),
    "norm_first": (lambda: nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8)), "pointwise"),
    "activation_before_norm": (lambda: nn.Sequential(conv(8, 8), nn.ReLU(), nn.BatchNorm2d(8)), "pointwise"),
    "norm_of_a_value_read_twice": (
        lambda: Net(lambda m, x: (lambda y: (m.n(y), y))(m.c(x)), c=conv(8, 8), n=nn.BatchNorm2d(8)),
        "pointwise",
    ),
    "activation_of_a_value_read_twice": (lambda: Net(lambda m, x: (lambda y: (F.relu(y), y))(m.c(x)), c=conv(8, 8)), "pointwise"),
    "sum_after_activation": (
        lambda: Net(lambda m, x: (lambda y: F.relu(m.b(y)) + y)(m.a(x)), a=conv(8, 8), b=conv(8, 8)),
        "pointwise pointwise",
    ),
    "unknown_activation": (lambda: nn.Sequential(depthwise(8), nn.LeakyReLU(), conv(8, 16)), "depthwise pointwise"),
    "other_clamp": (lambda: Net(lambda m, x: m.c(x).clamp(0, 5), c=conv(8, 8)), "pointwise"),
    "other_hardtanh": (lambda: nn.Sequential(conv(8, 8), nn.Hardtanh(-6, 6)), "pointwise"),
    "expand_read_twice": (
        lambda: block(forward=lambda m, x: (lambda e: (m.project(m.middle(e)), e))(m.expand(x))),
        "pointwise separable",
    ),
    "middle_read_twice": (
        lambda: block(forward=lambda m, x: (lambda d: (m.project(d), d))(m.middle(m.expand(x)))),
        "pointwise depthwise pointwise",
    ),
    "sum_before_norm": (lambda: block(forward=lambda m, x: m.n3(m.project(m.middle(m.expand(x))) + x)), "inverted_residual"),
    "sum_that_broadcasts": (
        lambda: Net(lambda m, x: m.c(x) + F.adaptive_avg_pool2d(x, 1), c=conv(8, 8)),
        "pointwise global_avg_pool",
    ),
    "sum_of_the_pixel": (lambda: Net(lambda m, x: m.c(x.mean((2, 3), keepdim=True)) + x, c=conv(8, 8)), "pointwise global_avg_pool"),
    "sum_with_itself": (lambda: Net(lambda m, x: (lambda y: y + y)(m.c(x)), c=conv(8, 8)), "pointwise"),
    "weighted_sum": (lambda: Net(lambda m, x: torch.add(m.c(x), x, alpha=2), c=conv(8, 8)), "pointwise"),
    "gate_by_softmax": (
        lambda: excited(lambda m, y: m.fc2(F.relu(m.fc1(F.adaptive_avg_pool2d(y, 1)))).softmax(1)),
        "pointwise depthwise global_avg_pool pointwise pointwise pointwise",
    ),
    "gate_of_two_pixels": (
        lambda: excited(lambda m, y: m.fc2(F.relu(m.fc1(F.adaptive_avg_pool2d(y, (2, 1)).mean(2, keepdim=True)))).sigmoid()),
        "pointwise depthwise pointwise pointwise pointwise",
    ),
    "gate_of_the_input": (
        lambda: block(
            forward=lambda m, x: m.project(m.middle(m.expand(x)) * m.fc2(F.relu(m.fc1(m.expand(x).mean((2, 3), keepdim=True)))).sigmoid()),
            fc1=conv(24, 6),
            fc2=conv(6, 24),
        ),
        "pointwise pointwise depthwise global_avg_pool pointwise pointwise pointwise",
    ),
    "fire_of_other_activations": (lambda: fire(lambda m, x: leaky(m, F.relu(m.squeeze(x)))), "pointwise pointwise stem"),
    "fire_the_other_way_round": (
        lambda: fire(lambda m, x: (lambda s: torch.cat([F.relu(m.three(s)), F.relu(m.one(s))], 1))(F.relu(m.squeeze(x)))),
        "pointwise stem pointwise",
    ),
    "fire_of_two_squeezes": (
        lambda: fire(lambda m, x: torch.cat([F.relu(m.one(F.relu(m.squeeze(x)))), F.relu(m.three(F.relu(m.squeeze(-x))))], 1)),
        "pointwise pointwise pointwise stem",
    ),
    "fire_dilated": (
        lambda: fire(lambda m, x: expands(m, F.relu(m.squeeze(x))), three=conv(4, 12, 3, dilation=2, padding=2)),
        "pointwise pointwise conv2d",
    ),
    "fire_of_rows": (
        lambda: fire(lambda m, x: (lambda s: torch.cat([F.relu(m.one(s)), F.relu(m.three(s))], 2))(F.relu(m.squeeze(x)))),
        "pointwise pointwise stem",
    ),
    "window_of_two": (lambda: nn.Sequential(conv(8, 8), nn.MaxPool2d(2)), "pointwise"),
    "dilated_pool": (lambda: nn.Sequential(conv(8, 8), nn.MaxPool2d(3, dilation=2)), "pointwise"),
    "mean_of_channels_and_rows": (lambda: Net(lambda m, x: m.c(x).mean(1).mean(1), c=conv(8, 8)), "pointwise"),
    "average_of_another_size": (
        lambda: Net(lambda m, x: F.avg_pool2d(x, m.c(x).shape[2:]), c=conv(8, 8, 3, padding=0)),
        "conv2d",
    ),
    "mean_of_rows": (lambda: Net(lambda m, x: m.c(x).mean(2), c=conv(8, 8)), "pointwise"),
    "pool_to_seven": (lambda: nn.Sequential(conv(8, 8), nn.AdaptiveAvgPool2d(7)), "pointwise"),
    "linear_over_columns": (lambda: nn.Sequential(conv(8, 8), nn.Linear(10, 4)), "pointwise"),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2), conv(8, 8)), "pointwise"),
    "channel_shuffle": (
        lambda: Net(
            lambda m, x: m.b(m.a(x).view(x.size(0), 2, 4, 13, 10).transpose(1, 2).reshape(x.size(0), 8, 13, 10)), a=conv(8, 8), b=conv(8, 8)
        ),
        "pointwise pointwise",
    ),
    "view_of_all_pixels": (lambda: Net(lambda m, x: m.c(x).view(x.size(0), -1), c=conv(8, 8)), "pointwise"),
    "unknown_module_with_views": (
        lambda: nn.Sequential(conv(8, 8), Net(lambda m, x: x.view(x.shape[0], 80, 13)), nn.PReLU()),
        "pointwise",
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_not_fused(name):
    make, expected = NEAR_MISSES[name]
    model = randomise(make())
    fast = optimize(model)
    x = torch.randn(2, 8, 13, 10)
    actual, wanted = run(fast, x), run(model, x)
    for one, other in zip(*((result if isinstance(result, tuple) else (result,)) for result in (actual, wanted))):
        assert error(one, other) < 1e-6
        assert one.stride() == other.stride()
    assert kernels(fast) == Counter(expected.split())


def relu_of_shared(net: nn.Module, x: Tensor) -> Tensor:
    y = net.a(x)
    late = net.b(y)
    y.relu_()  # the old y is gone for everyone
    return net.n(late) + y


def write_through_view(net: nn.Module, x: Tensor) -> Tensor:
    y = net.a(x)
    first, _ = y.chunk(2, 1)
    first.zero_()
    return net.b(y)


def write_then_read(net: nn.Module, x: Tensor) -> Tensor:
    y = net.a(x)
    z = net.n(y)
    y += z  # the last reader of the old y
    return net.b(F.relu(y, inplace=True))


def write_by_position(net: nn.Module, x: Tensor) -> Tensor:
    y = net.a(x)
    late = net.b(y)
    z = F.leaky_relu(y, 0.1, True)
    return net.n(late) + z


def clamp_of_shared(net: nn.Module, x: Tensor) -> Tensor:
    y = net.a(x)
    late = net.b(y)
    z = torch.clamp_(y, -1, 1)
    return net.n(late) + z


@pytest.mark.parametrize("forward", [relu_of_shared, write_through_view, write_then_read, write_by_position, clamp_of_shared])
def test_writes_in_place_keep_their_meaning(forward):
    model = randomise(Net(forward, a=conv(8, 8), b=conv(8, 8), n=nn.BatchNorm2d(8)))
    x = torch.randn(2, 8, 6, 7)
    assert error(run(optimize(model), x), run(model, x)) < 1e-6


def test_the_input_is_not_written():
    model = randomise(nn.Sequential(nn.ReLU(inplace=True), conv(8, 8)))
    x = torch.randn(1, 8, 5, 5)
    given = x.clone()
    expected = run(model, x.clone())
    assert error(run(optimize(nn.Sequential(conv(8, 8), nn.ReLU(inplace=True))), given), run(nn.Identity(), given)) > 0
    assert torch.equal(given, x)
    assert error(run(optimize(model), given), expected) < 1e-6


# What a plan must notice


def small() -> nn.Module:
    """Every kind of tensor that is folded, in a stem, an inverted residual and a classifier."""
    features = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), block())
    return randomise(nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)))


X = torch.randn(2, 3, 20, 24, generator=torch.Generator().manual_seed(1))


def assert_follows(fast: nn.Module) -> None:
    plain = revert(fast)
    assert error(run(fast, X), run(plain, X)) < 1e-6


NAMES = [name for name in small().state_dict() if "num_batches" not in name]


@pytest.mark.parametrize("name", NAMES)
def test_follows_in_place_changes(name):
    fast = optimize(small())
    before = run(fast, X)
    with torch.no_grad():
        fast.state_dict(keep_vars=True)[name].mul_(1.5).add_(0.1)
    assert error(run(fast, X), before) > 1e-3
    assert_follows(fast)


def set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    prefix, _, key = name.rpartition(".")
    setattr(module.get_submodule(prefix), key, tensor)


@pytest.mark.parametrize("name", NAMES)
def test_follows_replaced_tensors(name):
    fast = optimize(small())
    before = run(fast, X)
    old = fast.state_dict()[name]
    new = old * 1.5 + 0.1
    set_tensor(fast, name, nn.Parameter(new) if name in dict(fast.named_parameters()) else new)
    assert error(run(fast, X), before) > 1e-3
    assert_follows(fast)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("where", ["module", "submodule"])
def test_follows_load_state_dict(assign, where):
    fast, other = optimize(small()), small()
    run(fast, X)
    if where == "module":
        fast.load_state_dict(other.state_dict(), assign=assign)
        assert error(run(fast, X), run(other, X)) < 1e-6
    else:
        fast.get_submodule("0").load_state_dict(other[0].state_dict(), assign=assign)
        assert_follows(fast)


def test_follows_moved_weights():
    fast = optimize(small())
    before = run(fast, X)
    weight = fast.get_submodule("0.0").weight
    weight.data = weight.data * 2
    assert error(run(fast, X), before) > 1e-3
    assert_follows(fast)
    fast.get_submodule("0").double()  # behind the back of the module that holds the plan
    fast.get_submodule("3").double()
    assert error(run(fast, X.double()), run(revert(fast), X.double())) < 1e-12
    fast.float()
    assert_follows(fast)


def test_follows_an_optimizer():
    model = Learner().eval()
    for _ in range(2):
        assert error(run(model, X), model._forward(X).detach()) < 1e-6
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        model(X).square().mean().backward()
        optimizer.step()
        model.eval()


def test_follows_replaced_submodules():
    fast = optimize(small())
    run(fast, X)
    setattr(fast, "3", nn.Linear(8, 7))
    assert run(fast, X).shape == (2, 7)
    assert_follows(fast)
    fast.get_submodule("0")[3] = nn.Identity()
    assert_follows(fast)
    assert kernels(fast) == Counter(stem=1, global_avg_pool=1, linear=1)


def test_follows_a_changed_shape():
    fast = optimize(small())
    run(fast, X)
    fast.get_submodule("3").weight = nn.Parameter(torch.randn(9, 8))
    fast.get_submodule("3").bias = nn.Parameter(torch.randn(9))
    assert run(fast, X).shape == (2, 9)
    assert_follows(fast)


def test_packs_again_only_what_changed(monkeypatch):
    fast = optimize(small())
    run(fast, X)
    packed = []
    prepare = Kernel.prepare
    monkeypatch.setattr(Kernel, "prepare", lambda kernel, *options: packed.append(kernel.op) or prepare(kernel, *options))
    run(fast, X)
    assert packed == []
    with torch.no_grad():
        fast.get_submodule("0.3").n2.running_var.add_(1)
    run(fast, X)
    run(fast, X)
    assert packed == ["inverted_residual"]


def test_tensors_of_inference_mode():
    with torch.inference_mode():
        fast = optimize(small())
        fast.load_state_dict({name: tensor.clone() for name, tensor in fast.state_dict().items()}, assign=True)
        assert error(fast(X), revert(fast)(X)) < 1e-6
    assert_follows(fast)


# The module


def test_the_given_model_is_untouched():
    model = small().train()
    kept = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    fast = optimize(model, dtype=torch.bfloat16)
    run(fast, X.bfloat16())
    fast.train()
    with torch.no_grad():
        fast.get_submodule("3").weight.zero_()
    assert all(module.training for module in model.modules())
    assert type(model) is nn.Sequential
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is kept[name][0]
        assert torch.equal(tensor, kept[name][1])
        assert tensor.dtype == kept[name][1].dtype


def test_shared_parameters_are_the_models_own():
    model = small().train()
    fast = optimize(model, share=True)
    theirs = model.state_dict(keep_vars=True)
    assert all(tensor is theirs[name] for name, tensor in fast.state_dict(keep_vars=True).items())
    assert all(module.training for module in model.modules())
    assert type(model) is nn.Sequential
    assert not any(module.training for module in fast.modules())
    assert error(run(fast, X), run(copy.deepcopy(model).eval(), X)) < 1e-6
    before = run(fast, X)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(X).square().sum().backward()
    optimizer.step()
    after = run(fast, X)
    assert error(after, before) > 1e-3
    assert error(after, run(copy.deepcopy(model).eval(), X)) < 1e-6
    copied = revert(fast)
    assert not any(tensor is theirs[name] for name, tensor in copied.state_dict(keep_vars=True).items())
    again = optimize(fast, share=True)  # of an optimized module, its tensors
    assert all(tensor is theirs[name] for name, tensor in again.state_dict(keep_vars=True).items())


def test_shared_parameters_keep_their_dtype():
    assert optimize(small(), dtype=torch.float32, share=True)(X).dtype is torch.float32
    with pytest.raises(ValueError, match=r"optimize: 0\.0\.weight must be torch\.bfloat16 to be shared, got torch\.float32"):
        optimize(small(), dtype=torch.bfloat16, share=True)


def test_revert_gives_the_architecture_back():
    model = small()
    fast = optimize(model)
    plain = revert(fast)
    assert repr(plain) == repr(model)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert not any(plain.state_dict(keep_vars=True)[name] is tensor for name, tensor in fast.state_dict(keep_vars=True).items())
    assert torch.equal(run(plain, X), run(model, X))
    assert repr(revert(optimize(fast))) == repr(model)


def test_revert_of_optimized_children():
    model = small()
    expected, layout = run(model, X), repr(model)
    model[0] = optimize(model[0])
    assert error(run(model, X), expected) < 1e-6
    assert list(model.state_dict()) == list(small().state_dict())
    model.load_state_dict(model.state_dict())
    plain = revert(model)
    assert repr(plain) == layout
    assert torch.equal(run(plain, X), expected)
    assert isinstance(model[0], OptimizedModule)
    assert error(run(optimize(model), X), expected) < 1e-6  # and a model that holds an optimized one


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies(way):
    fast = optimize(small())
    expected = run(fast, X)
    if way == "deepcopy":
        twin = copy.deepcopy(fast)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(fast))
    else:
        file = io.BytesIO()
        torch.save(fast, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(run(twin, X), expected)
    with torch.no_grad():
        twin.get_submodule("3").weight.mul_(2)
    assert_follows(twin)
    assert torch.equal(run(fast, X), expected)


def test_packed_tensors_are_not_pickled():
    fast = optimize(small())
    size = len(pickle.dumps(fast))
    run(fast, X)
    assert len(pickle.dumps(fast)) == size
    assert size < 1.3 * len(pickle.dumps(small()))


def test_modes():
    fast = optimize(small())
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert error(fast(X), run(revert(fast), X)) < 1e-6
    assert not fast.training
    fast.train()
    assert fast(X).requires_grad
    expected = revert(fast).eval()
    fast.eval()
    assert error(run(fast, X), run(expected, X)) < 1e-6


def test_gradients_of_the_input():
    fast = optimize(small())
    plain = revert(fast)
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    fast(x).square().sum().backward()
    plain(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert torch.equal(fast.get_submodule("3").weight.grad, plain[3].weight.grad)


def test_function_transforms():
    fast = optimize(small())
    plain = revert(fast)
    tangent = torch.ones_like(X)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.jvp(fast, (X,), (tangent,)), torch.func.jvp(plain, (X,), (tangent,)))
        torch.testing.assert_close(torch.func.vmap(fast)(X[None]), run(fast, X)[None])
        weights = {name: torch.stack([weight, 2 * weight]) for name, weight in fast.named_parameters()}
        ensemble = torch.func.vmap(lambda own: torch.func.functional_call(fast, own, (X,)))(weights)
        for i, actual in enumerate(ensemble):
            expected = torch.func.functional_call(plain, {name: weight[i] for name, weight in weights.items()}, (X,))
            torch.testing.assert_close(actual, expected)


def test_dropout_in_training_mode_stays():
    """Monte Carlo dropout: a model in eval mode whose dropout is not. (optimize's copies are in eval mode throughout.)"""
    model = mobilenet_v2(num_classes=5).eval()
    model.classifier[0].train()
    x = torch.randn(2, 3, 64, 64)
    torch.manual_seed(1)
    actual = run(model, x)
    torch.manual_seed(1)
    with torch.no_grad():
        assert error(actual, model._forward(x)) < 1e-5
    assert not torch.equal(run(model, x), actual)


def test_autocast_and_compile():
    fast = optimize(small())
    plain = revert(fast)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fast(X).dtype == torch.bfloat16
        assert torch.equal(fast(X), plain(X))
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    assert error(run(compiled, X), run(plain, X)) < 1e-6
    assert error(torch.export.export(fast, (X,)).module()(X), run(plain, X)) < 1e-6


@pytest.mark.parametrize("shape", [(0, 3, 20, 24), (1, 3, 1, 1), (5, 3, 7, 33), (3, 20, 24)])
def test_other_inputs(shape):
    fast = optimize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), depthwise(8), conv(8, 4)) if shape != (1, 3, 1, 1) else small())
    x = torch.randn(shape)
    actual, expected = run(fast, x), run(revert(fast), x)
    torch.testing.assert_close(actual, expected)
    assert actual.is_contiguous()


def test_values_that_turn_out_to_be_no_images():
    model = Net(lambda m, x: m.b(m.pick(m.a(x))), a=conv(8, 8), pick=Looks(lambda x: x[0]), b=conv(8, 8))
    fast = optimize(model)
    x = torch.randn(2, 8, 5, 5)
    assert kernels(fast) == Counter(pointwise=2)
    assert error(run(fast, x), run(model, x)) < 1e-6


def test_wrong_inputs_raise():
    fast = optimize(small())
    for x in (torch.randn(2, 4, 9, 9), torch.randn(2, 3, 9, 9, dtype=torch.float64), "x"):
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            run(fast, x)


def test_images_keep_their_memory_format():
    fast = optimize(block())
    x = torch.randn(2, 8, 6, 7)
    assert run(fast, x).is_contiguous()
    assert run(fast, x.to(memory_format=CHANNELS_LAST)).is_contiguous(memory_format=CHANNELS_LAST)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype(dtype):
    model = small()
    fast = optimize(model, dtype=dtype)
    assert {tensor.dtype for tensor in fast.parameters()} == {dtype}
    actual, wide = run(fast, X.to(dtype)), run(copy.deepcopy(model).double(), X.double())
    eager = run(copy.deepcopy(model).to(dtype), X.to(dtype))
    assert actual.dtype == dtype
    assert error(actual.double(), wide) <= max(1e-12, 2 * error(eager.double(), wide))


def test_errors():
    with pytest.raises(TypeError, match=r"optimize: model must be a torch\.nn\.Module, got function"):
        optimize(run)
    for name in ("exact", "share"):
        with pytest.raises(TypeError, match=f"optimize: {name} must be True or False, got 1"):
            optimize(small(), **{name: 1})
    with pytest.raises(TypeError, match=r"optimize: dtype must be a floating torch\.dtype, got torch\.int8"):
        optimize(small(), dtype=torch.int8)
    with pytest.raises(TypeError, match=r"revert: module must be a torch\.nn\.Module, got str"):
        revert("model")


def test_meta():
    fast = optimize(small().to("meta"))
    assert run(fast, X.to("meta")).shape == (2, 5)
    fast.to_empty(device="cpu").load_state_dict(small().state_dict())
    assert_follows(fast)


# Models that do not trace


class Branches(nn.Module):
    """Looks at the data, at an option and at its children's attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([block(), nn.Sequential(block(), block())])
        self.inner = Looks(block())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        if x.mean() > 0:
            x = -x
        for stage in self.stages:
            x = stage(x)
        for part in self.stages[1]:
            x = x + part(x)
        x = self.inner(x)
        x = self.head(x.to(self.head[2].weight.dtype))
        return x if scale is None else x * scale


class Looks(nn.Module):
    """Applies `body` in a way that does not trace."""

    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.isfinite().all() else x


def test_data_dependent_model():
    model = randomise(Branches())
    fast = optimize(model)
    assert list(fast.state_dict()) == list(model.state_dict())
    for x in (torch.randn(2, 8, 6, 7) + 1, torch.randn(2, 8, 6, 7) - 1):
        assert error(run(fast, x), run(model, x)) < 1e-6
        assert error(run(fast, x, scale=3), run(model, x, 3)) < 1e-6
    with torch.no_grad():
        fast.stages[0].project.weight.mul_(2)
        fast.head[2].bias.add_(1)
    assert error(run(fast, x), run(revert(fast), x)) < 1e-6
    fast.stages[0] = nn.Identity()
    assert error(run(fast, x), run(revert(fast), x)) < 1e-6
    assert set(fast.plan.prepare().program.children) == {"stages", "inner", "head"}
    assert torch.equal(run(copy.deepcopy(fast), x), run(fast, x))


def test_data_dependent_submodule():
    model = randomise(nn.Sequential(conv(8, 8), nn.ReLU(), Looks(block()), conv(8, 8)))
    fast = optimize(model)
    x = torch.randn(2, 8, 6, 7)
    assert error(run(fast, x), run(model, x)) < 1e-6
    assert kernels(fast) == Counter(pointwise=2)
    assert set(fast.plan.program.children) == {"2.body"}


def test_default_arguments_and_keywords():
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(8, 8)

        def forward(self, x: Tensor, features: bool = False, *rest: Tensor, scale: float = 1) -> Tensor | tuple[Tensor, Tensor]:
            y = self.conv(x) * scale
            return (y, y.mean((2, 3))) if features else y

    model = Optional()
    fast = optimize(model)
    assert kernels(fast) == Counter(pointwise=1)
    x = torch.randn(2, 8, 4, 4)
    assert error(run(fast, x), run(model, x)) < 1e-6
    assert error(run(fast, x, scale=2), run(model, x, scale=2)) < 1e-6
    assert error(run(fast, x, True)[1], run(model, x, True)[1]) < 1e-6
    assert error(run(fast, x=x), run(model, x)) < 1e-6


def test_several_inputs_and_outputs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.vector = conv(8, 8), nn.Linear(3, 8)

        def forward(self, x: Tensor, v: Tensor) -> dict[str, Tensor | list[Tensor]]:
            y, w = self.image(x), self.vector(v)
            return {"y": y, "list": [w, (y * 2, 3)]}

    model = Two()
    fast = optimize(model)
    x, v = torch.randn(2, 8, 4, 4), torch.randn(2, 3)
    actual, expected = run(fast, x, v), run(model, x, v)
    assert kernels(fast) == Counter(pointwise=1)
    torch.testing.assert_close(actual, expected)
    assert type(actual) is dict
    assert type(actual["list"]) is list
    assert type(actual["list"][1]) is tuple


def test_random_constants_are_drawn_at_every_call():
    model = Net(lambda m, x: m.c(x) + torch.rand(1), c=conv(8, 8))
    fast = optimize(model)
    x = torch.randn(1, 8, 4, 4)
    assert not torch.equal(run(fast, x), run(fast, x))


def test_replaced_forward():
    model = small()
    model[3].forward = lambda x: x * 2
    assert error(run(optimize(model), X), run(model, X)) < 1e-6
    model.forward = lambda x: x + 1
    assert torch.equal(run(optimize(model), X), X + 1)


# Hooks


def test_hooked_submodules_are_left_alone():
    model = small()
    seen = []
    model[0][3].middle.register_forward_hook(lambda module, args, output: seen.append(output) or output * 2)
    fast = optimize(model)
    assert error(run(fast, X), run(model, X)) < 1e-6
    assert len(seen) == 2
    assert kernels(fast) == Counter(stem=1, pointwise=2, global_avg_pool=1, linear=1)


def test_hooks_that_come_later():
    fast = optimize(small())
    plain = run(fast, X)
    seen = []
    handle = fast.get_submodule("0").register_forward_hook(lambda module, args, output: seen.append(output))
    assert error(run(fast, X), plain) < 1e-6
    assert error(seen[0], run(revert(fast)[0], X)) < 1e-6
    handle.remove()
    root = fast.register_forward_hook(lambda module, args, output: output + 1)
    assert error(run(fast, X), plain + 1) < 1e-6
    root.remove()
    names = []
    everywhere = nn.modules.module.register_module_forward_hook(lambda module, args, output: names.append(type(module).__name__))
    run(fast, X)
    everywhere.remove()
    assert "Conv2d" in names
    assert error(run(fast, X), plain) < 1e-6


# Threads


def run_threads(count: int, work: Callable[[int], None]) -> None:
    failures = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except BaseException as problem:
            failures.append(problem)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_threads_share_a_module():
    fast = optimize(small())
    fast._plan = None  # all of them find it unplanned
    inputs = [torch.randn(1, 3, 20, 24) for _ in range(8)]
    expected = [run(revert(fast), x) for x in inputs]
    start = threading.Barrier(8)

    def work(i: int) -> None:
        start.wait()
        for _ in range(20):
            assert error(run(fast, inputs[i]), expected[i]) < 1e-6

    run_threads(8, work)


def test_threads_see_a_change():
    fast = optimize(small())
    other = small()
    done = threading.Event()
    expected = run(other, X)

    def work(i: int) -> None:
        if i == 0:
            fast.load_state_dict(other.state_dict())
            done.set()
        else:
            while not done.is_set():
                assert run(fast, X).isfinite().all()
            assert error(run(fast, X), expected) < 1e-6

    run_threads(8, work)


def test_a_write_while_the_watch_is_made_is_seen(monkeypatch):
    """As another thread's: after Python has read the versions, before C++ does."""
    from fastconv import _C

    fast = optimize(small())
    run(fast, X)
    first, *_, last = (parameter for parameter in fast.parameters() if parameter.dim() == 4)
    make = _C.Watch

    def late(*args):
        monkeypatch.setattr(_C, "Watch", make)
        with torch.no_grad():
            last.mul_(3)
        return make(*args)

    with torch.no_grad():
        first.mul_(2)
    monkeypatch.setattr(_C, "Watch", late)
    run(fast, X)
    assert _C.Watch is make
    assert error(run(fast, X), run(revert(fast), X)) < 1e-6


def test_other_threads_run_while_one_traces():
    models = [small() for _ in range(3)]
    expected = [run(model, X) for model in models]

    def work(i: int) -> None:
        for _ in range(15):
            if i < 2:
                assert error(run(optimize(models[2]), X), expected[2]) < 1e-6
            else:
                assert torch.equal(run(models[i - 2], X), expected[i - 2])

    run_threads(5, work)


# Planned, the base of fastconv's own layers and models


class Learner(Planned):
    def __init__(self) -> None:
        super().__init__()
        self.net = small().train()

    def _forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_planned_runs_its_plan_only_in_inference(monkeypatch):
    runs = []
    original = Plan.run
    monkeypatch.setattr(Plan, "run", lambda plan, *args: runs.append(plan) or original(plan, *args))
    model = Learner()
    assert model(X).requires_grad
    run(model, X)
    model.eval()
    expected = model(X)
    assert expected.requires_grad
    assert runs == []
    assert error(run(model, X), expected.detach()) < 1e-6
    assert len(runs) == 1
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert error(model(X), expected.detach()) < 1e-6
    assert len(runs) == 2
    assert model(X.clone().requires_grad_()).requires_grad
    assert len(runs) == 2


def test_planned_keeps_its_plan_to_itself():
    model = Learner().eval()
    keys = list(model.state_dict())
    size = len(pickle.dumps(model))
    expected = run(model, X)
    assert list(model.state_dict()) == keys
    assert len(pickle.dumps(model)) == size
    twin = copy.deepcopy(model)
    assert "_plan" not in twin.__dict__
    with torch.no_grad():
        twin.net[3].weight.mul_(2)
    assert error(run(twin, X), twin._forward(X).detach()) < 1e-6
    assert torch.equal(run(model, X), expected)
    plan = model._plan
    model.eval()
    assert model._plan is plan  # eval() before every batch costs nothing
    model.half()
    assert run(model, X.half()).dtype == torch.float16


def test_planned_that_does_not_trace():
    class Undecided(Planned):
        def __init__(self) -> None:
            super().__init__()
            self.looks = randomise(Looks(block()))

        def _forward(self, x: Tensor) -> Tensor:
            return self.looks(x) if x.mean() > 0 else -self.looks(x)

    model = Undecided().eval()
    for sign in (1, -1):
        x = torch.randn(2, 8, 6, 7) + sign
        assert error(run(model, x), model._forward(x).detach()) < 1e-6


def test_planned_must_define_forward():
    with pytest.raises(NotImplementedError, match="Planned must define _forward"):
        Planned()(X)


def test_exact_leaves_winograd_out():
    model = squeezenet1_1().eval()
    near, exact = optimize(model), optimize(model, exact=True)
    kernels = [{row.kernel for row in explain(fast).rows} for fast in (near, exact)]
    assert any("winograd" in str(kernel) for kernel in kernels[0])
    assert not any("winograd" in str(kernel) for kernel in kernels[1])
    x = torch.randn(1, 3, 97, 131)
    assert error(run(exact, x), run(model, x)) <= 1e-6
    assert error(run(near, x), run(model, x)) <= 1e-5
    assert not torch.equal(run(near, x), run(exact, x))
