"""Distance polarization as an argument of another loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from contrastive_kernels.primitives import ALONE, Band, Shards, checks

__all__ = ["Polarization", "add_polarization", "check_polarization"]


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
        for name in ("lower", "upper", "weight"):
            object.__setattr__(self, name, checks.number(name, getattr(self, name)))  # it is frozen
        self.band()

    def band(self) -> Band:
        """Return the term of the sweep; raise ValueError for bounds that are no band."""
        return Band(self.lower, self.upper)


def check_polarization(value: object) -> None:
    """Raise unless value is a `Polarization` or None."""
    if value is not None and not isinstance(value, Polarization):
        raise TypeError(f"polarization must be a Polarization, not {type(value).__name__}")


def add_polarization(
    loss: Tensor,
    band_sum: Tensor,
    pair_count: Tensor,
    polarization: Polarization,
    reduction: str,
    shards: Shards = ALONE,
) -> Tensor:
    """Return the reduced loss plus the weighted mean of the band over the kept pairs; for "none" over each row's."""
    if reduction != "none":
        band_sum, pair_count = band_sum.sum(), shards.sum(pair_count.sum())
        band_sum = band_sum if shards.alone else band_sum * shards.world
    return loss + polarization.weight * (band_sum / pair_count.clamp(min=1))
