"""Losses whose denominator is not the candidates' own: decoupled contrastive loss, Quick-Thoughts."""

from __future__ import annotations

import torch

from .dense import different, kept_logsumexp, kept_mean, reduced, scale_of, softmax_loss, softmax_statistics, unit_rows
from .negatives import two_views
from .polarization import polarization_term


def decoupled_loss(
    z0,
    z1,
    *,
    temperature=0.1,
    logit_scale=None,
    positive_weight=None,
    normalize=True,
    reduction="mean",
    weight=None,
    label_smoothing=0.0,
    ids=None,
    cutoff=None,
    cutoff_margin=None,
    return_stats=False,
):
    """``mean_i (log sum_neg e^u - w_i u_ip)``, the sum over the rows of other samples.

    Source: Yeh et al. 2022, arXiv:2110.06848.
    """
    scale = scale_of(temperature, logit_scale)
    similarity, positive, kept = two_views(z0, z1, normalize, ids, cutoff, cutoff_margin)
    if callable(positive_weight):
        positive_weight = positive_weight(unit_rows(z0, normalize), unit_rows(z1, normalize))
    share = 1.0 if positive_weight is None else positive_weight.detach().repeat(2)
    logits, positive = scale * similarity, scale * positive
    losses = softmax_loss(share * positive, logits[:, :0], logits, kept, label_smoothing)
    loss = reduced(losses, reduction, weight)
    return (loss, softmax_statistics(positive, logits[:, :0], logits, kept)) if return_stats else loss


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
    """Cross-entropy of the logits ``<f_i, g_j>``, 0 on the diagonal, with equal targets for the neighbours.

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
    loss = reduced(losses, reduction, weight)
    if polarization is None:
        return loss
    cosine = unit_rows(first) @ unit_rows(second).mT
    return loss + polarization_term(cosine, negative & (distance > 0), polarization, reduction)
