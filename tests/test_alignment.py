"""Alignment and its augmentation-robust form: values, gradients, ties and invariants."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from testing import assert_matches, assert_outcomes_match, differentiate, dtype_id

import contrastive_kernels as ck
import python_ref as reference
from contrastive_kernels.functional import alignment
from contrastive_kernels.modules.alignment import AlignmentLoss, AugmentationRobustLoss

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
LOSSES = ("alignment_loss", "augmentation_robust_loss")
losses = pytest.mark.parametrize("loss", LOSSES)


def check(loss, tensors, dtype, **options):
    """Against the reference in float64 on the same rounded inputs."""
    out = differentiate(lambda **t: getattr(alignment, loss)(**t, **options), tensors)
    wide = {k: v.double() for k, v in tensors.items()}
    expected = differentiate(lambda **t: getattr(reference, loss)(**t, **options), wide)
    assert out.value.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert out.gradients["views"].dtype == dtype
    assert_outcomes_match(out, expected, dtype, 1.0)


@pytest.mark.parametrize(
    ("shape", "dtype"), [pytest.param(s, t, id="-".join(map(str, s)) + f"-{dtype_id(t)}") for s, t in GRID]
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@losses
def test_loss_and_gradients(loss, reduction, shape, dtype, poison):
    views = torch.randn(shape, dtype=torch.float64)
    check(loss, {"views": views.to(dtype)}, dtype, reduction=reduction)
    weight = torch.rand(shape[0], dtype=torch.float64)
    check(loss, {"views": views.to(dtype), "weight": weight}, dtype, reduction=reduction)


@losses
def test_unit_rows(loss, poison):
    check(loss, {"views": torch.randn(33, 4, 24)}, torch.float32, normalize=True, reduction="none")
    check(loss, {"views": torch.randn(33, 4, 24).double()}, torch.float64, normalize=True)


@losses
def test_views_far_from_the_origin_keep_their_distances(loss):
    """Distances of a thousandth at a norm of a thousand: a difference of squares would have none of their digits."""
    views = 1000 + torch.randint(-8, 8, (33, 3, 24)) / 1024
    check(loss, {"views": views}, torch.float32, reduction="none")


def test_on_unit_rows_the_robust_loss_is_the_least_similarity():
    """L_AR = mean(2 - 2 min s) and L_align = mean(2 - 2 mean s)."""
    views = F.normalize(torch.randn(33, 5, 24).double(), dim=-1)
    for loss, reduce in ((alignment.augmentation_robust_loss, "min"), (alignment.alignment_loss, "mean")):
        similarity, _ = ck.min_view_similarity(views, reduce=reduce, backend="torch")
        assert_matches(loss(views, reduction="none"), 2 - 2 * similarity, torch.float64, scale=1.0)


@pytest.mark.parametrize("v", [2, 3, 6])
def test_the_worst_pair_is_no_better_than_the_mean(v):
    views = torch.randn(33, v, 24).double()
    robust = alignment.augmentation_robust_loss(views, reduction="none")
    mean = alignment.alignment_loss(views, reduction="none")
    assert (robust >= mean * (1 - 1e-12)).all()
    if v == 2:
        assert_matches(robust, mean, torch.float64)
        assert_matches(mean, (views[:, 0] - views[:, 1]).square().sum(1), torch.float64)
    else:
        assert (robust > mean).all()


@losses
def test_equal_views_have_no_loss_and_no_gradient(loss, poison):
    views = torch.randn(33, 1, 24).expand(33, 4, 24)
    out = differentiate(lambda views: getattr(alignment, loss)(views), {"views": views})
    # a mean of four equal numbers is that number
    assert out.value == 0
    assert not out.gradients["views"].any()


def test_the_whole_gradient_goes_to_the_first_farthest_pair():
    """Three corners of a regular triangle: all pairs tie, the first one is (0, 1)."""
    views = torch.eye(3)[None].requires_grad_()
    alignment.augmentation_robust_loss(views).backward()
    torch.testing.assert_close(views.grad, torch.tensor([[[2.0, -2.0, 0.0], [-2.0, 2.0, 0.0], [0.0, 0.0, 0.0]]]))


def test_values_by_hand():
    views = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]]])
    assert alignment.augmentation_robust_loss(views) == 25
    assert alignment.alignment_loss(views) == pytest.approx((25 + 1 + 18) / 3)


@losses
def test_zero_views_have_no_gradient_when_normalised(loss):
    views = torch.randn(33, 3, 24)
    views[3] = 0
    out = differentiate(lambda views: getattr(alignment, loss)(views, normalize=True), {"views": views})
    assert not out.gradients["views"][3].any()
    assert out.gradients["views"][4].any()


@losses
def test_nan_and_infinity_are_not_hidden(loss):
    for view in range(4):
        for bad in (math.nan, math.inf):
            views = torch.randn(5, 4, 24)
            views[2, view, 7] = bad
            value = getattr(alignment, loss)(views)
            assert not value.isfinite()
            assert value.isnan() or bad == math.inf
            assert getattr(alignment, loss)(views, normalize=True).isnan()


@losses
def test_order_is_irrelevant(loss):
    """Of the samples and of the views."""
    views = torch.randn(33, 4, 24).double()
    value = getattr(alignment, loss)(views)
    assert_matches(getattr(alignment, loss)(views[torch.randperm(33)][:, torch.randperm(4)]), value, torch.float64)


@losses
def test_inputs_stay_as_they_were_and_bits_repeat(loss, poison):
    views = torch.randn(33, 4, 24)
    before = views.clone()
    first, again, strided = (
        differentiate(lambda views: getattr(alignment, loss)(views), {"views": x})
        for x in (views, views, views.transpose(0, 2).contiguous().transpose(0, 2))
    )
    assert torch.equal(views, before)
    assert torch.equal(first.value, again.value)
    assert torch.equal(first.gradients["views"], again.gradients["views"])
    assert_outcomes_match(strided, first, torch.float32)


@losses
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "unit"])
def test_gradcheck(loss, normalize):
    """First and second derivatives."""
    views = torch.randn(4, 3, 5).double().requires_grad_()

    def function(views):
        return getattr(alignment, loss)(views, normalize=normalize, reduction="none")

    assert torch.autograd.gradcheck(function, views)
    assert torch.autograd.gradgradcheck(function, views)


@losses
def test_autocast_rounds_the_features_only(loss):
    views = torch.randn(33, 4, 24)
    with torch.autocast("cpu", torch.bfloat16):
        value = getattr(alignment, loss)(views)
    assert value.dtype == torch.float32
    assert_matches(value, getattr(reference, loss)(views.bfloat16().double()), torch.float32)


@pytest.mark.parametrize(
    ("module", "loss"), [(AlignmentLoss, "alignment_loss"), (AugmentationRobustLoss, "augmentation_robust_loss")]
)
def test_module_is_its_function(module, loss):
    views, weight = torch.randn(12, 3, 16), torch.rand(12)
    held = module(normalize=True, reduction="sum")
    expected = getattr(alignment, loss)(views, normalize=True, reduction="sum", weight=weight)
    assert torch.equal(held(views, weight=weight), expected)
    assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(held)))(views, weight=weight), expected)
    assert "normalize=True" in repr(held)
    with pytest.raises(TypeError, match="tau"):
        module(tau=0.1)


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
@losses
def test_bad_input(loss, name):
    views, options, error, message = BAD[name]
    with pytest.raises(error) as caught:
        getattr(alignment, loss)(views, **options)
    assert message in str(caught.value)
