"""The loss of CLIP."""

from __future__ import annotations

from ._dense import scale_of, unit_rows
from ._pairs import below, other_rows, threshold
from ._softmax import softmax_outcome


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
    """Return the mean of the cross-entropies of the rows and of the columns of ``a S + b``.

    Source: Radford et al. 2021, arXiv:2103.00020.
    """
    similarity = unit_rows(image_features, normalize) @ unit_rows(text_features, normalize).mT
    positive, scale = similarity.diagonal(), scale_of(temperature, logit_scale)
    bias = 0.0 if logit_bias is None else logit_bias
    kept = other_rows(len(similarity), ids, similarity.device)
    cutoffs, logit = threshold(positive, cutoff, cutoff_margin), scale * positive + bias
    directions = [
        (logit, logit[:, None], scale * s + bias, kept & below(s, cutoffs)) for s in (similarity, similarity.mT)
    ]
    return softmax_outcome(directions, reduction, weight, label_smoothing, return_stats)
