"""The alignment loss."""

from __future__ import annotations

from ._dense import reduce, unit_rows
from ._views import view_distances


def alignment_loss(views, *, normalize=False, reduction="mean", weight=None):
    """Return ``mean_i mean_{j < k} |z_ij - z_ik|**2``.

    Source: Wang & Isola 2020, arXiv:2005.10242.
    """
    return reduce(view_distances(unit_rows(views, normalize)).mean(1), reduction, weight)
