"""Masks of the pairs (i, j) that a loss keeps."""

from __future__ import annotations

import torch


def different(row_ids, column_ids):
    """``row_ids[i] != column_ids[j]`` as an (N, M) mask; all pairs where there are no ids."""
    return row_ids[:, None] != column_ids[None, :]


def others(count, ids, device):
    """Mask of the pairs i != j whose ids differ."""
    kept = ~torch.eye(count, dtype=torch.bool, device=device)
    return kept if ids is None else kept & different(ids, ids)


def threshold(similarity_of_positive, cutoff, cutoff_margin):
    """Per-anchor cutoff ``c_i``, given or ``sg(s_p) + margin``, or None."""
    if cutoff is not None and cutoff_margin is not None:
        raise ValueError("cutoff and cutoff_margin exclude each other")
    if cutoff_margin is not None:
        return similarity_of_positive.detach() + cutoff_margin
    if cutoff is not None:
        return torch.as_tensor(cutoff).to(similarity_of_positive) + torch.zeros_like(similarity_of_positive)
    return None


def below(similarity, cutoffs):
    """Pairs that survive ``s_ij <= c_i``; a NaN similarity survives."""
    if cutoffs is None:
        return torch.ones_like(similarity, dtype=torch.bool)
    return ~(similarity.detach() > cutoffs[:, None])


def self_pairs(x, y, x_ids, y_ids):
    """``y = None`` means x against itself, with its ids."""
    return (x, x_ids if y_ids is None else y_ids) if y is None else (y, y_ids)


def pairs_kept(similarity, x_ids=None, y_ids=None, cutoff=None):
    """Mask of the pairs with different ids and ``s_ij <= cutoff_i``."""
    kept = torch.ones_like(similarity, dtype=torch.bool)
    if x_ids is not None:
        kept = kept & different(x_ids, y_ids)
    if cutoff is not None:
        kept = kept & below(similarity, torch.as_tensor(cutoff).to(similarity).expand(similarity.shape[0]))
    return kept
