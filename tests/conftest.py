"""Fixtures: the seed, the backends that can run here, poisoned memory."""

import os

# A waiting thread that spins takes the core from the one it waits for when other processes share the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import testing
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=testing.backends())
def backend(request):
    return request.param


@pytest.fixture
def poison():
    """Uninitialised floating memory is filled with NaN, in Python and in C++ alike."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# Few tests that take long; two workers share the rest evenly only if these come first.
LONG = ("test_triton_processes.py", "test_aot.py", "test_memory.py", "test_compile.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
