"""1x1 convolutions as digits on a matrix unit: pointwise, blocks and fires, as plans prepare them.

The packed operators take such weights on every instruction set; only a machine with the unit packs them by itself.
"""

import io

import pytest
import torch
from harness import EXACT_ACTIVATIONS, channels_last, integers, reals, using_isa
from torch import nn

import fastconv
from fastconv import _extension, ops, reference
from fastconv.ops import _prepared

if not _extension.available:
    pytest.skip("needs the compiled extension", allow_module_level=True)
from fastconv import _C

ISAS = [_C.isas()[0], *_C.isas()[-2:]]  # the plainest, the widest without the unit and the one with it, or the two widest
every = pytest.mark.parametrize("isa", list(dict.fromkeys(ISAS)))
needs_unit = pytest.mark.skipif("amx" not in _C.isas(), reason="needs a matrix unit")
op = torch.ops.fastconv


def pointwise(x, weight, bias=None, residual=None, activation=None):
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return op.pointwise_packed(x, op.pack_digits(weight), bias, residual, activation)


def error(y, wanted) -> float:
    return float((y - wanted).norm() / wanted.norm())


@every
@pytest.mark.parametrize("activation", EXACT_ACTIVATIONS)
def test_integers_are_exact(isa, activation):
    with using_isa(isa):
        for inputs, outputs in ((1, 1), (15, 17), (48, 171), (64, 128), (65, 8), (130, 100), (512, 24)):
            weight, bias = integers(outputs, inputs, 1, 1), integers(outputs)
            for height, width in ((1, 1), (3, 5), (4, 4), (7, 7), (13, 13)):
                x, residual = integers(2, inputs, height, width), integers(2, outputs, height, width)
                for image in (x, channels_last(x)):
                    for added in (None, residual, channels_last(residual)):
                        wanted = reference.pointwise(image, weight, bias, residual=added, activation=activation)
                        assert torch.equal(pointwise(image, weight, bias, added, activation), wanted), (inputs, outputs, height)


@every
@pytest.mark.parametrize("activation", ["hardswish", "silu", "hardsigmoid"])
def test_other_activations(isa, activation):
    weight, x = reals(264, 256, 1, 1) / 16, reals(2, 256, 5, 7)
    with using_isa(isa):
        y = pointwise(x, weight, None, None, activation)
    assert error(y, reference.pointwise(x.double(), weight.double(), activation=activation)) < 1e-6


@every
@pytest.mark.parametrize("inputs", [48, 160, 512, 1024])
def test_no_less_accurate_than_direct_sums(isa, inputs):
    """Relative to the sums' norm; direct sums of fp32, as of unpacked weights, have 1e-7 at 48 inputs, 6e-7 at 1024."""
    weight = reals(96, inputs, 1, 1) / inputs**0.5
    for activated in (lambda x: x, torch.relu, nn.functional.relu6, nn.functional.hardswish):
        x = activated(reals(2, inputs, 9, 9))
        wanted = reference.pointwise(x.double(), weight.double())
        with using_isa(isa):
            assert error(pointwise(x, weight), wanted) < (5e-7 if isa == "amx" else 1e-6)


@every
def test_what_is_lost_is_a_part_of_the_largest(isa):
    """2^-24 of the pixel's largest input times the weights, and 2^-24 of the output's largest weight times the inputs."""
    weight, x = reals(96, 200, 1, 1), reals(3, 200, 4, 5)
    x[:, 7] = 300
    weight[:, 11] = 40
    wanted = reference.pointwise(x.double(), weight.double())
    with using_isa(isa):
        y = pointwise(x, weight)
    largest = x.abs().amax(1, keepdim=True) * weight.abs().amax((1, 2, 3))[:, None, None]
    assert ((y - wanted).abs() / largest).max() < 200**0.5 * 2.0**-23


@every
def test_channels_and_pixels_of_any_size(isa):
    """Outputs whose weights, and pixels whose inputs, are all small or large have as many digits right."""
    weight, x = reals(96, 128, 1, 1), reals(1, 128, 6, 6)
    weight *= 10.0 ** torch.linspace(-30, 20, 96)[:, None, None, None]
    x *= 10.0 ** torch.linspace(-15, 15, 36).reshape(6, 6)
    wanted = reference.pointwise(x.double(), weight.double())
    with using_isa(isa):
        y = pointwise(x, weight)
    largest = x.double().abs().amax(1, keepdim=True) * weight.double().abs().amax((1, 2, 3))[:, None, None]
    assert ((y - wanted).abs() < 128**0.5 * 2.0**-21 * largest + 2e-43).all()  # 2e-43: a denormal's rounding for each input


@every
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3e38, 1e-39, 1e-30])
def test_a_pixel_beyond_digits_is_made_directly(isa, value):
    """It has the bits of direct sums, and its neighbours theirs."""
    weight, bias, x = integers(80, 96, 1, 1) / 4, reals(80), reals(2, 96, 7, 5)  # weights that digits hold
    spoiled = x.clone()
    spoiled[1, :, 3, 2] = 0
    spoiled[1, 70, 3, 2] = value
    with using_isa(isa):
        y = pointwise(channels_last(spoiled), weight, bias)
        before = pointwise(channels_last(x), weight, bias)
        direct = op.pointwise_packed(spoiled, op.pack_panels(weight), bias, None, None)
    others = torch.ones(2, 1, 7, 5, dtype=torch.bool)
    others[1, 0, 3, 2] = False
    assert torch.equal(y.masked_select(others), before.masked_select(others))
    torch.testing.assert_close(y[1, :, 3, 2], direct[1, :, 3, 2], rtol=0, atol=0, equal_nan=True)


@every
def test_nothing_is_lost_of_a_lone_small_input(isa):
    weight = reals(64, 128, 1, 1)
    for value in (1e-20, 1e-38, 1e-45):
        x = torch.zeros(1, 128, 4, 4)
        x[0, 5, 2, 1] = value
        with using_isa(isa):
            y = pointwise(x, weight)
        torch.testing.assert_close(y[0, :, 2, 1], x[0, 5, 2, 1] * weight[:, 5, 0, 0], rtol=0, atol=value * 4 * 2.0**-23 + 2e-45)


@every
def test_same_bits_in_any_batch_and_on_any_number_of_threads(isa):
    weight, bias = reals(520, 256, 1, 1), reals(520)
    x, residual = channels_last(reals(5, 256, 13, 13)), reals(5, 520, 13, 13)
    threads = torch.get_num_threads()
    with using_isa(isa):
        whole = pointwise(x, weight, bias, residual, "relu")
        try:
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                for n in range(5):
                    assert torch.equal(pointwise(x[n : n + 1], weight, bias, residual[n : n + 1], "relu")[0], whole[n])
        finally:
            torch.set_num_threads(threads)


def test_without_the_unit_weights_are_what_they_were():
    """They are unpacked; those that are no smaller than 2^-16 of an output's largest have all their 24 bits up to the last."""
    weight, x = reals(64, 64, 1, 1), channels_last(reals(1, 64, 8, 8))
    rounded = weight.clone()
    scale = torch.exp2(22 - torch.floor(torch.log2(rounded.abs().amax(1, keepdim=True).double())))
    rounded = (torch.round(rounded.double() * scale) / scale).float()
    with using_isa(_C.isas()[0]):
        y = pointwise(x, weight)
        torch.testing.assert_close(y, op.pointwise_packed(x, op.pack_panels(rounded), torch.zeros(64), None, None), rtol=1e-5, atol=1e-5)


def test_packed_weights_are_checked():
    weight, bias, x = reals(80, 96, 1, 1), reals(80), reals(1, 96, 4, 4)
    packed = op.pack_digits(weight)
    foreign = packed.clone()
    foreign[0, 0] = 0
    for panels, message in (
        (packed[:-1], "pointwise: panels must be dense int32, packed as digits, of 80 outputs, got"),
        (packed[:, :8], "pointwise: panels must be dense int32, packed as digits, of 80 outputs, got"),
        (packed.float(), "pointwise: panels must be dense int32, packed as digits, of 80 outputs, got"),
        (foreign, "pointwise: panels must be dense int32, packed as digits, of 80 outputs, got"),
        (packed[:0], "pointwise: panels must be dense int32, packed as digits, of 80 outputs, got"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op.pointwise_packed(x, panels, bias, None, None)
    with pytest.raises(RuntimeError, match=r"pointwise: x must have 96 channels, got \(1, 64, 4, 4\)"):
        op.pointwise_packed(reals(1, 64, 4, 4), packed, bias, None, None)
    with pytest.raises(RuntimeError, match=r"pack_digits: weight must be \(Cout, Cin, 1, 1\), got \(4, 40, 3, 3\)"):
        op.pack_digits(reals(4, 40, 3, 3))
    with pytest.raises(RuntimeError, match="pack_digits: weight must have at most 32768 inputs, got 32769"):
        op.pack_digits(torch.empty(1, 1, 1, 1).expand(1, 32769, 1, 1))
    for bad in (torch.inf, torch.nan):
        with pytest.raises(RuntimeError, match="pack_digits: weight must be finite"):
            op.pack_digits(torch.full((8, 8, 1, 1), bad))
    strassen, taps = op.pack_strassen(reals(96, 96, 1, 1)), op.pack_taps(reals(96, 1, 3, 3))
    block = (x, strassen, reals(96), taps, reals(96), [], packed, bias, None, [1, 1], [1, 1], *[None] * 5)
    with pytest.raises(RuntimeError, match="expand_panels cannot be packed for Strassen's algorithm"):
        op.inverted_residual_packed(*block)


@needs_unit
def test_which_weights_suit():
    def kernel(weight, **options):
        return ops.prepare_pointwise(weight, None, activation=None, **options).kernel

    wide = reals(192, 96, 1, 1)
    with using_isa("amx"):
        assert kernel(wide).endswith("amx digits")
        assert "digits" not in kernel(wide, exact=True)
        for narrow in (reals(60, 512, 1, 1), reals(512, 60, 1, 1), reals(128, 64, 1, 1)):
            assert "digits" not in kernel(narrow)
        for bad in (torch.inf, torch.nan):
            spoiled = wide.clone()
            spoiled[3, 5] = bad
            assert "digits" not in kernel(spoiled)
        uneven = reals(128, 512, 1, 1)  # a large weight an output leaves the others few digits
        assert kernel(uneven).endswith("digits")
        uneven[:, 5] = 1000
        assert "digits" not in kernel(uneven)
        pruned = torch.where(reals(192, 96, 1, 1) > 1.5, wide, 0)
        assert kernel(pruned).endswith("digits")
        assert "digits" not in kernel(torch.zeros(192, 96, 1, 1))
        with _prepared.portable():
            assert "digits" not in kernel(wide)
    with using_isa("avx512"):
        assert "digits" not in kernel(wide)


@needs_unit
def test_blocks_with_squeeze_excitation():
    """Their products are digits where there are 14x14 pixels of a 224x224 input, or more."""
    weights = (reals(240, 80, 1, 1) / 9, reals(240), reals(240, 1, 3, 3) / 3, reals(240), reals(112, 240, 1, 1) / 15, reals(112))
    gate = (reals(60, 240, 1, 1) / 15, reals(60), reals(240, 60, 1, 1) / 8, reals(240), "relu", "hardsigmoid")
    options = dict(padding=1, expand_activation="hardswish", depthwise_activation="hardswish", squeeze_excite=gate)

    def digits(stride, reduction, **more):
        with using_isa("amx"):
            call = ops.prepare_inverted_residual(*weights, stride=stride, reduction=reduction, **options, **more)
        return call, [tensor.dtype == torch.int32 for tensor in (call.args[0], call.args[-2])]

    assert digits(1, 256)[1] == [True, True]
    assert digits(2, 1024)[1] == [True, False]  # its expansion stands before the stride
    assert digits(1, 1024)[1] == [False, False]
    assert digits(1, 256, exact=True)[1] == [False, False]
    x = channels_last(reals(2, 80, 14, 14))
    for stride in (1, 2):
        fast, exact = digits(stride, 256)[0], digits(stride, 256, exact=True)[0]
        with using_isa("amx"):
            assert error(fast(x), exact(x)) < 1e-6


NETWORKS = ["mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small", "squeezenet1_1"]


@needs_unit
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    """Logits are as near to float64's as those of direct sums, the same in any batch, and survive a change of instruction set."""
    torch.manual_seed(1)
    model = fastconv.models.get_model(name).eval()
    x = torch.rand(3, 3, 96, 96)
    with using_isa("amx"), torch.no_grad():
        fast = fastconv.optimize(model)
        assert any("digits" in row.kernel for row in fastconv.explain(fast).rows)
        y = fast(x)
        assert torch.equal(fast(x[1:2])[0], y[1])
        double = fastconv.revert(model).double()
        exact = fastconv.optimize(model, exact=True)
        assert not any("digits" in row.kernel for row in fastconv.explain(exact).rows)
        wanted = double(x.double())
        assert error(y, wanted) < 3e-6
        with using_isa(_C.isas()[-2]):
            assert error(fast(x), wanted) < 3e-6


@needs_unit
def test_an_export_holds_weights_for_any_machine():
    model = nn.Sequential(nn.Conv2d(64, 256, 1), nn.ReLU(), nn.Conv2d(256, 64, 1)).eval()
    x = reals(2, 64, 12, 12)
    with using_isa("amx"):
        fast = fastconv.optimize(model)
        with torch.no_grad():
            wanted = fast(x)
            program = torch.export.export(fast, (x,))
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        loaded = torch.export.load(buffer).module()
    packed = [tensor for tensor in (*program.constants.values(), *program.state_dict.values()) if tensor.dim() == 3]
    assert len(packed) == 2
    assert not any(tensor.dtype == torch.int32 for tensor in program.constants.values())
    with using_isa(_C.isas()[0]):
        assert error(loaded(x), wanted) < 1e-6


@needs_unit
def test_an_export_of_a_block_whose_parts_are_packed_in_different_ways():
    """Expanded as digits, projected by Strassen's algorithm, for its weights are of different size."""

    def dtypes(ready):
        calls = [call for call, _, _ in ready.steps if isinstance(call, _prepared.Prepared)]
        return [(call.kernel, torch.int32 in [tensor.dtype for tensor in call.tensors]) for call in calls]

    block = fastconv.nn.InvertedResidual(96, 320, 1, 6).eval()
    with torch.no_grad():
        block.conv[2].weight[:, 3] = 20
    with using_isa("amx"):
        plan = fastconv.optimize(block).plan
        assert dtypes(plan.prepare()) == [("inverted_residual f32 amx strassen", True)]
        assert dtypes(plan.prepare_portably()) == [("inverted_residual f32 amx strassen", False)]
