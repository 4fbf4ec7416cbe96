"""The views of a sample: their rows, their pairs, their distances."""

from __future__ import annotations

import torch

from ._dense import INFINITY, unit_rows
from ._pairs import below, different, threshold


def stack_views(z0, z1):
    """Return the views as (V, N, D), from (N, D) twice or from (N, V, D)."""
    return z0.transpose(0, 1) if z1 is None else torch.stack([z0, z1])


def per_anchor(value, count, count_views):
    """Repeat a value per sample for the anchors of all views; return any other value as it is."""
    return value.repeat(count_views) if torch.is_tensor(value) and value.dim() and len(value) == count else value


def two_view_pairs(z0, z1, normalize, ids, cutoff, cutoff_margin):
    """Return the similarities of the rows of both views, the positive's, and the mask of the kept negatives.

    Negatives are the rows of other samples, or with other ids, up to the cutoff.
    """
    z, count = unit_rows(torch.cat([z0, z1]), normalize), len(z0)
    similarity = z @ z.mT
    positive = torch.cat([similarity.diagonal(count), similarity.diagonal(-count)])
    ids = torch.arange(count, device=z.device) if ids is None else ids
    cutoff, cutoff_margin = per_anchor(cutoff, count, 2), per_anchor(cutoff_margin, count, 2)
    kept = different(ids.repeat(2), ids.repeat(2)) & below(similarity, threshold(positive, cutoff, cutoff_margin))
    return similarity, positive, kept


def view_distances(views):
    """Return ``|z_ij - z_ik|**2`` of the pairs j < k in row-major order, (N, V (V - 1) / 2)."""
    first, second = torch.combinations(torch.arange(views.shape[1], device=views.device), 2).unbind(1)
    return (views[:, first] - views[:, second]).square().sum(2)


def first_minimum(values):
    """Return the smallest entry of each row and its index, the first on a tie; NaN counts as smallest."""
    order = values.detach().masked_fill(values.detach().isnan(), -INFINITY)
    index = order.argsort(dim=1, stable=True)[:, :1]
    return values.gather(1, index)[:, 0], index[:, 0]
