"""What the losses with labels share."""

from __future__ import annotations

from torch import Tensor

UNLABELLED = -1


def mean_over(losses: Tensor, share: Tensor, weight: Tensor | None) -> Tensor:
    """Return the mean in which an anchor counts `share` times; 0 where none counts."""
    share = share.to(losses.dtype)
    if weight is not None:
        share = share * weight.to(losses.dtype).repeat(losses.numel() // weight.numel())
    total = share.sum()
    return (share * losses).sum() / total.masked_fill(total == 0, 1)
