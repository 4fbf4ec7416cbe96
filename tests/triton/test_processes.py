"""The tests of the Triton backend that need a process of their own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from contrastive_kernels.engine.backends import triton as backend

TESTS = Path(__file__).parents[1]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(*command: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, *command], cwd=TESTS.parent, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="is interpreting already")
def test_interpreter():
    """The interpreter's tests pass in a process in which the kernels are imported with TRITON_INTERPRET=1."""
    files = [
        str(path)
        for name in ("test_interpret.py", "test_launches.py", "test_random_sweeps.py", "test_rows.py")
        for path in TESTS.rglob(name)
    ]
    assert len(files) == 4, files
    run("-m", "pytest", "-q", "-x", *files, TRITON_INTERPRET="1")


def test_import_is_light():
    """Importing the backend imports no Triton and so asks no driver."""
    run("-c", "import sys, contrastive_kernels.engine.backends.triton; assert 'triton' not in sys.modules")


def test_not_supported_reasons():
    """The reasons name the dtype and the device that the backend does not take."""
    reasons = backend.not_supported_reasons(torch.zeros(2, 2, dtype=torch.float64))
    assert any("float64" in reason for reason in reasons)
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert any("device is cpu" in reason for reason in backend.not_supported_reasons(torch.zeros(2, 2)))
