"""Losses that correct the negatives they are given: debiased and hard-negative contrastive loss."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from contrastive_kernels import checks
from contrastive_kernels.functional.candidates import (
    Negatives,
    Positives,
    Request,
    candidate_loss,
    cutoff_from,
    swept,
)
from contrastive_kernels.functional.common import (
    ContrastiveStats,
    check_options,
    other_samples,
    per_view,
    rows,
    scale_from,
)
from contrastive_kernels.functional.polarization import Polarization
from contrastive_kernels.functional.totals import kept_counts
from contrastive_kernels.similarity import row_dot, sweep
from contrastive_kernels.sweep import Count, Pairs

__all__ = ["debiased_loss", "hard_negative_loss"]


def debiased_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    tau_plus: float = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
    weight: Tensor | None = None,
    ids: Tensor | None = None,
    cutoff: float | Tensor | None = None,
    cutoff_margin: float | Tensor | None = None,
    polarization: Polarization | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    r"""The debiased contrastive loss: NT-Xent whose negatives are corrected for the positives hidden among them.

    .. math:: L = \frac{1}{2N} \sum_{i=1}^{2N} \Bigl[ \log\bigl(e^{u_i^+} + N_i\bigr) - u_i^+ \Bigr], \qquad
        N_i = \max\Bigl(\frac{\sum_j e^{u_{ij}} - \tau^+ n_i e^{u_i^+}}{1 - \tau^+},\ n_i e^{-1/T}\Bigr)

    over the rows of both views, :math:`u_{ij} = \langle z_i, z_j \rangle / T`, j running over the :math:`n_i` rows of
    other samples. Not the decoupled loss, which is abbreviated alike.

    Args:
        z0: ``(N, D)``, the first view.
        z1: ``(N, D)``, the second view.
        temperature: T, float or 0-dim tensor (differentiable); 0.5 unless ``logit_scale`` is given.
        logit_scale: 1 / T instead.
        tau_plus: :math:`\tau^+`, the probability that a negative is a positive, in [0, 1).
        normalize: rows to unit norm first; the lower bound of :math:`N_i` takes it for granted.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per sample; the mean is then sum(w l) / sum(w).
        ids: ``(N,)`` integers; other samples with the same id are no negatives.
        cutoff: float, ``(N,)`` or ``(2N,)``; negatives more similar than this are dropped, and not counted.
        cutoff_margin: the same, as the positive's similarity plus a margin.
        polarization: adds `Polarization` over the negatives, from the same sweep.
        return_stats: also return `ContrastiveStats`; its lse is :math:`\log(e^{u_i^+} + N_i)`.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.

    Returns:
        0-dim, or ``(2N,)`` for ``"none"``, first view first; float32 (float64 for float64 inputs). With
        ``return_stats`` the pair (loss, stats). 0 for N = 1 and for a row without negatives.

    Raises:
        ValueError: shapes that do not fit, an empty batch, tau_plus outside [0, 1), temperature near 0.
        TypeError: dtypes that differ or are not floating (ids: not integer).
        RuntimeError: tensors on different devices.

    Source: Chuang, Robinson, Lin, Torralba, Jegelka, NeurIPS 2020, arXiv:2007.00224.

    Example:
        >>> z0, z1 = torch.randn(2, 16, 8).unbind(0)
        >>> debiased_loss(z0, z1, tau_plus=0.05).shape
        torch.Size([])
    """
    return hard_negative_loss(
        z0, z1, temperature=temperature, logit_scale=logit_scale, tau_plus=tau_plus, beta=0.0, normalize=normalize,
        reduction=reduction, weight=weight, ids=ids, cutoff=cutoff, cutoff_margin=cutoff_margin,
        polarization=polarization, return_stats=return_stats, backend=backend,
    )  # fmt: skip


def hard_negative_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    tau_plus: float = 0.1,
    beta: float = 1.0,
    estimator: Literal["hard", "easy"] = "hard",
    detach_weights: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
    weight: Tensor | None = None,
    ids: Tensor | None = None,
    cutoff: float | Tensor | None = None,
    cutoff_margin: float | Tensor | None = None,
    polarization: Polarization | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    r"""The hard-negative contrastive loss: the debiased loss with negatives weighted by their hardness, in one sweep.

    .. math:: L = \frac{1}{2N} \sum_{i=1}^{2N} \Bigl[ \log\bigl(e^{u_i^+} + N_i\bigr) - u_i^+ \Bigr], \qquad
        N_i = \max\Bigl(\frac{R_i - \tau^+ n_i e^{u_i^+}}{1 - \tau^+},\ n_i e^{-1/T}\Bigr), \qquad
        R_i = n_i \frac{\sum_j e^{(1 + \beta) u_{ij}}}{\sum_j e^{\beta u_{ij}}}

    over the rows of both views, :math:`u_{ij} = \langle z_i, z_j \rangle / T`, j running over the :math:`n_i` rows of
    other samples. Computed from logarithms, so that no temperature overflows.

    Args:
        z0: ``(N, D)``, the first view.
        z1: ``(N, D)``, the second view.
        temperature: T, float or 0-dim tensor (differentiable); 0.5 unless ``logit_scale`` is given.
        logit_scale: 1 / T instead.
        tau_plus: :math:`\tau^+`, the probability that a negative is a positive, in [0, 1).
        beta: concentration on the hard negatives, at least 0; 0 is `debiased_loss`.
        estimator: ``"hard"``, or ``"easy"``: :math:`N_i = \sum_j e^{u_{ij}}`, which is NT-Xent and takes neither
            tau_plus nor beta into account.
        detach_weights: take the weights :math:`e^{\beta u_{ij}}` as constants; the official code differentiates them.
        normalize: rows to unit norm first; the lower bound of :math:`N_i` takes it for granted.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per sample; the mean is then sum(w l) / sum(w).
        ids: ``(N,)`` integers; other samples with the same id are no negatives.
        cutoff: float, ``(N,)`` or ``(2N,)``; negatives more similar than this are dropped, and not counted.
        cutoff_margin: the same, as the positive's similarity plus a margin.
        polarization: adds `Polarization` over the negatives, from the same sweep.
        return_stats: also return `ContrastiveStats`; its lse is :math:`\log(e^{u_i^+} + N_i)`.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.

    Returns:
        0-dim, or ``(2N,)`` for ``"none"``, first view first; float32 (float64 for float64 inputs). With
        ``return_stats`` the pair (loss, stats). 0 for N = 1 and for a row without negatives.

    Raises:
        ValueError: shapes that do not fit, an empty batch, tau_plus outside [0, 1), a negative beta, an unknown
            estimator, temperature near 0.
        TypeError: dtypes that differ or are not floating (ids: not integer).
        RuntimeError: tensors on different devices.

    Source: Robinson, Chuang, Sra, Jegelka, ICLR 2021, arXiv:2010.04592.

    Example:
        >>> z0, z1 = torch.randn(2, 16, 8).unbind(0)
        >>> hard_negative_loss(z0, z1, temperature=0.2, beta=0.5).shape
        torch.Size([])
    """
    check_two_views(z0, z1)
    check_options(z0, reduction=reduction, weight=weight)
    checks.choice("estimator", estimator, ("hard", "easy"))
    _check_correction(tau_plus, beta)
    scale = scale_from(temperature, logit_scale, z0, default=0.5)
    request = Request(scale, 0.0, polarization, return_stats, backend)
    z, similarity, pairs = two_views(z0, z1, normalize, ids, cutoff, cutoff_margin, backend)
    positive = scale * similarity
    if estimator == "easy":
        negatives = swept(z, None, pairs, request)[0]
    else:
        negatives = _weighted(z, pairs, request, float(beta), detach_weights)
        negatives = negatives._replace(lse=_corrected(negatives, positive, scale, tau_plus))
    return candidate_loss([negatives], Positives.single(positive), request, weight=weight, reduction=reduction)


class TwoViews(NamedTuple):
    """The rows of two views as one set of anchors, each with its positive in the other view."""

    z: Tensor  # (2N, D), first view first
    similarity: Tensor  # (2N,), of every row to its positive
    pairs: Pairs  # the negatives: the rows of other samples


def check_two_views(z0: Tensor, z1: Tensor) -> None:
    """Two floating (N, D) tensors that fit, N > 0."""
    checks.features("z0", z0)
    checks.features("z1", z1)
    checks.alike("z0", z0, "z1", z1)
    checks.not_empty("z0", z0)


def two_views(
    z0: Tensor,
    z1: Tensor,
    normalize: bool,
    ids: Tensor | None,
    cutoff: float | Tensor | None,
    cutoff_margin: float | Tensor | None,
    backend: str | None,
) -> TwoViews:
    """The anchors and negatives that NT-Xent has, from checked views; thresholds per sample or per anchor."""
    n = z0.shape[0]
    views = rows(torch.stack([z0, z1]), normalize, backend)
    similarity = row_dot(*views, backend=backend).repeat(2)
    cutoff, cutoff_margin = (per_view(value, n, 2) for value in (cutoff, cutoff_margin))
    pairs = other_samples(ids, n, 2, z0)._replace(cutoff=cutoff_from(cutoff, cutoff_margin, similarity))
    return TwoViews(views.flatten(0, 1), similarity, pairs)


def _check_correction(tau_plus: float, beta: float) -> None:
    checks.number("tau_plus", tau_plus)
    checks.number("beta", beta)
    if not 0 <= tau_plus < 1:
        raise ValueError(f"tau_plus {tau_plus} must be at least 0 and below 1: it is a probability")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta {beta} must be at least 0 and finite")


def _weighted(z: Tensor, pairs: Pairs, request: Request, beta: float, detach_weights: bool) -> Negatives:
    """The negatives of the rows of z, their log-sum-exp that of the sum R of the weighted ones; one sweep."""
    band = None if request.polarization is None else request.polarization.band()
    # A count over a cutoff comes from the sweep that applies it, so that both see the same pairs.
    counted = band is None and pairs.cutoff is not None
    out = sweep(
        z,
        None,
        pairs,
        scale=request.scale,
        exponents=(1.0 + beta, beta) if beta else (1.0,),
        term=Count() if counted else band,
        maximum=request.return_stats,
        backend=request.backend,
    )
    count = out.row_sum.detach() if counted else kept_counts(z, None, pairs, request.backend)
    # A row of no negatives has the log-sum-exps -inf, whose difference is NaN.
    empty = (count == 0) | (out.row_lse[0] == -torch.inf)
    lse = out.row_lse.masked_fill(empty, 0)
    total = lse[0]
    if beta:
        weighted, weights = lse
        if detach_weights:
            constant = weighted.detach()
            weighted, weights = constant + (weighted - constant) / (1 + beta), weights.detach()
        total = weighted - weights + count.clamp(min=1).log()
    row_max = out.row_max if request.return_stats else None
    return Negatives(total.masked_fill(empty, -torch.inf), row_max, None, count, None if band is None else out.row_sum)


def _corrected(negatives: Negatives, positive: Tensor, scale: float | Tensor, tau_plus: float) -> Tensor:
    r"""``log max((R - tau_plus n p) / (1 - tau_plus), n exp(-|scale|))``, -inf without gradient where n = 0."""
    total, log_count = negatives.lse, negatives.count.clamp(min=1).log()
    estimate = total
    if tau_plus:
        hidden = math.log(tau_plus) + log_count + positive
        estimate = _logsubexp(total, hidden) - math.log1p(-tau_plus)
    floor = log_count - abs(scale)
    # A NaN is not below the floor and stays.
    estimate = torch.where(estimate < floor, floor, estimate)
    return estimate.masked_fill(total == -torch.inf, -torch.inf)


def _logsubexp(a: Tensor, b: Tensor) -> Tensor:
    """``log(exp(a) - exp(b))``, -inf without gradient where ``a <= b``."""
    x = b - a
    nothing = (x >= 0) | (a == -torch.inf)
    x = x.masked_fill(nothing, -1)
    # Each form where it is accurate, with a harmless argument elsewhere: the branch not taken has a gradient too.
    near = x > -math.log(2)
    log1mexp = torch.where(
        near, (-torch.expm1(x.masked_fill(~near, -0.5))).log(), torch.log1p(-x.masked_fill(near, -1).exp())
    )
    return (a.masked_fill(nothing, 0) + log1mexp).masked_fill(nothing, -torch.inf)
