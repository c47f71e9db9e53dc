"""Where a plan's packed weights stand: in one block of memory, one after the other as its steps read them, on huge pages where it can.

A network's weights are read once a call, more pages of 4 KiB than a core keeps addresses of: MobileNet V1 1 to 2% of a call on a Zen 4.
"""

from __future__ import annotations

import mmap
from typing import Any

import torch
from torch import Tensor

from fastconv import _extension
from fastconv.ops._prepared import Prepared

_LINE = 64  # bytes, of a cache line
_HUGE_PAGE = 1 << 21
# Packed by Winograd 3x3 weights take four times their room, beside the plain ones. What is reserved and not used takes no memory.
_RESERVED = 8
_WORTH_RETURNING = 1 << 18  # bytes: a return takes a millisecond


class Block:
    """Room for the packed weights of steps whose plain ones are so many bytes; none for less than a huge page."""

    def __init__(self, plain: int) -> None:
        self._memory: mmap.mmap | None = None
        if plain < _HUGE_PAGE or not _extension.available:  # without which nothing is packed
            return
        try:
            self._memory = mmap.mmap(-1, _RESERVED * plain + _HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:  # a process whose addresses are limited: weights stay where they are
            return
        self._address = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()
        self._first = self._next = -self._address % _HUGE_PAGE

    def take(self, call: object) -> None:
        """Moves the weights of a step that nobody else knows yet. What they leave goes back to the system: kept for the next, which are
        larger, it was all of MobileNet V1 once more."""
        if self._memory is None or not isinstance(call, Prepared) or "f32" not in call.label:
            return
        before = self._next
        call.args = self._moved(call.args)
        if self._next - before >= _WORTH_RETURNING:
            from fastconv import _C

            _C.return_free_memory()

    def finish(self) -> None:
        """Puts what has been filled on huge pages."""
        if self._memory is not None:
            from fastconv import _C

            _C.collapse_pages(self._address + self._first, self._next - self._first)

    def _moved(self, item: Any) -> Any:
        if isinstance(item, (tuple, list)):
            return type(item)(map(self._moved, item))
        if not isinstance(item, Tensor) or self._next + item.nbytes > len(self._memory):
            return item
        # A storage of its own, which keeps the block: saved or copied, a weight does not take its neighbours along.
        moved = torch.frombuffer(self._memory, dtype=item.dtype, count=item.numel(), offset=self._next).view(item.shape)
        self._next += -(-item.nbytes // _LINE) * _LINE
        return moved.copy_(item)
