"""Fixtures of the engine's tests."""

import pytest

from contrastive_kernels.engine.backends.triton import first_use, tune
from tests.support import kernels


@pytest.fixture
def unseen_device(monkeypatch):
    """Let tensors of the CPU count as those of a GPU that no kernel has run on."""
    monkeypatch.delenv(first_use.ENVIRONMENT_VARIABLE)
    monkeypatch.delenv(tune.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(kernels, "DEVICE", "cpu")
    monkeypatch.setattr(first_use, "_concerns", lambda x: x.numel() > 0)
    monkeypatch.setattr(first_use, "_capturing", lambda: False)
    monkeypatch.setattr(first_use, "_trusted", {})
    monkeypatch.setattr(first_use, "_verdicts", {})
    monkeypatch.setattr(first_use, "_scores_missing", False)
