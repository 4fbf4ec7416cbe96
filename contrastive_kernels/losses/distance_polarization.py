"""The distance polarization regulariser: the function and its module."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from contrastive_kernels.losses._arguments import BackendArguments, loss_function
from contrastive_kernels.losses._module import LossModule
from contrastive_kernels.losses._options import row_factors
from contrastive_kernels.primitives import (
    Band,
    Group,
    Pairs,
    checks,
    kept_counts,
    nan_unless_finite,
    over_ranks,
    shards_of,
    sweep,
    unit_rows,
    weighted_total,
)

__all__ = ["DistancePolarization", "distance_polarization"]

POLARIZATION_REDUCTIONS = ("mean", "sum", "row", "none")


class DistancePolarizationArguments(BackendArguments, total=False):
    """Keyword arguments of `distance_polarization`."""

    reduction: str


@loss_function
@over_ranks
def distance_polarization(
    z: Tensor,
    ids: Tensor | None = None,
    *,
    lower: float = 0.1,
    upper: float = 0.5,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str | None = None,
    group: Group | None = None,
) -> Tensor:
    r"""Return a regulariser that pushes pairwise distances out of an ambiguous band, without the N x N distances.

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
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch. None: this
            process alone.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``; float32 (float64 for float64 inputs). 0 when no pair is left.

    Raises:
        ValueError: z is not (N, D) or empty, ids of another length, bounds that are no band, an unknown reduction.
        TypeError: z is not floating or ids are not integers.

    Source: Chen, Niu, Gong, Li, Yang, Sugiyama, ICML 2021, large-margin contrastive learning.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.distance_polarization(torch.randn(16, 8), lower=0.2, upper=0.6).shape
        torch.Size([])
    """
    shards = shards_of(group)
    checks.features("z", z)
    checks.not_empty("z", z)
    checks.choice("reduction", reduction, POLARIZATION_REDUCTIONS)
    checks.backend(z, backend)
    band = Band(checks.number("lower", lower), checks.number("upper", upper))
    pairs = Pairs(checks.optional_ids("ids", ids, z.shape[0], z), diagonals=1)
    z = unit_rows(z, normalize, backend)
    # an infinite similarity is outside the band
    infinite = 0.0 if normalize else shards.sum(nan_unless_finite(z))
    if reduction == "none":
        return sweep(z, None, pairs, term=band, exponents=(), backend=backend, shards=shards).row_sum + infinite
    factors = row_factors(z, None, "mean" if reduction == "row" else "sum", shards)
    if reduction == "mean":
        factors = factors / shards.sum(kept_counts(z, None, pairs, shards=shards).sum()).clamp(min=1)
    return weighted_total(z, None, pairs, term=band, weight=factors, backend=backend, shards=shards) + infinite


class DistancePolarization(LossModule):
    """`distance_polarization` as a module.

    Args:
        lower: lower end of the band of distances (1 - s) / 2; the default is a placeholder.
        upper: upper end; likewise.
        options: further keyword arguments of `distance_polarization`.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.DistancePolarization(0.2, 0.6)(torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(distance_polarization)
    reductions = POLARIZATION_REDUCTIONS

    def __init__(
        self,
        lower: float = 0.1,
        upper: float = 0.5,
        **options: Unpack[DistancePolarizationArguments],
    ) -> None:
        super().__init__(lower=lower, upper=upper, **options)

    def forward(
        self,
        z: Tensor,
        ids: Tensor | None = None,
    ) -> Tensor:
        """Return the loss."""
        return self.function(z, ids, **self.options())
