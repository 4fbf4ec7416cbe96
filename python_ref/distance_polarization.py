"""The distance polarization regulariser alone."""

from __future__ import annotations

import torch

from ._dense import unit_rows
from ._pairs import different
from .sums import band


def distance_polarization(z, ids=None, *, lower=0.1, upper=0.5, reduction="mean", normalize=True):
    """Return ``mean_{i != j} max(0, (d - lower)(upper - d))``, ``d = (1 - s) / 2``.

    Source: Chen et al. 2021.
    """
    z = unit_rows(z, normalize)
    ids = torch.arange(len(z), device=z.device) if ids is None else ids
    kept = different(ids, ids)
    values = band(z @ z.mT, lower, upper).masked_fill(~kept, 0.0)
    rows = values.sum(1)
    return {
        "none": rows,
        "row": rows.mean(),
        "sum": rows.sum(),
        "mean": rows.sum() / kept.sum().clamp(min=1),
    }[reduction]
