"""Class-mean inference from several views of a sample."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from contrastive_kernels.diagnostics.classes import Classification, between, by_means, joined, top_two
from contrastive_kernels.diagnostics.common import check_means, chunks, first_equal, wide_rows, without_autocast
from contrastive_kernels.primitives import checks

__all__ = ["classify_views"]

COMBINATIONS = ("mean_feature", "mean_score", "max_score", "vote")


@torch.no_grad()
@without_autocast
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
        >>> import torch
        >>> from contrastive_kernels import diagnostics
        >>> views, means = torch.eye(2)[None].repeat(3, 1, 1), torch.eye(2)
        >>> diagnostics.classify_views(views, means, combine="vote").confidence.tolist()
        [0.5, 0.5, 0.5]
    """
    checks.lists("views", views, 1, "N, V, D")
    check_means(means, views)
    checks.choice("combine", combine, COMBINATIONS)
    views, means = wide_rows(views, normalize), wide_rows(means, normalize_means)
    if combine == "mean_feature":
        return by_means(wide_rows(views.mean(1), normalize), means)
    if combine == "mean_score":
        return by_means(views.mean(1), means)
    equal = first_equal(means)
    parts = []
    for rows in chunks(len(views), views.shape[1] * max(means.shape)):
        scores = views[rows] @ means.mT
        parts.append(_by_vote(scores, equal) if combine == "vote" else _by_largest(scores, views[rows], means, equal))
    return joined(parts, views)


def _by_vote(scores: Tensor, equal: Tensor) -> Classification:
    """Return the classification by the fraction of the views (N, V, K) that prefer a class, the lowest of equals."""
    votes = torch.zeros_like(scores).scatter(2, equal[scores.argmax(2, keepdim=True)], 1).mean(1)
    # A view of NaN has no vote to give.
    votes = votes.masked_fill(scores.isnan().any(1), torch.nan)
    best, second = top_two(votes)
    confidence = votes.gather(1, best[:, None]).squeeze(1)
    others = votes.scatter(1, best[:, None], -torch.inf).gather(1, second[:, None]).squeeze(1)
    return Classification(best, confidence, confidence - others)


def _by_largest(scores: Tensor, views: Tensor, means: Tensor, equal: Tensor) -> Classification:
    """Return the classification by the largest of the scores (N, V, K) of the views."""
    largest, view = scores.max(1)
    best, second = top_two(largest)
    sample = torch.arange(len(views), device=views.device)
    f, g = (views[sample, view[sample, index]] for index in (best, second))
    return between(equal[best], equal[second], f, g, means)
