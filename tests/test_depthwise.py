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
    reals,
)

from fastconv import ops, reference


def expected(x, weight, bias=None, *, stride=1, padding=1, activation=None) -> Bounded:
    return Bounded.exact(x).conv(weight, bias, stride=stride, padding=padding, groups=x.shape[1]).activate(activation)


def both(x, weight, bias=None, *, stride=1, padding=1, activation=None):
    """The public operator's output, checked to be the prepared kernel's, too."""
    y = ops.depthwise(x, weight, bias, stride=stride, padding=padding, activation=activation)
    prepared = ops.prepare_depthwise(weight, bias, stride=stride, padding=padding, activation=activation)
    assert torch.equal(prepared(x), y)
    return y


@every_isa
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("channels", CHANNELS)
def test_channels(channels, k):
    x, weight, bias = reals(2, channels, 9, 8), reals(channels, 1, k, k), reals(channels)
    for stride in (1, 2):
        for b in (bias, None):
            expected(x, weight, b, stride=stride, padding=k // 2).admits(
                both(x, weight, b, stride=stride, padding=k // 2), (stride, b is None)
            )


@every_isa
@pytest.mark.parametrize("k", [3, 5])
def test_sizes_strides_and_paddings(k):
    """Every image from one pixel up, at every stride and padding that leaves an output; integers, so equality is exact."""
    weight, bias = integers(9, 1, k, k), integers(9)
    for height in range(1, 8):
        for width in (1, 2, 3, 5, 7, 8, 15, 16, 17):
            x = integers(1, 9, height, width)
            for stride in (1, 2, (1, 2), (2, 1)):
                for padding in (0, 1, k - 1, (1, 0), (0, k - 1)):
                    pad_h, pad_w = padding if isinstance(padding, tuple) else (padding, padding)
                    if height + 2 * pad_h < k or width + 2 * pad_w < k:
                        continue
                    y = ops.depthwise(x, weight, bias, stride=stride, padding=padding)
                    assert torch.equal(y, reference.depthwise(x, weight, bias, stride=stride, padding=padding)), (
                        height,
                        width,
                        stride,
                        padding,
                    )


@every_isa
@pytest.mark.parametrize("stride", [3, (2, 3), (3, 1)])
@pytest.mark.parametrize("padding", [0, 3, (1, 6)])
def test_beyond_the_kernels(stride, padding):
    x, weight = integers(2, 5, 11, 10), integers(5, 1, 3, 3)
    assert torch.equal(both(x, weight, stride=stride, padding=padding), reference.depthwise(x, weight, stride=stride, padding=padding))


@every_isa
def test_a_large_image():
    x, weight, bias = reals(1, 48, 57, 113), reals(48, 1, 3, 3), reals(48)
    for stride in (1, 2):
        expected(x, weight, bias, stride=stride, activation="relu6").admits(both(x, weight, bias, stride=stride, activation="relu6"))


@every_isa
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    x, weight, bias = 3 * reals(2, 19, 6, 7), reals(19, 1, 3, 3), reals(19)
    expected(x, weight, bias, activation=activation).admits(both(x, weight, bias, activation=activation))
    check_nonfinite(
        lambda x: ops.depthwise(x, weight, bias, activation=activation),
        lambda x: reference.depthwise(x, weight.double(), bias.double(), activation=activation),
        x,
    )


@every_isa
@pytest.mark.parametrize("activation", EXACT_ACTIVATIONS)
def test_integers_are_exact(activation):
    x, weight, bias = integers(2, 33, 14, 15), integers(33, 1, 5, 5), integers(33)
    y = both(x, weight, bias, stride=(2, 1), padding=2, activation=activation)
    assert torch.equal(y, reference.depthwise(x, weight, bias, stride=(2, 1), padding=2, activation=activation))


@every_isa
def test_denormals():
    x, weight = torch.full((1, 8, 5, 5), 1e-30), torch.full((8, 1, 3, 3), 1e-10)
    torch.testing.assert_close(ops.depthwise(x, weight), reference.depthwise(x.double(), weight.double()).float(), rtol=1e-4, atol=1e-44)


@every_isa
def test_layouts_and_bits():
    weight, bias = reals(20, 1, 3, 3), reals(20)
    check_layouts(lambda x: ops.depthwise(x, weight, bias, stride=2), reals(3, 20, 7, 6))
    check_same_bits(lambda x: ops.depthwise(x, weight, bias), reals(3, 20, 17, 18))


@every_isa
def test_weight_and_bias_of_any_strides():
    x, weight, bias = reals(1, 6, 5, 5), reals(6, 1, 3, 3), reals(6)
    strided = weight.transpose(2, 3).contiguous().transpose(2, 3), bias.repeat_interleave(2)[::2]
    assert torch.equal(both(x, *strided), both(x, weight, bias))


@every_isa
def test_empty_batch():
    assert ops.depthwise(reals(0, 8, 5, 6), reals(8, 1, 3, 3), stride=2).shape == (0, 8, 3, 3)


def test_registrations():
    x, weight, bias = reals(2, 4, 5, 6), reals(4, 1, 3, 3), reals(4)
    check_registrations(torch.ops.fastconv.depthwise.default, x, weight, bias, [1, 2], [1, 0], "hardswish")


def test_autocast_compile_and_other_dtypes():
    x, weight, bias = reals(2, 12, 6, 7), reals(12, 1, 3, 3), reals(12)
    check_autocast(lambda: ops.depthwise(x, weight, bias), lambda: reference.depthwise(x, weight, bias))
    check_other_dtypes(ops.depthwise, reference.depthwise, [x, weight, bias])
    check_compiled(lambda x: ops.depthwise(x, weight, bias, stride=2, activation="silu"), x)
