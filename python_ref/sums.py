"""The primitive of the other losses: sums of a term over the pairs of each row."""

from __future__ import annotations

import torch

from ._pairs import pairs_kept, self_pairs


def band(similarity, lower, upper):
    """``h(D) = (D - lower)(upper - D)`` strictly inside the band, else 0, ``D = (1 - s) / 2``."""
    distance = (1 - similarity) / 2
    outside = (distance <= lower) | (distance >= upper)
    return ((distance - lower) * (upper - distance)).masked_fill(outside, 0.0)


def per_row(value):
    """A number, or one per row as a column."""
    return value[:, None] if torch.is_tensor(value) and value.dim() == 1 else value


def hinge(similarity, margin):
    """``max(0, s + margin)``, gradient 0 at the kink; margin a number or one per row."""
    value = similarity + per_row(margin)
    return value.masked_fill(value <= 0, 0.0)


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


def similarity_sum(x, y=None, *, term, x_ids=None, y_ids=None, cutoff=None, reduction="none"):
    """``sum_j phi(<x_i, y_j>)`` over the kept pairs, perhaps over i too; phi by the class name of term."""
    y, y_ids = self_pairs(x, y, x_ids, y_ids)
    similarity = x @ y.mT
    kept = pairs_kept(similarity, x_ids, y_ids, cutoff)
    sums = TERMS[type(term).__name__](similarity, term).masked_fill(~kept, 0.0).sum(1)
    return sums.sum() if reduction == "sum" else sums
