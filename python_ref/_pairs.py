"""Masks of the pairs (i, j) that a loss keeps: by ids, by the diagonal, by a cutoff."""

from __future__ import annotations

import torch


def different(row_ids, column_ids):
    """Return the (N, M) mask ``row_ids[i] != column_ids[j]``."""
    return row_ids[:, None] != column_ids[None, :]


def other_rows(count, ids, device):
    """Return the (N, N) mask of the pairs i != j, of those with different ids if there are ids."""
    kept = ~torch.eye(count, dtype=torch.bool, device=device)
    return kept if ids is None else kept & different(ids, ids)


def threshold(similarity_of_positive, cutoff, cutoff_margin):
    """Return the cutoff ``c_i`` of each anchor, given or ``stop_gradient(s_p) + margin``; None without either."""
    if cutoff is not None and cutoff_margin is not None:
        raise ValueError("cutoff and cutoff_margin exclude each other")
    if cutoff_margin is not None:
        return similarity_of_positive.detach() + cutoff_margin
    if cutoff is not None:
        return torch.as_tensor(cutoff).to(similarity_of_positive) + torch.zeros_like(similarity_of_positive)
    return None


def below(similarity, cutoffs):
    """Return the mask ``s_ij <= c_i``, True for a NaN similarity; all True without cutoffs."""
    if cutoffs is None:
        return torch.ones_like(similarity, dtype=torch.bool)
    return ~(similarity.detach() > cutoffs[:, None])


def second_rows(x, y, x_ids, y_ids):
    """Return y and its ids; x and its ids where y is None, for x against itself."""
    return (x, x_ids if y_ids is None else y_ids) if y is None else (y, y_ids)


def kept_pairs(similarity, x_ids=None, y_ids=None, cutoff=None, same=False, exclude_diagonal=False):
    """Return the mask of the pairs with different (same: equal) ids and ``s_ij <= cutoff_i``, or all but (i, i)."""
    kept = torch.ones_like(similarity, dtype=torch.bool)
    if x_ids is not None:
        kept = kept & (different(x_ids, y_ids) != same)
    if exclude_diagonal:
        kept = kept & ~torch.eye(*similarity.shape, dtype=torch.bool, device=similarity.device)
    if cutoff is not None:
        kept = kept & below(similarity, torch.as_tensor(cutoff).to(similarity).expand(similarity.shape[0]))
    return kept
