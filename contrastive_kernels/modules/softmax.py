"""`info_nce_loss`, `nt_xent_loss`, `clip_loss` and `moco_loss` as modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contrastive_kernels import functional
from contrastive_kernels.functional.common import rows
from contrastive_kernels.modules.common import FunctionLoss

__all__ = ["ClipLoss", "InfoNCELoss", "MoCoLoss", "NTXentLoss"]


class InfoNCELoss(FunctionLoss):
    """`info_nce_loss` as a module.

    Args:
        temperature: 0.07 unless ``logit_scale`` is given; an ``nn.Parameter`` is trained.
        options: further keyword arguments of `info_nce_loss`.

    Example:
        >>> InfoNCELoss(0.1, symmetric=True)(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(functional.info_nce_loss)

    def __init__(self, temperature: float | Tensor | None = None, **options: Any) -> None:
        super().__init__(temperature=temperature, **options)

    def forward(
        self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None, **inputs: Tensor
    ) -> Tensor | tuple[Tensor, functional.ContrastiveStats]:
        """The loss; `inputs` are per-batch keyword arguments: weight, query_ids, key_ids, cutoff."""
        return self.function(query, positive_key, negative_keys, **self.options(), **inputs)


class NTXentLoss(FunctionLoss):
    """`nt_xent_loss` as a module.

    Args:
        temperature: 0.5 unless ``logit_scale`` is given; an ``nn.Parameter`` is trained.
        options: further keyword arguments of `nt_xent_loss`.

    Example:
        >>> NTXentLoss(0.1)(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(functional.nt_xent_loss)

    def __init__(self, temperature: float | Tensor | None = None, **options: Any) -> None:
        super().__init__(temperature=temperature, **options)

    def forward(
        self, z0: Tensor, z1: Tensor | None = None, **inputs: Tensor
    ) -> Tensor | tuple[Tensor, functional.ContrastiveStats]:
        """The loss; `inputs` are per-batch keyword arguments: weight, ids, cutoff."""
        return self.function(z0, z1, **self.options(), **inputs)


class ClipLoss(FunctionLoss):
    """`clip_loss` as a module; the learnable scale and bias belong to the model and come with every call.

    Args:
        options: keyword arguments of `clip_loss`.

    Example:
        >>> ClipLoss(normalize=True)(torch.randn(8, 4), torch.randn(8, 4), torch.tensor(14.3)).shape
        torch.Size([])
    """

    function = staticmethod(functional.clip_loss)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor | None = None,
        logit_bias: float | Tensor | None = None,
        **inputs: Tensor,
    ) -> Tensor | tuple[Tensor, functional.ContrastiveStats]:
        """The loss; `inputs` are per-batch keyword arguments: weight, ids, cutoff."""
        return self.function(image_features, text_features, logit_scale, logit_bias, **self.options(), **inputs)


class KeyQueue(FunctionLoss):
    """A loss against a first-in-first-out queue of past keys, which are stored as they enter the similarities.

    Args:
        dim: D, the dimension of the keys.
        queue_size: K, the number of keys kept.
        options: keyword arguments of the loss function.
    """

    queue: Tensor
    position: Tensor

    def __init__(self, dim: int, queue_size: int, **options: Any) -> None:
        super().__init__(**options)
        if dim < 1 or queue_size < 1:
            raise ValueError(f"dim {dim} and queue_size {queue_size} must be positive")
        self.register_buffer("queue", torch.nn.functional.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def options(self) -> dict[str, Any]:
        # The rows are normalised before they are stored: once a key, not once a batch for the whole queue.
        return super().options() | {"normalize": False}

    def unit_rows(self, x: Tensor) -> Tensor:
        """x as it enters the similarities."""
        return rows(x, getattr(self, "normalize", True))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replaces the oldest keys; of more than queue_size keys the last ones stay."""
        keys = keys[-self.queue.shape[0] :].to(self.queue.dtype)
        places = (self.position + torch.arange(keys.shape[0], device=keys.device)) % self.queue.shape[0]
        self.queue[places] = keys
        self.position.copy_((self.position + keys.shape[0]) % self.queue.shape[0])


class MoCoLoss(KeyQueue):
    """`moco_loss` with its queue, which is a persistent buffer.

    Args:
        dim: D, the dimension of queries and keys.
        queue_size: K.
        temperature: 0.07 unless ``logit_scale`` is given; an ``nn.Parameter`` is trained.
        options: further keyword arguments of `moco_loss`.

    Example:
        >>> MoCoLoss(dim=4, queue_size=64)(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(functional.moco_loss)

    def __init__(
        self, dim: int, queue_size: int = 65536, temperature: float | Tensor | None = None, **options: Any
    ) -> None:
        super().__init__(dim, queue_size, temperature=temperature, **options)

    def forward(
        self, query: Tensor, key: Tensor, **inputs: Tensor
    ) -> Tensor | tuple[Tensor, functional.ContrastiveStats]:
        """The loss against the queue as it was; in training mode the keys then enter it."""
        query, key = self.unit_rows(query), self.unit_rows(key.detach())
        loss = self.function(query, key, self.queue.to(query.dtype, copy=True), **self.options(), **inputs)
        if self.training:
            self.enqueue(key)
        return loss
