"""What of the Triton backend needs a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from contrastive_kernels.backends import triton as backend

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(*command: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, *command], cwd=HERE.parent, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="is interpreting already")
def test_interpreter():
    files = [str(HERE / name) for name in ("test_interpret.py", "test_rows.py", "test_launches.py")]
    run("-m", "pytest", "-q", "-x", *files, TRITON_INTERPRET="1")


def test_import_is_light():
    """Without Triton's import, and so without a driver."""
    run("-c", "import sys, contrastive_kernels.backends.triton; assert 'triton' not in sys.modules")


def test_not_supported_reasons():
    reasons = backend.not_supported_reasons(torch.zeros(2, 2, dtype=torch.float64))
    assert any("float64" in reason for reason in reasons)
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert any("device is cpu" in reason for reason in backend.not_supported_reasons(torch.zeros(2, 2)))
