"""The candidate softmax: negatives reduced to a few numbers per anchor, and the losses made of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from contrastive_kernels import checks
from contrastive_kernels.functional.common import ContrastiveStats, reduce, softplus
from contrastive_kernels.functional.polarization import Polarization, polarized
from contrastive_kernels.functional.totals import kept_counts, kept_sums
from contrastive_kernels.similarity import sweep
from contrastive_kernels.sweep import Pairs


@dataclass(frozen=True)
class Request:
    """What a loss wants to know of its negatives besides their log-sum-exp."""

    scale: float | Tensor
    label_smoothing: float = 0.0
    polarization: Polarization | None = None
    return_stats: bool = False
    backend: str | None = None


class Negatives(NamedTuple):
    """The kept negatives of one direction, per anchor; None where not requested."""

    lse: Tensor
    maximum: Tensor | None = None
    similarity_sum: Tensor | None = None
    count: Tensor | None = None
    band_sum: Tensor | None = None


def swept(
    x: Tensor, y: Tensor | None, pairs: Pairs, request: Request, *, both_directions: bool = False
) -> list[Negatives]:
    """The negatives of the rows of x among the rows of y and, with both_directions, of the rows of y among those of x.

    Both directions come from one sweep unless there is a cutoff, which each direction applies to its own anchors.
    """
    band = None if request.polarization is None else request.polarization.band()
    options = dict(scale=request.scale, maximum=request.return_stats, backend=request.backend)
    columns = both_directions and pairs.cutoff is None
    out = sweep(x, y, pairs, columns=columns, term=band, **options)
    row_max, col_max = (out.row_max, out.col_max) if request.return_stats else (None, None)
    sums = kept_sums(x, y, pairs, request.backend) if request.label_smoothing else None
    counts = kept_counts(x, y, pairs, request.backend) if request.label_smoothing or band is not None else None
    negatives = [Negatives(out.row_lse.squeeze(0), row_max, sums, counts, None if band is None else out.row_sum)]
    if both_directions:
        back = pairs._replace(x_ids=pairs.y_ids, y_ids=pairs.x_ids)
        if columns:
            sums = kept_sums(y, x, back) if request.label_smoothing else None
            counts = kept_counts(y, x, back) if request.label_smoothing else None
            negatives.append(Negatives(out.col_lse, col_max, sums, counts))
        else:
            negatives += swept(y, x, back, replace(request, polarization=None))
    return negatives


def listed(similarity: Tensor, dropped: Tensor | None, request: Request) -> Negatives:
    """The same for negatives that every anchor has for itself, from their similarities (N, K)."""
    logits = request.scale * similarity
    kept = torch.ones_like(similarity)
    if dropped is not None:
        logits, kept = logits.masked_fill(dropped, -torch.inf), kept.masked_fill(dropped, 0)
    everything_dropped = logits.isneginf().all(1)
    lse = logits.masked_fill(everything_dropped[:, None], 0).logsumexp(1).masked_fill(everything_dropped, -torch.inf)
    band_sum = None
    if request.polarization is not None:
        distance, (lower, upper) = (1 - similarity) / 2, request.polarization.band().operands().constants
        band_sum = (((distance - lower) * (upper - distance)).clamp(min=0) * kept).sum(1)
    return Negatives(
        lse,
        logits.amax(1) if request.return_stats else None,
        similarity.masked_fill(kept == 0, 0).sum(1) if request.label_smoothing else None,
        kept.sum(1) if request.label_smoothing or band_sum is not None else None,
        band_sum,
    )


def _logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """torch.logaddexp, but with zero gradient instead of NaN where both are -inf."""
    nothing = (a == -torch.inf) & (b == -torch.inf)
    return torch.logaddexp(a.masked_fill(nothing, 0), b.masked_fill(nothing, 0)).masked_fill(nothing, -torch.inf)


def merged(a: Negatives, b: Negatives) -> Negatives:
    """The negatives of both."""
    merge = (_logaddexp, torch.maximum, torch.add, torch.add, torch.add)
    return Negatives(*(None if u is None else f(u, v) for f, u, v in zip(merge, a, b, strict=True)))


class Positives(NamedTuple):
    """What each anchor is pulled to and what of it stands in the denominator."""

    target: Tensor  # the logit that is subtracted
    lse: Tensor | None  # log-sum-exp of the anchor's own candidates in the denominator, None: there are none
    total: Tensor  # the sum of their logits
    count: int

    @classmethod
    def single(cls, logit: Tensor) -> Positives:
        """One positive, which is also in the denominator."""
        return cls(logit, logit, logit, 1)


def _stacked(vectors: list[Tensor]) -> Tensor:
    """torch.stack, without a copy of a single one."""
    return torch.stack(vectors) if len(vectors) > 1 else vectors[0][None]


def candidate_loss(
    directions: list[Negatives], positives: Positives, request: Request, *, weight: Tensor | None, reduction: str
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    """Per anchor: log-sum-exp of the denominator minus the target; (2, N) anchors where there are two directions.

    Written as ``log(1 + exp(negatives - positives)) + (positives - target)``, which is exact where log-sum-exp minus
    target would cancel to 0. An anchor without any candidate in its denominator contributes 0.
    """
    target, own = positives.target, positives.lse
    negative_lse = _stacked([negatives.lse for negatives in directions])
    if own is None:
        nothing = negative_lse == -torch.inf
        losses = negative_lse.masked_fill(nothing, 0) - target
    else:
        losses = softplus(negative_lse - own)
        losses = losses if own is target else losses + (own - target)
    if request.label_smoothing:
        sums = positives.total + request.scale * _stacked([negatives.similarity_sum for negatives in directions])
        counts = positives.count + _stacked([negatives.count for negatives in directions])
        losses = losses + request.label_smoothing * (target - sums / counts.clamp(min=1))
    if own is None:
        # not a constant: a NaN target stays one
        losses = torch.where(nothing, 0 * target, losses)
    loss = reduce(losses if len(directions) == 2 else losses.squeeze(0), weight, reduction)
    if request.polarization is not None:
        loss = polarized(loss, directions[0].band_sum, directions[0].count, request.polarization, reduction)
    if not request.return_stats:
        return loss
    lse = negative_lse if own is None else torch.logaddexp(negative_lse, own)
    stats = statistics(target.expand_as(lse), lse, torch.stack([negatives.maximum for negatives in directions]))
    return loss, stats if len(directions) == 2 else ContrastiveStats(stats[0], *(field[0] for field in stats[1:]))


def statistics(positive: Tensor, lse: Tensor, negative_max: Tensor) -> ContrastiveStats:
    """The statistics of a loss from the largest logits of its negatives."""
    positive, lse, negative_max = positive.detach(), lse.detach(), negative_max.detach()
    accuracy = (positive > negative_max).to(positive.dtype).mean()
    return ContrastiveStats(accuracy, positive, lse, torch.maximum(positive, negative_max))


def cutoff_from(
    cutoff: float | Tensor | None, cutoff_margin: float | Tensor | None, positive_similarity: Tensor
) -> Tensor | None:
    """The similarity above which a negative is dropped, per anchor, without gradient."""
    if cutoff is not None and cutoff_margin is not None:
        raise ValueError("cutoff and cutoff_margin are both given; pass one of them")
    anchors = positive_similarity.detach()
    if cutoff_margin is not None:
        return anchors + checks.per_row("cutoff_margin", cutoff_margin, anchors)
    return checks.per_row("cutoff", cutoff, anchors)
