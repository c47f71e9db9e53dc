"""The kernels for Hopper whose tiles lie in shared memory. Gluon has no interpreter: here is what can be checked without a GPU, the order
of the pixels and which problems take a tile; test_compile.py compiles them, test_device.py runs them."""

import types

import numpy as np
import pytest

from fastconv.kernels.gpu import configs

pytest.importorskip("triton.experimental.gluon")

TILES = [(geometry, tile) for geometry, tiles in configs.STAGED.items() for tile in tiles]


@pytest.fixture
def staged(monkeypatch):
    """The module with its device code's `where` on numpy arrays."""
    from fastconv.kernels.gpu import staged

    monkeypatch.setattr(staged, "gl", types.SimpleNamespace(where=np.where))
    return staged


# geometries beyond the table's: other kernels, strides and tiles must come out right, too
OTHERS = [
    ((5, 1), configs.StagedTile(2, 6, 12, 32, 4)),
    ((5, 2), configs.StagedTile(3, 2, 6, 32, 4)),
    ((3, 1), configs.StagedTile(1, 5, 9, 32, 4)),
]


@pytest.mark.parametrize(("geometry", "tile"), TILES + OTHERS, ids=str)
def test_every_window_is_a_run_of_the_regions_pixels(geometry, tile, staged):
    kernel, stride = geometry
    problem = configs.Problem("separable", "bf16", 56, 56, 32, 32, kernel, (stride, stride), (1, 1))
    period, extra = tile.run * stride, kernel - stride
    rows, wide = tile.strips * period + extra, tile.columns + (kernel - 1) // stride
    pixels, lanes = tile.pixels(problem), tile.lanes(problem)
    ih, iw, used = staged.pixel_of.fn(np.arange(pixels), tile.strips, period, extra, rows, wide, stride)
    assert used.sum() == stride * rows * wide
    assert len(set(zip(ih[used], iw[used]))) == used.sum()  # each pixel of the region once
    for kw in range(kernel):
        for row in range((tile.run - 1) * stride + kernel):
            start = kw % stride * rows * wide + kw // stride + staged.row_start.fn(row, tile.strips, period, extra, wide)
            assert start + lanes <= pixels + lanes  # what the region is allocated for
            for strip in range(tile.strips):
                at = start + strip * wide + np.arange(tile.columns)
                assert used[at].all()
                assert (ih[at] == strip * period + row).all()
                assert (iw[at] == np.arange(tile.columns) * stride + kw).all()


@pytest.mark.parametrize(
    "change",
    [{"dtype": "f32"}, {"dtype": "tf32"}, {"in_channels": 20}, {"stride": (1, 2)}, {"kernel": 5}, {"out_channels": 512}, {"op": "head"}],
    ids=str,
)
def test_what_takes_no_staged_tile(change):
    from dataclasses import replace

    problem = configs.Problem("inverted_residual", "bf16", 56, 56, 24, 24, 3, (1, 1), (1, 1), 144)
    assert configs.staged(problem, "sm_90")
    assert not configs.staged(problem, "sm_80")
    assert not configs.staged(replace(problem, **change), "sm_90")


def test_fires_take_tiles_that_fit():
    fire = configs.Problem("fire", "bf16", 13, 13, 512, 256, 3, (1, 1), (1, 1), 64)
    tiles = configs.staged(fire, "sm_90")
    assert tiles
    assert all(configs.shared_bytes(fire, tile) <= 227 * 1024 for tile in tiles)
    assert not configs.staged(configs.Problem("fire", "bf16", 13, 13, 512, 256, 3, (1, 1), (1, 1), 512), "sm_90")
