"""Fixtures of several files."""

import pytest


@pytest.fixture
def short_queue(monkeypatch):
    """Shorten the queue of the benchmarks' MoCo, and forget their checks between tests."""
    from benchmarks import cases

    monkeypatch.setattr(cases, "QUEUE", 512)
    cases.objections.cache_clear()
    yield
    cases.objections.cache_clear()
