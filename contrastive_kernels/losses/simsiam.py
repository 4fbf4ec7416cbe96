"""SimSiam: the function and its module."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from contrastive_kernels.losses._arguments import GroupArguments, ReductionArguments, loss_function
from contrastive_kernels.losses._module import LossModule
from contrastive_kernels.losses._options import reduce
from contrastive_kernels.losses._predictions import predictions_and_targets
from contrastive_kernels.primitives import Group, over_ranks, row_dot, shards_of

__all__ = ["SimSiamLoss", "simsiam_loss"]


class SimSiamArguments(ReductionArguments, GroupArguments, total=False):
    """Keyword arguments of `simsiam_loss`."""

    normalize: bool


@loss_function
@over_ranks
def simsiam_loss(
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
    r"""Return the SimSiam loss: the negative cosine between each view's prediction and the other view. O(N D).

    .. math:: L = -\frac{1}{2N} \sum_i \bigl[ \cos(p_{0i}, z_{1i}) + \cos(p_{1i}, z_{0i}) \bigr]

    z are constants: no gradient passes through them (the stop-gradient that keeps the rows from collapsing).

    Args:
        p0: ``(N, D)``, the predictor's output of view 0.
        z0: ``(N, D)``, the encoder's output of view 0, what p1 is compared with.
        p1: ``(N, D)``, the predictor's output of view 1.
        z1: ``(N, D)``, the encoder's output of view 1, what p0 is compared with.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per sample; the mean is then sum(w l) / sum(w).
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch. None: this
            process alone.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``; float32 (float64 for float64 inputs). From -1, where every prediction
        is right, to 1.

    Raises:
        ValueError: shapes that do not fit, an empty batch, an unknown reduction.
        TypeError: dtypes that differ or are not floating.
        RuntimeError: tensors on different devices.

    Source: Chen, He, CVPR 2021, arXiv:2011.10566, eq. 1 to 4.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> p0, z0, p1, z1 = torch.randn(4, 16, 8).unbind(0)
        >>> ck.simsiam_loss(p0, z0, p1, z1).shape
        torch.Size([])
    """
    pairs = predictions_and_targets(p0, z0, p1, z1, normalize, reduction, weight)
    first, second = (row_dot(p, z) for p, z in pairs)
    losses = -0.5 * (first + second)
    return reduce(losses, weight, reduction, shards_of(group))


class SimSiamLoss(LossModule):
    """`simsiam_loss` as a module.

    Args:
        options: keyword arguments of `simsiam_loss`.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.SimSiamLoss()(*torch.randn(4, 8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(simsiam_loss)

    def __init__(
        self,
        **options: Unpack[SimSiamArguments],
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
