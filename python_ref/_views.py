"""Several views of a sample: their rows, their distances, the least similar pair."""

from __future__ import annotations

import torch

from ._dense import INFINITY, unit_rows
from ._pairs import below, different, threshold


def two_or_more_views(z0, z1):
    """View-major (V, N, D) from (N, D) twice or from (N, V, D)."""
    return z0.transpose(0, 1) if z1 is None else torch.stack([z0, z1])


def two_views(z0, z1, normalize, ids, cutoff, cutoff_margin):
    """S of all rows of both views, the positive's similarity, the kept negatives: rows of other samples."""
    z, count = unit_rows(torch.cat([z0, z1]), normalize), len(z0)
    similarity = z @ z.mT
    positive = torch.cat([similarity.diagonal(count), similarity.diagonal(-count)])
    ids = torch.arange(count, device=z.device) if ids is None else ids
    thresholds = (
        t.repeat(2) if torch.is_tensor(t) and t.dim() and len(t) == count else t for t in (cutoff, cutoff_margin)
    )
    kept = different(ids.repeat(2), ids.repeat(2)) & below(similarity, threshold(positive, *thresholds))
    return similarity, positive, kept


def view_distances(views):
    """``|z_ij - z_ik|**2`` of the pairs j < k in row-major order, (N, V (V - 1) / 2)."""
    first, second = torch.combinations(torch.arange(views.shape[1], device=views.device), 2).unbind(1)
    return (views[:, first] - views[:, second]).square().sum(2)


def first_minimum(values):
    """Smallest entry of each row and its index, the first on a tie; NaN counts as smallest."""
    order = values.detach().masked_fill(values.detach().isnan(), -INFINITY)
    index = order.argsort(dim=1, stable=True)[:, :1]
    return values.gather(1, index)[:, 0], index[:, 0]
