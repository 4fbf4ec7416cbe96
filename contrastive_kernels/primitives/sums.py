"""Sums over the kept pairs of every row: of a term by a sweep, of ones and similarities from the ids where possible."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from contrastive_kernels.engine.spec import compute_dtype
from contrastive_kernels.engine.terms import Count, Identity, Term
from contrastive_kernels.primitives import checks
from contrastive_kernels.primitives.rows import gather_rows, row_dot, wide_sums
from contrastive_kernels.primitives.shards import ALONE, Group, Shards, over_ranks, shards_of_columns
from contrastive_kernels.primitives.sweep import Pairs, sweep, weighted_total

__all__ = ["kept_counts", "kept_sums", "similarity_sum"]


@over_ranks
def similarity_sum(
    x: Tensor,
    y: Tensor | None = None,
    *,
    term: Term,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    same: bool = False,
    exclude_diagonal: bool = False,
    cutoff: float | Tensor | None = None,
    reduction: Literal["none", "sum"] = "none",
    backend: str | None = None,
    group: Group | None = None,
) -> Tensor:
    r"""Return the sum of an elementwise function over every row of the similarity matrix, which is never stored.

    .. math:: r_i = \sum_{j \in A(i)} \phi(\langle x_i, y_j \rangle)

    Args:
        x, y, x_ids, y_ids, same, exclude_diagonal, cutoff, backend, group: as in `similarity_logsumexp`; the same pairs
            are left out.
        term: the function: `Band`, `Softplus`, `Square`, `Hinge`, `DistanceHinge`, `Student`, `Gaussian`, `Identity` or
            `Count`.
        reduction: ``"none"``, or ``"sum"`` over the rows too: then one sweep computes the value and the gradients,
            three matrix products instead of four. Over a group the sum is this rank's.

    Returns:
        ``(N,)``, or 0-dim for ``"sum"``; float32 (float64 for float64 inputs), differentiable in x, y and the term's
        tensors.

    Raises:
        ValueError, TypeError, RuntimeError, NotImplementedError: as `similarity_logsumexp`.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> x = torch.nn.functional.normalize(torch.randn(8, 4), dim=1)
        >>> ck.similarity_sum(x, term=ck.Band(0.1, 0.5), x_ids=torch.arange(8)).shape
        torch.Size([8])
    """
    if not isinstance(term, Term):
        raise TypeError(f"term must be a Term such as Band(0.1, 0.5), not {type(term).__name__}")
    x_ids, y_ids = checks.primitive(x, y, x_ids, y_ids, cutoff, same)
    checks.term_operands(term, x)
    checks.choice("reduction", reduction, ("none", "sum"))
    pairs = Pairs(x_ids, y_ids, checks.per_row("cutoff", cutoff, x), same, int(exclude_diagonal))
    shards = shards_of_columns(group, y)
    if reduction == "sum":
        return weighted_total(x, y, pairs, term=term, backend=backend, shards=shards)
    return sweep(x, y, pairs, term=term, exponents=(), backend=backend, shards=shards).row_sum


def kept_counts(
    x: Tensor, y: Tensor | None, pairs: Pairs, backend: str | None = None, shards: Shards = ALONE
) -> Tensor:
    """Return the number of kept columns of each row of x: O(N log N) from the ids; by similarity one more sweep."""
    if pairs.by_similarity():
        y = None if y is None else y.detach()
        return sweep(x.detach(), y, pairs, term=Count(), exponents=(), backend=backend, shards=shards).row_sum
    y, x_ids, y_ids = (x, pairs.x_ids, pairs.x_ids) if y is None else (y, pairs.x_ids, pairs.y_ids)
    counts = torch.full((x.shape[0],), sum(shards.sizes(y)), dtype=compute_dtype(x), device=x.device)
    if x_ids is not None and y_ids is not None:
        all_ids = shards.gather(y_ids)
        slot, own, known = _class_slots(x_ids, all_ids)
        ones = counts.new_ones(all_ids.shape[0])
        counts = counts - known * torch.zeros_like(ones).index_add(0, slot, ones)[own]
    if pairs.diagonals:
        dropped: Tensor | int = pairs.diagonals
        if x_ids is not None and y_ids is not None:
            dropped = (x_ids != y_ids[: x.shape[0]]).to(counts.dtype)
        counts = counts - dropped
    return counts


def kept_sums(x: Tensor, y: Tensor | None, pairs: Pairs, backend: str | None = None, shards: Shards = ALONE) -> Tensor:
    """Return the sum of the similarities of each row of x to its kept columns: O(N D), or one more sweep."""
    if pairs.by_similarity():
        return sweep(x, y, pairs, term=Identity(), exponents=(), backend=backend, shards=shards).row_sum
    y, x_ids, y_ids = (x, pairs.x_ids, pairs.x_ids) if y is None else (y, pairs.x_ids, pairs.y_ids)
    # Sums of all rows minus those of some: what is left has its digits if they are wide.
    wide = y.to(wide_sums(y))
    total = shards.sum(wide.sum(0)).expand(x.shape)
    if x_ids is not None and y_ids is not None and not shards.alone:
        total = total - shards.class_sums(wide, y_ids, x_ids)
    elif x_ids is not None and y_ids is not None:
        slot, own, known = _class_slots(x_ids, y_ids)
        classes = torch.zeros_like(wide).index_add(0, slot, wide)
        total = total - known[:, None] * gather_rows(classes, own)
    if pairs.diagonals:
        v = pairs.diagonals
        own_column = wide[: x.shape[0]] if v == 1 else wide.unflatten(0, (v, -1)).sum(0).repeat(v, 1)
        if x_ids is not None and y_ids is not None:
            own_column = (x_ids != y_ids[: x.shape[0]])[:, None] * own_column
        total = total - own_column
    return row_dot(x, total.to(compute_dtype(x)), backend)


def _class_slots(x_ids: Tensor, y_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return where each y's class accumulates, where each x finds its class, and whether the y have it at all.

    A class's slot is the first place of its id among the sorted ids: static shapes, nothing read back.
    """
    ordered = y_ids.sort().values
    own = torch.searchsorted(ordered, x_ids).clamp(max=y_ids.shape[0] - 1)
    return torch.searchsorted(ordered, y_ids), own, ordered[own] == x_ids
