"""Augmentation-robust alignment: the function and its module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from contrastive_kernels.losses._arguments import GroupArguments, ReductionArguments, loss_function
from contrastive_kernels.losses._module import LossModule
from contrastive_kernels.losses._options import check_reduction, reduce
from contrastive_kernels.primitives import Group, checks, compute_dtype, over_ranks, shards_of, unit_rows

__all__ = ["AugmentationRobustLoss", "augmentation_robust_loss"]


class AugmentationRobustArguments(ReductionArguments, GroupArguments, total=False):
    """Keyword arguments of `augmentation_robust_loss`."""

    normalize: bool


@loss_function
@over_ranks
def augmentation_robust_loss(
    views: Tensor,
    *,
    normalize: bool = False,
    reduction: str = "mean",
    weight: Tensor | None = None,
    group: Group | None = None,
) -> Tensor:
    r"""Return the largest squared distance between two views of a sample; of unit rows 2 - 2 times the least cosine.

    .. math:: L = \frac1N \sum_i \max_{j < k} \lVert z_{ij} - z_{ik} \rVert^2

    Args:
        views: ``(N, V, D)``, V >= 2, samples first: ``torch.stack([z0, z1], 1)``, not ``(V, N, D)``.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per sample; the mean is then sum(w l) / sum(w).
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch. None: this
            process alone.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``; float32 (float64 for float64 inputs). The gradient goes to the farthest
        pair, the first in row-major order on a tie.

    Raises:
        ValueError: fewer than two views, an empty batch, an unknown reduction.
        TypeError: views is not floating.

    Source: Zhao, Du, Wang, Yao, Huang, ICLR 2023 (ArCL), the augmentation-robust alignment L_AR.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.augmentation_robust_loss(torch.randn(16, 4, 8), normalize=True).shape
        torch.Size([])
    """
    checks.views("views", views)
    checks.not_empty("views", views)
    check_reduction(views, reduction, weight)
    views = unit_rows(views, normalize)
    wide = views.to(compute_dtype(views))
    n, v, d = wide.shape
    with torch.no_grad():
        # One view against the later ones at a time: no more than the views again.
        distances = torch.cat([(wide[:, j + 1 :] - wide[:, j : j + 1]).square().sum(2) for j in range(v - 1)], 1)
        pair = torch.triu_indices(v, v, 1, device=wide.device)[:, distances.argmax(1)]
    first, second = wide.gather(1, pair.T[:, :, None].expand(n, 2, d)).unbind(1)
    return reduce((first - second).square().sum(1), weight, reduction, shards_of(group))


class AugmentationRobustLoss(LossModule):
    """`augmentation_robust_loss` as a module.

    Args:
        options: keyword arguments of `augmentation_robust_loss`.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.AugmentationRobustLoss(normalize=True)(torch.randn(8, 3, 4)).shape
        torch.Size([])
    """

    function = staticmethod(augmentation_robust_loss)

    def __init__(
        self,
        **options: Unpack[AugmentationRobustArguments],
    ) -> None:
        super().__init__(**options)

    def forward(
        self,
        views: Tensor,
        **inputs: Any,
    ) -> Tensor:
        """Return the loss; `inputs` are per-batch keyword arguments: weight."""
        return self.function(views, **self.options(**inputs))
