"""Row log-sum-exp losses: InfoNCE, NT-Xent, CLIP, MoCo."""

from __future__ import annotations

from itertools import combinations

import torch

from .dense import below, different, scale_of, softmax_outcome, threshold, unit_rows
from .polarization import polarization_term


def info_nce_loss(
    query,
    positive_key,
    negative_keys=None,
    *,
    temperature=0.07,
    logit_scale=None,
    negative_mode="unpaired",
    in_batch_negatives=None,
    symmetric=False,
    normalize=True,
    reduction="mean",
    weight=None,
    label_smoothing=0.0,
    query_ids=None,
    key_ids=None,
    cutoff=None,
    cutoff_margin=None,
    polarization=None,
    return_stats=False,
):
    """``mean_i log(1 + sum_neg e^{(s_ij - s_ip) / T})``.

    Source: van den Oord et al. 2018, arXiv:1807.03748, eq. 4.
    """
    query, positive_key = unit_rows(query, normalize), unit_rows(positive_key, normalize)
    count, scale = len(query), scale_of(temperature, logit_scale)
    in_batch = negative_keys is None if in_batch_negatives is None else in_batch_negatives
    positive = (query * positive_key).sum(1)

    similarity, kept = [], []
    if in_batch:
        similarity.append(query @ positive_key.mT)
        kept.append(~torch.eye(count, dtype=torch.bool, device=query.device))
    if negative_keys is not None:
        negative_keys = unit_rows(negative_keys, normalize)
        if negative_mode == "paired":
            similarity.append(torch.einsum("nd,nmd->nm", query, negative_keys))
        else:
            similarity.append(query @ negative_keys.mT)
        kept.append(torch.ones_like(similarity[-1], dtype=torch.bool))
    similarity, kept = torch.cat(similarity, 1), torch.cat(kept, 1)
    if query_ids is not None:
        key_ids = query_ids if key_ids is None else key_ids
        kept = kept & (query_ids[:, None] != (key_ids if key_ids.dim() == 2 else key_ids[None, :]))
    kept_forward = kept & below(similarity, threshold(positive, cutoff, cutoff_margin))

    logit = scale * positive
    directions = [(logit, logit[:, None], scale * similarity, kept_forward)]
    if symmetric:
        back = similarity[:, :count].mT
        kept_back = kept[:, :count].mT & below(back, threshold(positive, cutoff, cutoff_margin))
        directions.append((logit, logit[:, None], scale * back, kept_back))
    term = None if polarization is None else polarization_term(similarity, kept_forward, polarization, reduction)
    return softmax_outcome(directions, reduction, weight, label_smoothing, return_stats, term)


def two_or_more_views(z0, z1):
    """View-major (V, N, D) from (N, D) twice or from (N, V, D)."""
    return z0.transpose(0, 1) if z1 is None else torch.stack([z0, z1])


def nt_xent_loss(
    z0,
    z1=None,
    *,
    temperature=0.5,
    logit_scale=None,
    multi_view="out",
    normalize=True,
    reduction="mean",
    weight=None,
    label_smoothing=0.0,
    ids=None,
    cutoff=None,
    cutoff_margin=None,
    polarization=None,
    return_stats=False,
):
    """``mean_i (lse_i - mean_p u_ip)``, lse over all rows of all views but i, p the other views of i's sample.

    Source: Chen et al. 2020, arXiv:2002.05709.
    """
    views, scale = unit_rows(two_or_more_views(z0, z1), normalize), scale_of(temperature, logit_scale)
    count_views, count = views.shape[:2]
    options = {"reduction": reduction, "weight": weight, "label_smoothing": label_smoothing}
    if multi_view == "pairs" and count_views > 2:
        options |= {"ids": ids, "cutoff": cutoff, "cutoff_margin": cutoff_margin, "polarization": polarization}
        pairs = [nt_xent_loss(*pair, logit_scale=scale, normalize=False, **options) for pair in combinations(views, 2)]
        return torch.stack(pairs).mean()

    z = views.flatten(0, 1)
    similarity = z @ z.mT
    instance, view = torch.arange(len(z), device=z.device) % count, torch.arange(len(z), device=z.device) // count
    others = ~different(instance, instance) & different(view, view)
    own = similarity[others].reshape(len(z), count_views - 1)
    kept = different(instance, instance)
    if ids is not None:
        kept = kept & different(ids.repeat(count_views), ids.repeat(count_views))
    thresholds = (
        t.repeat(count_views) if torch.is_tensor(t) and t.dim() and len(t) == count else t
        for t in (cutoff, cutoff_margin)
    )
    kept = kept & below(similarity, threshold(own.mean(1), *thresholds))

    directions = [(scale * own.mean(1), scale * own, scale * similarity, kept)]
    term = None if polarization is None else polarization_term(similarity, kept, polarization, reduction)
    return softmax_outcome(directions, **options, return_stats=return_stats, polarization=term)


def clip_loss(
    image_features,
    text_features,
    logit_scale=None,
    logit_bias=None,
    *,
    temperature=None,
    normalize=False,
    reduction="mean",
    weight=None,
    label_smoothing=0.0,
    ids=None,
    cutoff=None,
    cutoff_margin=None,
    return_stats=False,
):
    """Mean of the cross-entropies of the rows and of the columns of ``a S + b``.

    Source: Radford et al. 2021, arXiv:2103.00020.
    """
    similarity = unit_rows(image_features, normalize) @ unit_rows(text_features, normalize).mT
    positive, scale = similarity.diagonal(), scale_of(temperature, logit_scale)
    bias = 0.0 if logit_bias is None else logit_bias
    kept = ~torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    if ids is not None:
        kept = kept & different(ids, ids)
    cutoffs, logit = threshold(positive, cutoff, cutoff_margin), scale * positive + bias
    directions = [
        (logit, logit[:, None], scale * s + bias, kept & below(s, cutoffs)) for s in (similarity, similarity.mT)
    ]
    return softmax_outcome(directions, reduction, weight, label_smoothing, return_stats)


def moco_loss(
    query,
    key,
    queue,
    *,
    temperature=0.07,
    logit_scale=None,
    normalize=True,
    reduction="mean",
    weight=None,
    label_smoothing=0.0,
    query_ids=None,
    key_ids=None,
    cutoff=None,
    cutoff_margin=None,
    return_stats=False,
):
    """Cross-entropy of [q k ; q queue] / T with target 0; key and queue detached.

    Source: He et al. 2020, arXiv:1911.05722.
    """
    return info_nce_loss(
        query,
        key.detach(),
        queue.detach(),
        temperature=temperature,
        logit_scale=logit_scale,
        normalize=normalize,
        reduction=reduction,
        weight=weight,
        label_smoothing=label_smoothing,
        query_ids=query_ids,
        key_ids=key_ids,
        cutoff=cutoff,
        cutoff_margin=cutoff_margin,
        return_stats=return_stats,
    )
