"""The distance polarization regulariser of large-margin contrastive learning, alone and as part of another loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from contrastive_kernels import checks
from contrastive_kernels.functional.common import poison, row_factors, rows
from contrastive_kernels.functional.totals import kept_counts
from contrastive_kernels.similarity import sweep, weighted_total
from contrastive_kernels.sweep import Band, Pairs

__all__ = ["Polarization", "distance_polarization"]


@dataclass(frozen=True)
class Polarization:
    r"""The regulariser as an argument of another loss: ``polarization=Polarization(0.1, 0.5, weight=0.1)``.

    Adds ``weight`` times the mean of :math:`\max(0, (d - \mathrm{lower})(\mathrm{upper} - d))`, ``d = (1 - s) / 2``,
    over the loss's negative pairs, computed in the same sweep as the loss.

    The defaults are placeholders: the paper's values are not known to us. Choose them for your data.

    Source: Chen, Niu, Gong, Li, Yang, Sugiyama, ICML 2021, large-margin contrastive learning.
    """

    lower: float = 0.1
    upper: float = 0.5
    weight: float = 0.1

    def __post_init__(self) -> None:
        self.band()

    def band(self) -> Band:
        """The term of the sweep; raises ValueError for bounds that are no band."""
        return Band(self.lower, self.upper)


def polarized(loss: Tensor, row_sum: Tensor, pair_count: Tensor, polarization: Polarization, reduction: str) -> Tensor:
    """The reduced loss plus the weighted mean of the band over the kept pairs; for "none" plus each row's own mean."""
    if reduction != "none":
        row_sum, pair_count = row_sum.sum(), pair_count.sum()
    return loss + polarization.weight * (row_sum / pair_count.clamp(min=1))


def distance_polarization(
    z: Tensor,
    ids: Tensor | None = None,
    *,
    lower: float = 0.1,
    upper: float = 0.5,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str | None = None,
) -> Tensor:
    r"""Pushes pairwise distances out of an ambiguous band, without the N x N distances.

    .. math:: R = \frac{1}{|P|} \sum_{(i,j) \in P} \max\bigl(0, (d_{ij} - \delta_+)(\delta_- - d_{ij})\bigr),
        \qquad d_{ij} = \tfrac{1}{2}(1 - \langle z_i, z_j \rangle)

    Args:
        z: ``(N, D)``, normalised inside.
        ids: ``(N,)`` integers; pairs with equal ids are left out. None: only self pairs are.
        lower: :math:`\delta_+`, a distance in [0, 1]. The default is a placeholder, not the paper's value.
        upper: :math:`\delta_-`, likewise, above lower.
        reduction: ``"mean"`` over the ordered pairs P, ``"sum"`` over them, ``"row"`` (sum over j, mean over i) or
            ``"none"`` (row sums).
        normalize: rows to unit norm first.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``; float32 (float64 for float64 inputs). 0 when no pair is left.

    Raises:
        ValueError: z is not (N, D) or empty, ids of another length, bounds that are no band, an unknown reduction.
        TypeError: z is not floating or ids are not integers.

    Source: Chen, Niu, Gong, Li, Yang, Sugiyama, ICML 2021, large-margin contrastive learning.

    Example:
        >>> distance_polarization(torch.randn(16, 8), lower=0.2, upper=0.6).shape
        torch.Size([])
    """
    checks.features("z", z)
    checks.not_empty("z", z)
    checks.choice("reduction", reduction, ("mean", "sum", "row", "none"))
    band = Band(lower, upper)
    pairs = Pairs(None if ids is None else checks.ids("ids", ids, z.shape[0], z), exclude_diagonal=True)
    z = rows(z, normalize, backend)
    # an infinite similarity is outside the band
    infinite = 0.0 if normalize else poison(z)
    if reduction == "none":
        return sweep(z, None, pairs, term=band, exponents=(), backend=backend).row_sum + infinite
    factors = row_factors(z, None, "mean" if reduction == "row" else "sum")
    if reduction == "mean":
        factors = factors / kept_counts(z, None, pairs).sum().clamp(min=1)
    return weighted_total(z, None, pairs, term=band, weight=factors, backend=backend) + infinite
