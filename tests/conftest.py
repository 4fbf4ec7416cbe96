"""Fixtures of all tests, and the order and the tiers that they run in."""

import os

# A waiting thread that spins takes the core from the one it waits for when other processes share the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A program that another version of this package left in Inductor's cache calls the operators as they were then.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
# The tests are of the kernels, not of what stands in for a wrong one.
os.environ.setdefault("CONTRASTIVE_KERNELS_FIRST_USE", "0")

import pytest
import torch

pytest.register_assert_rewrite("tests.support")

from tests.support import testing  # noqa: E402, after its assertions got their messages
from tests.support.ranks import Ranks  # noqa: E402


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def hardware():
    """Let Triton's interpreter, if it is in use, compute as a GPU does where numpy differs."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TRITON_INTERPRET") == "1":
            from tests.support import interpreter

            interpreter.compute_as_hardware(patch)
            interpreter.patch_language_once(patch)
        yield


@pytest.fixture(params=testing.backends())
def backend(request):
    return request.param


@pytest.fixture
def poison():
    """Fill uninitialised floating memory with NaN, in Python and in C++ alike."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def ranks():
    """Processes that form groups, started once."""
    pool = Ranks()
    yield pool
    pool.close()


# The files that take longest. Two workers share the rest evenly only if these come first.
LONG = (
    "triton/test_processes.py",
    "losses/test_every_loss.py",
    "losses/test_groups.py",
    "engine/test_groups.py",
    "engine/test_memory.py",
    "triton/test_aot.py",
    "engine/test_compile.py",
    "losses/test_accuracy.py",
    "losses/test_programs.py",
    "package/test_sdist.py",
    "package/benchmarks/test_gpu.py",
    "package/test_examples.py",
    "package/test_distributed.py",
    "package/test_types.py",
)
# Left out by `make test-fast`: four fifths of the time, and little that the other tests would not notice first.
SLOW = (
    "engine/test_autograd.py",
    "engine/test_compile.py",
    "engine/test_first_use_interpreted.py",
    "engine/test_groups.py",
    "engine/test_memory.py",
    "engine/test_operators.py",
    "engine/test_transforms.py",
    "losses/test_accuracy.py",
    "losses/test_every_loss.py::test_derivatives",
    "losses/test_every_loss.py::test_statistics",
    "losses/test_groups.py",
    "losses/test_invariants.py",
    "losses/test_mmcl.py::test_compile",
    "losses/test_programs.py::test_compiles_for_every_batch_size",
    "losses/test_programs.py::test_exports_with_a_dynamic_batch",
    "losses/test_properties.py",
    "package/benchmarks/",
    "package/diagnostics/test_plots.py",
    "package/test_check.py::test_every_loss_is_right",
    "package/test_chunked_encoder.py::test_two_ranks",
    "package/test_distributed.py",
    "package/test_examples.py",
    "package/test_sdist.py",
    "package/test_types.py::test_mypy",
    "package/test_types.py::test_pyright",
    "triton/",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    def name(item):
        path = os.path.relpath(item.path, testing.ROOT / "tests")
        return f"{path}::{getattr(item, 'originalname', item.name)}"

    def place(item):
        file = name(item).partition("::")[0]
        return LONG.index(file) if file in LONG else len(LONG)

    items.sort(key=place)
    for item in items:
        if name(item).startswith(SLOW):
            item.add_marker(pytest.mark.slow)
