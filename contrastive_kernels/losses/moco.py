"""MoCo: the function, and the module with its queue."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor
from typing_extensions import Unpack

from contrastive_kernels.losses._arguments import ContrastiveStats, CutoffArguments, Loss, SoftmaxArguments
from contrastive_kernels.losses._module import KeyQueue
from contrastive_kernels.losses._options import SoftmaxOptions, check_cutoff, cutoff_from
from contrastive_kernels.losses._softmax import Positives, one_direction_loss
from contrastive_kernels.losses.info_nce import split_ids
from contrastive_kernels.primitives import ALONE, Group, Pairs, checks, over_ranks, row_dot, unit_rows

__all__ = ["MoCoLoss", "moco_loss"]


class MoCoArguments(SoftmaxArguments, CutoffArguments, total=False):
    """Keyword arguments of `moco_loss`."""

    logit_scale: float | Tensor | None
    query_ids: Tensor | None
    key_ids: Tensor | None


@overload
def moco_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    temperature: float | Tensor | None = None,
    return_stats: Literal[False] = False,
    **options: Unpack[MoCoArguments],
) -> Loss: ...
@overload
def moco_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    temperature: float | Tensor | None = None,
    return_stats: Literal[True],
    **options: Unpack[MoCoArguments],
) -> tuple[Loss, ContrastiveStats]: ...
@overload
def moco_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    temperature: float | Tensor | None = None,
    return_stats: bool,
    **options: Unpack[MoCoArguments],
) -> Loss | tuple[Loss, ContrastiveStats]: ...
@over_ranks
def moco_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
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
    r"""Return InfoNCE against a queue of past keys, as in MoCo, without the N x K similarity matrix.

    .. math:: L = \frac1N \sum_i \Bigl[ \log\bigl(e^{u_i^+} + \sum_{j=1}^K e^{u_{ij}}\bigr) - u_i^+ \Bigr],
        \qquad u_i^+ = \langle q_i, k_i \rangle / T,\quad u_{ij} = \langle q_i, \mathrm{queue}_j \rangle / T

    Args:
        query: ``(N, D)``.
        key: ``(N, D)``, the positives, from the momentum encoder; detached.
        queue: ``(K, D)``, past keys; detached. Pass ``queue.T`` of a ``(D, K)`` queue; K = D is
            taken for ``(K, D)``.
        temperature: T, float or 0-dim tensor (differentiable); 0.07 unless ``logit_scale`` is given.
        logit_scale: 1 / T instead.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per anchor; the mean is then sum(w l) / sum(w).
        label_smoothing: share of the target spread over all kept candidates.
        query_ids: ``(N,)`` integers, with ``key_ids`` of the queue, ``(K,)``: equal ids are no negatives.
        key_ids: see query_ids.
        cutoff: float or ``(N,)``; negatives more similar than this are dropped, the positive never is.
        cutoff_margin: the same, as the positive's similarity plus a margin.
        return_stats: also return `ContrastiveStats`.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch. None: this
            process alone.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``; float32 (float64 for float64 inputs). With ``return_stats`` the pair
        (loss, stats).

    Raises:
        ValueError: shapes that do not fit, an empty batch, one of two ids, temperature near or below 0.
        TypeError: dtypes that differ or are not floating (ids: not integer).
        RuntimeError: tensors on different devices.

    Source: He, Fan, Wu, Xie, Girshick, CVPR 2020, arXiv:1911.05722, eq. 1.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> query, key, queue = torch.randn(16, 8), torch.randn(16, 8), torch.randn(64, 8)
        >>> ck.moco_loss(query, key, queue, temperature=0.2).shape
        torch.Size([])
    """
    checks.paired("query", query, "key", key)
    checks.features("queue", queue)
    checks.alike("query", query, "queue", queue, rows=False)
    checks.not_empty("query", query)
    check_cutoff(query, cutoff, cutoff_margin)
    query_ids, _, key_ids = split_ids(query, query_ids, key_ids, queue, in_batch=False)
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

    query, key, queue = (unit_rows(x, normalize, backend) for x in (query, key.detach(), queue.detach()))
    positive_similarity = row_dot(query, key, backend)
    pairs = Pairs(query_ids, key_ids, cutoff_from(cutoff, cutoff_margin, positive_similarity))
    # every rank has the same queue
    positives = Positives.single(options.scale * positive_similarity)
    return one_direction_loss(query, queue, pairs, positives, options, ALONE)


class MoCoLoss(KeyQueue):
    """`moco_loss` with its queue, which is a persistent buffer.

    On several ranks the queues differ unless ``group=`` is given and they began equal, from one seed or checkpoint.

    Args:
        dim: D, the dimension of queries and keys.
        queue_size: K.
        temperature: 0.07 unless ``logit_scale`` is given; an ``nn.Parameter`` is trained.
        options: further keyword arguments of `moco_loss`.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.MoCoLoss(dim=4, queue_size=64)(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(moco_loss)

    def __init__(
        self,
        dim: int,
        queue_size: int = 65536,
        temperature: float | Tensor | None = None,
        *,
        return_stats: bool = False,
        **options: Unpack[MoCoArguments],
    ) -> None:
        super().__init__(dim, queue_size, temperature=temperature, return_stats=return_stats, **options)

    def forward(self, query: Tensor, key: Tensor, **inputs: Any) -> Tensor | tuple[Tensor, ContrastiveStats]:
        """Return the loss against the queue as it was; in training mode the keys then enter it."""
        query, key = self.unit_rows("query", query), self.unit_rows("key", key.detach())
        loss = self.function(query, key, self.queue.to(query.dtype, copy=True), **self.options(**inputs))
        if self.training:
            self.enqueue(key)
        return loss
