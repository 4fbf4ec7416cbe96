"""ArCL against a queue: the function, and the module with its queue."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from contrastive_kernels.losses._arguments import ContrastiveStats, CutoffArguments, Loss, SoftmaxArguments
from contrastive_kernels.losses._module import KeyQueue
from contrastive_kernels.losses._options import SoftmaxOptions, check_cutoff, cutoff_from
from contrastive_kernels.losses._softmax import (
    Positives,
    one_direction_loss,
    softmax_stats,
    softmax_value,
    sweep_negatives,
)
from contrastive_kernels.primitives import ALONE, Group, Pairs, checks, over_ranks, row_dot, unit_rows

__all__ = ["MoCoArCLLoss", "moco_arcl_loss"]


class MoCoArCLArguments(SoftmaxArguments, CutoffArguments, total=False):
    """Keyword arguments of `moco_arcl_loss`."""

    logit_scale: float | Tensor | None
    positive: Literal["min", "mean", "mean_loss"]
    pairs: Literal["keys", "all"]
    query_ids: Tensor | None
    key_ids: Tensor | None


@overload
def moco_arcl_loss(
    query: Tensor,
    keys: Tensor,
    queue: Tensor,
    *,
    temperature: float | Tensor | None = None,
    return_stats: Literal[False] = False,
    **options: Unpack[MoCoArCLArguments],
) -> Loss: ...
@overload
def moco_arcl_loss(
    query: Tensor,
    keys: Tensor,
    queue: Tensor,
    *,
    temperature: float | Tensor | None = None,
    return_stats: Literal[True],
    **options: Unpack[MoCoArCLArguments],
) -> tuple[Loss, ContrastiveStats]: ...
@overload
def moco_arcl_loss(
    query: Tensor,
    keys: Tensor,
    queue: Tensor,
    *,
    temperature: float | Tensor | None = None,
    return_stats: bool,
    **options: Unpack[MoCoArCLArguments],
) -> Loss | tuple[Loss, ContrastiveStats]: ...
@over_ranks
def moco_arcl_loss(
    query: Tensor,
    keys: Tensor,
    queue: Tensor,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    positive: Literal["min", "mean", "mean_loss"] = "min",
    pairs: Literal["keys", "all"] = "keys",
    normalize: bool = True,
    reduction: str = "mean",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    cutoff: float | Tensor | None = None,
    cutoff_margin: float | Tensor | None = None,
    return_stats: bool = False,
    backend: str | None = None,
    group: Group | None = None,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    r"""Return ArCL against a queue, the least similar key view being the positive, without the N x K similarity matrix.

    .. math:: L = \frac1N \sum_i \log\Bigl(1 + \sum_{j=1}^K e^{(\langle q_i, h_j \rangle - s_i^+) / T}\Bigr),
        \qquad s_i^+ = \min_k \langle q_i, k_{ik} \rangle

    Args:
        query: ``(N, D)``; ``(N, V, D)`` with ``pairs="all"``, where view 1 meets the queue.
        keys: ``(N, V, D)``, the views of the momentum encoder, samples first; detached.
        queue: ``(K, D)``, past keys h; detached. Pass ``queue.T`` of a ``(D, K)`` queue; K = D
            is taken for ``(K, D)``.
        temperature: T, float or 0-dim tensor (differentiable); 0.07 unless ``logit_scale`` is given.
        logit_scale: 1 / T instead.
        positive: ``"min"`` or ``"mean"`` similarity, or ``"mean_loss"``, the mean of the losses, over key views.
        pairs: ``"keys"``: the query against every key view; ``"all"``: every query view against every other key view.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per anchor; the mean is then sum(w l) / sum(w).
        label_smoothing: share of the target spread over all kept candidates.
        query_ids: ``(N,)`` integers, with ``key_ids`` of the queue, ``(K,)``: equal ids are no negatives.
        key_ids: see query_ids.
        cutoff: float or ``(N,)``; negatives more similar than this are dropped.
        cutoff_margin: the same, as :math:`s^+` (the mean for ``"mean_loss"``) plus a margin.
        return_stats: also return `ContrastiveStats`, the positive being :math:`s^+` (the mean for ``"mean_loss"``).
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch. None: this
            process alone.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``; float32 (float64 for float64 inputs). With ``return_stats`` the pair
        (loss, stats).

    Raises:
        ValueError: shapes that do not fit, an empty batch, an unknown option, temperature near or below 0.
        TypeError: dtypes that differ or are not floating (ids: not integer).
        RuntimeError: tensors on different devices.

    Source: Zhao, Du, Wang, Yao, Huang, ICLR 2023 (ArCL), on MoCo; which views count is our reading.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.moco_arcl_loss(torch.randn(16, 8), torch.randn(16, 3, 8), torch.randn(64, 8)).shape
        torch.Size([])
    """
    checks.choice("pairs", pairs, ("keys", "all"))
    checks.choice("positive", positive, ("min", "mean", "mean_loss"))
    (checks.views if pairs == "all" else checks.features)("query", query)
    checks.views("keys", keys, minimum=2 if pairs == "all" else 1)
    checks.features("queue", queue)
    checks.alike("query", query, "keys", keys)
    checks.alike("query", query, "queue", queue, rows=False)
    checks.not_empty("query", query)
    check_cutoff(query, cutoff, cutoff_margin)
    if (query_ids is None) != (key_ids is None):
        raise ValueError("query_ids and key_ids (of the queue) go together; one of them is missing")
    query_ids = checks.optional_ids("query_ids", query_ids, query.shape[0], query)
    key_ids = checks.optional_ids("key_ids", key_ids, queue.shape[0], query)
    options = SoftmaxOptions.of(
        query,
        temperature=temperature,
        logit_scale=logit_scale,
        default_temperature=0.07,
        reduction=reduction,
        weight=weight,
        label_smoothing=label_smoothing,
        return_stats=return_stats,
        backend=backend,
        group=group,
    )

    query, keys, queue = (unit_rows(x, normalize, backend) for x in (query, keys.detach(), queue.detach()))
    if pairs == "all":
        distinct = [(j, k) for j, k in product(range(query.shape[1]), range(keys.shape[1])) if j != k]
        similarities = torch.stack([row_dot(query[:, j], keys[:, k], backend) for j, k in distinct], 1)
        query = query[:, 0]
    else:
        similarities = torch.stack([row_dot(query, key, backend) for key in keys.unbind(1)], 1)
    if positive == "min":
        aligned = similarities.gather(1, similarities.argmin(1, keepdim=True)).squeeze(1)
    else:
        aligned = similarities.mean(1)
    kept = Pairs(query_ids, key_ids, cutoff_from(cutoff, cutoff_margin, aligned))
    if positive != "mean_loss":
        return one_direction_loss(query, queue, kept, Positives.single(options.scale * aligned), options, ALONE)
    negatives = sweep_negatives(query, queue, kept, replace(options, shards=ALONE))
    losses = [softmax_value([negatives], Positives.single(options.scale * s), options) for s in similarities.unbind(1)]
    loss = torch.stack(losses).mean(0)
    return (
        (loss, softmax_stats([negatives], Positives.single(options.scale * aligned), options.shards))
        if return_stats
        else loss
    )


class MoCoArCLLoss(KeyQueue):
    """`moco_arcl_loss` with its queue, which is a persistent buffer and takes the first key view.

    On several ranks the queues differ unless ``group=`` is given and they began equal, from one seed or checkpoint.

    Args:
        dim: D, the dimension of queries and keys.
        queue_size: K.
        temperature: 0.07 unless ``logit_scale`` is given; an ``nn.Parameter`` is trained.
        options: further keyword arguments of `moco_arcl_loss`.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.MoCoArCLLoss(dim=4, queue_size=64)(torch.randn(8, 4), torch.randn(8, 3, 4)).shape
        torch.Size([])
    """

    function = staticmethod(moco_arcl_loss)

    def __init__(
        self,
        dim: int,
        queue_size: int = 65536,
        temperature: float | Tensor | None = None,
        *,
        return_stats: bool = False,
        **options: Unpack[MoCoArCLArguments],
    ) -> None:
        super().__init__(dim, queue_size, temperature=temperature, return_stats=return_stats, **options)

    def forward(self, query: Tensor, keys: Tensor, **inputs: Any) -> Tensor | tuple[Tensor, ContrastiveStats]:
        """Return the loss against the queue as it was; in training mode the first key views then enter it."""
        query, keys = self.unit_rows("query", query), self.unit_rows("keys", keys.detach())
        loss = self.function(query, keys, self.queue.to(query.dtype, copy=True), **self.options(**inputs))
        if self.training:
            self.enqueue(keys[:, 0])
        return loss
