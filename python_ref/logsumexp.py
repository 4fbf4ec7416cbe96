"""Log-sum-exps of the rows and columns of a similarity matrix."""

from __future__ import annotations

from ._dense import kept_logsumexp
from ._pairs import kept_pairs, second_rows


def similarity_logsumexp(
    x,
    y=None,
    *,
    scale=1.0,
    x_ids=None,
    y_ids=None,
    same=False,
    exclude_diagonal=False,
    y_bias=None,
    cutoff=None,
    guide=None,
    guide_cutoff=None,
    columns=False,
):
    """Return ``log sum_j exp(a <x_i, y_j> + b_j)`` over the kept pairs, of which a guide drops those above its cutoff.

    With columns also return ``log sum_i exp(a <x_i, y_j>)``.
    """
    y, y_ids = second_rows(x, y, x_ids, y_ids)
    similarity = x @ y.mT
    kept = kept_pairs(similarity, x_ids, y_ids, cutoff, same, exclude_diagonal)
    if guide is not None:
        of_x, of_y = guide
        of_y = of_x if of_y is None else of_y
        kept = kept & kept_pairs(of_x @ of_y.mT, cutoff=guide_cutoff)
    logits = scale * similarity
    rows = kept_logsumexp(logits if y_bias is None else logits + y_bias, kept, 1)
    return (rows, kept_logsumexp(logits, kept, 0)) if columns else rows
