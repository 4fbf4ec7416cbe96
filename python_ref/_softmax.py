"""The softmax over positives and negatives: the loss of each anchor, its statistics, the reduced result."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._dense import INFINITY, kept_logsumexp, kept_mean, reduce


class Statistics(NamedTuple):
    """Detached by-products of a softmax loss, one number per anchor except the accuracy."""

    accuracy: torch.Tensor
    positive_logit: torch.Tensor
    lse: torch.Tensor
    logit_max: torch.Tensor


def softmax_loss(target, own, negative, kept, label_smoothing=0.0):
    """Return ``log(sum_own e^u + sum_kept e^u) - target`` of each anchor; 0 for an anchor without any candidate.

    Label smoothing gives ``(1 - eps) (lse - target) + eps (lse - mean u)``, the mean over own and kept logits.
    """
    everything = torch.cat([own, negative], dim=1)
    kept = torch.cat([torch.ones_like(own, dtype=torch.bool), kept], dim=1)
    empty = ~kept.any(1)
    if own.shape[1]:
        negatives, positives = kept_logsumexp(negative, kept[:, own.shape[1] :]), own.logsumexp(1)
        # the difference of two log-sum-exps would lose the digits of a loss of 1e-8
        loss = torch.logaddexp(negatives - positives, torch.zeros_like(target)) + (positives - target)
    else:
        loss = (kept_logsumexp(negative, kept).masked_fill(empty, 0.0) - target).masked_fill(empty, 0.0)
    if label_smoothing:
        loss = loss + label_smoothing * (target - kept_mean(everything, kept)).masked_fill(empty, 0.0)
    return loss


def softmax_statistics(target, own, negative, kept):
    """Return the top-1 accuracy (a tie is no win), the positive's logit, the log-sum-exp, the largest logit."""
    target, own, negative = target.detach(), own.detach(), negative.detach()
    nothing = target.new_full((len(target), 1), -INFINITY)
    largest = torch.cat([nothing, negative.masked_fill(~kept, -INFINITY)], 1).amax(1)
    lse = torch.logaddexp(kept_logsumexp(negative, kept), torch.cat([nothing, own], 1).logsumexp(1))
    wins = (target > largest).to(target.dtype)
    return Statistics(wins.mean(), target, lse, torch.maximum(target, largest))


def softmax_outcome(
    directions, reduction="mean", weight=None, label_smoothing=0.0, return_stats=False, polarization=None
):
    """Return the reduced loss of one or two directions, each (target, own, negative, kept), perhaps with statistics."""
    losses = [softmax_loss(*direction, label_smoothing) for direction in directions]
    loss = reduce(torch.stack(losses) if len(losses) > 1 else losses[0], reduction, weight)
    if polarization is not None:
        loss = loss + polarization
    if not return_stats:
        return loss
    statistics = [softmax_statistics(*direction) for direction in directions]
    if len(statistics) == 1:
        return loss, statistics[0]
    accuracy = torch.stack([s.accuracy for s in statistics]).mean()
    return loss, Statistics(accuracy, *(torch.stack(field) for field in list(zip(*statistics, strict=True))[1:]))
