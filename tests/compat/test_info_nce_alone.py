"""info-nce-pytorch's names without info-nce-pytorch."""

import importlib
import sys

import pytest
import torch

import python_ref
from contrastive_kernels.compat import _small
from contrastive_kernels.compat import info_nce as ours


@pytest.fixture(params=[0, _small._largest], ids=["sweep", "formula"], autouse=True)
def largest(request):
    with _small.largest(request.param):
        yield


@pytest.mark.parametrize("shape", [None, (7, 6), (9, 7, 6)], ids=["in-batch", "unpaired", "paired"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_agrees_with_the_reference(shape, reduction):
    query, key = torch.randn(2, 9, 6, dtype=torch.float64).unbind()
    negatives = None if shape is None else torch.randn(shape, dtype=torch.float64)
    mode = "paired" if shape is not None and len(shape) == 3 else "unpaired"
    found = ours.InfoNCE(0.2, reduction, mode)(query, key, negatives)
    options = dict(temperature=0.2, reduction=reduction, negative_mode=mode)
    torch.testing.assert_close(found, python_ref.info_nce_loss(query, key, negatives, **options))


def test_errors_name_the_argument():
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="negative_keys has 2 rows and query 4"):
        ours.info_nce(x, x, x[:2, None], negative_mode="paired")
    with pytest.raises(ValueError, match="negative_mode must be 'unpaired' or 'paired', not 'neither'"):
        ours.info_nce(x, x, x, negative_mode="neither")


def test_other_names_need_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "info_nce", None)
    with pytest.raises(ImportError, match="pip install info-nce-pytorch"):
        ours.transpose  # noqa: B018
    with pytest.raises(AttributeError, match="_private"):
        ours._private  # noqa: B018


def test_is_imported_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "info_nce", None)
    monkeypatch.delitem(sys.modules, "contrastive_kernels.compat.info_nce")
    again = importlib.import_module("contrastive_kernels.compat.info_nce")
    assert again.InfoNCE is not ours.InfoNCE
