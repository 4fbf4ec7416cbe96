"""The triplet margin loss with in-batch negatives."""

from __future__ import annotations

import torch

from ._dense import reduce, unit_rows
from ._pairs import other_rows


def distance(similarity):
    """Return ``sqrt(2 - 2 s)``, at least 1e-6."""
    return (2 - 2 * similarity).clamp(min=1e-12).sqrt()


def hardest(closeness, kept):
    """Return the largest kept entry of each row, the first on a tie; -inf where nothing is kept."""
    masked = closeness.masked_fill(~kept, -torch.inf)
    return masked.gather(1, masked.detach().argmax(1, keepdim=True))[:, 0]


def triplet_margin_loss(
    anchor,
    positive,
    *,
    margin=0.2,
    mining="all",
    metric="similarity",
    normalize=True,
    reduction="mean",
    weight=None,
    ids=None,
):
    """Return the mean of ``max(0, m - c_ii + c_ij)`` over all j != i, or over the hardest j of each row and column.

    The closeness c is s or ``-sqrt(2 - 2 s)``. ``mean`` divides by the kept pairs (hardest: by the anchors),
    ``nonzero_mean`` by the hinges above 0; ``none`` returns the sums of the rows.

    Source: Schroff et al. 2015; Faghri et al. 2018.
    """
    closeness = unit_rows(anchor, normalize) @ unit_rows(positive, normalize).mT
    closeness = -distance(closeness) if metric == "euclidean" else closeness
    kept = other_rows(len(closeness), ids, closeness.device)
    own = closeness.diagonal()
    if mining == "all":
        hinges = torch.relu(margin - own[:, None] + closeness).masked_fill(~kept, 0.0)
    else:
        hinges = torch.stack([hardest(closeness, kept), hardest(closeness.mT, kept)], 1) - own[:, None]
        hinges = torch.relu(margin + hinges.masked_fill(~kept.any(1, keepdim=True), -torch.inf))
    rows = hinges.sum(1)
    if reduction in ("sum", "none") or (mining == "hardest" and reduction == "mean"):
        return reduce(rows, reduction, weight)
    counts = ((hinges > 0) if reduction == "nonzero_mean" else kept).sum(1).to(rows)
    weight = torch.ones_like(rows) if weight is None else weight
    number = (weight * counts).sum()
    return (weight * rows).sum() / torch.where(number == 0, 1.0, number)
