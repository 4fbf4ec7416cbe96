"""`decoupled_loss` and `quick_thoughts_loss` as modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from contrastive_kernels.functional.common import ContrastiveStats
from contrastive_kernels.functional.variants import decoupled_loss, quick_thoughts_loss
from contrastive_kernels.modules.common import FunctionLoss

__all__ = ["DecoupledLoss", "QuickThoughtsLoss"]


class DecoupledLoss(FunctionLoss):
    """`decoupled_loss` as a module.

    Args:
        temperature: 0.1 unless ``logit_scale`` is given; an ``nn.Parameter`` is trained.
        options: further keyword arguments of `decoupled_loss`; ``positive_weight`` is best a callable here.

    Example:
        >>> DecoupledLoss(0.2)(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(decoupled_loss)

    def __init__(self, temperature: float | Tensor | None = None, **options: Any) -> None:
        super().__init__(temperature=temperature, **options)

    def forward(self, z0: Tensor, z1: Tensor, **inputs: Tensor) -> Tensor | tuple[Tensor, ContrastiveStats]:
        """The loss; `inputs` are per-batch keyword arguments: weight, ids, cutoff, positive_weight."""
        return self.function(z0, z1, **self.options(), **inputs)


class QuickThoughtsLoss(FunctionLoss):
    """`quick_thoughts_loss` as a module.

    Args:
        context_size: the distance up to which sentences are neighbours.
        options: further keyword arguments of `quick_thoughts_loss`.

    Example:
        >>> QuickThoughtsLoss(2)(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(quick_thoughts_loss)

    def __init__(self, context_size: int = 1, **options: Any) -> None:
        super().__init__(context_size=context_size, **options)

    def forward(self, first: Tensor, second: Tensor, **inputs: Tensor) -> Tensor:
        """The loss; `inputs` are per-batch keyword arguments: weight, ids."""
        return self.function(first, second, **self.options(), **inputs)
