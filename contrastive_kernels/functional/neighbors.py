"""Losses that look at the order of the similarities first: NNCLR, false-negative cancellation, easy negatives."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_kernels import checks
from contrastive_kernels.functional.candidates import (
    Positives,
    Request,
    candidate_loss,
    cutoff_from,
    swept,
)
from contrastive_kernels.functional.common import (
    ContrastiveStats,
    check_options,
    other_views,
    poison,
    rows,
    scale_from,
    view_major,
)
from contrastive_kernels.functional.softmax import info_nce_loss
from contrastive_kernels.functional.totals import kept_counts
from contrastive_kernels.select import check_count, row_select
from contrastive_kernels.similarity import row_dot, sweep
from contrastive_kernels.sweep import Identity, Pairs, compute_dtype

__all__ = ["easy_negative_loss", "false_negative_loss", "nnclr_loss"]


def nnclr_loss(
    z: Tensor,
    predictions: Tensor,
    support: Tensor,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
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
    r"""NNCLR: the nearest neighbour of one view in a support set is to pick the other view's prediction.

    .. math:: L = \frac1N \sum_i \Bigl[ \log \sum_j e^{\langle n_i, p_j \rangle / T} - \langle n_i, p_i \rangle / T
        \Bigr], \qquad n_i = \mathrm{support}_{\arg\max_k \cos(z_i, \mathrm{support}_k)}

    Neither the N x N nor the N x K similarities are stored.

    Args:
        z: ``(N, D)``, the projections of one view, which choose the neighbours; detached. Or of both views,
            ``(N, 2, D)``: L is then the mean over both directions, as in the paper.
        predictions: ``(N, D)``, the predictor's outputs of the other view; or of both views in the order of z,
            ``(N, 2, D)``: the neighbours of view 1 meet the predictions of view 2, and the other way round.
        support: ``(K, D)``, K >= 1, past projections; detached. A tie for the nearest goes to the first.
        temperature: T, float or 0-dim tensor (differentiable); 0.1 unless ``logit_scale`` is given.
        logit_scale: 1 / T instead.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per sample; the mean is then sum(w l) / sum(w).
        label_smoothing: share of the target spread over all kept candidates.
        ids: ``(N,)`` integers; the predictions of other samples with the same id are no negatives.
        cutoff: float or ``(N,)``; negatives more similar than this are dropped, the positive never is.
        cutoff_margin: the same, as the positive's similarity plus a margin.
        return_stats: also return `ContrastiveStats`; its fields are (2, N) for both directions.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``, ``(2, N)`` for both directions; float32 (float64 for float64 inputs). With
        ``return_stats`` the pair (loss, stats).

    Raises:
        ValueError: shapes that do not fit, an empty batch or support, temperature near 0.
        TypeError: dtypes that differ or are not floating (ids: not integer).
        RuntimeError: tensors on different devices.

    Source: Dwibedi, Aytar, Tompson, Sermanet, Zisserman, ICCV 2021, arXiv:2104.14548.

    Example:
        >>> z, predictions, support = torch.randn(16, 2, 8), torch.randn(16, 2, 8), torch.randn(64, 8)
        >>> nnclr_loss(z, predictions, support).shape
        torch.Size([])
    """
    _check_nnclr(z, predictions, support)
    check_options(z, reduction=reduction, weight=weight, label_smoothing=label_smoothing)
    scale = scale_from(temperature, logit_scale, predictions, default=0.1)
    request = Request(scale, label_smoothing, None, return_stats, backend)
    ids = None if ids is None else checks.ids("ids", ids, z.shape[0], z)
    z, predictions, support = (rows(x, normalize, backend) for x in (z.detach(), predictions, support.detach()))
    # an infinite similarity is a nearest neighbour like others
    infinite = 0.0 if normalize else poison(z) + poison(support)
    both = z.dim() == 3
    z, predictions = (z.unbind(1), predictions.unbind(1)[::-1]) if both else ([z], [predictions])
    directions, similarities = [], []
    for projection, prediction in zip(z, predictions, strict=True):
        nearest = _nearest(projection, support)
        similarities.append(row_dot(nearest, prediction, backend) + infinite)
        pairs = Pairs(ids, ids, cutoff_from(cutoff, cutoff_margin, similarities[-1]), exclude_diagonal=ids is None)
        directions += swept(nearest, prediction, pairs, request)
    positives = Positives.single(scale * (torch.stack(similarities) if both else similarities[0]))
    return candidate_loss(directions, positives, request, weight=weight, reduction=reduction)


def false_negative_loss(
    z0: Tensor,
    z1: Tensor | None = None,
    *,
    mode: Literal["eliminate", "attract"] = "eliminate",
    threshold: float | Tensor | None = 0.7,
    top_k: int | None = 10,
    score: Literal["anchor"] = "anchor",
    factor: float = 2.0,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ids: Tensor | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    r"""NT-Xent without its likely false negatives, or with them as positives; no similarity matrix is stored.

    .. math::
        L &= \frac{c}{VN} \sum_i \Bigl[ \log \sum_{j \ne i,\ j \notin F(i)} e^{u_{ij}}
            - \frac{1}{V - 1} \sum_{p \in P(i)} u_{ip} \Bigr] && \text{eliminate} \\
        L &= \frac{c}{VN} \sum_i \Bigl[ \log \sum_{j \ne i} e^{u_{ij}}
            - \frac{1}{V - 1 + |F(i)|} \sum_{p \in P(i) \cup F(i)} u_{ip} \Bigr] && \text{attract}

    over the rows z of all views, P(i) the other views of i's sample, :math:`u_{ij} = \langle z_i, z_j \rangle / T`.
    Flagged, F(i), are the rows of other samples whose similarity to i is above the threshold and among the row's top_k
    largest. Flags have no gradient. With nothing flagged L is c times `nt_xent_loss`.

    Elimination is the paper's other mode, not verified against its code, which has attraction only, and scores a sample
    by the most similar of the anchor's views. Here every anchor scores for itself.

    Args:
        z0: ``(N, D)``, the first view; or all views as ``(N, V, D)``, with ``z1=None``.
        z1: ``(N, D)``, the second view.
        mode: ``"eliminate"`` or ``"attract"``.
        threshold: similarity above which a row may be flagged; float, ``(VN,)`` per anchor, view-major, or None.
        top_k: how many rows may be flagged, or None: all above the threshold, at the price of further sweeps to
            attract. Equal similarities: the lower row is flagged to attract; to eliminate, none that equals the largest
            one not flagged.
        score: ``"anchor"``; the official ``"image"`` is in `python_ref` only, densely.
        factor: c; 2 as the official code, 1 for the mean over the anchors.
        temperature: T, float or 0-dim tensor (differentiable); 0.5 unless ``logit_scale`` is given.
        logit_scale: 1 / T instead.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``; all times c.
        weight: ``(N,)`` per sample; the mean is then sum(w l) / sum(w).
        label_smoothing: share of the target spread over all kept candidates.
        ids: ``(N,)`` integers; other samples with the same id are neither negatives nor flagged.
        return_stats: also return `ContrastiveStats`, the positive being what is subtracted.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.

    Returns:
        0-dim, or ``(VN,)`` for ``"none"``, first view first; float32 (float64 for float64 inputs). With
        ``return_stats`` the pair (loss, stats).

    Raises:
        ValueError: shapes that do not fit, an empty batch, temperature near 0, neither threshold nor top_k.
        TypeError: dtypes that differ or are not floating (ids and top_k: not integer).
        NotImplementedError: ``score="image"``.
        RuntimeError: tensors on different devices.

    Source: Huynh, Kornblith, Walter, Maire, Khademi, WACV 2022, arXiv:2011.11765.

    Example:
        >>> z0, z1 = torch.randn(2, 16, 8).unbind(0)
        >>> false_negative_loss(z0, z1, mode="attract", threshold=0.5, top_k=3).shape
        torch.Size([])
    """
    views = view_major(z0, z1)
    v, n = views.shape[:2]
    check_options(views[0], reduction=reduction, weight=weight, label_smoothing=label_smoothing)
    checks.choice("mode", mode, ("eliminate", "attract"))
    checks.choice("score", score, ("anchor", "image"))
    checks.number("factor", factor)
    if score == "image":
        raise NotImplementedError(
            'score="image" flags pairs by more than their own similarity; use python_ref.false_negative_loss (dense)'
        )
    if threshold is None and top_k is None:
        raise ValueError("threshold and top_k are both None; nothing says which negatives are false")
    if top_k is not None:
        check_count("top_k", top_k)
    scale = scale_from(temperature, logit_scale, views, default=0.5)
    request = Request(scale, label_smoothing, None, return_stats, backend)
    ids = torch.arange(n, device=views.device) if ids is None else checks.ids("ids", ids, n, views)
    ids = ids.repeat(v)
    if threshold is not None:
        threshold = checks.per_row("threshold", threshold, views.flatten(0, 1)).detach()

    views = rows(views, normalize, backend)
    z, similarities = views.flatten(0, 1), other_views(views, backend)
    logits = scale * similarities
    own = logits.logsumexp(1) if v > 2 else logits[:, 0]
    if mode == "eliminate":
        cutoff = threshold
        if top_k is not None:
            values, _ = row_select(z, k=top_k + 1, x_ids=ids)
            boundary = _between(values[:, top_k - 1], values[:, top_k], z, z)
            cutoff = boundary if threshold is None else torch.maximum(threshold, boundary)
        target = logits.mean(1) if v > 2 else own
        pairs = Pairs(ids, cutoff=cutoff)
    else:
        flagged, counts = _flagged(z, ids, threshold, top_k, backend)
        target = scale * ((similarities.sum(1) + flagged) / (v - 1 + counts))
        pairs = Pairs(ids)
    positives = Positives(target, own, logits.sum(1), v - 1)
    out = candidate_loss(swept(z, None, pairs, request), positives, request, weight=weight, reduction=reduction)
    return (factor * out[0], out[1]) if return_stats else factor * out


def easy_negative_loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    select: Literal["bottomk", "below"] = "bottomk",
    k: int | None = None,
    threshold: float | Tensor | None = None,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    r"""InfoNCE against the least similar candidates only: the ones most likely to be true negatives.

    .. math:: L = \frac1N \sum_i \Bigl[ \log\bigl(e^{u_i^+} + \sum_{j: s_{ij} \le c_i} e^{u_{ij}}\bigr) - u_i^+ \Bigr],
        \qquad u_{ij} = s_{ij} / T = \langle q_i, k_j \rangle / T

    with c the k-th smallest similarity of the row to its candidates, or a threshold. The choice has no gradient.

    Args:
        query: ``(N, D)``.
        positive_key: ``(N, D)``; row i is the positive of query i and always stays.
        negative_keys: ``(M, D)``, shared by all queries. None: the other rows' positive keys.
        select: ``"bottomk"``, the k least similar candidates (all that equal the k-th are kept), or ``"below"``, those
            with a similarity up to ``threshold``, which takes no further sweep.
        k: for ``"bottomk"``, at least 1; with as many as there are candidates L is `info_nce_loss`.
        threshold: for ``"below"``, float or ``(N,)``.
        temperature: T, float or 0-dim tensor (differentiable); 0.07 unless ``logit_scale`` is given.
        logit_scale: 1 / T instead.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per anchor; the mean is then sum(w l) / sum(w).
        label_smoothing: share of the target spread over all kept candidates.
        query_ids: ``(N,)`` integers; a candidate with the query's id that is not its positive is no negative.
        key_ids: ids of the candidates, ``(N,)`` in the batch (None: query_ids), ``(M,)`` for negative_keys.
        return_stats: also return `ContrastiveStats`.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``; float32 (float64 for float64 inputs). With ``return_stats`` the pair
        (loss, stats).

    Raises:
        ValueError: shapes that do not fit, an empty batch, temperature near 0, k or threshold missing or of the other
            selection.
        TypeError: dtypes that differ or are not floating (ids and k: not integer).
        RuntimeError: tensors on different devices.

    Source: the easy-negative mining of metric learning, applied to InfoNCE.

    Example:
        >>> query, key = torch.randn(2, 16, 8).unbind(0)
        >>> easy_negative_loss(query, key, k=5).shape
        torch.Size([])
    """
    checks.choice("select", select, ("bottomk", "below"))
    wanted, other = ("k", "threshold") if select == "bottomk" else ("threshold", "k")
    given = {"k": k, "threshold": threshold}
    if given[wanted] is None or given[other] is not None:
        raise ValueError(f"select={select!r} takes {wanted} and not {other}; k is {k}, threshold is {threshold}")
    options = dict(
        temperature=temperature, logit_scale=logit_scale, reduction=reduction, weight=weight,
        label_smoothing=label_smoothing, query_ids=query_ids, key_ids=key_ids, return_stats=return_stats,
        backend=backend,
    )  # fmt: skip
    if select == "below":
        return info_nce_loss(query, positive_key, negative_keys, cutoff=threshold, normalize=normalize, **options)
    check_count("k", k)
    checks.features("query", query)
    checks.features("positive_key", positive_key)
    checks.alike("query", query, "positive_key", positive_key)
    checks.not_empty("query", query)
    if negative_keys is not None:
        checks.features("negative_keys", negative_keys)
        checks.alike("query", query, "negative_keys", negative_keys, rows=False)
    inputs = [None if x is None else rows(x, normalize, backend) for x in (query, positive_key, negative_keys)]
    candidates, in_batch = (inputs[1], True) if negative_keys is None else (inputs[2], False)
    row_ids, column_ids = _candidate_ids(query, candidates, query_ids, key_ids, in_batch)
    values, _ = row_select(
        inputs[0].detach(), candidates.detach(), k + 1, largest=False,
        x_ids=row_ids, y_ids=column_ids, exclude_diagonal=in_batch,
    )  # fmt: skip
    cutoff = _between(values[:, k - 1], values[:, k], inputs[0], candidates)
    return info_nce_loss(*inputs, cutoff=cutoff, normalize=False, **options)


def _check_nnclr(z: Tensor, predictions: Tensor, support: Tensor) -> None:
    checks.tensor("z", z)
    check = checks.features if z.dim() != 3 else checks.views
    check("z", z)
    check("predictions", predictions)
    checks.features("support", support)
    checks.alike("z", z, "predictions", predictions)
    checks.alike("z", z, "support", support, rows=False)
    checks.not_empty("z", z)
    if z.dim() == 3 and not z.shape[1] == predictions.shape[1] == 2:
        raise ValueError(
            f"z {checks.shape(z)} and predictions {checks.shape(predictions)} must have 2 views in their second "
            "dimension; pass (N, D) of one direction at a time for more"
        )
    if support.shape[0] == 0:
        raise ValueError(f"support {checks.shape(support)} is empty; a nearest neighbour needs at least one row")


def _nearest(x: Tensor, support: Tensor) -> Tensor:
    """The row of the support that is most similar to each row of x; NaN where the similarity is."""
    values, columns = row_select(x, support)
    # A column of -1 stands for similarities of -inf everywhere, which come from infinite features.
    unknown = values.isnan() | (columns < 0)
    return support[columns[:, 0].clamp(min=0)].masked_fill(unknown, torch.nan)


def _flagged(
    z: Tensor, ids: Tensor, threshold: Tensor | None, top_k: int | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    """The sum of the similarities of each row of z to its flagged rows, and their number."""
    if top_k is None:
        # The sweep keeps what is at most a cutoff; turned around, what is at least the next number above it.
        kept = Pairs(ids, ids, -threshold.nextafter(torch.full_like(threshold, torch.inf)))
        turned = -z
        sums = sweep(turned, z, kept, term=Identity(), exponents=(), backend=backend).row_sum
        return -sums, kept_counts(turned, z, kept, backend)
    values, columns = row_select(z, k=top_k, x_ids=ids)
    flags = columns >= 0 if threshold is None else values > threshold[:, None]
    total = torch.zeros(z.shape, dtype=compute_dtype(z), device=z.device)
    # Rows are added up before the product, one rank at a time: nothing of size N * top_k * D is stored. Unlike that of
    # an indexing, the gradient of an embedding adds the rows in a fixed order.
    for column, flag in zip(columns.clamp(min=0).unbind(1), flags.unbind(1), strict=True):
        total = total + F.embedding(column, z).to(total.dtype).masked_fill(~flag[:, None], 0)
    return row_dot(z, total), flags.sum(1).to(total.dtype)


def _between(inner: Tensor, outer: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """A cutoff between two similarities of each row of x to rows of y; a sweep's rounding moves neither across it.

    Where the two are equal up to rounding, a little above both: equals are kept.
    """
    lower, upper = torch.minimum(inner, outer), torch.maximum(inner, outer)
    sizes = [torch.linalg.vector_norm(z.detach(), dim=1, dtype=lower.dtype) for z in (x, y)]
    # The zero in front serves a y without rows.
    slack = 8 * torch.finfo(lower.dtype).eps * sizes[0] * F.pad(sizes[1], (1, 0)).amax()
    return torch.where(upper - lower <= slack, upper + slack, lower / 2 + upper / 2)


def _candidate_ids(
    query: Tensor, candidates: Tensor, query_ids: Tensor | None, key_ids: Tensor | None, in_batch: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Ids of the queries and of the candidates, as `info_nce_loss` reads them; None where there are none."""
    if key_ids is not None and query_ids is None:
        raise ValueError("key_ids is given but query_ids is not; a key is no negative when its id is its query's")
    if query_ids is None or (key_ids is None and not in_batch):
        return None, None
    query_ids = checks.ids("query_ids", query_ids, query.shape[0], query)
    return query_ids, query_ids if key_ids is None else checks.ids("key_ids", key_ids, candidates.shape[0], query)
