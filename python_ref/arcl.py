"""ArCL on SimCLR."""

from __future__ import annotations

import torch

from ._dense import scale_of, unit_rows
from ._pairs import below, other_rows, threshold
from ._softmax import softmax_outcome
from .views import min_view_similarity


def arcl_loss(
    views,
    *,
    temperature=0.5,
    logit_scale=None,
    positive="min",
    denominator="two_view",
    normalize=True,
    reduction="mean",
    weight=None,
    label_smoothing=0.0,
    ids=None,
    cutoff=None,
    cutoff_margin=None,
    return_stats=False,
):
    """Return ``mean_i (log sum_den e^u - s+_i / T)``, ``s+_i`` the similarity of the least similar pair of views.

    Source: Zhao et al. 2023.
    """
    views, scale = unit_rows(views, normalize), scale_of(temperature, logit_scale)
    first, second = views[:, 0], views[:, 1]
    aligned = min_view_similarity(views, reduce=positive)[0]
    own = (first * second).sum(1)

    kept = other_rows(len(views), ids, views.device)
    similarity = first @ first.mT
    if denominator in ("two_view", "positive+two_view"):
        similarity, kept = torch.cat([similarity, first @ second.mT], 1), torch.cat([kept, kept], 1)
    kept = kept & below(similarity, threshold(aligned, cutoff, cutoff_margin))
    target = scale * aligned
    # the logits of the anchor's own sample in the denominator
    own = {"two_view": scale * own[:, None], "one_view": target[:, None][:, :0]}.get(denominator, target[:, None])
    directions = [(target, own, scale * similarity, kept)]
    return softmax_outcome(directions, reduction, weight, label_smoothing, return_stats)
