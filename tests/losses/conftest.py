"""Fixtures of the losses' tests."""

import pytest
import torch


@pytest.fixture
def double():
    """Make float64 the default dtype, as the closed forms of the reference need it."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
