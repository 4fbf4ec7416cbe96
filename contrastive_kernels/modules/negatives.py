"""`debiased_loss` and `hard_negative_loss` as modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from contrastive_kernels.functional.common import ContrastiveStats
from contrastive_kernels.functional.negatives import debiased_loss, hard_negative_loss
from contrastive_kernels.modules.common import FunctionLoss

__all__ = ["DebiasedLoss", "HardNegativeLoss"]


class DebiasedLoss(FunctionLoss):
    """`debiased_loss` as a module.

    Args:
        temperature: 0.5 unless ``logit_scale`` is given; an ``nn.Parameter`` is trained.
        tau_plus: the probability that a negative is a positive.
        options: further keyword arguments of `debiased_loss`.

    Example:
        >>> DebiasedLoss(0.2, tau_plus=0.05)(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(debiased_loss)

    def __init__(self, temperature: float | Tensor | None = None, tau_plus: float = 0.1, **options: Any) -> None:
        super().__init__(temperature=temperature, tau_plus=tau_plus, **options)

    def forward(self, z0: Tensor, z1: Tensor, **inputs: Tensor) -> Tensor | tuple[Tensor, ContrastiveStats]:
        """The loss; `inputs` are per-batch keyword arguments: weight, ids, cutoff."""
        return self.function(z0, z1, **self.options(), **inputs)


class HardNegativeLoss(FunctionLoss):
    """`hard_negative_loss` as a module; its ``beta`` may be set anew, to anneal it.

    Args:
        temperature: 0.5 unless ``logit_scale`` is given; an ``nn.Parameter`` is trained.
        tau_plus: the probability that a negative is a positive.
        beta: concentration on the hard negatives.
        options: further keyword arguments of `hard_negative_loss`.

    Example:
        >>> HardNegativeLoss(0.2, beta=0.5)(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(hard_negative_loss)

    def __init__(
        self, temperature: float | Tensor | None = None, tau_plus: float = 0.1, beta: float = 1.0, **options: Any
    ) -> None:
        super().__init__(temperature=temperature, tau_plus=tau_plus, beta=beta, **options)

    def forward(self, z0: Tensor, z1: Tensor, **inputs: Tensor) -> Tensor | tuple[Tensor, ContrastiveStats]:
        """The loss; `inputs` are per-batch keyword arguments: weight, ids, cutoff."""
        return self.function(z0, z1, **self.options(), **inputs)
