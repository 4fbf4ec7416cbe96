"""How the pairwise distances are distributed, and how many are in the band of the distance polarization."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from contrastive_kernels.diagnostics.common import (
    check_alike,
    chunks,
    equal_rows,
    wide_rows,
    without_autocast,
)
from contrastive_kernels.primitives import Band, checks, compute_dtype

__all__ = ["BandCount", "DistanceHistogram", "band_count", "distance_histogram"]


class BandCount(NamedTuple):
    """How many pairs have a distance strictly inside a band."""

    count: Tensor  # type: ignore[assignment]  # not the method of a tuple
    """0-dim int64, ordered pairs."""
    pairs: Tensor
    """0-dim int64: all ordered pairs that were looked at."""
    fraction: Tensor
    """0-dim: count / pairs; 0 without pairs, NaN if the distance of a pair is."""
    invalid: Tensor
    """0-dim int64: pairs whose distance is not finite, which are in no band."""


class DistanceHistogram(NamedTuple):
    """The distances (1 - s) / 2 of all pairs in bins of equal width."""

    counts: Tensor
    """(bins,) int64, ordered pairs; a bin holds its lower end, the last one both."""
    edges: Tensor
    """(bins + 1,): from 0 to 1."""
    invalid: Tensor
    """0-dim int64: pairs whose distance is not finite, in no bin."""


def _distances(
    z: Tensor, y: Tensor | None, ids: Tensor | None, y_ids: Tensor | None, same: bool, normalize: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield chunks of the distances (rows, M) and the masks of the pairs that count."""
    z = wide_rows(z, normalize)
    columns, column_ids = (z, ids) if y is None else (wide_rows(y, normalize), y_ids)
    index = torch.arange(len(columns), dtype=torch.int32, device=z.device)
    equal = equal_rows(z if y is None else torch.cat([z, columns])) if normalize else None
    for rows in chunks(len(z), len(columns)):
        distance = (1 - z[rows] @ columns.mT).div_(2)
        # Rounding leaves the distance of equal rows a little beside 0, and others outside [0, 1].
        if equal is not None:
            distance.masked_fill_(equal[rows, None] == equal[len(equal) - len(columns) :], 0)
        if normalize:
            distance.clamp_(0, 1)
        kept = index[rows, None] != index if y is None else torch.ones_like(distance, dtype=torch.bool)
        if ids is not None:
            kept &= (ids[rows, None] == column_ids) == same
        yield distance, kept


def _checked(
    z: Tensor, y: Tensor | None, ids: Tensor | None, y_ids: Tensor | None, same: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the ids as int64; raise unless they, z and y fit each other."""
    checks.features("z", z)
    if y is not None:
        checks.features("y", y)
        check_alike("z", z, "y", y, rows=False)
        if (ids is None) != (y_ids is None):
            raise ValueError("ids and y_ids go together when y is given; one of them is missing")
        y_ids = None if y_ids is None else checks.ids("y_ids", y_ids, y.shape[0], z)
    elif y_ids is not None:
        raise ValueError("y_ids is given but y is not; ids serves both sides of z against itself")
    if same and ids is None:
        raise ValueError("same=True needs ids: it keeps the pairs whose ids are equal")
    return checks.optional_ids("ids", ids, z.shape[0], z), y_ids


def _finite(distance: Tensor) -> Tensor:
    """Return what `torch.isfinite` does, in half as many passes."""
    return distance.abs() < torch.inf


def _edges(bins: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the least distance of every bin, in which ``distance * bins`` rounds to its number, and 1."""
    number = torch.arange(bins + 1, dtype=dtype, device=device)
    edges = number / bins
    below = edges.nextafter(torch.zeros_like(edges))
    edges = torch.where(below * bins >= number, below, edges)
    edges = torch.where(edges * bins < number, edges.nextafter(torch.ones_like(edges)), edges)
    return edges.index_fill(0, torch.tensor([bins], device=device), 1)


@torch.no_grad()
@without_autocast
def band_count(
    z: Tensor,
    y: Tensor | None = None,
    *,
    lower: float = 0.1,
    upper: float = 0.5,
    ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    same: bool = False,
    normalize: bool = True,
) -> BandCount:
    r"""How many pairs the distance polarization acts on (its R_0), without the N x N distances.

    .. math:: R_0 = \#\{(i, j) : \delta_+ < d_{ij} < \delta_-\}, \qquad d_{ij} = \tfrac12 (1 - \langle z_i, z_j \rangle)

    Args:
        z: ``(N, D)``.
        y: ``(M, D)``, or None for z against itself without the self pairs.
        lower: :math:`\delta_+`, in [0, 1]; the default is the placeholder of `distance_polarization`.
        upper: :math:`\delta_-`, above lower; likewise.
        ids: ``(N,)`` integers; pairs with equal ids are left out.
        y_ids: ``(M,)`` integers, given exactly when ``ids`` and ``y`` are.
        same: keep only the pairs with equal ids instead, such as positives or samples of one class.
        normalize: rows to unit norm first.

    Returns:
        `BandCount`: ordered pairs in the band, all ordered pairs, their ratio, float32 (float64 for float64 inputs),
        and the pairs without a finite distance, which are not in the band. Equal rows of unit norm have distance 0.

    Raises:
        ValueError: shapes that do not fit or bounds that are no band.
        TypeError: dtypes that differ or are not floating (ids: not integer).

    Source: Chen, Niu, Gong, Li, Yang, Sugiyama, ICML 2021, large-margin contrastive learning.

    Example:
        >>> import torch
        >>> from contrastive_kernels import diagnostics
        >>> diagnostics.band_count(torch.eye(3), lower=0.2, upper=0.6).count.item()
        6
    """
    lower, upper = checks.positive("lower", lower, zero=True), checks.positive("upper", upper)
    Band(lower, upper)
    ids, y_ids = _checked(z, y, ids, y_ids, same)
    found = torch.zeros(3, dtype=torch.int64, device=z.device)
    for distance, kept in _distances(z, y, ids, y_ids, same, normalize):
        inside = (distance > lower) & (distance < upper)
        found += torch.stack([(inside & kept).sum(), kept.sum(), (_finite(distance) & kept).sum()])
    number, pairs, finite = found.unbind()
    invalid = pairs - finite
    fraction = number.to(compute_dtype(z)) / pairs.clamp(min=1)
    return BandCount(number, pairs, fraction.masked_fill(invalid > 0, torch.nan), invalid)


@torch.no_grad()
@without_autocast
def distance_histogram(
    z: Tensor,
    y: Tensor | None = None,
    *,
    bins: int = 50,
    ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    same: bool = False,
    normalize: bool = True,
) -> DistanceHistogram:
    r"""Histogram of the distances of all pairs, without the N x N distances.

    Args:
        z: ``(N, D)``.
        y: ``(M, D)``, or None for z against itself without the self pairs.
        bins: number of bins of :math:`d_{ij} = \frac12 (1 - \langle z_i, z_j \rangle)` between 0 and 1; what is
            outside, for rows that are not of unit norm, goes to the first or last one, unless it is infinite.
        ids: ``(N,)`` integers; pairs with equal ids are left out.
        y_ids: ``(M,)`` integers, given exactly when ``ids`` and ``y`` are.
        same: keep only the pairs with equal ids instead, such as positives or samples of one class.
        normalize: rows to unit norm first.

    Returns:
        `DistanceHistogram`: counts of ordered pairs ``(bins,)``, edges ``(bins + 1,)``, and the pairs in no bin because
        their distance is not finite.

    Raises:
        ValueError: shapes that do not fit or no bin.
        TypeError: dtypes that differ or are not floating (ids: not integer).

    Example:
        >>> import torch
        >>> from contrastive_kernels import diagnostics
        >>> diagnostics.distance_histogram(torch.eye(3), bins=4).counts.tolist()
        [0, 0, 6, 0]
    """
    bins = checks.count("bins", bins)
    ids, y_ids = _checked(z, y, ids, y_ids, same)
    # One place more for the pairs that do not count, and one for those without a finite distance.
    counts = torch.zeros(bins + 2, dtype=torch.int64, device=z.device)
    for distance, kept in _distances(z, y, ids, y_ids, same, normalize):
        place = (distance * bins).clamp_(0, bins - 1).nan_to_num_().long()
        place.masked_fill_(~_finite(distance), bins).masked_fill_(~kept, bins + 1)
        counts += place.flatten().bincount(minlength=bins + 2)
    return DistanceHistogram(counts[:bins], _edges(bins, compute_dtype(z), z.device), counts[bins])
