"""Choices that were measured: the tables that `fastconv tune` writes. Pure Python.

kernels/gpu/tables/<arch>.json ships with the package (none does before a device was measured); FASTCONV_TUNED names a file to read instead.
A table is {"device": ..., "choices": {key(problem): [run, lanes, channels, depth, num_warps, depth_in, num_stages] or null for parts}}.
"""

import functools
import json
import os
from dataclasses import astuple, dataclass
from pathlib import Path

from .configs import BlockTile, Problem


@dataclass(frozen=True)
class Choice:
    """What was fastest: a tile, or None for one kernel per layer."""

    tile: BlockTile | None


def key(problem: Problem) -> str:
    p = problem
    (rows, columns), (stride_h, stride_w) = p.size, p.stride
    shape = f"{rows}x{columns} {p.height}x{p.width} {p.in_channels}-{p.between}-{p.out_channels}"
    return f"{p.op} {p.dtype} {shape} k{p.kernel} s{stride_h}x{stride_w}"


def choice(problem: Problem, arch: str) -> Choice | None:
    """The measured choice for the problem, or None where it was not measured."""
    choices = _table(arch, os.environ.get("FASTCONV_TUNED"))
    if key(problem) not in choices:
        return None
    row = choices[key(problem)]
    return Choice(None if row is None else BlockTile(*row))


def row(tile: BlockTile | None) -> list[int] | None:
    """The choice as a table holds it."""
    return None if tile is None else list(astuple(tile))


@functools.lru_cache
def _table(arch: str, path: str | None) -> dict[str, list[int] | None]:
    """Raises ValueError for a file that is no table of `arch`."""
    file = Path(path) if path else Path(__file__).parent / "tables" / f"{arch}.json"
    if not path and not file.exists():
        return {}
    try:
        table = json.loads(file.read_text())
        if table["arch"] != arch:
            return {}
        choices = table["choices"]
        fields = len(astuple(BlockTile(1, 1, 1, 1, 1)))
        bad = [name for name, row in choices.items() if not (row is None or (len(row) == fields and all(type(n) is int for n in row)))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"FASTCONV_TUNED: {file} is no table of tiles ({type(problem).__name__}: {problem})") from problem
    if bad:
        raise ValueError(f"FASTCONV_TUNED: {file}: {bad[0]!r} must be null or {fields} ints, got {choices[bad[0]]!r}")
    return choices
