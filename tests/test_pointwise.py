"""pointwise, and the fully connected layer that runs through it."""

import pytest
import torch
from harness import (
    ACTIVATIONS,
    CHANNELS,
    EXACT_ACTIVATIONS,
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
    layouts,
    reals,
)

from fastconv import ops, reference


def expected(x, weight, bias=None, *, residual=None, activation=None) -> Bounded:
    return Bounded.exact(x).conv(weight, bias, residual).activate(activation)


def both(x, weight, bias=None, *, residual=None, activation=None):
    """The public operator's output, checked to be the exact prepared kernel's, too."""
    y = ops.pointwise(x, weight, bias, residual=residual, activation=activation)
    assert torch.equal(ops.prepare_pointwise(weight, bias, activation=activation, exact=True)(x, residual), y)
    return y


@every_isa
@pytest.mark.parametrize("out_channels", CHANNELS)
def test_channels(out_channels):
    for in_channels in CHANNELS:
        x, weight, bias = reals(1, in_channels, 3, 5), reals(out_channels, in_channels, 1, 1), reals(out_channels)
        expected(x, weight, bias).admits(both(x, weight, bias), in_channels)
        expected(x, weight).admits(both(x, weight), (in_channels, "no bias"))


@every_isa
@pytest.mark.parametrize("activation", EXACT_ACTIVATIONS)
def test_pixel_counts_are_exact(activation):
    """Every remainder of the pixel tile; integers, so equality is exact."""
    weight, bias = integers(40, 13, 1, 1), integers(40)
    for pixels in (*range(1, 34), 49, 50, 63, 97, 196, 200):
        x, residual = integers(1, 13, 1, pixels), integers(1, 40, 1, pixels)
        for r in (residual, None):
            y = both(x, weight, bias, residual=r, activation=activation)
            assert torch.equal(y, reference.pointwise(x, weight, bias, residual=r, activation=activation)), (pixels, r is None)


@every_isa
@pytest.mark.parametrize(("in_channels", "out_channels", "size"), [(1024, 512, 7), (320, 1280, 7), (16, 96, 56), (512, 1000, 13)])
def test_network_shapes(in_channels, out_channels, size):
    x, weight, bias = reals(1, in_channels, size, size), reals(out_channels, in_channels, 1, 1), reals(out_channels)
    expected(x, weight, bias, activation="relu").admits(both(x, weight, bias, activation="relu"))


@every_isa
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    x, weight, bias, residual = 2 * reals(2, 9, 4, 5), reals(21, 9, 1, 1), reals(21), reals(2, 21, 4, 5)
    expected(x, weight, bias, residual=residual, activation=activation).admits(
        both(x, weight, bias, residual=residual, activation=activation)
    )
    check_nonfinite(
        lambda x: ops.pointwise(x, weight, bias, activation=activation),
        lambda x: reference.pointwise(x, weight.double(), bias.double(), activation=activation),
        x,
    )
    check_nonfinite(
        lambda residual: ops.pointwise(x, weight, bias, residual=residual, activation=activation),
        lambda residual: reference.pointwise(x.double(), weight.double(), bias.double(), residual=residual, activation=activation),
        residual,
    )


@every_isa
def test_layouts_and_bits():
    weight, bias, residual = reals(18, 20, 1, 1), reals(18), reals(3, 18, 7, 6)
    check_layouts(lambda x: ops.pointwise(x, weight, bias, residual=residual), reals(3, 20, 7, 6))
    check_same_bits(lambda x: ops.pointwise(x, weight, bias), reals(3, 20, 17, 18))
    x = reals(3, 20, 7, 6)
    for name, view in layouts(residual):
        assert torch.equal(both(x, weight, bias, residual=view), both(x, weight, bias, residual=residual)), name


@every_isa
def test_empty_batch():
    assert both(reals(0, 8, 5, 6), reals(3, 8, 1, 1), residual=reals(0, 3, 5, 6)).shape == (0, 3, 5, 6)


def test_registrations():
    x, weight, bias, residual = reals(2, 4, 3, 5), reals(3, 4, 1, 1), reals(3), reals(2, 3, 3, 5)
    check_registrations(torch.ops.fastconv.pointwise.default, x, weight, bias, residual, "silu")
    check_registrations(torch.ops.fastconv.pointwise.default, x, weight, None, None, "relu6")


def test_autocast_compile_and_other_dtypes():
    x, weight, bias, residual = reals(2, 12, 6, 7), reals(5, 12, 1, 1), reals(5), reals(2, 5, 6, 7)
    check_autocast(
        lambda: ops.pointwise(x, weight, bias, residual=residual),
        lambda: reference.pointwise(x, weight, bias, residual=residual.to(torch.get_autocast_dtype("cpu"))),
    )
    check_other_dtypes(
        lambda x, w, b, r: ops.pointwise(x, w, b, residual=r, activation="relu"),
        lambda x, w, b, r: reference.pointwise(x, w, b, residual=r, activation="relu"),
        [x, weight, bias, residual],
    )
    check_compiled(lambda x: ops.pointwise(x, weight, bias, activation="relu6"), x)


@every_isa
@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias):
    for batch, in_features, out_features in ((1, 1280, 1000), (3, 17, 33), (0, 4, 4), (5, 1, 1)):
        x, weight, b = reals(batch, in_features), reals(out_features, in_features), reals(out_features) if bias else None
        y = ops.prepare_linear(weight, b, activation="hardswish")(x)
        want = expected(x[:, :, None, None], weight[:, :, None, None], b, activation="hardswish")
        want.admits(y[:, :, None, None], (batch, in_features, out_features))
