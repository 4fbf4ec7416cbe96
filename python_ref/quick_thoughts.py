"""The loss of Quick-Thoughts."""

from __future__ import annotations

import torch

from ._dense import kept_logsumexp, kept_mean, reduce, scale_of, unit_rows
from ._pairs import different
from ._polarization import polarization_term


def quick_thoughts_loss(
    first,
    second,
    *,
    context_size=1,
    diagonal="zero",
    temperature=1.0,
    logit_scale=None,
    normalize=False,
    reduction="mean",
    weight=None,
    label_smoothing=0.0,
    ids=None,
    polarization=None,
):
    """Return the cross-entropy of the logits ``<f_i, g_j>`` with equal targets for the neighbours of i.

    The diagonal has logit 0 or, with ``diagonal="exclude"``, is left out.

    Source: Logeswaran & Lee 2018, arXiv:1803.02893.
    """
    index = torch.arange(len(first), device=first.device)
    distance = (index[:, None] - index[None, :]).abs()
    neighbour = (distance > 0) & (distance <= context_size)
    negative = (different(index, index) if ids is None else different(ids, ids)) & ~neighbour
    kept = (negative & (distance > 0)) | neighbour
    if diagonal == "zero":
        kept = kept | (distance == 0)
    similarity = unit_rows(first, normalize) @ unit_rows(second, normalize).mT
    logits = (scale_of(temperature, logit_scale) * similarity).masked_fill(distance == 0, 0.0)
    target = kept_mean(logits, neighbour)
    losses = kept_logsumexp(logits, kept) - target + label_smoothing * (target - kept_mean(logits, kept))
    loss = reduce(losses, reduction, weight)
    if polarization is None:
        return loss
    cosine = unit_rows(first) @ unit_rows(second).mT
    return loss + polarization_term(cosine, negative & (distance > 0), polarization, reduction)
