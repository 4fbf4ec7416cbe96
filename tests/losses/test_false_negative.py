"""False-negative cancellation: thresholds, ties, the limits; test_every_loss.py has the rest."""

import math

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
import python_ref
from tests.support.losses import assert_module_is_function, assert_refused
from tests.support.testing import assert_matches, assert_outcomes_match, check, device_of, differentiate, precise
from tests.support.variants import EVERY

NAMES = [name for name, case in EVERY.items() if case.loss == "false_negative_loss"]


@pytest.mark.parametrize("name", ["false_negative-both_rules", "false_negative-attract-threshold"])
def test_a_threshold_per_anchor(name, backend):
    threshold = torch.linspace(-0.2, 0.4, 130, dtype=torch.float64)
    ours, _ = check(EVERY[name], (65, 129, 24), torch.float32, backend, threshold=threshold, reduction="none")
    assert ours.gradients["threshold"] is None


@pytest.mark.parametrize("name", NAMES)
def test_one_sample_loses_nothing(name, backend, poison):
    """No candidates: loss 0, gradient 0."""
    case = EVERY[name]
    # three views of one sample would still meet each other
    tensors = {
        k: x[:, :2] if x.dim() == 3 else x
        for k, x in case.features((1, 1, 24), torch.float32, device_of(backend)).items()
    }
    out = differentiate(lambda **t: case(ck, t, normalize=True, backend=backend), tensors)
    assert out.value == 0
    assert not any(g.nan_to_num(1.0).any() for g in out.gradients.values())


@pytest.mark.parametrize("mode", ["eliminate", "attract"])
@pytest.mark.parametrize("top_k", [3, None])
def test_nothing_flagged_is_nt_xent_times_the_factor(mode, top_k, backend):
    dtype = precise(backend)
    for views in (2, 4):
        z = torch.randn(33, views, 24, dtype=dtype, device=device_of(backend))
        options = {"temperature": 0.1, "reduction": "none", "backend": backend}
        plain = ck.nt_xent_loss(z, **options)
        loss = ck.false_negative_loss(z, mode=mode, threshold=1.5, top_k=top_k, **options)
        assert_matches(loss, 2 * plain, dtype, scale=20.0)
        loss = ck.false_negative_loss(z, mode=mode, threshold=1.5, top_k=top_k, factor=1.0, **options)
        assert_matches(loss, plain, dtype, scale=20.0)


@pytest.mark.parametrize(
    "options",
    [{"threshold": -1.5, "top_k": None}, {"threshold": None, "top_k": 64}, {"threshold": -1.5, "top_k": 99}],
    ids=str,
)
def test_everything_eliminated_loses_nothing(options, backend, poison):
    """Two views, every negative flagged: the positive is alone."""
    z0, z1 = torch.randn(2, 33, 24, device=device_of(backend))
    out = differentiate(
        lambda **t: ck.false_negative_loss(**t, **options, reduction="none", backend=backend), {"z0": z0, "z1": z1}
    )
    assert not out.value.nan_to_num(1.0).any()
    assert not any(g.nan_to_num(1.0).any() for g in out.gradients.values())


@pytest.mark.parametrize("d", [24, 200])
def test_equals_at_the_boundary_are_all_flagged(d, backend):
    """Three copies of each sample: four rows as similar to an anchor as its other view, however they are rounded."""
    key = F.normalize(torch.randn(65, d, device=device_of(backend)), dim=-1)
    z = key[:21].repeat(3, 1)
    options = dict(threshold=None, normalize=False, backend=backend)
    loss = ck.false_negative_loss(z, z.clone(), top_k=2, **options)
    torch.testing.assert_close(loss, 2 * ck.nt_xent_loss(z, z.clone(), normalize=False, backend=backend))
    assert ck.false_negative_loss(z, z.clone(), top_k=4, **options) < 0.99 * loss


@pytest.mark.parametrize("threshold", [1.0, 2.0])
@pytest.mark.parametrize(
    "name", ["false_negative-threshold", "false_negative-attract-threshold", "false_negative-attract-both_rules"]
)
def test_a_similarity_at_the_threshold_is_not_above_it(name, threshold, backend):
    """Small integers: many similarities are the threshold exactly, and those above it tie."""
    case = EVERY[name]
    tensors = {k: torch.randint(-1, 2, (33, 4)).float() for k in ("z0", "z1")}
    options = {"threshold": threshold, "temperature": 5.0, "normalize": False, "reduction": "none"}
    ours = differentiate(
        lambda **t: case(ck, t, **options, backend=backend), {k: x.to(device_of(backend)) for k, x in tensors.items()}
    )
    reference = differentiate(lambda **t: case(python_ref, t, **options), {k: x.double() for k, x in tensors.items()})
    assert_outcomes_match(ours, reference, torch.float32, 20.0)


def test_attraction_takes_the_lower_of_equals(backend):
    """Samples 1, 2 and 3 are one point, the next one for sample 0: one of them is attracted."""
    axes = torch.eye(4, device=device_of(backend))
    points = torch.stack([axes[0], *[(axes[0] + axes[1]) / math.sqrt(2)] * 3])
    options = dict(mode="attract", threshold=0.5, top_k=1, normalize=False, reduction="none")
    losses = ck.false_negative_loss(points, -points, **options, backend=backend)
    wide = points.double().cpu()
    assert_matches(losses, python_ref.false_negative_loss(wide, -wide, **options), torch.float32, scale=4.0)


def test_module_is_its_function(backend):
    inputs = torch.randn(2, 12, 16, device=device_of(backend)).unbind(0)
    options = {"temperature": 0.2, "threshold": 0.1, "mode": "attract"}
    assert_module_is_function(ck.FalseNegativeLoss, ck.false_negative_loss, inputs, options, backend)


X = torch.randn(8, 16)


def cancel(**options):
    return ck.false_negative_loss(X, X, **options)


BAD = {
    "mode": (lambda: cancel(mode="ignore"), ValueError, "mode 'ignore' is unknown"),
    "no rule": (lambda: cancel(threshold=None, top_k=None), ValueError, "threshold and top_k are both None"),
    "top_k of nothing": (lambda: cancel(top_k=0), ValueError, "top_k 0 must be at least 1"),
    "top_k of a float": (lambda: cancel(top_k=1.5), TypeError, "top_k must be an integer"),
    "threshold per sample": (lambda: cancel(threshold=X[:, 0]), ValueError, "threshold (8,) must have shape (16,)"),
    "factor": (lambda: cancel(factor="two"), TypeError, "factor must be a number"),
    "ids": (lambda: cancel(ids=torch.zeros(8)), TypeError, "ids has dtype torch.float32"),
    "views differ": (
        lambda: ck.false_negative_loss(X, X[:7]),
        ValueError,
        "z0 (8, 16) and z1 (7, 16) must have the same first dimension",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    assert_refused(*BAD[name])
