"""The triplet hinge: the function and its module."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from contrastive_kernels.losses._arguments import BackendArguments, ReductionArguments, loss_function
from contrastive_kernels.losses._module import LossModule
from contrastive_kernels.losses._options import check_reduction, reduce, row_factors
from contrastive_kernels.primitives import (
    DistanceHinge,
    Group,
    Hinge,
    Pairs,
    Shards,
    checks,
    compute_dtype,
    gather_rows,
    kept_counts,
    over_ranks,
    row_dot,
    select_over,
    shards_of,
    sweep,
    takes_double,
    unit_rows,
    weighted_total,
)

__all__ = ["TripletMarginLoss", "triplet_margin_loss"]

# As in the sweep: a smaller distance between unit rows is rounding, and its slope means nothing.
LEAST_DISTANCE = 1e-6
TRIPLET_REDUCTIONS = ("mean", "nonzero_mean", "sum", "none")


class TripletMarginArguments(BackendArguments, ReductionArguments, total=False):
    """Keyword arguments of `triplet_margin_loss`."""

    mining: Literal["all", "hardest"]
    metric: Literal["similarity", "euclidean"]
    ids: Tensor | None


@loss_function
@over_ranks
def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    *,
    margin: float | Tensor = 0.2,
    mining: Literal["all", "hardest"] = "all",
    metric: Literal["similarity", "euclidean"] = "similarity",
    normalize: bool = True,
    reduction: str = "mean",
    weight: Tensor | None = None,
    ids: Tensor | None = None,
    backend: str | None = None,
    group: Group | None = None,
) -> Tensor:
    r"""Return the triplet hinge against in-batch negatives, without the N x N similarities.

    .. math:: L_{\mathrm{all}} = \frac{1}{N(N-1)} \sum_{i \ne j} \bigl[ m - s_{ii} + s_{ij} \bigr]_+, \qquad
        L_{\mathrm{hardest}} = \frac1N \sum_i \Bigl( \bigl[ m - s_{ii} + \max_{j \ne i} s_{ij} \bigr]_+
        + \bigl[ m - s_{ii} + \max_{j \ne i} s_{ji} \bigr]_+ \Bigr)

    with :math:`s_{ij} = \langle x_i, y_j \rangle`, or :math:`-d_{ij} = -\sqrt{2 - 2 \langle x_i, y_j \rangle}`, at
    most -1e-6, for the Euclidean metric. The hinge is strict: at the kink it has no gradient.

    Args:
        anchor: x, ``(N, D)``.
        positive: y, ``(N, D)``; the rows of other anchors are the negatives.
        margin: m, in units of the metric; float or tensor with one element (differentiable).
        mining: ``"all"`` negatives of every anchor, or the ``"hardest"`` one in both directions (the lowest index on a
            tie), selected from tiles of the similarities in plain PyTorch.
        metric: ``"similarity"`` or ``"euclidean"``, the distance between unit rows. Of float32 rows on the CPU it is
            computed in float64, in two to three times the time, so that close rows keep their digits.
        normalize: rows to unit norm first.
        reduction: ``"mean"`` over the triplets (``"hardest"``: over the anchors), ``"nonzero_mean"`` over the hinges
            that are not 0, at the price of one more sweep, ``"sum"``, or ``"none"`` (sums per anchor).
        weight: ``(N,)`` per anchor, of the numerator and of the number that a mean divides by.
        ids: ``(N,)`` integers; other rows with the same id are no negatives.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch. None: this
            process alone.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``; float32 (float64 for float64 inputs). 0 where there is no negative.

    Raises:
        ValueError: shapes that do not fit, an empty batch, an unknown mining, metric or reduction.
        TypeError: dtypes that differ or are not floating (ids: not integer).
        RuntimeError: tensors on different devices.

    Source: Schroff, Kalenichenko, Philbin, CVPR 2015 (Euclidean); Faghri, Fleet, Kiros, Fidler, BMVC 2018 (hardest).

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> anchor, positive = torch.randn(16, 8), torch.randn(16, 8)
        >>> ck.triplet_margin_loss(anchor, positive, mining="hardest").shape
        torch.Size([])
    """
    shards = shards_of(group)
    checks.paired("anchor", anchor, "positive", positive)
    check_reduction(anchor, reduction, weight, TRIPLET_REDUCTIONS)
    checks.choice("mining", mining, ("all", "hardest"))
    checks.choice("metric", metric, ("similarity", "euclidean"))
    margin = checks.scalar("margin", margin, anchor)
    checks.backend(anchor, backend)
    ids = checks.optional_ids("ids", ids, anchor.shape[0], anchor)
    euclidean, dtype = metric == "euclidean", compute_dtype(anchor)
    if euclidean and anchor.dtype == torch.float32 and takes_double(anchor, backend):
        # 2 - 2 s of close rows has the digits that the rounding of s leaves, and that of the norms.
        anchor, positive = anchor.double(), positive.double()
    x, y = unit_rows(anchor, normalize, backend), unit_rows(positive, normalize, backend)
    if mining == "all":
        losses, counts = _all_hinges(x, y, margin, euclidean, ids, weight, reduction, backend, shards)
        if counts is None:
            return losses.to(dtype)
    else:
        losses, counts = _hardest_hinges(x, y, margin, euclidean, ids, reduction, backend, shards)
        if counts is None:
            return reduce(losses, weight, reduction, shards).to(dtype)
        losses = reduce(losses, weight, "sum", shards)
    number = shards.sum(reduce(counts, weight, "sum"))
    return (losses / number.masked_fill(number == 0, 1)).to(dtype)


class TripletMarginLoss(LossModule):
    """`triplet_margin_loss` as a module.

    Args:
        margin: in units of the metric; an ``nn.Parameter`` is trained.
        options: further keyword arguments of `triplet_margin_loss`.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.TripletMarginLoss(0.1, metric="euclidean")(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(triplet_margin_loss)
    reductions = TRIPLET_REDUCTIONS

    def __init__(
        self,
        margin: float | Tensor = 0.2,
        **options: Unpack[TripletMarginArguments],
    ) -> None:
        super().__init__(margin=margin, **options)

    def forward(
        self,
        anchor: Tensor,
        positive: Tensor,
        **inputs: Any,
    ) -> Tensor:
        """Return the loss; `inputs` are per-batch keyword arguments: weight, ids."""
        return self.function(anchor, positive, **self.options(**inputs))


def _all_hinges(
    x: Tensor,
    y: Tensor,
    margin: float | Tensor,
    euclidean: bool,
    ids: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    backend: str | None,
    shards: Shards,
) -> tuple[Tensor, Tensor | None]:
    """Return the weighted sum over all negatives ("none": each anchor's), and how many hinges a mean has to count."""
    similarity, pairs = row_dot(x, y, backend), Pairs(ids, ids, diagonals=1)
    margins = margin + _distance(similarity) if euclidean else margin - similarity
    term = DistanceHinge(margins) if euclidean else Hinge(margins)
    if reduction == "none":
        sums = sweep(x, y, pairs, term=term, exponents=(), backend=backend, shards=shards).row_sum
        return reduce(sums, weight, reduction), None
    total = weighted_total(
        x, y, pairs, term=term, weight=row_factors(x, weight, "sum", shards), backend=backend, shards=shards
    )
    if reduction == "sum":
        return total, None
    counts = kept_counts(x, y, pairs, shards=shards)
    if reduction == "nonzero_mean":
        # The hinges that are 0 are those of the pairs that a cutoff keeps.
        limit = margins.detach()
        limit = (1 - limit.square() / 2).masked_fill(limit <= LEAST_DISTANCE, torch.inf) if euclidean else -limit
        counts = counts - kept_counts(x, y, pairs._replace(cutoff=limit), backend, shards)
    return total, counts


def _hardest_hinges(
    x: Tensor,
    y: Tensor,
    margin: float | Tensor,
    euclidean: bool,
    ids: Tensor | None,
    reduction: str,
    backend: str | None,
    shards: Shards,
) -> tuple[Tensor, Tensor | None]:
    """Return every anchor's two hinges added, and the number of those that are not 0 if a mean has to count them."""
    similarity = row_dot(x, y, backend)
    hinges = []
    for own, other in ((x, y), (y, x)):
        _, columns = select_over(shards, own.detach(), other.detach(), 1, x_ids=ids, y_ids=ids, exclude_diagonal=True)
        columns = columns[:, 0]
        rows = gather_rows(other, columns.clamp(min=0)) if shards.alone else shards.rows_at(other, columns)
        hardest = row_dot(own, rows, backend)
        gap = _distance(similarity) - _distance(hardest) if euclidean else hardest - similarity
        hinges.append(torch.relu(margin + gap).masked_fill(columns < 0, 0))
    losses = hinges[0] + hinges[1]
    if reduction != "nonzero_mean":
        return losses, None
    return losses, torch.stack([hinge > 0 for hinge in hinges]).sum(0).to(losses.dtype)


def _distance(similarity: Tensor) -> Tensor:
    """Return the distance of unit rows; below `LEAST_DISTANCE` that, without gradient."""
    return (2 - 2 * similarity).clamp(min=LEAST_DISTANCE**2).sqrt()
