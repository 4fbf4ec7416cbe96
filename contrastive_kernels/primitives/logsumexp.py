"""`similarity_logsumexp`: the log-sum-exp of every row and column of the similarities."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from contrastive_kernels.primitives import checks
from contrastive_kernels.primitives.shards import Group, over_ranks, shards_of_columns
from contrastive_kernels.primitives.sweep import Pairs, sweep

__all__ = ["similarity_logsumexp"]


@overload
def similarity_logsumexp(
    x: Tensor,
    y: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    same: bool = False,
    exclude_diagonal: bool = False,
    y_bias: Tensor | None = None,
    cutoff: float | Tensor | None = None,
    columns: Literal[False] = False,
    backend: str | None = None,
    group: Group | None = None,
) -> Tensor: ...
@overload
def similarity_logsumexp(
    x: Tensor,
    y: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    same: bool = False,
    exclude_diagonal: bool = False,
    y_bias: Tensor | None = None,
    cutoff: float | Tensor | None = None,
    columns: Literal[True],
    backend: str | None = None,
    group: Group | None = None,
) -> tuple[Tensor, Tensor]: ...
@over_ranks
def similarity_logsumexp(
    x: Tensor,
    y: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    same: bool = False,
    exclude_diagonal: bool = False,
    y_bias: Tensor | None = None,
    cutoff: float | Tensor | None = None,
    columns: bool = False,
    backend: str | None = None,
    group: Group | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Return the log-sum-exp of every row (and column) of the similarity matrix, which is never stored.

    .. math::
        \ell_i = \log \sum_{j \in A(i)} \exp(\mathrm{scale} \, \langle x_i, y_j \rangle + b_j), \qquad
        A(i) = \{j : \mathrm{id}(x_i) \ne \mathrm{id}(y_j),\ \langle x_i, y_j \rangle \le c_i\}

    With ``same`` the ids are equal instead, and with ``exclude_diagonal`` j is not i.

    Args:
        x: ``(N, D)``, float16, bfloat16, float32 or float64; taken as it is, not normalised.
        y: ``(M, D)``, or None for x against itself (self pairs included unless ``x_ids`` or ``exclude_diagonal`` leaves
            them out).
        scale: inverse temperature; float or 0-dim tensor, differentiable.
        x_ids: ``(N,)`` integers; a pair with equal ids is left out. With ``y=None`` they serve both sides.
        y_ids: ``(M,)`` integers; given exactly when ``x_ids`` and ``y`` are.
        same: keep the pairs with equal ids, and leave out the others. Needs ids; of x against itself, every row with
            itself is such a pair.
        exclude_diagonal: pairs (i, i) are left out too; of the ranks of a group, those of one rank's x and y.
        y_bias: ``(M,)``, added to the logits of column j, differentiable. Not with ``columns``.
        cutoff: float or ``(N,)``; pairs with ``<x_i, y_j>`` above it are left out. No gradient, not with ``columns``.
        columns: also return the log-sum-exp of every column.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.
        group: process group, one-dimensional mesh or ``"world"``: the rows of y (or of x) of all its ranks are the
            columns. The result belongs to this rank's rows and, with ``columns``, to its rows of y. None: this process.

    Returns:
        ``(N,)``, or ``((N,), (M,))`` with ``columns``; float32 (float64 for float64 inputs), differentiable.
        A row or column with no pair left is ``-inf`` and has zero gradient.

    Raises:
        ValueError: shapes that do not fit, or ``columns`` together with ``y_bias`` or ``cutoff``.
        TypeError: dtypes that differ or are not floating (ids: not integer).
        RuntimeError: tensors on different devices.
        NotImplementedError: the requested backend does not take these inputs.

    Example:
        >>> x = torch.nn.functional.normalize(torch.randn(8, 4), dim=1)
        >>> similarity_logsumexp(x, scale=10.0, x_ids=torch.arange(8)).shape
        torch.Size([8])
    """
    x_ids, y_ids = checks.primitive(x, y, x_ids, y_ids, cutoff, same)
    scale = checks.scalar("scale", scale, x)
    if y_bias is not None:
        checks.vector("y_bias", y_bias, x if y is None else y, "x" if y is None else "y")
    if columns and (y_bias is not None or cutoff is not None):
        raise ValueError("columns=True takes neither y_bias nor cutoff; call twice with x and y exchanged")
    pairs = Pairs(x_ids, y_ids, checks.per_row("cutoff", cutoff, x), same, int(exclude_diagonal))
    shards = shards_of_columns(group, y)
    out = sweep(x, y, pairs, scale=scale, bias=y_bias, column_lse=columns, backend=backend, shards=shards)
    row_lse = out.row_lse.squeeze(0)
    return (row_lse, out.col_lse) if columns else row_lse
