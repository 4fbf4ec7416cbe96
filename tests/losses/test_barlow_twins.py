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


def test_a_constant_column_is_zero_where_a_number_is_added_to_its_deviation():
    """Its own entry of the correlation is 0, so that it loses 1, and its gradient is that of a division by std_eps."""
    z0, z1 = torch.randn(2, 9, 3, dtype=torch.float64).unbind()
    z0[:, 1] = 0.5
    z0.requires_grad_()
    for module in (ck, python_ref):
        loss = module.barlow_twins_loss(z0, z1, std="unbiased", std_eps=1e-2)
        (gradient,) = torch.autograd.grad(loss, z0)
        column = (z1[:, 1] - z1[:, 1].mean()) / (z1[:, 1].std() + 1e-2)
        # C_1b = 0 for all b: only (1 - C_11)^2 has a slope
        torch.testing.assert_close(gradient[:, 1], -2 * column / 9 / 1e-2)
        rest = module.barlow_twins_loss(z0[:, ::2].detach(), z1[:, ::2], std="unbiased", std_eps=1e-2)
        first = z0[:, ::2].detach()
        first = (first - first.mean(0)) / (first.std(0) + 1e-2)
        torch.testing.assert_close(loss.detach(), rest + 1 + 0.0051 * (first.T @ column / 9).square().sum())
    assert ck.barlow_twins_loss(z0, z1, std="unbiased").isnan()
    z1[0, 0] = torch.nan
    assert ck.barlow_twins_loss(z0, z1, std_eps=1e-2).isnan()


X = torch.randn(8, 16)
BAD = {
    "one row": (lambda: ck.barlow_twins_loss(X[:1], X[:1]), ValueError, "z0 (1, 16) must have at least 2 rows"),
    "std": (lambda: ck.barlow_twins_loss(X, X, std="batch"), ValueError, "std 'batch' is unknown"),
    "std_eps": (lambda: ck.barlow_twins_loss(X, X, std_eps=-0.1), ValueError, "std_eps -0.1 must not be negative"),
    "lambd": (lambda: ck.barlow_twins_loss(X, X, lambd=torch.ones(2)), ValueError, "lambd (2,)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    assert_refused(*BAD[name])


def test_module_is_its_function():
    inputs = tuple(CASE.features((12, 12, 16), torch.float32).values())
    options = {"lambd": 0.01, "std": "unbiased"}
    assert_module_is_function(ck.BarlowTwinsLoss, ck.barlow_twins_loss, inputs, options)
