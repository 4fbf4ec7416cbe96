"""NT-Xent with its false negatives eliminated or attracted."""

from __future__ import annotations

import torch

from ._dense import scale_of, unit_rows
from ._pairs import different
from ._softmax import softmax_outcome
from ._views import stack_views
from .select import rank


def false_negative_loss(
    z0,
    z1=None,
    *,
    mode="eliminate",
    threshold=0.7,
    top_k=10,
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
    """Return factor times NT-Xent, without the flagged negatives (eliminate) or with them as positives (attract).

    Flagged are the negatives whose similarity is above the threshold and among the anchor's top_k largest.

    Source: Huynh et al. 2022, arXiv:2011.11765.
    """
    views, scale = unit_rows(stack_views(z0, z1), normalize), scale_of(temperature, logit_scale)
    count_views, count = views.shape[:2]
    z = views.flatten(0, 1)
    similarity = z @ z.mT
    instance = torch.arange(len(z), device=z.device) % count
    ids = instance if ids is None else ids.repeat(count_views)
    others = (instance[:, None] == instance) & ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    negative = different(ids, ids)

    scores = similarity.detach()
    columns = rank(scores, negative, len(z) if top_k is None else top_k)[1]
    # the columns -1 of a row with fewer negatives go to an extra place
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
