"""Row log-sum-exp losses: InfoNCE, NT-Xent, CLIP, MoCo."""

from __future__ import annotations

from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from contrastive_kernels import checks
from contrastive_kernels.functional.candidates import (
    Negatives,
    Positives,
    Request,
    candidate_loss,
    cutoff_from,
    listed,
    merged,
    swept,
)
from contrastive_kernels.functional.common import (
    REDUCTIONS,
    ContrastiveStats,
    check_options,
    other_samples,
    other_views,
    per_view,
    rows,
    scale_from,
    view_major,
)
from contrastive_kernels.functional.polarization import Polarization
from contrastive_kernels.similarity import row_dot
from contrastive_kernels.sweep import Pairs

__all__ = ["clip_loss", "info_nce_loss", "moco_loss", "nt_xent_loss"]


def info_nce_loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    negative_mode: Literal["unpaired", "paired"] = "unpaired",
    in_batch_negatives: bool | None = None,
    symmetric: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    cutoff: float | Tensor | None = None,
    cutoff_margin: float | Tensor | None = None,
    polarization: Polarization | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    r"""InfoNCE: picks the positive key among all candidates, without the N x M similarity matrix.

    .. math:: L = \frac1N \sum_i \Bigl[ \log\bigl(e^{u_i^+} + \sum_j e^{u_{ij}}\bigr) - u_i^+ \Bigr],
        \qquad u_{ij} = \langle q_i, k_j \rangle / T

    The sum runs over the other rows' positive keys (in-batch negatives), over ``negative_keys``, or over both.

    Args:
        query: ``(N, D)``.
        positive_key: ``(N, D)``; row i is the positive of query i.
        negative_keys: ``(M, D)``, shared by all queries, or ``(N, M, D)``, each query's own, with
            ``negative_mode="paired"``. None: in-batch negatives only.
        temperature: T, float or 0-dim tensor (differentiable); 0.07 unless ``logit_scale`` is given.
        logit_scale: 1 / T instead.
        negative_mode: ``"unpaired"`` or ``"paired"``.
        in_batch_negatives: whether the other rows' positives are negatives; None: only without negative_keys.
        symmetric: mean of this loss and of the one with queries and positive keys exchanged; needs in-batch negatives.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per anchor; the mean is then sum(w l) / sum(w).
        label_smoothing: share of the target spread over all kept candidates.
        query_ids: ``(N,)`` integers; a candidate with the query's id that is not its positive is no negative.
        key_ids: ids of the negatives: ``(N,)`` for in-batch keys (None: query_ids), ``(M,)`` or ``(N, M)`` for
            negative_keys, ``(N + M,)`` for in-batch and shared ones.
        cutoff: float or ``(N,)``; negatives more similar than this are dropped, the positive never is.
        cutoff_margin: the same, as the positive's similarity plus a margin.
        polarization: adds `Polarization` over the negatives, from the same sweep.
        return_stats: also return `ContrastiveStats`.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``, ``(2, N)`` when symmetric; float32 (float64 for float64 inputs). With
        ``return_stats`` the pair (loss, stats).

    Raises:
        ValueError: shapes that do not fit, an empty batch, options that exclude each other, temperature near 0.
        TypeError: dtypes that differ or are not floating (ids: not integer).
        RuntimeError: tensors on different devices.

    Source: van den Oord, Li, Vinyals 2018, arXiv:1807.03748, eq. 4.

    Example:
        >>> query, key = torch.randn(2, 16, 8).unbind(0)
        >>> info_nce_loss(query, key, temperature=0.1).shape
        torch.Size([])
    """
    checks.features("query", query)
    checks.features("positive_key", positive_key)
    checks.alike("query", query, "positive_key", positive_key)
    checks.not_empty("query", query)
    check_options(query, reduction=reduction, weight=weight, label_smoothing=label_smoothing)
    checks.choice("negative_mode", negative_mode, ("unpaired", "paired"))
    scale = scale_from(temperature, logit_scale, query, default=0.07)
    paired = negative_mode == "paired"
    in_batch = negative_keys is None if in_batch_negatives is None else in_batch_negatives
    if negative_keys is not None:
        _check_negatives(query, negative_keys, paired)
    elif paired or not in_batch:
        raise ValueError(f"negative_keys is needed with negative_mode={negative_mode!r}, in_batch_negatives={in_batch}")
    if symmetric and not in_batch:
        raise ValueError("symmetric=True exchanges queries and in-batch keys; it needs in_batch_negatives=True")

    request = Request(scale, label_smoothing, polarization, return_stats, backend)
    query, positive_key = rows(query, normalize, backend), rows(positive_key, normalize, backend)
    negative_keys = None if negative_keys is None else rows(negative_keys, normalize, backend)
    positive_similarity = row_dot(query, positive_key, backend)
    cutoff = cutoff_from(cutoff, cutoff_margin, positive_similarity)
    query_ids, batch_ids, negative_ids = _split_ids(query, query_ids, key_ids, negative_keys, in_batch)

    directions: list[Negatives] = []
    if in_batch:
        pairs = Pairs(query_ids, batch_ids, cutoff, exclude_diagonal=True)
        directions = swept(query, positive_key, pairs, request, both_directions=symmetric)
    if negative_keys is not None:
        if paired:
            similarity = row_dot(query[:, None], negative_keys, backend)
            dropped = None if negative_ids is None else query_ids[:, None] == negative_ids
            if cutoff is not None:
                above = similarity > cutoff[:, None]
                dropped = above if dropped is None else dropped | above
            further = listed(similarity, dropped, request)
        else:
            pairs = Pairs(None if negative_ids is None else query_ids, negative_ids, cutoff)
            further = swept(query, negative_keys, pairs, request)[0]
        directions[:1] = [merged(directions[0], further) if directions else further]
    positives = Positives.single(scale * positive_similarity)
    return candidate_loss(directions, positives, request, weight=weight, reduction=reduction)


def nt_xent_loss(
    z0: Tensor,
    z1: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    multi_view: Literal["out", "pairs"] = "out",
    normalize: bool = True,
    reduction: str = "mean",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ids: Tensor | None = None,
    cutoff: float | Tensor | None = None,
    cutoff_margin: float | Tensor | None = None,
    polarization: Polarization | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    r"""NT-Xent, the loss of SimCLR, without the 2N x 2N similarity matrix.

    .. math:: L = \frac{1}{2N} \sum_{i=1}^{2N} \Bigl[ \log \sum_{j \ne i} e^{u_{ij}} - u_{i p(i)} \Bigr],
        \qquad u_{ij} = \langle z_i, z_j \rangle / T

    over the rows z of both views, p(i) the other view of i.

    Args:
        z0: ``(N, D)``, the first view; or all views as ``(N, V, D)``, with ``z1=None``.
        z1: ``(N, D)``, the second view.
        temperature: T, float or 0-dim tensor (differentiable); 0.5 unless ``logit_scale`` is given.
        logit_scale: 1 / T instead.
        multi_view: for V > 2 views: ``"out"``, every other view of the sample is a positive and L the mean of their
            losses, all views in the denominator; or ``"pairs"``, the mean of the two-view loss over all pairs of views.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or ``"sum_directions"``, twice the mean, as the official code.
        weight: ``(N,)`` per sample; the mean is then sum(w l) / sum(w).
        label_smoothing: share of the target spread over all kept candidates.
        ids: ``(N,)`` integers; other samples with the same id are no negatives.
        cutoff: float, ``(N,)`` or ``(2N,)``; negatives more similar than this are dropped, the positive never is.
        cutoff_margin: the same, as the positive's similarity plus a margin.
        polarization: adds `Polarization` over the negatives, from the same sweep.
        return_stats: also return `ContrastiveStats`.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.

    Returns:
        0-dim, or ``(2N,)`` for ``"none"``, first view first; float32 (float64 for float64 inputs). With
        ``return_stats`` the pair (loss, stats). 0 for N = 1.

    Raises:
        ValueError: shapes that do not fit, an empty batch, temperature near 0, ``multi_view="pairs"`` with
            ``reduction="none"``, ``return_stats`` or a cutoff per anchor.
        TypeError: dtypes that differ or are not floating (ids: not integer).
        RuntimeError: tensors on different devices.

    Source: Chen, Kornblith, Norouzi, Hinton, ICML 2020, arXiv:2002.05709, eq. 1.

    Example:
        >>> z0, z1 = torch.randn(2, 16, 8).unbind(0)
        >>> nt_xent_loss(z0, z1, temperature=0.1).shape
        torch.Size([])
    """
    views = view_major(z0, z1)
    checks.choice("multi_view", multi_view, ("out", "pairs"))
    if multi_view == "pairs" and len(views) > 2:
        if reduction == "none" or return_stats:
            raise ValueError('multi_view="pairs" averages over pairs of views: no reduction="none", no return_stats')
        options = dict(
            temperature=temperature, logit_scale=logit_scale, normalize=normalize, reduction=reduction, weight=weight,
            label_smoothing=label_smoothing, ids=ids, cutoff=cutoff, cutoff_margin=cutoff_margin,
            polarization=polarization, backend=backend,
        )  # fmt: skip
        losses = [nt_xent_loss(first, second, **options) for first, second in combinations(views, 2)]
        return torch.stack(losses).mean()
    v, n = views.shape[:2]
    check_options(
        views[0], reduction=reduction, weight=weight, label_smoothing=label_smoothing,
        reductions=(*REDUCTIONS, "sum_directions"),
    )  # fmt: skip
    scale = scale_from(temperature, logit_scale, views, default=0.5)
    request = Request(scale, label_smoothing, polarization, return_stats, backend)
    views = rows(views, normalize, backend)
    if v == 2:
        similarity = row_dot(*views, backend=backend).repeat(2)
        positives = Positives.single(scale * similarity)
    else:
        similarities = other_views(views, backend)
        similarity, logits = similarities.mean(1), scale * similarities
        positives = Positives(logits.mean(1), logits.logsumexp(1), logits.sum(1), v - 1)
    cutoff, cutoff_margin = (per_view(value, n, v) for value in (cutoff, cutoff_margin))
    pairs = other_samples(ids, n, v, views)._replace(cutoff=cutoff_from(cutoff, cutoff_margin, similarity))
    directions = swept(views.flatten(0, 1), None, pairs, request)
    factor = 2 if reduction == "sum_directions" else 1
    out = candidate_loss(directions, positives, request, weight=weight, reduction="mean" if factor == 2 else reduction)
    return out if factor == 1 else (factor * out[0], out[1]) if return_stats else factor * out


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor | None = None,
    logit_bias: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ids: Tensor | None = None,
    cutoff: float | Tensor | None = None,
    cutoff_margin: float | Tensor | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    r"""The symmetric cross-entropy of CLIP, both directions from one sweep, without the N x N logits.

    .. math:: L = \frac{1}{2N} \sum_i \Bigl[ \log \sum_j e^{u_{ij}} - u_{ii} \Bigr]
                + \frac{1}{2N} \sum_j \Bigl[ \log \sum_i e^{u_{ij}} - u_{jj} \Bigr],
        \qquad u_{ij} = a \langle x_i, y_j \rangle + b

    Args:
        image_features: x, ``(N, D)``, of unit norm (as the model gives them).
        text_features: y, ``(N, D)``, likewise.
        logit_scale: a, already exponentiated; float or tensor with one element (differentiable).
        logit_bias: b; cancels in the loss and gets a zero gradient, accepted for models that have one.
        temperature: 1 / a instead of logit_scale.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per pair; the mean is then sum(w l) / sum(w).
        label_smoothing: share of the target spread over all kept candidates.
        ids: ``(N,)`` integers; other pairs with the same id are no negatives (duplicate captions or images).
        cutoff: float or ``(N,)``; negatives more similar to the anchor than this are dropped, the positive never is.
        cutoff_margin: the same, as the positive's similarity plus a margin. Cutoffs take a second sweep.
        return_stats: also return `ContrastiveStats`, its fields (2, N).
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.

    Returns:
        0-dim, or ``(2, N)`` for ``"none"``, images first; float32 (float64 for float64 inputs). With ``return_stats``
        the pair (loss, stats).

    Raises:
        ValueError: shapes that do not fit, an empty batch, neither or both of logit_scale and temperature.
        TypeError: dtypes that differ or are not floating (ids: not integer).
        RuntimeError: tensors on different devices.

    Source: Radford et al., ICML 2021, arXiv:2103.00020, figure 3.

    Example:
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 16, 8), dim=-1).unbind(0)
        >>> logit_scale = torch.nn.Parameter(torch.tensor(14.3).log())
        >>> clip_loss(image, text, logit_scale.exp()).shape
        torch.Size([])
    """
    checks.features("image_features", image_features)
    checks.features("text_features", text_features)
    checks.alike("image_features", image_features, "text_features", text_features)
    checks.not_empty("image_features", image_features)
    check_options(image_features, reduction=reduction, weight=weight, label_smoothing=label_smoothing)
    scale = scale_from(temperature, logit_scale, image_features)
    bias = None if logit_bias is None else checks.scalar("logit_bias", logit_bias, image_features)
    request = Request(scale, label_smoothing, None, return_stats, backend)
    x, y = rows(image_features, normalize, backend), rows(text_features, normalize, backend)
    positive_similarity = row_dot(x, y, backend)
    ids = None if ids is None else checks.ids("ids", ids, x.shape[0], x)
    pairs = Pairs(ids, ids, cutoff_from(cutoff, cutoff_margin, positive_similarity), exclude_diagonal=ids is None)
    directions = swept(x, y, pairs, request, both_directions=True)
    positives = Positives.single(scale * positive_similarity)
    out = candidate_loss(directions, positives, request, weight=weight, reduction=reduction)
    if bias is None:
        return out
    loss, stats = out if return_stats else (out, None)
    if isinstance(bias, Tensor):
        loss = loss + 0 * bias.to(loss.dtype)
    if stats is None:
        return loss
    shift = bias.detach() if isinstance(bias, Tensor) else bias
    return loss, ContrastiveStats(stats.accuracy, *(field + shift for field in stats[1:]))


def moco_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
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
    r"""InfoNCE against a queue of past keys, as in MoCo, without the N x K similarity matrix.

    .. math:: L = \frac1N \sum_i \Bigl[ \log\bigl(e^{u_i^+} + \sum_{j=1}^K e^{u_{ij}}\bigr) - u_i^+ \Bigr],
        \qquad u_i^+ = \langle q_i, k_i \rangle / T,\quad u_{ij} = \langle q_i, \mathrm{queue}_j \rangle / T

    Args:
        query: ``(N, D)``.
        key: ``(N, D)``, the positives, from the momentum encoder; detached.
        queue: ``(K, D)``, past keys; detached. Pass ``queue.T`` of a ``(D, K)`` queue.
        temperature: T, float or 0-dim tensor (differentiable); 0.07 unless ``logit_scale`` is given.
        logit_scale: 1 / T instead.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per anchor; the mean is then sum(w l) / sum(w).
        label_smoothing: share of the target spread over all kept candidates.
        query_ids: ``(N,)`` integers, with ``key_ids`` of the queue, ``(K,)``: equal ids are no negatives.
        key_ids: see query_ids.
        cutoff: float or ``(N,)``; negatives more similar than this are dropped, the positive never is.
        cutoff_margin: the same, as the positive's similarity plus a margin.
        return_stats: also return `ContrastiveStats`.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``; float32 (float64 for float64 inputs). With ``return_stats`` the pair
        (loss, stats).

    Raises:
        ValueError: shapes that do not fit, an empty batch, temperature near 0.
        TypeError: dtypes that differ or are not floating (ids: not integer).
        RuntimeError: tensors on different devices.

    Source: He, Fan, Wu, Xie, Girshick, CVPR 2020, arXiv:1911.05722, eq. 1.

    Example:
        >>> query, key, queue = torch.randn(16, 8), torch.randn(16, 8), torch.randn(64, 8)
        >>> moco_loss(query, key, queue, temperature=0.2).shape
        torch.Size([])
    """
    checks.features("key", key)
    checks.features("queue", queue)
    checks.alike("query", query, "key", key)
    checks.alike("query", query, "queue", queue, rows=False)
    return info_nce_loss(
        query, key.detach(), queue.detach(), temperature=temperature, logit_scale=logit_scale, normalize=normalize,
        reduction=reduction, weight=weight, label_smoothing=label_smoothing, query_ids=query_ids, key_ids=key_ids,
        cutoff=cutoff, cutoff_margin=cutoff_margin, return_stats=return_stats, backend=backend,
    )  # fmt: skip


def _check_negatives(query: Tensor, negative_keys: Tensor, paired: bool) -> None:
    if not paired:
        checks.features("negative_keys", negative_keys)
        checks.alike("query", query, "negative_keys", negative_keys, rows=False)
        return
    checks.views("negative_keys", negative_keys, minimum=1)
    checks.alike("query", query, "negative_keys", negative_keys)


def _split_ids(
    query: Tensor, query_ids: Tensor | None, key_ids: Tensor | None, negative_keys: Tensor | None, in_batch: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Ids of the queries, of the in-batch keys and of the negative keys; None where there are none."""
    if query_ids is None:
        if key_ids is not None:
            raise ValueError("key_ids is given but query_ids is not; a key is no negative when its id is its query's")
        return None, None, None
    n = query.shape[0]
    query_ids = checks.ids("query_ids", query_ids, n, query)
    if key_ids is None:
        return query_ids, query_ids, None
    if negative_keys is None:
        return query_ids, checks.ids("key_ids", key_ids, n, query), None
    if negative_keys.dim() == 3:
        return query_ids, query_ids, checks.ids("key_ids", key_ids, tuple(negative_keys.shape[:2]), query)
    m = negative_keys.shape[0]
    key_ids = checks.ids("key_ids", key_ids, n + m if in_batch else m, query)
    return query_ids, key_ids[:n] if in_batch else None, key_ids[-m:] if m else key_ids[:0]
