"""InfoNCE."""

from __future__ import annotations

import torch

from ._dense import scale_of, unit_rows
from ._pairs import below, threshold
from ._polarization import polarization_term
from ._softmax import softmax_outcome


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
    guide=None,
    guide_cutoff=None,
    polarization=None,
    return_stats=False,
):
    """Return ``mean_i log(1 + sum_neg e^{(s_ij - s_ip) / T})``.

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
    if guide is not None:
        of_query, *of_keys = (unit_rows(rows, normalize) for rows in guide)
        limit = threshold((of_query * of_keys[0]).sum(1), guide_cutoff, None if guide_cutoff is not None else 0.0)
        of_keys = torch.cat(of_keys if in_batch else of_keys[1:])
        kept_forward = kept_forward & below(of_query @ of_keys.mT, limit)

    logit = scale * positive
    directions = [(logit, logit[:, None], scale * similarity, kept_forward)]
    if symmetric:
        back = similarity[:, :count].mT
        kept_back = kept[:, :count].mT & below(back, threshold(positive, cutoff, cutoff_margin))
        if guide is not None:
            kept_back = kept_back & below(of_keys[:count] @ of_query.mT, limit)
        directions.append((logit, logit[:, None], scale * back, kept_back))
    term = None if polarization is None else polarization_term(similarity, kept_forward, polarization, reduction)
    return softmax_outcome(directions, reduction, weight, label_smoothing, return_stats, term)
