"""What the diagnostics share: full precision, checked arguments, chunks of rows, equal rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor
from typing_extensions import ParamSpec

from contrastive_kernels.primitives import checks, compute_dtype, reading_is_possible, unit_rows, wide_products

P = ParamSpec("P")
Result = TypeVar("Result")

# Elements of one chunk's scores: the workspace of a diagnostic, 4 MiB in float32 a tile, which stays in a cache.
CHUNK_ELEMENTS = 1 << 20


# Precision


def without_autocast(function: Callable[P, Result]) -> Callable[P, Result]:
    """Return the function with autocast off: a measurement is the same wherever it is taken."""

    @functools.wraps(function)
    def measured(*args: P.args, **kwargs: P.kwargs) -> Result:
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        first = next(tensors, None)
        with nullcontext() if first is None else wide_products(first):
            return function(*args, **kwargs)

    return measured


def wide_rows(x: Tensor, normalize: bool) -> Tensor:
    """Return the rows in the compute dtype, then of unit norm if asked for: half precision is not rounded again."""
    return unit_rows(x.to(compute_dtype(x)), normalize)


# Arguments


def check_alike(name_x: str, x: Tensor, name_y: str, y: Tensor, *, rows: bool = True) -> None:
    """Raise unless two feature tensors fit, as `checks.alike`; half precision, which is widened, goes with float32."""
    if compute_dtype(x) == compute_dtype(y):
        y = y.new_empty((), dtype=x.dtype).expand(y.shape)
    checks.alike(name_x, x, name_y, y, rows=rows)


def check_labels(labels: Tensor, x: Tensor) -> Tensor:
    """Return integer labels as int64, one per sample, -1 for none."""
    return checks.ids("labels", labels, x.shape[0], x)


def check_means(means: Tensor, x: Tensor) -> None:
    """Raise unless the class means (K, D) fit the features."""
    checks.features("means", means)
    if means.shape[0] == 0:
        raise ValueError(f"means {checks.shape(means)} must have at least one class")
    check_alike("features", x, "means", means, rows=False)


def check_range(name: str, value: Tensor, least: int, end: int, what: str) -> None:
    """Raise unless least <= value < end everywhere.

    Waits for the device, where an index out of range would break every call that follows.
    """
    if not value.numel() or not reading_is_possible(value):
        return
    found = torch.stack(value.aminmax()).tolist()
    if found[0] < least or found[1] >= end:
        raise ValueError(f"{name} has values from {found[0]} to {found[1]}; {what} are {least} to {end - 1}")


# Rows


def chunks(n: int, columns: int) -> Iterator[slice]:
    """Yield slices of n rows such that each has at most CHUNK_ELEMENTS scores."""
    step = max(1, CHUNK_ELEMENTS // max(columns, 1))
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def class_index(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return labels as indices that exist, and which of them were classes."""
    known = (labels >= 0) & (labels < classes)
    return torch.where(known, labels, 0), known


def centre(rows: Tensor) -> Tensor:
    """Return a point amid the rows, (D,); scores of differences from it lose least where the rows are far from 0.

    The median: a row that is not finite or far away does not move it, and that of integers is one, so that differences
    of small integers stay exact and ties stay ties.
    """
    return rows.nanmedian(0).values.nan_to_num() if len(rows) else rows.new_zeros(rows.shape[1])


def first_equal(rows: Tensor) -> Tensor:
    """Return the lowest index of a row equal to each row (N,), its own for a row that is not finite.

    A product may give equal rows scores that differ in the last bit.
    """
    index = torch.arange(len(rows), device=rows.device)
    mark = torch.where(rows.isfinite().all(1), -1, index).to(rows.dtype)
    same = torch.cat([mark[:, None], rows.nan_to_num()], 1).unique(dim=0, return_inverse=True)[1]
    return index.new_full(index.shape, len(rows)).scatter_reduce(0, same, index, "amin")[same]


def equal_rows(rows: Tensor) -> Tensor | None:
    """Return `first_equal` in int32, or None where all rows differ, which saves the comparison of all pairs."""
    equal = first_equal(rows)
    if reading_is_possible(rows) and torch.equal(equal, torch.arange(len(rows), device=rows.device)):
        return None
    return equal.int()
