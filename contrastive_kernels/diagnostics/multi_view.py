"""Class-mean inference from several views of a sample."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from contrastive_kernels.diagnostics.classes import Classification, decide, joined
from contrastive_kernels.diagnostics.common import check_means, chunks, wide_rows
from contrastive_kernels.primitives import checks

__all__ = ["classify_views"]

COMBINATIONS = ("mean_feature", "mean_score", "max_score", "vote")


@torch.no_grad()
def classify_views(
    views: Tensor,
    means: Tensor,
    *,
    combine: Literal["mean_feature", "mean_score", "max_score", "vote"] = "mean_feature",
    normalize: bool = True,
    normalize_means: bool = True,
) -> Classification:
    """Classifies samples by all their views, a chunk of samples at a time.

    Args:
        views: ``(N, V, D)``, V >= 1.
        means: ``(K, D)``, of `class_means`.
        combine: ``"mean_feature"``: the mean view, of unit norm again (with ``normalize``); ``"mean_score"``: the mean
            of the views' scores, which is the mean view without the second normalisation; ``"max_score"``: the
            largest; ``"vote"``: the fraction of views that prefer the class.
        normalize: rows to unit norm first.
        normalize_means: means to unit norm first.

    Returns:
        `Classification`, each ``(N,)``: the lowest class on a tie; scores as combined.

    Raises:
        ValueError: shapes that do not fit or an unknown combination.
        TypeError: dtypes that differ or are not floating.

    Example:
        >>> classify_views(torch.eye(2)[None].repeat(3, 1, 1), torch.eye(2), combine="vote").confidence.tolist()
        [0.5, 0.5, 0.5]
    """
    checks.views("views", views, minimum=1)
    check_means(means, views)
    checks.choice("combine", combine, COMBINATIONS)
    views, means = wide_rows(views, normalize), wide_rows(means, normalize_means)
    parts = []
    for rows in chunks(len(views), views.shape[1] * len(means)):
        if combine == "mean_feature":
            scores = wide_rows(views[rows].mean(1), normalize) @ means.mT
        else:
            scores = _combined(views[rows] @ means.mT, combine)
        parts.append(decide(scores))
    return joined(parts, views)


def _combined(scores: Tensor, combine: str) -> Tensor:
    """(N, K) from the scores (N, V, K) of the views."""
    if combine == "mean_score":
        return scores.mean(1)
    if combine == "max_score":
        return scores.amax(1)
    votes = torch.zeros_like(scores).scatter(2, scores.argmax(2, keepdim=True), 1).mean(1)
    # A view of NaN has no vote to give.
    return votes.masked_fill(scores.isnan().any(1), torch.nan)
