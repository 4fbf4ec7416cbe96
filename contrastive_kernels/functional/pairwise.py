"""Losses that are sums over pairs of rows: SigLIP's sigmoids and the triplet hinges."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from contrastive_kernels import checks
from contrastive_kernels.backends import choose_backend
from contrastive_kernels.functional.candidates import cutoff_from, statistics
from contrastive_kernels.functional.common import (
    ContrastiveStats,
    check_options,
    reduce,
    row_factors,
    rows,
    scale_from,
    softplus,
)
from contrastive_kernels.functional.totals import kept_counts
from contrastive_kernels.select import row_select
from contrastive_kernels.similarity import row_dot, sweep, weighted_total
from contrastive_kernels.sweep import DistanceHinge, Hinge, Pairs, Softplus

# As in the sweep: a smaller distance between unit rows is rounding, and its slope means nothing.
LEAST_DISTANCE = 1e-6


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor | None = None,
    logit_bias: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    negative_only: bool = False,
    normalize: bool = False,
    reduction: str = "mean",
    weight: Tensor | None = None,
    ids: Tensor | None = None,
    cutoff: float | Tensor | None = None,
    cutoff_margin: float | Tensor | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    r"""The pairwise sigmoid loss of SigLIP from one sweep, without the N x N logits.

    .. math:: L = \frac1N \Bigl[ \sum_i \log(1 + e^{-u_{ii}}) + \sum_{i \ne j} \log(1 + e^{u_{ij}}) \Bigr],
        \qquad u_{ij} = a \langle x_i, y_j \rangle + b

    Divided by N, not by the number of pairs.

    Args:
        image_features: x, ``(N, D)``, of unit norm (as the model gives them).
        text_features: y, ``(N, D)``, likewise.
        logit_scale: a, already exponentiated; float or tensor with one element (differentiable).
        logit_bias: b, likewise; None for 0. Training starts from about -10.
        temperature: 1 / a instead of logit_scale.
        negative_only: every pair is a negative, those with i = j too: the texts are another device's.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (row sums).
        weight: ``(N,)`` per image; the mean is then sum(w l) / sum(w).
        ids: ``(N,)`` integers; other pairs with the same id are no negatives (duplicate captions or images).
        cutoff: float or ``(N,)``; negatives more similar to the image than this are dropped, the positive never is.
        cutoff_margin: the same, as the positive's similarity plus a margin.
        return_stats: also return `ContrastiveStats` of the rows of logits; ``lse`` is over all kept texts.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``; float32 (float64 for float64 inputs). With ``return_stats`` the pair
        (loss, stats).

    Raises:
        ValueError: shapes that do not fit, an empty batch, neither or both of logit_scale and temperature, or
            ``negative_only`` with an option that refers to positives (ids, cutoff_margin, return_stats).
        TypeError: dtypes that differ or are not floating (ids: not integer).
        RuntimeError: tensors on different devices.

    Source: Zhai, Mustafa, Kolesnikov, Beyer, ICCV 2023, arXiv:2303.15343.

    Example:
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 16, 8), dim=-1).unbind(0)
        >>> log_scale, bias = torch.nn.Parameter(torch.tensor(10.0).log()), torch.nn.Parameter(torch.tensor(-10.0))
        >>> siglip_loss(image, text, log_scale.exp(), bias).shape
        torch.Size([])
    """
    _check_pair("image_features", image_features, "text_features", text_features)
    check_options(image_features, reduction=reduction, weight=weight)
    for name, given in (("ids", ids is not None), ("cutoff_margin", cutoff_margin is not None),
                        ("return_stats", return_stats)):  # fmt: skip
        if negative_only and given:
            raise ValueError(f"{name} refers to the positive pairs, and with negative_only=True there are none")
    scale = scale_from(temperature, logit_scale, image_features)
    bias = 0.0 if logit_bias is None else checks.scalar("logit_bias", logit_bias, image_features)
    x, y = rows(image_features, normalize, backend), rows(text_features, normalize, backend)
    similarity = row_dot(x, y, backend)
    ids = None if ids is None else checks.ids("ids", ids, x.shape[0], x)
    pairs = Pairs(ids, ids, cutoff_from(cutoff, cutoff_margin, similarity), exclude_diagonal=not negative_only)
    term, positive = Softplus(scale, bias), scale * similarity + bias
    attraction = 0.0 if negative_only else softplus(-positive)
    if reduction != "none" and not return_stats:
        factors = row_factors(x, weight, reduction)
        repulsion = weighted_total(x, y, pairs, term=term, weight=factors, backend=backend)
        return repulsion if negative_only else repulsion + (factors * attraction).sum()
    options = dict(exponents=(1.0,), maximum=True) if return_stats else dict(exponents=())
    out = sweep(x, y, pairs, scale=_detached(scale), term=term, backend=backend, **options)
    loss = reduce(out.row_sum + attraction, weight, reduction)
    if not return_stats:
        return loss
    negative_lse, negative_max = (v + _detached(bias) for v in (out.row_lse.squeeze(0), out.row_max))
    return loss, statistics(positive, torch.logaddexp(negative_lse, positive), negative_max)


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
) -> Tensor:
    r"""The triplet hinge against in-batch negatives, without the N x N similarities.

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
        metric: ``"similarity"`` or ``"euclidean"``, the distance between unit rows.
        normalize: rows to unit norm first.
        reduction: ``"mean"`` over the triplets (``"hardest"``: over the anchors), ``"nonzero_mean"`` over the hinges
            that are not 0, at the price of one more sweep, ``"sum"``, or ``"none"`` (sums per anchor).
        weight: ``(N,)`` per anchor, of the numerator and of the number that a mean divides by.
        ids: ``(N,)`` integers; other rows with the same id are no negatives.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``; float32 (float64 for float64 inputs). 0 where there is no negative.

    Raises:
        ValueError: shapes that do not fit, an empty batch, an unknown mining, metric or reduction.
        TypeError: dtypes that differ or are not floating (ids: not integer).
        RuntimeError: tensors on different devices.

    Source: Schroff, Kalenichenko, Philbin, CVPR 2015 (Euclidean); Faghri, Fleet, Kiros, Fidler, BMVC 2018 (hardest).

    Example:
        >>> anchor, positive = torch.randn(16, 8), torch.randn(16, 8)
        >>> triplet_margin_loss(anchor, positive, mining="hardest").shape
        torch.Size([])
    """
    _check_pair("anchor", anchor, "positive", positive)
    check_options(anchor, reduction=reduction, weight=weight, reductions=("mean", "nonzero_mean", "sum", "none"))
    checks.choice("mining", mining, ("all", "hardest"))
    checks.choice("metric", metric, ("similarity", "euclidean"))
    margin = checks.scalar("margin", margin, anchor)
    choose_backend(anchor, backend)  # the hardest take none, but a name that does not exist is an error there too
    x, y = rows(anchor, normalize, backend), rows(positive, normalize, backend)
    ids = None if ids is None else checks.ids("ids", ids, x.shape[0], x)
    euclidean = metric == "euclidean"
    if mining == "all":
        losses, counts = _all_hinges(x, y, margin, euclidean, ids, weight, reduction, backend)
        if counts is None:
            return losses
    else:
        losses, counts = _hardest_hinges(x, y, margin, euclidean, ids, reduction)
        if counts is None:
            return reduce(losses, weight, reduction)
        losses = reduce(losses, weight, "sum")
    number = reduce(counts, weight, "sum")
    return losses / number.masked_fill(number == 0, 1)


def _all_hinges(
    x: Tensor, y: Tensor, margin: float | Tensor, euclidean: bool, ids: Tensor | None, weight: Tensor | None,
    reduction: str, backend: str | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The weighted sum over all negatives ("none": each anchor's), and how many hinges a mean has to count."""
    similarity, pairs = row_dot(x, y, backend), Pairs(ids, ids, exclude_diagonal=True)
    term = DistanceHinge(margin + _distance(similarity)) if euclidean else Hinge(margin - similarity)
    if reduction == "none":
        return reduce(sweep(x, y, pairs, term=term, exponents=(), backend=backend).row_sum, weight, reduction), None
    total = weighted_total(x, y, pairs, term=term, weight=row_factors(x, weight, "sum"), backend=backend)
    if reduction == "sum":
        return total, None
    counts = kept_counts(x, y, pairs)
    if reduction == "nonzero_mean":
        # The hinges that are 0 are those of the pairs that a cutoff keeps.
        limit = term.margin.detach()
        limit = (1 - limit.square() / 2).masked_fill(limit <= LEAST_DISTANCE, torch.inf) if euclidean else -limit
        counts = counts - kept_counts(x, y, pairs._replace(cutoff=limit), backend)
    return total, counts


def _hardest_hinges(
    x: Tensor, y: Tensor, margin: float | Tensor, euclidean: bool, ids: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor | None]:
    """Every anchor's two hinges added, and the number of those that are not 0 if a mean has to count them."""
    similarity = row_dot(x, y)
    hinges = []
    for own, other in ((x, y), (y, x)):
        _, columns = row_select(own.detach(), other.detach(), x_ids=ids, y_ids=ids, exclude_diagonal=True)
        columns = columns[:, 0]
        hardest = row_dot(own, other[columns.clamp(min=0)])
        gap = _distance(similarity) - _distance(hardest) if euclidean else hardest - similarity
        hinges.append(torch.relu(margin + gap).masked_fill(columns < 0, 0))
    losses = hinges[0] + hinges[1]
    if reduction != "nonzero_mean":
        return losses, None
    return losses, torch.stack([hinge > 0 for hinge in hinges]).sum(0).to(losses.dtype)


def _distance(similarity: Tensor) -> Tensor:
    """Of unit rows; below `LEAST_DISTANCE` that, without gradient."""
    return (2 - 2 * similarity).clamp(min=LEAST_DISTANCE**2).sqrt()


def _check_pair(name_x: str, x: Tensor, name_y: str, y: Tensor) -> None:
    """Two batches of paired rows."""
    checks.features(name_x, x)
    checks.features(name_y, y)
    checks.alike(name_x, x, name_y, y)
    checks.not_empty(name_x, x)


def _detached(value: float | Tensor) -> float | Tensor:
    return value.detach() if isinstance(value, Tensor) else value
