"""VICReg: its two forms; tests/losses/test_spectral_contrastive.py has what losses of second moments share."""

import math

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
from contrastive_kernels.primitives import cross_moments
from tests.support.losses import assert_module_is_function, assert_refused
from tests.support.testing import assert_outcomes_match, check, differentiate
from tests.support.variants import EVERY

CASE = EVERY["vicreg-correlated"]


def test_scalar_weights_are_differentiable():
    names = ("sim_weight", "var_weight", "cov_weight")
    weights = {name: torch.tensor(2.0, dtype=torch.float64) for name in names}
    check(CASE, (33, 33, 24), torch.float64, "torch", **weights)


@pytest.mark.parametrize("rows", [17, 65])
def test_small_and_large_products_agree(rows):
    """I8 Gram forms: constant columns leave the moments alone; enough of them turn the D x D form into N x N."""
    d, extra = 16, 80
    tensors = CASE.features((rows, rows, d))
    narrow = differentiate(lambda **t: d * ck.vicreg_loss(**t), tensors)
    # a constant column has no spread, which the variance term counts in both views
    spread = 25.0 * extra * (1 - math.sqrt(1e-4))
    wide = differentiate(
        lambda z0, z1: (d + extra) * ck.vicreg_loss(F.pad(z0, (0, extra)), F.pad(z1, (0, extra))) - spread, tensors
    )
    assert_outcomes_match(wide, narrow, torch.float64, 25.0 * extra)


def test_values_by_hand():
    """Orthogonal features of variance above 1 lose nothing, opposite views 25 times the mean of 4."""
    orthogonal = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert ck.vicreg_loss(orthogonal, orthogonal.clone()) == 0
    assert ck.vicreg_loss(orthogonal, -orthogonal) == 100


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "unit"])
def test_positions_have_the_mean_of_their_losses(normalize, monkeypatch):
    """Moments of all positions, of two at once, and products of the rows of each."""
    monkeypatch.setattr("contrastive_kernels.losses.vicreg.MOMENTS_AT_ONCE", 200)
    for shape in ((9, 3, 2, 4), (4, 5, 9), (3, 2, 130)):
        z0, z1 = torch.randn(2, *shape, dtype=torch.float64)
        ours = differentiate(lambda **z: ck.vicreg_loss(**z, normalize=normalize), {"z0": z0, "z1": z1})
        expected = differentiate(
            lambda z0, z1: torch.stack(
                [
                    ck.vicreg_loss(x, y, normalize=normalize)
                    for x, y in zip(z0.flatten(1, -2).unbind(1), z1.flatten(1, -2).unbind(1), strict=True)
                ]
            ).mean(),
            {"z0": z0, "z1": z1},
        )
        assert_outcomes_match(ours, expected, torch.float64, 25.0)


X = torch.randn(8, 16)
BAD = {
    "one row": (lambda: ck.vicreg_loss(X[:1], X[:1]), ValueError, "z0 (1, 16) must have at least 2 rows"),
    "a vector": (lambda: ck.vicreg_loss(X[0], X[0]), ValueError, "z0 (16,) must have shape (N, D) or (N, ..., D)"),
    "positions": (
        lambda: ck.vicreg_loss(X.view(8, 2, 8), X.view(8, 2, 8)[:, :1]),
        ValueError,
        "z0 (8, 2, 8) and z1 (8, 1, 8) must have the same shape",
    ),
    "no positions": (lambda: ck.vicreg_loss(X[:, None][:, :0], X[:, None][:, :0]), ValueError, "has no positions"),
    "eps": (lambda: ck.vicreg_loss(X, X, eps=-1.0), ValueError, "eps -1.0"),
    "sim_weight": (lambda: ck.vicreg_loss(X, X, sim_weight="high"), TypeError, "sim_weight must be a number"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    assert_refused(*BAD[name])


def test_module_is_its_function():
    inputs = tuple(CASE.features((12, 12, 16), torch.float32).values())
    options = {"sim_weight": 1.0, "eps": 1e-3}
    assert_module_is_function(ck.VICRegLoss, ck.vicreg_loss, inputs, options)


def test_the_gradient_of_few_rows_has_the_layout_of_the_rows():
    """A transposed one makes the operations before it slow."""
    rows = torch.randn(8, 40, requires_grad=True)
    (grad,) = torch.autograd.grad(cross_moments(rows, rows)[1], rows)
    assert grad.is_contiguous()
