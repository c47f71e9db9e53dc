"""Fixtures for every test."""

import sys

import pytest
import torch
from harness import ISAS
from installed import bare, sdist, site, wheel  # noqa: F401  # fixtures

from fastconv import _extension


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs the test once per instruction set that this machine has; once through ATen where the extension is missing."""
    if not _extension.available:
        yield request.param
        return
    extension = sys.modules["fastconv._C"]
    chosen = extension.isa()
    extension.set_isa(request.param)
    yield request.param
    extension.set_isa(chosen)


@pytest.fixture
def poison():
    """Fresh memory holds NaN: an output or scratch element that a kernel forgets, or reads too early, shows."""
    torch.use_deterministic_algorithms(True)  # together with fill_uninitialized_memory, on by default
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)
