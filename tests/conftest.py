"""Fixtures for every test."""

import pytest
import torch
from harness import ISAS, using_isa
from installed import bare, sdist, site, wheel  # noqa: F401  # fixtures


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs the test once per instruction set that this machine has; once through ATen where the extension is missing."""
    with using_isa(request.param):
        yield request.param


@pytest.fixture
def poison():
    """Fresh memory holds NaN: an output or scratch element that a kernel forgets, or reads too early, shows."""
    torch.use_deterministic_algorithms(True)  # together with fill_uninitialized_memory, on by default
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)
