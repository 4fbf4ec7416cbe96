"""Sums of a term over the pairs of each row of a similarity matrix."""

from __future__ import annotations

import torch

from ._pairs import kept_pairs, second_rows


def band(similarity, lower, upper):
    """Return ``(d - lower)(upper - d)`` strictly inside the band, else 0, for ``d = (1 - s) / 2``."""
    distance = (1 - similarity) / 2
    outside = (distance <= lower) | (distance >= upper)
    return ((distance - lower) * (upper - distance)).masked_fill(outside, 0.0)


def per_row(value):
    """Return one value per row as a column, a single value as it is."""
    return value[:, None] if torch.is_tensor(value) and value.dim() == 1 else value


def hinge(similarity, margin):
    """Return ``max(0, s + margin)``, with gradient 0 at the kink; margin is a number or one per row."""
    value = similarity + per_row(margin)
    return value.masked_fill(value <= 0, 0.0)


# By the class names of `contrastive_kernels`; t is the term.
TERMS = {
    "Identity": lambda s, t: s,
    "Count": lambda s, t: torch.ones_like(s),
    "Square": lambda s, t: s * s,
    "Band": lambda s, t: band(s, t.lower, t.upper),
    "Softplus": lambda s, t: torch.logaddexp(t.scale * s + per_row(t.bias), torch.zeros_like(s)),
    "Hinge": lambda s, t: hinge(s, t.margin),
    "DistanceHinge": lambda s, t: hinge(-(2 - 2 * s).clamp(min=1e-12).sqrt(), t.margin),
    "Student": lambda s, t: (1 + (t.scale * s + per_row(t.offset)).clamp(min=0)) ** -t.exponent,
    "Gaussian": lambda s, t: torch.exp(-t.t * (2 - 2 * s)),
}


def similarity_sum(
    x, y=None, *, term, x_ids=None, y_ids=None, same=False, exclude_diagonal=False, cutoff=None, reduction="none"
):
    """Return ``sum_j phi(<x_i, y_j>)`` over the kept pairs, or the sum over i too; phi by the class name of term."""
    y, y_ids = second_rows(x, y, x_ids, y_ids)
    similarity = x @ y.mT
    kept = kept_pairs(similarity, x_ids, y_ids, cutoff, same, exclude_diagonal)
    sums = TERMS[type(term).__name__](similarity, term).masked_fill(~kept, 0.0).sum(1)
    return sums.sum() if reduction == "sum" else sums
