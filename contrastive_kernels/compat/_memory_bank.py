"""The memory bank of lightly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive_kernels.compat._ranks import gather_constant, is_gathered
from contrastive_kernels.engine.warn import warn

__all__ = ["MemoryBankModule"]


class MemoryBankModule(nn.Module):
    """Past rows, the negatives of `lightly.NTXentLoss`: `lightly.models.modules.memory_bank.MemoryBankModule`.

    A batch that reaches the end is cut there, and the next one starts at the beginning: it does not wrap.

    Args:
        size: (K, D); 0: no bank; K alone, with a warning: D is that of the first batch.
        gather_distributed: the rows of all ranks enter the bank.
        feature_dim_first: return (D, K), not (K, D).

    Raises:
        ValueError: a negative size, or neither one nor two numbers.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.lightly import MemoryBankModule
        >>> rows, bank = MemoryBankModule((64, 4))(torch.randn(8, 4), update=True)
        >>> bank.shape
        torch.Size([4, 64])
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(
        self, size: int | Sequence[int] = 65536, gather_distributed: bool = False, feature_dim_first: bool = True
    ) -> None:
        super().__init__()
        self.size = (size,) if isinstance(size, int) else tuple(size)
        if any(entry < 0 for entry in self.size):
            raise ValueError(f"size {size} of the memory bank must not be negative")
        if not isinstance(size, int) and self.size != (0,) and len(self.size) != 2:
            raise ValueError(f"size {size} of the memory bank must be (K, D), or 0 for none")
        self.gather_distributed = gather_distributed
        self.feature_dim_first = feature_dim_first
        self.register_buffer("bank", torch.empty(self.size, dtype=torch.float32), persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.int64), persistent=False)
        if len(self.size) == 2:
            self._init_memory_bank(self.size)
        elif self.size[0] > 0:
            warn(
                f"size={size} of the memory bank leaves its dimension to the first batch; pass size=({size}, D): "
                "lightly itself takes nothing else in newer releases"
            )

    def forward(
        self, output: Tensor, labels: Tensor | None = None, update: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return the rows as they are and a copy of the bank, None without one; with `update` the rows then enter it.

        Args:
            output: ``(N, D)``.
            labels: without meaning.
            update: whether the rows enter the bank.
        """
        if self.size[0] == 0:
            return output, None
        if self.bank.dim() == 1:
            self._init_memory_bank((*self.size, *output.shape[1:]))
        bank = self.bank.detach().clone()
        if update:
            self._dequeue_and_enqueue(output)
        return output, bank.transpose(0, -1) if self.feature_dim_first else bank

    @torch.no_grad()
    def _init_memory_bank(self, size: tuple[int, ...]) -> None:
        """Fill the bank with random unit rows."""
        self.bank = F.normalize(torch.randn(size).type_as(self.bank), dim=-1)
        self.bank_ptr = torch.zeros_like(self.bank_ptr)

    @torch.no_grad()
    def _dequeue_and_enqueue(self, batch: Tensor) -> None:
        """Replace the oldest rows."""
        rows = gather_constant(batch) if self.gather_distributed and is_gathered() else batch
        start = int(self.bank_ptr)
        end = min(start + rows.shape[0], self.size[0])
        self.bank[start:end] = rows[: end - start]
        self.bank_ptr.fill_(end % self.size[0])
