"""ArCL: ties, single samples; tests/losses/test_every_loss.py has what the loss shares with the others."""

import math

import pytest
import torch

import contrastive_kernels as ck
import python_ref
from tests.support.losses import assert_exact, assert_module_is_function, double
from tests.support.testing import device_of, differentiate


def test_the_whole_gradient_goes_to_the_first_worst_pair(backend):
    """Three orthogonal views: all pairs tie, and only the first one is pulled together."""
    views = torch.eye(4, device=device_of(backend))[:3].repeat(1, 1, 1).requires_grad_()
    ck.arcl_loss(views, temperature=1.0, denominator="positive+one_view", reduction="sum", backend=backend).backward()
    assert not views.grad.any()  # no negatives: the positive is the whole denominator
    ck.arcl_loss(views, temperature=1.0, reduction="sum", backend=backend).backward()
    # two_view, N = 1: (s12 - s+) / T with s+ the pair (0, 1) itself
    assert not views.grad.any()
    views = torch.stack([torch.eye(4)[:3], torch.eye(4)[:3].flip(0)]).to(device_of(backend)).requires_grad_()
    ck.arcl_loss(views, temperature=1.0, denominator="one_view", reduction="sum", backend=backend).backward()
    # no third view is in the denominator, nor in the pair that won the tie
    assert not views.grad[:, 2].any()
    assert views.grad[:, 1].any()


@pytest.mark.parametrize("denominator", ["one_view", "positive+one_view", "positive+two_view"])
def test_one_sample_loses_nothing(denominator, backend, poison):
    views = torch.randn(1, 4, 24, device=device_of(backend))
    out = differentiate(lambda views: ck.arcl_loss(views, denominator=denominator, backend=backend), {"views": views})
    assert out.value == 0
    assert not out.gradients["views"].nan_to_num(1.0).any()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_one_sample_in_a_denominator_without_the_positive(label_smoothing, backend):
    """Loss 0 and gradient 0, smoothed or not; a NaN is not hidden."""
    views = torch.randn(1, 3, 8, device=device_of(backend), requires_grad=True)
    options = {"denominator": "one_view", "label_smoothing": label_smoothing, "backend": backend}
    loss = ck.arcl_loss(views, **options)
    loss.backward()
    assert loss == 0
    assert not views.grad.any()
    assert ck.arcl_loss(views * torch.nan, **options).isnan()


def test_module_is_its_function(backend):
    views = torch.randn(12, 4, 16, device=device_of(backend))
    assert_module_is_function(ck.ArCLLoss, ck.arcl_loss, (views,), {"denominator": "one_view"}, backend)


@double
@pytest.mark.parametrize(
    ("denominator", "expected"),
    # view 1 = (1,0), (0,1); view 2 = view 1; view 3 of sample 0 at cosine 0.6, so s+ = 0.6 and 1
    [
        ("two_view", math.log(math.e + 2) - 0.8),
        ("one_view", math.log(1) - 0.8),
        ("positive+one_view", (math.log(math.exp(0.6) + 1) - 0.6 + math.log(math.e + 1) - 1) / 2),
        ("positive+two_view", (math.log(math.exp(0.6) + 2) - 0.6 + math.log(math.e + 2) - 1) / 2),
    ],
)
def test_reference_by_hand(denominator, expected):
    views = torch.eye(2)[:, None].repeat(1, 3, 1)
    views[0, 2] = torch.tensor([0.6, 0.8])
    assert_exact(python_ref.arcl_loss(views, temperature=1.0, denominator=denominator), expected)


@double
def test_reference_of_two_views_is_half_of_nt_xent():
    """I3 ArCL limits: of the reference; test_properties.py has ours."""
    views = torch.randn(5, 2, 4)
    rows = python_ref.nt_xent_loss(*views.unbind(1), reduction="none")
    assert_exact(python_ref.arcl_loss(views, reduction="none"), rows[:5])
    assert_exact(python_ref.arcl_loss(views, positive="mean", reduction="none"), rows[:5])
