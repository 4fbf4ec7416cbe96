"""The primitives: row and column log-sum-exps, sums of a term over pairs, the least similar pair of views."""

from __future__ import annotations

import torch

from .dense import INFINITY, below, different, kept_logsumexp


def pairs_kept(similarity, x_ids=None, y_ids=None, cutoff=None):
    """Mask of the pairs with different ids and ``s_ij <= cutoff_i``."""
    kept = torch.ones_like(similarity, dtype=torch.bool)
    if x_ids is not None:
        kept = kept & different(x_ids, y_ids)
    if cutoff is not None:
        kept = kept & below(similarity, torch.as_tensor(cutoff).to(similarity).expand(similarity.shape[0]))
    return kept


def self_pairs(x, y, x_ids, y_ids):
    """``y = None`` means x against itself, with its ids."""
    return (x, x_ids if y_ids is None else y_ids) if y is None else (y, y_ids)


def similarity_logsumexp(x, y=None, *, scale=1.0, x_ids=None, y_ids=None, y_bias=None, cutoff=None, columns=False):
    """``log sum_j exp(a <x_i, y_j> + b_j)`` over the kept pairs, and over rows of a column."""
    y, y_ids = self_pairs(x, y, x_ids, y_ids)
    similarity = x @ y.mT
    kept = pairs_kept(similarity, x_ids, y_ids, cutoff)
    logits = scale * similarity
    rows = kept_logsumexp(logits if y_bias is None else logits + y_bias, kept, 1)
    return (rows, kept_logsumexp(logits, kept, 0)) if columns else rows


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


def first_minimum(values):
    """Smallest entry of each row and its index, the first on a tie; NaN counts as smallest."""
    order = values.detach().masked_fill(values.detach().isnan(), -INFINITY)
    index = order.argsort(dim=1, stable=True)[:, :1]
    return values.gather(1, index)[:, 0], index[:, 0]


def min_view_similarity(views, *, reduce="min"):
    """``min`` or ``mean`` of ``<z_ij, z_ik>`` over j < k, and the first minimal pair."""
    count = views.shape[1]
    pairs = torch.combinations(torch.arange(count, device=views.device), 2)
    similarity = (views @ views.mT)[:, pairs[:, 0], pairs[:, 1]]
    if reduce == "mean":
        return similarity.mean(1), None
    values, index = first_minimum(similarity)
    return values, pairs[index]
