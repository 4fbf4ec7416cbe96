"""`row_select`: the most or least similar columns of every row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_kernels.engine.autograd import call
from contrastive_kernels.engine.backends import choose
from contrastive_kernels.primitives import checks
from contrastive_kernels.primitives.rows import cast_for_autocast
from contrastive_kernels.primitives.shards import ALONE, Group, Shards, over_ranks, shards_of_columns

__all__ = ["cutoff_between", "row_select", "select_over", "selecting_cutoff"]


@over_ranks
@torch.no_grad()
def row_select(
    x: Tensor,
    y: Tensor | None = None,
    k: int = 1,
    *,
    largest: bool = True,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    exclude_diagonal: bool = False,
    group: Group | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Return the k largest (or smallest) similarities of every row and their columns, without the N x M matrix.

    .. math:: v_{i1} \ge v_{i2} \ge \dots \ge v_{ik}, \qquad v_{ir} = \langle x_i, y_{c_{ir}} \rangle

    over the allowed columns; equal similarities go to the lowest column. Not differentiable: recompute the similarity
    of a selected pair where its gradient is wanted.

    Args:
        x: ``(N, D)``, float16, bfloat16, float32 or float64; taken as it is, not normalised.
        y: ``(M, D)``, or None for x against itself.
        k: how many columns of each row, at least 1; may exceed M.
        largest: the largest similarities first, or the smallest first.
        x_ids: ``(N,)`` integers; a pair with equal ids is not allowed. With ``y=None`` they serve both sides.
        y_ids: ``(M,)`` integers; given exactly when ``x_ids`` and ``y`` are.
        exclude_diagonal: pairs (i, i) are not allowed either.
        group: process group, one-dimensional mesh or ``"world"``: the rows of y (or of x) of all its ranks are the
            columns, numbered rank after rank. None: this process.

    Returns:
        values ``(N, k)``, float32 (float64 for float64 inputs), and columns ``(N, k)`` int64. Where a row has fewer
        than k allowed columns, the value is ``-inf`` (``inf`` for the smallest) and the column -1. A NaN similarity
        comes first either way, so that it is not overlooked.

    Raises:
        ValueError: shapes that do not fit, or k below 1.
        TypeError: dtypes that differ or are not floating (ids and k: not integer).
        RuntimeError: tensors on different devices.

    Source: exhaustive nearest-neighbour search; serves NNCLR, false-negative cancellation and easy negatives.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> x, y = torch.randn(8, 4), torch.randn(100, 4)
        >>> values, columns = ck.row_select(x, y, k=3)
        >>> columns.shape
        torch.Size([8, 3])
    """
    x_ids, y_ids = checks.primitive(x, y, x_ids, y_ids, None)
    k = checks.count("k", k)
    return select_over(shards_of_columns(group, y), x, y, k, largest, x_ids, y_ids, exclude_diagonal)


@torch.no_grad()
def select_over(
    shards: Shards,
    x: Tensor,
    y: Tensor | None,
    k: int,
    largest: bool = True,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    exclude_diagonal: bool = False,
    views: int = 1,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what `row_select` returns, unchecked, among the rows of all ranks, numbered as in one process."""
    x, y = cast_for_autocast(x), None if y is None else cast_for_autocast(y)
    arguments = x, y, k, largest, x_ids, y_ids, exclude_diagonal
    chosen = choose(x, backend, "select").name
    if shards.alone:
        values, columns = call(chosen, "select", *arguments)
    else:
        sizes = shards.sizes(x if y is None else y)
        values, columns = call("group", "select", *arguments, views, chosen, shards.group, sizes, shards.workspace)
    return values, columns


@torch.no_grad()
def selecting_cutoff(
    x: Tensor,
    y: Tensor | None,
    k: int,
    *,
    largest: bool,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    exclude_diagonal: bool = False,
    backend: str | None = None,
    shards: Shards = ALONE,
) -> Tensor:
    """Return the cutoff of every row with which a sweep drops its k largest similarities, or all but the k smallest.

    It is the largest similarity that is kept, so all that equal it are kept too. The sweep compares the very bits that
    were selected, because a backend that selects computes the products of both alike. For one that does not, the cutoff
    is set apart from the similarities around it by more than rounding, and those that are closer are all kept.
    """
    values, _ = select_over(shards, x, y, k + 1, largest, x_ids, y_ids, exclude_diagonal, backend=backend)
    inner, outer = values[:, k - 1], values[:, k]
    # over several ranks a backward sweep may have other blocks than the selection
    if shards.alone and "select" in choose(x, backend).operators:
        return outer if largest else inner
    return cutoff_between(inner, outer, x, x if y is None else y, shards)


def cutoff_between(inner: Tensor, outer: Tensor, x: Tensor, y: Tensor, shards: Shards = ALONE) -> Tensor:
    """Return a cutoff between two similarities of each row of x to rows of y, which no sweep's rounding crosses.

    Where the two are equal up to rounding, a little above both: equals are kept.
    """
    lower, upper = torch.minimum(inner, outer), torch.maximum(inner, outer)
    sizes = [torch.linalg.vector_norm(z.detach(), dim=1, dtype=lower.dtype) for z in (x, y)]
    # The zero in front serves a y without rows.
    longest = shards.each(F.pad(sizes[1], (1, 0)).amax()).amax()
    slack = 8 * torch.finfo(lower.dtype).eps * sizes[0] * longest
    return torch.where(upper - lower <= slack, upper + slack, lower / 2 + upper / 2)
