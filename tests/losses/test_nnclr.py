"""NNCLR: both directions and the support queue; test_every_loss.py has what it shares with the other losses."""

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
from tests.support.losses import assert_refused
from tests.support.testing import check, device_of
from tests.support.variants import EVERY


@pytest.mark.parametrize("option", [{"cutoff": 0.1}, {"cutoff_margin": 0.05}], ids=str)
@pytest.mark.parametrize("name", ["nnclr", "nnclr-both"])
def test_cutoffs(name, option, backend):
    """The loss of every anchor, of rows that are normalised inside."""
    check(EVERY[name], (65, 129, 24), torch.float32, backend, reduction="none", normalize=True, **option)


def test_of_its_own_support_is_info_nce(backend):
    """Every projection finds itself; the gradient is the predictions' alone, whatever else requires one."""
    z, p = torch.randn(2, 33, 24, device=device_of(backend))
    loss = ck.nnclr_loss(z, p, z.clone(), backend=backend)
    torch.testing.assert_close(loss, ck.info_nce_loss(z, p, temperature=0.1, backend=backend))


def test_both_directions(backend):
    z, p = torch.randn(2, 33, 2, 24, device=device_of(backend))
    support = torch.randn(50, 24, device=device_of(backend))
    both = ck.nnclr_loss(z, p, support, backend=backend)
    one = ck.nnclr_loss(z[:, 0], p[:, 1], support, backend=backend)
    other = ck.nnclr_loss(z[:, 1], p[:, 0], support, backend=backend)
    torch.testing.assert_close(both, (one + other) / 2)
    assert ck.nnclr_loss(z, p, support, reduction="none", backend=backend).shape == (2, 33)


@pytest.mark.parametrize("both", [False, True], ids=["one", "both"])
def test_module_uses_the_queue_as_it_was_and_then_fills_it(both, backend):
    loss = ck.NNCLRLoss(16, 30, 0.2, backend=backend).to(device_of(backend))
    z, predictions = torch.randn(2, 12, 2, 16, device=device_of(backend)).unbind(0)
    if not both:
        z, predictions = z[:, 0], predictions[:, 1]
    z.requires_grad_()
    before = loss.queue.clone()
    value = loss(z, predictions)
    expected = ck.nnclr_loss(z, predictions, before, temperature=0.2, backend=backend)
    torch.testing.assert_close(value, expected)
    stored = F.normalize(z.detach()[:, 0] if both else z.detach(), dim=1)
    torch.testing.assert_close(loss.queue, torch.cat([stored, before[12:]]))
    loss.eval()
    after = loss.queue.clone()
    loss(z, predictions)
    assert torch.equal(loss.queue, after)


def f(*shape):
    return torch.randn(*shape)


BAD = {
    "support of another dimension": (
        lambda: ck.nnclr_loss(f(8, 16), f(8, 16), f(9, 15)),
        ValueError,
        "z (8, 16) and support (9, 15) must have the same last dimension",
    ),
    "predictions of other samples": (
        lambda: ck.nnclr_loss(f(8, 16), f(7, 16), f(9, 16)),
        ValueError,
        "z (8, 16) and predictions (7, 16) must have the same first dimension",
    ),
    "one direction of one": (
        lambda: ck.nnclr_loss(f(8, 2, 16), f(8, 16), f(9, 16)),
        ValueError,
        "predictions (8, 16) must have shape (N, V, D)",
    ),
    "three views": (lambda: ck.nnclr_loss(f(8, 3, 16), f(8, 3, 16), f(9, 16)), ValueError, "must have 2 views"),
    "no support": (lambda: ck.nnclr_loss(f(8, 16), f(8, 16), f(0, 16)), ValueError, "support (0, 16) is empty"),
    "no rows": (lambda: ck.nnclr_loss(f(0, 16), f(0, 16), f(9, 16)), ValueError, "z (0, 16) is an empty batch"),
    "a list": (lambda: ck.nnclr_loss([1.0], f(8, 16), f(9, 16)), TypeError, "z must be a tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    assert_refused(*BAD[name])
