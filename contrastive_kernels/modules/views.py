"""`arcl_loss` and `moco_arcl_loss` as modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from contrastive_kernels import functional
from contrastive_kernels.modules.common import FunctionLoss
from contrastive_kernels.modules.softmax import KeyQueue

__all__ = ["ArCLLoss", "MoCoArCLLoss"]


class ArCLLoss(FunctionLoss):
    """`arcl_loss` as a module.

    Args:
        temperature: 0.5 unless ``logit_scale`` is given; an ``nn.Parameter`` is trained.
        options: further keyword arguments of `arcl_loss`.

    Example:
        >>> ArCLLoss(0.2)(torch.randn(8, 4, 16)).shape
        torch.Size([])
    """

    function = staticmethod(functional.arcl_loss)

    def __init__(self, temperature: float | Tensor | None = None, **options: Any) -> None:
        super().__init__(temperature=temperature, **options)

    def forward(self, views: Tensor, **inputs: Tensor) -> Tensor | tuple[Tensor, functional.ContrastiveStats]:
        """The loss; `inputs` are per-batch keyword arguments: weight, ids, cutoff."""
        return self.function(views, **self.options(), **inputs)


class MoCoArCLLoss(KeyQueue):
    """`moco_arcl_loss` with its queue, which is a persistent buffer and takes the first key view.

    Args:
        dim: D, the dimension of queries and keys.
        queue_size: K.
        temperature: 0.07 unless ``logit_scale`` is given; an ``nn.Parameter`` is trained.
        options: further keyword arguments of `moco_arcl_loss`.

    Example:
        >>> MoCoArCLLoss(dim=4, queue_size=64)(torch.randn(8, 4), torch.randn(8, 3, 4)).shape
        torch.Size([])
    """

    function = staticmethod(functional.moco_arcl_loss)

    def __init__(
        self, dim: int, queue_size: int = 65536, temperature: float | Tensor | None = None, **options: Any
    ) -> None:
        super().__init__(dim, queue_size, temperature=temperature, **options)

    def forward(
        self, query: Tensor, keys: Tensor, **inputs: Tensor
    ) -> Tensor | tuple[Tensor, functional.ContrastiveStats]:
        """The loss against the queue as it was; in training mode the first key views then enter it."""
        query, keys = self.unit_rows(query), self.unit_rows(keys.detach())
        loss = self.function(query, keys, self.queue.to(query.dtype, copy=True), **self.options(), **inputs)
        if self.training:
            self.enqueue(keys[:, 0])
        return loss
