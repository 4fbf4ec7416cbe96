"""The pull of labelled rows to the embeddings of their labels."""

from __future__ import annotations

import torch

from ._dense import kept_logsumexp, reduce, scale_of, softplus, unit_rows


def label_pull_loss(
    z,
    labels,
    label_embeddings,
    *,
    form="pull",
    temperature=0.1,
    logit_scale=None,
    normalize=True,
    reduction="mean",
    weight=None,
):
    """Return the mean over labelled rows of ``1 - z_i w_y`` (pull) or of the cross-entropy of ``z w / T`` (softmax)."""
    similarity = unit_rows(z, normalize) @ unit_rows(label_embeddings, normalize).mT
    labelled = labels != -1
    own = torch.nn.functional.one_hot(labels.clamp(min=0), len(label_embeddings)).bool()
    target = similarity[own]
    if form == "pull":
        values = 1 - target
    else:
        logits = scale_of(temperature, logit_scale) * similarity
        values = softplus(kept_logsumexp(logits, ~own) - logits[own])
    values = values.masked_fill(~labelled, 0.0)
    if reduction == "mean" and not labelled.any():
        return values.sum()
    each = torch.ones_like(values) if weight is None else weight.to(values)
    return reduce(values, reduction, each * labelled if reduction == "mean" else each)
