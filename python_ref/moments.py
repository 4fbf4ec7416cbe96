"""Losses of second moments: spectral contrastive, Barlow Twins, VICReg."""

from __future__ import annotations

import torch

from .dense import reduced, unit_rows


def in_ball(z, radius):
    """``z`` if ``|z| < radius``, else ``radius z / |z|``."""
    norm = z.square().sum(1, keepdim=True).clamp(min=1e-300).sqrt()
    return torch.where(norm < radius, z, radius * z / norm)


def spectral_contrastive_loss(
    z0, z1, *, mu=1.0, project=False, include_diagonal=False, normalize=False, reduction="mean", weight=None
):
    """``(1 / mu) mean_i (-2 s_ii + mean_{j != i} s_ij**2)``.

    Source: HaoChen et al. 2021, arXiv:2106.04156.
    """
    x, y = unit_rows(z0, normalize), unit_rows(z1, normalize)
    if project:
        x, y = in_ball(x, mu**0.5), in_ball(y, mu**0.5)
    similarity = x @ y.mT
    dropped = torch.eye(len(x), dtype=torch.bool, device=x.device) & (not include_diagonal)
    squares = similarity.square().masked_fill(dropped, 0.0).sum(1) / (~dropped).sum(1).clamp(min=1)
    return reduced((squares - 2 * similarity.diagonal()) / mu, reduction, weight)


def standard_columns(z, std="biased"):
    """Columns of mean 0 and variance 1: over N with epsilon 1e-5, or over N - 1 without."""
    variance = z.var(0, correction=1) if std == "unbiased" else z.var(0, correction=0) + 1e-5
    return (z - z.mean(0)) / variance.sqrt()


def off_diagonal(matrix):
    """The matrix with zeros on its diagonal."""
    return matrix.masked_fill(torch.eye(len(matrix), dtype=torch.bool, device=matrix.device), 0.0)


def barlow_twins_loss(z0, z1, *, lambd=0.0051, std="biased", normalize=False):
    """``sum_a (1 - C_aa)**2 + lambd sum_{a != b} C_ab**2``, C the cross-correlation of the columns.

    Source: Zbontar et al. 2021, arXiv:2103.03230, eq. 1.
    """
    first, second = (standard_columns(unit_rows(z, normalize), std) for z in (z0, z1))
    correlation = first.mT @ second / len(z0)
    return (1 - correlation.diagonal()).square().sum() + lambd * off_diagonal(correlation).square().sum()


def vicreg_loss(z0, z1, *, sim_weight=25.0, var_weight=25.0, cov_weight=1.0, eps=1e-4, normalize=False):
    """``sim mse(x, y) + var / 2 sum_z mean_a max(0, 1 - sd_a) + cov / D sum_z sum_{a != b} cov_ab**2``.

    Source: Bardes et al. 2022, arXiv:2105.04906.
    """
    loss = sim_weight * (unit_rows(z0, normalize) - unit_rows(z1, normalize)).square().mean()
    for z in (z0, z1):
        z = unit_rows(z, normalize)
        loss = loss + var_weight / 2 * (1 - (z.var(0) + eps).sqrt()).relu().mean()
        centred = z - z.mean(0)
        covariance = centred.mT @ centred / (len(z) - 1)
        loss = loss + cov_weight * off_diagonal(covariance).square().sum() / z.shape[1]
    return loss
