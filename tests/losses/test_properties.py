"""Identities that hold for every batch, searched for a counter-example."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import contrastive_kernels as ck
from tests.support.testing import (
    CASES,
    POLARIZED,
    SOFTMAX,
    VIEWS,
    assert_matches,
    backends,
    case_params,
    device_of,
    precise,
)

pytestmark = pytest.mark.parametrize("backend", backends())

seeds = st.integers(0, 2**31 - 1)
rows, dims = st.integers(2, 24), st.integers(2, 16)
temperatures = st.floats(0.05, 4.0).map(lambda t: round(t, 3))

search = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def drawn(case, backend, seed, n, d):
    """Return features of that shape with M = N + 3."""
    torch.manual_seed(seed)
    return case.features((n, n + 3, d), precise(backend), device_of(backend))


def scale_option(case, temperature):
    return {"logit_scale": 1 / temperature}


def close(ours, expected, scale=1.0):
    assert_matches(ours.detach(), expected.detach(), ours.dtype, scale=scale)


@pytest.mark.parametrize("case", case_params(CASES))
@given(seed=seeds, n=rows, d=dims, temperature=temperatures)
@search
def test_order_of_instances_is_irrelevant(case, backend, seed, n, d, temperature):
    """I17 permutation: of the samples, and of the queue or the shared negatives on their own."""
    features = drawn(case, backend, seed, n, d)
    order = {length: torch.randperm(length).to(device_of(backend)) for length in {len(x) for x in features.values()}}
    shuffled = {name: x[order[len(x)]] for name, x in features.items()}
    option = scale_option(case, temperature)
    first, second = case(ck, features, **option, backend=backend), case(ck, shuffled, **option, backend=backend)
    close(first, second, scale=1 / temperature)


@given(seed=seeds, n=rows, d=dims, temperature=temperatures)
@search
def test_arcl_of_two_views_is_half_of_nt_xent(backend, seed, n, d, temperature):
    """I3 ArCL limits: "two_view" of two views."""
    torch.manual_seed(seed)
    views = torch.randn(n, 2, d, dtype=precise(backend), device=device_of(backend))
    z0, z1 = views.unbind(1)
    both = ck.nt_xent_loss(z0, z1, temperature=temperature, reduction="none", backend=backend)
    for positive in ("min", "mean"):
        one = ck.arcl_loss(views, temperature=temperature, positive=positive, reduction="none", backend=backend)
        close(one, both[:n], scale=1 / temperature)


@given(seed=seeds, n=rows, d=dims, temperature=temperatures)
@search
def test_two_towers_in_three_spellings(backend, seed, n, d, temperature):
    """CLIP, symmetric InfoNCE, the mean of InfoNCE in both directions; I4 constant factors: sum_directions."""
    torch.manual_seed(seed)
    x, y = torch.randn(2, n, d, dtype=precise(backend), device=device_of(backend))
    options = {"temperature": temperature, "backend": backend}
    clip = ck.clip_loss(x, y, 1 / temperature, normalize=True, backend=backend)
    close(ck.info_nce_loss(x, y, symmetric=True, **options), clip, 1 / temperature)
    close((ck.info_nce_loss(x, y, **options) + ck.info_nce_loss(y, x, **options)) / 2, clip, 1 / temperature)
    twice = ck.nt_xent_loss(x, y, reduction="sum_directions", **options)
    close(twice, 2 * ck.nt_xent_loss(x, y, **options), 1 / temperature)


@pytest.mark.parametrize("case", case_params({**SOFTMAX, **VIEWS}))
@given(seed=seeds, n=rows, d=dims, scale=st.floats(0.1, 8.0))
@search
def test_scale_gradient_is_the_inner_product(case, backend, seed, n, d, scale):
    """I10 scale gradient: <X, dX> of the anchors' side, half of it where both sides are one; raw rows."""
    features = {k: v.requires_grad_() for k, v in drawn(case, backend, seed, n, d).items()}
    a = torch.tensor(scale, dtype=precise(backend), device=device_of(backend), requires_grad=True)
    loss = case(ck, features, logit_scale=a, normalize=False, backend=backend)
    da, *gradients = torch.autograd.grad(loss, (a, *features.values()), allow_unused=True)
    inner = sum((x * g).sum() for x, g in zip(features.values(), gradients, strict=True) if g is not None)
    # every similarity is linear in each of its two operands, or in the one that is not detached
    operands = 1 if case.detached else 2
    close(a * da, inner / operands, scale=10 * scale * d)


@given(seed=seeds, n=rows, d=dims)
@search
def test_the_inner_product_is_not_the_scale_gradient_with_polarization(backend, seed, n, d):
    """I10 scale gradient: the exception, for the band is in dX and depends on no scale."""
    torch.manual_seed(seed)
    z = F.normalize(torch.randn(2, n, d, dtype=precise(backend)), dim=-1).to(device_of(backend))
    z.requires_grad_()
    a = torch.ones((), dtype=z.dtype, device=z.device, requires_grad=True)

    def gradients(polarization):
        loss = ck.nt_xent_loss(*z, logit_scale=a, normalize=False, polarization=polarization, backend=backend)
        return torch.autograd.grad(loss, (a, z))

    (plain, _), (polarized, dz) = gradients(None), gradients(ck.Polarization(0.0, 1.0, weight=10.0))
    close(polarized, plain)
    distances = (1 - z[0] @ z[0].mT) / 2
    if (distances - 0.5).abs().max() > 0.05:
        assert not math.isclose((z * dz).sum().item() / 2, plain.item(), rel_tol=1e-3, abs_tol=1e-6)


@given(seed=seeds, n=st.integers(1, 24), count=st.integers(2, 5), d=dims)
@search
def test_least_similar_views_are_farthest(backend, seed, n, count, d):
    """I11 worst pair: on unit rows the squared distance is 2 - 2 s, and the worst pair is not above the mean."""
    torch.manual_seed(seed)
    views = F.normalize(torch.randn(n, count, d, dtype=precise(backend)), dim=-1).to(device_of(backend))
    least, pairs = ck.min_view_similarity(views, backend=backend)
    mean, _ = ck.min_view_similarity(views, reduce="mean", backend=backend)
    close(2 - 2 * least, torch.cdist(views, views, compute_mode="donot_use_mm_for_euclid_dist").square().amax((1, 2)))
    chosen = views.gather(1, pairs[..., None].expand(-1, -1, d))
    close(least, chosen.prod(1).sum(-1))
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert (least <= mean + 1e-6).all()
    if count == 2:
        close(least, mean)


@given(seed=seeds, n=st.integers(3, 7), size=st.integers(2, 4), d=dims)
@search
def test_polarization_of_subsets(backend, seed, n, size, d):
    """I12 band: the batch sum is a multiple of the mean over all b-subsets of their sums."""
    torch.manual_seed(seed)
    size = min(size, n)
    z = torch.randn(n, d, dtype=precise(backend), device=device_of(backend))

    def total(z):
        return ck.distance_polarization(z, lower=0.2, upper=0.8, reduction="sum", backend=backend)

    subsets = [total(z[list(s)]) for s in itertools.combinations(range(n), size)]
    close(total(z), n * (n - 1) / (size * (size - 1)) * torch.stack(subsets).mean())


@given(seed=seeds, n=rows, d=dims, lower=st.floats(0.0, 0.45), width=st.floats(0.01, 0.5))
@search
def test_polarization_vanishes_outside_the_band(backend, seed, n, d, lower, width):
    """I12 band: value and gradient are 0 exactly when no distance is inside."""
    torch.manual_seed(seed)
    z = F.normalize(torch.randn(n, d, dtype=precise(backend)), dim=-1).to(device_of(backend))
    z.requires_grad_()
    value = ck.distance_polarization(z, lower=lower, upper=lower + width, normalize=False, backend=backend)
    (gradient,) = torch.autograd.grad(value, z)
    distances = ((1 - z @ z.mT) / 2)[~torch.eye(n, dtype=torch.bool, device=z.device)]
    edge = torch.minimum((distances - lower).abs(), (distances - lower - width).abs()).min()
    if edge > 1e-6:
        inside = ((distances > lower) & (distances < lower + width)).any()
        assert bool(value > 0) == bool(inside)
        assert bool(gradient.any()) == bool(inside)


@pytest.mark.parametrize("case", case_params({**SOFTMAX, **POLARIZED, **VIEWS}))
@given(seed=seeds, n=rows, d=dims, temperature=temperatures)
@search
def test_cutoff_beyond_every_pair_is_no_cutoff(case, backend, seed, n, d, temperature):
    """I16 nothing dropped: a margin of infinity, and a threshold above 1."""
    features = drawn(case, backend, seed, n, d)
    option = scale_option(case, temperature)
    plain = case(ck, features, **option, backend=backend)
    for cutoff in ({"cutoff_margin": math.inf}, {"cutoff": 1.5}):
        close(case(ck, features, **option, **cutoff, backend=backend), plain, scale=1 / temperature)


@pytest.mark.parametrize("case", case_params({k: v for k, v in SOFTMAX.items() if k != "nt_xent-views"}))
@given(seed=seeds, n=rows, d=dims, temperature=temperatures)
@search
def test_cutoff_below_every_pair_leaves_the_positive(case, backend, seed, n, d, temperature):
    """No negative is left: the loss is 0, whatever the positive."""
    features = drawn(case, backend, seed, n, d)
    loss = case(ck, features, **scale_option(case, temperature), cutoff=-1.5, reduction="none", backend=backend)
    assert torch.equal(loss, torch.zeros_like(loss))


@pytest.mark.parametrize("case", case_params(CASES))
@given(seed=seeds, n=rows, d=dims)
@search
def test_reductions_agree(case, backend, seed, n, d):
    """The mean, sum and per-anchor values of one loss; the polarization is a mean whatever the reduction."""
    features = drawn(case, backend, seed, n, d)
    plain = {"polarization": None} if "polarization" in case.options else {}
    each, total, mean = (case(ck, features, reduction=r, **plain, backend=backend) for r in ("none", "sum", "mean"))
    close(total, each.sum(), 10.0 * each.numel())
    close(mean, each.mean(), 10.0)
