"""Which tile each problem runs with. Pure Python, so that it is tested and read without triton or a GPU.

A tile depends on one image and its channels, never on the batch: the same image gives the same bits in any batch. The
tables hold every configuration that ships, and tests/gpu/test_compile.py compiles each of them. The sm_80 table serves
every other architecture too, so its tiles stay below 99 KiB of shared memory (sm_86, sm_89, sm_120).

The tiles come from arithmetic (16 bytes a thread and load, accumulators within the register file, two or more programs per
multiprocessor). benchmarks/gpu.py times them on the networks' layers; a change here needs its figures.
"""

from dataclasses import dataclass

ARCHITECTURES = ("sm_80", "sm_90")


@dataclass(frozen=True)
class Problem:
    """One image of one layer. `dtype`: "f32", "tf32" (fp32 on tensor cores), "f16" or "bf16"; height and width are the output's."""

    op: str
    dtype: str
    height: int
    width: int
    in_channels: int
    out_channels: int


@dataclass(frozen=True)
class DepthwiseTile:
    """rows x cols output pixels by channels."""

    rows: int
    cols: int
    channels: int
    num_warps: int


@dataclass(frozen=True)
class MatmulTile:
    """pixels by channels outputs, accumulated in steps of depth input channels, with num_stages steps in flight."""

    pixels: int
    channels: int
    depth: int
    num_warps: int
    num_stages: int


# Widest first. 8 half or 4 float channels are one 16-byte load, and a thread keeps four pixels of them. "narrow": channels that do not
# come in 16-byte loads.
DEPTHWISE = {
    "half": (DepthwiseTile(8, 8, 64, 4), DepthwiseTile(8, 16, 32, 4), DepthwiseTile(16, 16, 16, 4)),
    "f32": (DepthwiseTile(8, 8, 32, 4), DepthwiseTile(8, 16, 16, 4)),
    "narrow": (DepthwiseTile(8, 8, 16, 4),),
}

# Narrowest first, and shallow before deep: the first that holds the layer is taken. "small" serves images of at most
# SMALL_IMAGE pixels, where wide tiles would leave most multiprocessors idle.
POINTWISE = {
    "sm_80": {
        "half": (
            MatmulTile(128, 32, 32, 4, 4),
            MatmulTile(128, 32, 64, 4, 3),
            MatmulTile(128, 64, 32, 4, 4),
            MatmulTile(128, 64, 64, 4, 3),
            MatmulTile(128, 128, 32, 8, 4),
            MatmulTile(128, 128, 64, 8, 3),
        ),
        "half small": (MatmulTile(64, 64, 64, 4, 4), MatmulTile(64, 128, 64, 4, 3)),
        "tf32": (MatmulTile(128, 32, 32, 4, 3), MatmulTile(128, 64, 32, 4, 3), MatmulTile(128, 128, 32, 8, 3)),
        "f32": (MatmulTile(64, 32, 32, 4, 3), MatmulTile(64, 64, 32, 4, 3)),
    },
    "sm_90": {
        "half": (
            MatmulTile(128, 32, 32, 4, 4),
            MatmulTile(128, 32, 64, 4, 4),
            MatmulTile(128, 64, 32, 4, 4),
            MatmulTile(128, 64, 64, 4, 4),
            MatmulTile(128, 128, 32, 8, 4),
            MatmulTile(128, 128, 64, 8, 4),
        ),
        "half small": (MatmulTile(64, 64, 64, 4, 4), MatmulTile(64, 128, 64, 4, 4)),
        "tf32": (MatmulTile(128, 32, 32, 4, 4), MatmulTile(128, 64, 32, 4, 4), MatmulTile(128, 128, 32, 8, 4)),
        "f32": (MatmulTile(64, 32, 32, 4, 3), MatmulTile(64, 64, 32, 4, 3)),
    },
}

# Each program keeps two accumulators (expand1x1 and expand3x3), so `channels` counts twice.
FIRE_EXPAND = {
    "sm_80": {
        "half": (MatmulTile(64, 64, 16, 4, 4), MatmulTile(128, 64, 32, 8, 4), MatmulTile(128, 64, 64, 8, 3)),
        "half small": (MatmulTile(64, 64, 64, 4, 3),),
        "tf32": (MatmulTile(64, 64, 16, 4, 4), MatmulTile(64, 64, 32, 4, 3)),
        "f32": (MatmulTile(64, 32, 16, 4, 3), MatmulTile(64, 32, 32, 4, 3)),
    },
    "sm_90": {
        "half": (MatmulTile(64, 64, 16, 4, 4), MatmulTile(128, 64, 32, 8, 4), MatmulTile(128, 64, 64, 8, 4)),
        "half small": (MatmulTile(64, 64, 64, 4, 4),),
        "tf32": (MatmulTile(64, 64, 16, 4, 4), MatmulTile(128, 64, 32, 8, 4)),
        "f32": (MatmulTile(64, 32, 16, 4, 3), MatmulTile(64, 32, 32, 4, 3)),
    },
}

SMALL_IMAGE = 14 * 14


def config(problem: Problem, arch: str) -> DepthwiseTile | MatmulTile:
    """The tile `problem` runs with on `arch` ("sm_80" or "sm_90")."""
    half = problem.dtype in ("f16", "bf16")
    # Without 16-byte loads an address per element fills the registers, and large tiles spill.
    narrow_loads = problem.in_channels % (8 if half else 4) != 0
    if problem.op == "depthwise":
        return _depthwise(DEPTHWISE["narrow" if narrow_loads else "half" if half else "f32"], problem.out_channels)
    table = {"pointwise": POINTWISE, "fire_expand": FIRE_EXPAND}[problem.op][arch]
    kind = "half" if half else problem.dtype
    if f"{kind} small" in table and problem.height * problem.width <= SMALL_IMAGE and problem.in_channels > 32 and not narrow_loads:
        kind = f"{kind} small"
    return _matmul(table[kind], problem, narrow_loads)


def _depthwise(tiles: tuple[DepthwiseTile, ...], channels: int) -> DepthwiseTile:
    """The tile with the fewest idle channel lanes; the widest of those within an eighth of the fewest."""
    lanes = {tile: -(-channels // tile.channels) * tile.channels for tile in tiles}
    return next(tile for tile in tiles if 8 * lanes[tile] <= 9 * min(lanes.values()))


def _matmul(tiles: tuple[MatmulTile, ...], problem: Problem, narrow_loads: bool) -> MatmulTile:
    """The narrowest tile that holds all output channels, else the widest; of its depths the first that leaves at most two steps."""
    width = next((tile.channels for tile in tiles if tile.channels >= problem.out_channels), max(tile.channels for tile in tiles))
    steps = 1 if problem.op == "fire_expand" else 2
    fitting = [tile for tile in tiles if tile.channels == width]
    if narrow_loads:
        return fitting[0]
    return next((tile for tile in fitting if steps * tile.depth >= problem.in_channels), fitting[-1])
