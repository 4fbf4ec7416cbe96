"""Losses of two views of which a predictor, a small network behind one branch, guesses the other: no negatives."""

from __future__ import annotations

from torch import Tensor

from contrastive_kernels.losses._options import check_reduction
from contrastive_kernels.primitives import checks, compute_dtype, unit_rows


def predictions_and_targets(
    p0: Tensor, z0: Tensor, p1: Tensor, z1: Tensor, normalize: bool, reduction: str, weight: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """Return the pairs that are compared, p0 with z1 and p1 with z0, as they enter; the targets are constants.

    Raises:
        ValueError: shapes that do not fit, an empty batch, an unknown reduction.
        TypeError: dtypes that differ or are not floating.
    """
    checks.paired("p0", p0, "z0", z0)
    checks.paired("p0", p0, "p1", p1)
    checks.paired("p0", p0, "z1", z1)
    check_reduction(p0, reduction, weight)
    dtype = compute_dtype(p0)
    rows = [unit_rows(x, normalize).to(dtype) for x in (p0, z1.detach(), p1, z0.detach())]
    return [(rows[0], rows[1]), (rows[2], rows[3])]
