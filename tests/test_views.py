"""ArCL and its MoCo form: values, gradients and options against the reference."""

import math

import pytest
import torch
from testing import (
    VIEWS,
    assert_outcomes_match,
    case_params,
    check,
    check_statistics,
    device_of,
    differentiate,
    grid_params,
    matching_ids,
    option_params,
    supports,
)

import contrastive_kernels as ck

SHAPE = (65, 129, 24)
OPTIONS = (
    "mean",
    "sum",
    "float scale",
    "tensor scale",
    "tensor temperature",
    "negative scale",
    "other rows",
    "weight",
    "weight, none",
    "ids",
    "cutoff",
    "cutoff per anchor",
    "cutoff margin",
)


@pytest.mark.parametrize(("shape", "dtype"), grid_params())
@pytest.mark.parametrize("case", case_params(VIEWS))
def test_loss_and_gradients(case, shape, dtype, backend, poison):
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    # on a line all similarities are 1 and -1: ties, which rounding decides
    check(case, (*shape[:2], max(shape[2], 2)), dtype, backend, reduction="none")


@pytest.mark.parametrize(("case", "options"), option_params(VIEWS, OPTIONS))
def test_options(case, options, backend, poison):
    check(case, SHAPE, torch.float32, backend, **options(case, *SHAPE[:2]))


@pytest.mark.parametrize("case", case_params(VIEWS))
def test_statistics(case, backend, poison):
    check_statistics(case, SHAPE, torch.float32, backend)
    check_statistics(case, SHAPE, torch.float32, backend, reduction="none", **matching_ids(case, *SHAPE[:2]))


@pytest.mark.parametrize("case", case_params(VIEWS))
def test_nan_and_infinity_give_nan(case, backend):
    for bad in (math.nan, math.inf):
        for name in case.shapes(*SHAPE):
            features = case.features(SHAPE, torch.float32, device_of(backend))
            features[name].reshape(-1)[7] = bad
            assert case(ck, features, backend=backend).isnan(), f"{bad} in {name}"


@pytest.mark.parametrize("case", case_params(VIEWS))
def test_zero_views_have_zero_gradients(case, backend):
    features = case.features(SHAPE, torch.float32, device_of(backend))
    for x in features.values():
        x[3] = 0
    out = differentiate(lambda **t: case(ck, t, reduction="none", backend=backend), features)
    assert out.value.isfinite().all()
    for gradient in out.gradients.values():
        if gradient is not None:
            assert gradient.isfinite().all()
            assert not gradient[3].any()
            assert gradient[4].any()


@pytest.mark.parametrize("case", case_params(VIEWS))
def test_inputs_stay_as_they_were_and_bits_repeat(case, backend, poison):
    features = case.features(SHAPE, torch.float32, device_of(backend))
    before = {k: v.clone() for k, v in features.items()}
    strided = {k: v.transpose(0, -1).contiguous().transpose(0, -1) for k, v in features.items()}

    def run(features):
        return differentiate(lambda **t: case(ck, t, backend=backend), features)

    first, again = run(features), run(features)
    assert all(torch.equal(before[k], features[k]) for k in features)
    assert torch.equal(first.value, again.value)
    for name, gradient in first.gradients.items():
        assert gradient is None or torch.equal(gradient, again.gradients[name])
    # the norms are summed in another order there
    assert_outcomes_match(run(strided), first, torch.float32, 1.0)


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
def test_lone_sample_has_nothing_in_a_denominator_without_the_positive(label_smoothing, backend):
    """Loss 0 and gradient 0, smoothed or not; a NaN is not hidden."""
    views = torch.randn(1, 3, 8, device=device_of(backend), requires_grad=True)
    options = {"denominator": "one_view", "label_smoothing": label_smoothing, "backend": backend}
    loss = ck.arcl_loss(views, **options)
    loss.backward()
    assert loss == 0
    assert not views.grad.any()
    assert ck.arcl_loss(views * torch.nan, **options).isnan()
