import pytest
import torch
from harness import (
    CHANNELS,
    Bounded,
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


@every_isa
@pytest.mark.parametrize("channels", CHANNELS)
def test_channels_and_sizes(channels):
    for height, width in ((1, 1), (1, 2), (7, 7), (13, 13), (5, 16), (3, 33)):
        x = reals(2, channels, height, width)
        y = ops.global_avg_pool(x)
        Bounded.exact(x).mean().admits(y, (height, width))
        assert torch.equal(ops.prepare_global_avg_pool()(x), y)


@every_isa
def test_integers_are_exact():
    x = integers(2, 33, 8, 16)  # a power of two pixels: the division is exact, too
    assert torch.equal(ops.global_avg_pool(x), reference.global_avg_pool(x))


@every_isa
def test_nonfinite():
    check_nonfinite(ops.global_avg_pool, reference.global_avg_pool, reals(2, 21, 5, 6))


@every_isa
def test_layouts_and_bits():
    check_layouts(ops.global_avg_pool, reals(3, 20, 7, 6))
    check_same_bits(ops.global_avg_pool, reals(3, 20, 17, 18))


@every_isa
def test_empty_batch():
    assert ops.global_avg_pool(reals(0, 3, 9, 9)).shape == (0, 3, 1, 1)


def test_registrations():
    check_registrations(torch.ops.fastconv.global_avg_pool.default, reals(2, 3, 4, 5))


def test_compile_and_other_dtypes():
    check_other_dtypes(ops.global_avg_pool, reference.global_avg_pool, [reals(2, 6, 7, 8)])
    check_compiled(ops.global_avg_pool, reals(2, 6, 7, 8))
