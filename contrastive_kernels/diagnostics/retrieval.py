"""Where the positive comes among all keys, counted in chunks, without the N x M matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from contrastive_kernels.diagnostics.common import (
    centre,
    check_alike,
    check_range,
    chunks,
    equal_rows,
    wide_rows,
    without_autocast,
)
from contrastive_kernels.primitives import checks

__all__ = ["positive_rank", "retrieval_accuracy"]


@torch.no_grad()
@without_autocast
def positive_rank(
    query: Tensor,
    keys: Tensor,
    target: Tensor | None = None,
    *,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    r"""The rank of each query's positive among all keys, 1 for the most similar.

    .. math:: \mathrm{rank}_i = 1 + \#\{j \ne t_i : \neg (s_{ij} < s_{i t_i})\}

    A tie counts against the positive, as does NaN: features that collapsed to a point have the last rank. Products are
    those of float32 rows (float64 for float64 inputs), under autocast too.

    Args:
        query: ``(N, D)``.
        keys: ``(M, D)``.
        target: ``(N,)`` integers, the index of the positive key, 0 to M - 1; None: key i is that of query i,
            M >= N.
        query_ids: ``(N,)`` integers, with ``key_ids``, ``(M,)``: other keys with the query's id do not compete.
        key_ids: see query_ids.
        normalize: rows to unit norm first.

    Returns:
        ``(N,)`` int64.

    Raises:
        ValueError: shapes that do not fit, fewer keys than queries without a target, a target that is no key, one of
            two ids.
        TypeError: dtypes that differ or are not floating (target and ids: not integer).

    Example:
        >>> import torch
        >>> from contrastive_kernels import diagnostics
        >>> diagnostics.positive_rank(torch.eye(3), torch.eye(3)).tolist()
        [1, 1, 1]
    """
    checks.features("query", query)
    checks.features("keys", keys)
    check_alike("query", query, "keys", keys, rows=False)
    if target is None:
        if keys.shape[0] < query.shape[0]:
            raise ValueError(
                f"query {checks.shape(query)} has more rows than keys {checks.shape(keys)}; pass target, the index of "
                "each positive"
            )
        target = torch.arange(query.shape[0], device=query.device)
    else:
        target = checks.ids("target", target, query.shape[0], query)
        check_range("target", target, 0, keys.shape[0], f"the indices of keys {checks.shape(keys)}")
    if (query_ids is None) != (key_ids is None):
        raise ValueError("query_ids and key_ids go together; one of them is missing")
    query_ids = checks.optional_ids("query_ids", query_ids, query.shape[0], query)
    key_ids = checks.optional_ids("key_ids", key_ids, keys.shape[0], query)
    query, keys = wide_rows(query, normalize), wide_rows(keys, normalize)
    equal = equal_rows(keys)
    if not normalize:
        # The order stays, and scores of raw rows far from the origin keep their digits.
        keys = keys - centre(keys)
    ranks = torch.ones(len(query), dtype=torch.int64, device=query.device)
    for rows in chunks(len(query), len(keys)):
        similarity, own = query[rows] @ keys.mT, target[rows, None]
        # The positive's entry of the same product: recomputed it could differ by a rounding from an equal key's.
        competes = ~(similarity < similarity.gather(1, own))
        if equal is not None:
            competes |= equal == equal[own]
        if query_ids is not None:
            competes &= query_ids[rows, None] != key_ids
        ranks[rows] += competes.scatter_(1, own, False).sum(1)
    return ranks


def retrieval_accuracy(
    query: Tensor,
    keys: Tensor,
    target: Tensor | None = None,
    *,
    k: int | Sequence[int] = (1, 5, 10),
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """The fraction of queries whose positive is among the k most similar keys (recall at k, top-k accuracy).

    Args:
        query, keys, target, query_ids, key_ids, normalize: as in `positive_rank`; a tie counts against the positive.
        k: one or several numbers of keys.

    Returns:
        0-dim for one k, else ``(len(k),)``; float32 (float64 for float64 inputs). NaN without queries.

    Raises:
        ValueError, TypeError: as `positive_rank`; k that is no positive integer.

    Example:
        >>> import torch
        >>> from contrastive_kernels import diagnostics
        >>> diagnostics.retrieval_accuracy(torch.eye(3), torch.eye(3).roll(1, 0), k=(1, 3)).tolist()
        [0.0, 1.0]
    """
    several = [checks.count("k", value) for value in (k if isinstance(k, Iterable) else [k])]
    ranks = positive_rank(query, keys, target, query_ids=query_ids, key_ids=key_ids, normalize=normalize)
    limits = torch.tensor(several, dtype=torch.int64, device=ranks.device)
    accuracy = (ranks[:, None] <= limits).to(query.dtype if query.dtype == torch.float64 else torch.float32).mean(0)
    return accuracy if isinstance(k, Iterable) else accuracy[0]
