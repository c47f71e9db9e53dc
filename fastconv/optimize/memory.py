"""Where a plan's packed weights stand: in one block of memory, one after the other as its steps read them, on huge pages where it can.

A network's weights are read once a call, more pages of 4 KiB than a core keeps addresses of: MobileNet V1 1 to 2% of a call on a Zen 4.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastconv.ops._prepared import Prepared

_LINE = 64  # bytes, of a cache line
_HUGE_PAGE = 1 << 21


def gather(calls: Sequence[object]) -> None:
    """Moves the weights of these steps, which nothing else refers to yet, into a block of their own. Fewer than a huge page stay."""
    packed = [call for call in calls if isinstance(call, Prepared) and "f32" in call.label]
    total = sum(_room(tensor) for call in packed for tensor in call.tensors)
    if total < _HUGE_PAGE:
        return
    from fastconv import _C

    block = mmap.mmap(-1, total + _HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a page that nobody writes to takes no memory
    address = torch.frombuffer(block, dtype=torch.uint8).data_ptr()
    at = -address % _HUGE_PAGE
    _C.advise_huge_pages(address + at, total)

    def move(item: Any) -> Any:
        nonlocal at
        if isinstance(item, (tuple, list)):
            return type(item)(map(move, item))
        if not isinstance(item, Tensor):
            return item
        # A storage of its own, which keeps the block: saved or copied, a weight does not take its neighbours along.
        moved = torch.frombuffer(block, dtype=torch.float32, count=item.numel(), offset=at).view(item.shape)
        at += _room(item)
        return moved.copy_(item)

    for call in packed:
        call.args = move(call.args)


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _LINE) * _LINE
