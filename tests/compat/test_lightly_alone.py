"""The adapter of lightly without lightly: agrees with the references, and asks for lightly only where it is needed."""

import importlib
import sys

import pytest
import torch

import python_ref
from contrastive_kernels.compat import _small
from contrastive_kernels.compat import lightly as adapter
from contrastive_kernels.compat.check.case import TOLERANCE, difference

PATHS = pytest.mark.parametrize("largest", [0, _small._largest], ids=["sweep", "formula"])


def hypersphere(x, y):
    alignment = python_ref.alignment_loss(torch.stack([x, y], 1), normalize=True)
    return alignment + sum(python_ref.uniformity_loss(z, t=1.0, normalize=True) for z in (x, y)) / 2


def weights(x, y):
    return (x * y).sum(1) + 1


PAIRS = {
    "NTXentLoss": (adapter.NTXentLoss(0.3), lambda x, y: python_ref.nt_xent_loss(x, y, temperature=0.3)),
    "DirectCLRLoss": (
        adapter.DirectCLRLoss(3),
        lambda x, y: python_ref.nt_xent_loss(x[:, :3], y[:, :3], temperature=0.5),
    ),
    "DCLLoss": (adapter.DCLLoss(), python_ref.decoupled_loss),
    "DCLWLoss": (
        adapter.DCLWLoss(sigma=0.4),
        lambda x, y: python_ref.decoupled_loss(
            x, y, positive_weight=lambda x, y: adapter.negative_mises_fisher_weights(x, y, 0.4)
        ),
    ),
    "DCLLoss with weights": (
        adapter.DCLLoss(weight_fn=weights),
        lambda x, y: python_ref.decoupled_loss(x, y, positive_weight=(weights(*unit(x, y)), weights(*unit(y, x)))),
    ),
    "BarlowTwinsLoss": (adapter.BarlowTwinsLoss(0.02), lambda x, y: python_ref.barlow_twins_loss(x, y, lambd=0.02)),
    "VICRegLoss": (adapter.VICRegLoss(nu_param=2.0), lambda x, y: python_ref.vicreg_loss(x, y, cov_weight=2.0)),
    "HypersphereLoss": (adapter.HypersphereLoss(), hypersphere),
}


def unit(*rows):
    return [torch.nn.functional.normalize(x) for x in rows]


def differentiated(loss, rows):
    value = loss(*rows)
    return {"value": value.detach(), **dict(zip("01", torch.autograd.grad(value, rows), strict=True))}


def views():
    return [torch.randn(9, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]


@PATHS
@pytest.mark.parametrize("name", PAIRS)
def test_is_the_reference(name, largest):
    rows, (loss, reference) = views(), PAIRS[name]
    with _small.largest(largest):
        found = differentiated(loss, rows)
    assert difference(found, differentiated(reference, rows)) <= TOLERANCE


@PATHS
def test_a_bank_is_the_reference(largest):
    """The key has a gradient, which moco's has not."""
    rows, loss = views(), adapter.NTXentLoss(0.2, memory_bank_size=(7, 5)).double()
    (bank,) = unit(loss.memory_bank.bank)
    loss.memory_bank.bank = bank.clone()
    with _small.largest(largest):
        found = differentiated(loss, rows)
    expected = differentiated(lambda x, y: python_ref.info_nce_loss(x, y, bank, temperature=0.2), rows)
    assert difference(found, expected) <= TOLERANCE


def test_the_bank_is_cut_at_its_end_and_does_not_wrap():
    bank = adapter.MemoryBankModule((5, 2), feature_dim_first=False)
    start = bank.bank.clone()
    first, second, third = (torch.full((3, 2), float(i)) for i in (1, 2, 3))
    rows, found = bank(first, update=True)
    assert rows is first and torch.equal(found, start)
    assert torch.equal(bank.bank[:3], first) and torch.equal(bank.bank[3:], start[3:]) and int(bank.bank_ptr) == 3
    found = bank(second, update=True)[1]
    assert torch.equal(found[:3], first) and torch.equal(found[3:], start[3:])
    assert torch.equal(bank.bank[3:], second[:2]) and torch.equal(bank.bank[:3], first) and int(bank.bank_ptr) == 0
    bank(third, update=True)
    assert torch.equal(bank.bank[:3], third) and torch.equal(bank.bank[3:], second[:2])


def test_a_size_alone_takes_the_dimension_of_the_first_batch():
    with pytest.warns(UserWarning, match=r"pass size=\(6, D\)"):
        loss = adapter.NTXentLoss(memory_bank_size=6)
    assert loss.memory_bank.bank.shape == (6,)
    loss(*views())
    assert loss.memory_bank.bank.shape == (6, 5) and loss.memory_bank(torch.ones(1, 5))[1].shape == (5, 6)


def test_needs_lightly_for_other_names_alone(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lightly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightly", None)
    monkeypatch.delitem(sys.modules, adapter.__name__)
    monkeypatch.setattr(adapter.__name__, adapter)  # put back what the import replaces
    again = importlib.import_module(adapter.__name__)
    assert set(again.__all__) <= set(vars(again))
    with pytest.raises(ImportError, match="pip install lightly"):
        again.SwaVLoss  # noqa: B018
    with pytest.raises(AttributeError):
        again._private  # noqa: B018
