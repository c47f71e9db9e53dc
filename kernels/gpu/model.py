"""What each kernel moves and computes, by arithmetic: chooses tiles, and whether a block runs fused or in parts. Pure Python.

`fastconv tune --model` prints it for every block of the six networks.

`issued` counts the bytes of x that a kernel's load instructions ask for, exactly; the tests count them in Triton's interpreter. `floor` is
what any program must move through device memory: each input read once, each output written once. `seconds` turns a kernel's work into time
on a machine of which only datasheet figures are known: good to rank, no forecast. Measurements made by `fastconv tune` go before it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from . import configs
from .configs import BlockTile, Problem


@dataclass(frozen=True)
class Machine:
    """Per second or per clock and multiprocessor: bytes, multiply-adds on tensor cores (half) and fp32 operations."""

    multiprocessors: int
    clock: float
    memory: float
    l2: float
    l1: int
    tensor: int
    scalar: int


# Datasheets (H200, MI300X, A100 40 GB); L2 rates from published microbenchmarks.
MACHINES = {
    "sm_90": Machine(132, 1.75e9, 4.8e12, 5.5e12, 128, 2048, 128),
    "gfx942": Machine(304, 2.1e9, 5.3e12, 8.0e12, 64, 1024, 128),
    "sm_80": Machine(108, 1.41e9, 1.55e12, 4.0e12, 128, 1024, 64),
}
# What share of those rates kernels of this kind are assumed to reach, until one is measured.
MEMORY, L2, L1, TENSOR, SCALAR = 0.9, 0.7, 0.6, 0.35, 0.6
BUSY_WARPS = 12  # below so many resident warps a multiprocessor waits


@dataclass(frozen=True)
class Work:
    """Of one image: bytes through device memory, L2 and L1, multiply-adds in dot products, other fp32 operations."""

    memory: float
    l2: float
    l1: float
    tensor: float
    scalar: float


def _up(value: int, unit: int) -> int:
    return -(-value // unit)


def _window(problem: Problem, tile: BlockTile, taps_h: list[int], taps_w: list[int]) -> int:
    """Sum over a kernel's lanes of the pixels it loads: rows of its strip times columns of its window that lie inside the image.

    taps_h: offsets of the rows a strip loads from the first row of its first window; taps_w: the same for columns.
    """
    (height, width), (stride_h, stride_w), (pad_h, pad_w) = problem.size, problem.stride, problem.padding
    # the lanes past the last strip too: they load what rows of the image they meet
    whole, rest = divmod(tile.tiles(problem.height, problem.width) * tile.lanes, problem.width)
    rows = [sum(0 <= strip * tile.run * stride_h - pad_h + tap < height for tap in taps_h) for strip in range(whole + 1)]
    columns = [sum(0 <= column * stride_w - pad_w + tap < width for tap in taps_w) for column in range(problem.width)]
    return sum(rows[:-1]) * sum(columns) + rows[-1] * sum(columns[:rest])


def _rows(problem: Problem, tile: BlockTile) -> int:
    """Input rows of a strip."""
    return (tile.run - 1) * problem.stride[0] + problem.kernel


def issued(problem: Problem, tile: BlockTile) -> int:
    """Bytes of x that the kernel's loads ask for, for one image."""
    blocks = _up(problem.out_channels, tile.channels)
    if problem.op == "head":
        return problem.height * problem.width * problem.in_channels * blocks * problem.item
    if problem.op == "fire_pool":
        taps, neighbours = [0, 1, 2], [tap + d for tap in range(3) for d in (-1, 0, 1)]
        pixels = _window(problem, tile, taps, taps) + _window(problem, tile, neighbours, neighbours)
        return pixels * problem.in_channels * blocks * problem.item
    pixels = _window(problem, tile, list(range(_rows(problem, tile))), list(range(problem.kernel)))
    chunks = 1
    if problem.op in ("inverted_residual", "fire"):
        chunks = _up(problem.between, tile.depth) * blocks
    elif problem.op == "expand_depthwise":
        chunks = _up(problem.between, tile.depth)
    elif problem.op in ("separable", "stem"):
        chunks = blocks
    return pixels * problem.in_channels * chunks * problem.item


def results(problem: Problem) -> int:
    """Bytes of the output of one image."""
    channels = problem.out_channels * (2 if problem.op.startswith("fire") else 1)
    return (1 if problem.op == "head" else problem.height * problem.width) * channels * problem.item


def floor(problem: Problem) -> int:
    """Bytes that any program must move through device memory for one image, weights left out: they serve a whole batch."""
    height, width = problem.size
    return height * width * problem.in_channels * problem.item + results(problem)


def work(problem: Problem, tile: BlockTile) -> Work:
    """Of the block as one kernel, idle lanes and channels up to a whole tile included: they take their time too."""
    c, o, e, k = problem.in_channels, problem.out_channels, problem.between, problem.kernel
    blocks = _up(o, tile.channels)
    tiles = 1 if problem.op == "head" else tile.tiles(problem.height, problem.width)
    slots = tiles * tile.lanes * tile.run  # output pixels, idle ones too
    if problem.op == "head":
        slots = _up(problem.height * problem.width, tile.lanes) * tile.lanes
    halo = tiles * tile.lanes * _rows(problem, tile) * k  # times an input pixel is taken
    width = blocks * tile.channels
    steps, by_rows = configs.stem_steps(k, k, c) if problem.op == "stem" else (_up(c, tile.depth), False)
    deep = steps * tile.depth
    addresses = 0 if problem.op != "stem" else 4 * blocks if by_rows else 8
    if problem.op == "separable":
        tensor, weights = slots * deep * width, c * tile.channels + k * k * c
        scalar = blocks * deep * (slots * (k * k + 3) + halo)
    elif problem.op in ("inverted_residual", "expand_depthwise"):
        across, inner = _up(e, tile.depth) * tile.depth, _up(c, tile.depth_in) * tile.depth_in
        if problem.op == "expand_depthwise":
            blocks, width = 1, 0
        tensor = blocks * halo * inner * across + slots * across * width
        scalar = blocks * across * (4 * halo + slots * (k * k + 4))
        weights = c * e + k * k * e + e * tile.channels
        if problem.op == "expand_depthwise":
            tiles, weights = tiles * _up(e, tile.depth), c * tile.depth + k * k * tile.depth
    elif problem.op == "fire":
        across, inner = _up(e, tile.depth) * tile.depth, _up(c, tile.depth_in) * tile.depth_in
        tensor = blocks * halo * inner * across + 10 * slots * across * width
        scalar = blocks * across * 4 * halo + 4 * slots * width
        weights = c * e + 10 * e * tile.channels
    elif problem.op == "fire_pool":
        tensor, scalar, weights = 90 * slots * deep * width, 9 * 6 * slots * width, 10 * c * tile.channels
    else:
        tensor, scalar, weights = (
            slots * deep * width,
            addresses * slots * deep + 4 * slots * width,
            c * tile.channels,
        )
    rows, columns = _rows(problem, tile), tile.lanes * problem.stride[1] + k - problem.stride[1]
    if problem.op == "fire_pool":
        rows, columns = 5, tile.lanes * problem.stride[1] + 3
    touched = problem.height * problem.width if problem.op == "head" else min(rows * columns, problem.size[0] * problem.size[1])
    l2 = tiles * blocks * (touched * c + weights) * problem.item + results(problem)
    if problem.dtype == "f32":  # without tensor cores
        tensor, scalar = 0, scalar + tensor
    return Work(floor(problem), l2, issued(problem, tile), tensor, scalar)


def resident_warps(problem: Problem, tile: BlockTile) -> int:
    """Warps of a multiprocessor that the registers leave room for, by the values a thread must hold."""
    held = tile.run * tile.lanes * tile.channels * (2 if problem.op.startswith("fire") else 1)
    held += (tile.run + 2) * tile.lanes * tile.depth
    registers = min(255, 48 + held // (32 * tile.num_warps))
    return 65536 // (32 * registers * tile.num_warps) * tile.num_warps


def seconds(work: Work, arch: str, dtype: str, warps: int = 64) -> float:
    """Time for one image of many. Work within a multiprocessor adds up, for few warps are there to overlap it; memory overlaps."""
    machine = MACHINES[arch]
    clocks = machine.multiprocessors * machine.clock
    tensor = machine.tensor / (2 if dtype == "tf32" else 1)
    inside = work.l1 / (L1 * machine.l1) + work.tensor / (TENSOR * tensor) + work.scalar / (SCALAR * machine.scalar)
    inside *= max(1, BUSY_WARPS / warps) / clocks
    return max(work.memory / (MEMORY * machine.memory), work.l2 / (L2 * machine.l2), inside)


def candidates(problem: Problem, arch: str) -> tuple[BlockTile, ...]:
    """The tiles that ship for the problem."""
    tiles = configs.TABLES[problem.op][arch][configs.kind(problem)]
    if problem.op not in ("inverted_residual", "expand_depthwise"):
        return tiles
    # a kernel that loops over its input channels loads weights in the loop: only where no tile holds them, and then the deepest
    deep = min(problem.in_channels, max(tile.depth_in for tile in tiles))
    return tuple(tile for tile in tiles if tile.depth_in >= deep)


@functools.lru_cache(maxsize=4096)
def best(problem: Problem, arch: str) -> BlockTile:
    """The candidate with the least time by the model; of equals, the first."""
    return min(candidates(problem, arch), key=lambda tile: fused_seconds(problem, tile, arch))


def fused_seconds(problem: Problem, tile: BlockTile, arch: str) -> float:
    return seconds(work(problem, tile), arch, problem.dtype, resident_warps(problem, tile))


def _pointwise(problem: Problem, pixels: int, c: int, o: int) -> Work:
    moved = pixels * (c + o) * problem.item
    tensor = pixels * c * o
    half = problem.dtype != "f32"
    return Work(moved, moved * 1.5, moved * 1.5, tensor if half else 0, pixels * o * 4 + (0 if half else tensor))


def _depthwise(problem: Problem, c: int) -> Work:
    """A tap's load and its conversion for every product."""
    (height, width), pixels, taps = problem.size, problem.height * problem.width, problem.kernel**2
    moved = (height * width + pixels) * c * problem.item
    return Work(moved, moved * 1.5, pixels * c * taps * problem.item, 0, pixels * c * (2 * taps + 4))


def _fire_expand(problem: Problem, pixels: int, c: int, o: int) -> Work:
    moved = pixels * (c + 2 * o) * problem.item
    half = problem.dtype != "f32"
    tensor = 10 * pixels * c * o
    return Work(moved, moved * 1.5, 10 * pixels * c * problem.item, tensor if half else 0, pixels * o * 8 + (0 if half else tensor))


def parts(problem: Problem) -> list[Work]:
    """The same block as one kernel per layer."""
    pixels, c, o, e = problem.height * problem.width, problem.in_channels, problem.out_channels, problem.between
    full = problem.size[0] * problem.size[1]
    if problem.op == "separable":
        return [_depthwise(problem, c), _pointwise(problem, pixels, c, o)]
    if problem.op == "inverted_residual":
        return [_pointwise(problem, full, c, e), _depthwise(problem, e), _pointwise(problem, pixels, e, o)]
    if problem.op == "expand_depthwise":  # the fused one sums what it writes; here that takes a pass
        read = pixels * e * problem.item
        return [_pointwise(problem, full, c, e), _depthwise(problem, e), Work(read, read, read, 0, pixels * e)]
    if problem.op == "fire":
        return [_pointwise(problem, full, c, e), _fire_expand(problem, full, e, o)]
    if problem.op == "fire_pool":
        moved = (full + pixels) * 2 * o * problem.item
        return [_fire_expand(problem, full, c, o), Work(moved, moved, 9 * pixels * 2 * o * problem.item, 0, 9 * pixels * 2 * o)]
    if problem.op == "head":
        read = pixels * o * problem.item
        return [_pointwise(problem, pixels, c, o), Work(read, read, read, 0, pixels * o)]
    raise ValueError(f"{problem.op} has no parts")


def parts_seconds(problem: Problem, arch: str) -> float:
    return sum(seconds(part, arch, problem.dtype) for part in parts(problem))


def fuses(problem: Problem, arch: str) -> bool:
    """Whether one kernel is no slower than one per layer, by the model."""
    return fused_seconds(problem, best(problem, arch), arch) <= parts_seconds(problem, arch)
