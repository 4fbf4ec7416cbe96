"""VICReg: its two forms; tests/losses/test_spectral_contrastive.py has what losses of second moments share."""

import math

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
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


X = torch.randn(8, 16)
BAD = {
    "one row": (lambda: ck.vicreg_loss(X[:1], X[:1]), ValueError, "z0 (1, 16) must have at least 2 rows"),
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
