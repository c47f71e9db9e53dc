"""The training kernels (fastconv/nn/_training.py) where the layers' own tests (test_training.py) do not go: which path is taken, squeeze-
excitation, max pools, threads, instruction sets, memory."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from functools import partial

import pytest
import torch
from test_training import check, cotangent, randomised, step, terms_of
from torch import nn

import fastconv
from fastconv import _buffers, _extension
from fastconv._buffers import Buffers
from fastconv.models import mobilenet_v3
from fastconv.nn import _training
from fastconv.nn._training import TrainedSequential

pytestmark = pytest.mark.skipif(not _extension.available, reason="needs the compiled extension")


@pytest.fixture(autouse=True)
def small_images_too(monkeypatch):
    """Images of any size stand in memory that is lent, which in use only large ones do."""
    monkeypatch.setattr(_buffers, "_LEAST", 0)


norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)


def v3(*row, gate=nn.Hardsigmoid) -> nn.Module:
    excitation = partial(mobilenet_v3.SqueezeExcitation, scale_activation=gate)
    return mobilenet_v3.InvertedResidual(mobilenet_v3.InvertedResidualConfig(*row, 1.0), norm, excitation)


MODULES = {
    "squeeze-excitation": lambda: v3(16, 3, 16, 16, True, "RE", 2, 1),
    "squeeze-excitation-residual": lambda: v3(24, 5, 72, 24, True, "HS", 1, 1),
    "residual-no-expand": lambda: v3(16, 3, 16, 16, False, "RE", 1, 1),
    "separable": lambda: fastconv.nn.DepthwiseSeparable(16, 24, pw_act=True, act_layer=nn.ReLU6),
    "fire": lambda: fastconv.nn.Fire(16, 16, 20, 33),
    "sequence": lambda: TrainedSequential(
        nn.Conv2d(16, 24, 1), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), nn.Conv2d(24, 24, 3, 2, 1, groups=24), nn.ReLU6()
    ),
    "pool": lambda: TrainedSequential(nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 1)),
}
each_module = pytest.mark.parametrize("name", MODULES)


def image(name: str, batch: int = 2, height: int = 13, width: int = 18) -> torch.Tensor:
    channels = 24 if name == "squeeze-excitation-residual" else 16
    return torch.randn(batch, channels, height, width)


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_training, "trains", lambda x: False)


@each_module
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
def test_a_step(name, isa, layout, monkeypatch):
    """Outputs, gradients and statistics against float64, by every instruction set."""
    module = randomised(MODULES[name]()).train()
    x = image(name).contiguous(memory_format=layout).requires_grad_()
    eager, exact = copy.deepcopy(module), copy.deepcopy(module).double()
    actual = step(module, x)
    assert actual["output"].is_contiguous(memory_format=layout)
    plain(monkeypatch)
    # Winograd's F(4x4, 3x3), forward and back: 1e-6 to 3e-6 of the largest value (decision 6).
    terms = 10000 if name == "fire" else terms_of(module, x) if list(module.parameters()) else 9
    check(actual, step(eager, x), step(exact, x.detach().double().requires_grad_()), terms)


@each_module
def test_the_kernels_run(name, monkeypatch):
    """Nothing falls back to torch's convolutions and norms unnoticed."""
    module = MODULES[name]().train()
    for function in ("conv2d", "batch_norm", "max_pool2d"):
        real = getattr(torch.nn.functional, function)

        def refuse(x, *args, real=real, function=function, **kwargs):
            if function != "conv2d" or x.shape[2:] != (1, 1):
                pytest.fail(f"{function} of torch ran")  # squeeze-excitation's own layers are small
            return real(x, *args, **kwargs)

        monkeypatch.setattr(torch.nn.functional, function, refuse)
    x = image(name).requires_grad_()
    y = module(x)
    y.backward(cotangent(y))
    assert x.grad is not None


@each_module
def test_second_derivatives(name, monkeypatch):
    if "excitation" in name:  # torch's hardsigmoid has no second derivative
        row = (16, 3, 16, 16, True, "RE", 2, 1) if name == "squeeze-excitation" else (24, 5, 72, 24, True, "HS", 1, 1)
        module = v3(*row, gate=nn.Sigmoid)
    else:
        module = MODULES[name]()
    randomised(module).train()
    exact = copy.deepcopy(module).double()
    x = image(name, 2, 5, 7)

    def second(module, x):
        x = x.clone().requires_grad_()
        tensors = [x, *module.parameters()]
        first = torch.autograd.grad(module(x).square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), tensors, allow_unused=True)

    actual = second(module, x)
    plain(monkeypatch)
    for ours, truth in zip(actual, second(exact, x.double()), strict=True):
        if truth is None or ours is None:
            assert truth is None or truth.abs().max() < 1e-9
            continue
        assert (ours.double() - truth).norm() <= 1e-3 * truth.norm() + 1e-6


@each_module
def test_bits_do_not_depend_on_threads(name):
    if "excitation" in name:
        pytest.skip("its small layers are ATen's, whose sums depend on the threads")
    module = randomised(MODULES[name]()).train()
    x = image(name, 3, 40, 37).requires_grad_()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(step(copy.deepcopy(module), x))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for key, value in results[0].items():
            assert value is None or torch.equal(value, other[key]), key


@each_module
def test_outputs_may_be_written_to(name):
    """result += input, as torchvision's blocks have it, and activations in place."""
    module = randomised(MODULES[name]()).train()
    x = image(name).requires_grad_()
    results = []
    for add in (lambda y: y + 1.0, lambda y: y.add_(1.0)):
        if "fire" in name or "sequence" in name:
            continue  # as after torch's own ReLU: the backward needs the result
        torch.autograd.grad(add(module(x)).square().sum(), x)
        results.append(torch.autograd.grad(add(module(x)).square().sum(), x)[0])
    assert not results or torch.equal(*results)


@pytest.mark.parametrize(
    ("channels", "shape"),
    [
        ((5, 3, 2, 7), (3, 9, 13)),
        ((8, 16, 16, 130), (2, 13, 13)),  # three blocks of outputs, the last with two
        ((8, 70, 4, 33), (5, 7, 6)),
        ((4, 8, 4, 20), (1, 5, 283)),  # a row of 71 tiles
        ((4, 130, 1, 48), (9, 4, 4)),
        ((16, 16, 64, 64), (2, 55, 55)),
    ],
    ids=str,
)
def test_weights_of_a_fire_by_tiles(channels, shape, isa, poison):
    """However outputs, rows of tiles and their runs are cut. The bound is Winograd's (decision 6), of the largest value."""
    inputs, squeezed, one, three = channels
    (n, h, w), outputs = shape, one + three
    x, dz, z = (torch.randn(n, c, h, w).contiguous(memory_format=torch.channels_last) for c in (inputs, outputs, outputs))
    squeeze, bias, weight1x1, weight3x3 = (
        torch.randn(size) for size in ((squeezed, inputs, 1, 1), (squeezed,), (one, squeezed, 1, 1), (three, squeezed, 3, 3))
    )
    middle = nn.functional.conv2d(x.double(), squeeze.double(), bias.double()).relu()
    images, weights = (dz, z, x, middle.float()), (squeeze, weight1x1, weight3x3)
    *_, dweight, dbias = torch.ops.fastconv.training_fire_backward(*images, *weights, False, None)
    through = torch.where(z <= 0, 0.0, dz)[:, one:].double()
    expected = torch.nn.grad.conv2d_weight(middle, weight3x3.shape, through, padding=1)
    for ours, truth in ((dweight, expected), (dbias, through.sum((0, 2, 3)))):
        assert (ours - truth).abs().max() < 5e-6 * truth.abs().max()


@pytest.mark.parametrize("batch", [1, 5])  # rows shared by the threads, and strips of each image
def test_the_squeezed_image_is_kept(batch, isa, poison):
    fire = randomised(fastconv.nn.Fire(20, 18, 9, 33))
    x = torch.randn(batch, 20, 27, 31).contiguous(memory_format=torch.channels_last)
    convs = (fire.squeeze, fire.expand1x1, fire.expand3x3)
    weights = [tensor.detach() for conv in convs for tensor in (conv.weight, conv.bias)]
    squeezed = torch.empty(batch, 18, 27, 31).contiguous(memory_format=torch.channels_last)
    y = torch.ops.fastconv.training_fire(x, *weights, squeezed, None)
    truth = nn.functional.conv2d(x.double(), weights[0].double(), weights[1].double()).relu()
    assert (squeezed - truth).abs().max() < 1e-6 * truth.abs().max()
    assert torch.equal(y, torch.ops.fastconv.training_fire(x, *weights, None, None))
    for bad, why in ((squeezed[:, 1:], "must be"), (torch.empty(squeezed.shape), "must be channels_last")):
        with pytest.raises(RuntimeError, match=f"training_fire: squeezed {why}"):
            torch.ops.fastconv.training_fire(x, *weights, bad, None)
    with pytest.raises(RuntimeError, match="training_fire_backward: squeezed must be"):
        torch.ops.fastconv.training_fire_backward(y, y, x, squeezed[:, 1:], *weights[::2], True, None)


def test_weights_beyond_l2(isa, poison):
    """More than 2**18, for which strips are cut otherwise: 682 pixels, outputs that end in half a panel."""
    conv = randomised(nn.Conv2d(440, 601, 1))
    module = TrainedSequential(conv, nn.ReLU()).train()
    x = torch.randn(2, 440, 11, 31).requires_grad_()
    actual, exact = step(module, x), step(copy.deepcopy(module).double(), x.detach().double().requires_grad_())
    for key, value in actual.items():
        if value is not None:
            assert (value - exact[key]).norm() < 3e-6 * exact[key].norm(), key


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e32], ids=str)
def test_tiles_with_huge_numbers_are_summed_directly(bad, isa):
    """As plain torch does, class by class: a pixel does not spread over its tile's taps."""
    fire = randomised(fastconv.nn.Fire(4, 6, 5, 9)).train()
    with torch.no_grad():
        fire.squeeze.weight[2] = torch.eye(4)[1][:, None, None]  # one squeezed channel reads one of x's
        fire.squeeze.weight[torch.arange(6) != 2, 1] = 0
    x = torch.randn(2, 4, 14, 11)
    x[0, 1, 0, 0] = bad  # in a corner, where five of the nine taps never see it
    dz = torch.randn(2, 14, 14, 11)
    weight = fire.expand3x3.weight
    y = fire(x)
    ours = torch.autograd.grad(y, weight, dz)[0]
    squeezed = torch.relu(nn.functional.conv2d(x, fire.squeeze.weight, fire.squeeze.bias))
    through = torch.where(y[:, 5:].detach() <= 0, 0.0, dz[:, 5:])
    theirs = torch.nn.grad.conv2d_weight(squeezed, weight.shape, through, padding=1)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isinf(), theirs.isinf())
    fine = theirs.abs() < 1e10
    assert 0 < fine.sum() < fine.numel()
    torch.testing.assert_close(ours[fine], theirs[fine], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("p", [0.5, 0.3])
def test_dropout_draws_torchs_numbers(layout, p, monkeypatch):
    x = torch.randn(4, 129, 13, 13).contiguous(memory_format=layout).requires_grad_()  # two chunks and a piece
    dropout = TrainedSequential(nn.Dropout(p))
    calls = []
    monkeypatch.setattr(_training._Dropout, "apply", lambda *args, real=_training._Dropout.apply: calls.append(1) or real(*args))
    results = []
    for module in (dropout, nn.Dropout(p)):
        torch.manual_seed(3)
        y = module(x)
        results.append((y, *torch.autograd.grad(y, x, torch.ones_like(y)), torch.rand(3)))
    assert calls == [1]
    for ours, theirs in zip(*results):
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()
    dropout.eval()
    assert torch.equal(dropout(x), x)
    assert calls == [1]


def test_dropout_is_torchs_where_its_numbers_are_others(monkeypatch):
    monkeypatch.setattr(_training, "_uniform_is_bernoulli", lambda: False)
    monkeypatch.setattr(_training._Dropout, "apply", None)
    assert TrainedSequential(nn.Dropout(0.5))(torch.ones(1, 64, 40, 40)).unique().tolist() == [0, 2]


@pytest.mark.parametrize("size", [1, (1, 1)])
def test_the_gradient_of_a_global_average_is_channels_last(size):
    x = torch.randn(3, 20, 5, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    pool, dz = nn.AdaptiveAvgPool2d(size), torch.randn(3, 20, 1, 1, requires_grad=True)
    (ours,) = torch.autograd.grad(TrainedSequential(pool)(x), x, dz)
    (theirs,) = torch.autograd.grad(pool(x), x, dz)
    assert torch.equal(ours, theirs)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    (first,) = torch.autograd.grad(TrainedSequential(pool)(x), x, dz, create_graph=True)
    assert torch.equal(torch.autograd.grad(first.sum(), dz)[0], torch.ones_like(dz))


def test_statistics_far_from_zero():
    """A mean of 1000 deviations: sums of squares alone would lose the variance."""
    layer = fastconv.nn.conv_norm.Conv2dNormActivation(8, 8, 1).train()
    nn.init.eye_(layer[0].weight[:, :, 0, 0])
    x = torch.randn(4, 8, 30, 31) + 1000
    y = layer(x)
    mean, variance = y.detach().double().mean((0, 2, 3)), x.double().var((0, 2, 3), unbiased=True)
    assert y.shape == x.shape
    assert mean.abs().max() < 1
    torch.testing.assert_close(layer[1].running_var.double(), 0.9 + 0.1 * variance, rtol=1e-4, atol=0)


def test_average_over_all_batches():
    """momentum=None."""
    layer = fastconv.nn.conv_norm.Conv2dNormActivation(8, 8, 1, norm_layer=partial(nn.BatchNorm2d, momentum=None)).train()
    twin = copy.deepcopy(layer).double()
    for _ in range(3):
        x = torch.randn(2, 8, 9, 9)
        layer(x), twin(x.double())
    assert layer[1].num_batches_tracked == 3
    torch.testing.assert_close(layer[1].running_mean.double(), twin[1].running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer[1].running_var.double(), twin[1].running_var, rtol=1e-5, atol=1e-6)


# (in and out channels, kernel, stride, padding), activation, pool, image; whole bands and rest, rows that one and two bands read
STEMS_WITH_POOLS = {
    "squeezenet1_1": ((3, 64, 3, 2), nn.ReLU, (2, 0, True), (2, 67, 300)),
    "squeezenet1_0": ((3, 96, 7, 2), nn.ReLU, (2, 0, True), (1, 70, 61)),
    "wide": ((3, 40, 3, 2, 1), nn.ReLU6, (2, 1, False), (1, 61, 400)),
    "rows that pools leave out": ((4, 17, 3, 1, 1), nn.ReLU, (3, 0, False), (3, 41, 20)),
    "pools that overlap": ((1, 33, (5, 2), (1, 2), (2, 1)), nn.ReLU, (1, 1, False), (1, 30, 40)),
}
each_stem = pytest.mark.parametrize("name", STEMS_WITH_POOLS)


def stem_with_pool(name: str, bias: bool = True) -> tuple[TrainedSequential, torch.Tensor]:
    conv, activation, pool, (batch, *size) = STEMS_WITH_POOLS[name]
    layers = nn.Conv2d(*conv, bias=bias), activation(), nn.MaxPool2d(3, *pool[:2], ceil_mode=pool[2])
    with torch.no_grad():  # sums that float32 has exactly: else a maximum by 1e-8 is another one in float64, and ties are there to be met
        for parameter in layers[0].parameters():
            parameter.copy_(torch.randint(-9, 10, parameter.shape) / 8)
    return TrainedSequential(*layers).train(), torch.randint(-20, 21, (batch, conv[0], *size)) / 4


def gradients(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, then the parameters' gradients."""
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, list(module.parameters()), cotangent(y).to(y.dtype))]


@each_stem
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_stem_and_its_pool(name, bias, isa, monkeypatch):
    """One pass takes them; output and gradients against float64, by every instruction set, in both layouts."""
    module, x = stem_with_pool(name, bias)
    exact, calls = copy.deepcopy(module).double(), []
    apply = _training._StemPool.apply
    monkeypatch.setattr(_training._StemPool, "apply", lambda *args: calls.append(1) or apply(*args))
    wanted = gradients(nn.Sequential(*exact), x.double())
    for layout in (torch.channels_last, torch.contiguous_format):
        image = x.contiguous(memory_format=layout)
        y = module(image)
        assert y.stride() == wanted[0].contiguous(memory_format=layout).stride() or x.shape[1] == 1
        for ours, truth in zip(gradients(module, image), wanted, strict=True):
            assert (ours.double() - truth).norm() <= 2e-6 * truth.norm()
    assert len(calls) == 4


@each_stem
def test_bits_of_a_stem_and_its_pool_do_not_depend_on_threads(name):
    module, x = stem_with_pool(name)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(gradients(module, x))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_a_stem_and_its_pool_where_one_pass_does_not_serve(monkeypatch):
    """An image that wants a gradient, a hook between them, an activation whose slope does not show: by the layers, with the same result."""
    monkeypatch.setattr(_training._StemPool, "apply", lambda *args: pytest.fail("one pass took them"))
    for change in ("image", "hook", "activation", "kernel", "padding"):
        module, x = stem_with_pool("squeezenet1_1")
        if change == "hook":
            module[1].register_forward_hook(lambda *_: None)
        elif change == "activation":
            module[1] = nn.Hardswish()
        elif change in ("kernel", "padding"):
            module[0] = nn.Conv2d(3, 8, 9) if change == "kernel" else nn.Conv2d(3, 8, 3, padding=3)
            module[0].weight.data.mul_(512).round_().div_(512)
            module[0].bias.data.zero_()
        x.requires_grad_(change == "image")
        exact = nn.Sequential(*copy.deepcopy(module)).double()
        for ours, truth in zip(gradients(module, x), gradients(exact, x.detach().double()), strict=True):
            assert (ours.double() - truth).norm() <= 2e-6 * truth.norm()


def test_derivatives_of_a_stem_and_its_pool_have_derivatives():
    module, x = stem_with_pool("squeezenet1_1")
    exact = nn.Sequential(*copy.deepcopy(module)).double()

    def second(module, x):
        parameters = list(module.parameters())
        first = torch.autograd.grad(module(x).square().sum(), parameters, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), parameters)

    for ours, truth in zip(second(module, x), second(exact, x.double()), strict=True):
        assert (ours.double() - truth).norm() <= 1e-5 * truth.norm()


def test_a_frozen_part_of_a_stem_gets_no_gradient():
    module, x = stem_with_pool("squeezenet1_1")
    module[0].weight.requires_grad_(False)
    module(x).sum().backward()
    assert module[0].weight.grad is None
    assert module[0].bias.grad is not None


def test_a_stem_and_its_pool_of_no_image():
    x, weight, geometry = torch.randn(0, 3, 15, 15), torch.randn(8, 3, 3, 3), ([2, 2], [0, 0], [2, 2], [0, 0])
    y = torch.ops.fastconv.training_stem_pool(x, weight, None, "relu", *geometry, True, None)
    assert y.shape == (0, 8, 3, 3)
    gradients = torch.ops.fastconv.training_stem_pool_backward(y, x, weight, None, "relu", *geometry)
    assert all(not gradient.any() for gradient in gradients)


def test_nan_in_a_stem_and_its_pool():
    module, x = stem_with_pool("squeezenet1_1")
    x[0, 1, 20, 30] = torch.nan
    wanted = gradients(nn.Sequential(*copy.deepcopy(module)), x)
    for ours, other in zip(gradients(module, x), wanted, strict=True):
        assert torch.equal(ours.isnan(), other.isnan())


def test_nan_and_first_maximum():
    x = torch.tensor([[[[1.0, 3.0, 3.0], [float("nan"), 3.0, 0.0], [2.0, 1.0, 0.0]], [[5.0] * 3] * 3]]).requires_grad_()
    for pool in (TrainedSequential(nn.MaxPool2d(3, 1)), nn.MaxPool2d(3, 1)):
        x.grad = None
        pool(x).sum().backward()
        results = x.grad.clone()
        if isinstance(pool, TrainedSequential):
            ours = results
    assert torch.equal(ours, results)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m.conv[0][1].register_forward_hook(lambda *_: None), "a hook"),
        (lambda m: setattr(m.conv[0][0], "padding_mode", "reflect"), "padding that is not zeros"),
        (lambda m: m.conv[0].append(nn.Tanh()), "another activation"),
        (lambda m: m.double(), "another dtype"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_covered_is_torchs(change, why, monkeypatch):
    module = fastconv.nn.InvertedResidual(16, 16, 1, 6).train()
    change(module)
    run = _training._run_parts

    def checked(x, parts, residual):
        assert all(part.conv is not module.conv[0][0] for part in parts), f"the kernels ran over {why}"
        return run(x, parts, residual)

    monkeypatch.setattr(_training, "_run_parts", checked)
    x = torch.randn(2, 16, 7, 7, dtype=next(module.parameters()).dtype)
    module(x).sum().backward()


def test_subclasses_compute_what_they_say():
    """A class that only looks like one of ours goes its own way, alone or inside a block."""

    class Halved(fastconv.nn.Conv2dNormActivation):
        def _forward(self, x):
            return super()._forward(x) / 2

    class Doubled(fastconv.nn.PointwiseConv2d):
        def _forward(self, x):
            return 2 * super()._forward(x)

    class SqueezeExcitation(mobilenet_v3.SqueezeExcitation):
        def forward(self, x):
            return super().forward(x) + 1

    x = torch.randn(2, 16, 9, 9)
    row = fastconv.nn.Conv2dNormActivation(16, 16, 1)
    cfg = mobilenet_v3.InvertedResidualConfig(16, 3, 16, 16, True, "RE", 2, 1, 1.0)
    for change, module in (
        (lambda m: setattr(m[0], "__class__", Halved), nn.Sequential(row)),
        (lambda m: setattr(m[0], "__class__", Doubled), fastconv.nn.Conv2dNormActivation(16, 16, 1, norm_layer=None)),
        (lambda m: setattr(m.block[1], "__class__", SqueezeExcitation), mobilenet_v3.InvertedResidual(cfg, norm)),
    ):
        change(module.train())
        exact = copy.deepcopy(module).double()
        y, truth = _training.run_each(x, [module]), exact(x.double())
        assert (y.double() - truth).norm() <= 1e-5 * truth.norm()


def test_torchs_own_error_messages():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fastconv.nn.InvertedResidual(16, 16, 1, 6).train()(torch.randn(1, 16, 1, 1))
    with pytest.raises(RuntimeError, match="to have 16 channels"):
        fastconv.nn.InvertedResidual(16, 16, 1, 6).train()(torch.randn(2, 8, 9, 9))


def test_operators_refuse_what_does_not_fit():
    ops = torch.ops.fastconv
    x, weight = torch.randn(2, 8, 6, 6), torch.randn(8, 8, 1, 1)
    args = (None, None, 0, None, None, None, None, 0.1, 1e-5, [1, 1], [0, 0], None)
    for change, message in (
        ({0: torch.randn(2, 8, 6)}, r"training_conv: x must be \(N, C, H, W\), got \(2, 8, 6\)"),
        ({4: torch.randn(8, 7, 1, 1)}, r"training_conv: weight must be \(Cout, 8, KH, KW\) or depthwise, got \(8, 7, 1, 1\)"),
        ({5: torch.randn(7)}, r"training_conv: bias must be \(8,\), got \(7,\)"),
        ({1: torch.randn(3, 8)}, r"training_conv: input_norm must be \(4, 8\), got \(3, 8\)"),
        ({0: x.double()}, "training_conv: x must be float32 on the CPU"),
    ):
        call = [x, None, None, None, weight, *args]
        for place, value in change.items():
            call[place] = value
        with pytest.raises(RuntimeError, match=message):
            ops.training_conv(*call)
    y = torch.randn(2, 8, 6, 6)
    with pytest.raises(RuntimeError, match=r"training_gradient_sums: dz must be \(2, 8, 6, 6\), got \(2, 8, 6, 5\)"):
        ops.training_gradient_sums(torch.randn(2, 8, 6, 5), None, y, None, None)
    with pytest.raises(RuntimeError, match=r"training_max_pool: out must be \(2, 8, 2, 2\), got \(2, 8, 3, 3\)"):
        ops.training_max_pool(x, [2, 2], [0, 0], False, torch.randn(2, 8, 3, 3))
    with pytest.raises(RuntimeError, match="training_max_pool_backward: dz must be of the pooled image's shape"):
        ops.training_max_pool_backward(torch.randn(2, 8, 4, 4), x, [2, 2], [0, 0], None)
    x, weight, geometry = torch.randn(2, 3, 15, 15), torch.randn(8, 3, 3, 3), ([2, 2], [0, 0], [2, 2], [0, 0])
    for arguments, message in (
        ((x, torch.randn(8, 4, 3, 3), None, "relu", *geometry, True, None), r"training_stem_pool: weight must be \(Cout, Cin, KH, KW\)"),
        ((x, weight, torch.randn(7), "relu", *geometry, True, None), r"training_stem_pool: bias must be \(8,\), got \(7,\)"),
        ((x, weight, None, "relu", *geometry, True, torch.randn(2, 8, 4, 4)), "training_stem_pool: out must be"),
        ((torch.randn(2, 5, 15, 15), torch.randn(8, 5, 3, 3), None, "relu", *geometry, True, None), "stem: x must have 1 to 4 channels"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.training_stem_pool(*arguments)
    for dz, activation, message in (
        (torch.randn(2, 8, 4, 4), "relu", "training_stem_pool_backward: dz must be of the pooled image's shape"),
        (torch.randn(2, 8, 3, 3), "silu", "training_stem_pool_backward: activation must be None, 'relu' or 'relu6'"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.training_stem_pool_backward(dz, x, weight, None, activation, *geometry)


def test_buffers_lend_nothing_twice():
    buffers, shape = Buffers(), (4, 64, 40, 40)
    first = buffers.image(shape)
    place = first.data_ptr()
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert tuple(first.shape) == shape
    view = first[0, :1]  # of the same storage
    del first
    second = buffers.image(shape)
    assert second.data_ptr() != place
    del view
    gc.collect()
    third = buffers.image(shape)
    assert third.data_ptr() == place
    del second, third
    buffers.clear()
    assert not buffers._blocks


def test_memory_stays_bounded():
    """A step of images as plain torch would keep them is 2.2 times as large."""
    script = """
import resource, torch, fastconv
layer = torch.nn.Sequential(*(fastconv.nn.InvertedResidual(16, 16, 1, 6) for _ in range(4))).train().to(memory_format=torch.channels_last)
x = torch.randn(8, 16, 96, 96).to(memory_format=torch.channels_last)
layer(x[:1]).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(5):
    layer(x).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    megabytes = float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    expanded = 8 * 96 * 96 * 96 * 4 / 2**20
    assert megabytes < (4 * 2 + 2 + 2) * expanded  # two images a block, two gradients, and small ones
