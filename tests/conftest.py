"""Fixtures for every test."""

import os

import pytest
import torch
from harness import ISAS, using_isa
from installed import bare, sdist, site, wheel  # noqa: F401  # fixtures

os.environ.pop("PYTEST_XDIST_WORKER", None)  # a pytest that a test starts is nobody's worker: pytest-benchmark would not measure


def pytest_collection_modifyitems(items):
    """Under pytest-xdist (`make test`) one worker runs all that share a built wheel, and one all that takes minutes or much memory."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.xdist_group("slow"))
        elif {"sdist", "wheel", "site"} & set(item.fixturenames):
            item.add_marker(pytest.mark.xdist_group("wheel"))


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
