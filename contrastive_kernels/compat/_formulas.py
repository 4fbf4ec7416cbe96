"""Short dense formulas that several adapters share, for small batches and for D x D numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_kernels.primitives import unit_rows

__all__ = ["barlow_twins", "nt_xent", "off_diagonal"]


def nt_xent(z0: Tensor, z1: Tensor, temperature: float | Tensor, reduction: str = "mean") -> Tensor:
    """Return NT-Xent of two views, from the similarities of all rows."""
    n = z0.shape[0]
    rows = unit_rows(torch.cat([z0, z1]))
    logits = (rows @ rows.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(2 * n, device=rows.device).roll(n), reduction=reduction)


def barlow_twins(correlation: Tensor, lambd: float | Tensor) -> Tensor:
    """Return the squares of the diagonal's differences from 1, and lambd times those of all else."""
    identity = torch.eye(correlation.shape[0], dtype=correlation.dtype, device=correlation.device)
    squares: Tensor = (correlation - identity).square()
    loss: Tensor = (squares * (identity + lambd * (1 - identity))).sum()
    return loss


def off_diagonal(x: Tensor) -> Tensor:
    """Return (..., D (D - 1)), all but the diagonal of (..., D, D)."""
    d = x.shape[-1]
    rows: Tensor = x.flatten(-2)[..., :-1].unflatten(-1, (d - 1, d + 1))
    return rows[..., 1:].flatten(-2)
