import pytest
import torch
from harness import CHANNELS, check_compiled, check_layouts, check_other_dtypes, check_registrations, check_same_bits, every_isa, reals

from fastconv import ops, reference


@every_isa
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_every_size_is_exact(ceil_mode):
    for height in (1, 2, 3, 4, 5, 8, 13):
        for width in (*range(1, 19), 27):
            x = reals(1, 5, height, width)
            for stride in (1, 2, 3, (1, 2)):
                for padding in (0, 1, (0, 1)):
                    try:
                        want = reference.max_pool(x, stride=stride, padding=padding, ceil_mode=ceil_mode)
                    except RuntimeError:  # ATen: no pixels in the output
                        with pytest.raises(ValueError, match="max_pool: the output would have no pixels"):
                            ops.max_pool(x, stride=stride, padding=padding, ceil_mode=ceil_mode)
                        continue
                    y = ops.max_pool(x, stride=stride, padding=padding, ceil_mode=ceil_mode)
                    assert torch.equal(y, want), (height, width, stride, padding)
                    assert torch.equal(ops.prepare_max_pool(stride, padding, ceil_mode)(x), want)


@every_isa
@pytest.mark.parametrize("channels", CHANNELS)
def test_channels(channels):
    x = reals(2, channels, 9, 8)
    assert torch.equal(ops.max_pool(x), reference.max_pool(x))
    assert torch.equal(ops.max_pool(-x.abs(), padding=1), reference.max_pool(-x.abs(), padding=1))  # padding is no zero


@every_isa
def test_nonfinite():
    """NaN wins against everything, wherever in the window it stands; -Inf is an ordinary smallest value."""
    x = reals(2, 21, 7, 8)
    for value in (torch.nan, torch.inf, -torch.inf):
        for i in range(7):
            for j in range(8):
                spoiled = x.clone()
                spoiled[:, ::2, i, j] = value
                for stride in (1, 2, 3):
                    got, want = (module.max_pool(spoiled, stride=stride, padding=1) for module in (ops, reference))
                    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    x = torch.full((1, 20, 4, 4), -torch.inf)
    assert torch.equal(ops.max_pool(x, padding=1), reference.max_pool(x, padding=1))


@every_isa
def test_layouts_and_bits():
    check_layouts(lambda x: ops.max_pool(x, padding=1), reals(3, 20, 7, 6))
    check_same_bits(ops.max_pool, reals(3, 20, 17, 18))


@every_isa
def test_empty_batch():
    assert ops.max_pool(reals(0, 3, 9, 9)).shape == (0, 3, 4, 4)


def test_registrations():
    x = torch.randperm(2 * 3 * 6 * 7).view(2, 3, 6, 7) / 10.0  # no ties: the derivative exists
    check_registrations(torch.ops.fastconv.max_pool.default, x, [2, 2], [0, 1], True)


def test_compile_and_other_dtypes():
    check_other_dtypes(ops.max_pool, reference.max_pool, [reals(2, 6, 7, 8)])
    check_compiled(lambda x: ops.max_pool(x, padding=1, ceil_mode=True), reals(2, 6, 7, 8))
