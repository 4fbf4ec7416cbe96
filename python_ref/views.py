"""Losses that align the worst (or the average) pair of several views: ArCL and AAL, on SimCLR and on MoCo."""

from __future__ import annotations

import torch

from .dense import below, different, scale_of, softmax_outcome, threshold, unit_rows
from .similarity import first_minimum, min_view_similarity


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
    """``mean_i (log sum_Den e^u - s+_i / T)``, ``s+_i`` the least similar pair of views.

    Source: Zhao et al. 2023.
    """
    views, scale = unit_rows(views, normalize), scale_of(temperature, logit_scale)
    count = len(views)
    first, second = views[:, 0], views[:, 1]
    aligned = min_view_similarity(views, reduce=positive)[0]
    own = (first * second).sum(1)

    kept = ~torch.eye(count, dtype=torch.bool, device=views.device)
    if ids is not None:
        kept = kept & different(ids, ids)
    similarity = first @ first.mT
    if denominator in ("two_view", "positive+two_view"):
        similarity, kept = torch.cat([similarity, first @ second.mT], 1), torch.cat([kept, kept], 1)
    kept = kept & below(similarity, threshold(aligned, cutoff, cutoff_margin))
    target = scale * aligned
    # what of the anchor's own stands in the denominator
    own = {"two_view": scale * own[:, None], "one_view": target[:, None][:, :0]}.get(denominator, target[:, None])
    directions = [(target, own, scale * similarity, kept)]
    return softmax_outcome(directions, reduction, weight, label_smoothing, return_stats)


def moco_arcl_loss(
    query,
    keys,
    queue,
    *,
    temperature=0.07,
    logit_scale=None,
    positive="min",
    pairs="keys",
    normalize=True,
    reduction="mean",
    weight=None,
    label_smoothing=0.0,
    query_ids=None,
    key_ids=None,
    cutoff=None,
    cutoff_margin=None,
    return_stats=False,
):
    """``mean_i log(1 + sum_queue e^{(s_ij - s+_i) / T})``, ``s+_i = min_j q_i k_ij``.

    Source: Zhao et al. 2023.
    """
    query, scale = unit_rows(query, normalize), scale_of(temperature, logit_scale)
    keys, queue = unit_rows(keys, normalize).detach(), unit_rows(queue, normalize).detach()
    if pairs == "all":
        similarities = query @ keys.mT
        distinct = ~torch.eye(*similarities.shape[1:], dtype=torch.bool, device=query.device)
        similarities, query = similarities[:, distinct], query[:, 0]
    else:
        similarities = (keys @ query[:, :, None])[:, :, 0]
    aligned = first_minimum(similarities)[0] if positive == "min" else similarities.mean(1)

    similarity = query @ queue.mT
    kept = torch.ones_like(similarity, dtype=torch.bool)
    if query_ids is not None:
        kept = kept & different(query_ids, key_ids)
    kept = kept & below(similarity, threshold(aligned, cutoff, cutoff_margin))

    def outcome(s):
        directions = [(scale * s, scale * s[:, None], scale * similarity, kept)]
        return softmax_outcome(directions, reduction, weight, label_smoothing, return_stats)

    if positive != "mean_loss":
        return outcome(aligned)
    losses = [outcome(s) for s in similarities.unbind(1)]
    if not return_stats:
        return torch.stack(losses).mean(0)
    return torch.stack([loss for loss, _ in losses]).mean(0), outcome(aligned)[1]
