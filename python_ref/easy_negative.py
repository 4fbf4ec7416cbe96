"""InfoNCE against the least similar negatives."""

from __future__ import annotations

from ._dense import unit_rows
from .info_nce import info_nce_loss
from .select import row_select


def easy_negative_loss(
    query,
    positive_key,
    negative_keys=None,
    *,
    select="bottomk",
    k=None,
    threshold=None,
    temperature=0.07,
    logit_scale=None,
    normalize=True,
    reduction="mean",
    weight=None,
    label_smoothing=0.0,
    query_ids=None,
    key_ids=None,
    return_stats=False,
):
    """Return InfoNCE with the negatives ``s_ij <= c_i``, c the threshold or the k-th smallest similarity of the row."""
    if select == "bottomk":
        keys = positive_key if negative_keys is None else negative_keys
        x, y = unit_rows(query, normalize).detach(), unit_rows(keys, normalize).detach()
        row_ids = query_ids if key_ids is not None or negative_keys is None else None
        column_ids = query_ids if key_ids is None else key_ids
        threshold = row_select(
            x, y, k, largest=False, x_ids=row_ids, y_ids=column_ids, exclude_diagonal=negative_keys is None
        )[0][:, -1]
        # the selection and the loss may round the k-th similarity differently
        threshold = threshold + 1e-14 * threshold.abs().nan_to_num(posinf=0.0)
    return info_nce_loss(
        query,
        positive_key,
        negative_keys,
        temperature=temperature,
        logit_scale=logit_scale,
        normalize=normalize,
        reduction=reduction,
        weight=weight,
        label_smoothing=label_smoothing,
        query_ids=query_ids,
        key_ids=key_ids,
        cutoff=threshold,
        return_stats=return_stats,
    )
