"""`similarity_softmax_mean`: the mean of further rows under the softmax of every row of the similarities."""

from __future__ import annotations

from torch import Tensor

from contrastive_kernels.engine.spec import compute_dtype
from contrastive_kernels.primitives import checks
from contrastive_kernels.primitives.rows import cast_for_autocast
from contrastive_kernels.primitives.shards import Group, over_ranks, shards_of_columns
from contrastive_kernels.primitives.sweep import Pairs, softmax_mean

__all__ = ["similarity_softmax_mean"]


@over_ranks
def similarity_softmax_mean(
    x: Tensor,
    y: Tensor | None,
    values: Tensor,
    *,
    scale: float | Tensor = 1.0,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    y_bias: Tensor | None = None,
    cutoff: float | Tensor | None = None,
    backend: str | None = None,
    group: Group | None = None,
) -> Tensor:
    r"""Return the mean of the values under the softmax of every row of the similarity matrix, which is never stored.

    .. math::
        m_i = \sum_{j \in A(i)} p_{ij} \, v_j, \qquad
        p_{ij} = \frac{\exp(\mathrm{scale} \, \langle x_i, y_j \rangle + b_j)}
                     {\sum_{k \in A(i)} \exp(\mathrm{scale} \, \langle x_i, y_k \rangle + b_k)}

    over the pairs A(i) of `similarity_logsumexp`: attention of the queries x to the keys y. A distillation loss is made
    of it: the cross-entropy from the softmax of a teacher's similarities to that of a student's,
    :math:`\sum_j p_{ij} (\ell_i - u_{ij})`, is the student's log-sum-exp minus its scale times
    :math:`\langle x'_i, m_i \rangle`, with the student's rows as the values.

    Every backend computes it in plain PyTorch, a chunk of rows at a time.

    Args:
        x: ``(N, D)``, float16, bfloat16, float32 or float64; taken as it is, not normalised.
        y: ``(M, D)``, or None for x against itself (self pairs included unless ``x_ids`` leaves them out).
        values: v, ``(M, D')``, a row for every row of y (of x where y is None), of any floating dtype.
        scale, x_ids, y_ids, y_bias, cutoff, backend: as in `similarity_logsumexp`.
        group: process group, one-dimensional mesh or ``"world"``: the rows of y (or of x) and values of all its ranks
            are the columns; every rank gathers them, so that it holds those of all. None: this process.

    Returns:
        ``(N, D')``; float32 (float64 for float64 x), differentiable in x, y, values, scale and y_bias. 0 for a row with
        no pair left, with zero gradient.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: dtypes that differ or are not floating (ids: not integer).
        RuntimeError: tensors on different devices.
        NotImplementedError: the requested backend does not take these inputs.

    Source: the expectation under a softmax of the distillation losses of Zheng et al., NeurIPS 2021, arXiv:2107.09282
    (ReSSL), and of Wu et al., ICCV 2023, arXiv:2309.12314 (TinyCLIP).

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> teacher, student = torch.randn(2, 8, 4).unbind()
        >>> bank = torch.randn(100, 4)
        >>> mean = ck.similarity_softmax_mean(teacher, bank, bank, scale=25.0)
        >>> cross_entropy = ck.similarity_logsumexp(student, bank, scale=10.0) - 10.0 * (student * mean).sum(1)
        >>> cross_entropy.shape
        torch.Size([8])
    """
    x_ids, y_ids = checks.primitive(x, y, x_ids, y_ids, cutoff)
    scale = checks.scalar("scale", scale, x)
    columns, name = (x, "x") if y is None else (y, "y")
    if y_bias is not None:
        checks.vector("y_bias", y_bias, columns, name)
    checks.features("values", values)
    checks.same_device("values", values, x)
    if values.shape[0] != columns.shape[0]:
        raise ValueError(
            f"values {checks.shape(values)} must have {columns.shape[0]} rows, one for every row of {name} "
            f"{checks.shape(columns)}"
        )
    limit, shards = checks.per_row("cutoff", cutoff, x), shards_of_columns(group, y)
    if not shards.alone:
        # gradients are summed over the ranks before they are rounded
        x, columns, values = (cast_for_autocast(rows) for rows in (x, columns, values))
        dtype = compute_dtype(x)
        x, y, values = x.to(dtype), shards.gather(columns.to(dtype)), shards.gather(values.to(dtype))
        own_ids = x_ids if y_ids is None else y_ids
        y_ids = None if own_ids is None else shards.gather(own_ids)
        y_bias = None if y_bias is None else shards.gather(y_bias.to(dtype))
    return softmax_mean(x, y, values, Pairs(x_ids, y_ids, limit), scale=scale, bias=y_bias, backend=backend)
