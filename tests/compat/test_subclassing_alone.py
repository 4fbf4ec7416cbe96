"""Adapters whose classes derive from those of a library, without the library."""

import importlib
import sys

import pytest

PEERS = {
    "pytorch_metric_learning": "pytorch-metric-learning",
    "sentence_transformers": "sentence-transformers",
}


@pytest.mark.parametrize(("name", "distribution"), PEERS.items())
def test_says_what_to_install(name, distribution, monkeypatch):
    adapter = f"contrastive_kernels.compat.{name}"
    for module in list(sys.modules):
        if module == adapter or module.partition(".")[0] == name:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"pip install {distribution}"):
        importlib.import_module(adapter)
    assert adapter not in sys.modules
