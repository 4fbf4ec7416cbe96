"""ArCL on MoCo."""

from __future__ import annotations

import torch

from ._dense import scale_of, unit_rows
from ._pairs import below, different, threshold
from ._softmax import softmax_outcome
from ._views import first_minimum


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
    """Return ``mean_i log(1 + sum_queue e^{(s_ij - s+_i) / T})``, ``s+_i = min_j q_i k_ij``.

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
