"""MoCo: its queue; tests/losses/test_every_loss.py has what the loss shares with the others."""

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
import python_ref
from tests.support.losses import assert_exact, double
from tests.support.testing import device_of

N, D = 12, 16


def test_official_queue_layout(backend):
    """(D, K) in memory, passed as its transpose."""
    query, key = torch.randn(2, 33, 24, device=device_of(backend))
    queue = torch.randn(24, 129, device=device_of(backend))
    torch.testing.assert_close(
        ck.moco_loss(query, key, queue.T, backend=backend),
        ck.moco_loss(query, key, queue.T.contiguous(), backend=backend),
    )


@double
def test_reference_is_cross_entropy():
    query, key, queue = F.normalize(torch.randn(3, 7, 5), dim=-1)
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1) / 0.1
    expected = F.cross_entropy(logits, torch.zeros(7, dtype=torch.long))
    assert_exact(python_ref.moco_loss(query, key, queue, temperature=0.1), expected)


# The module


def batches(count, device):
    return [torch.randn(N, D, device=device) for _ in range(count)]


def moco(queue_size=30, backend=None):
    return ck.MoCoLoss(dim=D, queue_size=queue_size, temperature=0.2, backend=backend).to(device_of(backend))


def test_module_uses_the_queue_as_it_was(backend):
    """The batch's own keys are no negatives."""
    loss = moco(backend=backend)
    query, key = batches(2, loss.queue.device)
    torch.testing.assert_close(loss.queue.norm(dim=1), torch.ones(30, device=query.device))
    before = loss.queue.clone()
    value = loss(query, key)
    torch.testing.assert_close(value, ck.moco_loss(query, key, before, temperature=0.2, backend=backend))


def test_queue_is_first_in_first_out(backend):
    """12 keys a batch into 30 places: the third batch wraps around and overwrites the oldest six."""
    loss = moco(backend=backend)
    keys = batches(3, loss.queue.device)
    start = loss.queue.clone()
    for key in keys:
        loss(torch.randn_like(key), key)
    unit = F.normalize(torch.cat(keys), dim=1)
    torch.testing.assert_close(loss.queue, torch.cat([unit[30:], unit[6:30]]))
    assert not torch.equal(loss.queue, start)
    assert not loss.queue.requires_grad


def test_queue_takes_the_last_of_too_many(backend):
    loss = moco(queue_size=5, backend=backend)
    (key,) = batches(1, loss.queue.device)
    loss(torch.randn_like(key), key)
    kept = {tuple(row.tolist()) for row in F.normalize(key[-5:], dim=1).cpu().mul(1e4).round()}
    assert {tuple(row.tolist()) for row in loss.queue.cpu().mul(1e4).round()} == kept


def test_evaluation_leaves_the_queue(backend):
    loss = moco(backend=backend).eval()
    before = loss.queue.clone()
    loss(*batches(2, before.device))
    assert torch.equal(loss.queue, before)


def test_backward_after_the_enqueue(backend):
    """The queue is written in place after the forward: the backward must not see the new keys."""
    loss = moco(backend=backend)
    query, key = batches(2, loss.queue.device)
    before = loss.queue.clone()
    query.requires_grad_()
    loss(query, key.requires_grad_()).backward()
    (expected,) = torch.autograd.grad(ck.moco_loss(query, key, before, temperature=0.2, backend=backend), query)
    torch.testing.assert_close(query.grad, expected)
    assert key.grad is None


def test_state_is_saved_and_restored():
    loss, other = moco(), moco()
    query, key = batches(2, "cpu")
    loss(query, key)
    assert {"queue", "position"} <= set(loss.state_dict())
    other.load_state_dict(loss.state_dict())
    assert torch.equal(loss(query, key), other(query, key))
    assert torch.equal(loss.queue, other.queue)
    assert loss.position == other.position


def test_a_queue_of_nothing_is_refused_at_construction():
    with pytest.raises(ValueError, match="queue_size"):
        ck.MoCoLoss(dim=4, queue_size=0)
