"""`nnclr_loss`, `false_negative_loss` and `easy_negative_loss` as modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from contrastive_kernels.functional.common import ContrastiveStats
from contrastive_kernels.functional.neighbors import easy_negative_loss, false_negative_loss, nnclr_loss
from contrastive_kernels.modules.common import FunctionLoss
from contrastive_kernels.modules.softmax import KeyQueue

__all__ = ["EasyNegativeLoss", "FalseNegativeLoss", "NNCLRLoss"]


class NNCLRLoss(KeyQueue):
    """`nnclr_loss` with its support set, a first-in-first-out queue of past projections in a persistent buffer.

    Args:
        dim: D, the dimension of projections and predictions.
        queue_size: K, the size of the support set.
        temperature: 0.1 unless ``logit_scale`` is given; an ``nn.Parameter`` is trained.
        options: further keyword arguments of `nnclr_loss`.

    Example:
        >>> NNCLRLoss(dim=4, queue_size=64)(torch.randn(8, 2, 4), torch.randn(8, 2, 4)).shape
        torch.Size([])
    """

    function = staticmethod(nnclr_loss)

    def __init__(
        self, dim: int, queue_size: int = 65536, temperature: float | Tensor | None = None, **options: Any
    ) -> None:
        super().__init__(dim, queue_size, temperature=temperature, **options)

    def forward(self, z: Tensor, predictions: Tensor, **inputs: Tensor) -> Tensor | tuple[Tensor, ContrastiveStats]:
        """The loss against the queue as it was; in training mode z, or its first view, then enters it."""
        z, predictions = self.unit_rows(z.detach()), self.unit_rows(predictions)
        loss = self.function(z, predictions, self.queue.to(z.dtype, copy=True), **self.options(), **inputs)
        if self.training:
            self.enqueue(z[:, 0] if z.dim() == 3 else z)
        return loss


class FalseNegativeLoss(FunctionLoss):
    """`false_negative_loss` as a module.

    Args:
        temperature: 0.5 unless ``logit_scale`` is given; an ``nn.Parameter`` is trained.
        options: further keyword arguments of `false_negative_loss`.

    Example:
        >>> FalseNegativeLoss(0.1, mode="attract")(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(false_negative_loss)

    def __init__(self, temperature: float | Tensor | None = None, **options: Any) -> None:
        super().__init__(temperature=temperature, **options)

    def forward(
        self, z0: Tensor, z1: Tensor | None = None, **inputs: Tensor
    ) -> Tensor | tuple[Tensor, ContrastiveStats]:
        """The loss; `inputs` are per-batch keyword arguments: weight, ids, threshold."""
        return self.function(z0, z1, **self.options(), **inputs)


class EasyNegativeLoss(FunctionLoss):
    """`easy_negative_loss` as a module.

    Args:
        temperature: 0.07 unless ``logit_scale`` is given; an ``nn.Parameter`` is trained.
        options: further keyword arguments of `easy_negative_loss`.

    Example:
        >>> EasyNegativeLoss(0.1, k=5)(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(easy_negative_loss)

    def __init__(self, temperature: float | Tensor | None = None, **options: Any) -> None:
        super().__init__(temperature=temperature, **options)

    def forward(
        self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None, **inputs: Tensor
    ) -> Tensor | tuple[Tensor, ContrastiveStats]:
        """The loss; `inputs` are per-batch keyword arguments: weight, query_ids, key_ids, threshold."""
        return self.function(query, positive_key, negative_keys, **self.options(), **inputs)
