"""Which tile each problem runs with. Pure Python, so that it is tested and read without triton or a GPU.

A tile depends on one image and its channels, never on the batch: the same image gives the same bits in any batch. The
tables hold every configuration that ships, and tests/gpu/test_compile.py compiles each of them. The sm_80 table serves
every other architecture too, so its tiles stay below 99 KiB of shared memory (sm_86, sm_89, sm_120).

The tiles of the block kernels are what `model` chooses among, per shape; a table measured by `fastconv tune` goes before its choice.

DEPTHWISE and MEASURED were chosen from times on an H100 (bf16, batch 128, the layers of the six networks; f32 tiles by analogy). The other
tiles come from arithmetic: 16 bytes a thread and load, accumulators within the register file, two or more programs per multiprocessor.
benchmarks/gpu.py times them on the networks' layers; a change here needs its figures.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
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
    def after_expand(self) -> Problem:
        """What follows the expand of an inverted residual, as one separable block."""
        return replace(self, op="separable", in_channels=self.between, between=0, image=self.size)

    @property
    def before_pool(self) -> Problem:
        """The convolution of a stem with its max-pool, by itself."""
        along = zip(self.size, self.stride, self.padding)
        height, width = ((extent + 2 * padding - self.kernel) // stride + 1 for extent, stride, padding in along)
        return replace(self, op="stem", height=height, width=width)

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
class Strips:
    """lanes columns of run output rows by channels."""

    run: int
    lanes: int
    channels: int

    @property
    def constants(self) -> dict[str, int]:
        return {"RUN": self.run, "LANES": self.lanes, "CHANNELS": self.channels}

    def tiles(self, height: int, width: int) -> int:
        """How many cover one image."""
        return -(-(-(-height // self.run) * width) // self.lanes)


@dataclass(frozen=True)
class DepthwiseTile(Strips):
    """Of a depthwise convolution."""

    num_warps: int
    num_stages: int = 1  # of no effect without a dot


@dataclass(frozen=True)
class InputTile:
    """rows x cols positions by channels of a depthwise input's gradient; a position is a pixel of each phase of the stride."""

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
class BlockTile(Strips):
    """Strips of a block's output; depth channels of the result in between at a time, from depth_in of the input's."""

    depth: int
    num_warps: int
    depth_in: int = 0
    num_stages: int = 1

    @property
    def constants(self) -> dict[str, int]:
        return super().constants | {"DEPTH": self.depth}


def _strips(*rows: tuple[int, int, int, int]) -> tuple[DepthwiseTile, ...]:
    """Rows of (run, lanes, channels, num_warps)."""
    return tuple(DepthwiseTile(*row) for row in rows)


@dataclass(frozen=True)
class StagedTile:
    """Output rows in strips of `run`, by columns; `depth` channels of the region that they read in shared memory at a time (`staged`).

    spare: a channel of the expansion is left over for its bias, where that doubles what it is padded to. registers: of a thread, at most;
    0: as many as it takes.
    """

    strips: int
    run: int
    columns: int
    depth: int
    num_warps: int
    registers: int = 0
    spare: bool = False

    def depth_in(self, channels: int) -> int:
        """Input channels as the expansion pads them."""
        return max(16, 1 << (channels if self.spare else channels - 1).bit_length())

    def tiles(self, height: int, width: int) -> int:
        """How many cover one image."""
        return -(-height // (self.strips * self.run)) * -(-width // self.columns)

    def lanes(self, problem: Problem) -> int:
        return _power(self.strips * (self.columns + (problem.kernel - 1) // problem.stride[1]))

    def pixels(self, problem: Problem) -> int:
        """Of the region, up to a power of two."""
        rows = self.strips * self.run * problem.stride[0] + problem.kernel - problem.stride[0]
        return _power(problem.stride[1] * rows * (self.columns + (problem.kernel - 1) // problem.stride[1]))

    def slots(self, problem: Problem) -> int:
        """Rows of the product with the project weights."""
        return max(64, _power(self.run) * self.lanes(problem))


SIDE = 16  # of the region of a fire whose squeezed tile is staged: 256 pixels, for 14 x 14 outputs


@dataclass(frozen=True)
class StagedFireTile:
    """A fire's results by blocks of `channels`, its squeezed tile in shared memory (`staged_fire`); x by depth_in channels at a time."""

    channels: int
    depth_in: int
    num_warps: int
    registers: int = 0

    def tiles(self, height: int, width: int) -> int:
        """How many cover one image."""
        return -(-height // (SIDE - 2)) * -(-width // (SIDE - 2))


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


@dataclass(frozen=True)
class Split:
    """An inverted residual as two kernels: the expand as `pointwise`, the rest as `separable` with this tile."""

    tile: BlockTile | StagedTile


# Of a block as one kernel.
Tile = BlockTile | StagedTile | StagedFireTile
# How a block runs: as one kernel with this tile, as two, None for one kernel per layer, or ATEN.
Form = Tile | Split | str | None


def text(form: Form) -> str:
    """The form as reports and tables on the screen name it."""
    if isinstance(form, Split):
        return f"split {text(form.tile)}"
    if isinstance(form, StagedTile):
        return f"staged {form.strips * form.run}x{form.columns}x{form.depth}"
    if isinstance(form, StagedFireTile):
        return f"staged {form.channels}"
    return "in parts" if form is None else "through cuDNN" if form == ATEN else "x".join(map(str, form.constants.values()))


@dataclass(frozen=True)
class PoolTile(Strips):
    """Of a max-pool."""

    num_warps: int


Channelwise = TypeVar("Channelwise", InputTile, PoolTile, WeightTile)

STEM_DEPTH = 32


def stem_steps(kernel_h: int, kernel_w: int, channels: int) -> tuple[int, bool]:
    """(steps of STEM_DEPTH that the stem's kernel takes a window in, whether each is a row): by rows where one fills most of a step."""
    row = kernel_w * channels
    steps = -(-kernel_h * row // STEM_DEPTH)
    by_rows = steps > 1 and STEM_DEPTH // 2 < row <= STEM_DEPTH
    return (kernel_h, True) if by_rows else (steps, False)


# By the kernel's size and the stride of its rows, best first: the first is taken that leaves few places idle (`_strip`). "narrow": channels
# that do not come in 16-byte loads. H100, bf16, batch 128, 23 layers that take more than 25 us: 0.6% slower on average than the best of 25
# tiles, 2.8% at most. The 5x5 tiles of 4 rows were measured unrolled; those measured both ways are faster as the loop that ships.
DEPTHWISE = {
    "half": {
        (3, 1): _strips((7, 16, 64, 4), (7, 32, 32, 4), (7, 64, 16, 4), (4, 16, 64, 4), (4, 16, 32, 2), (4, 64, 16, 4)),
        (3, 2): _strips((4, 16, 64, 4), (4, 16, 32, 2), (4, 64, 16, 4)),
        (5, 1): _strips((14, 16, 32, 4), (4, 16, 64, 4), (4, 16, 32, 2), (4, 64, 16, 4)),
        (5, 2): _strips((14, 16, 32, 4), (4, 16, 64, 4), (4, 16, 32, 2), (4, 64, 16, 4)),
    },
    "f32": {
        (3, 1): _strips((7, 16, 32, 4), (7, 32, 16, 4), (4, 16, 32, 4), (4, 32, 16, 4)),
        (3, 2): _strips((4, 16, 32, 4), (4, 32, 16, 4)),
        (5, 1): _strips((14, 16, 32, 4), (4, 16, 32, 4), (4, 32, 16, 4)),
        (5, 2): _strips((14, 16, 32, 4), (4, 16, 32, 4), (4, 32, 16, 4)),
    },
    "narrow": dict.fromkeys(itertools.product((3, 5), (1, 2)), _strips((4, 32, 16, 4))),
}

# Of the input's gradient at stride 2 (at stride 1 it is the forward kernel), widest first. 8 half or 4 float channels are one 16-byte load.
DEPTHWISE_INPUT = {
    "half": (InputTile(4, 4, 64, 4), InputTile(4, 8, 32, 4), InputTile(8, 8, 16, 4)),
    "f32": (InputTile(4, 4, 32, 4), InputTile(4, 8, 16, 4)),
    "narrow": (InputTile(4, 4, 16, 4),),
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

# (input channels up to, output channels up to, tile): the first row that holds a layer is taken. Of fire_expand the larger expand counts.
# Where input channels do not come in 16-byte loads the tables below serve ("half narrow").
# H100, bf16, batch 128, against the best of 20 tiles, and of 13: pointwise is 1.5% slower on average in 27 layers above 32 us, fire_expand
# 0.5% in 8 (2.3% at most). pointwise's worst: 6 to 10% at 7 x 7 of 160 to 960 channels, where the launch takes most of the time; 5 and 6%
# where 128 channels become 16 and 256; all others 4.4% at most. Below 32 us the noise is larger than what tiles differ by.
ANY = 1 << 31
MEASURED = {
    ("pointwise", "sm_90"): (
        (16, 16, MatmulTile(128, 16, 16, 4, 2)),
        (16, 64, MatmulTile(128, 32, 16, 4, 2)),
        (16, 88, MatmulTile(128, 64, 16, 4, 2)),
        (16, ANY, MatmulTile(128, 32, 16, 4, 2)),
        (32, 32, MatmulTile(128, 32, 32, 4, 4)),
        (32, 64, MatmulTile(128, 64, 32, 4, 4)),
        (32, 96, MatmulTile(128, 32, 16, 4, 2)),
        (64, 32, MatmulTile(128, 32, 32, 4, 4)),
        (48, ANY, MatmulTile(128, 64, 32, 4, 4)),
        (64, ANY, MatmulTile(64, 128, 32, 4, 3)),
        (88, 32, MatmulTile(128, 32, 64, 4, 4)),
        (96, 32, MatmulTile(128, 32, 32, 4, 4)),  # three whole steps; 64 deep it would be two, one of them half idle
        (ANY, 32, MatmulTile(128, 32, 64, 4, 4)),
        (ANY, 64, MatmulTile(64, 64, 64, 4, 4)),
        (511, ANY, MatmulTile(64, 128, 64, 4, 3)),
        (ANY, 511, MatmulTile(64, 128, 64, 4, 3)),
        (ANY, ANY, MatmulTile(128, 128, 64, 8, 3)),
    ),
    ("fire_expand", "sm_90"): (
        (16, ANY, MatmulTile(128, 32, 16, 4, 4)),
        (32, ANY, MatmulTile(64, 64, 32, 4, 4)),
        (ANY, ANY, MatmulTile(128, 64, 32, 4, 3)),
    ),
}


# The same for so few images that the tiles above would leave multiprocessors idle: narrower, with more steps in flight. A sum goes through
# its products in the same order in all of them, so that an image has the same bits in every batch. H100, bf16, one image of the networks'
# layers up to 28 x 28: pointwise takes 1.6 to 3.8 us instead of 2.1 to 8.9, fire_expand 4.0 to 6.9 instead of 4.3 to 8.3.
FEW = {
    ("pointwise", "sm_90"): (
        (191, ANY, MatmulTile(64, 32, 32, 4, 6)),
        (ANY, 512, MatmulTile(64, 16, 64, 4, 6)),
        (ANY, ANY, MatmulTile(64, 32, 128, 4, 3)),
    ),
    ("fire_expand", "sm_90"): (
        (16, ANY, MatmulTile(128, 32, 16, 4, 4)),
        (32, ANY, MatmulTile(64, 32, 32, 4, 6)),
        (ANY, ANY, MatmulTile(64, 32, 64, 4, 4)),
    ),
}
MULTIPROCESSORS = {"sm_90": 132}  # of those that FEW was measured on


def _tiles_of(op: str, arch: str) -> tuple[MatmulTile, ...]:
    return tuple(dict.fromkeys(tile for *_, tile in MEASURED[op, arch]))


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
        "half": _tiles_of("pointwise", "sm_90"),
        "half narrow": (MatmulTile(128, 32, 32, 4, 4), MatmulTile(128, 64, 32, 4, 4), MatmulTile(128, 128, 32, 8, 4)),
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
        "half": _tiles_of("fire_expand", "sm_90"),
        "half narrow": (MatmulTile(64, 64, 16, 4, 4),),
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
BLOCKS = ("separable", "inverted_residual", "expand_depthwise", "fire", "fire_pool", "stem", "stem_pool", "head")


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
    "stem_pool": {
        arch: {
            "half": _tiles((2, 64, 64, 32, 4), (4, 64, 32, 32, 4), (2, 64, 32, 32, 4), (2, 128, 64, 32, 8)),
            "tf32": _tiles((2, 32, 32, 32, 4)),
            "f32": _tiles((2, 32, 32, 32, 4)),
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


# The tiles of `staged`, by the depthwise kernel's size and stride. Columns are 14 or 7, which divide the networks' images. None for 5x5:
# its halo makes the expansion 1.8 times the work, and on an H100 V3's blocks took 1.5 to 2.9 times as long as in parts.
STAGED = {
    (3, 1): (
        StagedTile(2, 7, 14, 32, 4), StagedTile(2, 7, 14, 32, 4, 168), StagedTile(2, 7, 14, 64, 8), StagedTile(4, 7, 14, 32, 8),
        StagedTile(2, 3, 14, 32, 4), StagedTile(1, 6, 14, 64, 4),
    ),
    (3, 2): (
        StagedTile(7, 1, 7, 32, 4), StagedTile(7, 1, 7, 32, 4, 0, True), StagedTile(7, 1, 7, 32, 4, 128), StagedTile(7, 1, 7, 64, 4),
        StagedTile(7, 1, 7, 64, 8), StagedTile(4, 2, 14, 32, 8, 128), StagedTile(4, 2, 14, 32, 8, 128, True),
    ),
}  # fmt: skip
# Of so few images that the tiles above leave multiprocessors idle, by the stride, best first: one image of the networks takes 3 to 17 us
# instead of 4 to 42 (H100, bf16).
STAGED_FEW = {
    1: (StagedTile(1, 2, 14, 64, 4), StagedTile(1, 4, 14, 64, 4)),
    2: (StagedTile(2, 1, 7, 64, 4), StagedTile(4, 1, 7, 64, 8)),
}
STAGED_FIRE = (StagedFireTile(64, 64, 8), StagedFireTile(64, 64, 8, 128), StagedFireTile(64, 64, 4), StagedFireTile(128, 64, 8))
STAGED_OPS = ("separable", "inverted_residual", "expand_depthwise", "fire")
STAGED_SHARED = 224 * 1024  # bytes of shared memory that a program may take, of 227 KiB; the rest is for what the compiler adds


@functools.lru_cache(maxsize=4096)
def staged(problem: Problem, arch: str) -> tuple[StagedTile | StagedFireTile, ...]:
    """Tiles of `staged` and `staged_fire` that the problem can run with: only on Hopper, in 16 bits, with channels in 16-byte loads."""
    if arch != "sm_90" or problem.op not in STAGED_OPS or not problem.half or problem.narrow or problem.stride[0] != problem.stride[1]:
        return ()
    if problem.op == "fire":
        return tuple(tile for tile in STAGED_FIRE if _holds_fire(problem, tile))
    return tuple(tile for tile in STAGED.get((problem.kernel, problem.stride[0]), ()) if _holds(problem, tile))


def _holds(problem: Problem, tile: StagedTile) -> bool:
    """Whether a program's accumulators and shared memory suffice."""
    expands, projects = problem.op != "separable", problem.op != "expand_depthwise"
    if tile.spare and not (expands and problem.in_channels & (problem.in_channels - 1) == 0):
        return False
    if 0 < tile.registers <= 128 and not projects:  # it spills what it adds to the sums
        return False
    channels = padded(problem.out_channels) if projects else 0
    accumulators = tile.slots(problem) * channels // (32 * tile.num_warps)
    return accumulators <= min(128, (tile.registers or 255) - 96) and channels <= 256 and shared_bytes(problem, tile) <= STAGED_SHARED


def _holds_fire(problem: Problem, tile: StagedFireTile) -> bool:
    """As `_holds`; a window of more than 32 squeezed channels needs the registers of eight warps, uncapped."""
    few = padded(problem.between) <= 32 or (tile.num_warps == 8 and not tile.registers)
    return few and tile.channels <= padded(problem.out_channels) and shared_bytes(problem, tile) <= STAGED_SHARED


def padded(channels: int) -> int:
    """Output channels of a product."""
    return max(16, _power(channels))


def shared_bytes(problem: Problem, tile: StagedTile | StagedFireTile) -> int:
    """What `staged` keeps in shared memory: the region, x and its weights, depthwise rows and their weights; or `staged_fire`."""
    if isinstance(tile, StagedFireTile):
        between = padded(problem.between)
        elements = (SIDE**2 + 4 * SIDE) * (between + 8) + (SIDE**2 + between) * tile.depth_in + 9 * tile.channels * between
        return 2 * elements
    elements = (tile.pixels(problem) + tile.lanes(problem)) * (tile.depth + 8)
    if problem.op != "separable":
        elements += (tile.pixels(problem) + tile.depth) * tile.depth_in(problem.in_channels)
    if problem.op != "expand_depthwise":
        elements += (tile.slots(problem) + padded(problem.out_channels)) * tile.depth
    return 2 * elements


def kind(problem: Problem) -> str:
    """The row of a block's table."""
    return "narrow" if problem.narrow and not problem.op.startswith("stem") else "half" if problem.half else problem.dtype


@functools.lru_cache(maxsize=4096)
def config(problem: Problem, arch: str) -> DepthwiseTile | InputTile | PoolTile | WeightTile | MatmulTile | BlockTile:
    """The tile `problem` runs with on `arch` (one of ARCHITECTURES)."""
    if problem.op in BLOCKS:
        from . import model

        form = choice(problem, arch)
        return form if isinstance(form, Tile) else model.best(problem, arch)
    # Without 16-byte loads an address per element fills the registers, and large tiles spill.
    narrow_loads = problem.in_channels % (8 if problem.half else 4) != 0
    if problem.op.startswith("depthwise"):
        kind = "narrow" if narrow_loads else "half" if problem.half else "f32"
        if problem.op == "depthwise":
            return _strip(DEPTHWISE[kind][problem.kernel, problem.stride[0]], problem)
        tables = DEPTHWISE_INPUT if problem.op == "depthwise_backward_input" else DEPTHWISE_WEIGHT[problem.kernel]
        return _widest(tables[kind], problem.out_channels)
    if problem.half and not narrow_loads and (problem.op, arch) in MEASURED:
        rows = MEASURED[problem.op, arch]
        return next(tile for c, o, tile in rows if problem.in_channels <= c and problem.out_channels <= o)
    if problem.op == "max_pool":
        kind = "plane" if problem.out_channels == 1 else "narrow" if narrow_loads else "half" if problem.half else "f32"
        return _widest(MAX_POOL[kind], problem.out_channels)
    table = {"pointwise": POINTWISE, "fire_expand": FIRE_EXPAND}[problem.op][arch]
    kind = "half" if problem.half else problem.dtype
    if narrow_loads and f"{kind} narrow" in table:
        kind = f"{kind} narrow"
    elif f"{kind} small" in table and problem.height * problem.width <= SMALL_IMAGE and problem.in_channels > 32 and not narrow_loads:
        kind = f"{kind} small"
    return _matmul(table[kind], problem, narrow_loads)


def matmul(problem: Problem, arch: str, batch: int) -> MatmulTile:
    """The tile of `pointwise` or `fire_expand` for so many images."""
    tile = config(problem, arch)
    if (problem.op, arch) not in FEW or tile not in _tiles_of(problem.op, arch):
        return tile
    enough, pixels = MULTIPROCESSORS.get(arch, 0), batch * problem.height * problem.width

    def programs(tile: MatmulTile) -> int:
        return -(-pixels // tile.pixels) * -(-problem.out_channels // tile.channels)

    rows = FEW[problem.op, arch]
    few = next(tile for c, o, tile in rows if problem.in_channels <= c and problem.out_channels <= o)
    return few if programs(tile) < enough and programs(few) <= 2 * enough else tile


def few(problem: Problem, form: Form, arch: str, batch: int) -> Form:
    """The form for so many images, of the same bits: staged tiles become smaller ones, and a staged fire its parts, where they would leave
    multiprocessors idle. Not of `expand_depthwise`, whose sums depend on its tile."""
    if not isinstance(form, (StagedTile, StagedFireTile)) or problem.op == "expand_depthwise":
        return form
    programs, enough = batch * form.tiles(problem.height, problem.width), MULTIPROCESSORS.get(arch, 0)
    if isinstance(form, StagedFireTile):
        return form if programs >= 2 * enough else None
    if programs >= enough:
        return form
    smaller = (replace(tile, spare=form.spare) for tile in STAGED_FEW[problem.stride[0]])
    fitting = (
        tile for tile in smaller
        if tile.slots(problem) * padded(problem.out_channels) // (32 * tile.num_warps) <= 64
        and batch * tile.tiles(problem.height, problem.width) <= 2 * enough and _holds(problem, tile)
    )  # fmt: skip
    return next(fitting, form)


@functools.lru_cache(maxsize=4096)
def choice(problem: Problem, arch: str) -> Form:
    """The form that is fastest: measured, or else by the model, which knows nothing of cuDNN."""
    from . import model, tuned

    measured = tuned.choice(problem, arch)
    if measured is not None:
        return measured.form
    return model.form(problem, arch)


def _strip(tiles: tuple[DepthwiseTile, ...], problem: Problem) -> DepthwiseTile:
    """The first tile that covers an image with at most a fifth more places than the one with the fewest: output pixels by channels."""
    places = {
        tile: tile.tiles(problem.height, problem.width) * tile.lanes * tile.run * -(-problem.out_channels // tile.channels) * tile.channels
        for tile in tiles
    }
    return next(tile for tile in tiles if 5 * places[tile] <= 6 * min(places.values()))


def _widest(tiles: tuple[Channelwise, ...], channels: int) -> Channelwise:
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
