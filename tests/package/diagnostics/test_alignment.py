"""Alignment, uniformity and the split of InfoNCE against their dense definitions."""

import pytest
import torch
import torch.nn.functional as F

from contrastive_kernels import diagnostics as dg
from tests.support.diagnostics import close
from tests.support.testing import device_of, precise


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("normalize", [False, True])
def test_alignment(exponent, normalize):
    x, y = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True).unbind(0)
    a, b = (F.normalize(x), F.normalize(y)) if normalize else (x, y)
    close(dg.alignment(x, y, exponent=exponent, normalize=normalize), (a - b).norm(dim=1).pow(exponent).mean())
    assert torch.autograd.gradcheck(lambda x, y: dg.alignment(x, y, exponent=exponent, normalize=normalize), (x, y))


def test_alignment_of_equal_views_has_no_gradient():
    x = torch.randn(3, 4, requires_grad=True)
    dg.alignment(x, x.detach().clone(), exponent=1.0).backward()
    assert not x.grad.any()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("t", [0.5, 2.0])
def test_uniformity(t, normalize, backend):
    z = torch.randn(33, 5, dtype=precise(backend))
    rows = (F.normalize(z) if normalize else z).double().requires_grad_()
    expected = torch.pdist(rows).square().mul(-t).exp().mean().log()
    ours = z.to(device_of(backend)).requires_grad_()
    value = dg.uniformity(ours, t=t, normalize=normalize, backend=backend)
    close(value, expected.detach(), rtol=1e-5 if z.dtype == torch.float32 else 1e-11)
    if not normalize:
        value.backward()
        expected.backward()
        close(ours.grad, rows.grad, rtol=1e-4 if z.dtype == torch.float32 else 1e-9, atol=1e-6)


def test_info_nce_split_adds_up_to_the_loss():
    """I14 alignment split: InfoNCE with one negative is half the alignment and a regulariser."""
    q, k, n = torch.randn(3, 20, 5, dtype=torch.float64).unbind(0)
    for normalize in (True, False):
        a, b, c = (F.normalize(x) if normalize else x for x in (q, k, n))
        logits = torch.stack([(a * b).sum(1), (a * c).sum(1)], 1)
        split = dg.info_nce_split(q, k, n, normalize=normalize)
        close(sum(split), F.cross_entropy(logits, torch.zeros(20, dtype=torch.int64)))
        close(split.alignment, dg.alignment(a, b) / 2)


@pytest.mark.parametrize("offset", [0.0, 10.0, 1e3])
def test_info_nce_split_far_from_the_origin(offset):
    """Raw rows far from the origin keep the digits of both parts."""
    q, k, n = (offset + torch.randn(3, 40, 16)).unbind(0)
    q, k, n = q / 30, k / 30, n / 30
    split = dg.info_nce_split(q, k, n, normalize=False)
    a, b, c = q.double(), k.double(), n.double()
    logits = torch.stack([(a * b).sum(1), (a * c).sum(1)], 1)
    norms = (a.square().sum(1) + b.square().sum(1)) / 2
    close(split.alignment.double(), (a - b).square().sum(1).mean() / 2, rtol=1e-6)
    close(split.regularizer.double(), (logits.logsumexp(1) - norms).mean(), rtol=1e-5, atol=1e-6)


def test_info_nce_split_has_gradients():
    inputs = torch.randn(3, 5, 4, dtype=torch.float64).unbind(0)
    for normalize in (True, False):
        assert torch.autograd.gradcheck(
            lambda *x, normalize=normalize: tuple(dg.info_nce_split(*x, normalize=normalize)),
            [x.clone().requires_grad_() for x in inputs],
        )
