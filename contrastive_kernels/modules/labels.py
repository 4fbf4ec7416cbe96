"""`sup_con_loss` and `label_pull_loss` as modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from contrastive_kernels.functional.common import ContrastiveStats
from contrastive_kernels.functional.labels import label_pull_loss, sup_con_loss
from contrastive_kernels.modules.common import FunctionLoss

__all__ = ["LabelPullLoss", "SupConLoss"]


class SupConLoss(FunctionLoss):
    """`sup_con_loss` as a module.

    Args:
        temperature: 0.1 unless ``logit_scale`` is given; an ``nn.Parameter`` is trained.
        options: further keyword arguments of `sup_con_loss`.

    Example:
        >>> SupConLoss(0.07)(torch.randn(8, 2, 4), torch.randint(3, (8,))).shape
        torch.Size([])
    """

    function = staticmethod(sup_con_loss)

    def __init__(self, temperature: float | Tensor | None = None, **options: Any) -> None:
        super().__init__(temperature=temperature, **options)

    def forward(
        self, features: Tensor, labels: Tensor | None = None, **inputs: Tensor
    ) -> Tensor | tuple[Tensor, ContrastiveStats]:
        """The loss; `inputs` are per-batch keyword arguments: weight."""
        return self.function(features, labels, **self.options(), **inputs)


class LabelPullLoss(FunctionLoss):
    """`label_pull_loss` as a module; the label embeddings belong to the caller and come with every call.

    Args:
        form: ``"pull"`` or ``"softmax"``.
        options: further keyword arguments of `label_pull_loss`.

    Example:
        >>> LabelPullLoss("softmax")(torch.randn(8, 4), torch.randint(3, (8,)), torch.randn(3, 4)).shape
        torch.Size([])
    """

    function = staticmethod(label_pull_loss)

    def __init__(self, form: str = "pull", **options: Any) -> None:
        super().__init__(form=form, **options)

    def forward(self, z: Tensor, labels: Tensor, label_embeddings: Tensor, **inputs: Tensor) -> Tensor:
        """The loss; `inputs` are per-batch keyword arguments: weight."""
        return self.function(z, labels, label_embeddings, **self.options(), **inputs)
