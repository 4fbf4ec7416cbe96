"""The augmentation-robust alignment: the worst pair; test_alignment.py has what it shares with the mean."""

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
from tests.support.losses import assert_module_is_function
from tests.support.testing import assert_matches


def test_loss_is_twice_one_minus_the_least_similarity():
    """I11 worst pair: on unit rows L_AR = mean(2 - 2 min s)."""
    views = F.normalize(torch.randn(33, 5, 24).double(), dim=-1)
    similarity, _ = ck.min_view_similarity(views, reduce="min", backend="torch")
    assert_matches(ck.augmentation_robust_loss(views, reduction="none"), 2 - 2 * similarity, torch.float64, scale=1.0)


@pytest.mark.parametrize("v", [2, 3, 6])
def test_the_worst_pair_is_no_better_than_the_mean(v):
    """I11 worst pair: L_AR >= L_align, with equality for two views."""
    views = torch.randn(33, v, 24).double()
    robust = ck.augmentation_robust_loss(views, reduction="none")
    mean = ck.alignment_loss(views, reduction="none")
    assert (robust >= mean * (1 - 1e-12)).all()
    if v == 2:
        assert_matches(robust, mean, torch.float64)
        assert_matches(mean, (views[:, 0] - views[:, 1]).square().sum(1), torch.float64)
    else:
        assert (robust > mean).all()


def test_the_whole_gradient_goes_to_the_first_farthest_pair():
    """Three corners of a regular triangle: all pairs tie, the first one is (0, 1)."""
    views = torch.eye(3)[None].requires_grad_()
    ck.augmentation_robust_loss(views).backward()
    torch.testing.assert_close(views.grad, torch.tensor([[[2.0, -2.0, 0.0], [-2.0, 2.0, 0.0], [0.0, 0.0, 0.0]]]))


def test_values_by_hand():
    assert ck.augmentation_robust_loss(torch.tensor([[[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]]])) == 25


def test_module_is_its_function():
    options = {"normalize": True, "reduction": "sum"}
    views, weight = torch.randn(12, 3, 16), torch.rand(12)
    assert_module_is_function(ck.AugmentationRobustLoss, ck.augmentation_robust_loss, (views,), options, weight=weight)
