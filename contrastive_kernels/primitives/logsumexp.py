"""`similarity_logsumexp`: the log-sum-exp of every row and column of the similarities."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from contrastive_kernels.engine.spec import compute_dtype
from contrastive_kernels.primitives import checks
from contrastive_kernels.primitives.rows import cast_for_autocast
from contrastive_kernels.primitives.shards import ALONE, Group, Shards, over_ranks, shards_of_columns
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
    guide: tuple[Tensor, Tensor | None] | None = None,
    guide_cutoff: float | Tensor | None = None,
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
    guide: tuple[Tensor, Tensor | None] | None = None,
    guide_cutoff: float | Tensor | None = None,
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
    guide: tuple[Tensor, Tensor | None] | None = None,
    guide_cutoff: float | Tensor | None = None,
    columns: bool = False,
    backend: str | None = None,
    group: Group | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Return the log-sum-exp of every row (and column) of the similarity matrix, which is never stored.

    .. math::
        \ell_i = \log \sum_{j \in A(i)} \exp(\mathrm{scale} \, \langle x_i, y_j \rangle + b_j), \qquad
        A(i) = \{j : \mathrm{id}(x_i) \ne \mathrm{id}(y_j),\ \langle x_i, y_j \rangle \le c_i,\
            \langle g^x_i, g^y_j \rangle \le c^g_i\}

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
        guide: ``(gx, gy)``, ``(N, E)`` and ``(M, E)`` (None where y is): rows of a second model for those of x and y,
            which decide about pairs, without gradient; taken as they are. In plain PyTorch on every backend.
        guide_cutoff: float or ``(N,)``; pairs with ``<gx_i, gy_j>`` above it are left out. Given exactly when ``guide``
            is; not with ``columns``. Similarities that are equal but for rounding may fall on either side.
        columns: also return the log-sum-exp of every column.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.
        group: process group, one-dimensional mesh or ``"world"``: the rows of y (or of x) of all its ranks are the
            columns. The result belongs to this rank's rows and, with ``columns``, to its rows of y. None: this process.

    Returns:
        ``(N,)``, or ``((N,), (M,))`` with ``columns``; float32 (float64 for float64 inputs), differentiable.
        A row or column with no pair left is ``-inf`` and has zero gradient.

    Raises:
        ValueError: shapes that do not fit, or ``columns`` together with ``y_bias``, ``cutoff`` or ``guide``.
        TypeError: dtypes that differ or are not floating (ids: not integer), a guide that is no pair.
        RuntimeError: tensors on different devices.
        NotImplementedError: the requested backend does not take these inputs.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> x = torch.nn.functional.normalize(torch.randn(8, 4), dim=1)
        >>> ck.similarity_logsumexp(x, scale=10.0, x_ids=torch.arange(8)).shape
        torch.Size([8])
    """
    x_ids, y_ids = checks.primitive(x, y, x_ids, y_ids, cutoff, same)
    scale = checks.scalar("scale", scale, x)
    if y_bias is not None:
        checks.vector("y_bias", y_bias, x if y is None else y, "x" if y is None else "y")
    if columns and (y_bias is not None or cutoff is not None or guide is not None):
        raise ValueError("columns=True takes neither y_bias, cutoff nor guide; call twice with x and y exchanged")
    guided = checks.guide(guide, guide_cutoff, x, y)
    pairs = Pairs(x_ids, y_ids, checks.per_row("cutoff", cutoff, x), same, int(exclude_diagonal), guided)
    shards = shards_of_columns(group, y)
    if pairs.guide is not None and not shards.alone:
        x, y, y_bias, pairs = _gathered(x, y, y_bias, pairs, shards)
        shards = ALONE
    out = sweep(x, y, pairs, scale=scale, bias=y_bias, column_lse=columns, backend=backend, shards=shards)
    row_lse = out.row_lse.squeeze(0)
    return (row_lse, out.col_lse) if columns else row_lse


def _gathered(
    x: Tensor, y: Tensor | None, y_bias: Tensor | None, pairs: Pairs, shards: Shards
) -> tuple[Tensor, Tensor, Tensor | None, Pairs]:
    """Return x with the columns of all ranks, in the compute dtype, in which their gradients are summed.

    This rank's columns come first, so that its diagonal is where it was.
    """
    x, columns = cast_for_autocast(x), cast_for_autocast(x if y is None else y)
    dtype, guide = compute_dtype(x), pairs.guide
    assert guide is not None
    before = sum(shards.sizes(columns)[: shards.rank])

    def gathered(own: Tensor) -> Tensor:
        return shards.gather(own).roll(-before, 0)

    own_ids = pairs.x_ids if y is None else pairs.y_ids
    pairs = pairs._replace(
        y_ids=None if own_ids is None else gathered(own_ids),
        guide=guide._replace(guide_y=gathered(guide.guide_x if guide.guide_y is None else guide.guide_y)),
    )
    bias = None if y_bias is None else gathered(y_bias.to(dtype))
    return x.to(dtype), gathered(columns.to(dtype)), bias, pairs
