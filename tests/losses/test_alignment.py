"""Alignment, and what it shares with its augmentation-robust form; test_every_loss.py has what all losses share."""

import math

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
import python_ref
from tests.support.losses import assert_module_is_function, assert_refused
from tests.support.testing import assert_matches, assert_outcomes_match, differentiate, dtype_id

# (N, V, D) and what it is for.
SHAPES = {
    (1, 2, 1): "one of everything",
    (65, 2, 24): "one pair",
    (33, 5, 100): "ten pairs, no multiple of 8",
    (3, 9, 3): "more views than dimensions",
}
GRID = [
    *((shape, torch.float32) for shape in SHAPES),
    *(((33, 5, 100), dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)),
]
both_losses = pytest.mark.parametrize("loss", ["alignment_loss", "augmentation_robust_loss"])


def check(loss, tensors, dtype, **options):
    """Compare with the reference in float64 on the same rounded inputs."""
    out = differentiate(lambda **t: getattr(ck, loss)(**t, **options), tensors)
    wide = {k: v.double() for k, v in tensors.items()}
    expected = differentiate(lambda **t: getattr(python_ref, loss)(**t, **options), wide)
    assert out.value.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert out.gradients["views"].dtype == dtype
    assert_outcomes_match(out, expected, dtype, 1.0)


@pytest.mark.parametrize(
    ("shape", "dtype"), [pytest.param(s, t, id="-".join(map(str, s)) + f"-{dtype_id(t)}") for s, t in GRID]
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@both_losses
def test_any_number_of_views(loss, reduction, shape, dtype, poison):
    """Plain and weighted."""
    views = torch.randn(shape, dtype=torch.float64)
    check(loss, {"views": views.to(dtype)}, dtype, reduction=reduction)
    weight = torch.rand(shape[0], dtype=torch.float64)
    check(loss, {"views": views.to(dtype), "weight": weight}, dtype, reduction=reduction)


@both_losses
def test_unit_rows(loss, poison):
    check(loss, {"views": torch.randn(33, 4, 24)}, torch.float32, normalize=True, reduction="none")
    check(loss, {"views": torch.randn(33, 4, 24).double()}, torch.float64, normalize=True)


@both_losses
def test_views_far_from_the_origin_keep_their_distances(loss):
    """Distances of a thousandth at a norm of a thousand: a difference of squares would have none of their digits."""
    views = 1000 + torch.randint(-8, 8, (33, 3, 24)) / 1024
    check(loss, {"views": views}, torch.float32, reduction="none")


@both_losses
def test_equal_views_have_no_loss_and_no_gradient(loss, poison):
    views = torch.randn(33, 1, 24).expand(33, 4, 24)
    out = differentiate(lambda views: getattr(ck, loss)(views), {"views": views})
    # a mean of four equal numbers is that number
    assert out.value == 0
    assert not out.gradients["views"].any()


@both_losses
def test_nan_and_infinity_are_not_hidden(loss):
    """In any view."""
    for view in range(4):
        for bad in (math.nan, math.inf):
            views = torch.randn(5, 4, 24)
            views[2, view, 7] = bad
            value = getattr(ck, loss)(views)
            assert not value.isfinite()
            assert value.isnan() or bad == math.inf
            assert getattr(ck, loss)(views, normalize=True).isnan()


@both_losses
def test_order_is_irrelevant(loss):
    """I17 permutation: of the samples and of the views."""
    views = torch.randn(33, 4, 24).double()
    value = getattr(ck, loss)(views)
    assert_matches(getattr(ck, loss)(views[torch.randperm(33)][:, torch.randperm(4)]), value, torch.float64)


@both_losses
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "unit"])
def test_derivatives(loss, normalize):
    """First and second, of every sample."""
    views = torch.randn(4, 3, 5).double().requires_grad_()

    def function(views):
        return getattr(ck, loss)(views, normalize=normalize, reduction="none")

    assert torch.autograd.gradcheck(function, views)
    assert torch.autograd.gradgradcheck(function, views)


BAD = {
    "matrix": (torch.randn(8, 16), {}, ValueError, "views (8, 16) must have shape (N, V, D)"),
    "one view": (torch.randn(8, 1, 16), {}, ValueError, "views (8, 1, 16) must have at least 2 views"),
    "empty": (torch.randn(0, 2, 16), {}, ValueError, "views (0, 2, 16) is an empty batch"),
    "integers": (torch.ones(8, 2, 16).long(), {}, TypeError, "views has dtype torch.int64"),
    "a list": ([[[1.0], [1.0]]], {}, TypeError, "views must be a tensor, not list"),
    "reduction": (torch.randn(8, 2, 16), {"reduction": "max"}, ValueError, "reduction 'max' is unknown"),
    "weight": (torch.randn(8, 2, 16), {"weight": torch.ones(9)}, ValueError, "weight (9,) must have shape (8,)"),
}


@pytest.mark.parametrize("name", BAD)
@both_losses
def test_bad_input(loss, name):
    views, options, error, message = BAD[name]
    assert_refused(lambda: getattr(ck, loss)(views, **options), error, message)


# Alignment alone


def test_loss_is_twice_one_minus_the_mean_similarity():
    """I4 constant factors: on unit rows L_align = mean(2 - 2 mean s)."""
    views = F.normalize(torch.randn(33, 5, 24).double(), dim=-1)
    similarity, _ = ck.min_view_similarity(views, reduce="mean", backend="torch")
    assert_matches(ck.alignment_loss(views, reduction="none"), 2 - 2 * similarity, torch.float64, scale=1.0)


def test_values_by_hand():
    views = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]]])
    assert ck.alignment_loss(views) == pytest.approx((25 + 1 + 18) / 3)


def test_module_is_its_function():
    options = {"normalize": True, "reduction": "sum"}
    views, weight = torch.randn(12, 3, 16), torch.rand(12)
    assert_module_is_function(ck.AlignmentLoss, ck.alignment_loss, (views,), options, weight=weight)
