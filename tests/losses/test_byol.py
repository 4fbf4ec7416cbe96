"""BYOL alone; test_simsiam.py has what it shares with SimSiam."""

import torch
import torch.nn.functional as F

import contrastive_kernels as ck
from tests.support.losses import assert_module_is_function
from tests.support.testing import assert_matches


def test_small_losses_keep_their_digits():
    """Predictions off by 1e-6: 2 - 2 cos is about 1e-12, below the rounding of 1 in float32."""
    z = F.normalize(torch.randn(33, 24).double(), dim=1)
    p = F.normalize(z + 1e-6 * torch.randn(33, 24), dim=1)
    # float32 rows as they are, so that both sides have the same rows
    p, z = p.float(), z.float()
    exact = (p.double() - z.double()).square().sum(1)
    assert 0 < exact.max() < 1e-9
    loss = ck.byol_loss(p, z, p, z, normalize=False, reduction="none")
    assert_matches(loss, 2 * exact, torch.float32)


def test_value_by_hand():
    p, z = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    assert_matches(ck.byol_loss(p, z, p, z), torch.tensor(2 * (2 - 2 * 0.8)).double(), torch.float32)


def test_module_is_its_function():
    tensors, weight = torch.randn(4, 12, 16).unbind(0), torch.rand(12)
    assert_module_is_function(ck.BYOLLoss, ck.byol_loss, tensors, {"reduction": "sum"}, weight=weight)
