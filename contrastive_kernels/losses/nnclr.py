"""NNCLR: the function, and the module with its support set."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from contrastive_kernels.losses._arguments import ContrastiveStats, CutoffArguments, Loss, SoftmaxArguments
from contrastive_kernels.losses._module import KeyQueue
from contrastive_kernels.losses._options import SoftmaxOptions, check_cutoff, cutoff_from
from contrastive_kernels.losses._softmax import Positives, one_direction_loss, softmax_loss, sweep_negatives
from contrastive_kernels.primitives import (
    Group,
    Pairs,
    checks,
    nan_unless_finite,
    over_ranks,
    row_dot,
    row_select,
    unit_rows,
)

__all__ = ["NNCLRLoss", "nnclr_loss"]


class NNCLRArguments(SoftmaxArguments, CutoffArguments, total=False):
    """Keyword arguments of `nnclr_loss`."""

    logit_scale: float | Tensor | None
    ids: Tensor | None


@overload
def nnclr_loss(
    z: Tensor,
    predictions: Tensor,
    support: Tensor,
    *,
    temperature: float | Tensor | None = None,
    return_stats: Literal[False] = False,
    **options: Unpack[NNCLRArguments],
) -> Loss: ...
@overload
def nnclr_loss(
    z: Tensor,
    predictions: Tensor,
    support: Tensor,
    *,
    temperature: float | Tensor | None = None,
    return_stats: Literal[True],
    **options: Unpack[NNCLRArguments],
) -> tuple[Loss, ContrastiveStats]: ...
@overload
def nnclr_loss(
    z: Tensor,
    predictions: Tensor,
    support: Tensor,
    *,
    temperature: float | Tensor | None = None,
    return_stats: bool,
    **options: Unpack[NNCLRArguments],
) -> Loss | tuple[Loss, ContrastiveStats]: ...
@over_ranks
def nnclr_loss(
    z: Tensor,
    predictions: Tensor,
    support: Tensor,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ids: Tensor | None = None,
    cutoff: float | Tensor | None = None,
    cutoff_margin: float | Tensor | None = None,
    return_stats: bool = False,
    backend: str | None = None,
    group: Group | None = None,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    r"""Return NNCLR, in which a view's nearest neighbour in a support set picks the other view's prediction.

    .. math:: L = \frac1N \sum_i \Bigl[ \log \sum_j e^{\langle n_i, p_j \rangle / T} - \langle n_i, p_i \rangle / T
        \Bigr], \qquad n_i = \mathrm{support}_{\arg\max_k \cos(z_i, \mathrm{support}_k)}

    Neither the N x N nor the N x K similarities are stored.

    Args:
        z: ``(N, D)``, the projections of one view, which choose the neighbours; detached. Or of both views,
            ``(N, 2, D)``: L is then the mean over both directions, as in the paper.
        predictions: ``(N, D)``, the predictor's outputs of the other view; or of both views in the order of z,
            ``(N, 2, D)``: the neighbours of view 1 meet the predictions of view 2, and the other way round.
        support: ``(K, D)``, K >= 1, past projections; detached. A tie for the nearest goes to the first. Of shape
            ``(D, K)``, pass its transpose; K = D is taken for ``(K, D)``.
        temperature: T, float or 0-dim tensor (differentiable); 0.1 unless ``logit_scale`` is given.
        logit_scale: 1 / T instead.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per sample; the mean is then sum(w l) / sum(w).
        label_smoothing: share of the target spread over all kept candidates.
        ids: ``(N,)`` integers; the predictions of other samples with the same id are no negatives.
        cutoff: float or ``(N,)``; negatives more similar than this are dropped, the positive never is.
        cutoff_margin: the same, as the positive's similarity plus a margin.
        return_stats: also return `ContrastiveStats`; its fields are (2, N) for both directions.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch. None: this
            process alone.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``, ``(2, N)`` for both directions; float32 (float64 for float64 inputs). With
        ``return_stats`` the pair (loss, stats).

    Raises:
        ValueError: shapes that do not fit, an empty batch or support, temperature near or below 0.
        TypeError: dtypes that differ or are not floating (ids: not integer).
        RuntimeError: tensors on different devices.

    Source: Dwibedi, Aytar, Tompson, Sermanet, Zisserman, ICCV 2021, arXiv:2104.14548.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> z, predictions, support = torch.randn(16, 2, 8), torch.randn(16, 2, 8), torch.randn(64, 8)
        >>> ck.nnclr_loss(z, predictions, support).shape
        torch.Size([])
    """
    _check_features(z, predictions, support)
    check_cutoff(z, cutoff, cutoff_margin)
    ids = checks.optional_ids("ids", ids, z.shape[0], z)
    options = SoftmaxOptions.of(
        z,
        temperature=temperature,
        logit_scale=logit_scale,
        default_temperature=0.1,
        reduction=reduction,
        weight=weight,
        label_smoothing=label_smoothing,
        return_stats=return_stats,
        backend=backend,
        group=group,
    )

    z, predictions, support = (unit_rows(x, normalize, backend) for x in (z.detach(), predictions, support.detach()))
    # an infinite similarity is a nearest neighbour like others
    infinite = 0.0 if normalize else nan_unless_finite(z) + nan_unless_finite(support)
    both = z.dim() == 3
    directions = list(zip(z.unbind(1), predictions.unbind(1)[::-1], strict=True)) if both else [(z, predictions)]
    sweeps, similarities = [], []
    for projection, prediction in directions:
        nearest = _nearest(projection, support)
        similarity = row_dot(nearest, prediction, backend) + infinite
        pairs = Pairs(ids, ids, cutoff_from(cutoff, cutoff_margin, similarity), diagonals=int(ids is None))
        sweeps.append((nearest, prediction, pairs))
        similarities.append(similarity)
    if both and return_stats:
        negatives = [sweep_negatives(*rows, options) for rows in sweeps]
        return softmax_loss(negatives, Positives.single(options.scale * torch.stack(similarities)), options)
    losses = [
        one_direction_loss(*rows, Positives.single(options.scale * similarity), options)
        for rows, similarity in zip(sweeps, similarities, strict=True)
    ]
    if not both:
        return losses[0]
    first, second = (loss for loss in losses if isinstance(loss, Tensor))
    return torch.stack([first, second]) if reduction == "none" else (first + second) / (2 if reduction == "mean" else 1)


class NNCLRLoss(KeyQueue):
    """`nnclr_loss` with its support set, a first-in-first-out queue of past projections in a persistent buffer.

    On several ranks the queues differ unless ``group=`` is given and they began equal, from one seed or checkpoint.

    Args:
        dim: D, the dimension of projections and predictions.
        queue_size: K, the size of the support set.
        temperature: 0.1 unless ``logit_scale`` is given; an ``nn.Parameter`` is trained.
        options: further keyword arguments of `nnclr_loss`.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.NNCLRLoss(dim=4, queue_size=64)(torch.randn(8, 2, 4), torch.randn(8, 2, 4)).shape
        torch.Size([])
    """

    function = staticmethod(nnclr_loss)

    def __init__(
        self,
        dim: int,
        queue_size: int = 65536,
        temperature: float | Tensor | None = None,
        *,
        return_stats: bool = False,
        **options: Unpack[NNCLRArguments],
    ) -> None:
        super().__init__(dim, queue_size, temperature=temperature, return_stats=return_stats, **options)

    def forward(self, z: Tensor, predictions: Tensor, **inputs: Any) -> Tensor | tuple[Tensor, ContrastiveStats]:
        """Return the loss against the queue as it was; in training mode z, or its first view, then enters it."""
        z, predictions = self.unit_rows("z", z.detach()), self.unit_rows("predictions", predictions)
        loss = self.function(z, predictions, self.queue.to(z.dtype, copy=True), **self.options(**inputs))
        if self.training:
            self.enqueue(z[:, 0] if z.dim() == 3 else z)
        return loss


def _check_features(z: Tensor, predictions: Tensor, support: Tensor) -> None:
    checks.tensor("z", z)
    check = checks.features if z.dim() != 3 else checks.views
    check("z", z)
    check("predictions", predictions)
    checks.features("support", support)
    checks.alike("z", z, "predictions", predictions)
    checks.alike("z", z, "support", support, rows=False)
    checks.not_empty("z", z)
    if z.dim() == 3 and not z.shape[1] == predictions.shape[1] == 2:
        raise ValueError(
            f"z {checks.shape(z)} and predictions {checks.shape(predictions)} must have 2 views in their second "
            "dimension; pass (N, D) of one direction at a time for more"
        )
    if support.shape[0] == 0:
        raise ValueError(f"support {checks.shape(support)} is empty; a nearest neighbour needs at least one row")


def _nearest(x: Tensor, support: Tensor) -> Tensor:
    """Return the row of the support that is most similar to each row of x; NaN where the similarity is."""
    values, columns = row_select(x, support)
    # A column of -1 stands for similarities of -inf everywhere, which come from infinite features.
    unknown = values.isnan() | (columns < 0)
    return support[columns[:, 0].clamp(min=0)].masked_fill(unknown, torch.nan)
