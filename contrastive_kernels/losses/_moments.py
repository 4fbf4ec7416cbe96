"""What the losses of the features' moments share."""

from __future__ import annotations

from torch import Tensor

from contrastive_kernels.primitives import checks


def check_batches(z0: Tensor, z1: Tensor) -> None:
    """Raise unless z0 and z1 are two batches of paired rows, at least two: the losses are made of variances."""
    checks.paired("z0", z0, "z1", z1)
    if z0.shape[0] < 2:
        raise ValueError(f"z0 {checks.shape(z0)} must have at least 2 rows: the loss is one of variances")
