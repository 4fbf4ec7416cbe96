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
    """I20 diagnostics: the difference of two log-sum-exps is the masked sum over the softmax."""
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
