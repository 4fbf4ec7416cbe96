"""The augmentation-robust alignment loss."""

from __future__ import annotations

from ._dense import reduce, unit_rows
from ._views import first_minimum, view_distances


def augmentation_robust_loss(views, *, normalize=False, reduction="mean", weight=None):
    """Return ``mean_i max_{j < k} |z_ij - z_ik|**2``, of the first pair on a tie.

    Source: Zhao et al. 2023.
    """
    return reduce(-first_minimum(-view_distances(unit_rows(views, normalize)))[0], reduction, weight)
