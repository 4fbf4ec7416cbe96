"""BYOL: the function and its module."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from contrastive_kernels.losses._arguments import GroupArguments, ReductionArguments, loss_function
from contrastive_kernels.losses._module import LossModule
from contrastive_kernels.losses._options import reduce
from contrastive_kernels.losses._predictions import predictions_and_targets
from contrastive_kernels.primitives import Group, over_ranks, shards_of

__all__ = ["BYOLLoss", "byol_loss"]


class BYOLArguments(ReductionArguments, GroupArguments, total=False):
    """Keyword arguments of `byol_loss`."""

    normalize: bool


@loss_function
@over_ranks
def byol_loss(
    p0: Tensor,
    z0: Tensor,
    p1: Tensor,
    z1: Tensor,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    weight: Tensor | None = None,
    group: Group | None = None,
) -> Tensor:
    r"""Return the BYOL loss: the squared distance between each view's prediction and the other view's target. O(N D).

    .. math:: L = \frac1N \sum_i \bigl[ \lVert \hat p_{0i} - \hat z_{1i} \rVert^2
        + \lVert \hat p_{1i} - \hat z_{0i} \rVert^2 \bigr], \qquad \lVert \hat p - \hat z \rVert^2 = 2 - 2 \cos(p, z)

    z are constants: no gradient passes through them (the stop-gradient that keeps the rows from collapsing).
    With unit rows it is 4 + 4 times `simsiam_loss`; its small values keep their digits.

    Args:
        p0: ``(N, D)``, the predictor's output of view 0.
        z0: ``(N, D)``, the target network's projection of view 0, what p1 is compared with.
        p1: ``(N, D)``, the predictor's output of view 1.
        z1: ``(N, D)``, the target network's projection of view 1, what p0 is compared with.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per sample; the mean is then sum(w l) / sum(w).
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch. None: this
            process alone.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``; float32 (float64 for float64 inputs). At least 0; at most 8 for unit rows.

    Raises:
        ValueError: shapes that do not fit, an empty batch, an unknown reduction.
        TypeError: dtypes that differ or are not floating.
        RuntimeError: tensors on different devices.

    Source: Grill et al., NeurIPS 2020, arXiv:2006.07733, eq. 2.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> p0, z0, p1, z1 = torch.randn(4, 16, 8).unbind(0)
        >>> ck.byol_loss(p0, z0, p1, z1).shape
        torch.Size([])
    """
    pairs = predictions_and_targets(p0, z0, p1, z1, normalize, reduction, weight)
    first, second = (F.mse_loss(p, z, reduction="none").sum(1) for p, z in pairs)
    losses = first + second
    return reduce(losses, weight, reduction, shards_of(group))


class BYOLLoss(LossModule):
    """`byol_loss` as a module.

    Args:
        options: keyword arguments of `byol_loss`.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.BYOLLoss()(*torch.randn(4, 8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(byol_loss)

    def __init__(
        self,
        **options: Unpack[BYOLArguments],
    ) -> None:
        super().__init__(**options)

    def forward(
        self,
        p0: Tensor,
        z0: Tensor,
        p1: Tensor,
        z1: Tensor,
        **inputs: Any,
    ) -> Tensor:
        """Return the loss; `inputs` are per-batch keyword arguments: weight."""
        return self.function(p0, z0, p1, z1, **self.options(**inputs))
