"""Cutoffs that separate selected rows from the others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def between(inner: Tensor, outer: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return a cutoff between two similarities of each row of x to rows of y, which no sweep's rounding crosses.

    Where the two are equal up to rounding, a little above both: equals are kept.
    """
    lower, upper = torch.minimum(inner, outer), torch.maximum(inner, outer)
    sizes = [torch.linalg.vector_norm(z.detach(), dim=1, dtype=lower.dtype) for z in (x, y)]
    # The zero in front serves a y without rows.
    slack = 8 * torch.finfo(lower.dtype).eps * sizes[0] * F.pad(sizes[1], (1, 0)).amax()
    return torch.where(upper - lower <= slack, upper + slack, lower / 2 + upper / 2)
