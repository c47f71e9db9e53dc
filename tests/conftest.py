"""Fixtures for every test."""

import os

import pytest
import torch
from harness import ISAS, using_isa
from installed import bare, sdist, site, wheel  # noqa: F401  # fixtures

os.environ.pop("PYTEST_XDIST_WORKER", None)  # a pytest that a test starts is nobody's worker: pytest-benchmark would not measure


# Fixtures that take long to make: one of pytest-xdist's workers makes them, for all tests that read them. Of the session, by group; of a
# file.
OF_THE_SESSION = {"sdist": "wheel", "wheel": "wheel", "site": "wheel", "facts": "compile", "chosen": "compile"}
OF_A_FILE = {"alone", "damaged", "failing_memory", "guarded", "launches", "pair"}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist writes the groups into the tests' names
def pytest_collection_modifyitems(items):
    """Under pytest-xdist (`make test`): groups that one worker runs. What takes minutes or much memory runs one after another."""
    for item in items:
        names = set(item.fixturenames)
        group = next((OF_THE_SESSION[name] for name in OF_THE_SESSION if name in names), None)
        if group is None and OF_A_FILE & names:
            group = item.path.name
        if item.get_closest_marker("slow"):
            group = "slow"
        if group:
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs the test once per instruction set that this machine has; once through ATen where the extension is missing."""
    with using_isa(request.param):
        yield request.param


@pytest.fixture
def portable():
    """Weights packed as for a machine without a matrix unit: for tests that ask for direct sums' bits, or for Strassen's algorithm."""
    from fastconv.ops import _prepared

    with _prepared.portable():
        yield


@pytest.fixture
def poison():
    """Fresh memory holds NaN: an output or scratch element that a kernel forgets, or reads too early, shows."""
    torch.use_deterministic_algorithms(True)  # together with fill_uninitialized_memory, on by default
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)
