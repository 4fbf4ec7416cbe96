"""The BYOL loss."""

from __future__ import annotations

from ._dense import reduce, unit_rows


def byol_loss(p0, z0, p1, z1, *, normalize=True, reduction="mean", weight=None):
    """Return ``mean_i |p0_i - z1_i|**2 + |p1_i - z0_i|**2`` of unit rows.

    Source: Grill et al. 2020, arXiv:2006.07733.
    """
    p0, z0, p1, z1 = (unit_rows(x, normalize) for x in (p0, z0.detach(), p1, z1.detach()))
    return reduce((p0 - z1).square().sum(1) + (p1 - z0).square().sum(1), reduction, weight)
