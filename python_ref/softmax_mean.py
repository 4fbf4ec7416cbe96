"""Means under the softmax of the rows of a similarity matrix."""

from __future__ import annotations

from ._dense import kept_logsumexp
from ._pairs import kept_pairs, second_rows


def similarity_softmax_mean(x, y, values, *, scale=1.0, x_ids=None, y_ids=None, y_bias=None, cutoff=None):
    """Return ``sum_j softmax_j(a <x_i, y_j> + b_j) v_j`` over the kept pairs, 0 where there is none."""
    y, y_ids = second_rows(x, y, x_ids, y_ids)
    similarity = x @ y.mT
    kept = kept_pairs(similarity, x_ids, y_ids, cutoff)
    logits = scale * similarity
    logits = logits if y_bias is None else logits + y_bias
    lse = kept_logsumexp(logits, kept, 1)
    empty = ~kept.any(1)
    shares = (logits - lse.masked_fill(empty, 0)[:, None]).masked_fill(~kept, -float("inf")).exp()
    return shares @ values
