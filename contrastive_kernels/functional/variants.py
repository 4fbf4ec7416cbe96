"""Losses whose denominator is not the candidates' own: decoupled contrastive loss, Quick-Thoughts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from contrastive_kernels import checks
from contrastive_kernels.functional.candidates import (
    Negatives,
    Positives,
    Request,
    candidate_loss,
    listed,
    merged,
    statistics,
    swept,
)
from contrastive_kernels.functional.common import ContrastiveStats, check_options, rows, scale_from
from contrastive_kernels.functional.negatives import check_two_views, two_views
from contrastive_kernels.functional.polarization import Polarization, polarized
from contrastive_kernels.similarity import row_dot
from contrastive_kernels.sweep import Pairs

__all__ = ["decoupled_loss", "quick_thoughts_loss"]


def decoupled_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    positive_weight: Tensor | Callable[[Tensor, Tensor], Tensor] | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ids: Tensor | None = None,
    cutoff: float | Tensor | None = None,
    cutoff_margin: float | Tensor | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    r"""The decoupled contrastive loss: NT-Xent without the positive in the denominator.

    .. math:: L = \frac{1}{2N} \sum_{i=1}^{2N} \Bigl[ \log \sum_j e^{u_{ij}} - w_i u_{i p(i)} \Bigr],
        \qquad u_{ij} = \langle z_i, z_j \rangle / T

    over the rows z of both views, p(i) the other view of i, j running over the rows of other samples. It may be
    negative. Not the debiased loss, which is abbreviated alike.

    Args:
        z0: ``(N, D)``, the first view.
        z1: ``(N, D)``, the second view.
        temperature: T, float or 0-dim tensor (differentiable); 0.1 unless ``logit_scale`` is given.
        logit_scale: 1 / T instead.
        positive_weight: w, ``(N,)`` per sample, or a callable of the two views as they enter the similarities that
            returns it; detached, and the same for both views. None: 1. The von Mises-Fisher weights of the paper are
            ``lambda z0, z1: 2 - len(z0) * ((z0 * z1).sum(1) / 0.5).softmax(0)``.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per sample; the mean is then sum(w l) / sum(w).
        label_smoothing: share of the target spread over the kept negatives.
        ids: ``(N,)`` integers; other samples with the same id are no negatives.
        cutoff: float, ``(N,)`` or ``(2N,)``; negatives more similar than this are dropped.
        cutoff_margin: the same, as the positive's similarity plus a margin.
        return_stats: also return `ContrastiveStats`.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.

    Returns:
        0-dim, or ``(2N,)`` for ``"none"``, first view first; float32 (float64 for float64 inputs). With
        ``return_stats`` the pair (loss, stats). 0 for N = 1 and for a row without negatives.

    Raises:
        ValueError: shapes that do not fit, an empty batch, temperature near 0.
        TypeError: dtypes that differ or are not floating (ids: not integer), a positive_weight that is no tensor.
        RuntimeError: tensors on different devices.

    Source: Yeh, Hong, Hsu, Liu, Chen, LeCun, ECCV 2022, arXiv:2110.06848.

    Example:
        >>> z0, z1 = torch.randn(2, 16, 8).unbind(0)
        >>> decoupled_loss(z0, z1, positive_weight=torch.full((16,), 0.5)).shape
        torch.Size([])
    """
    check_two_views(z0, z1)
    check_options(z0, reduction=reduction, weight=weight, label_smoothing=label_smoothing)
    if positive_weight is not None and not callable(positive_weight):
        checks.vector("positive_weight", positive_weight, z0, "z0")
    scale = scale_from(temperature, logit_scale, z0, default=0.1)
    request = Request(scale, label_smoothing, None, return_stats, backend)
    z, similarity, pairs = two_views(z0, z1, normalize, ids, cutoff, cutoff_margin, backend)
    positive = scale * similarity
    target = positive
    if positive_weight is not None:
        if callable(positive_weight):
            positive_weight = positive_weight(*z.detach().chunk(2))
            checks.vector("positive_weight", positive_weight, z0, "z0")
        target = positive_weight.detach().to(positive.dtype).repeat(2) * positive
    negatives = swept(z, None, pairs, request)[0]
    positives = Positives(target, None, torch.zeros_like(target), 0)
    out = candidate_loss([negatives], positives, request, weight=weight, reduction=reduction)
    return (out[0], statistics(positive, negatives.lse, negatives.maximum)) if return_stats else out


def quick_thoughts_loss(
    first: Tensor,
    second: Tensor,
    *,
    context_size: int = 1,
    diagonal: Literal["zero", "exclude"] = "zero",
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ids: Tensor | None = None,
    polarization: Polarization | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Quick-Thoughts: picks the neighbouring sentences among all of a batch in corpus order.

    .. math:: L = \frac1N \sum_i \Bigl[ \log\bigl(1 + \sum_{j \ne i} e^{u_{ij}}\bigr)
        - \frac{1}{|C_i|} \sum_{j \in C_i} u_{ij} \Bigr], \qquad C_i = \{j : 0 < |i - j| \le \mathrm{context\_size}\}

    with :math:`u_{ij} = \langle f_i, g_j \rangle`, raw dot products. The 1 is a sentence's own logit, which the
    official code sets to 0 and leaves in.

    Args:
        first: f, ``(N, D)``, N >= 2, rows in corpus order.
        second: g, ``(N, D)``, the same sentences by the other encoder.
        context_size: the distance up to which sentences are neighbours.
        diagonal: ``"zero"``, or ``"exclude"``: without the 1.
        temperature: divides u, float or 0-dim tensor (differentiable); 1 unless ``logit_scale`` is given.
        logit_scale: multiplies u instead.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per sentence; the mean is then sum(w l) / sum(w).
        label_smoothing: share of the target spread over all that is in the denominator.
        ids: ``(N,)`` integers; sentences with equal ids that are no neighbours leave the denominator.
        polarization: adds `Polarization` over the cosines to the sentences that are neither the same nor neighbours;
            from the same sweep with ``normalize``, else a sweep of its own.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``; float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit, fewer than two rows, a context_size below 1, an unknown diagonal.
        TypeError: dtypes that differ or are not floating (ids, context_size: not integer).
        RuntimeError: tensors on different devices.

    Source: Logeswaran, Lee, ICLR 2018, arXiv:1803.02893.

    Example:
        >>> first, second = torch.randn(2, 16, 8).unbind(0)
        >>> quick_thoughts_loss(first, second, context_size=2).shape
        torch.Size([])
    """
    _check_sentences(first, second, context_size)
    check_options(first, reduction=reduction, weight=weight, label_smoothing=label_smoothing)
    checks.choice("diagonal", diagonal, ("zero", "exclude"))
    n = first.shape[0]
    ids = None if ids is None else checks.ids("ids", ids, n, first)
    scale = scale_from(temperature, logit_scale, first, default=1.0)
    context = _context(n, context_size, ids, first.device)
    pairs = Pairs(ids, ids, exclude_diagonal=ids is None)
    request = Request(scale, label_smoothing, polarization if normalize else None, False, backend)
    x, y = rows(first, normalize, backend), rows(second, normalize, backend)
    similarity = _neighbours(x, y, context_size)
    target = scale * (similarity.sum(1) / context.valid.sum(1))
    swept_negatives = swept(x, y, pairs, request)[0]
    negatives = swept_negatives
    if ids is not None:
        negatives = merged(negatives, listed(similarity, ~context.dropped, request))
    zero = torch.zeros_like(target)
    positives = Positives(target, zero if diagonal == "zero" else None, zero, int(diagonal == "zero"))
    alone = replace(request, polarization=None)
    loss = candidate_loss([negatives], positives, alone, weight=weight, reduction=reduction)
    if polarization is None:
        return loss
    if not normalize:
        x, y = rows(first, True, backend), rows(second, True, backend)
        request = replace(request, label_smoothing=0.0, polarization=polarization)
        swept_negatives, similarity = swept(x, y, pairs, request)[0], _neighbours(x, y, context_size)
    negatives = _without(swept_negatives, listed(similarity, ~context.kept, request))
    return polarized(loss, negatives.band_sum, negatives.count, polarization, reduction)


class _Context(NamedTuple):
    """Of the neighbours (N, 2 C) of every row, in the order +1, -1, +2, -2, ..."""

    valid: Tensor  # those that exist
    kept: Tensor  # of these, those that the sweep keeps
    dropped: Tensor  # those that it drops for their id


def _check_sentences(first: Tensor, second: Tensor, context_size: int) -> None:
    checks.features("first", first)
    checks.features("second", second)
    checks.alike("first", first, "second", second)
    if first.shape[0] < 2:
        raise ValueError(f"first {checks.shape(first)} must have at least two rows: a sentence needs a neighbour")
    if isinstance(context_size, bool) or not isinstance(context_size, int):
        raise TypeError(f"context_size must be an integer, not {type(context_size).__name__}")
    if context_size < 1:
        raise ValueError(f"context_size {context_size} must be at least 1")


def _distances(n: int, context_size: int) -> range:
    return range(1, min(context_size, n - 1) + 1)


def _context(n: int, context_size: int, ids: Tensor | None, device: torch.device) -> _Context:
    distances = torch.arange(1, len(_distances(n, context_size)) + 1, device=device)
    index = torch.arange(n, device=device)[:, None] + torch.stack([distances, -distances], 1).flatten()
    valid = (index >= 0) & (index < n)
    if ids is None:
        return _Context(valid, valid, torch.zeros_like(valid))
    equal = ids[index.clamp(0, n - 1)] == ids[:, None]
    return _Context(valid, valid & ~equal, valid & equal)


def _neighbours(x: Tensor, y: Tensor, context_size: int) -> Tensor:
    """The similarities of the rows of x to their neighbours in y, (N, 2 C); 0 where there is none."""
    columns = []
    for k in _distances(x.shape[0], context_size):
        after, before = row_dot(x[:-k], y[k:]), row_dot(x[k:], y[:-k])
        columns += [torch.nn.functional.pad(after, (0, k)), torch.nn.functional.pad(before, (k, 0))]
    return torch.stack(columns, 1)


def _without(all_negatives: Negatives, some: Negatives) -> Negatives:
    """Band sum and count of all but some; a row of which nothing is left has the sum 0, not a rounding."""
    count = all_negatives.count - some.count
    band_sum = (all_negatives.band_sum - some.band_sum).masked_fill(count <= 0, 0)
    return all_negatives._replace(band_sum=band_sum, count=count)
