import pytest
import torch
from harness import (
    CHANNELS,
    Bounded,
    check_autocast,
    check_compiled,
    check_layouts,
    check_nonfinite,
    check_other_dtypes,
    check_registrations,
    check_same_bits,
    every_isa,
    integers,
    reals,
    same,
)

from fastconv import ops, reference


def weights(channels, squeeze, out1x1, out3x3, draw=reals):
    return (
        draw(squeeze, channels, 1, 1),
        draw(squeeze),
        draw(out1x1, squeeze, 1, 1),
        draw(out1x1),
        draw(out3x3, squeeze, 3, 3),
        draw(out3x3),
    )


def expected(x, squeeze_weight, squeeze_bias, weight1x1, bias1x1, weight3x3, bias3x3) -> Bounded:
    squeezed = Bounded.exact(x).conv(squeeze_weight, squeeze_bias).activate("relu")
    return squeezed.conv(weight1x1, bias1x1).activate("relu").cat(squeezed.conv(weight3x3, bias3x3, padding=1).activate("relu"))


def both(x, *params):
    """The public operator's output, checked to be the exact prepared kernel's, too."""
    y = ops.fire(x, *params)
    assert torch.equal(ops.prepare_fire(*params, exact=True)(x), y)
    return y


def admits_winograd(x, params, case=None):
    """The prepared kernel without `exact` is within 1e-5 of the largest sum, which random data reaches to about a half."""
    y = ops.prepare_fire(*params)(x).double()
    squeezed = reference.pointwise(x.double(), params[0].double(), params[1].double(), activation="relu")
    sums = torch.cat(
        [
            torch.conv2d(squeezed, params[2].double(), params[3].double()),
            torch.conv2d(squeezed, params[4].double(), params[5].double(), padding=1),
        ],
        1,
    )
    error = (y - sums.relu()).abs().max() / sums.abs().max()
    assert error <= 1e-5, (error, case)


@every_isa
@pytest.mark.parametrize("channels", CHANNELS)
def test_channels(channels):
    x = reals(2, channels, 5, 6)
    for squeeze, out1x1, out3x3 in ((channels, 16, 16), (16, channels, channels), (1, 17, 3), (33, 1, 40)):
        params = weights(channels, squeeze, out1x1, out3x3)
        expected(x, *params).admits(both(x, *params), (squeeze, out1x1, out3x3))
    without_bias = params[0], None, params[2], None, params[4], None
    expected(x, *without_bias).admits(both(x, *without_bias), "no bias")


@every_isa
def test_sizes_are_exact():
    """Every image from one pixel up; integers, so equality is exact."""
    params = weights(3, 5, 18, 20, integers)
    for height in (*range(1, 9), 13):
        for width in (*range(1, 18), 27):
            x = integers(1, 3, height, width)
            assert torch.equal(both(x, *params), reference.fire(x, *params)), (height, width)


@every_isa
@pytest.mark.parametrize(("channels", "squeeze", "out", "size"), [(64, 16, 64, 55), (256, 32, 128, 27), (512, 64, 256, 13)])
def test_network_shapes(channels, squeeze, out, size):
    x, params = reals(1, channels, size, size), weights(channels, squeeze, out, out)
    expected(x, *params).admits(both(x, *params))


@every_isa
@pytest.mark.parametrize(
    ("channels", "squeeze", "out", "size"), [(64, 16, 64, 55), (256, 32, 128, 27), (256, 48, 192, 27), (512, 64, 256, 13)]
)
def test_winograd_network_shapes(channels, squeeze, out, size):
    admits_winograd(reals(1, channels, size, size), weights(channels, squeeze, out, out))


@every_isa
def test_winograd_sizes():
    """Every remainder of the 4x4 tiles, and sizes too small for them."""
    for squeeze, out3x3 in ((5, 20), (16, 33), (33, 7)):
        params = weights(3, squeeze, 18, out3x3)
        for height in (1, 2, 4, 5, 7, 8, 11, 14):
            for width in (1, 3, 4, 6, 8, 9, 13, 31):
                admits_winograd(reals(2, 3, height, width), params, (squeeze, out3x3, height, width))


@every_isa
def test_winograd_keeps_bits_nonfinite_values_and_overflow():
    params = weights(4, 6, 19, 18)
    call, double = ops.prepare_fire(*params), [p.double() for p in params]
    check_same_bits(call, reals(3, 4, 29, 14))
    check_nonfinite(call, lambda x: reference.fire(x, *double), reals(2, 4, 13, 15))
    huge = reals(1, 4, 12, 12)
    huge[0, :, 5, 5] = 3e37  # its transforms would overflow, its direct sums do not
    assert torch.equal(call(huge)[..., 4:8, :], ops.fire(huge, *params)[..., 4:8, :])


@every_isa
def test_winograd_of_several_images():
    """An image with a NaN goes directly, and the others of its batch notice nothing."""
    params, x = weights(7, 16, 16, 40), reals(9, 7, 13, 13)
    call = ops.prepare_fire(*params)
    admits_winograd(x, params)
    check_same_bits(call, x)
    spoiled = x.clone()
    spoiled[4, 2, 6, 6] = torch.nan
    got, others = call(spoiled), [0, 1, 2, 3, 5, 6, 7, 8]
    assert same(got[others], call(x)[others])
    assert same(got[4:5].nan_to_num(-1), call(spoiled[4:5]).nan_to_num(-1))


@every_isa
def test_nonfinite():
    x, params = reals(2, 4, 5, 7), weights(4, 6, 19, 18)
    double = [p.double() for p in params]
    check_nonfinite(lambda x: ops.fire(x, *params), lambda x: reference.fire(x, *double), x)


@every_isa
def test_layouts_and_bits():
    params = weights(12, 6, 18, 21)
    check_layouts(lambda x: ops.fire(x, *params), reals(3, 12, 7, 6))
    check_same_bits(lambda x: ops.fire(x, *params), reals(3, 12, 15, 14))


@every_isa
def test_empty_batch():
    assert both(reals(0, 4, 5, 6), *weights(4, 2, 3, 2)).shape == (0, 5, 5, 6)


def test_registrations():
    check_registrations(torch.ops.fastconv.fire.default, reals(2, 3, 4, 5), *weights(3, 2, 2, 3))


def test_autocast_compile_and_other_dtypes():
    x, params = reals(2, 6, 6, 7), [p / 2 for p in weights(6, 3, 4, 5)]
    check_autocast(lambda: ops.fire(x, *params), lambda: reference.fire(x, *params))
    check_other_dtypes(ops.fire, reference.fire, [x, *params])
    check_compiled(lambda x: ops.fire(x, *params), x)
