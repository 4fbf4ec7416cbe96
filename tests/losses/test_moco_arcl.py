"""ArCL with MoCo's queue; tests/losses/test_every_loss.py has what the loss shares with the others."""

import math

import torch

import contrastive_kernels as ck
import python_ref
from tests.support.losses import assert_exact, double
from tests.support.testing import device_of


def test_module_is_its_function_and_stores_the_first_view(backend):
    loss = ck.MoCoArCLLoss(dim=16, queue_size=30, temperature=0.2, positive="mean", backend=backend)
    loss.to(device_of(backend))
    query, keys = (torch.randn(shape, device=loss.queue.device) for shape in ((12, 16), (12, 3, 16)))
    before = loss.queue.clone()
    expected = ck.moco_arcl_loss(query, keys, before, temperature=0.2, positive="mean", backend=backend)
    torch.testing.assert_close(loss(query, keys), expected)
    torch.testing.assert_close(loss.queue[:12], torch.nn.functional.normalize(keys[:, 0], dim=1))


@double
def test_reference_by_hand():
    """Keys at cosine 1 and 0, one negative at 0, T = 1: log 2 at the worst key, log(1 + 1/e) at the best one."""
    query, keys, queue = torch.eye(2)[:1], torch.eye(2)[None], torch.tensor([[0.0, -1.0]])
    best = math.log1p(math.exp(-1))
    for positive, expected in (
        ("min", math.log(2)),
        ("mean", math.log1p(math.exp(-0.5))),
        ("mean_loss", (math.log(2) + best) / 2),
    ):
        assert_exact(python_ref.moco_arcl_loss(query, keys, queue, temperature=1.0, positive=positive), expected)
