"""`uniformity_loss` and `t_simclr_loss` as modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from contrastive_kernels.functional.distance import t_simclr_loss, uniformity_loss
from contrastive_kernels.modules.common import FunctionLoss

__all__ = ["TSimCLRLoss", "UniformityLoss"]


class UniformityLoss(FunctionLoss):
    """`uniformity_loss` as a module.

    Args:
        t: of the Gaussian; an ``nn.Parameter`` is trained.
        options: further keyword arguments of `uniformity_loss`.

    Example:
        >>> UniformityLoss(normalize=True)(torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(uniformity_loss)

    def __init__(self, t: float | Tensor = 2.0, **options: Any) -> None:
        super().__init__(t=t, **options)

    def forward(self, z: Tensor) -> Tensor:
        """The loss of z."""
        return self.function(z, **self.options())


class TSimCLRLoss(FunctionLoss):
    """`t_simclr_loss` as a module.

    Args:
        temperature: an ``nn.Parameter`` is trained.
        df: the degrees of freedom.
        options: further keyword arguments of `t_simclr_loss`.

    Example:
        >>> TSimCLRLoss(df=1.0)(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(t_simclr_loss)

    def __init__(self, temperature: float | Tensor = 8.0, df: float = 5.0, **options: Any) -> None:
        super().__init__(temperature=temperature, df=df, **options)

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        """The loss of two views."""
        return self.function(z0, z1, **self.options())
