"""Values in float64 with a bound on what a kernel may differ from them: running error analysis through the layers of a block."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastconv import reference

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # unit roundoff
STEEPEST = 1.5  # of all activations: hardswish at 3
ACTIVATIONS = reference.ACTIVATIONS | {"sigmoid": torch.sigmoid}


def gamma(depth: int) -> float:
    """The relative error of `depth` fp32 operations in a row."""
    return depth * 2.0**-24 / (1 - depth * 2.0**-24)


@dataclass
class Bounded:
    """A kernel computes `value` up to `error`, element by element."""

    value: torch.Tensor
    error: torch.Tensor

    @classmethod
    def exact(cls, x: torch.Tensor) -> "Bounded":
        return cls(x.double(), torch.zeros_like(x, dtype=torch.float64))

    def conv(self, weight, bias=None, stride=(1, 1), padding=(0, 0), groups=1) -> "Bounded":
        """A convolution that accumulates in fp32, its bias last."""
        weight, bias = weight.double(), None if bias is None else bias.double()
        geometry = (stride, padding, (1, 1), groups)
        value = F.conv2d(self.value, weight, bias, *geometry)
        before = F.conv2d(self.error, weight.abs(), None, *geometry)
        size = F.conv2d(self.value.abs(), weight.abs(), None if bias is None else bias.abs(), *geometry) + before
        return Bounded(value, before + gamma(weight[0].numel() + 1) * size)

    def plus(self, other: torch.Tensor | None) -> "Bounded":
        if other is None:
            return self
        value = self.value + other.double()
        return Bounded(value, self.error + gamma(1) * (value.abs() + self.error))

    def activate(self, name: str | None) -> "Bounded":
        """6 operations: a silu's exponential, sum and quotient are the most."""
        if name is None:
            return self
        value = ACTIVATIONS[name](self.value)
        return Bounded(value, STEEPEST * self.error + gamma(6) * (self.value.abs() + self.error + 3))

    def rounded(self, dtype: torch.dtype) -> "Bounded":
        """Stored in, or multiplied as, `dtype`. 2^-25: half of fp16's smallest step."""
        extra = 0.0 if dtype == torch.float32 else UNIT[dtype] * (self.value.abs() + self.error) + 2.0**-25
        return Bounded(self.value, self.error + extra)

    def mean(self) -> "Bounded":
        """Over all pixels, summed in fp32 in any order."""
        value, error = self.value.mean((2, 3), keepdim=True), self.error.mean((2, 3), keepdim=True)
        size = self.value.abs().mean((2, 3), keepdim=True) + error
        return Bounded(value, error + gamma(self.value.shape[2] * self.value.shape[3] + 1) * size)

    def times(self, gate: "Bounded") -> "Bounded":
        error = self.error * (gate.value.abs() + gate.error) + self.value.abs() * gate.error
        return Bounded(self.value * gate.value, error + gamma(1) * ((self.value * gate.value).abs() + error))

    def max_pool(self, stride, padding, ceil_mode) -> "Bounded":
        """No larger an error than the largest in the window."""
        pooled = (F.max_pool2d(tensor, 3, stride, padding, ceil_mode=ceil_mode) for tensor in (self.value, self.error))
        return Bounded(*pooled)

    def holds(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Asserts that y, a kernel's result for x, is within the bound, in x's dtype and memory format."""
        assert y.dtype == x.dtype
        assert y.shape == self.value.shape
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        bound = self.rounded(y.dtype)
        slack = 2.0**-25 + (UNIT[torch.float32] * self.value.abs() if y.dtype == torch.float32 else 0.0)
        worst = ((y.double() - self.value).abs() / (bound.error + slack)).nan_to_num(nan=float("inf")).max().item()
        assert worst <= 1, f"error is {worst:.3g} times the bound"
