"""The distance polarization as a term of another loss."""

from __future__ import annotations

from typing import NamedTuple

from .sums import band


class Polarization(NamedTuple):
    """The band of distances to keep clear, and the weight of the term."""

    lower: float
    upper: float
    weight: float


def polarization_term(similarity, kept, polarization, reduction="mean"):
    """Return weight times the mean of the band over the kept pairs; for ``none`` over those of each row."""
    values = band(similarity, polarization.lower, polarization.upper).masked_fill(~kept, 0.0)
    if reduction == "none":
        return polarization.weight * values.sum(1) / kept.sum(1).clamp(min=1)
    return polarization.weight * values.sum() / kept.sum().clamp(min=1)
