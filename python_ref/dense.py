"""What every dense loss shares: unit rows, the candidate softmax, the reductions, the statistics."""

from __future__ import annotations

from typing import NamedTuple

import torch

INFINITY = float("inf")


class Statistics(NamedTuple):
    """Detached by-products of a softmax loss; per anchor except the accuracy."""

    accuracy: torch.Tensor
    positive_logit: torch.Tensor
    lse: torch.Tensor
    logit_max: torch.Tensor


def unit_rows(x, normalize=True):
    """``x / max(|x|, 1e-12)`` with gradient 0 where ``|x| < 1e-12``.

    Source: ``F.normalize``.
    """
    if not normalize:
        return x
    squares = x.square().sum(-1, keepdim=True)
    tiny = squares.sqrt() < 1e-12
    norm = squares.masked_fill(tiny, 1.0).sqrt()
    return torch.where(tiny, (x / 1e-12).detach(), x / norm)


def scale_of(temperature, logit_scale):
    """``a = logit_scale`` or ``1 / temperature``."""
    return 1.0 / temperature if logit_scale is None else logit_scale


def different(row_ids, column_ids):
    """``row_ids[i] != column_ids[j]`` as an (N, M) mask; all pairs where there are no ids."""
    return row_ids[:, None] != column_ids[None, :]


def threshold(similarity_of_positive, cutoff, cutoff_margin):
    """Per-anchor cutoff ``c_i``, given or ``sg(s_p) + margin``, or None."""
    if cutoff is not None and cutoff_margin is not None:
        raise ValueError("cutoff and cutoff_margin exclude each other")
    if cutoff_margin is not None:
        return similarity_of_positive.detach() + cutoff_margin
    if cutoff is not None:
        return torch.as_tensor(cutoff).to(similarity_of_positive) + torch.zeros_like(similarity_of_positive)
    return None


def below(similarity, cutoffs):
    """Pairs that survive ``s_ij <= c_i``; a NaN similarity survives."""
    if cutoffs is None:
        return torch.ones_like(similarity, dtype=torch.bool)
    return ~(similarity.detach() > cutoffs[:, None])


def kept_logsumexp(logits, kept, dim=-1):
    """``log sum_kept exp(logits)``; -inf without gradient where nothing is kept."""
    empty = ~kept.any(dim, keepdim=True)
    total = logits.masked_fill(~(kept | empty), -INFINITY).logsumexp(dim)
    return total.masked_fill(empty.squeeze(dim), -INFINITY)


def kept_mean(values, kept):
    """Mean over the kept entries of each row; 0 where nothing is kept."""
    return values.masked_fill(~kept, 0.0).sum(-1) / kept.sum(-1).clamp(min=1)


def softmax_loss(target, own, negative, kept, label_smoothing=0.0):
    r"""``log(sum_own e^u + sum_kept e^u) - target`` per anchor; 0 for an anchor without any candidate.

    Label smoothing: ``(1 - eps) (lse - target) + eps (lse - mean over own and kept u)``.
    """
    everything = torch.cat([own, negative], dim=1)
    kept = torch.cat([torch.ones_like(own, dtype=torch.bool), kept], dim=1)
    empty = ~kept.any(1)
    if own.shape[1]:
        negatives, positives = kept_logsumexp(negative, kept[:, own.shape[1] :]), own.logsumexp(1)
        # not the difference of two log-sum-exps: a loss of 1e-8 keeps its digits
        loss = torch.logaddexp(negatives - positives, torch.zeros_like(target)) + (positives - target)
    else:
        loss = (kept_logsumexp(negative, kept).masked_fill(empty, 0.0) - target).masked_fill(empty, 0.0)
    if label_smoothing:
        loss = loss + label_smoothing * (target - kept_mean(everything, kept)).masked_fill(empty, 0.0)
    return loss


def softmax_statistics(target, own, negative, kept):
    """Top-1 accuracy (a tie is no win), the positive's logit, log-sum-exp of own and kept, largest logit."""
    target, own, negative = target.detach(), own.detach(), negative.detach()
    nothing = target.new_full((len(target), 1), -INFINITY)
    largest = torch.cat([nothing, negative.masked_fill(~kept, -INFINITY)], 1).amax(1)
    lse = torch.logaddexp(kept_logsumexp(negative, kept), torch.cat([nothing, own], 1).logsumexp(1))
    wins = (target > largest).to(target.dtype)
    return Statistics(wins.mean(), target, lse, torch.maximum(target, largest))


def softmax_outcome(
    directions, reduction="mean", weight=None, label_smoothing=0.0, return_stats=False, polarization=None
):
    """Reduced loss, and the statistics, of one or two directions of (target, own, negative, kept)."""
    losses = [softmax_loss(*direction, label_smoothing) for direction in directions]
    loss = reduced(torch.stack(losses) if len(losses) > 1 else losses[0], reduction, weight)
    if polarization is not None:
        loss = loss + polarization
    if not return_stats:
        return loss
    statistics = [softmax_statistics(*direction) for direction in directions]
    if len(statistics) == 1:
        return loss, statistics[0]
    accuracy = torch.stack([s.accuracy for s in statistics]).mean()
    return loss, Statistics(accuracy, *(torch.stack(field) for field in list(zip(*statistics, strict=True))[1:]))


def reduced(values, reduction, weight=None):
    """``mean`` (``sum w l / sum w``), ``sum`` (``sum w l``), ``none`` (``w l``), ``sum_directions`` (2 mean)."""
    weight = torch.ones_like(values) if weight is None else weight.to(values)
    if values.dim() == 1:
        weight = weight.repeat(len(values) // len(weight))
    weight = weight.expand_as(values)
    if reduction == "none":
        return weight * values
    total = (weight * values).sum()
    return total if reduction == "sum" else {"mean": 1, "sum_directions": 2}[reduction] * total / weight.sum()
