"""`distance_polarization` and the large-margin losses as modules."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from contrastive_kernels import functional
from contrastive_kernels.functional import ContrastiveStats, Polarization
from contrastive_kernels.functional.negatives import debiased_loss, hard_negative_loss
from contrastive_kernels.functional.variants import quick_thoughts_loss
from contrastive_kernels.modules.common import FunctionLoss

__all__ = ["DistancePolarization", "LMCLLoss"]


class DistancePolarization(FunctionLoss):
    """`distance_polarization` as a module.

    Args:
        lower: lower end of the band of distances (1 - s) / 2; the default is a placeholder.
        upper: upper end; likewise.
        options: further keyword arguments of `distance_polarization`.

    Example:
        >>> DistancePolarization(0.2, 0.6)(torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(functional.distance_polarization)

    def __init__(self, lower: float = 0.1, upper: float = 0.5, **options: Any) -> None:
        super().__init__(lower=lower, upper=upper, **options)

    def forward(self, z: Tensor, ids: Tensor | None = None) -> Tensor:
        """The regulariser of z."""
        return self.function(z, ids, **self.options())


class LMCLLoss(FunctionLoss):
    """Large-margin contrastive learning: a base loss plus the distance polarization, from one sweep.

    Quick-Thoughts without ``normalize`` takes a second sweep: its similarities are raw, the distances are not.

    Args:
        base: ``"nt_xent"``, ``"info_nce"``, ``"quick_thoughts"``, ``"debiased"`` or ``"hard_negative"``.
        lower, upper, weight: of `Polarization`; the defaults are placeholders.
        options: keyword arguments of the base loss.

    Source: Chen, Niu, Gong, Li, Yang, Sugiyama, ICML 2021.

    Example:
        >>> LMCLLoss("nt_xent", lower=0.2, upper=0.6, weight=0.5)(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    BASES: ClassVar = {
        "nt_xent": functional.nt_xent_loss,
        "info_nce": functional.info_nce_loss,
        "quick_thoughts": quick_thoughts_loss,
        "debiased": debiased_loss,
        "hard_negative": hard_negative_loss,
    }

    def __init__(
        self, base: str = "nt_xent", *, lower: float = 0.1, upper: float = 0.5, weight: float = 0.1, **options: Any
    ) -> None:
        if base not in self.BASES:
            raise ValueError(f"base {base!r} is unknown; choose one of {', '.join(map(repr, self.BASES))}")
        self.function = self.BASES[base]
        super().__init__(polarization=Polarization(lower, upper, weight), **options)

    def forward(self, first: Tensor, second: Tensor, **inputs: Tensor) -> Tensor | tuple[Tensor, ContrastiveStats]:
        """The loss; `inputs` are per-batch keyword arguments of the base loss."""
        return self.function(first, second, **self.options(), **inputs)
