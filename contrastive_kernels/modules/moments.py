"""`spectral_contrastive_loss`, `barlow_twins_loss` and `vicreg_loss` as modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from contrastive_kernels.functional.moments import barlow_twins_loss, spectral_contrastive_loss, vicreg_loss
from contrastive_kernels.modules.common import FunctionLoss

__all__ = ["BarlowTwinsLoss", "SpectralContrastiveLoss", "VICRegLoss"]


class SpectralContrastiveLoss(FunctionLoss):
    """`spectral_contrastive_loss` as a module.

    Args:
        mu: divides the loss and bounds the projected rows.
        options: further keyword arguments of `spectral_contrastive_loss`.

    Example:
        >>> SpectralContrastiveLoss(project=True)(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(spectral_contrastive_loss)

    def __init__(self, mu: float = 1.0, **options: Any) -> None:
        super().__init__(mu=mu, **options)

    def forward(self, z0: Tensor, z1: Tensor, **inputs: Tensor) -> Tensor:
        """The loss; `inputs` are per-batch keyword arguments: weight."""
        return self.function(z0, z1, **self.options(), **inputs)


class BarlowTwinsLoss(FunctionLoss):
    """`barlow_twins_loss` as a module.

    Args:
        lambd: weight of the redundancy term.
        options: further keyword arguments of `barlow_twins_loss`.

    Example:
        >>> BarlowTwinsLoss(5e-3)(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(barlow_twins_loss)

    def __init__(self, lambd: float | Tensor = 0.0051, **options: Any) -> None:
        super().__init__(lambd=lambd, **options)

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        """The loss of the two views."""
        return self.function(z0, z1, **self.options())


class VICRegLoss(FunctionLoss):
    """`vicreg_loss` as a module.

    Args:
        sim_weight, var_weight, cov_weight: of the invariance, variance and covariance terms.
        options: further keyword arguments of `vicreg_loss`.

    Example:
        >>> VICRegLoss()(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(vicreg_loss)

    def __init__(
        self,
        sim_weight: float | Tensor = 25.0,
        var_weight: float | Tensor = 25.0,
        cov_weight: float | Tensor = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(sim_weight=sim_weight, var_weight=var_weight, cov_weight=cov_weight, **options)

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        """The loss of the two views."""
        return self.function(z0, z1, **self.options())
