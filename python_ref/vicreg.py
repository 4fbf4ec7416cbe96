"""The loss of VICReg."""

from __future__ import annotations

import torch

from ._dense import off_diagonal, unit_rows


def vicreg_loss(z0, z1, *, sim_weight=25.0, var_weight=25.0, cov_weight=1.0, eps=1e-4, normalize=False):
    """Return ``sim mse(x, y) + var / 2 sum_z mean_a max(0, 1 - sd_a) + cov / D sum_z sum_{a != b} cov_ab**2``.

    Of views (N, ..., D) the mean over the dimensions in between.

    Source: Bardes et al. 2022, arXiv:2105.04906.
    """
    if z0.dim() > 2:
        pairs = zip(z0.flatten(1, -2).unbind(1), z1.flatten(1, -2).unbind(1), strict=True)
        weights = {"sim_weight": sim_weight, "var_weight": var_weight, "cov_weight": cov_weight}
        return torch.stack([vicreg_loss(x, y, **weights, eps=eps, normalize=normalize) for x, y in pairs]).mean()
    loss = sim_weight * (unit_rows(z0, normalize) - unit_rows(z1, normalize)).square().mean()
    for z in (z0, z1):
        z = unit_rows(z, normalize)
        loss = loss + var_weight / 2 * (1 - (z.var(0) + eps).sqrt()).relu().mean()
        centred = z - z.mean(0)
        covariance = centred.mT @ centred / (len(z) - 1)
        loss = loss + cov_weight * off_diagonal(covariance).square().sum() / z.shape[1]
    return loss
