"""`network`, a whole plan as one operator: how its program is written and read, its fake kernel, autocast.

The program is text, "format; step; step ...", in the grammar of csrc/program.cpp. It and the packed weights are all that the operator
needs, so a graph that holds it can be saved, and runs wherever the operators are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastconv import _extension
from fastconv.ops import _checks
from fastconv.ops._register import library, overload

FORMAT = "fastconv 2"  # as in csrc/program.cpp


def encode(schema: torch.FunctionSchema, args: list[object]) -> tuple[list[Tensor], list[str]]:
    """A step's arguments (all but x and residual, in the schema's order) as weights and words; `decode` is the inverse."""
    weights: list[Tensor] = []
    words: list[str] = []
    arguments = _arguments(schema)
    args = [*args, *(argument.default_value for argument in arguments[len(args) :])]
    for argument, value in zip(arguments, args, strict=True):
        kind = str(argument.type)
        if kind == "Tensor":
            weights.append(value)
        elif kind == "Optional[Tensor]":
            words.append("0" if value is None else "1")
            weights += [] if value is None else [value]
        elif kind == "List[Tensor]":
            words.append(str(len(value)))
            weights += value
        elif kind == "Optional[str]":
            words.append(value or "none")
        else:
            words += [str(int(number)) for number in (value if isinstance(value, (tuple, list)) else [value])]
    return weights, words


def decode(schema: torch.FunctionSchema, words: Iterator[str], weights: Iterator[Tensor]) -> list[object]:
    args: list[object] = []
    for argument in _arguments(schema):
        kind = str(argument.type)
        if kind == "Tensor":
            args.append(next(weights))
        elif kind == "Optional[Tensor]":
            args.append(next(weights) if int(next(words)) else None)
        elif kind == "List[Tensor]":
            args.append([next(weights) for _ in range(int(next(words)))])
        elif kind == "Optional[str]":
            word = next(words)
            args.append(None if word == "none" else word)
        elif kind == "List[int]":
            args.append([int(next(words)), int(next(words))])
        else:
            args.append(bool(int(next(words))))
    return args


def _arguments(schema: torch.FunctionSchema) -> list[torch.Argument]:
    return [argument for argument in schema.arguments if argument.name not in ("x", "residual")]


def fake(x: Tensor, weights: list[Tensor], program: str) -> Tensor:
    """The steps' fake kernels one after the other."""
    values, rest = [x], iter(weights)
    for step in program.split(";")[1:]:
        name, first, second, *words = step.split(" ")
        op = overload(name)
        args = decode(op._schema, iter(words), rest)
        names = [argument.name for argument in op._schema.arguments]
        if "residual" in names:
            args.insert(names.index("residual") - 1, values[int(second)] if int(second) >= 0 else None)
        if name in ("max_pool", "global_avg_pool"):  # their own fake kernels ask for x's memory format, and so for sizes
            values.append(_empty(x, getattr(_checks, name)(values[int(first)], *args)))
        else:
            values.append(op(values[int(first)], *args))
    return _empty(x, values[-1].shape)


def _empty(x: Tensor, shape: _checks.Shape) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


if _extension.available:
    torch.library.register_fake("fastconv::network", fake, lib=library)
    torch.library.register_autocast("fastconv::network", "cpu", torch.float32, lib=library)
