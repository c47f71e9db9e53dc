import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def setting():
    """`setting(owner, name, value)` holds until the test ends. pytest's monkeypatch would delete a switch of torch.backends afterwards,
    whose values lie in C++ and not in the owner's dictionary."""
    before = []

    def switch(owner, name, value):
        before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    yield switch
    for owner, name, value in reversed(before):
        setattr(owner, name, value)
