"""Small chunks for the tests of the diagnostics."""

import pytest

from contrastive_kernels.diagnostics import common


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Make chunks of a few rows, the last one ragged, where these small inputs would fit into one."""
    monkeypatch.setattr(common, "CHUNK_ELEMENTS", 200)
