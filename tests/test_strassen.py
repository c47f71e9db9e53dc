"""Wide 1x1 convolutions by Strassen's algorithm: pointwise and the projections of blocks, as plans prepare them."""

import pytest
import torch
from harness import EXACT_ACTIVATIONS, channels_last, check_nonfinite, check_same_bits, every_isa, integers, reals
from torch import nn

import fastconv
from fastconv import ops, reference

pytestmark = pytest.mark.usefixtures("portable")


def separable(channels, out_channels, make=reals, **options):
    """(prepared, exact, specification) of a block with random weights."""
    weights = make(channels, 1, 3, 3), make(channels), make(out_channels, channels, 1, 1), make(out_channels)
    options = {"stride": 1, "padding": 1, "depthwise_activation": "relu6", "activation": None} | options
    fast, exact = (ops.prepare_separable(*weights, **options, exact=exact) for exact in (False, True))
    return fast, exact, lambda x, residual=None: reference.separable(x, *(w.to(x.dtype) for w in weights), **options, residual=residual)


def error(y, wanted) -> float:
    return float((y - wanted).abs().max() / wanted.abs().max())


@every_isa
@pytest.mark.parametrize("out_channels", [256, 264, 280, 288, 352])
def test_sizes_are_exact(out_channels):
    """Pixels alone and in pairs, all remainders of tiles and of groups of outputs; integers, so equality is exact."""
    for channels in (256, 288):
        weight, bias = integers(out_channels, channels, 1, 1), integers(out_channels)
        for height, width in ((1, 1), (1, 2), (1, 3), (2, 2), (3, 3), (4, 7), (5, 7), (6, 6), (7, 7), (1, 33), (13, 13)):
            x, residual = integers(2, channels, height, width), integers(2, out_channels, height, width)
            for activation in (None, "relu6"):
                call = ops.prepare_pointwise(weight, bias, activation=activation)
                assert call.kernel.endswith("strassen")
                for added in (None, residual):
                    wanted = reference.pointwise(x, weight, bias, residual=added, activation=activation)
                    assert torch.equal(call(x, added), wanted), (channels, height, width, activation)


@every_isa
@pytest.mark.parametrize("activation", EXACT_ACTIVATIONS)
def test_activations_are_exact(activation):
    weight, bias = integers(296, 256, 1, 1), integers(296)
    call = ops.prepare_pointwise(weight, bias, activation=activation)
    for size in (5, 7):
        x, residual = integers(3, 256, size, size), integers(3, 296, size, size)
        for added in (residual, channels_last(residual), None):
            for image in (x, channels_last(x)):
                assert torch.equal(call(image, added), reference.pointwise(image, weight, bias, residual=added, activation=activation))


@every_isa
@pytest.mark.parametrize("activation", ["silu", "hardsigmoid"])
def test_other_activations(activation):
    weight, x = reals(264, 256, 1, 1) / 16, reals(2, 256, 5, 7)
    y = ops.prepare_pointwise(weight, None, activation=activation)(x)
    assert error(y, reference.pointwise(x.double(), weight.double(), activation=activation)) < 5e-6


@every_isa
@pytest.mark.parametrize(("channels", "out_channels", "size"), [(256, 256, 28), (512, 512, 14), (512, 1000, 13), (1024, 1024, 7)])
def test_network_shapes(channels, out_channels, size):
    """Errors of a few times direct sums': 1.5e-6 to 5e-6 of the largest output, direct 3e-7 to 1.1e-6."""
    x, weight, bias = reals(1, channels, size, size), reals(out_channels, channels, 1, 1), reals(out_channels)
    y = ops.prepare_pointwise(weight, bias, activation=None)(x)
    assert error(y, reference.pointwise(x.double(), weight.double(), bias.double())) < 6e-6


@every_isa
def test_channels_of_any_size():
    """Every output is as near to its own size as where all channels are alike, and no dead channel comes alive."""
    weight = reals(320, 256, 1, 1)
    weight *= torch.logspace(-8, 1, 320)[torch.randperm(320)][:, None, None, None]
    weight[17] = 0
    inputs = torch.logspace(-3, 3, 256)[torch.randperm(256)][:, None, None]
    x, weight = reals(1, 256, 9, 9) / inputs, weight * inputs[None]
    call = ops.prepare_pointwise(weight, None, activation=None)
    assert call.kernel.endswith("strassen")
    y, wanted = call(x)[0], reference.pointwise(x.double(), weight.double())[0]
    assert not y[17].any()
    alive = torch.arange(320) != 17
    assert ((y - wanted).abs().amax((1, 2)) / wanted.abs().amax((1, 2)))[alive].max() < 1e-5


@every_isa
def test_nonfinite_and_huge_values_stay_where_they_are():
    weight, bias = reals(264, 256, 1, 1), reals(264)
    call = ops.prepare_pointwise(weight, bias, activation=None)
    for height, width in ((6, 6), (5, 7), (4, 4)):
        together = 2 if height * width >= 32 else 1  # pixels that are computed directly where one of them is spoiled
        x = reals(2, 256, height, width)
        check_nonfinite(call, lambda x: reference.pointwise(x, weight.double(), bias.double()), x)
        for value in (torch.inf, torch.nan, 1e38, -3e30):
            spoiled = x.clone()
            spoiled[1, 100, 1, 2] = value
            y, wanted = call(spoiled), ops.pointwise(spoiled, weight, bias)
            direct = torch.arange(height * width).view(height, width) // together == (width + 2) // together
            assert torch.equal(y[0], call(x)[0])
            assert torch.equal(y[1][:, ~direct], call(x)[1][:, ~direct])
            finite = wanted[1][:, direct].isfinite()
            assert torch.equal(y[1][:, direct].isfinite(), finite)
            assert torch.allclose(y[1][:, direct][finite], wanted[1][:, direct][finite], rtol=1e-4, atol=1e-4)


@every_isa
@pytest.mark.parametrize(("height", "width"), [(14, 14), (7, 7), (9, 5), (3, 8)])
@pytest.mark.parametrize(("channels", "out_channels"), [(256, 264), (384, 416)])
def test_block_bits(height, width, channels, out_channels):
    """By rows, by panels and by images: pairs are the same, so bits are."""
    fast, exact, specification = separable(channels, out_channels, depthwise_activation="relu")
    x = reals(5, channels, height, width)
    assert fast.kernel.endswith("strassen")
    assert not exact.kernel.endswith("strassen")
    check_same_bits(fast, x)
    assert error(fast(x), specification(x.double())) < 6e-6
    residual = reals(5, out_channels, height, width)
    assert error(fast(x, residual), specification(x.double(), residual.double())) < 6e-6


@every_isa
def test_pointwise_bits():
    for size in (7, 14):
        check_same_bits(ops.prepare_pointwise(reals(1000, 512, 1, 1), reals(1000), activation="relu"), reals(3, 512, size, size))


@every_isa
@pytest.mark.parametrize("gated", [False, True])
def test_inverted_residual(gated):
    gate = (reals(64, 288, 1, 1), reals(64), reals(288, 64, 1, 1), reals(288), "relu", "hardsigmoid") if gated else None
    weights = reals(288, 64, 1, 1), reals(288), reals(288, 1, 5, 5), reals(288), reals(256, 288, 1, 1), reals(256)
    options = {"stride": 2, "padding": 2, "expand_activation": "hardswish", "depthwise_activation": "hardswish", "squeeze_excite": gate}
    fast, exact = (ops.prepare_inverted_residual(*weights, **options, exact=exact) for exact in (False, True))
    x = reals(3, 64, 15, 14)
    assert fast.kernel.endswith("strassen")
    assert error(fast(x), exact(x)) < 6e-6
    check_same_bits(fast, x)


class Downsampled(nn.Module):
    """A wide 1x1 convolution at so small a part of the input's size, and as a block's projection behind it."""

    def __init__(self, strides):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 256, 3, strides[0], 1), nn.ReLU())
        self.pool = nn.Sequential(*(nn.MaxPool2d(3, stride, 1) for stride in strides[1:]))
        self.wide = nn.Sequential(nn.Conv2d(256, 320, 1), nn.Tanh())
        self.depthwise = nn.Conv2d(320, 320, 3, 2, 1, groups=320)
        self.project = nn.Conv2d(320, 256, 1)

    def forward(self, x):
        return self.project(self.depthwise(self.wide(self.pool(self.stem(x)))))


@pytest.mark.parametrize(
    ("strides", "wide", "project"), [((2, 2, 2), True, True), ((2, 2, 2, 2), True, False), ((2, 2, 2, 2, 2), False, False)]
)
def test_where_plans_use_it(strides, wide, project):
    """At a sixteenth of the input's height and width and above; nowhere where results are to be exact."""
    model, x = Downsampled(strides).eval(), torch.rand(2, 3, 96, 96)
    kernels = {row.name: row.kernel for row in fastconv.explain(fastconv.optimize(model)).rows}
    assert (kernels["wide.0"].endswith("strassen"), kernels["project"].endswith("strassen")) == (wide, project)
    assert not any("strassen" in row.kernel for row in fastconv.explain(fastconv.optimize(model, exact=True)).rows)
    with torch.no_grad():
        assert torch.allclose(fastconv.optimize(model)(x), model(x), atol=1e-4, rtol=1e-4)


def test_which_weights_suit():
    def kernel(weight):
        return ops.prepare_pointwise(weight, None, activation=None).kernel

    wide = reals(256, 256, 1, 1)
    assert kernel(wide).endswith("strassen")
    for bad in (torch.inf, torch.nan, 1e7):
        spoiled = wide.clone()
        spoiled[3, 5] = bad
        assert "strassen" not in kernel(spoiled)
    for narrow in (reals(255, 256, 1, 1), reals(256, 224, 1, 1), reals(256, 272, 1, 1)):
        assert "strassen" not in kernel(narrow)


def test_packed_weights_are_checked():
    op, weight, bias = torch.ops.fastconv, reals(264, 256, 1, 1), reals(264)
    packed = op.pack_strassen(weight)
    x = reals(1, 256, 4, 4)
    for panels, inputs, message in (
        (packed[:-1], 256, "pointwise: panels must be dense float32, packed for Strassen's algorithm, of 264 outputs, got"),
        (packed[::2], 256, "pointwise: panels must be dense float32, packed for Strassen's algorithm"),
        (packed.double(), 256, "pointwise: panels must be dense float32, packed for Strassen's algorithm"),
        (packed[:0], 256, "pointwise: panels must be dense float32, packed for Strassen's algorithm"),
        (packed, 288, r"pointwise: x must have 256 channels, got \(1, 288, 4, 4\)"),
        (reals(2, 2), 256, "pointwise: panels must be dense int32, packed as digits, of 264 outputs, got"),
        (reals(2, 2, 2, 2), 256, r"panels must be \(G, Cin, 16\), or two dimensions as digits, or one for Strassen's algorithm, got"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op.pointwise_packed(x if inputs == 256 else reals(1, inputs, 4, 4), panels, bias, None, None)
    with pytest.raises(RuntimeError, match=r"pack_strassen: weight must be \(Cout, Cin, 1, 1\) with a multiple of 32 inputs, got \(4, 40,"):
        op.pack_strassen(reals(4, 40, 1, 1))

    def block(channels):
        depthwise = op.pack_taps(reals(channels, 1, 3, 3)), reals(channels)
        return op.inverted_residual_packed(
            reals(1, channels, 4, 4), None, None, *depthwise, [], packed, bias, None, (1, 1), (1, 1), *[None] * 5
        )  # fmt: skip

    assert block(256).shape[1] == 264
    with pytest.raises(RuntimeError, match=r"project_panels must be dense float32, packed for .* of 264 outputs and 288 inputs, got"):
        block(288)
