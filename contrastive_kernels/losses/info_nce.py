"""InfoNCE: the function and its module."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, overload

from torch import Tensor
from typing_extensions import Unpack

from contrastive_kernels.losses._arguments import ContrastiveStats, CutoffArguments, Loss, SoftmaxArguments
from contrastive_kernels.losses._module import LossModule
from contrastive_kernels.losses._options import SoftmaxOptions, check_cutoff, cutoff_from
from contrastive_kernels.losses._polarization import Polarization
from contrastive_kernels.losses._softmax import (
    Negatives,
    Positives,
    list_negatives,
    one_direction_loss,
    softmax_loss,
    sweep_both_directions,
    sweep_negatives,
    union,
)
from contrastive_kernels.primitives import (
    Group,
    Guide,
    Pairs,
    checks,
    cutoff_between,
    one_process_only,
    over_ranks,
    row_dot,
    unit_rows,
)

__all__ = ["InfoNCELoss", "info_nce_loss"]


class InfoNCEArguments(SoftmaxArguments, CutoffArguments, total=False):
    """Keyword arguments of `info_nce_loss`."""

    logit_scale: float | Tensor | None
    negative_mode: Literal["unpaired", "paired"]
    in_batch_negatives: bool | None
    symmetric: bool
    query_ids: Tensor | None
    key_ids: Tensor | None
    guide: tuple[Tensor, ...] | None
    guide_cutoff: float | Tensor | None
    polarization: Polarization | None


@overload
def info_nce_loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    return_stats: Literal[False] = False,
    **options: Unpack[InfoNCEArguments],
) -> Loss: ...
@overload
def info_nce_loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    return_stats: Literal[True],
    **options: Unpack[InfoNCEArguments],
) -> tuple[Loss, ContrastiveStats]: ...
@overload
def info_nce_loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    return_stats: bool,
    **options: Unpack[InfoNCEArguments],
) -> Loss | tuple[Loss, ContrastiveStats]: ...
@over_ranks
def info_nce_loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    negative_mode: Literal["unpaired", "paired"] = "unpaired",
    in_batch_negatives: bool | None = None,
    symmetric: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    cutoff: float | Tensor | None = None,
    cutoff_margin: float | Tensor | None = None,
    guide: tuple[Tensor, ...] | None = None,
    guide_cutoff: float | Tensor | None = None,
    polarization: Polarization | None = None,
    return_stats: bool = False,
    backend: str | None = None,
    group: Group | None = None,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    r"""Return the InfoNCE loss: each query picks its positive key among all candidates. No N x M similarity matrix.

    .. math:: L = \frac1N \sum_i \Bigl[ \log\bigl(e^{u_i^+} + \sum_j e^{u_{ij}}\bigr) - u_i^+ \Bigr],
        \qquad u_{ij} = \langle q_i, k_j \rangle / T

    The sum runs over the other rows' positive keys (in-batch negatives), over ``negative_keys``, or over both.

    Args:
        query: ``(N, D)``.
        positive_key: ``(N, D)``; row i is the positive of query i.
        negative_keys: ``(M, D)``, shared by all queries, or ``(N, M, D)``, each query's own, with
            ``negative_mode="paired"``. None: in-batch negatives only.
        temperature: T, float or 0-dim tensor (differentiable); 0.07 unless ``logit_scale`` is given.
        logit_scale: 1 / T instead.
        negative_mode: ``"unpaired"`` or ``"paired"``.
        in_batch_negatives: whether the other rows' positives are negatives; None: only without negative_keys.
        symmetric: mean of this loss and of the one with queries and positive keys exchanged; needs in-batch negatives.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per anchor; the mean is then sum(w l) / sum(w).
        label_smoothing: share of the target spread over all kept candidates.
        query_ids: ``(N,)`` integers; a candidate with the query's id that is not its positive is no negative. Without
            in-batch negatives it needs key_ids.
        key_ids: ids of the negatives: ``(N,)`` for in-batch keys (None: query_ids), ``(M,)`` or ``(N, M)`` for
            negative_keys, ``(N + M,)`` for in-batch and shared ones.
        cutoff: float or ``(N,)``; negatives more similar than this are dropped, the positive never is.
        cutoff_margin: the same, as the positive's similarity plus a margin.
        guide: rows of a second model, which decides what is no negative, without gradient: ``(N, E)`` for the queries,
            ``(N, E)`` for the positive keys and, where there are shared negative_keys, ``(M, E)`` for those; normalised
            as the queries are. Not with paired negatives, nor with a group of several processes. The sweep is in plain
            PyTorch then.
        guide_cutoff: float or ``(N,)``; negatives that the guide finds more similar to their anchor than this are
            dropped, the positive never is. None: the guide's similarity of the positive, as GISTEmbed has it.
        polarization: adds `Polarization` over the negatives, from the same sweep.
        return_stats: also return `ContrastiveStats`.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch. None: this
            process alone.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``, ``(2, N)`` when symmetric; float32 (float64 for float64 inputs). With
        ``return_stats`` the pair (loss, stats).

    Raises:
        ValueError: shapes that do not fit, an empty batch, options that exclude each other, one of two ids, temperature
            near 0.
        TypeError: dtypes that differ or are not floating (ids: not integer).
        RuntimeError: tensors on different devices.

    Source: van den Oord, Li, Vinyals 2018, arXiv:1807.03748, eq. 4. The guide: Solatorio 2024, arXiv:2402.16829.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> query, key = torch.randn(2, 16, 8).unbind(0)
        >>> ck.info_nce_loss(query, key, temperature=0.1).shape
        torch.Size([])
    """
    checks.paired("query", query, "positive_key", positive_key)
    checks.choice("negative_mode", negative_mode, ("unpaired", "paired"))
    paired = negative_mode == "paired"
    in_batch = negative_keys is None if in_batch_negatives is None else in_batch_negatives
    if negative_keys is not None:
        _check_negatives(query, negative_keys, paired)
    elif paired or not in_batch:
        raise ValueError(f"negative_keys is needed with negative_mode={negative_mode!r}, in_batch_negatives={in_batch}")
    if symmetric and not in_batch:
        raise ValueError("symmetric=True exchanges queries and in-batch keys; it needs in_batch_negatives=True")
    check_cutoff(query, cutoff, cutoff_margin)
    _check_guide(guide, guide_cutoff, query, negative_keys, paired, group)
    query_ids, batch_ids, negative_ids = split_ids(query, query_ids, key_ids, negative_keys, in_batch)
    options = SoftmaxOptions.of(
        query,
        temperature=temperature,
        logit_scale=logit_scale,
        default_temperature=0.07,
        reduction=reduction,
        weight=weight,
        label_smoothing=label_smoothing,
        polarization=polarization,
        return_stats=return_stats,
        backend=backend,
        group=group,
    )

    query, positive_key = unit_rows(query, normalize, backend), unit_rows(positive_key, normalize, backend)
    positive_similarity = row_dot(query, positive_key, backend)
    limit = cutoff_from(cutoff, cutoff_margin, positive_similarity)
    guides = (None, None) if guide is None else _guides(guide, guide_cutoff, normalize)
    positives = Positives.single(options.scale * positive_similarity)
    directions: list[Negatives] = []
    if in_batch:
        pairs = Pairs(query_ids, batch_ids, limit, diagonals=1, guide=guides[0])
        if not symmetric and negative_keys is None:
            return one_direction_loss(query, positive_key, pairs, positives, options)
        if symmetric:
            directions = sweep_both_directions(query, positive_key, pairs, options)
        else:
            directions = [sweep_negatives(query, positive_key, pairs, options)]
    if negative_keys is not None:
        negative_keys = unit_rows(negative_keys, normalize, backend)
        if paired:
            similarity = row_dot(query[:, None], negative_keys, backend)
            further = list_negatives(similarity, _dropped(similarity, query_ids, negative_ids, limit), options)
        else:
            pairs = Pairs(None if negative_ids is None else query_ids, negative_ids, limit, guide=guides[1])
            columns = options.shards.of(negative_keys)
            if not in_batch:
                return one_direction_loss(query, negative_keys, pairs, positives, options, columns)
            further = sweep_negatives(query, negative_keys, pairs, replace(options, shards=columns))
        directions[:1] = [union(directions[0], further) if directions else further]
    return softmax_loss(directions, positives, options)


class InfoNCELoss(LossModule):
    """`info_nce_loss` as a module.

    Args:
        temperature: 0.07 unless ``logit_scale`` is given; an ``nn.Parameter`` is trained.
        options: further keyword arguments of `info_nce_loss`.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.InfoNCELoss(0.1, symmetric=True)(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(info_nce_loss)

    def __init__(
        self,
        temperature: float | Tensor | None = None,
        *,
        return_stats: bool = False,
        **options: Unpack[InfoNCEArguments],
    ) -> None:
        super().__init__(temperature=temperature, return_stats=return_stats, **options)

    def forward(
        self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None, **inputs: Any
    ) -> Tensor | tuple[Tensor, ContrastiveStats]:
        """Return the loss; `inputs` are per-batch keyword arguments: weight, query_ids, key_ids, cutoff, guide."""
        return self.function(query, positive_key, negative_keys, **self.options(**inputs))


def _check_negatives(query: Tensor, negative_keys: Tensor, paired: bool) -> None:
    checks.tensor("negative_keys", negative_keys)
    if not paired and negative_keys.dim() == 3:
        raise ValueError(
            f"negative_keys {checks.shape(negative_keys)} are each query's own, (N, M, D), which "
            "negative_mode='paired' takes; 'unpaired' takes keys (M, D) that all queries share"
        )
    if paired and negative_keys.dim() == 2:
        raise ValueError(
            f"negative_keys {checks.shape(negative_keys)} are shared, (M, D), which negative_mode='unpaired' takes; "
            "'paired' takes each query's own, (N, M, D)"
        )
    if paired:
        checks.lists("negative_keys", negative_keys, 1)
    else:
        checks.features("negative_keys", negative_keys)
    checks.alike("query", query, "negative_keys", negative_keys, rows=paired)


def _check_guide(
    guide: tuple[Tensor, ...] | None,
    guide_cutoff: float | Tensor | None,
    query: Tensor,
    negative_keys: Tensor | None,
    paired: bool,
    group: object,
) -> None:
    """Raise unless a guide has a row for every query, positive key and shared negative key."""
    if guide is None:
        checks.no_effect("guide=None", guide_cutoff=(guide_cutoff, None))
        return
    if paired:
        raise ValueError("guide does not serve paired negatives; leave out the false ones by query_ids and key_ids")
    columns = [("query", query), ("positive_key", query)]
    columns += [] if negative_keys is None else [("negative_keys", negative_keys)]
    names = ", ".join(name for name, _ in columns)
    if not isinstance(guide, (tuple, list)):
        raise TypeError(f"guide must be a tuple of tensors, the guide's rows for {names}")
    if len(guide) != len(columns):
        raise ValueError(f"guide has {len(guide)} tensors and needs {len(columns)}, the guide's rows for {names}")
    for place, (rows, (name, x)) in enumerate(zip(guide, columns, strict=True)):
        checks.guide_rows(f"guide[{place}]", rows, x, name)
        checks.alike("guide[0]", guide[0], f"guide[{place}]", rows, rows=False)
    checks.per_row("guide_cutoff", guide_cutoff, query)
    one_process_only("guide", group)


def _guides(
    guide: tuple[Tensor, ...], guide_cutoff: float | Tensor | None, normalize: bool
) -> tuple[Guide, Guide | None]:
    """Return what a guide says of the in-batch keys and of the negative keys."""
    query, key, *negatives = (unit_rows(rows.detach(), normalize) for rows in guide)
    given, positive = checks.per_row("guide_cutoff", guide_cutoff, query), row_dot(query, key)

    def of(columns: Tensor) -> Guide:
        # what is as similar as the positive is kept, whatever rounding makes of it
        limit = cutoff_between(positive, positive, query, columns) if given is None else given.detach()
        return Guide(query, columns, limit)

    return of(key), of(negatives[0]) if negatives else None


def split_ids(
    query: Tensor, query_ids: Tensor | None, key_ids: Tensor | None, negative_keys: Tensor | None, in_batch: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the ids of the queries, of the in-batch keys and of the negative keys; None where there are none."""
    if query_ids is None:
        if key_ids is not None:
            raise ValueError("key_ids is given but query_ids is not; a key is no negative when its id is its query's")
        return None, None, None
    n = query.shape[0]
    query_ids = checks.ids("query_ids", query_ids, n, query)
    if key_ids is None:
        if not in_batch:
            raise ValueError("query_ids is given but key_ids is not; a key is no negative when its id is its query's")
        return query_ids, query_ids, None
    if negative_keys is None:
        return query_ids, checks.ids("key_ids", key_ids, n, query), None
    if negative_keys.dim() == 3:
        return query_ids, query_ids, checks.ids("key_ids", key_ids, tuple(negative_keys.shape[:2]), query)
    m = negative_keys.shape[0]
    key_ids = checks.ids("key_ids", key_ids, n + m if in_batch else m, query)
    return query_ids, key_ids[:n] if in_batch else None, key_ids[-m:] if m else key_ids[:0]


def _dropped(
    similarity: Tensor, query_ids: Tensor | None, negative_ids: Tensor | None, limit: Tensor | None
) -> Tensor | None:
    """Return the mask of the paired negatives that are none, None when all are."""
    dropped = None if query_ids is None or negative_ids is None else query_ids[:, None] == negative_ids
    if limit is None:
        return dropped
    above = similarity > limit[:, None]
    return above if dropped is None else dropped | above
