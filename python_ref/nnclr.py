"""The loss of NNCLR."""

from __future__ import annotations

import torch

from ._dense import scale_of, unit_rows
from ._pairs import below, other_rows, threshold
from ._softmax import softmax_outcome
from .select import rank


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
    """Return InfoNCE of the nearest support rows of z and the predictions; for (N, 2, D) the mean of both directions.

    Source: Dwibedi et al. 2021, arXiv:2104.14548.
    """
    z, support = unit_rows(z, normalize).detach(), unit_rows(support, normalize).detach()
    predictions, scale = unit_rows(predictions, normalize), scale_of(temperature, logit_scale)
    pairs = [(z, predictions)]
    if z.dim() == 3:
        pairs = [(z[:, 0], predictions[:, 1]), (z[:, 1], predictions[:, 0])]
    directions = []
    for projection, prediction in pairs:
        nearest = support[rank(projection @ support.mT, torch.ones(1, 1, dtype=torch.bool), 1)[1][:, 0]]
        similarity = nearest @ prediction.mT
        positive = similarity.diagonal()
        kept = other_rows(len(z), ids, z.device) & below(similarity, threshold(positive, cutoff, cutoff_margin))
        directions.append((scale * positive, scale * positive[:, None], scale * similarity, kept))
    return softmax_outcome(directions, reduction, weight, label_smoothing, return_stats)
