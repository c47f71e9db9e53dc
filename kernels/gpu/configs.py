"""Which tile each problem runs with. Pure Python, so that it is tested and read without triton or a GPU.

A tile depends on one image and its channels, never on the batch: the same image gives the same bits in any batch. The
tables hold every configuration that ships, and tests/gpu/test_compile.py compiles each of them. The sm_80 table serves
every other architecture too, so its tiles stay below 99 KiB of shared memory (sm_86, sm_89, sm_120).

The tiles of the block kernels are what `model` chooses among, per shape; a table measured by `fastconv tune` goes before its choice.

The tiles come from arithmetic (16 bytes a thread and load, accumulators within the register file, two or more programs per
multiprocessor). benchmarks/gpu.py times them on the networks' layers; a change here needs its figures.
"""

import functools
from dataclasses import dataclass
from typing import TypeVar

ARCHITECTURES = ("sm_80", "sm_90", "gfx942")


@dataclass(frozen=True)
class Problem:
    """One image of one layer. `dtype`: "f32", "tf32" (fp32 on tensor cores), "f16" or "bf16"; height and width are the output's."""

    op: str
    dtype: str
    height: int
    width: int
    in_channels: int
    out_channels: int  # of the larger of two expands
    kernel: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    between: int = 0  # expanded or squeezed channels
    image: tuple[int, int] = (0, 0)  # the input's height and width, where they are not the output's

    @property
    def size(self) -> tuple[int, int]:
        """The input's height and width."""
        return self.image if self.image != (0, 0) else (self.height, self.width)

    @property
    def item(self) -> int:
        """Bytes of an element."""
        return 2 if self.half else 4

    @property
    def half(self) -> bool:
        return self.dtype in ("f16", "bf16")

    @property
    def narrow(self) -> bool:
        """Whether some channels do not come in 16-byte loads: an address per element then fills the registers, and large tiles spill."""
        counts = [self.in_channels, self.between, *([self.out_channels] if self.op in BLOCKS else [])]
        return any(count % (8 if self.half else 4) for count in counts)


@dataclass(frozen=True)
class DepthwiseTile:
    """rows x cols output pixels by channels."""

    rows: int
    cols: int
    channels: int
    num_warps: int


@dataclass(frozen=True)
class WeightTile:
    """pixels by channels of a depthwise weight's gradient, at tap_rows rows of the kernel's taps."""

    pixels: int
    channels: int
    tap_rows: int
    num_warps: int


@dataclass(frozen=True)
class MatmulTile:
    """pixels by channels outputs, accumulated in steps of depth input channels, with num_stages steps in flight."""

    pixels: int
    channels: int
    depth: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class BlockTile:
    """lanes columns of run output rows by channels; depth channels of the result in between at a time, from depth_in of the input's."""

    run: int
    lanes: int
    channels: int
    depth: int
    num_warps: int
    depth_in: int = 0
    num_stages: int = 1

    @property
    def constants(self) -> dict[str, int]:
        return {"RUN": self.run, "LANES": self.lanes, "CHANNELS": self.channels, "DEPTH": self.depth}

    def tiles(self, height: int, width: int) -> int:
        """How many cover one image."""
        return -(-(-(-height // self.run) * width) // self.lanes)


@dataclass(frozen=True)
class PoolTile:
    """lanes columns of run output rows by channels."""

    run: int
    lanes: int
    channels: int
    num_warps: int

    @property
    def constants(self) -> dict[str, int]:
        return {"RUN": self.run, "LANES": self.lanes, "CHANNELS": self.channels}

    def tiles(self, height: int, width: int) -> int:
        """How many cover one image."""
        return -(-(-(-height // self.run) * width) // self.lanes)


STEM_DEPTH = 32


def stem_steps(kernel_h: int, kernel_w: int, channels: int) -> tuple[int, bool]:
    """(steps of STEM_DEPTH that the stem's kernel takes a window in, whether each is a row): by rows where one fills most of a step."""
    row = kernel_w * channels
    steps = -(-kernel_h * row // STEM_DEPTH)
    by_rows = steps > 1 and STEM_DEPTH // 2 < row <= STEM_DEPTH
    return (kernel_h, True) if by_rows else (steps, False)


Channelwise = TypeVar("Channelwise", DepthwiseTile, PoolTile, WeightTile)

# Widest first. 8 half or 4 float channels are one 16-byte load, and a thread keeps four pixels of them. "narrow": channels that do not
# come in 16-byte loads.
DEPTHWISE = {
    "half": (DepthwiseTile(8, 8, 64, 4), DepthwiseTile(8, 16, 32, 4), DepthwiseTile(16, 16, 16, 4)),
    "f32": (DepthwiseTile(8, 8, 32, 4), DepthwiseTile(8, 16, 16, 4)),
    "narrow": (DepthwiseTile(8, 8, 16, 4),),
}

# Widest first; a thread takes 16 bytes of each pixel of its lanes' windows. "plane": one channel, as an NCHW image is read.
MAX_POOL = {
    "half": (PoolTile(4, 16, 64, 4), PoolTile(4, 32, 32, 4), PoolTile(4, 64, 16, 4)),
    "f32": (PoolTile(4, 16, 32, 4), PoolTile(4, 32, 16, 4)),
    "narrow": (PoolTile(4, 32, 16, 4),),
    "plane": (PoolTile(4, 128, 1, 4),),
}

# Widest first, by the kernel's size. A thread keeps a float of every tap for each of its channels and pixels: 72 for a 3x3, 40 or 80 for
# a row of a 5x5, whose five rows together would need 200.
DEPTHWISE_WEIGHT = {
    3: {
        "half": (WeightTile(16, 64, 3, 4), WeightTile(32, 32, 3, 4), WeightTile(64, 16, 3, 4)),
        "f32": (WeightTile(32, 32, 3, 4), WeightTile(64, 16, 3, 4)),
        "narrow": (WeightTile(32, 16, 3, 4),),
    },
    5: {
        "half": (WeightTile(32, 64, 1, 4), WeightTile(64, 32, 1, 4), WeightTile(128, 16, 1, 4)),
        "f32": (WeightTile(32, 32, 1, 4), WeightTile(64, 16, 1, 4)),
        "narrow": (WeightTile(32, 16, 1, 4),),
    },
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
    "gfx942": {
        "half": (MatmulTile(64, 32, 32, 4, 2), MatmulTile(128, 64, 32, 4, 2), MatmulTile(128, 128, 32, 8, 2)),
        "f32": (MatmulTile(64, 32, 32, 4, 2),),
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
    "gfx942": {
        "half": (MatmulTile(64, 64, 16, 4, 2), MatmulTile(64, 64, 32, 4, 2)),
        "f32": (MatmulTile(64, 32, 16, 4, 2),),
    },
}

SMALL_IMAGE = 14 * 14

# The block kernels' tables hold what compiles without spills at its heaviest: K = 5, stride 2, silu, residual, any channel count.
# 64 lanes is what sm_90's wgmma needs; deeper chunks, and more rows a lane, spill (docs/decisions/0011).
ATEN = "aten"  # the form of a block through torch's own operators
BLOCKS = ("separable", "inverted_residual", "expand_depthwise", "fire", "fire_pool", "stem", "head")


def _tiles(*rows: tuple[int, ...], stages: int = 1) -> tuple[BlockTile, ...]:
    """Rows of (run, lanes, channels, depth, num_warps[, depth_in])."""
    return tuple(BlockTile(*row, num_stages=stages) for row in rows)


TABLES = {
    "separable": {
        "sm_80": {
            "half": _tiles(
                (4, 64, 64, 16, 8), (4, 64, 32, 16, 8), (4, 32, 64, 16, 4), (2, 64, 128, 32, 8), (2, 64, 64, 32, 4),
                (2, 32, 256, 32, 8), (2, 32, 128, 32, 4), (2, 32, 64, 32, 4), (2, 64, 16, 32, 4), (1, 32, 256, 32, 8),
            ),
            "tf32": _tiles((2, 32, 64, 16, 8), (2, 32, 32, 16, 4), (1, 64, 64, 16, 8), (1, 32, 64, 16, 4)),
            "f32": _tiles((2, 32, 64, 16, 8), (2, 32, 32, 16, 4), (1, 64, 64, 16, 8), (1, 32, 64, 16, 4)),
            "narrow": _tiles((1, 32, 32, 16, 4)),
        },
        "sm_90": {
            "half": _tiles(
                (4, 64, 64, 32, 8), (4, 64, 32, 32, 8), (4, 32, 64, 16, 4), (2, 64, 128, 32, 8), (2, 64, 64, 32, 4),
                (2, 32, 256, 32, 8), (2, 32, 128, 32, 4), (2, 32, 64, 32, 4), (2, 64, 16, 32, 4), (1, 32, 256, 32, 8),
            ),
            "tf32": _tiles((2, 32, 64, 16, 8), (2, 32, 32, 16, 4), (1, 64, 64, 16, 8), (1, 32, 64, 16, 4)),
            "f32": _tiles((2, 32, 64, 16, 8), (2, 32, 32, 16, 4), (1, 64, 64, 16, 8), (1, 32, 64, 16, 4)),
            "narrow": _tiles((1, 32, 32, 16, 4)),
        },
        "gfx942": {
            "half": _tiles((1, 64, 64, 16, 4), (1, 64, 64, 32, 8)),
            "f32": _tiles((1, 32, 32, 16, 4)),
            "narrow": _tiles((1, 32, 32, 16, 4)),
        },
    },
    "inverted_residual": {
        "sm_80": {
            "half": _tiles(
                (2, 64, 32, 16, 8, 16), (2, 64, 32, 16, 8, 32), (2, 32, 32, 16, 4, 32), (2, 32, 64, 16, 4, 64),
                (1, 64, 64, 16, 4, 64), (1, 64, 64, 16, 8, 128),
            ),
            "tf32": _tiles((2, 64, 32, 16, 8, 16), (2, 64, 32, 16, 8, 32), (1, 64, 64, 16, 8, 64), (1, 32, 32, 16, 4, 32)),
            "f32": _tiles((2, 64, 32, 16, 8, 16), (1, 32, 16, 16, 4, 16)),
            "narrow": _tiles((1, 32, 16, 16, 8, 16)),
        },
        "sm_90": {
            "half": _tiles(
                (4, 64, 32, 32, 8, 16), (4, 64, 32, 32, 8, 32), (2, 64, 32, 16, 4, 32), (4, 64, 64, 16, 8, 64), (2, 64, 64, 32, 8, 64),
                (1, 64, 64, 32, 4, 64), (2, 64, 128, 16, 8, 128), (1, 64, 128, 32, 8, 128),
            ),
            "tf32": _tiles((2, 64, 32, 16, 8, 16), (2, 64, 32, 16, 8, 32), (1, 64, 64, 16, 8, 64), (1, 32, 32, 16, 4, 32)),
            "f32": _tiles((2, 64, 32, 16, 8, 16), (1, 32, 16, 16, 4, 16)),
            "narrow": _tiles((1, 32, 16, 16, 8, 16)),
        },
        "gfx942": {
            "half": _tiles((1, 64, 32, 16, 4, 32), (1, 64, 64, 16, 4, 64)),
            "f32": _tiles((1, 32, 32, 16, 4, 16)),
            "narrow": _tiles((1, 32, 16, 16, 4, 16)),
        },
    },
    "expand_depthwise": {
        "sm_80": {
            "half": _tiles(
                (4, 64, 16, 16, 8, 16), (4, 64, 16, 16, 8, 32), (2, 64, 16, 16, 4, 32), (2, 64, 16, 16, 8, 64), (1, 64, 16, 16, 4, 64),
                (1, 64, 16, 16, 8, 128),
            ),
            "tf32": _tiles((2, 64, 16, 16, 8, 16), (2, 64, 16, 16, 8, 32), (1, 64, 16, 16, 4, 64)),
            "f32": _tiles((2, 64, 16, 16, 8, 16), (1, 32, 16, 16, 4, 16)),
            "narrow": _tiles((1, 32, 16, 16, 8, 16)),
        },
        "sm_90": {
            "half": _tiles(
                (4, 64, 32, 32, 8, 16), (4, 64, 32, 32, 8, 32), (2, 64, 32, 32, 4, 32), (4, 64, 32, 32, 8, 64), (1, 64, 32, 32, 4, 64),
                (2, 64, 64, 64, 8, 64), (2, 64, 32, 32, 8, 128),
            ),
            "tf32": _tiles((2, 64, 16, 16, 8, 16), (2, 64, 16, 16, 8, 32), (1, 64, 16, 16, 4, 64)),
            "f32": _tiles((2, 64, 16, 16, 8, 16), (1, 32, 16, 16, 4, 16)),
            "narrow": _tiles((1, 32, 16, 16, 8, 16)),
        },
        "gfx942": {
            "half": _tiles((1, 64, 16, 16, 4, 32), (1, 64, 16, 16, 4, 64)),
            "f32": _tiles((1, 32, 16, 16, 4, 16)),
            "narrow": _tiles((1, 32, 16, 16, 4, 16)),
        },
    },
    "fire": {
        "sm_80": {
            "half": _tiles((2, 64, 64, 16, 8, 64), (4, 64, 32, 16, 8, 64), (1, 64, 64, 16, 4, 64)),
            "tf32": _tiles((2, 32, 32, 16, 8, 32), (1, 32, 32, 16, 4, 32)),
            "f32": _tiles((2, 32, 32, 16, 8, 16), (1, 32, 32, 16, 4, 16)),
            "narrow": _tiles((1, 32, 16, 16, 8, 16)),
        },
        "sm_90": {
            "half": _tiles((2, 64, 64, 16, 8, 64), (2, 64, 64, 32, 8, 64), (4, 64, 32, 16, 8, 64), (2, 64, 64, 16, 8, 128)),
            "tf32": _tiles((2, 32, 32, 16, 8, 32), (1, 32, 32, 16, 4, 32)),
            "f32": _tiles((2, 32, 32, 16, 8, 16), (1, 32, 32, 16, 4, 16)),
            "narrow": _tiles((1, 32, 16, 16, 8, 16)),
        },
        "gfx942": {
            "half": _tiles((1, 64, 64, 16, 4, 64)),
            "f32": _tiles((1, 32, 32, 16, 4, 16)),
            "narrow": _tiles((1, 32, 16, 16, 4, 16)),
        },
    },
    "fire_pool": {
        "sm_80": {
            "half": _tiles((1, 64, 64, 16, 8), (1, 64, 64, 32, 8), (1, 128, 32, 32, 8), stages=3),
            "tf32": _tiles((1, 64, 32, 16, 4), (1, 32, 32, 16, 4), stages=3),
            "f32": _tiles((1, 64, 32, 16, 8), (1, 32, 32, 16, 4)),
            "narrow": _tiles((1, 32, 32, 16, 4)),
        },
        "sm_90": {
            "half": _tiles((1, 64, 64, 16, 8), (1, 64, 64, 32, 8), (1, 128, 32, 32, 8), stages=3),
            "tf32": _tiles((1, 64, 32, 16, 4), (1, 32, 32, 16, 4), stages=3),
            "f32": _tiles((1, 64, 32, 16, 8), (1, 32, 32, 16, 4)),
            "narrow": _tiles((1, 32, 32, 16, 4)),
        },
        "gfx942": {
            "half": _tiles((1, 64, 64, 16, 4), stages=2),
            "f32": _tiles((1, 32, 32, 16, 4)),
            "narrow": _tiles((1, 32, 32, 16, 4)),
        },
    },
    "stem": {
        arch: {
            "half": _tiles((1, 128, 16, 32, 4), (1, 128, 32, 32, 4), (1, 128, 64, 32, 8), (1, 64, 128, 32, 4), (1, 64, 128, 32, 8))
            + _tiles((1, 128, 128, 32, 8), (1, 64, 128, 32, 4), stages=2),
            "tf32": _tiles((1, 64, 16, 32, 4), (1, 64, 32, 32, 4), (1, 64, 64, 32, 8)),
            "f32": _tiles((1, 64, 16, 32, 4), (1, 64, 32, 32, 4), (1, 64, 64, 32, 8)),
        }
        for arch in ARCHITECTURES
    },
    "head": {
        arch: {
            "half": _tiles((1, 64, 64, 64, 4), (1, 64, 128, 64, 8), stages=3),
            "tf32": _tiles((1, 64, 64, 32, 4), stages=3),
            "f32": _tiles((1, 32, 32, 32, 4), stages=2),
            "narrow": _tiles((1, 32, 32, 16, 4)),
        }
        for arch in ARCHITECTURES
    },
}  # fmt: skip


def kind(problem: Problem) -> str:
    """The row of a block's table."""
    return "narrow" if problem.narrow and problem.op != "stem" else "half" if problem.half else problem.dtype


@functools.lru_cache(maxsize=4096)
def config(problem: Problem, arch: str) -> DepthwiseTile | PoolTile | WeightTile | MatmulTile | BlockTile:
    """The tile `problem` runs with on `arch` (one of ARCHITECTURES)."""
    if problem.op in BLOCKS:
        from . import model

        form = choice(problem, arch)
        return form if isinstance(form, BlockTile) else model.best(problem, arch)
    # Without 16-byte loads an address per element fills the registers, and large tiles spill.
    narrow_loads = problem.in_channels % (8 if problem.half else 4) != 0
    if problem.op in ("depthwise", "depthwise_backward_weight"):
        tiles = DEPTHWISE if problem.op == "depthwise" else DEPTHWISE_WEIGHT[problem.kernel]
        return _depthwise(tiles["narrow" if narrow_loads else "half" if problem.half else "f32"], problem.out_channels)
    if problem.op == "max_pool":
        kind = "plane" if problem.out_channels == 1 else "narrow" if narrow_loads else "half" if problem.half else "f32"
        return _depthwise(MAX_POOL[kind], problem.out_channels)
    table = {"pointwise": POINTWISE, "fire_expand": FIRE_EXPAND}[problem.op][arch]
    kind = "half" if problem.half else problem.dtype
    if f"{kind} small" in table and problem.height * problem.width <= SMALL_IMAGE and problem.in_channels > 32 and not narrow_loads:
        kind = f"{kind} small"
    return _matmul(table[kind], problem, narrow_loads)


@functools.lru_cache(maxsize=4096)
def choice(problem: Problem, arch: str) -> BlockTile | str | None:
    """The tile that a block runs with as one kernel, or None where one kernel per layer is faster: measured, or else by the model.

    ATEN where cuDNN was measured to be fastest; the model knows nothing of it.
    """
    from . import model, tuned

    measured = tuned.choice(problem, arch)
    if measured is not None:
        return measured.form
    return model.best(problem, arch) if problem.op == "stem" or model.fuses(problem, arch) else None


def _depthwise(tiles: tuple[Channelwise, ...], channels: int) -> Channelwise:
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
