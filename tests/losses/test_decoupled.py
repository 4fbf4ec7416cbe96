"""The decoupled loss: its weights of positives; test_every_loss.py has what it shares with the other losses."""

import math

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
import python_ref
from tests.support.losses import assert_exact, assert_module_is_function, assert_refused
from tests.support.testing import assert_outcomes_match, check, device_of, differentiate
from tests.support.variants import EVERY, mises_fisher

SHAPE = (65, 129, 24)
CASE = EVERY["decoupled"]


def views(backend):
    return CASE.features(SHAPE, torch.float32, device_of(backend))


def test_decoupled_is_nt_xent_without_its_softplus(backend):
    """log(1 + e^x) of the decoupled loss x is NT-Xent."""
    z = views(backend)
    losses = ck.decoupled_loss(**z, temperature=0.3, reduction="none", backend=backend)
    expected = ck.nt_xent_loss(**z, temperature=0.3, reduction="none", backend=backend)
    torch.testing.assert_close(losses.exp().log1p(), expected, rtol=1e-5, atol=1e-6)


def test_positive_weight_as_a_tensor_and_as_a_callable(backend):
    """Weights are of unit views and have no gradient; 1 is none at all."""
    z = views(backend)
    weights = mises_fisher(*(F.normalize(x, dim=1) for x in z.values()))
    options = dict(reduction="none", backend=backend)
    called = differentiate(lambda **z: ck.decoupled_loss(**z, positive_weight=mises_fisher, **options), z)
    given = differentiate(lambda **z: ck.decoupled_loss(**z, positive_weight=weights, **options), z)
    assert_outcomes_match(called, given, torch.float32, 10.0)
    plain = differentiate(lambda **z: ck.decoupled_loss(**z, **options), z)
    ones = differentiate(lambda **z: ck.decoupled_loss(**z, positive_weight=torch.ones_like(weights), **options), z)
    assert_outcomes_match(ones, plain, torch.float32)
    assert not torch.allclose(called.value, plain.value)
    check(CASE, SHAPE, torch.float32, backend, positive_weight=torch.rand(65).double(), label_smoothing=0.1)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.3, "label_smoothing": 0.1}, {"positive_weight": mises_fisher, "reduction": "none"}],
    ids=["plain", "weighted"],
)
@pytest.mark.parametrize("with_ids", [False, True], ids=["all", "ids"])
def test_module_is_its_function(with_ids, options, backend):
    inputs = torch.randn(2, 12, 8, device=device_of(backend)).unbind()
    ids = {"ids": torch.arange(12, device=inputs[0].device) // 2} if with_ids else {}
    assert_module_is_function(ck.DecoupledLoss, ck.decoupled_loss, inputs, options, backend, **ids)


X = torch.ones(8, 16)


def decoupled(**options):
    return ck.decoupled_loss(X, X, **options)


BAD = {
    "rows": (lambda: ck.decoupled_loss(X, X[:7]), ValueError, "z0 (8, 16) and z1 (7, 16) must have the same"),
    "empty": (lambda: ck.decoupled_loss(X[:0], X[:0]), ValueError, "z0 (0, 16) is an empty batch"),
    "dtypes": (lambda: ck.decoupled_loss(X, X.double()), TypeError, "z0 is torch.float32 and z1"),
    "weight too long": (
        lambda: decoupled(positive_weight=torch.ones(16)),
        ValueError,
        "positive_weight (16,) must have shape (8,)",
    ),
    "weight too short": (
        lambda: decoupled(positive_weight=lambda z0, z1: z0[:7, 0]),
        ValueError,
        "positive_weight (7,) must have shape (8,)",
    ),
    "weight a number": (lambda: decoupled(positive_weight=2.0), TypeError, "positive_weight must be a ten"),
    "smoothing": (lambda: decoupled(label_smoothing=2), ValueError, "label_smoothing 2"),
    "both cutoffs": (lambda: decoupled(cutoff=0.1, cutoff_margin=0.1), ValueError, "cutoff and cutoff_m"),
    "temperature": (lambda: decoupled(temperature=0.0), ValueError, "temperature 0.0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    assert_refused(*BAD[name])


def test_reference_by_hand():
    """Two orthogonal pairs at T = 1."""
    eye = torch.eye(2).double()
    assert_exact(python_ref.decoupled_loss(eye, eye, temperature=1.0), math.log(2) - 1)


def test_reference_is_nt_xent_without_the_positive():
    z0, z1 = torch.randn(2, 9, 5).double()
    z = F.normalize(torch.cat([z0, z1]))
    logits = z @ z.T / 0.1
    positive = torch.cat([logits.diagonal(9), logits.diagonal(-9)])
    sample = torch.arange(18) % 9
    expected = logits.masked_fill(sample[:, None] == sample, -math.inf).logsumexp(1) - positive
    torch.testing.assert_close(python_ref.decoupled_loss(z0, z1, reduction="none"), expected)
