"""Short dense formulas that several adapters share, for small batches and for D x D numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_kernels.primitives import compute_dtype, unit_rows

__all__ = ["are_empty", "barlow_twins", "mean_of_nothing", "nt_xent", "off_diagonal", "promoted"]


def nt_xent(z0: Tensor, z1: Tensor, temperature: float | Tensor, reduction: str = "mean") -> Tensor:
    """Return NT-Xent of two views, from the similarities of all rows."""
    n = z0.shape[0]
    rows = unit_rows(torch.cat([z0, z1]))
    logits = (rows @ rows.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(2 * n, device=rows.device).roll(n), reduction=reduction)


def are_empty(x: Tensor, y: Tensor) -> bool:
    """Return whether these are two views of no rows."""
    return x.dim() == 2 and x.shape == y.shape and x.shape[0] == 0


def mean_of_nothing(*rows: Tensor) -> Tensor:
    """Return NaN, which the peers have as the loss of an empty batch; its gradients are as empty."""
    nothing: Tensor = torch.stack([x.sum(dtype=compute_dtype(x)) for x in rows]).sum()
    return nothing * torch.nan


def promoted(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return two views in the dtype that PyTorch's operators would give both."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


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
