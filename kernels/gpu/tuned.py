"""Choices that were measured: the tables that `fastconv tune` writes. Pure Python.

kernels/gpu/tables/<arch>.json ships with the package where a device was measured; FASTCONV_TUNED names a file to read instead.
A table is {"arch": ..., "choices": {key(problem): form}}, a form being [run, lanes, channels, depth, num_warps, depth_in, num_stages] or
["staged", fields of the tile, ...] for one kernel, null for one per layer, "aten" for cuDNN; of an inverted residual also ["split", ...]:
its expand, then the rest as one `separable` kernel with the tile that follows.
"""

import functools
import json
import os
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from .configs import ATEN, STAGED_OPS, BlockTile, Form, Problem, Split, StagedFireTile, StagedTile

SPLIT, STAGED = "split", "staged"


@dataclass(frozen=True)
class Choice:
    """What was fastest."""

    form: Form


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
    return Choice(row if row in (None, ATEN) else _form(row))


def _form(row: list[int | str]) -> BlockTile | StagedTile | StagedFireTile | Split:
    if row[0] == SPLIT:
        return Split(_form(row[1:]))
    if row[0] == STAGED:
        return StagedFireTile(*row[1:]) if len(row) == 1 + FIELDS[StagedFireTile] else StagedTile(*row[1:-1], bool(row[-1]))
    return BlockTile(*row)


def row(form: Form) -> list[int | str] | str | None:
    """The choice as a table holds it."""
    if isinstance(form, Split):
        return [SPLIT, *row(form.tile)]
    if isinstance(form, (StagedTile, StagedFireTile)):
        return [STAGED, *map(int, astuple(form))]
    return list(astuple(form)) if isinstance(form, BlockTile) else form


FIELDS = {tile: len(fields(tile)) for tile in (BlockTile, StagedTile, StagedFireTile)}


@functools.lru_cache
def _table(arch: str, path: str | None) -> dict[str, list[int | str] | str | None]:
    """Raises ValueError for a file that is no table of `arch`."""
    file = Path(path) if path else Path(__file__).parent / "tables" / f"{arch}.json"
    if not path and not file.exists():
        return {}
    try:
        table = json.loads(file.read_text())
        if table["arch"] != arch:
            return {}
        choices = table["choices"]
        bad = [name for name, row in choices.items() if not _is_form(name, row, arch)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"FASTCONV_TUNED: {file} is no table of tiles ({type(problem).__name__}: {problem})") from problem
    if bad:
        staged = FIELDS[StagedFireTile] if _op(bad[0]) == "fire" else FIELDS[StagedTile]
        what = f"null, {ATEN!r}, {FIELDS[BlockTile]} ints or {STAGED!r} and {staged}"
        what += f", after {SPLIT!r} or not" if _op(bad[0]) == "inverted_residual" else ""
        raise ValueError(f"FASTCONV_TUNED: {file}: {bad[0]!r} must be {what}, got {choices[bad[0]]!r}")
    return choices


def _is_form(name: str, row: object, arch: str) -> bool:
    if row is None or row == ATEN:
        return True
    if type(row) is list and row[:1] == [SPLIT] and _op(name) == "inverted_residual":
        row = row[1:]
    count = FIELDS[BlockTile]
    if type(row) is list and row[:1] == [STAGED] and _op(name) in STAGED_OPS and arch == "sm_90":
        row, count = row[1:], FIELDS[StagedFireTile if _op(name) == "fire" else StagedTile]
    return type(row) is list and len(row) == count and all(type(number) is int for number in row)


def _op(name: str) -> str:
    return name.split()[0]
