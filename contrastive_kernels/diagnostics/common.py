"""What the diagnostics share: chunks of rows, checked labels, unit rows in the compute dtype."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from contrastive_kernels.primitives import checks, compute_dtype, unit_rows

# Elements of one chunk's scores: the workspace of a diagnostic, 16 MiB in float32 a tile.
CHUNK_ELEMENTS = 1 << 22


def chunks(n: int, columns: int) -> Iterator[slice]:
    """Slices of n rows such that each has at most CHUNK_ELEMENTS scores."""
    step = max(1, CHUNK_ELEMENTS // max(columns, 1))
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def wide_rows(x: Tensor, normalize: bool) -> Tensor:
    """The rows in the compute dtype, of unit norm if asked for."""
    return unit_rows(x, normalize).to(compute_dtype(x))


def check_labels(labels: Tensor, x: Tensor) -> Tensor:
    """Integer labels, one per sample, -1 for none."""
    return checks.ids("labels", labels, x.shape[0], x)


def check_means(means: Tensor, x: Tensor) -> None:
    """Class means (K, D) that fit the features."""
    checks.features("means", means)
    if means.shape[0] == 0:
        raise ValueError(f"means {checks.shape(means)} must have at least one class")
    checks.alike("features", x, "means", means, rows=False)


def class_index(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Labels as indices that exist, and which of them were classes."""
    known = (labels >= 0) & (labels < classes)
    return torch.where(known, labels, 0), known
