"""Losses that align the least similar (or all) views of a sample: ArCL and AAL, with in-batch negatives or a queue."""

from __future__ import annotations

from itertools import product
from typing import Literal

import torch
from torch import Tensor

from contrastive_kernels import checks
from contrastive_kernels.functional.candidates import (
    Positives,
    Request,
    candidate_loss,
    cutoff_from,
    merged,
    swept,
)
from contrastive_kernels.functional.common import ContrastiveStats, check_options, rows, scale_from
from contrastive_kernels.similarity import min_view_similarity, row_dot
from contrastive_kernels.sweep import Pairs

__all__ = ["arcl_loss", "moco_arcl_loss"]

DENOMINATORS = ("two_view", "one_view", "positive+one_view", "positive+two_view")


def arcl_loss(
    views: Tensor,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    positive: Literal["min", "mean"] = "min",
    denominator: Literal["two_view", "one_view", "positive+one_view", "positive+two_view"] = "two_view",
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
    r"""ArCL: aligns the worst pair of a sample's views, without the N x 2N similarity matrix.

    .. math:: L = \frac1N \sum_i \Bigl[ \log \sum_{j \in \mathrm{Den}(i)} e^{u_{ij}} - s_i^+ / T \Bigr],
        \qquad s_i^+ = \min_{j<k} \langle z_{ij}, z_{ik} \rangle

    View 1 of each sample is the anchor. The denominator is our reading of a partly illegible source; with two views the
    default makes L the first half of NT-Xent.

    Args:
        views: ``(N, V, D)``, V >= 2.
        temperature: T, float or 0-dim tensor (differentiable); 0.5 unless ``logit_scale`` is given.
        logit_scale: 1 / T instead.
        positive: ``"min"`` or ``"mean"`` over the pairs of views (the average alignment loss AAL).
        denominator: ``"two_view"``: view 1 of the others and view 2 of all; ``"one_view"``: view 1 of the others;
            ``"positive+one_view"`` and ``"positive+two_view"``: the others' views and :math:`e^{s^+/T}`.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per sample; the mean is then sum(w l) / sum(w).
        label_smoothing: share of the target spread over the candidates of the denominator.
        ids: ``(N,)`` integers; other samples with the same id are no negatives.
        cutoff: float or ``(N,)``; negatives more similar to the anchor than this are dropped.
        cutoff_margin: the same, as :math:`s^+` plus a margin.
        return_stats: also return `ContrastiveStats`, the positive being :math:`s^+`.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``; float32 (float64 for float64 inputs). With ``return_stats`` the pair
        (loss, stats). ``"one_view"`` may be negative, and is 0 for a sample without negatives.

    Raises:
        ValueError: fewer than two views, an empty batch, an unknown option, temperature near 0.
        TypeError: views is not floating or ids are not integers.

    Source: Zhao, Du, Wang, Yao, Huang, ICLR 2023 (ArCL), on SimCLR.

    Example:
        >>> arcl_loss(torch.randn(16, 4, 8), temperature=0.2).shape
        torch.Size([])
    """
    checks.views("views", views)
    checks.not_empty("views", views)
    check_options(views, reduction=reduction, weight=weight, label_smoothing=label_smoothing)
    checks.choice("positive", positive, ("min", "mean"))
    checks.choice("denominator", denominator, DENOMINATORS)
    scale = scale_from(temperature, logit_scale, views, default=0.5)
    request = Request(scale, label_smoothing, None, return_stats, backend)
    views = rows(views, normalize, backend)
    aligned = min_view_similarity(views, reduce=positive, backend=backend)[0]
    first, second = views[:, 0], views[:, 1]
    ids = None if ids is None else checks.ids("ids", ids, views.shape[0], views)
    pairs = Pairs(ids, None, cutoff_from(cutoff, cutoff_margin, aligned), exclude_diagonal=ids is None)
    negatives = swept(first, None, pairs, request)[0]
    if denominator.endswith("two_view"):
        negatives = merged(negatives, swept(first, second, pairs._replace(y_ids=ids), request)[0])

    target = scale * aligned
    if denominator == "two_view":
        own = scale * row_dot(first, second, backend)
        positives = Positives(target, own, own, 1)
    elif denominator == "one_view":
        positives = Positives(target, None, torch.zeros_like(target), 0)
    else:
        positives = Positives.single(target)
    return candidate_loss([negatives], positives, request, weight=weight, reduction=reduction)


def moco_arcl_loss(
    query: Tensor,
    keys: Tensor,
    queue: Tensor,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    positive: Literal["min", "mean", "mean_loss"] = "min",
    pairs: Literal["keys", "all"] = "keys",
    normalize: bool = True,
    reduction: str = "mean",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    cutoff: float | Tensor | None = None,
    cutoff_margin: float | Tensor | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    r"""ArCL against a queue: the least similar key view is the positive, without the N x K similarity matrix.

    .. math:: L = \frac1N \sum_i \log\Bigl(1 + \sum_{j=1}^K e^{(\langle q_i, h_j \rangle - s_i^+) / T}\Bigr),
        \qquad s_i^+ = \min_k \langle q_i, k_{ik} \rangle

    Args:
        query: ``(N, D)``; ``(N, V, D)`` with ``pairs="all"``, where view 1 meets the queue.
        keys: ``(N, V, D)``, the views of the momentum encoder; detached.
        queue: ``(K, D)``, past keys h; detached. Pass ``queue.T`` of a ``(D, K)`` queue.
        temperature: T, float or 0-dim tensor (differentiable); 0.07 unless ``logit_scale`` is given.
        logit_scale: 1 / T instead.
        positive: ``"min"`` or ``"mean"`` similarity, or ``"mean_loss"``, the mean of the losses, over key views.
        pairs: ``"keys"``: the query against every key view; ``"all"``: every query view against every other key view.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per anchor; the mean is then sum(w l) / sum(w).
        label_smoothing: share of the target spread over all kept candidates.
        query_ids: ``(N,)`` integers, with ``key_ids`` of the queue, ``(K,)``: equal ids are no negatives.
        key_ids: see query_ids.
        cutoff: float or ``(N,)``; negatives more similar than this are dropped.
        cutoff_margin: the same, as :math:`s^+` (the mean for ``"mean_loss"``) plus a margin.
        return_stats: also return `ContrastiveStats`, the positive being :math:`s^+` (the mean for ``"mean_loss"``).
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``; float32 (float64 for float64 inputs). With ``return_stats`` the pair
        (loss, stats).

    Raises:
        ValueError: shapes that do not fit, an empty batch, an unknown option, temperature near 0.
        TypeError: dtypes that differ or are not floating (ids: not integer).
        RuntimeError: tensors on different devices.

    Source: Zhao, Du, Wang, Yao, Huang, ICLR 2023 (ArCL), on MoCo; which views count is our reading.

    Example:
        >>> moco_arcl_loss(torch.randn(16, 8), torch.randn(16, 3, 8), torch.randn(64, 8)).shape
        torch.Size([])
    """
    checks.choice("pairs", pairs, ("keys", "all"))
    checks.choice("positive", positive, ("min", "mean", "mean_loss"))
    (checks.views if pairs == "all" else checks.features)("query", query)
    checks.views("keys", keys, minimum=2 if pairs == "all" else 1)
    checks.features("queue", queue)
    checks.alike("query", query, "keys", keys)
    checks.alike("query", query, "queue", queue, rows=False)
    checks.not_empty("query", query)
    check_options(query, reduction=reduction, weight=weight, label_smoothing=label_smoothing)
    scale = scale_from(temperature, logit_scale, query, default=0.07)
    request = Request(scale, label_smoothing, None, return_stats, backend)
    query, keys, queue = (rows(x, normalize, backend) for x in (query, keys.detach(), queue.detach()))
    if pairs == "all":
        distinct = [(j, k) for j, k in product(range(query.shape[1]), range(keys.shape[1])) if j != k]
        similarities = torch.stack([row_dot(query[:, j], keys[:, k], backend) for j, k in distinct], 1)
        query = query[:, 0]
    else:
        similarities = torch.stack([row_dot(query, key, backend) for key in keys.unbind(1)], 1)
    if positive == "min":
        aligned = similarities.gather(1, similarities.argmin(1, keepdim=True)).squeeze(1)
    else:
        aligned = similarities.mean(1)
    if (query_ids is None) != (key_ids is None):
        raise ValueError("query_ids and key_ids (of the queue) go together; one of them is missing")
    if query_ids is not None:
        query_ids = checks.ids("query_ids", query_ids, query.shape[0], query)
        key_ids = checks.ids("key_ids", key_ids, queue.shape[0], query)
    kept = Pairs(query_ids, key_ids, cutoff_from(cutoff, cutoff_margin, aligned))
    negatives = swept(query, queue, kept, request)
    options = dict(weight=weight, reduction=reduction)
    out = candidate_loss(negatives, Positives.single(scale * aligned), request, **options)
    if positive != "mean_loss":
        return out
    losses = [
        candidate_loss(negatives, Positives.single(scale * s), request, **options) for s in similarities.unbind(1)
    ]
    if not return_stats:
        return torch.stack(losses).mean(0)
    return torch.stack([loss for loss, _ in losses]).mean(0), out[1]
