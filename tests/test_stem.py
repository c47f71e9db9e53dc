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


def expected(x, weight, bias=None, *, stride=2, padding=1, activation=None) -> Bounded:
    return Bounded.exact(x).conv(weight, bias, stride=stride, padding=padding).activate(activation)


def both(x, weight, bias=None, *, stride=2, padding=1, activation=None):
    """The public operator's output, checked to be the prepared kernel's, too."""
    y = ops.stem(x, weight, bias, stride=stride, padding=padding, activation=activation)
    assert torch.equal(ops.prepare_stem(weight, bias, stride=stride, padding=padding, activation=activation)(x), y)
    return y


@every_isa
@pytest.mark.parametrize("k", [3, 7])
@pytest.mark.parametrize("out_channels", CHANNELS)
def test_channels(out_channels, k):
    for in_channels in (1, 2, 3, 4, 5):  # 5: through ATen
        x, weight, bias = reals(2, in_channels, 15, 18), reals(out_channels, in_channels, k, k), reals(out_channels)
        for b in (bias, None):
            expected(x, weight, b, padding=k // 2).admits(both(x, weight, b, padding=k // 2), (in_channels, b is None))


@every_isa
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5), (7, 7), (9, 9)])
def test_sizes_strides_and_paddings(kernel):
    """Every image from one pixel up, at every stride and padding that leaves an output; integers, so equality is exact."""
    weight, bias = integers(18, 3, *kernel), integers(18)
    for height in (1, 2, 3, 6, 7, 12):
        for width in (1, 2, 3, 7, 8, 17, 33):
            x = integers(1, 3, height, width)
            for stride in (1, 2, (2, 1), 4):
                for padding in (0, 1, 3, (3, 0), 8):
                    pad_h, pad_w = padding if isinstance(padding, tuple) else (padding, padding)
                    if height + 2 * pad_h < kernel[0] or width + 2 * pad_w < kernel[1]:
                        continue
                    y = both(x, weight, bias, stride=stride, padding=padding)
                    assert torch.equal(y, reference.stem(x, weight, bias, stride=stride, padding=padding)), (height, width, stride, padding)


@every_isa
@pytest.mark.parametrize(("out_channels", "k", "padding"), [(96, 7, 0), (64, 3, 0), (32, 3, 1)])
def test_network_shapes(out_channels, k, padding):
    x, weight, bias = reals(1, 3, 97, 131), reals(out_channels, 3, k, k), reals(out_channels)
    options = {"stride": 2, "padding": padding, "activation": "relu"}
    expected(x, weight, bias, **options).admits(both(x, weight, bias, **options))


@every_isa
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    x, weight, bias = reals(2, 3, 9, 8), reals(19, 3, 3, 3), reals(19)
    expected(x, weight, bias, activation=activation).admits(both(x, weight, bias, activation=activation))
    check_nonfinite(
        lambda x: ops.stem(x, weight, bias, activation=activation),
        lambda x: reference.stem(x, weight.double(), bias.double(), activation=activation),
        x,
    )


@every_isa
def test_layouts_and_bits():
    weight, bias = reals(18, 3, 3, 3), reals(18)
    check_layouts(lambda x: ops.stem(x, weight, bias), reals(3, 3, 9, 8))
    check_same_bits(lambda x: ops.stem(x, weight, bias), reals(3, 3, 33, 30))


@every_isa
def test_empty_batch():
    assert both(reals(0, 3, 9, 9), reals(8, 3, 3, 3)).shape == (0, 8, 5, 5)


def test_registrations():
    check_registrations(torch.ops.fastconv.stem.default, reals(2, 3, 5, 6), reals(4, 3, 3, 3), reals(4), [2, 2], [1, 1], "silu")


def test_autocast_compile_and_other_dtypes():
    x, weight, bias = reals(2, 3, 6, 7), reals(12, 3, 3, 3), reals(12)
    check_autocast(lambda: ops.stem(x, weight, bias), lambda: reference.stem(x, weight, bias))
    check_other_dtypes(ops.stem, reference.stem, [x, weight, bias])
    check_compiled(lambda x: ops.stem(x, weight, bias), x)
