"""Losses that look at the order of the similarities first: NNCLR, false-negative cancellation, easy negatives."""

from __future__ import annotations

import torch

from .dense import INFINITY, below, different, scale_of, softmax_outcome, threshold, unit_rows
from .softmax import info_nce_loss, two_or_more_views


def ranked(values, allowed, k):
    """The k largest allowed values of each row and their columns, ties to the lower column, NaN first.

    Places beyond the allowed ones hold -inf and -1.
    """
    values = values.detach().masked_fill(~allowed, -INFINITY)
    order = values.masked_fill(values.isnan(), INFINITY).sort(dim=1, descending=True, stable=True).indices[:, :k]
    found = values.gather(1, order)
    order = order.masked_fill(found == -INFINITY, -1)
    missing = (0, k - order.shape[1])
    pad = torch.nn.functional.pad
    return pad(found, missing, value=-INFINITY), pad(order, missing, value=-1)


def row_select(x, y=None, k=1, *, largest=True, x_ids=None, y_ids=None, exclude_diagonal=False):
    """The k largest or smallest allowed ``<x_i, y_j>`` of each row and their columns."""
    y, y_ids = (x, x_ids) if y is None else (y, y_ids)
    similarity = x @ y.mT
    allowed = torch.ones_like(similarity, dtype=torch.bool)
    if x_ids is not None:
        allowed = allowed & different(x_ids, y_ids)
    if exclude_diagonal:
        allowed = allowed & ~torch.eye(*allowed.shape, dtype=torch.bool, device=x.device)
    values, columns = ranked(similarity if largest else -similarity, allowed, k)
    return (values if largest else -values), columns


def nnclr_loss(
    z,
    predictions,
    support,
    *,
    temperature=0.1,
    logit_scale=None,
    normalize=True,
    reduction="mean",
    weight=None,
    label_smoothing=0.0,
    ids=None,
    cutoff=None,
    cutoff_margin=None,
    return_stats=False,
):
    """InfoNCE of the nearest support rows of z and the predictions, of both directions for (N, 2, D).

    Source: Dwibedi et al. 2021, arXiv:2104.14548.
    """
    z, support = unit_rows(z, normalize).detach(), unit_rows(support, normalize).detach()
    predictions, scale = unit_rows(predictions, normalize), scale_of(temperature, logit_scale)
    pairs = [(z, predictions)]
    if z.dim() == 3:
        pairs = [(z[:, 0], predictions[:, 1]), (z[:, 1], predictions[:, 0])]
    directions = []
    for projection, prediction in pairs:
        nearest = support[ranked(projection @ support.mT, torch.ones(1, 1, dtype=torch.bool), 1)[1][:, 0]]
        similarity = nearest @ prediction.mT
        positive = similarity.diagonal()
        kept = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
        if ids is not None:
            kept = kept & different(ids, ids)
        kept = kept & below(similarity, threshold(positive, cutoff, cutoff_margin))
        directions.append((scale * positive, scale * positive[:, None], scale * similarity, kept))
    return softmax_outcome(directions, reduction, weight, label_smoothing, return_stats)


def false_negative_loss(
    z0,
    z1=None,
    *,
    mode="eliminate",
    threshold=0.7,
    top_k=10,
    score="anchor",
    factor=2.0,
    temperature=0.5,
    logit_scale=None,
    normalize=True,
    reduction="mean",
    weight=None,
    label_smoothing=0.0,
    ids=None,
    return_stats=False,
):
    """NT-Xent without the flagged negatives, or with them as positives, times factor.

    Flagged: of another sample, above the threshold and among the top_k of the row, by the anchor's own similarity or,
    with ``score="image"``, by the largest one of its sample's views.

    Source: Huynh et al. 2022, arXiv:2011.11765.
    """
    views, scale = unit_rows(two_or_more_views(z0, z1), normalize), scale_of(temperature, logit_scale)
    count_views, count = views.shape[:2]
    z = views.flatten(0, 1)
    similarity = z @ z.mT
    instance = torch.arange(len(z), device=z.device) % count
    ids = instance if ids is None else ids.repeat(count_views)
    others = (instance[:, None] == instance) & ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    negative = different(ids, ids)

    scores = similarity.detach()
    if score == "image":
        scores = scores.unflatten(0, (count_views, count)).amax(0).repeat(count_views, 1)
    columns = ranked(scores, negative, len(z) if top_k is None else top_k)[1]
    # the columns -1 of rows with fewer negatives go to an extra place
    flagged = torch.zeros(len(z), len(z) + 1, dtype=torch.bool, device=z.device)
    flagged = flagged.scatter(1, columns % (len(z) + 1), True)[:, :-1]
    if threshold is not None:
        limits = torch.as_tensor(threshold).to(scores).expand(len(z))
        flagged = flagged & (scores > limits[:, None])

    positive = others | flagged if mode == "attract" else others
    target = scale * similarity.masked_fill(~positive, 0.0).sum(1) / positive.sum(1)
    own = similarity[others].reshape(len(z), count_views - 1)
    kept = negative & ~flagged if mode == "eliminate" else negative
    directions = [(target, scale * own, scale * similarity, kept)]
    out = softmax_outcome(directions, reduction, weight, label_smoothing, return_stats)
    return (factor * out[0], out[1]) if return_stats else factor * out


def easy_negative_loss(
    query,
    positive_key,
    negative_keys=None,
    *,
    select="bottomk",
    k=None,
    threshold=None,
    temperature=0.07,
    logit_scale=None,
    normalize=True,
    reduction="mean",
    weight=None,
    label_smoothing=0.0,
    query_ids=None,
    key_ids=None,
    return_stats=False,
):
    """InfoNCE with the negatives ``s_ij <= c_i``, c the threshold or the row's k-th smallest similarity."""
    if select == "bottomk":
        keys = positive_key if negative_keys is None else negative_keys
        x, y = unit_rows(query, normalize).detach(), unit_rows(keys, normalize).detach()
        row_ids = query_ids if key_ids is not None or negative_keys is None else None
        column_ids = query_ids if key_ids is None else key_ids
        threshold = row_select(
            x, y, k, largest=False, x_ids=row_ids, y_ids=column_ids, exclude_diagonal=negative_keys is None
        )[0][:, -1]
        # the selection and the loss below may round the k-th similarity differently
        threshold = threshold + 1e-14 * threshold.abs().nan_to_num(posinf=0.0)
    return info_nce_loss(
        query,
        positive_key,
        negative_keys,
        temperature=temperature,
        logit_scale=logit_scale,
        normalize=normalize,
        reduction=reduction,
        weight=weight,
        label_smoothing=label_smoothing,
        query_ids=query_ids,
        key_ids=key_ids,
        cutoff=threshold,
        return_stats=return_stats,
    )
