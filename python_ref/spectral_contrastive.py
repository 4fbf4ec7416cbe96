"""The spectral contrastive loss."""

from __future__ import annotations

import torch

from ._dense import reduce, unit_rows


def in_ball(z, radius):
    """Return ``z`` where ``|z| < radius``, else ``radius z / |z|``."""
    norm = z.square().sum(1, keepdim=True).clamp(min=1e-300).sqrt()
    return torch.where(norm < radius, z, radius * z / norm)


def spectral_contrastive_loss(
    z0, z1, *, mu=1.0, project=False, include_diagonal=False, normalize=False, reduction="mean", weight=None
):
    """Return ``(1 / mu) mean_i (-2 s_ii + mean_{j != i} s_ij**2)``.

    Source: HaoChen et al. 2021, arXiv:2106.04156.
    """
    x, y = unit_rows(z0, normalize), unit_rows(z1, normalize)
    if project:
        x, y = in_ball(x, mu**0.5), in_ball(y, mu**0.5)
    similarity = x @ y.mT
    dropped = torch.eye(len(x), dtype=torch.bool, device=x.device) & (not include_diagonal)
    squares = similarity.square().masked_fill(dropped, 0.0).sum(1) / (~dropped).sum(1).clamp(min=1)
    return reduce((squares - 2 * similarity.diagonal()) / mu, reduction, weight)
