"""The debiased contrastive loss."""

from __future__ import annotations

from .hard_negative import hard_negative_loss


def debiased_loss(z0, z1, **arguments):
    """Return `hard_negative_loss` with equal weights.

    Source: Chuang et al. 2020, arXiv:2007.00224.
    """
    return hard_negative_loss(z0, z1, beta=0.0, **arguments)
