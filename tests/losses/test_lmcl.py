"""LMCL: the distance polarization inside other losses, by their argument and by the module."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
import python_ref
from tests.support.losses import assert_exact, double
from tests.support.testing import POLARIZED, assert_matches, case_params, device_of

SHAPE = (65, 129, 24)
BASES = {
    "nt_xent": ck.nt_xent_loss,
    "info_nce": ck.info_nce_loss,
    "quick_thoughts": ck.quick_thoughts_loss,
    "debiased": ck.debiased_loss,
    "hard_negative": ck.hard_negative_loss,
}
every_base = pytest.mark.parametrize("base", BASES)


def two(backend, *shape):
    return torch.randn(2, *(shape or SHAPE[::2]), device=device_of(backend)).unbind(0)


@pytest.mark.parametrize("case", case_params(POLARIZED))
def test_the_fused_term_is_the_separate_one(case, backend):
    """Weight times distance_polarization over the loss's negatives, whatever the temperature."""
    n = SHAPE[0]
    features = case.features(SHAPE, torch.float32, device_of(backend))
    plain = case(ck, features, polarization=None, backend=backend)
    strong = ck.Polarization(0.1, 0.5, weight=5.0)
    extra = case(ck, features, polarization=strong, backend=backend) - plain
    if case.loss == "nt_xent_loss":
        ids = torch.arange(n, device=extra.device).repeat(2)
        alone = ck.distance_polarization(torch.cat(list(features.values())), ids, backend=backend)
        torch.testing.assert_close(extra, 5 * alone, rtol=1e-4, atol=1e-6)
    warm = case(ck, features, polarization=strong, temperature=10.0, backend=backend)
    torch.testing.assert_close(
        warm - case(ck, features, polarization=None, temperature=10.0, backend=backend), extra, rtol=1e-4, atol=1e-6
    )


def test_the_temperature_gradient_is_that_of_the_loss_alone(backend):
    """I10 scale gradient: the band is a function of the unscaled similarity, which <X, dX> / a would count."""
    z0, z1 = two(backend)

    def gradient(polarization):
        scale = torch.tensor(3.0, device=z0.device, requires_grad=True)
        ck.nt_xent_loss(z0, z1, logit_scale=scale, polarization=polarization, backend=backend).backward()
        return scale.grad

    torch.testing.assert_close(gradient(ck.Polarization(weight=100.0)), gradient(None), rtol=1e-5, atol=1e-6)


# The module


@every_base
def test_module_is_the_polarized_base(base, backend):
    inputs = two(backend)
    loss = ck.LMCLLoss(base, lower=0.2, upper=0.7, weight=2.0, temperature=0.3, backend=backend)
    band = ck.Polarization(0.2, 0.7, 2.0)
    assert torch.equal(loss(*inputs), BASES[base](*inputs, temperature=0.3, polarization=band, backend=backend))


@pytest.mark.parametrize("base", ["debiased", "hard_negative"])
def test_module_adds_the_separate_term(base, backend):
    z = two(backend)
    loss = ck.LMCLLoss(base, lower=0.2, upper=0.7, weight=2.0, temperature=0.3, backend=backend)(*z)
    ids = torch.arange(len(z[0]), device=loss.device).repeat(2)
    alone = ck.distance_polarization(torch.cat(z), ids, lower=0.2, upper=0.7, backend=backend)
    torch.testing.assert_close(
        loss - BASES[base](*z, temperature=0.3, backend=backend), 2 * alone, rtol=1e-4, atol=1e-6
    )


@every_base
def test_module_against_the_reference(base, backend):
    """In float64, where the polarization counts."""
    inputs = two(backend)
    wide = [x.cpu().double() for x in inputs]
    expected = python_ref.lmcl_loss(*wide, base, lower=0.2, upper=0.7, weight=2.0, temperature=0.3)
    assert expected > getattr(python_ref, f"{base}_loss")(*wide, temperature=0.3)
    loss = ck.LMCLLoss(base, lower=0.2, upper=0.7, weight=2.0, temperature=0.3, backend=backend)
    assert_matches(loss(*inputs), expected, torch.float32, scale=20.0)


def test_module_takes_the_options_of_its_base(backend):
    inputs = two(backend, 12, 8)
    options = {"context_size": 2, "lower": 0.2, "upper": 0.7, "weight": 2.0}
    loss = ck.LMCLLoss("quick_thoughts", **options, backend=backend)
    band = ck.Polarization(0.2, 0.7, 2.0)
    expected = ck.quick_thoughts_loss(*inputs, context_size=2, polarization=band, backend=backend)
    assert torch.equal(loss(*inputs), expected)
    assert expected > ck.quick_thoughts_loss(*inputs, context_size=2, backend=backend)


def test_module_is_nt_xent_by_default():
    inputs = two("torch")
    torch.testing.assert_close(ck.LMCLLoss()(*inputs), ck.nt_xent_loss(*inputs, polarization=ck.Polarization()))


def test_an_unknown_base_is_refused_at_construction():
    with pytest.raises(ValueError, match="base 'clip' is unknown"):
        ck.LMCLLoss("clip")


# The reference


@double
def test_reference_argument_adds_the_mean_over_negatives():
    """NT-Xent's negatives are the pairs of different instances."""
    z0, z1 = torch.randn(2, 6, 4)
    polarization = SimpleNamespace(lower=0.2, upper=0.7, weight=3.0)
    extra = python_ref.nt_xent_loss(z0, z1, polarization=polarization) - python_ref.nt_xent_loss(z0, z1)
    alone = python_ref.distance_polarization(torch.cat([z0, z1]), torch.arange(6).repeat(2), lower=0.2, upper=0.7)
    assert alone > 0
    assert_exact(extra, 3 * alone)


@double
@every_base
def test_reference_adds_the_mean_over_negatives(base):
    """The negatives are pairs of x and y for InfoNCE and Quick-Thoughts, of all rows for the others."""
    x, y = torch.randn(2, 6, 4)
    band = {"lower": 0.2, "upper": 0.7}
    extra = python_ref.lmcl_loss(x, y, base, **band, weight=3.0, temperature=0.4)
    extra = extra - getattr(python_ref, f"{base}_loss")(x, y, temperature=0.4)
    if base in ("info_nce", "quick_thoughts"):
        distance = (1 - F.normalize(x) @ F.normalize(y).T) / 2
        h = ((distance - 0.2) * (0.7 - distance)).relu()
        index = torch.arange(6)
        negative = (index[:, None] - index).abs() > (1 if base == "quick_thoughts" else 0)
        mean = h[negative].mean()
    else:
        mean = python_ref.distance_polarization(torch.cat([x, y]), torch.arange(6).repeat(2), **band)
    assert mean > 0
    assert_exact(extra, 3 * mean)


@double
def test_reference_is_polarized_nt_xent_by_default():
    x, y = torch.randn(2, 6, 4)
    polarization = SimpleNamespace(lower=0.1, upper=0.5, weight=0.1)
    polarized = python_ref.nt_xent_loss(x, y, polarization=polarization)
    assert python_ref.lmcl_loss(x, y) == polarized != python_ref.nt_xent_loss(x, y)
