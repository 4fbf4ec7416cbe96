"""The decoupled contrastive loss."""

from __future__ import annotations

import torch

from ._dense import reduce, scale_of, unit_rows
from ._softmax import softmax_loss, softmax_statistics
from ._views import two_view_pairs


def decoupled_loss(
    z0,
    z1,
    *,
    temperature=0.1,
    logit_scale=None,
    positive_weight=None,
    normalize=True,
    reduction="mean",
    weight=None,
    label_smoothing=0.0,
    ids=None,
    cutoff=None,
    cutoff_margin=None,
    return_stats=False,
):
    """Return ``mean_i (log sum_neg e^u - w_i u_ip)``, the sum over the rows of other samples.

    Source: Yeh et al. 2022, arXiv:2110.06848.
    """
    scale = scale_of(temperature, logit_scale)
    similarity, positive, kept = two_view_pairs(z0, z1, normalize, ids, cutoff, cutoff_margin)
    if callable(positive_weight):
        positive_weight = positive_weight(unit_rows(z0, normalize), unit_rows(z1, normalize))
    if isinstance(positive_weight, (tuple, list)):
        share = torch.cat(list(positive_weight))
    else:
        share = 1.0 if positive_weight is None else positive_weight.detach().repeat(2)
    logits, positive = scale * similarity, scale * positive
    losses = softmax_loss(share * positive, logits[:, :0], logits, kept, label_smoothing)
    loss = reduce(losses, reduction, weight)
    return (loss, softmax_statistics(positive, logits[:, :0], logits, kept)) if return_stats else loss
