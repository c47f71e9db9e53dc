"""What each kernel moves and computes, by arithmetic: chooses tiles, and whether a block runs fused, split or in parts. Pure Python.

`fastconv tune --model` prints it for every block of the six networks.

`issued` counts the bytes of x that a kernel's load instructions ask for, exactly; the tests count them in Triton's interpreter. `floor` is
what any program must move through device memory: each input read once, each output written once. `seconds` turns a kernel's work into time
on a machine of which only datasheet figures are known: good to rank, no forecast. Measurements made by `fastconv tune` go before it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from . import configs
from .configs import SIDE, BlockTile, DepthwiseTile, Form, Problem, Split, StagedFireTile, StagedTile, Strips


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
# Measured over modelled time, the median of the networks' blocks and staged tiles (H100, bf16, batch 128; in parts it is 1.05 of all
# blocks, 1.4 of those that have staged tiles).
FITTED = {"marched": 1.7, "staged separable": 0.76, "staged inverted_residual": 0.5, "staged expand_depthwise": 0.72, "staged fire": 0.7}


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


def _window(problem: Problem, tile: Strips, taps_h: list[int], taps_w: list[int]) -> int:
    """Sum over a kernel's lanes of the pixels it loads: rows of its strip times columns of its window that lie inside the image.

    taps_h: offsets of the rows a strip loads from the first row of its first window; taps_w: the same for columns.
    """
    (height, width), (stride_h, stride_w), (pad_h, pad_w) = problem.size, problem.stride, problem.padding
    # the lanes past the last strip too: they load what rows of the image they meet
    whole, rest = divmod(tile.tiles(problem.height, problem.width) * tile.lanes, problem.width)
    rows = [sum(0 <= strip * tile.run * stride_h - pad_h + tap < height for tap in taps_h) for strip in range(whole + 1)]
    columns = [sum(0 <= column * stride_w - pad_w + tap < width for tap in taps_w) for column in range(problem.width)]
    return sum(rows[:-1]) * sum(columns) + rows[-1] * sum(columns[:rest])


def _rows(problem: Problem, tile: Strips) -> int:
    """Input rows of a strip."""
    return (tile.run - 1) * problem.stride[0] + problem.kernel


def issued(problem: Problem, tile: BlockTile | StagedTile | StagedFireTile | DepthwiseTile) -> int:
    """Bytes of x that the kernel's loads ask for, for one image."""
    if isinstance(tile, (StagedTile, StagedFireTile)):
        steps = (SIDE - 2, SIDE - 2) if isinstance(tile, StagedFireTile) else (tile.strips * tile.run, tile.columns)
        along = zip(problem.size, (problem.height, problem.width), steps, problem.stride, problem.padding)
        rows, columns = (
            sum(min(first * s - p + (step - 1) * s + problem.kernel, extent) - max(first * s - p, 0) for first in range(0, out, step))
            for extent, out, step, s, p in along
        )
        return rows * columns * problem.in_channels * problem.item
    blocks = _up(problem.out_channels, tile.channels)
    if problem.op == "stem_pool":  # every lane takes three columns of the convolution's rows, whose windows count as if none left the image
        window = problem.kernel**2 * problem.in_channels * problem.item
        return tile.tiles(problem.height, problem.width) * tile.lanes * 3 * (2 * tile.run + 1) * window * blocks
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


def work(problem: Problem, tile: BlockTile | StagedTile) -> Work:
    """Of the block as one kernel, idle lanes and channels up to a whole tile included: they take their time too."""
    if isinstance(tile, StagedFireTile):
        return staged_fire_work(problem, tile)
    if isinstance(tile, StagedTile):
        return staged_work(problem, tile)
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
    elif problem.op == "stem_pool":
        taken = tiles * tile.lanes * 3 * (2 * tile.run + 1)  # pixels of the convolution
        tensor, scalar, weights = taken * deep * width, taken * blocks * (8 * deep + 5 * tile.channels), c * tile.channels * k * k
    elif problem.op == "fire_pool":
        tensor, scalar, weights = 90 * slots * deep * width, 9 * 6 * slots * width, 10 * c * tile.channels
    else:
        tensor, scalar, weights = (
            slots * deep * width,
            addresses * slots * deep + 4 * slots * width,
            c * tile.channels,
        )
    rows, columns = _rows(problem, tile), tile.lanes * problem.stride[1] + k - problem.stride[1]
    if problem.op == "stem_pool":
        rows, columns = 2 * (2 * tile.run + 1) + k, 4 * tile.lanes + k
    elif problem.op == "fire_pool":
        rows, columns = 5, tile.lanes * problem.stride[1] + 3
    touched = problem.height * problem.width if problem.op == "head" else min(rows * columns, problem.size[0] * problem.size[1])
    l2 = tiles * blocks * (touched * c + weights) * problem.item + results(problem)
    if problem.dtype == "f32":  # without tensor cores
        tensor, scalar = 0, scalar + tensor
    return Work(floor(problem), l2, issued(problem, tile), tensor, scalar)


def staged_work(problem: Problem, tile: StagedTile) -> Work:
    """Of the block with its region in shared memory, whose bytes count as L1's: written once, read once a column of the window."""
    c, e, k = problem.in_channels, problem.between or problem.in_channels, problem.kernel
    tiles, pixels, lanes = tile.tiles(problem.height, problem.width), tile.pixels(problem), tile.lanes(problem)
    across = _up(e, tile.depth) * tile.depth
    projects = problem.op != "expand_depthwise"
    width = configs.padded(problem.out_channels) if projects else 0
    slots, rows = tile.slots(problem), k * ((tile.run - 1) * problem.stride[0] + k)
    expands = problem.op != "separable"
    inner = tile.depth_in(c) if expands else 0
    tensor = pixels * inner * across + slots * across * width
    scalar = across * (pixels * (4 if expands else 1) + lanes * (rows + tile.run * (k * k + 5)))
    local = across * (2 * pixels + lanes * rows + 2 * tile.run * lanes + pixels * inner // tile.depth) * problem.item
    weights = e * (c * expands + k * k + problem.out_channels * projects)
    l2 = tiles * (pixels * c + weights) * problem.item + results(problem)
    return Work(floor(problem), l2, tiles * local, tiles * tensor, tiles * scalar)


def staged_fire_work(problem: Problem, tile: StagedFireTile) -> Work:
    c, o = problem.in_channels, problem.out_channels
    tiles, between = tile.tiles(problem.height, problem.width), configs.padded(problem.between)
    pixels, blocks = SIDE**2, _up(o, tile.channels)
    tensor = pixels * between * (_up(c, tile.depth_in) * tile.depth_in + 10 * blocks * tile.channels)
    scalar = pixels * (5 * between + 2 * 4 * blocks * tile.channels)
    local = problem.item * (2 * pixels * c + 10 * blocks * (pixels + tile.channels) * between + 4 * pixels * blocks * tile.channels)
    l2 = tiles * (pixels * c + problem.between * (c + 10 * o)) * problem.item + results(problem)
    return Work(floor(problem), l2, tiles * local, tiles * tensor, tiles * scalar)


def staged_warps(problem: Problem, tile: StagedTile | StagedFireTile) -> int:
    """Warps of a multiprocessor that registers and shared memory leave room for."""
    threads = 32 * tile.num_warps
    if isinstance(tile, StagedFireTile):
        registers = tile.registers or min(255, 120 + SIDE**2 * tile.channels // threads)
        programs = min(65536 // (registers * threads), configs.STAGED_SHARED // configs.shared_bytes(problem, tile))
        return max(1, programs) * tile.num_warps
    held = (tile.slots(problem) * configs.padded(problem.out_channels) if problem.op != "expand_depthwise" else 0) // threads
    march = (tile.run + 1) * tile.lanes(problem) * tile.depth // threads + 24
    expand = tile.pixels(problem) * tile.depth // threads if problem.op != "separable" else 0
    registers = min(255, tile.registers or 255, 64 + held + max(march, expand))
    programs = min(65536 // (registers * threads), configs.STAGED_SHARED // configs.shared_bytes(problem, tile))
    return max(1, programs) * tile.num_warps


def resident_warps(problem: Problem, tile: BlockTile | StagedTile | StagedFireTile) -> int:
    """Warps of a multiprocessor that the registers leave room for, by the values a thread must hold."""
    if isinstance(tile, (StagedTile, StagedFireTile)):
        return staged_warps(problem, tile)
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


def candidates(problem: Problem, arch: str) -> tuple[BlockTile | StagedTile, ...]:
    """The tiles that ship for the problem."""
    tiles, staged = configs.TABLES[problem.op][arch][configs.kind(problem)], configs.staged(problem, arch)
    if problem.op not in ("inverted_residual", "expand_depthwise"):
        return tiles + staged
    # a kernel that loops over its input channels loads weights in the loop: only where no tile holds them, and then the deepest
    deep = min(problem.in_channels, max(tile.depth_in for tile in tiles))
    return tuple(tile for tile in tiles if tile.depth_in >= deep) + staged


@functools.lru_cache(maxsize=4096)
def best(problem: Problem, arch: str) -> BlockTile | StagedTile:
    """The candidate with the least time by the model; of equals, the first."""
    return min(candidates(problem, arch), key=lambda tile: fused_seconds(problem, tile, arch))


def fused_seconds(problem: Problem, tile: BlockTile | StagedTile, arch: str) -> float:
    kind = f"staged {problem.op}" if isinstance(tile, (StagedTile, StagedFireTile)) else "marched"
    return seconds(work(problem, tile), arch, problem.dtype, resident_warps(problem, tile)) * FITTED[kind]


def _pointwise(problem: Problem, pixels: int, c: int, o: int) -> Work:
    moved = pixels * (c + o) * problem.item
    tensor = pixels * c * o
    half = problem.dtype != "f32"
    return Work(moved, moved * 1.5, moved * 1.5, tensor if half else 0, pixels * o * 4 + (0 if half else tensor))


def _depthwise(problem: Problem, c: int, arch: str) -> Work:
    """A load and its conversion for each row of a strip and column of the window, a multiply-add for every product."""
    layer = replace(problem, op="depthwise", in_channels=c, out_channels=c, between=0)
    tile, moved = configs.config(layer, arch), floor(layer)
    lanes = tile.tiles(problem.height, problem.width) * tile.lanes * _up(c, tile.channels) * tile.channels
    scalar = lanes * (tile.run * (problem.kernel**2 + 4) + _rows(problem, tile) * problem.kernel)
    return Work(moved, moved * 1.5, issued(layer, tile), 0, scalar)


def _fire_expand(problem: Problem, pixels: int, c: int, o: int) -> Work:
    moved = pixels * (c + 2 * o) * problem.item
    half = problem.dtype != "f32"
    tensor = 10 * pixels * c * o
    return Work(moved, moved * 1.5, 10 * pixels * c * problem.item, tensor if half else 0, pixels * o * 8 + (0 if half else tensor))


def parts(problem: Problem, arch: str) -> list[Work]:
    """The same block as one kernel per layer."""
    pixels, c, o, e = problem.height * problem.width, problem.in_channels, problem.out_channels, problem.between
    full = problem.size[0] * problem.size[1]
    if problem.op == "separable":
        return [_depthwise(problem, c, arch), _pointwise(problem, pixels, c, o)]
    if problem.op == "inverted_residual":
        return [_pointwise(problem, full, c, e), _depthwise(problem, e, arch), _pointwise(problem, pixels, e, o)]
    if problem.op == "expand_depthwise":  # the fused one sums what it writes; here that takes a pass
        read = pixels * e * problem.item
        return [_pointwise(problem, full, c, e), _depthwise(problem, e, arch), Work(read, read, read, 0, pixels * e)]
    if problem.op == "fire":
        return [_pointwise(problem, full, c, e), _fire_expand(problem, full, e, o)]
    if problem.op == "fire_pool":
        moved = (full + pixels) * 2 * o * problem.item
        return [_fire_expand(problem, full, c, o), Work(moved, moved, 9 * pixels * 2 * o * problem.item, 0, 9 * pixels * 2 * o)]
    if problem.op == "stem_pool":
        stem = problem.before_pool
        moved = (stem.height * stem.width + pixels) * o * problem.item
        return [work(stem, best(stem, arch)), Work(moved, moved, 9 * pixels * o * problem.item, 0, 9 * pixels * o)]
    if problem.op == "head":
        read = pixels * o * problem.item
        return [_pointwise(problem, pixels, c, o), Work(read, read, read, 0, pixels * o)]
    raise ValueError(f"{problem.op} has no parts")


def parts_seconds(problem: Problem, arch: str) -> float:
    return sum(seconds(part, arch, problem.dtype) for part in parts(problem, arch))


def split_seconds(problem: Problem, tile: BlockTile | StagedTile, arch: str) -> float:
    """Of an inverted residual as its expand, then the rest as one kernel."""
    return seconds(parts(problem, arch)[0], arch, problem.dtype) + fused_seconds(problem.after_expand, tile, arch)


def form(problem: Problem, arch: str) -> Form:
    """The form with the least time by the model; of equals, the one of fewer kernels."""
    tile = best(problem, arch)
    if problem.op == "stem":
        return tile
    times: dict[Form, float] = {tile: fused_seconds(problem, tile, arch)}
    if problem.op == "inverted_residual":
        second = best(problem.after_expand, arch)
        times[Split(second)] = split_seconds(problem, second, arch)
    times[None] = parts_seconds(problem, arch)
    return min(times, key=times.get)
