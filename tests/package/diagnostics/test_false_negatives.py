"""The softmax mass on false negatives against the dense softmax, and at the edges."""

import math

import pytest
import torch
import torch.nn.functional as F

from contrastive_kernels import diagnostics as dg
from tests.support.diagnostics import close, labelled
from tests.support.testing import device_of, precise


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_false_negative_mass(temperature, backend):
    """I20 diagnostics: two log-sum-exps give the masked sum over the softmax."""
    dtype = precise(backend)
    x, labels = labelled(33)
    z0, z1 = x.to(dtype), (x + 0.5 * torch.randn_like(x)).to(dtype)
    device = device_of(backend)
    found = dg.false_negative_mass(
        z0.to(device), z1.to(device), labels.to(device), temperature=temperature, backend=backend
    )
    z = F.normalize(torch.cat([z0, z1]).double())
    logits = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    instance, doubled = torch.arange(33).repeat(2), labels.repeat(2)
    negatives = instance[:, None] != instance
    false = negatives & (doubled[:, None] == doubled) & (doubled >= 0)
    p = logits.softmax(1)
    mass = (p * false).sum(1)
    rtol = 1e-9 if dtype == torch.float64 else 1e-4
    close(found.mass, mass, rtol, 1e-2 * rtol)
    close(found.share, mass / (p * negatives).sum(1), rtol, 1e-2 * rtol)
    assert (found.mass[labels.repeat(2) < 0] == 0).all() and (found.mass > 0).any()


def test_false_negative_mass_at_the_edges(backend):
    device = device_of(backend)
    z = torch.randn(4, 3, device=device)
    one = dg.false_negative_mass(z[:1], z[:1], torch.zeros(1, dtype=torch.int64, device=device), backend=backend)
    assert one.mass.tolist() == one.share.tolist() == [0, 0]
    same = dg.false_negative_mass(z, z, torch.zeros(4, dtype=torch.int64, device=device), backend=backend)
    assert (same.share == 1).all() and ((same.mass > 0) & (same.mass < 1)).all()
    z[1, 1] = torch.nan
    classes = torch.zeros(4, dtype=torch.int64, device=device)
    assert dg.false_negative_mass(z, z, classes, backend=backend).mass.isnan().all()


@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_small_shares_keep_their_digits(temperature, backend):
    """False negatives that are far away have a share that two log-sum-exps over other samples would round away."""
    classes = torch.arange(8).repeat_interleave(2)
    centres = F.normalize(torch.randn(4, 16))
    # the two samples of a class are opposite, each near samples of other classes
    x = torch.stack([centres, -centres], 1).repeat(2, 1, 1).flatten(0, 1) + 0.05 * torch.randn(16, 16)
    dtype, device = precise(backend), device_of(backend)
    z0, z1 = x.to(dtype), (x + 0.01 * torch.randn(16, 16)).to(dtype)
    found = dg.false_negative_mass(
        z0.to(device), z1.to(device), classes.to(device), temperature=temperature, backend=backend
    )
    z, doubled, sample = F.normalize(torch.cat([z0, z1]).double()), classes.repeat(2), torch.arange(16).repeat(2)
    logits = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    negatives = sample[:, None] != sample
    false = negatives & (doubled[:, None] == doubled)
    lse = [logits.masked_fill(~kept, -math.inf).logsumexp(1) for kept in (false, negatives)]
    assert (lse[0] - lse[1]).exp().max() < 1e-3
    close(found.share.double(), (lse[0] - lse[1]).exp(), rtol=1e-4, atol=0)
    close(found.mass.double(), (lse[0] - logits.logsumexp(1)).exp(), rtol=1e-4, atol=0)


def test_shares_are_between_0_and_1(backend):
    device = device_of(backend)
    z = torch.randn(40, 5, device=device).repeat(2, 1)
    for labels in (torch.arange(80), torch.zeros(80, dtype=torch.int64), torch.full((80,), -1), torch.arange(80) % 2):
        found = dg.false_negative_mass(z, z, labels.to(device), temperature=0.01, backend=backend)
        for value in found:
            assert ((value >= 0) & (value <= 1)).all()
