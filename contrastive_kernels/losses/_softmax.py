"""The candidate softmax: negatives reduced to a few numbers per anchor, and the losses made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from contrastive_kernels.losses._arguments import ContrastiveStats
from contrastive_kernels.losses._options import SoftmaxOptions, reduce, row_factors, softplus
from contrastive_kernels.losses._polarization import add_polarization
from contrastive_kernels.primitives import (
    ALONE,
    Pairs,
    Shards,
    Statistics,
    kept_counts,
    kept_sums,
    softmax_total,
    sweep,
)


class Negatives(NamedTuple):
    """The kept negatives of one direction, per anchor; None where the options do not ask for it."""

    lse: Tensor
    maximum: Tensor | None = None
    similarity_sum: Tensor | None = None
    counts: Tensor | None = None
    band_sum: Tensor | None = None


def sweep_negatives(x: Tensor, y: Tensor | None, pairs: Pairs, options: SoftmaxOptions) -> Negatives:
    """Return the negatives of the rows of x among the rows of y, or of x itself, on all ranks, from one sweep.

    A y that is the same on every rank takes options without shards.
    """
    return _negatives(x, y, pairs, options, _sweep(x, y, pairs, options))


def sweep_both_directions(x: Tensor, y: Tensor, pairs: Pairs, options: SoftmaxOptions) -> list[Negatives]:
    """Return the negatives of the rows of x among those of y, and the other way round.

    Both come from one sweep unless there is a cutoff or a guide, which each direction applies to its own anchors.
    Polarization belongs to the first.
    """
    back, alone = pairs.turned(), replace(options, polarization=None)
    if pairs.by_similarity():
        return [sweep_negatives(x, y, pairs, options), sweep_negatives(y, x, back, alone)]
    out = _sweep(x, y, pairs, options, column_lse=True)
    turned = out._replace(row_lse=out.col_lse[None], row_max=out.col_max)
    return [_negatives(x, y, pairs, options, out), _negatives(y, x, back, alone, turned)]


def _sweep(x: Tensor, y: Tensor | None, pairs: Pairs, options: SoftmaxOptions, column_lse: bool = False) -> Statistics:
    band = None if options.polarization is None else options.polarization.band()
    return sweep(
        x,
        y,
        pairs,
        column_lse=column_lse,
        term=band,
        scale=options.scale,
        maximum=options.return_stats,
        backend=options.backend,
        shards=options.shards,
    )


def _negatives(x: Tensor, y: Tensor | None, pairs: Pairs, options: SoftmaxOptions, out: Statistics) -> Negatives:
    """Return what the options ask for, from the statistics of a sweep and from the ids."""
    smoothing, polarized = bool(options.label_smoothing), options.polarization is not None
    return Negatives(
        lse=out.row_lse.squeeze(0),
        maximum=out.row_max if options.return_stats else None,
        similarity_sum=kept_sums(x, y, pairs, options.backend, options.shards) if smoothing else None,
        counts=kept_counts(x, y, pairs, options.backend, options.shards) if smoothing or polarized else None,
        band_sum=out.row_sum if polarized else None,
    )


def list_negatives(similarity: Tensor, dropped: Tensor | None, options: SoftmaxOptions) -> Negatives:
    """Return the same for negatives that every anchor has for itself, from their similarities (N, K)."""
    logits = options.scale * similarity
    kept = torch.ones_like(similarity)
    if dropped is not None:
        logits, kept = logits.masked_fill(dropped, -torch.inf), kept.masked_fill(dropped, 0)
    everything_dropped = logits.isneginf().all(1)
    lse = logits.masked_fill(everything_dropped[:, None], 0).logsumexp(1).masked_fill(everything_dropped, -torch.inf)
    band_sum = None
    if options.polarization is not None:
        band = options.polarization.band()
        band_sum = (band.value(similarity, *band.operands().constants) * kept).sum(1)
    return Negatives(
        lse=lse,
        maximum=logits.amax(1) if options.return_stats else None,
        similarity_sum=similarity.masked_fill(kept == 0, 0).sum(1) if options.label_smoothing else None,
        counts=kept.sum(1) if options.label_smoothing or band_sum is not None else None,
        band_sum=band_sum,
    )


def union(a: Negatives, b: Negatives) -> Negatives:
    """Return the negatives of both."""

    def add(u: Tensor | None, v: Tensor | None) -> Tensor | None:
        return None if u is None or v is None else u + v

    return Negatives(
        lse=_logaddexp(a.lse, b.lse),
        maximum=None if a.maximum is None or b.maximum is None else torch.maximum(a.maximum, b.maximum),
        similarity_sum=add(a.similarity_sum, b.similarity_sum),
        counts=add(a.counts, b.counts),
        band_sum=add(a.band_sum, b.band_sum),
    )


def _logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """Return torch.logaddexp, but with zero gradient instead of NaN where both are -inf."""
    nothing = (a == -torch.inf) & (b == -torch.inf)
    return torch.logaddexp(a.masked_fill(nothing, 0), b.masked_fill(nothing, 0)).masked_fill(nothing, -torch.inf)


class Positives(NamedTuple):
    """What each anchor is pulled to and what of it stands in the denominator."""

    target: Tensor  # the logit that is subtracted
    lse: Tensor | None  # log-sum-exp of the anchor's own candidates in the denominator; None: there are none
    total: Tensor  # the sum of their logits
    number: int

    @classmethod
    def single(cls, logit: Tensor) -> Positives:
        """Return one positive per anchor, which is also in the denominator."""
        return cls(target=logit, lse=logit, total=logit, number=1)

    @classmethod
    def several(cls, logits: Tensor) -> Positives:
        """Return the positives of logits (N, K), all in the denominator: the loss is the mean of their losses."""
        if logits.shape[1] == 1:
            return cls.single(logits.squeeze(1))
        return cls(target=logits.mean(1), lse=logits.logsumexp(1), total=logits.sum(1), number=logits.shape[1])

    @classmethod
    def outside(cls, target: Tensor) -> Positives:
        """Return a positive that is not in the denominator."""
        return cls(target=target, lse=None, total=torch.zeros_like(target), number=0)


def _given(value: Tensor | None) -> Tensor:
    """Return what the options have asked for."""
    assert value is not None
    return value


def _stacked(vectors: list[Tensor]) -> Tensor:
    """Return torch.stack, without a copy of a single one."""
    return torch.stack(vectors) if len(vectors) > 1 else vectors[0][None]


def softmax_loss(
    directions: list[Negatives], positives: Positives, options: SoftmaxOptions
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    """Return the reduced loss, and its statistics if the options ask for them; (2, N) anchors of two directions."""
    loss = softmax_value(directions, positives, options)
    return (loss, softmax_stats(directions, positives, options.shards)) if options.return_stats else loss


def one_direction_loss(
    x: Tensor,
    y: Tensor | None,
    pairs: Pairs,
    positives: Positives,
    options: SoftmaxOptions,
    columns: Shards | None = None,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    """Return `softmax_loss` of the rows of x alone, with the negatives of `sweep_negatives`.

    `columns` are the shards of y, if they are not those of the options. Where nothing but the mean or the sum is asked
    for, value and gradients come from one visit of the rows.
    """
    own, target, weight = positives.lse, positives.target, options.weight
    plain = not (options.label_smoothing or options.return_stats) and options.polarization is None
    if plain and own is not None and options.reduction in ("mean", "sum"):
        if weight is not None:
            weight = weight.repeat(x.shape[0] // weight.shape[0])
        factors = partial(row_factors, x, weight, options.reduction, options.shards)
        total = weighted_row_losses(x, y, pairs, own, factors, options)
        if total is not None:
            return total if own is target else total + (factors() * (own - target)).sum()
    swept = options if columns is None else replace(options, shards=columns)
    return softmax_loss([sweep_negatives(x, y, pairs, swept)], positives, options)


def weighted_row_losses(
    x: Tensor, y: Tensor | None, pairs: Pairs, own: Tensor, factors: Callable[[], Tensor], options: SoftmaxOptions
) -> Tensor | None:
    """Return the sum of the factors times ``softplus(negatives - own)``; None where two sweeps have to compute it."""
    if not options.shards.alone:
        return None
    return softmax_total(x, y, pairs, scale=options.scale, own=own, weight=factors, backend=options.backend)


def softmax_value(directions: list[Negatives], positives: Positives, options: SoftmaxOptions) -> Tensor:
    """Return the reduced loss; per anchor it is the log-sum-exp of the denominator minus the target.

    Written as ``log(1 + exp(negatives - positives)) + (positives - target)``, which is exact where log-sum-exp minus
    target would cancel to 0. An anchor without any candidate in its denominator contributes 0.
    """
    target, own = positives.target, positives.lse
    negative_lse = _stacked([negatives.lse for negatives in directions])
    nothing = None
    if own is None:
        nothing = negative_lse == -torch.inf
        losses = negative_lse.masked_fill(nothing, 0) - target
    else:
        losses = softplus(negative_lse - own)
        losses = losses if own is target else losses + (own - target)
    if options.label_smoothing:
        sums = positives.total + options.scale * _stacked([_given(n.similarity_sum) for n in directions])
        counts = positives.number + _stacked([_given(n.counts) for n in directions])
        losses = losses + options.label_smoothing * (target - sums / counts.clamp(min=1))
    if nothing is not None:
        # not a constant: a NaN target stays one
        losses = torch.where(nothing, 0 * target, losses)
    losses = losses if len(directions) == 2 else losses.squeeze(0)
    loss = reduce(losses, options.weight, options.reduction, options.shards)
    if options.polarization is None:
        return loss
    band_sum, counts = _given(directions[0].band_sum), _given(directions[0].counts)
    return add_polarization(loss, band_sum, counts, options.polarization, options.reduction, options.shards)


def softmax_stats(directions: list[Negatives], positives: Positives, shards: Shards = ALONE) -> ContrastiveStats:
    """Return the statistics of the loss."""
    negative_lse = _stacked([negatives.lse for negatives in directions])
    lse = negative_lse if positives.lse is None else torch.logaddexp(negative_lse, positives.lse)
    largest = _stacked([_given(negatives.maximum) for negatives in directions])
    stats = statistics(positives.target.expand_as(lse), lse, largest, shards)
    return stats if len(directions) == 2 else ContrastiveStats(stats.accuracy, *(field[0] for field in stats[1:]))


def statistics(positive: Tensor, lse: Tensor, negative_max: Tensor, shards: Shards = ALONE) -> ContrastiveStats:
    """Return the statistics of a loss from the largest logits of its negatives; the accuracy is that of all ranks."""
    positive, lse, negative_max = positive.detach(), lse.detach(), negative_max.detach()
    hits = (positive > negative_max).to(positive.dtype)
    accuracy = shards.sum(hits.sum()) / shards.total(hits.numel()) if not shards.alone else hits.mean()
    return ContrastiveStats(accuracy, positive, lse, torch.maximum(positive, negative_max))
