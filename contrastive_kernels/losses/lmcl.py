"""Large-margin contrastive learning: a module that adds the distance polarization to a base loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from contrastive_kernels.losses._arguments import ContrastiveStats
from contrastive_kernels.losses._module import LossModule
from contrastive_kernels.losses._polarization import Polarization
from contrastive_kernels.losses.debiased import debiased_loss
from contrastive_kernels.losses.hard_negative import hard_negative_loss
from contrastive_kernels.losses.info_nce import info_nce_loss
from contrastive_kernels.losses.nt_xent import NTXentLoss, nt_xent_loss
from contrastive_kernels.losses.quick_thoughts import quick_thoughts_loss

__all__ = ["LMCLLoss"]


class LMCLLoss(LossModule):
    """Large-margin contrastive learning: a base loss plus the distance polarization, from one sweep.

    Quick-Thoughts without ``normalize`` takes a second sweep: its similarities are raw, the distances are not.

    Args:
        base: ``"nt_xent"``, ``"info_nce"``, ``"quick_thoughts"``, ``"debiased"`` or ``"hard_negative"``.
        lower, upper, weight: of `Polarization`; the defaults are placeholders.
        options: keyword arguments of the base loss.

    Source: Chen, Niu, Gong, Li, Yang, Sugiyama, ICML 2021.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.LMCLLoss("nt_xent", lower=0.2, upper=0.6, weight=0.5)(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    BASES: ClassVar[dict[str, Callable[..., Any]]] = {
        "nt_xent": nt_xent_loss,
        "info_nce": info_nce_loss,
        "quick_thoughts": quick_thoughts_loss,
        "debiased": debiased_loss,
        "hard_negative": hard_negative_loss,
    }

    def __init__(
        self, base: str = "nt_xent", *, lower: float = 0.1, upper: float = 0.5, weight: float = 0.1, **options: Any
    ) -> None:
        if base not in self.BASES:
            raise ValueError(f"base {base!r} is unknown; choose one of {', '.join(map(repr, self.BASES))}")
        self.base = base
        if base == "nt_xent":
            self.reductions = NTXentLoss.reductions
        super().__init__(polarization=Polarization(lower, upper, weight), **options)

    @property
    def function(self) -> Callable[..., Any]:  # type: ignore[override]  # one per instance, not per class
        """The base loss."""
        return self.BASES[self.base]

    def forward(self, first: Tensor, second: Tensor, **inputs: Any) -> Tensor | tuple[Tensor, ContrastiveStats]:
        """Return the loss; `inputs` are per-batch keyword arguments of the base loss."""
        loss: Tensor | tuple[Tensor, ContrastiveStats] = self.function(first, second, **self.options(**inputs))
        return loss
