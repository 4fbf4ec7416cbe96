"""ArCL with in-batch negatives: the function and its module."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor
from typing_extensions import Unpack

from contrastive_kernels.losses._arguments import ContrastiveStats, CutoffArguments, Loss, SoftmaxArguments
from contrastive_kernels.losses._module import LossModule
from contrastive_kernels.losses._options import SoftmaxOptions, check_cutoff, cutoff_from
from contrastive_kernels.losses._softmax import Positives, one_direction_loss, softmax_loss, sweep_negatives, union
from contrastive_kernels.primitives import (
    Group,
    Pairs,
    checks,
    over_ranks,
    row_dot,
    unit_rows,
    view_similarity,
)

__all__ = ["ArCLLoss", "arcl_loss"]

DENOMINATORS = ("two_view", "one_view", "positive+one_view", "positive+two_view")


class ArCLArguments(SoftmaxArguments, CutoffArguments, total=False):
    """Keyword arguments of `arcl_loss`."""

    logit_scale: float | Tensor | None
    positive: Literal["min", "mean"]
    denominator: Literal["two_view", "one_view", "positive+one_view", "positive+two_view"]
    ids: Tensor | None


@overload
def arcl_loss(
    views: Tensor,
    *,
    temperature: float | Tensor | None = None,
    return_stats: Literal[False] = False,
    **options: Unpack[ArCLArguments],
) -> Loss: ...
@overload
def arcl_loss(
    views: Tensor,
    *,
    temperature: float | Tensor | None = None,
    return_stats: Literal[True],
    **options: Unpack[ArCLArguments],
) -> tuple[Loss, ContrastiveStats]: ...
@overload
def arcl_loss(
    views: Tensor,
    *,
    temperature: float | Tensor | None = None,
    return_stats: bool,
    **options: Unpack[ArCLArguments],
) -> Loss | tuple[Loss, ContrastiveStats]: ...
@over_ranks
def arcl_loss(
    views: Tensor,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    positive: Literal["min", "mean"] = "min",
    denominator: Literal["two_view", "one_view", "positive+one_view", "positive+two_view"] = "two_view",
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
    r"""Return ArCL, which aligns the worst pair of a sample's views, without the N x 2N similarity matrix.

    .. math:: L = \frac1N \sum_i \Bigl[ \log \sum_{j \in \mathrm{Den}(i)} e^{u_{ij}} - s_i^+ / T \Bigr],
        \qquad s_i^+ = \min_{j<k} \langle z_{ij}, z_{ik} \rangle

    View 1 of each sample is the anchor. The denominator is our reading of a partly illegible source; with two views the
    default makes L the first half of NT-Xent.

    Args:
        views: ``(N, V, D)``, V >= 2, samples first: ``torch.stack([z0, z1], 1)``, not ``(V, N, D)``.
        temperature: T, float or 0-dim tensor (differentiable); 0.5 unless ``logit_scale`` is given.
        logit_scale: 1 / T instead.
        positive: ``"min"`` or ``"mean"`` over the pairs of views (the average alignment loss AAL).
        denominator: ``"two_view"``: view 1 of the others and view 2 of all; ``"one_view"``: view 1 of the others;
            ``"positive+one_view"`` and ``"positive+two_view"``: the others' views and :math:`e^{s^+/T}`.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per sample; the mean is then sum(w l) / sum(w).
        label_smoothing: share of the target spread over the candidates of the denominator.
        ids: ``(N,)`` integers; other samples with the same id are no negatives.
        cutoff: float or ``(N,)``; negatives more similar to the anchor than this are dropped.
        cutoff_margin: the same, as :math:`s^+` plus a margin.
        return_stats: also return `ContrastiveStats`, the positive being :math:`s^+`.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch. None: this
            process alone.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``; float32 (float64 for float64 inputs). With ``return_stats`` the pair
        (loss, stats). ``"one_view"`` may be negative, and is 0 for a sample without negatives.

    Raises:
        ValueError: fewer than two views, an empty batch, an unknown option, temperature near or below 0.
        TypeError: views is not floating or ids are not integers.

    Source: Zhao, Du, Wang, Yao, Huang, ICLR 2023 (ArCL), on SimCLR.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.arcl_loss(torch.randn(16, 4, 8), temperature=0.2).shape
        torch.Size([])
    """
    checks.views("views", views)
    checks.not_empty("views", views)
    checks.choice("positive", positive, ("min", "mean"))
    checks.choice("denominator", denominator, DENOMINATORS)
    check_cutoff(views, cutoff, cutoff_margin)
    ids = checks.optional_ids("ids", ids, views.shape[0], views)
    options = SoftmaxOptions.of(
        views,
        temperature=temperature,
        logit_scale=logit_scale,
        default_temperature=0.5,
        reduction=reduction,
        weight=weight,
        label_smoothing=label_smoothing,
        return_stats=return_stats,
        backend=backend,
        group=group,
    )

    views = unit_rows(views, normalize, backend)
    aligned = view_similarity(views, positive, backend)[0]
    first, second = views[:, 0], views[:, 1]
    pairs = Pairs(ids, None, cutoff_from(cutoff, cutoff_margin, aligned), diagonals=int(ids is None))
    target = options.scale * aligned
    if denominator == "two_view":
        own = options.scale * row_dot(first, second, backend)
        positives = Positives(target=target, lse=own, total=own, number=1)
    elif denominator == "one_view":
        positives = Positives.outside(target)
    else:
        positives = Positives.single(target)
    if denominator not in ("two_view", "positive+two_view"):
        return one_direction_loss(first, None, pairs, positives, options)
    negatives = sweep_negatives(first, None, pairs, options)
    negatives = union(negatives, sweep_negatives(first, second, pairs._replace(y_ids=ids), options))
    return softmax_loss([negatives], positives, options)


class ArCLLoss(LossModule):
    """`arcl_loss` as a module.

    Args:
        temperature: 0.5 unless ``logit_scale`` is given; an ``nn.Parameter`` is trained.
        options: further keyword arguments of `arcl_loss`.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.ArCLLoss(0.2)(torch.randn(8, 4, 16)).shape
        torch.Size([])
    """

    function = staticmethod(arcl_loss)

    def __init__(
        self,
        temperature: float | Tensor | None = None,
        *,
        return_stats: bool = False,
        **options: Unpack[ArCLArguments],
    ) -> None:
        super().__init__(temperature=temperature, return_stats=return_stats, **options)

    def forward(
        self,
        views: Tensor,
        **inputs: Any,
    ) -> Tensor | tuple[Tensor, ContrastiveStats]:
        """Return the loss; `inputs` are per-batch keyword arguments: weight, ids, cutoff."""
        return self.function(views, **self.options(**inputs))
