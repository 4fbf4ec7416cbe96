"""Sums and counts over the kept pairs of every row, from the ids alone where that is possible."""

from __future__ import annotations

import torch
from torch import Tensor

from contrastive_kernels.similarity import row_dot, sweep
from contrastive_kernels.sweep import Count, Identity, Pairs, compute_dtype


def kept_counts(x: Tensor, y: Tensor | None, pairs: Pairs, backend: str | None = None) -> Tensor:
    """The number of kept columns of each row of x: O(N log N) from the ids; with a cutoff one more sweep."""
    if pairs.cutoff is not None:
        y = None if y is None else y.detach()
        return sweep(x.detach(), y, pairs, term=Count(), exponents=(), backend=backend).row_sum
    y, y_ids = (x, pairs.x_ids) if y is None else (y, pairs.y_ids)
    counts = torch.full((x.shape[0],), y.shape[0], dtype=compute_dtype(x), device=x.device)
    if pairs.x_ids is not None:
        slot, own, known = _class_slots(pairs.x_ids, y_ids)
        counts = counts - known * counts.new_zeros(y.shape[0]).index_add(0, slot, counts.new_ones(y.shape[0]))[own]
    if pairs.exclude_diagonal:
        dropped = int(pairs.exclude_diagonal)
        counts = counts - (dropped if y_ids is None else (pairs.x_ids != y_ids[: x.shape[0]]).to(counts.dtype))
    return counts


def kept_sums(x: Tensor, y: Tensor | None, pairs: Pairs, backend: str | None = None) -> Tensor:
    """The sum of the similarities of each row of x to its kept columns: O(N D); with a cutoff one more sweep."""
    if pairs.cutoff is not None:
        return sweep(x, y, pairs, term=Identity(), exponents=(), backend=backend).row_sum
    y, y_ids = (x, pairs.x_ids) if y is None else (y, pairs.y_ids)
    wide = y.to(compute_dtype(y))
    total = wide.sum(0).expand(x.shape)
    if pairs.x_ids is not None:
        slot, own, known = _class_slots(pairs.x_ids, y_ids)
        total = total - known[:, None] * torch.zeros_like(wide).index_add(0, slot, wide)[own]
    if pairs.exclude_diagonal:
        v = pairs.exclude_diagonal
        own_column = wide[: x.shape[0]] if v == 1 else wide.unflatten(0, (v, -1)).sum(0).repeat(v, 1)
        total = total - (own_column if y_ids is None else (pairs.x_ids != y_ids[: x.shape[0]])[:, None] * own_column)
    return row_dot(x, total, backend)


def _class_slots(x_ids: Tensor, y_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each y's class accumulates, where each x finds its class, and whether the y have it at all.

    A class's slot is the first place of its id among the sorted ids: static shapes, nothing read back.
    """
    ordered = y_ids.sort().values
    own = torch.searchsorted(ordered, x_ids).clamp(max=len(y_ids) - 1)
    return torch.searchsorted(ordered, y_ids), own, ordered[own] == x_ids
