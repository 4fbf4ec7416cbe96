"""Labels as the peers take them: of any dtype and shape, every value a class."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["class_ids"]


def class_ids(labels: Tensor) -> Tensor:
    """Return (N,), ids in [0, N) that are equal where the labels are.

    An id is the first place of its label among the sorted ones: static shapes, nothing read back.
    """
    labels = labels.detach().reshape(-1).contiguous()
    if not labels.dtype.is_floating_point:
        labels = labels.to(torch.int64)
    elif labels.dtype != torch.float64:
        labels = labels.to(torch.float32)
    return torch.searchsorted(labels.sort().values, labels)
