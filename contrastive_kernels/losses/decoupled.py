"""The decoupled loss: the function and its module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from contrastive_kernels.losses._arguments import ContrastiveStats, CutoffArguments, Loss, SoftmaxArguments
from contrastive_kernels.losses._module import LossModule
from contrastive_kernels.losses._options import SoftmaxOptions
from contrastive_kernels.losses._softmax import Positives, softmax_stats, softmax_value, sweep_negatives
from contrastive_kernels.losses._views import Anchors
from contrastive_kernels.primitives import Group, checks, over_ranks

__all__ = ["DecoupledLoss", "decoupled_loss"]


class DecoupledArguments(SoftmaxArguments, CutoffArguments, total=False):
    """Keyword arguments of `decoupled_loss`."""

    logit_scale: float | Tensor | None
    positive_weight: Tensor | tuple[Tensor, Tensor] | Callable[[Tensor, Tensor], Tensor] | None
    ids: Tensor | None


@overload
def decoupled_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor | None = None,
    return_stats: Literal[False] = False,
    **options: Unpack[DecoupledArguments],
) -> Loss: ...
@overload
def decoupled_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor | None = None,
    return_stats: Literal[True],
    **options: Unpack[DecoupledArguments],
) -> tuple[Loss, ContrastiveStats]: ...
@overload
def decoupled_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor | None = None,
    return_stats: bool,
    **options: Unpack[DecoupledArguments],
) -> Loss | tuple[Loss, ContrastiveStats]: ...
@over_ranks
def decoupled_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    positive_weight: Tensor | tuple[Tensor, Tensor] | Callable[[Tensor, Tensor], Tensor] | None = None,
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
    r"""Return the decoupled contrastive loss: NT-Xent without the positive in the denominator.

    .. math:: L = \frac{1}{2N} \sum_{i=1}^{2N} \Bigl[ \log \sum_j e^{u_{ij}} - w_i u_{i p(i)} \Bigr],
        \qquad u_{ij} = \langle z_i, z_j \rangle / T

    over the rows z of both views, p(i) the other view of i, j running over the rows of other samples. It may be
    negative. Not the debiased loss, which is abbreviated alike.

    Args:
        z0: ``(N, D)``, the first view.
        z1: ``(N, D)``, the second view.
        temperature: T, float or 0-dim tensor (differentiable); 0.1 unless ``logit_scale`` is given.
        logit_scale: 1 / T instead.
        positive_weight: w, ``(N,)`` per sample, or a callable of the two views as they enter the similarities that
            returns it; detached, and the same for both views. A pair ``(w0, w1)`` of ``(N,)`` has the weights of the
            anchors of each view, and is differentiated. None: 1. The von Mises-Fisher weights of the paper are
            ``lambda z0, z1: 2 - z0.shape[0] * ((z0 * z1).sum(1) / 0.5).softmax(0)``.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per sample; the mean is then sum(w l) / sum(w).
        label_smoothing: share of the target spread over the kept negatives.
        ids: ``(N,)`` integers; other samples with the same id are no negatives.
        cutoff: float, ``(N,)`` or ``(2N,)``; negatives more similar than this are dropped.
        cutoff_margin: the same, as the positive's similarity plus a margin.
        return_stats: also return `ContrastiveStats`.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch. None: this
            process alone.

    Returns:
        0-dim, or ``(2N,)`` for ``"none"``, first view first; float32 (float64 for float64 inputs). With
        ``return_stats`` the pair (loss, stats). 0 for N = 1 and for a row without negatives.

    Raises:
        ValueError: shapes that do not fit, an empty batch, temperature near or below 0.
        TypeError: dtypes that differ or are not floating (ids: not integer), a positive_weight that is no tensor, pair
            of tensors or callable.
        RuntimeError: tensors on different devices.

    Source: Yeh, Hong, Hsu, Liu, Chen, LeCun, ECCV 2022, arXiv:2110.06848.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> z0, z1 = torch.randn(2, 16, 8).unbind(0)
        >>> ck.decoupled_loss(z0, z1, positive_weight=torch.full((16,), 0.5)).shape
        torch.Size([])
    """
    checks.paired("z0", z0, "z1", z1)
    if isinstance(positive_weight, (tuple, list)):
        if len(positive_weight) != 2:
            raise ValueError(f"positive_weight has {len(positive_weight)} entries; a pair has one for each view")
        for view, share in enumerate(positive_weight):
            checks.vector(f"positive_weight[{view}]", share, z0, "z0")
    elif positive_weight is not None and not callable(positive_weight):
        checks.vector("positive_weight", positive_weight, z0, "z0")
    options = SoftmaxOptions.of(
        z0,
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
    anchors = Anchors.of(
        z0,
        z1,
        normalize=normalize,
        ids=ids,
        cutoff=cutoff,
        cutoff_margin=cutoff_margin,
        backend=backend,
        shards=options.shards,
    )
    positive = options.scale * anchors.similarities.squeeze(1)
    target = positive
    if positive_weight is not None:
        if callable(positive_weight):
            shards, rows = options.shards, anchors.z.detach()
            views = rows[: z0.shape[0]], rows[z0.shape[0] :]
            positive_weight = shards.own(positive_weight(*(shards.gather(view) for view in views)), z0)
            checks.vector("positive_weight", positive_weight, z0, "z0")
        of_views = (positive_weight.detach(),) * 2 if isinstance(positive_weight, Tensor) else positive_weight
        target = torch.cat([share.to(positive.dtype) for share in of_views]) * positive
    negatives = [sweep_negatives(anchors.z, None, anchors.pairs, options)]
    loss = softmax_value(negatives, Positives.outside(target), options)
    return (loss, softmax_stats(negatives, Positives.outside(positive), options.shards)) if return_stats else loss


class DecoupledLoss(LossModule):
    """`decoupled_loss` as a module.

    Args:
        temperature: 0.1 unless ``logit_scale`` is given; an ``nn.Parameter`` is trained.
        options: further keyword arguments of `decoupled_loss`; ``positive_weight`` is best a callable here.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.DecoupledLoss(0.2)(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(decoupled_loss)

    def __init__(
        self,
        temperature: float | Tensor | None = None,
        *,
        return_stats: bool = False,
        **options: Unpack[DecoupledArguments],
    ) -> None:
        super().__init__(temperature=temperature, return_stats=return_stats, **options)

    def forward(
        self,
        z0: Tensor,
        z1: Tensor,
        **inputs: Any,
    ) -> Tensor | tuple[Tensor, ContrastiveStats]:
        """Return the loss; `inputs` are per-batch keyword arguments: weight, ids, cutoff, positive_weight."""
        return self.function(z0, z1, **self.options(**inputs))
