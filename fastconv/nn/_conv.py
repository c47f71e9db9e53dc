"""What DepthwiseConv2d and PointwiseConv2d share."""

from __future__ import annotations

from torch import Tensor, nn

from fastconv.nn._twin import describe, share
from fastconv.optimize.plan import plain
from fastconv.optimize.planned import Planned


class KernelConv2d(Planned, nn.Conv2d):
    """A Conv2d that runs through one of fastconv's operators where that covers it, and as Conv2d everywhere else."""

    structure: str  # what `from_torch` takes, in words

    @classmethod
    def from_torch(cls, module: nn.Module) -> KernelConv2d:
        """The same layer with the same Parameter objects. Raises TypeError if `module` is not a Conv2d, ValueError if not of this kind."""
        return cls._adopt(share(module))

    @classmethod
    def _adopt(cls, module: nn.Module) -> KernelConv2d:
        """Makes `module` itself one of these, or raises as `from_torch` does and leaves it as it was."""
        if type(module) not in (nn.Conv2d, cls):
            raise TypeError(f"{cls.__name__}: module must be a Conv2d, got {type(module).__name__}")
        if not cls._is_of_kind(module):
            raise ValueError(f"{cls.__name__}: module must be {cls.structure}, got {describe(module)}")
        module.__class__ = cls
        return module

    def _forward(self, x: Tensor) -> Tensor:
        weight = self.weight  # once: a parametrization computes it, maybe with an effect
        if plain(x) and self._fits(x, weight) and self._is_covered():
            return self._operator(x, weight)
        return self._conv_forward(x, weight, self.bias)

    def _fits(self, x: Tensor, weight: Tensor) -> bool:
        image = x.dim() == 4 and x.shape[1] == self.in_channels and x.is_floating_point()
        return image and x.dtype == weight.dtype and x.device == weight.device

    def _is_of_kind(self) -> bool:
        raise NotImplementedError

    def _is_covered(self) -> bool:
        raise NotImplementedError

    def _operator(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError
