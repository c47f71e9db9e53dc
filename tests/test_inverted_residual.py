"""inverted_residual, and the prepared block with everything MobileNet V1 to V3 put in it."""

import pytest
import torch
from harness import (
    ACTIVATIONS,
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

pytestmark = pytest.mark.usefixtures("portable")


def weights(channels, expanded, out_channels, k=3, draw=reals):
    return (
        draw(expanded, channels, 1, 1),
        draw(expanded),
        draw(expanded, 1, k, k),
        draw(expanded),
        draw(out_channels, expanded, 1, 1),
        draw(out_channels),
    )


def expected(
    x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias, *,
    stride=1, padding=1, activation="relu6", residual=False,
) -> Bounded:  # fmt: skip
    y = Bounded.exact(x).conv(expand_weight, expand_bias).activate(activation)
    y = y.conv(depthwise_weight, depthwise_bias, stride=stride, padding=padding, groups=depthwise_weight.shape[0]).activate(activation)
    return y.conv(project_weight, project_bias, x if residual else None)


def both(x, *params, stride=1, padding=1, activation="relu6", residual=False):
    """The public operator's output, checked to be the prepared kernel's, too."""
    y = ops.inverted_residual(x, *params, stride=stride, padding=padding, activation=activation, residual=residual)
    prepared = ops.prepare_inverted_residual(
        *params, stride=stride, padding=padding, expand_activation=activation, depthwise_activation=activation
    )
    assert torch.equal(prepared(x, x if residual else None), y)
    return y


@every_isa
@pytest.mark.parametrize("channels", CHANNELS)
def test_channels(channels):
    x = reals(2, channels, 9, 8)
    for expanded in (channels, 6 * channels, 17):
        for k, stride, residual in ((3, 1, True), (5, 1, False), (3, 2, False), (5, 2, False)):
            params = weights(channels, expanded, channels, k)
            options = {"stride": stride, "padding": k // 2, "residual": residual}
            expected(x, *params, **options).admits(both(x, *params, **options), (expanded, options))
    params = params[0], None, params[2], None, params[4], None
    expected(x, *params, padding=2).admits(both(x, *params, padding=2), "no bias")


@every_isa
@pytest.mark.parametrize("k", [3, 5])
def test_sizes_strides_and_paddings(k):
    """Every image from one pixel up, at every stride and padding that leaves an output; integers, so equality is exact."""
    params = weights(5, 18, 17, k, integers)
    for height in (*range(1, 8), 12):
        for width in (1, 2, 3, 7, 8, 15, 17):
            x = integers(1, 5, height, width)
            for stride in (1, 2, (1, 2), (2, 1)):
                for padding in (0, 1, k - 1, (1, 0)):
                    pad_h, pad_w = padding if isinstance(padding, tuple) else (padding, padding)
                    if height + 2 * pad_h < k or width + 2 * pad_w < k:
                        continue
                    y = ops.inverted_residual(x, *params, stride=stride, padding=padding)
                    want = reference.inverted_residual(x, *params, stride=stride, padding=padding)
                    assert torch.equal(y, want), (height, width, stride, padding)


@every_isa
@pytest.mark.parametrize(("channels", "expanded", "size", "stride"), [(16, 96, 56, 2), (32, 192, 28, 1), (160, 960, 7, 1)])
def test_network_shapes(channels, expanded, size, stride):
    x, params = reals(1, channels, size, size), weights(channels, expanded, channels)
    expected(x, *params, stride=stride, residual=stride == 1).admits(both(x, *params, stride=stride, residual=stride == 1))


@every_isa
@pytest.mark.parametrize(
    ("expanded", "height", "width", "k", "stride"), [(18, 150, 5, 3, 1), (18, 150, 5, 5, 2), (18, 300, 3, 3, (5, 1)), (800, 40, 31, 3, 1)]
)
def test_bands(expanded, height, width, k, stride):
    """More steps, or channels, than go through the panels together; integers, so equality is exact, with a gate of 1 as well."""
    x, params = integers(1, 5, height, width), weights(5, expanded, 5, k, integers)
    want = reference.inverted_residual(x, *params, stride=stride, padding=k // 2)
    open_gate = torch.zeros(3, expanded, 1, 1), torch.zeros(3), torch.zeros(expanded, 3, 1, 1), torch.full((expanded,), 6.0)
    gated = ops.prepare_inverted_residual(
        *params, stride=stride, padding=k // 2, expand_activation="relu6", depthwise_activation="relu6",
        squeeze_excite=(*open_gate, "relu", "hardsigmoid"),
    )  # fmt: skip
    check_same_bits(lambda x: both(x, *params, stride=stride, padding=k // 2), x)
    assert torch.equal(both(x, *params, stride=stride, padding=k // 2), want)
    assert torch.equal(gated(x), want)


@every_isa
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    x, params = reals(2, 7, 6, 5), [p / 2 for p in weights(7, 19, 7)]
    expected(x, *params, activation=activation, residual=True).admits(both(x, *params, activation=activation, residual=True))
    double = [p.double() for p in params]
    check_nonfinite(
        lambda x: ops.inverted_residual(x, *params, activation=activation, residual=True),
        lambda x: reference.inverted_residual(x, *double, activation=activation, residual=True),
        x,
    )


@every_isa
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("gate", ["hardsigmoid", "sigmoid"])
@pytest.mark.parametrize("expand", [True, False])
def test_squeeze_excitation(k, gate, expand):
    """The prepared block against the composition in float64; the gate sees the mean of all pixels."""
    for channels, expanded, reduced, stride, size in ((7, 33, 9, 1, 6), (16, 64, 16, 2, 9), (24, 72, 24, 1, 17)):
        expanded = expanded if expand else channels
        params = [p / 2 for p in weights(channels, expanded, channels, k)]
        w1, b1, w2, b2 = reals(reduced, expanded, 1, 1), reals(reduced), reals(expanded, reduced, 1, 1), reals(expanded)
        x = reals(2, channels, size, size)
        prepared = ops.prepare_inverted_residual(
            *(params[:2] if expand else (None, None)), *params[2:], stride=stride, padding=k // 2, expand_activation="hardswish",
            depthwise_activation="hardswish", squeeze_excite=(w1, b1, w2, b2, "relu", gate), activation="relu",
        )  # fmt: skip
        y = Bounded.exact(x)
        y = y.conv(*params[:2]).activate("hardswish") if expand else y
        y = y.conv(params[2], params[3], stride=stride, padding=k // 2, groups=expanded).activate("hardswish")
        y = y.times(y.mean().conv(w1, b1).activate("relu").conv(w2, b2).activate(gate))
        residual = reals(*x.shape) if stride == 1 else None
        y.conv(params[4], params[5], residual).activate("relu").admits(prepared(x, residual), (channels, stride))


@every_isa
def test_squeeze_excitation_without_kernels():
    """In float64 the same block runs through ATen."""
    params, gate = [p.double() for p in weights(3, 6, 3)], [reals(2, 6, 1, 1).double(), None, reals(6, 2, 1, 1).double(), None]
    x = reals(2, 3, 5, 5).double()
    prepared = ops.prepare_inverted_residual(
        *params, stride=1, padding=1, expand_activation="relu", depthwise_activation="relu", squeeze_excite=(*gate, "relu", "sigmoid")
    )
    assert prepared.kernel.startswith("ATen (")
    y = reference.depthwise(reference.pointwise(x, *params[:2], activation="relu"), *params[2:4], activation="relu")
    scale = torch.sigmoid(reference.pointwise(reference.pointwise(y.mean((2, 3), keepdim=True), gate[0], activation="relu"), gate[2]))
    torch.testing.assert_close(prepared(x, x), reference.pointwise(y * scale, *params[4:], residual=x))


@every_isa
def test_beyond_the_kernels():
    x, params = integers(2, 5, 11, 10), weights(5, 6, 5, draw=integers)
    assert torch.equal(both(x, *params, stride=3, padding=4), reference.inverted_residual(x, *params, stride=3, padding=4))


@every_isa
def test_layouts_and_bits():
    params = weights(10, 20, 10)
    check_layouts(lambda x: ops.inverted_residual(x, *params, residual=True), reals(3, 10, 7, 6))
    check_same_bits(lambda x: ops.inverted_residual(x, *params, residual=True), reals(3, 10, 17, 18))
    params = weights(10, 24, 10, 5)
    squeeze_excite = reals(8, 24, 1, 1), None, reals(24, 8, 1, 1), None, "relu", "hardsigmoid"
    prepared = ops.prepare_inverted_residual(
        *params, stride=1, padding=2, expand_activation="relu", depthwise_activation="relu", squeeze_excite=squeeze_excite
    )
    check_same_bits(lambda x: prepared(x, x), reals(3, 10, 17, 18))


@every_isa
def test_empty_batch():
    assert both(reals(0, 4, 5, 6), *weights(4, 8, 3), stride=2).shape == (0, 3, 3, 3)


def test_registrations():
    check_registrations(
        torch.ops.fastconv.inverted_residual.default, reals(2, 3, 4, 5), *weights(3, 4, 3), [1, 1], [1, 1], "hardswish", True
    )


def test_autocast_compile_and_other_dtypes():
    x, params = reals(2, 6, 6, 7), [p / 2 for p in weights(6, 4, 6)]
    check_autocast(lambda: ops.inverted_residual(x, *params), lambda: reference.inverted_residual(x, *params))
    check_other_dtypes(
        lambda x, *params: ops.inverted_residual(x, *params, residual=True),
        lambda x, *params: reference.inverted_residual(x, *params, residual=True),
        [x, *params],
    )
    check_compiled(lambda x: ops.inverted_residual(x, *params, residual=True), x)
