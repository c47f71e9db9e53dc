"""Tensors past 2^31 elements, in sparse mappings: every far pixel as if it stood in a small image.

Vertical strides that skip most rows keep the quick cases quick; the slow ones read or write every element.
"""

import os

import pytest
import torch
from harness import integers, sparse

from fastconv import _extension, ops

pytestmark = pytest.mark.skipif(not _extension.available, reason="ATen would make copies")

STEP, ROWS = 2**18, 9  # rows of the image between two rows of the output, and how many of those


@pytest.fixture(autouse=True)
def one_thread():
    """Blocks then go depth first: more threads than rows would keep the whole expanded image."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def calls(c):
    dw, pw, five, dense, bias = integers(c, 1, 3, 3), integers(24, c, 1, 1), integers(c, 1, 5, 5), integers(16, c, 3, 3), integers(c)
    block = integers(2 * c, c, 1, 1), None, integers(2 * c, 1, 3, 3), None, integers(24, 2 * c, 1, 1), None
    return {
        "depthwise": (3, lambda x, **options: ops.depthwise(x, dw, bias, **options)),
        "depthwise 5x5": (5, lambda x, **options: ops.depthwise(x, five, bias, **options)),
        "max_pool": (3, ops.max_pool),
        "separable": (3, lambda x, **options: ops.separable(x, dw, bias, pw, None, **options)),
        "inverted_residual": (3, lambda x, **options: ops.inverted_residual(x, *block, **options)),
        "stem": (3, lambda x, **options: ops.stem(x, dense, **options)),
    }


@pytest.mark.parametrize("name", [*calls(1), "stem, NCHW"])
def test_rows_past_2_31_elements(name):
    name, _, layout = name.partition(", ")
    c, width = (3, 1024) if name == "stem" else (16, 64)  # the stem's last channel begins past 2^31
    window, call = calls(c)[name]
    x = sparse(1, c, STEP * (ROWS - 1) + window, width, nchw=layout == "NCHW")
    assert x.numel() > 2**31
    for row in range(ROWS):
        part = x[:, :, row * STEP : row * STEP + window]
        part.copy_(integers(*part.shape))
    y = call(x, stride=(STEP, 1), padding=(0, window // 2))
    assert y.shape[2] == ROWS
    for row in range(ROWS):
        part = x[:, :, row * STEP : row * STEP + window].contiguous()
        alone = call(part, stride=(1, 1), padding=(0, window // 2))
        assert torch.equal(y[:, :, row : row + 1], alone), row
        assert alone.any()


def far(shape, pixels):
    """A sparse image with integers at those pixels, counted through the batch."""
    x = sparse(*shape)
    flat = x.permute(0, 2, 3, 1).reshape(-1, shape[1])
    for pixel in pixels:
        flat[pixel] = integers(shape[1])
    return x, flat


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pointwise", "fire", "fire_expand", "global_avg_pool"])
def test_inputs_past_2_31_elements_read_whole(name):
    c, side = 2**11, 1025
    pixels = (0, 5, 2**20 - 1, 2**20, 2**20 + 1, side * side - 1)
    x, flat = far((1, c, side, side), pixels)
    assert x.numel() > 2**31
    small = flat[list(pixels)].T.reshape(1, c, len(pixels), 1)
    one, two = integers(3, c, 1, 1), (integers(2, 3, 1, 1), None, integers(2, 3, 3, 3), None)
    if name == "global_avg_pool":
        assert torch.allclose(ops.global_avg_pool(x) * (side * side), small.sum(2, keepdim=True), rtol=1e-5)
        return
    if name == "pointwise":
        y, alone = ops.pointwise(x, one), ops.pointwise(small, one)
    elif name == "fire":
        y, alone = ops.fire(x, one, None, *two)[:, :2], ops.fire(small, one, None, *two)[:, :2]
    else:
        params = integers(2, c, 1, 1), None, integers(1, c, 3, 3), None
        y, alone = ops.fire_expand(x, *params)[:, :2], ops.fire_expand(small, *params)[:, :2]  # the 1x1 expand: no neighbours
    rows = y.permute(0, 2, 3, 1).reshape(side * side, -1)
    assert torch.equal(rows[list(pixels)], alone[0, :, :, 0].T)
    assert (rows[5 + 1 : 1000] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["depthwise", "pointwise", "max_pool"])
def test_outputs_past_2_31_elements(name):
    """8 GiB of output are really written."""
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory")
    h = w = 11600
    c = 16
    last = h * w - 1
    pixels = (0, 2**27 - 1, 2**27, 2**27 + 1, last)
    x, _ = far((1, c, h, w), pixels)
    dw, pw = integers(c, 1, 3, 3), integers(c, c, 1, 1)
    call = {
        "depthwise": lambda x: ops.depthwise(x, dw),
        "pointwise": lambda x: ops.pointwise(x, pw),
        "max_pool": lambda x: ops.max_pool(x, stride=1, padding=1),
    }[name]
    y = call(x)
    assert y.numel() > 2**31
    for pixel in pixels:
        row, column = divmod(pixel, w)
        top, left = max(row - 2, 0), max(column - 2, 0)
        patch = x[:, :, top : row + 3, left : column + 3]
        alone = call(patch.contiguous(memory_format=torch.channels_last))
        inner_top, inner_left = row - top, column - left
        assert torch.equal(y[:, :, row, column], alone[:, :, inner_top, inner_left]), pixel
        assert alone.any()
