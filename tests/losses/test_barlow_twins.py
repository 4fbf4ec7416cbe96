"""Barlow Twins: its two forms; tests/losses/test_spectral_contrastive.py has what losses of second moments share."""

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
import python_ref
from tests.support.losses import assert_module_is_function, assert_refused
from tests.support.testing import assert_outcomes_match, check, differentiate
from tests.support.variants import EVERY

CASE = EVERY["barlow_twins-correlated"]


def test_a_scalar_weight_is_differentiable():
    check(CASE, (33, 33, 24), torch.float64, "torch", lambd=torch.tensor(0.1, dtype=torch.float64))


@pytest.mark.parametrize("rows", [17, 65])
def test_small_and_large_products_agree(rows):
    """I8 Gram forms: constant columns leave the moments alone; enough of them turn the D x D form into N x N."""
    extra = 80
    tensors = CASE.features((rows, rows, 16))
    narrow = differentiate(lambda **t: ck.barlow_twins_loss(**t), tensors)
    # a constant column correlates with nothing, not even itself
    wide = differentiate(
        lambda z0, z1: ck.barlow_twins_loss(F.pad(z0, (0, extra)), F.pad(z1, (0, extra))) - extra, tensors
    )
    assert_outcomes_match(wide, narrow, torch.float64, extra)


def test_decorrelated_features_keep_the_digits_of_the_rest():
    """Orthogonal columns with a little noise: the squares off the diagonal are a millionth of those on it."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(6):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    z = (hadamard[:, 1:17] + 1e-3 * torch.randn(64, 16, dtype=torch.float64)).float()
    loss = ck.barlow_twins_loss(z, z.clone(), lambd=1.0)
    expected = python_ref.barlow_twins_loss(z.double(), z.double(), lambd=1.0)
    assert expected < 1e-3
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=0)


def test_values_by_hand():
    """Orthogonal features lose nothing, opposite views 4 a column."""
    orthogonal = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert ck.barlow_twins_loss(orthogonal, orthogonal.clone()) < 1e-8
    assert ck.barlow_twins_loss(orthogonal, -orthogonal) == pytest.approx(8.0, rel=1e-4)


X = torch.randn(8, 16)
BAD = {
    "one row": (lambda: ck.barlow_twins_loss(X[:1], X[:1]), ValueError, "z0 (1, 16) must have at least 2 rows"),
    "std": (lambda: ck.barlow_twins_loss(X, X, std="batch"), ValueError, "std 'batch' is unknown"),
    "lambd": (lambda: ck.barlow_twins_loss(X, X, lambd=torch.ones(2)), ValueError, "lambd (2,)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    assert_refused(*BAD[name])


def test_module_is_its_function():
    inputs = tuple(CASE.features((12, 12, 16), torch.float32).values())
    options = {"lambd": 0.01, "std": "unbiased"}
    assert_module_is_function(ck.BarlowTwinsLoss, ck.barlow_twins_loss, inputs, options)
