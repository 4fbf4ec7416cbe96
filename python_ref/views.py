"""The least similar pair of views of each sample."""

from __future__ import annotations

import torch

from ._views import first_minimum


def min_view_similarity(views, *, reduce="min"):
    """Return the ``min`` or ``mean`` of ``<z_ij, z_ik>`` over j < k, and the first minimal pair (None for ``mean``)."""
    count = views.shape[1]
    pairs = torch.combinations(torch.arange(count, device=views.device), 2)
    similarity = (views @ views.mT)[:, pairs[:, 0], pairs[:, 1]]
    if reduce == "mean":
        return similarity.mean(1), None
    values, index = first_minimum(similarity)
    return values, pairs[index]
