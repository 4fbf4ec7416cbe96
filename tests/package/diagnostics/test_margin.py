"""The report on MMCL's dual problem."""

import torch

from contrastive_kernels import diagnostics as dg


def test_mmcl_dual():
    x = torch.randn(24, 6, dtype=torch.float64)
    inverse, pgd = dg.mmcl_dual(x, sigma=5.0), dg.mmcl_dual(x, sigma=5.0, solver="pgd", C=1.0)
    assert (inverse.kkt_residual > 1e-2).any() and (pgd.kkt_residual <= 1e-4).all()
    assert 0 < pgd.zero_fraction < 1 and 0 < pgd.bound_fraction < 1
    assert (pgd.objective < 0).all() and pgd.iterations > 0
    assert not pgd.objective.requires_grad


def test_mmcl_dual_says_what_it_stores():
    assert "N x N matrices" in dg.mmcl_dual.__doc__
    x = torch.randn(24, 6)
    blocks = dg.mmcl_dual(x, sigma=5.0, block_size=12)
    assert torch.allclose(blocks.objective[:12], dg.mmcl_dual(x[:12], sigma=5.0).objective, rtol=1e-4)
