"""The supervised contrastive loss in its three meanings."""

from __future__ import annotations

import torch

from ._dense import INFINITY, kept_logsumexp, kept_mean, reduce, scale_of, softplus, unit_rows
from ._softmax import Statistics


def equal_labels(labels, others, unlabelled):
    """Return the mask of equal labels; the value `unlabelled` is none, and a NaN equals nothing."""
    equal = labels[:, None] == others[None, :]
    return equal if unlabelled is None else equal & (labels != unlabelled)[:, None]


def sup_con_masks(count, count_views, labels=None, unlabelled=-1, same_label="positive", mask=None):
    """Return the (VN, VN) masks of positives and negatives of view-major rows; an (N, N) mask replaces the labels."""
    device = None if labels is None else labels.device
    own = torch.eye(count, dtype=torch.bool, device=device)
    same = own
    if labels is not None:
        same = own | equal_labels(labels, labels, unlabelled)
    if mask is not None:
        same = mask.bool()
    positive = same if same_label == "positive" else own
    negative = ~own if same_label == "negative" else ~same
    positive, negative = positive.repeat(count_views, count_views), negative.repeat(count_views, count_views)
    return positive & ~torch.eye(count * count_views, dtype=torch.bool, device=device), negative


def other_rows_masks(labels, contrast_labels, exclude, count_views, unlabelled=-1):
    """Return the (VN, M) masks of positives and negatives among other rows."""
    same = equal_labels(labels, contrast_labels, unlabelled).repeat(count_views, 1)
    kept = torch.ones_like(same)
    if exclude is not None:
        own = exclude.T.flatten() if exclude.dim() == 2 else exclude.repeat(count_views)
        kept = own[:, None] != torch.arange(len(contrast_labels), device=own.device)
    return same & kept, ~same & kept


def sup_con_rows(logits, positive, negative, positives):
    """Return the loss of each anchor; 0, with ``sum`` infinity, for an anchor without positives."""
    alone = ~positive.any(1)
    negative_lse = kept_logsumexp(logits, negative)
    positive_lse = kept_logsumexp(logits, positive).masked_fill(alone, 0.0)
    # lse - u would lose the digits of a loss of 1e-8
    if positives == "out":
        values = softplus(negative_lse - positive_lse) + (positive_lse - kept_mean(logits, positive))
    elif positives == "in":
        values = softplus(negative_lse - positive_lse) + positive.sum(1).clamp(min=1).to(logits).log()
    elif positives == "sum":
        values = softplus(negative_lse - positive_lse)
    else:
        values = kept_mean(softplus(negative_lse[:, None] - logits), positive)
    return values.masked_fill(alone, INFINITY if positives == "sum" else 0.0)


def sup_con_statistics(logits, positive, negative, positives):
    """Return the statistics, with the mean positive logit (-inf without positives) against the largest negative."""
    logits, alone = logits.detach(), ~positive.any(1)
    target = kept_mean(logits, positive).masked_fill(alone, -INFINITY)
    largest = logits.masked_fill(~negative, -INFINITY).amax(1)
    own = target if positives == "pairwise" else kept_logsumexp(logits, positive)
    lse = torch.logaddexp(kept_logsumexp(logits, negative), own)
    return Statistics((target > largest).to(target.dtype).mean(), target, lse, torch.maximum(target, largest))


def sup_con_loss(
    features,
    labels=None,
    *,
    temperature=0.1,
    logit_scale=None,
    base_temperature=None,
    unlabelled=-1,
    contrast_features=None,
    contrast_labels=None,
    exclude=None,
    positives="out",
    same_label="positive",
    average="all",
    contrast_mode="all",
    normalize=True,
    reduction="mean",
    weight=None,
    return_stats=False,
    mask=None,
):
    """Return the mean over the anchors (``pairwise``: over the positive pairs) of the loss in one of its meanings.

    - ``out``: ``mean_p (lse_i - u_ip)``, the lse over the positives and negatives of i;
    - ``in``: ``-log mean_p e^{u_ip - lse_i}``;
    - ``sum``: ``-log sum_p e^{u_ip - lse_i}``, infinite without positives;
    - ``pairwise``: ``mean_p log(1 + sum_neg e^{u_ij - u_ip})``.

    With ``contrast_features`` the positives and negatives are among those rows; ``exclude`` is the one of them that is
    left out.

    Source: Khosla et al. 2020, arXiv:2004.11362, 5.2.
    """
    features = unit_rows(features if features.dim() == 3 else features[:, None], normalize)
    scale, (count, count_views) = scale_of(temperature, logit_scale), features.shape[:2]
    z = features.transpose(0, 1).flatten(0, 1)
    if contrast_features is None:
        y, masks = z, sup_con_masks(count, count_views, labels, unlabelled, same_label, mask)
    else:
        y = unit_rows(contrast_features, normalize)
        masks = other_rows_masks(labels, contrast_labels, exclude, count_views, unlabelled)
    positive, negative = (m.to(z.device) for m in masks)
    logits = scale * (z @ y.mT)
    if contrast_mode == "one":
        logits, positive, negative = logits[:count], positive[:count], negative[:count]
    values = sup_con_rows(logits, positive, negative, positives)
    counts = positive.sum(1)
    share = torch.ones_like(values)
    if reduction == "mean" and positives == "pairwise":
        share = counts.to(values)
    elif reduction == "mean" and average == "with_positives":
        share = (counts > 0).to(values)
    values = values.masked_fill((share == 0) & values.isinf(), 0.0)
    if base_temperature is not None:
        values = values / (scale * base_temperature)
    if reduction == "mean" and not share.any():
        loss = values.sum()
    else:
        each = torch.ones_like(share) if weight is None else weight.to(values).repeat(len(values) // count)
        loss = reduce(values, reduction, each * share)
    return (loss, sup_con_statistics(logits, positive, negative, positives)) if return_stats else loss
