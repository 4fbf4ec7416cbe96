"""The loss of VICReg."""

from __future__ import annotations

from ._dense import off_diagonal, unit_rows


def vicreg_loss(z0, z1, *, sim_weight=25.0, var_weight=25.0, cov_weight=1.0, eps=1e-4, normalize=False):
    """Return ``sim mse(x, y) + var / 2 sum_z mean_a max(0, 1 - sd_a) + cov / D sum_z sum_{a != b} cov_ab**2``.

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
