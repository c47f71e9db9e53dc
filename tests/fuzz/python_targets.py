"""Bytes to a call of a public operator, or to a checkpoint file: what `make fuzz` feeds by atheris, and the tests from the saved corpus.

python tests/fuzz/python_targets.py arguments|checkpoints [libFuzzer's options]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastconv import ops, reference
from fastconv.models._weights import load_weights

SIZES = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 2**16, 2**31, 2**62)
NUMBERS: tuple[object, ...] = (0, 1, 2, 3, 4, 5, -1, 2**16, 2**31 - 1, 2**31, 2**63 - 1, -(2**63), 2**70, 1.0, "1", None, True, b"")
NAMES: tuple[object, ...] = (None, *list(reference.ACTIVATIONS)[1:], "gelu", "", 1, ["relu"])
DTYPES = (torch.float32,) * 4 + (
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
)
PARAMETERS: dict[str, dict[str, str]] = {
    name: {argument.name: str(argument.type) for argument in getattr(torch.ops.fastconv, name).default._schema.arguments}
    for name in (
        "depthwise", "pointwise", "fire_expand", "fire", "separable", "inverted_residual", "stem", "max_pool", "global_avg_pool",
        "depthwise_backward_input", "depthwise_backward_weight",
    )
}  # fmt: skip


class Bytes:
    def __init__(self, data: bytes) -> None:
        self.data = iter(data)

    def next(self) -> int:
        return next(self.data, 0)

    def pick(self, table: tuple[Any, ...]) -> Any:
        return table[self.next() % len(table)]

    def tensor(self) -> object:
        """Of few elements, or many that are one."""
        how = self.next()
        shape = [self.pick(SIZES) for _ in range(self.pick((4, 4, 4, 4, 1, 1, 0, 2, 3, 5, 6)))]
        dtype = self.pick(DTYPES)
        count = 1
        for size in shape:
            count *= max(size, 1)
        if count >= 2**63:
            return None
        small = count <= 4096
        x = torch.arange(count if small else 1).remainder(7).sub(3).to(dtype)
        x = x[: 0 if 0 in shape else None].view(shape) if small else x.expand(shape)
        if how % 16 == 1:
            return x.to("meta")
        if how % 16 == 2 and small and dtype == torch.float32:
            return x.to_sparse()
        if how % 16 == 3 and len(shape) == 4:
            return x.transpose(2, 3)
        if how % 16 == 4 and len(shape) == 4 and small:
            return x.contiguous(memory_format=torch.channels_last)
        if how % 16 == 5:
            return x.requires_grad_() if dtype.is_floating_point or dtype.is_complex else x
        return self.pick((None, 3, "x", [1.0])) if how % 16 == 6 else x

    def argument(self, kind: str) -> object:
        if kind == "Tensor":
            return self.tensor()
        if kind == "Optional[Tensor]":
            return self.tensor() if self.next() % 4 else None
        if kind == "Optional[str]":
            return self.pick(NAMES)
        if kind == "bool":
            return self.pick((True, False, 1, None))
        length = self.pick((2, 2, 2, 2, None, None, 0, 1, 3))
        return self.pick(NUMBERS) if length is None else tuple(self.pick(NUMBERS) for _ in range(length))


def expect(told: object, error: Exception) -> None:
    """The error is one of ours."""
    if not told:
        raise AssertionError(f"no message for a user: {error!r}") from error


def arguments(data: bytes) -> None:
    """A typed error in the operator's name, or the reference's result."""
    choices = Bytes(data)
    op = choices.pick(tuple(PARAMETERS))
    given = {name: choices.argument(kind) for name, kind in PARAMETERS[op].items()}
    if any(isinstance(value, Tensor) and value.numel() > 2**20 and value.dtype != torch.float32 for value in given.values()):
        return  # hours of ATen's work, in no memory
    try:
        y = getattr(ops, op)(**given)
    except (TypeError, ValueError) as error:
        return expect(str(error).startswith(f"{op}: "), error)
    except (RuntimeError, MemoryError) as error:  # no memory, or a combination that ATen has no kernel for
        return expect(str(error), error)
    if not y.is_meta:
        expected = getattr(reference, op)(**given)
        assert y.shape == expected.shape, f"{op}: {tuple(y.shape)}, expected {tuple(expected.shape)}"
        tolerance = 1e-3 if y.dtype in (torch.float32, torch.float64) else 0.1
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


class Small(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


folder = tempfile.TemporaryDirectory()


def checkpoints(data: bytes) -> None:
    """The file's tensors in the model, or a ValueError that names the file."""
    path = Path(folder.name) / ("fuzzed.safetensors" if data[:1] == b"s" else "fuzzed.pth")
    path.write_bytes(data[1:])
    try:
        model = load_weights(Small(), path, "small")
    except ValueError as error:
        return expect(str(error).startswith((f"weights: {path} ", f"small: {path} does not fit: ")), error)
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in Small().state_dict().items()
    }


TARGETS: dict[str, Callable[[bytes], None]] = {"arguments": arguments, "checkpoints": checkpoints}


if __name__ == "__main__":
    import atheris

    target = TARGETS[sys.argv.pop(1)]
    for module in ("fastconv.ops._checks", "fastconv.models._weights", "torch._weights_only_unpickler", "torch.serialization"):
        for value in list(vars(sys.modules[module]).values()):
            if callable(value) and getattr(value, "__module__", "") == module and hasattr(value, "__code__"):
                atheris.instrument_func(value)
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
