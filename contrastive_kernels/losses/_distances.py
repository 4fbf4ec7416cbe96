"""Squared distances between all rows of a batch."""

from __future__ import annotations

from torch import Tensor

from contrastive_kernels.primitives import checks


def centred(z: Tensor) -> Tensor:
    """Return the rows without their mean: distances stay, and what |z|^2 loses to rounding is smallest."""
    return z - z.mean(0).detach()


def check_two_rows(name: str, x: Tensor) -> None:
    """Raise unless x has the two rows that a distance takes."""
    if x.shape[0] < 2:
        raise ValueError(f"{name} {checks.shape(x)} must have at least 2 rows")
