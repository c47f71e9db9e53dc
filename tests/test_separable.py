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


def weights(channels, out_channels, k=3, draw=reals):
    return draw(channels, 1, k, k), draw(channels), draw(out_channels, channels, 1, 1), draw(out_channels)


def expected(
    x, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, *,
    stride=1, padding=1, depthwise_activation=None, activation=None, residual=None,
) -> Bounded:  # fmt: skip
    y = Bounded.exact(x).conv(depthwise_weight, depthwise_bias, stride=stride, padding=padding, groups=x.shape[1])
    return y.activate(depthwise_activation).conv(pointwise_weight, pointwise_bias, residual).activate(activation)


def both(x, *params, residual=None, stride=1, padding=1, depthwise_activation=None, activation=None):
    """The public operator's output, checked to be the prepared kernel's, too."""
    options = {"stride": stride, "padding": padding, "depthwise_activation": depthwise_activation, "activation": activation}
    y = ops.separable(x, *params, **options, residual=residual)
    assert torch.equal(ops.prepare_separable(*params, **options)(x, residual), y)
    return y


@every_isa
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("channels", CHANNELS)
def test_channels(channels, k):
    x = reals(2, channels, 9, 8)
    for out_channels in (1, 16, 40, 100):
        for stride in (1, 2):
            options = {"stride": stride, "padding": k // 2, "depthwise_activation": "relu6", "activation": "relu"}
            params = weights(channels, out_channels, k)
            expected(x, *params, **options).admits(both(x, *params, **options), (out_channels, stride))
    params = params[0], None, params[2], None
    expected(x, *params, padding=k // 2).admits(both(x, *params, padding=k // 2), "no bias")


@every_isa
@pytest.mark.parametrize("k", [3, 5])
def test_sizes_strides_and_paddings(k):
    """Every image from one pixel up, at every stride and padding that leaves an output; integers, so equality is exact."""
    params = weights(9, 17, k, integers)
    for height in (*range(1, 8), 12):
        for width in (1, 2, 3, 7, 8, 15, 17):
            x = integers(1, 9, height, width)
            for stride in (1, 2, (1, 2), (2, 1)):
                for padding in (0, 1, k - 1, (1, 0)):
                    pad_h, pad_w = padding if isinstance(padding, tuple) else (padding, padding)
                    if height + 2 * pad_h < k or width + 2 * pad_w < k:
                        continue
                    options = {"stride": stride, "padding": padding, "depthwise_activation": "relu6"}
                    y = ops.separable(x, *params, **options)
                    assert torch.equal(y, reference.separable(x, *params, **options)), (height, width, stride, padding)


@every_isa
@pytest.mark.parametrize("size", [14, 28, 56])
def test_network_shapes(size):
    x, params = reals(1, 64, size, size), weights(64, 128)
    options = {"depthwise_activation": "relu", "activation": "relu"}
    expected(x, *params, **options).admits(both(x, *params, **options))


@every_isa
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_residual(activation):
    x, params, residual = reals(2, 11, 6, 7), weights(11, 19), reals(2, 19, 6, 7)
    options = {"depthwise_activation": activation, "activation": activation, "residual": residual}
    expected(x, *params, **options).admits(both(x, *params, **options))
    double = [p.double() for p in params]
    check_nonfinite(
        lambda x: ops.separable(x, *params, depthwise_activation=activation, activation=activation),
        lambda x: reference.separable(x, *double, depthwise_activation=activation, activation=activation),
        x,
    )


@every_isa
def test_beyond_the_kernels():
    x, params = integers(2, 5, 11, 10), weights(5, 6, draw=integers)
    assert torch.equal(both(x, *params, stride=3, padding=4), reference.separable(x, *params, stride=3, padding=4))


@every_isa
def test_layouts_and_bits():
    params = weights(20, 18)
    check_layouts(lambda x: ops.separable(x, *params, stride=2, depthwise_activation="relu"), reals(3, 20, 7, 6))
    check_same_bits(lambda x: ops.separable(x, *params, depthwise_activation="relu"), reals(3, 20, 17, 18))


@every_isa
def test_empty_batch():
    assert both(reals(0, 4, 5, 6), *weights(4, 3), stride=2).shape == (0, 3, 3, 3)


def test_registrations():
    x, params = reals(2, 3, 4, 5), weights(3, 4)
    check_registrations(torch.ops.fastconv.separable.default, x, *params, [1, 1], [1, 1], "relu6", "hardswish", reals(2, 4, 4, 5))


def test_autocast_compile_and_other_dtypes():
    x, params = reals(2, 6, 6, 7), weights(6, 4)
    check_autocast(lambda: ops.separable(x, *params), lambda: reference.separable(x, *params))
    check_other_dtypes(ops.separable, reference.separable, [x, *params])
    check_compiled(lambda x: ops.separable(x, *params, stride=2), x)
