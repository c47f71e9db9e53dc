"""What every operator's test needs: data, a float64 answer with its error bound, layouts, and the checks that all operators share."""

import contextlib
import mmap
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastconv import _extension, reference

ISAS = sys.modules["fastconv._C"].isas() if _extension.available else ["ATen"]
every_isa = pytest.mark.usefixtures("isa", "poison")  # for a test of a kernel: once per instruction set, on poisoned memory


@contextlib.contextmanager
def using_isa(name: str) -> Iterator[None]:
    """The compiled kernels of one instruction set; nothing where the extension is missing."""
    if not _extension.available:
        yield
        return
    extension = sys.modules["fastconv._C"]
    chosen = extension.isa()
    extension.set_isa(name)
    try:
        yield
    finally:
        extension.set_isa(chosen)


U = 2.0**-24  # float32's unit roundoff
CHANNELS = (1, 3, 4, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 64, 100)  # below, at and above every vector and panel width
ACTIVATIONS = tuple(reference.ACTIVATIONS)
EXACT_ACTIVATIONS = (None, "relu", "relu6")  # integers in, integers out


def reals(*shape: int) -> Tensor:
    return torch.randn(shape)


def integers(*shape: int) -> Tensor:
    """Small integers: every product and sum of them is exact in float32, so any order of summation gives one answer."""
    return torch.randint(-4, 5, shape).float()


def sparse(n: int, c: int, h: int, w: int, dtype: torch.dtype = torch.float32, nchw: bool = False) -> Tensor:
    """A channels_last image of zeros (or NCHW) that takes up memory only where it is written: for sizes past 2^31 elements."""
    count = n * c * h * w
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names it from 3.13 on
    pages = mmap.mmap(-1, count * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    flat = torch.frombuffer(pages, dtype=dtype)
    return flat.view(n, c, h, w) if nchw else flat.view(n, h, w, c).permute(0, 3, 1, 2)


class Bounded(NamedTuple):
    """A float64 value and an elementwise bound on the error of a float32 computation of it."""

    value: Tensor
    error: Tensor

    @classmethod
    def exact(cls, x: Tensor) -> "Bounded":
        return cls(x.double(), torch.zeros_like(x, dtype=torch.float64))

    def conv(self, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, **options) -> "Bounded":
        """gamma_n * (sum|x*w| + |bias| + |residual|), n the number of roundings on the longest path, plus the error x comes with."""
        weight, bias, residual = [None if t is None else t.double() for t in (weight, bias, residual)]
        value = F.conv2d(self.value, weight, bias, **options)
        carried = F.conv2d(self.error, weight.abs(), **options)
        size = F.conv2d(self.value.abs(), weight.abs(), None if bias is None else bias.abs(), **options) + carried
        if residual is not None:
            value, size = value + residual, size + residual.abs()
        n = weight[0].numel() + 2  # products fused or not, then bias and residual
        return Bounded(value, carried + n * U / (1 - n * U) * size + 1e-38)

    def activate(self, name: str | None) -> "Bounded":
        value = torch.sigmoid(self.value) if name == "sigmoid" else reference.ACTIVATIONS[name](self.value)
        slope = {"hardswish": 1.5, "silu": 1.1}.get(name, 1.0)
        rounding = {"hardswish": 4, "hardsigmoid": 4, "silu": 8, "sigmoid": 8}.get(name, 0) * U
        return Bounded(value, slope * self.error + rounding * value.abs())

    def mean(self) -> "Bounded":
        """Over all pixels: a sum of n terms, then a division."""
        n = self.value.shape[2] * self.value.shape[3] + 1
        value, carried = self.value.mean((2, 3), keepdim=True), self.error.mean((2, 3), keepdim=True)
        return Bounded(value, carried + n * U / (1 - n * U) * (self.value.abs().mean((2, 3), keepdim=True) + carried))

    def times(self, other: "Bounded") -> "Bounded":
        value = self.value * other.value
        error = self.error * other.value.abs() + self.value.abs() * other.error + self.error * other.error
        return Bounded(value, error + U * (value.abs() + error))

    def cat(self, other: "Bounded") -> "Bounded":
        return Bounded(torch.cat([self.value, other.value], 1), torch.cat([self.error, other.error], 1))

    def admits(self, y: Tensor, what: object = "") -> None:
        """Fails unless y lies within the bound, naming the worst element."""
        assert y.shape == self.value.shape, f"{what}: shape {tuple(y.shape)}, expected {tuple(self.value.shape)}"
        off = (y.double() - self.value).abs()
        bad = ~(off <= self.error)  # NaN is bad, too
        if bad.any():
            index = tuple(bad.nonzero()[0].tolist())
            raise AssertionError(
                f"{what}: {int(bad.sum())} of {bad.numel()} elements off; first at {index}: {y[index]!r}, "
                f"expected {self.value[index]!r} within {self.error[index]:.3g}"
            )


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Views equal to x in every memory order that a caller may bring."""
    n, c, h, w = x.shape
    yield "NCHW", x.contiguous()
    yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    wide = torch.full((n, h, w, c + 3), torch.nan)
    wide[..., 1 : c + 1] = x.permute(0, 2, 3, 1)
    yield "a slice of channels", wide[..., 1 : c + 1].permute(0, 3, 1, 2)
    tall = torch.full((n, c, h + 2, w + 3), torch.nan)
    tall[:, :, 1 : h + 1, 2 : w + 2] = x
    yield "a crop", tall[:, :, 1 : h + 1, 2 : w + 2]
    yield "transposed", x.transpose(2, 3).contiguous().transpose(2, 3)
    sparse = torch.full((2 * n, c, h, w), torch.nan)
    sparse[::2] = x
    yield "every other image", sparse[::2]


def expanded(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Views with stride 0; their values differ from x's."""
    yield "one channel for all", x[:, :1].expand_as(x)
    yield "one row for all", x[:, :, :1].expand_as(x)
    yield "one image for all", x[:1].expand_as(x)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits from our kernels; ATen, which stands in for a missing extension, promises only close ones."""
    return torch.equal(a, b) if _extension.available else torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def check_layouts(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Any layout gives the dense one's answer, in the layout that the input's strides ask for."""
    for name, view in (*layouts(x), *expanded(x)):
        y, dense = call(view), call(view.contiguous())
        last = view.is_contiguous(memory_format=torch.channels_last) and not view.is_contiguous()
        assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format), name
        assert same(y, dense), name


def check_same_bits(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """An image's output does not depend on the batch it stands in, nor on the number of threads."""
    threads = torch.get_num_threads()
    whole = call(x)
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert same(call(x), whole), f"{count} threads"
            for i in range(x.shape[0]):
                assert same(call(x[i : i + 1]), whole[i : i + 1]), f"image {i} alone, {count} threads"
    finally:
        torch.set_num_threads(threads)


def classes(x: Tensor) -> Tensor:
    """0 finite, 1 NaN, 2 +Inf, 3 -Inf."""
    return x.isnan() * 1 + x.isposinf() * 2 + x.isneginf() * 3


def check_nonfinite(call: Callable[[Tensor], Tensor], specification: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """NaN and Inf, one at a time, reach the same outputs as in ATen, as the same class."""
    for value in (torch.nan, torch.inf, -torch.inf):
        for index in ((0, 0, 0, 0), (-1, -1, -1, -1), (0, x.shape[1] // 2, x.shape[2] // 2, x.shape[3] // 2)):
            spoiled = x.clone()
            spoiled[index] = value
            got, expected = classes(call(spoiled)), classes(specification(spoiled.double()))
            assert torch.equal(got, expected), f"{value} at {index}: {(got != expected).nonzero()[:3].tolist()}"


def check_registrations(op: torch._ops.OpOverload, *args) -> None:
    """opcheck on both memory formats and both kernels' dtypes; first and second derivatives in float64."""
    double = [convert(arg, lambda t: t.double().requires_grad_()) for arg in args]
    for values in (args, double, [convert(arg, channels_last) for arg in args], [convert(arg, channels_last) for arg in double]):
        torch.library.opcheck(op, tuple(values))
    assert torch.autograd.gradcheck(op, double)
    assert torch.autograd.gradgradcheck(op, double, fast_mode=True)


def check_compiled(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """torch.compile takes the public function into its graph whole, for any batch and size."""
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (x, torch.cat([x, x]), x[:, :, :-1, :-1]):
        for dense in (batch.contiguous(), channels_last(batch)):
            y, expected = compiled(dense), call(dense)
            assert torch.equal(y, expected)
            assert y.stride() == expected.stride()


def convert(arg: object, change: Callable[[Tensor], Tensor]) -> object:
    return change(arg) if isinstance(arg, Tensor) else arg


def channels_last(x: Tensor) -> Tensor:
    if x.dim() != 4:
        return x
    return x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(x.requires_grad)


def check_autocast(call: Callable[[], Tensor], specification: Callable[[], Tensor]) -> None:
    """Inside an autocast region the operator runs in the region's dtype, like torch's convolutions."""
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            y, expected = call(), specification()
        assert y.dtype == expected.dtype == dtype
        torch.testing.assert_close(y, expected, rtol=0.02, atol=0.05)


def check_other_dtypes(call: Callable[..., Tensor], specification: Callable[..., Tensor], tensors: list[Tensor | None]) -> None:
    """float64, bfloat16 and float16 run through ATen: the reference's own answer, in the layout of x."""
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        cast = [None if t is None else t.to(dtype) for t in tensors]
        for x in (cast[0], channels_last(cast[0])):
            y, expected = call(x, *cast[1:]), specification(x, *cast[1:])
            assert y.dtype == dtype
            tolerance = {torch.float64: 1e-12, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
            torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
            last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
            assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def randomise_norms(module: torch.nn.Module) -> None:
    """Normalisation that does something, so that folding it wrongly shows."""
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            if part.track_running_stats:
                part.running_mean.normal_(0, 0.1)
                part.running_var.uniform_(0.5, 1.5)
            if part.affine:
                torch.nn.init.uniform_(part.weight, 0.8, 1.2)
                torch.nn.init.normal_(part.bias, 0, 0.1)
