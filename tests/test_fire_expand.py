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
)

from fastconv import ops, reference


def weights(channels, out1x1, out3x3, draw=reals):
    return draw(out1x1, channels, 1, 1), draw(out1x1), draw(out3x3, channels, 3, 3), draw(out3x3)


def expected(x, weight1x1, bias1x1, weight3x3, bias3x3) -> Bounded:
    x = Bounded.exact(x)
    return x.conv(weight1x1, bias1x1).activate("relu").cat(x.conv(weight3x3, bias3x3, padding=1).activate("relu"))


def both(x, *params):
    """The public operator's output, checked to be the prepared kernel's, too."""
    y = ops.fire_expand(x, *params)
    assert torch.equal(ops.prepare_fire_expand(*params)(x), y)
    return y


@every_isa
@pytest.mark.parametrize("channels", CHANNELS)
def test_channels(channels):
    x = reals(2, channels, 5, 6)
    for out1x1, out3x3 in ((channels, channels), (64, 64), (1, 17), (33, 1)):
        params = weights(channels, out1x1, out3x3)
        expected(x, *params).admits(both(x, *params), (out1x1, out3x3))
    without_bias = params[0], None, params[2], None
    expected(x, *without_bias).admits(both(x, *without_bias), "no bias")


@every_isa
def test_sizes_are_exact():
    """Every image from one pixel up; integers, so equality is exact."""
    params = weights(5, 18, 20, integers)
    for height in (*range(1, 9), 13):
        for width in (*range(1, 18), 27):
            x = integers(1, 5, height, width)
            assert torch.equal(both(x, *params), reference.fire_expand(x, *params)), (height, width)


@every_isa
@pytest.mark.parametrize(("channels", "out", "size"), [(16, 64, 54), (32, 128, 27), (64, 256, 13)])
def test_network_shapes(channels, out, size):
    x, params = reals(1, channels, size, size), weights(channels, out, out)
    expected(x, *params).admits(both(x, *params))


@every_isa
def test_nonfinite():
    x, params = reals(2, 6, 5, 7), weights(6, 19, 18)
    double = [p.double() for p in params]
    check_nonfinite(lambda x: ops.fire_expand(x, *params), lambda x: reference.fire_expand(x, *double), x)


@every_isa
def test_layouts_and_bits():
    params = weights(12, 18, 21)
    check_layouts(lambda x: ops.fire_expand(x, *params), reals(3, 12, 7, 6))
    check_same_bits(lambda x: ops.fire_expand(x, *params), reals(3, 12, 15, 14))


@every_isa
def test_empty_batch():
    assert both(reals(0, 4, 5, 6), *weights(4, 3, 2)).shape == (0, 5, 5, 6)


def test_registrations():
    check_registrations(torch.ops.fastconv.fire_expand.default, reals(2, 3, 4, 5), *weights(3, 2, 3))


def test_autocast_compile_and_other_dtypes():
    x, params = reals(2, 6, 6, 7), weights(6, 4, 5)
    check_autocast(lambda: ops.fire_expand(x, *params), lambda: reference.fire_expand(x, *params))
    check_other_dtypes(ops.fire_expand, reference.fire_expand, [x, *params])
    check_compiled(lambda x: ops.fire_expand(x, *params), x)
