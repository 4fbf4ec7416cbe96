"""SimSiam, and what it shares with BYOL; test_every_loss.py has what all losses share."""

import math

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
import python_ref
from tests.support.losses import assert_module_is_function, assert_refused
from tests.support.testing import assert_matches, assert_outcomes_match, differentiate, dtype_id

NAMES = ("p0", "z0", "p1", "z1")
both_losses = pytest.mark.parametrize("loss", ["simsiam_loss", "byol_loss"])


def rows(n=33, d=24, dtype=torch.float64):
    return {name: torch.randn(n, d, dtype=torch.float64).to(dtype) for name in NAMES}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("shape", [(1, 3), (65, 24), (130, 100)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@both_losses
def test_is_the_formula(loss, reduction, shape, dtype, poison):
    """Plain and weighted, of unit rows and of others."""
    for options in ({}, {"normalize": False}, {"weight": torch.rand(shape[0], dtype=torch.float64)}):
        tensors = rows(*shape, dtype)
        weight = {"weight": options["weight"]} if "weight" in options else {}
        fixed = {"reduction": reduction, **{k: v for k, v in options.items() if k != "weight"}}
        out = differentiate(lambda **t: getattr(ck, loss)(**t, **fixed), tensors | weight)  # noqa: B023
        wide = {k: v.double() for k, v in (tensors | weight).items()}
        expected = differentiate(lambda **t: getattr(python_ref, loss)(**t, **fixed), wide)  # noqa: B023
        assert out.value.dtype == torch.promote_types(dtype, torch.float32)
        assert_outcomes_match(out, expected, dtype, 1.0)


@both_losses
def test_targets_have_no_gradient(loss):
    tensors = {name: x.requires_grad_() for name, x in rows().items()}
    getattr(ck, loss)(**tensors).backward()
    assert tensors["p0"].grad.any() and tensors["p1"].grad.any()
    assert tensors["z0"].grad is None and tensors["z1"].grad is None


@both_losses
def test_a_prediction_meets_the_other_view(loss):
    """Rows that predict the other view have the least loss; those that predict their own do not."""
    z0, z1 = rows()["z0"], rows()["z1"]
    least = {"simsiam_loss": -1.0, "byol_loss": 0.0}[loss]
    assert_matches(getattr(ck, loss)(3 * z1, z0, 2 * z0, z1), torch.tensor(least).double(), torch.float64, scale=1.0)
    assert getattr(ck, loss)(z0, z0, z1, z1) > least + 0.5


def test_byol_is_simsiam_by_a_factor():
    """I4 constant factors: of unit rows 2 - 2 cos is the squared distance."""
    tensors = rows()
    for reduction, factor in (("mean", 1), ("none", 1)):
        byol, simsiam = (f(**tensors, reduction=reduction) for f in (ck.byol_loss, ck.simsiam_loss))
        assert_matches(byol, 4 + 4 * factor * simsiam, torch.float64, scale=1.0)


def test_simsiam_is_the_cosine_similarity():
    t = rows()
    dense = -(F.cosine_similarity(t["p0"], t["z1"]).mean() + F.cosine_similarity(t["p1"], t["z0"]).mean()) / 2
    assert_matches(ck.simsiam_loss(**t), dense, torch.float64, scale=1.0)


@both_losses
def test_a_row_of_zeros_has_no_gradient(loss):
    tensors = rows()
    tensors["p0"][3] = 0
    out = differentiate(lambda **t: getattr(ck, loss)(**t), tensors)
    assert out.value.isfinite()
    assert not out.gradients["p0"][3].any() and out.gradients["p0"].isfinite().all()


@both_losses
@pytest.mark.parametrize("name", NAMES)
def test_nan_is_not_hidden(loss, name):
    for bad in (math.nan, math.inf):
        tensors = rows()
        tensors[name][2, 5] = bad
        assert getattr(ck, loss)(**tensors).isnan()


@both_losses
def test_derivatives(loss):
    """First and second, of the predictions."""
    t = rows(4, 5)

    def function(p0, p1):
        return getattr(ck, loss)(p0, t["z0"], p1, t["z1"], reduction="none")

    inputs = (t["p0"].requires_grad_(), t["p1"].requires_grad_())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


BAD = {
    "another width": ({"z1": torch.randn(8, 15)}, ValueError, "p0 (8, 16) and z1 (8, 15)"),
    "another number": ({"p1": torch.randn(9, 16)}, ValueError, "p0 (8, 16) and p1 (9, 16)"),
    "three dimensions": ({"z0": torch.randn(8, 2, 16)}, ValueError, "z0 (8, 2, 16) must have shape (N, D)"),
    "integers": ({"p0": torch.ones(8, 16).long()}, TypeError, "p0 has dtype torch.int64"),
    "reduction": ({"reduction": "max"}, ValueError, "reduction 'max' is unknown"),
    "weight": ({"weight": torch.ones(9)}, ValueError, "weight (9,) must have shape (8,)"),
}


@pytest.mark.parametrize("name", BAD)
@both_losses
def test_bad_input(loss, name):
    given, error, message = BAD[name]
    tensors = {k: torch.randn(8, 16) for k in NAMES}
    assert_refused(lambda: getattr(ck, loss)(**tensors | given), error, message)


def test_module_is_its_function():
    tensors, weight = tuple(rows(12, 16).values()), torch.rand(12)
    options = {"normalize": False, "reduction": "sum"}
    assert_module_is_function(ck.SimSiamLoss, ck.simsiam_loss, tensors, options, weight=weight)
