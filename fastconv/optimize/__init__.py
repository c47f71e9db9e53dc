"""Whole models through fastconv's kernels, as they come: `optimize`, `explain`, `revert`."""

from fastconv.optimize.explain import explain
from fastconv.optimize.module import optimize, revert

__all__ = ["explain", "optimize", "revert"]
