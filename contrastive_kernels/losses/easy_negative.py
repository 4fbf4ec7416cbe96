"""InfoNCE against easy negatives: the function and its module."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, overload

from torch import Tensor
from typing_extensions import Unpack

from contrastive_kernels.losses._arguments import ContrastiveStats, Loss, SoftmaxArguments
from contrastive_kernels.losses._module import LossModule
from contrastive_kernels.losses._options import SoftmaxOptions
from contrastive_kernels.losses.info_nce import info_nce_loss
from contrastive_kernels.primitives import (
    Group,
    checks,
    nan_unless_finite,
    over_ranks,
    selecting_cutoff,
    shards_of,
    unit_rows,
)

__all__ = ["EasyNegativeLoss", "easy_negative_loss"]


class EasyNegativeArguments(SoftmaxArguments, total=False):
    """Keyword arguments of `easy_negative_loss`."""

    select: Literal["bottomk", "below"]
    k: int | None
    threshold: float | Tensor | None
    logit_scale: float | Tensor | None
    query_ids: Tensor | None
    key_ids: Tensor | None


@overload
def easy_negative_loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    return_stats: Literal[False] = False,
    **options: Unpack[EasyNegativeArguments],
) -> Loss: ...
@overload
def easy_negative_loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    return_stats: Literal[True],
    **options: Unpack[EasyNegativeArguments],
) -> tuple[Loss, ContrastiveStats]: ...
@overload
def easy_negative_loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    return_stats: bool,
    **options: Unpack[EasyNegativeArguments],
) -> Loss | tuple[Loss, ContrastiveStats]: ...
@over_ranks
def easy_negative_loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    select: Literal["bottomk", "below"] = "bottomk",
    k: int | None = None,
    threshold: float | Tensor | None = None,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    return_stats: bool = False,
    backend: str | None = None,
    group: Group | None = None,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    r"""Return InfoNCE against the least similar candidates only: the ones most likely to be true negatives.

    .. math:: L = \frac1N \sum_i \Bigl[ \log\bigl(e^{u_i^+} + \sum_{j: s_{ij} \le c_i} e^{u_{ij}}\bigr) - u_i^+ \Bigr],
        \qquad u_{ij} = s_{ij} / T = \langle q_i, k_j \rangle / T

    with c the k-th smallest similarity of the row to its candidates, or a threshold. The choice has no gradient.

    Args:
        query: ``(N, D)``.
        positive_key: ``(N, D)``; row i is the positive of query i and always stays.
        negative_keys: ``(M, D)``, shared by all queries. None: the other rows' positive keys.
        select: ``"bottomk"``, the k least similar candidates (all that equal the k-th are kept), or ``"below"``, those
            with a similarity up to ``threshold``, which takes no further sweep.
        k: for ``"bottomk"``, at least 1; with as many as there are candidates L is `info_nce_loss`.
        threshold: for ``"below"``, float or ``(N,)``.
        temperature: T, float or 0-dim tensor (differentiable); 0.07 unless ``logit_scale`` is given.
        logit_scale: 1 / T instead.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per anchor; the mean is then sum(w l) / sum(w).
        label_smoothing: share of the target spread over all kept candidates.
        query_ids: ``(N,)`` integers; a candidate with the query's id that is not its positive is no negative.
        key_ids: ids of the candidates, ``(N,)`` in the batch (None: query_ids); ``(M,)`` for negative_keys, which
            query_ids needs.
        return_stats: also return `ContrastiveStats`.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch. None: this
            process alone.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``; float32 (float64 for float64 inputs). With ``return_stats`` the pair
        (loss, stats).

    Raises:
        ValueError: shapes that do not fit, an empty batch, temperature near or below 0, k or threshold missing or
            of the other selection, one of two ids.
        TypeError: dtypes that differ or are not floating (ids and k: not integer).
        RuntimeError: tensors on different devices.

    Source: the easy-negative mining of metric learning, applied to InfoNCE.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> query, key = torch.randn(2, 16, 8).unbind(0)
        >>> ck.easy_negative_loss(query, key, k=5).shape
        torch.Size([])
    """
    checks.choice("select", select, ("bottomk", "below"))
    wanted, other = ("k", "threshold") if select == "bottomk" else ("threshold", "k")
    given = {"k": k, "threshold": threshold}
    if given[wanted] is None or given[other] is not None:
        raise ValueError(f"select={select!r} takes {wanted} and not {other}; k is {k}, threshold is {threshold}")
    info_nce = partial(
        info_nce_loss,
        temperature=temperature,
        logit_scale=logit_scale,
        reduction=reduction,
        weight=weight,
        label_smoothing=label_smoothing,
        query_ids=query_ids,
        key_ids=key_ids,
        return_stats=return_stats,
        backend=backend,
        group=group,
    )
    checks.paired("query", query, "positive_key", positive_key)
    if k is None:
        limit = checks.per_row("threshold", threshold, query)
        return info_nce(query, positive_key, negative_keys, cutoff=limit, normalize=normalize)
    k = checks.count("k", k)
    if negative_keys is not None:
        checks.features("negative_keys", negative_keys)
        checks.alike("query", query, "negative_keys", negative_keys, rows=False)
    shards, in_batch = shards_of(group), negative_keys is None
    candidates = positive_key if negative_keys is None else negative_keys
    row_ids, column_ids = _candidate_ids(query, candidates, query_ids, key_ids, in_batch)
    SoftmaxOptions.of(
        query,
        temperature=temperature,
        logit_scale=logit_scale,
        default_temperature=0.07,
        reduction=reduction,
        weight=weight,
        label_smoothing=label_smoothing,
        backend=backend,
    )

    query, positive_key = unit_rows(query, normalize, backend), unit_rows(positive_key, normalize, backend)
    negative_keys = None if negative_keys is None else unit_rows(negative_keys, normalize, backend)
    candidates = positive_key if negative_keys is None else negative_keys
    limit = selecting_cutoff(
        query.detach(),
        candidates.detach(),
        k,
        largest=False,
        x_ids=row_ids,
        y_ids=column_ids,
        exclude_diagonal=in_batch,
        backend=backend,
        shards=shards if in_batch else shards.of(candidates),
    )
    if not normalize:
        # An infinite similarity is not among the smallest; without a cutoff it is not hidden.
        limit = limit + shards.sum(nan_unless_finite(candidates))
    return info_nce(query, positive_key, negative_keys, cutoff=limit, normalize=False)


class EasyNegativeLoss(LossModule):
    """`easy_negative_loss` as a module.

    Args:
        temperature: 0.07 unless ``logit_scale`` is given; an ``nn.Parameter`` is trained.
        options: further keyword arguments of `easy_negative_loss`.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.EasyNegativeLoss(0.1, k=5)(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(easy_negative_loss)

    def __init__(
        self,
        temperature: float | Tensor | None = None,
        *,
        return_stats: bool = False,
        **options: Unpack[EasyNegativeArguments],
    ) -> None:
        super().__init__(temperature=temperature, return_stats=return_stats, **options)

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor | tuple[Tensor, ContrastiveStats]:
        """Return the loss; `inputs` are per-batch keyword arguments: weight, query_ids, key_ids, threshold."""
        return self.function(query, positive_key, negative_keys, **self.options(**inputs))


def _candidate_ids(
    query: Tensor, candidates: Tensor, query_ids: Tensor | None, key_ids: Tensor | None, in_batch: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the ids of the queries and of the candidates, as `info_nce_loss` reads them; None where there are none."""
    if key_ids is not None and query_ids is None:
        raise ValueError("key_ids is given but query_ids is not; a key is no negative when its id is its query's")
    if query_ids is not None and key_ids is None and not in_batch:
        raise ValueError("query_ids is given but key_ids is not; a key is no negative when its id is its query's")
    query_ids = checks.optional_ids("query_ids", query_ids, query.shape[0], query)
    key_ids = checks.optional_ids("key_ids", key_ids, candidates.shape[0], query)
    if query_ids is None:
        return None, None
    return query_ids, query_ids if key_ids is None else key_ids
