"""The loss of MoCo."""

from __future__ import annotations

from .info_nce import info_nce_loss


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
    """Return the cross-entropy of ``[q k, q queue] / T`` with target 0; key and queue are constant.

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
