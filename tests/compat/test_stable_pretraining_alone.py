"""The adapter of stable_pretraining without it: agrees with the references, and asks for it only where it is needed."""

import importlib
import sys

import pytest
import torch

import python_ref
from contrastive_kernels.compat import _small
from contrastive_kernels.compat import stable_pretraining as adapter
from contrastive_kernels.compat.check.case import TOLERANCE, difference

TARGETS = torch.tensor([4, 0, 0, -100, 3, 8, 7, 1, -100])


def info_nce(x, y):
    """Over the anchors that count, of candidates that are not the target."""
    counted = TARGETS >= 0
    chosen = TARGETS[counted]
    return python_ref.info_nce_loss(
        x[counted],
        y[chosen],
        y,
        temperature=0.2,
        in_batch_negatives=False,
        query_ids=chosen,
        key_ids=torch.arange(len(y)),
    )


def vicreg(x, y):
    return python_ref.vicreg_loss(x, y, sim_weight=1.0, var_weight=2.0, cov_weight=3.0, eps=0.01)


def barlow_twins(x, y):
    return python_ref.barlow_twins_loss(x, y, lambd=0.02, std="unbiased", std_eps=1e-5)


PAIRS = {
    "InfoNCELoss": (lambda x, y: adapter.InfoNCELoss(0.2)(x, y, TARGETS), info_nce),
    "NTXEntLoss": (adapter.NTXEntLoss(0.3), lambda x, y: python_ref.nt_xent_loss(x, y, temperature=0.3)),
    "CLIPLoss": (
        lambda x, y: adapter.CLIPLoss()(x, y, logit_scale=0.3),
        lambda x, y: python_ref.clip_loss(x, y, temperature=0.3, normalize=True),
    ),
    "BarlowTwinsLoss": (adapter.BarlowTwinsLoss(0.02), barlow_twins),
    "VICRegLoss": (adapter.VICRegLoss(1.0, 2.0, 3.0, 0.01), vicreg),
}


def differentiated(loss, rows):
    value = loss(*rows)
    return {"value": value.detach(), **dict(zip("01", torch.autograd.grad(value, rows), strict=True))}


@pytest.mark.parametrize("largest", [0, _small._largest], ids=["sweep", "formula"])
@pytest.mark.parametrize("name", PAIRS)
def test_is_the_reference(name, largest):
    rows = [torch.randn(9, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    loss, reference = PAIRS[name]
    with _small.largest(largest):
        found = differentiated(loss, rows)
    assert difference(found, differentiated(reference, rows)) <= TOLERANCE


def test_a_mask_leaves_out_candidates(monkeypatch):
    monkeypatch.setattr("contrastive_kernels.compat._peer._warned", set())
    rows = torch.randn(4, 5), torch.randn(6, 5)
    mask = torch.tensor([False, False, False, False, True, True]).expand(4, 6)
    with pytest.warns(UserWarning, match="InfoNCELoss with mask stores"):
        masked = adapter.InfoNCELoss()(*rows, torch.arange(4), mask)
    torch.testing.assert_close(masked, adapter.InfoNCELoss()(rows[0], rows[1][:4], torch.arange(4)))


def test_needs_the_peer_for_other_names_alone(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "stable_pretraining"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "stable_pretraining", None)
    monkeypatch.delitem(sys.modules, adapter.__name__)
    monkeypatch.setattr(adapter.__name__, adapter)  # put back what the import replaces
    again = importlib.import_module(adapter.__name__)
    assert set(again.__all__) <= set(vars(again))
    with pytest.raises(ImportError, match="pip install stable-pretraining"):
        again.BYOLLoss  # noqa: B018
