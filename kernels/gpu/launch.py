"""What every launcher needs of its tensors: layout, alignment, architecture, precision. Host code, no kernels."""

import contextlib
import functools
import math
from typing import Any

import torch
import triton

from .configs import STEM_DEPTH, BlockTile, DepthwiseTile, stem_steps

DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
INT32_MAX = 2**31 - 1
SHAPES = 4096  # launchers that an operation keeps


@functools.cache
def _arch(index: int) -> str:
    """sm_90's tables hold kernels in Gluon with `wgmma`, which only Hopper has: sm_80's serve newer devices, and any Triton not known."""
    if torch.version.hip:
        return "gfx942"
    return "sm_90" if torch.cuda.get_device_capability(index)[0] == 9 and _KNOWN else "sm_80"


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
    channels, depth, kernel, _ = weight.shape
    if depth == 1 and kernel > 1:
        strides = weight.stride()
        if (strides[0], strides[2], strides[3]) == (1, kernel * channels, channels):
            return weight
        return weight.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    return nhwc(weight)


def stem_order(weight: torch.Tensor) -> torch.Tensor:
    """The same weight (O, C, KH, KW) as the stem's kernel reads it: (O, KH, KW, C) with zeros after each window, or after each row of
    one (`stem_steps`), up to a multiple of STEM_DEPTH, so that a thread loads 16 bytes at a time. Copies only if it must."""
    out, channels, height, width = weight.shape
    steps, by_rows = stem_steps(height, width, channels)
    strides = (steps * STEM_DEPTH, 1, STEM_DEPTH if by_rows else width * channels, channels)
    padded = (weight.untyped_storage().nbytes() // weight.element_size() - weight.storage_offset()) >= out * strides[0]
    if weight.stride() == strides and padded:
        return weight
    ordered = weight.new_zeros(out * strides[0]).as_strided(weight.shape, strides)
    return ordered.copy_(weight)


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
    is_nhwc = layout is torch.channels_last or result.is_contiguous(memory_format=torch.channels_last)
    filled = result if is_nhwc else torch.empty_like(result, memory_format=torch.channels_last)
    return result, filled


def wide(*tensors: torch.Tensor) -> bool:
    """Whether an image of any of them passes 2^31 elements."""
    return max([tensor.numel() for tensor in tensors]) // tensors[0].shape[0] > INT32_MAX


def on(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes x's GPU the current one: Triton launches on the current device, and a Python kernel gets no device guard from torch."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


# Where a compiled kernel is run as `Launcher` does it: what JITFunction.run itself calls in these releases.
_KNOWN = triton.__version__.split(".")[:2] in (["3", "6"], ["3", "7"])


class Launcher:
    """A kernel with all of its arguments but the tensors: `launcher(*tensors)` runs it. Made once for each shape, dtype and device.

    Triton compiles in the first call. Later ones hand the compiled kernel its arguments themselves: finding it anew by the types and
    alignments of all arguments is most of what a launch costs. One variant is compiled for each dtype and pattern of tensors that are None
    or do not lie at a multiple of 16 bytes. Launch hooks (profilers) and releases of Triton that are not known take
    Triton's way. A kernel with a PDL follows the one before it as `epilogue.await_previous` says.

    grid: the number of programs; numbers: the kernel's runtime arguments after its tensors; constants: by name, with compiler options.
    """

    __slots__ = ("constants", "current", "device", "grid", "kernel", "numbers", "tail", "variants")

    def __init__(self, kernel: Any, device: torch.device, grid: int, numbers: tuple[int, ...], **constants: Any) -> None:
        if "PDL" in kernel.arg_names:
            follows = arch(device) == "sm_90"
            constants |= {"PDL": follows} | ({"launch_pdl": True} if follows else {})
        self.kernel, self.device, self.grid, self.numbers, self.constants = kernel, device, grid, numbers, constants
        self.tail = (*numbers, *(constants[name] for name in kernel.arg_names if name in constants))
        self.variants: dict[tuple, tuple] = {}
        self.current: Any = None  # triton's driver

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        variant = (tensors[0].dtype, *[pointer and pointer & 15 for pointer in pointers])
        known = self.variants.get(variant)
        if known is None or _watched() or self.current.get_current_device() != self.device.index:
            self._through_triton(variant, tensors)
            return
        run, function, metadata = known
        stream = self.current.get_current_stream(self.device.index)
        run(self.grid, 1, 1, stream, function, metadata, None, None, None, *pointers, *self.tail)

    def _through_triton(self, variant: tuple, tensors: tuple[torch.Tensor | None, ...]) -> None:
        with on(tensors[0]):
            try:
                compiled = self.kernel[(self.grid,)](*tensors, *self.numbers, **self.constants)
            except OSError as problem:
                from . import cache

                if not cache.degraded(problem):
                    raise
                compiled = self.kernel[(self.grid,)](*tensors, *self.numbers, **self.constants)
            if _KNOWN and compiled is not None and hasattr(compiled, "packed_metadata"):  # none in the interpreter
                self.current = triton.runtime.driver.active
                self.variants[variant] = (compiled.run, compiled.function, compiled.packed_metadata)


def _watched() -> bool:
    """Whether somebody asked Triton to be told of launches."""
    runtime = triton.knobs.runtime
    return bool(getattr(runtime.launch_enter_hook, "calls", True) or getattr(runtime.launch_exit_hook, "calls", True))


def options(tile: BlockTile | DepthwiseTile) -> dict[str, int]:
    """How a kernel of strips is compiled with its tile. maxnreg: left to itself, ptxas spills values of the smaller tiles for occupancy."""
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages} | ({} if torch.version.hip else {"maxnreg": 255})


def steps(channels: int, depth: int) -> int:
    """1 where one step holds all channels, which a kernel then compiles without a loop, else 2 for any number."""
    return 1 if channels <= depth else 2
