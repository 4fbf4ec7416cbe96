"""`alignment_loss` and `augmentation_robust_loss` as modules."""

from __future__ import annotations

from torch import Tensor

from contrastive_kernels.functional.alignment import alignment_loss, augmentation_robust_loss
from contrastive_kernels.modules.common import FunctionLoss

__all__ = ["AlignmentLoss", "AugmentationRobustLoss"]


class AlignmentLoss(FunctionLoss):
    """`alignment_loss` as a module.

    Args:
        options: keyword arguments of `alignment_loss`.

    Example:
        >>> AlignmentLoss(normalize=True)(torch.randn(8, 3, 4)).shape
        torch.Size([])
    """

    function = staticmethod(alignment_loss)

    def forward(self, views: Tensor, **inputs: Tensor) -> Tensor:
        """The loss; `inputs` are per-batch keyword arguments: weight."""
        return self.function(views, **self.options(), **inputs)


class AugmentationRobustLoss(FunctionLoss):
    """`augmentation_robust_loss` as a module.

    Args:
        options: keyword arguments of `augmentation_robust_loss`.

    Example:
        >>> AugmentationRobustLoss(normalize=True)(torch.randn(8, 3, 4)).shape
        torch.Size([])
    """

    function = staticmethod(augmentation_robust_loss)

    def forward(self, views: Tensor, **inputs: Tensor) -> Tensor:
        """The loss; `inputs` are per-batch keyword arguments: weight."""
        return self.function(views, **self.options(), **inputs)
