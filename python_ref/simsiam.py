"""The SimSiam loss."""

from __future__ import annotations

from ._dense import reduce, unit_rows


def simsiam_loss(p0, z0, p1, z1, *, normalize=True, reduction="mean", weight=None):
    """Return ``mean_i -(cos(p0_i, z1_i) + cos(p1_i, z0_i)) / 2``.

    Source: Chen & He 2021, arXiv:2011.10566.
    """
    p0, z0, p1, z1 = (unit_rows(x, normalize) for x in (p0, z0.detach(), p1, z1.detach()))
    return reduce(-((p0 * z1).sum(1) + (p1 * z0).sum(1)) / 2, reduction, weight)
