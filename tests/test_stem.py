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
    """The public operator's output, checked to be the exact prepared kernel's, too."""
    y = ops.stem(x, weight, bias, stride=stride, padding=padding, activation=activation)
    assert torch.equal(ops.prepare_stem(weight, bias, stride=stride, padding=padding, activation=activation, exact=True)(x), y)
    return y


def admits_winograd(x, weight, bias=None, *, padding=0, activation=None, stride=(2, 2)):
    """The prepared kernel without `exact` is within 3e-6 of the largest output; up to 1.1e-6 were seen, and 8e-7 of direct sums."""
    call = ops.prepare_stem(weight, bias, stride=stride, padding=padding, activation=activation)
    assert call.kernel.endswith("winograd")
    y = call(x).double()
    double = [x.double(), weight.double(), None if bias is None else bias.double()]
    wanted = reference.stem(*double, stride=stride, padding=padding, activation=activation)
    error = (y - wanted).abs().max() / reference.stem(*double, stride=stride, padding=padding).abs().max()
    assert error <= 3e-6, (error, x.shape, weight.shape, padding)


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
@pytest.mark.parametrize(("out_channels", "padding"), [(96, 0), (64, 3)])
def test_winograd_network_shapes(out_channels, padding):
    """SqueezeNet 1.0's and ResNet's."""
    x, weight, bias = reals(2, 3, 224, 224), reals(out_channels, 3, 7, 7), reals(out_channels)
    admits_winograd(x, weight, bias, padding=padding, activation="relu")
    admits_winograd(x.contiguous(memory_format=torch.channels_last), weight, bias, padding=padding, activation="relu")


@every_isa
def test_winograd_sizes():
    """Every remainder of the tiles of four, of their runs and of the vectors; kernels of fewer rows; every padding."""
    for kernel_h, stride_h, out_channels in ((7, 2, 20), (7, 1, 33), (3, 3, 7), (1, 2, 48)):
        weight, bias = reals(out_channels, 3, kernel_h, 7), reals(out_channels)
        for height in (7, 8, 12):
            for width in (7, 8, 13, 21, 36, 113, 127):
                for padding in (0, 3, 6):
                    options = {"padding": (min(padding, kernel_h - 1), padding), "stride": (stride_h, 2)}
                    admits_winograd(reals(2, 3, height, width), weight, bias, **options)


@every_isa
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_winograd_activations(activation):
    admits_winograd(reals(1, 3, 9, 26), reals(19, 3, 7, 7), reals(19), activation=activation)


@every_isa
def test_winograd_keeps_bits_nonfinite_values_and_overflow():
    weight, bias = reals(18, 3, 7, 7), reals(18)
    call = ops.prepare_stem(weight, bias, stride=2, padding=3, activation="relu")
    check_same_bits(call, reals(3, 3, 61, 45))
    check_nonfinite(call, lambda x: reference.stem(x, weight.double(), bias.double(), padding=3, activation="relu"), reals(2, 3, 19, 23))
    huge = reals(1, 3, 32, 20)
    huge[0, :, 15, 5] = 3e37  # its transforms would overflow, its direct sums do not
    exact = ops.stem(huge, weight, bias, padding=3, activation="relu")
    assert torch.equal(call(huge)[..., 6:10, :], exact[..., 6:10, :])  # the output rows that see it
    assert not torch.equal(call(huge)[..., :6, :], exact[..., :6, :])


def test_winograd_is_left_to_what_it_suits():
    def kernel(*shape, scale=1.0, **options):
        return ops.prepare_stem(reals(*shape) * scale, None, **{"stride": 2, "padding": 0, "activation": None} | options).kernel

    assert kernel(8, 3, 7, 7).endswith("winograd")
    for other in (
        kernel(8, 3, 7, 7, exact=True),
        kernel(8, 3, 7, 7, stride=1),
        kernel(8, 4, 7, 7),
        kernel(8, 3, 7, 5),
        kernel(8, 3, 7, 7, scale=1e3),
        kernel(8, 3, 7, 7, scale=float("inf")),
    ):
        assert not other.endswith("winograd")


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
