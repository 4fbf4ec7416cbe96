"""Alignment: the function and its module."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from contrastive_kernels.losses._arguments import GroupArguments, ReductionArguments, loss_function
from contrastive_kernels.losses._module import LossModule
from contrastive_kernels.losses._options import check_reduction, reduce
from contrastive_kernels.primitives import Group, checks, compute_dtype, over_ranks, shards_of, unit_rows

__all__ = ["AlignmentLoss", "alignment_loss"]


class AlignmentArguments(ReductionArguments, GroupArguments, total=False):
    """Keyword arguments of `alignment_loss`."""

    normalize: bool


@loss_function
@over_ranks
def alignment_loss(
    views: Tensor,
    *,
    normalize: bool = False,
    reduction: str = "mean",
    weight: Tensor | None = None,
    group: Group | None = None,
) -> Tensor:
    r"""Return the mean squared distance between two distinct views of a sample.

    .. math:: L = \frac1N \sum_i \frac{2}{V (V - 1)} \sum_{j < k} \lVert z_{ij} - z_{ik} \rVert^2
        = \frac1N \sum_i \frac{2}{V - 1} \sum_j \lVert z_{ij} - \bar z_i \rVert^2

    Args:
        views: ``(N, V, D)``, V >= 2, samples first: ``torch.stack([z0, z1], 1)``, not ``(V, N, D)``.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per sample; the mean is then sum(w l) / sum(w).
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch. None: this
            process alone.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``; float32 (float64 for float64 inputs).

    Raises:
        ValueError: fewer than two views, an empty batch, an unknown reduction.
        TypeError: views is not floating.

    Source: Wang, Isola, ICML 2020, arXiv:2005.10242, for V = 2 and exponent 2; ArCL's L_align for V > 2.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.alignment_loss(torch.randn(16, 4, 8), normalize=True).shape
        torch.Size([])
    """
    checks.views("views", views)
    checks.not_empty("views", views)
    check_reduction(views, reduction, weight)
    views = unit_rows(views, normalize)
    wide = views.to(compute_dtype(views))
    # Distances from the mean view: V of them rather than V (V - 1) / 2. The mean of differences from one of the views,
    # which are exact where views are close, has their digits.
    wide = wide - wide[:, :1]
    spread = (wide - wide.mean(1, keepdim=True)).square().sum((1, 2))
    return reduce(spread * (2 / (wide.shape[1] - 1)), weight, reduction, shards_of(group))


class AlignmentLoss(LossModule):
    """`alignment_loss` as a module.

    Args:
        options: keyword arguments of `alignment_loss`.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.AlignmentLoss(normalize=True)(torch.randn(8, 3, 4)).shape
        torch.Size([])
    """

    function = staticmethod(alignment_loss)

    def __init__(
        self,
        **options: Unpack[AlignmentArguments],
    ) -> None:
        super().__init__(**options)

    def forward(
        self,
        views: Tensor,
        **inputs: Any,
    ) -> Tensor:
        """Return the loss; `inputs` are per-batch keyword arguments: weight."""
        return self.function(views, **self.options(**inputs))
