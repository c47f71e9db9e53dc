"""What every launcher needs of its tensors: layout, alignment, architecture, precision. Host code, no kernels."""

import contextlib
import functools
import math

import torch

from .configs import BlockTile

DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
INT32_MAX = 2**31 - 1


@functools.cache
def _arch(index: int) -> str:
    if torch.version.hip:
        return "gfx942"
    return "sm_90" if torch.cuda.get_device_capability(index)[0] in (9, 10) else "sm_80"


def arch(device: torch.device) -> str:
    """The architecture table for `device`; the interpreter (CPU tensors) uses sm_80's."""
    return _arch(device.index) if device.type == "cuda" else "sm_80"


def precision(dtype: torch.dtype) -> str:
    """fp32 dot products use tf32 only where torch's own switch for matrix products allows it."""
    return "tf32" if dtype == torch.float32 and not torch.version.hip and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def kind(dtype: torch.dtype) -> str:
    """The dtype as the tile tables name it."""
    return "tf32" if precision(dtype) == "tf32" else DTYPES[dtype]


def window(size: tuple[int, int], kernel: int, stride: tuple[int, int], padding: tuple[int, int]) -> tuple[int, int]:
    """The output's height and width."""
    return tuple((extent + 2 * p - kernel) // s + 1 for extent, s, p in zip(size, stride, padding))


def alignment(channels: int) -> int:
    """The largest power of two up to 16 that divides `channels`.

    Kernels take channel counts as units * ALIGN: Triton derives the width of a load from known divisors, and on its own sees
    only divisibility by 16, which leaves 24, 40 or 72 channels (common in MobileNet) with 2-byte loads.
    """
    return math.gcd(channels, 16)


def nhwc(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


def kernel_order(weight: torch.Tensor) -> torch.Tensor:
    """The same weight in the memory order that the kernels read: (K, K, C) if depthwise, else (Cout, K, K, Cin). Copies only if it must."""
    order = (2, 3, 0, 1) if weight.shape[1] == 1 and weight.shape[2] > 1 else (0, 2, 3, 1)
    inverse = [order.index(dim) for dim in range(4)]
    return weight.permute(order).contiguous().permute(inverse)


def dense(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.contiguous()


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """What a result for x has; where both are one order in memory, NCHW."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def outputs(x: torch.Tensor, shape: tuple[int, ...], always_nhwc: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(the tensor to return, the NHWC tensor the kernel fills): one tensor unless x is NCHW and its output must be, too."""
    layout = torch.channels_last if always_nhwc else memory_format(x)
    result = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    is_nhwc = result.is_contiguous(memory_format=torch.channels_last)
    filled = result if is_nhwc else torch.empty_like(result, memory_format=torch.channels_last)
    return result, filled


def on(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes x's GPU the current one: Triton launches on the current device, and a Python kernel gets no device guard from torch."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def options(tile: BlockTile) -> dict[str, int]:
    """How a block kernel is compiled with its tile. maxnreg: left to itself, ptxas spills values of the smaller tiles for occupancy."""
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages} | ({} if torch.version.hip else {"maxnreg": 255})


def steps(channels: int, depth: int) -> int:
    """1 where one step holds all channels, which a kernel then compiles without a loop, else 2 for any number."""
    return 1 if channels <= depth else 2
