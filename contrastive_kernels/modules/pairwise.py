"""`siglip_loss` and `triplet_margin_loss` as modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from contrastive_kernels.functional.common import ContrastiveStats
from contrastive_kernels.functional.pairwise import siglip_loss, triplet_margin_loss
from contrastive_kernels.modules.common import FunctionLoss

__all__ = ["SigLipLoss", "TripletMarginLoss"]


class SigLipLoss(FunctionLoss):
    """`siglip_loss` as a module; the learnable scale and bias belong to the model and come with every call.

    Args:
        options: keyword arguments of `siglip_loss`.

    Example:
        >>> SigLipLoss(normalize=True)(torch.randn(8, 4), torch.randn(8, 4), torch.tensor(10.0), -10.0).shape
        torch.Size([])
    """

    function = staticmethod(siglip_loss)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor | None = None,
        logit_bias: float | Tensor | None = None,
        **inputs: Any,
    ) -> Tensor | tuple[Tensor, ContrastiveStats]:
        """The loss; `inputs` are per-batch keyword arguments: weight, ids, cutoff, negative_only."""
        return self.function(image_features, text_features, logit_scale, logit_bias, **{**self.options(), **inputs})


class TripletMarginLoss(FunctionLoss):
    """`triplet_margin_loss` as a module.

    Args:
        margin: in units of the metric; an ``nn.Parameter`` is trained.
        options: further keyword arguments of `triplet_margin_loss`.

    Example:
        >>> TripletMarginLoss(0.1, metric="euclidean")(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(triplet_margin_loss)

    def __init__(self, margin: float | Tensor = 0.2, **options: Any) -> None:
        super().__init__(margin=margin, **options)

    def forward(self, anchor: Tensor, positive: Tensor, **inputs: Tensor) -> Tensor:
        """The loss; `inputs` are per-batch keyword arguments: weight, ids."""
        return self.function(anchor, positive, **self.options(), **inputs)
