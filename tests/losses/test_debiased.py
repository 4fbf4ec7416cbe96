"""The debiased loss as a limit; tests/losses/test_hard_negative.py has what it shares with the hard-negative loss."""

import pytest
import torch

import contrastive_kernels as ck
from tests.support.losses import assert_module_is_function
from tests.support.testing import BAND, assert_matches, assert_outcomes_match, device_of, differentiate

SHAPE = (65, 24)


def views(backend, shape=SHAPE):
    return {name: torch.randn(shape, device=device_of(backend)) for name in ("z0", "z1")}


def test_debiased_is_hard_negative_without_concentration(backend):
    """I1 debiasing limits: beta = 0, and the limit of a small concentration."""
    z = views(backend)
    options = dict(temperature=0.3, tau_plus=0.2, cutoff=0.3, backend=backend)
    first = differentiate(lambda **z: ck.debiased_loss(**z, **options), z)
    second = differentiate(lambda **z: ck.hard_negative_loss(**z, beta=0.0, **options), z)
    assert_outcomes_match(first, second, torch.float32)
    assert_matches(ck.hard_negative_loss(**z, beta=1e-4, **options), second.value, torch.float32, scale=100)


@pytest.mark.parametrize("options", [{}, {"cutoff": 0.2}, {"polarization": BAND}], ids=["plain", "cutoff", "band"])
def test_unbiased_is_nt_xent(options, backend):
    """I1 debiasing limits: tau_plus = 0 and no row on the floor."""
    z = views(backend)
    options = {**options, "temperature": 0.5, "reduction": "none", "backend": backend}
    expected = differentiate(lambda **z: ck.nt_xent_loss(**z, **options), z)
    unbiased = differentiate(lambda **z: ck.debiased_loss(**z, tau_plus=0.0, **options), z)
    assert_outcomes_match(unbiased, expected, torch.float32, 1.0)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.3, "tau_plus": 0.05}, {"logit_scale": 4.0, "reduction": "none"}],
    ids=["mean", "none"],
)
@pytest.mark.parametrize("with_ids", [False, True], ids=["all", "ids"])
def test_module_is_its_function(with_ids, options, backend):
    inputs = tuple(views(backend, (12, 8)).values())
    ids = {"ids": torch.arange(12, device=inputs[0].device) // 2} if with_ids else {}
    assert_module_is_function(ck.DebiasedLoss, ck.debiased_loss, inputs, options, backend, **ids)
