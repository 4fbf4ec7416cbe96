"""The sigmoid loss of SigLIP."""

from __future__ import annotations

import torch

from ._dense import reduce, scale_of, softplus, unit_rows
from ._pairs import below, other_rows, threshold
from ._softmax import softmax_statistics


def siglip_loss(
    image_features,
    text_features,
    logit_scale=None,
    logit_bias=None,
    *,
    temperature=None,
    negative_only=False,
    normalize=False,
    reduction="mean",
    weight=None,
    ids=None,
    cutoff=None,
    cutoff_margin=None,
    return_stats=False,
):
    """Return ``1/N sum_ij softplus(-z_ij (a s_ij + b))``, z = 1 on the diagonal (-1 with negative_only), -1 elsewhere.

    Source: Zhai et al. 2023, arXiv:2303.15343.
    """
    similarity = unit_rows(image_features, normalize) @ unit_rows(text_features, normalize).mT
    logits = scale_of(temperature, logit_scale) * similarity + (0.0 if logit_bias is None else logit_bias)
    positive, count, device = similarity.diagonal(), len(similarity), similarity.device
    kept = torch.ones_like(similarity, dtype=torch.bool) if negative_only else other_rows(count, ids, device)
    kept = kept & below(similarity, threshold(positive, cutoff, cutoff_margin))
    rows = softplus(logits).masked_fill(~kept, 0.0).sum(1)
    if not negative_only:
        rows = rows + softplus(-logits.diagonal())
    loss = reduce(rows, reduction, weight)
    if not return_stats:
        return loss
    return loss, softmax_statistics(logits.diagonal(), logits.diagonal()[:, None], logits, kept)
