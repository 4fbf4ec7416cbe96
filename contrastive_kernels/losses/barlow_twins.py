"""Barlow Twins: the function and its module."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from contrastive_kernels.losses._arguments import GroupArguments, loss_function
from contrastive_kernels.losses._module import LossModule
from contrastive_kernels.primitives import (
    Group,
    Shards,
    checks,
    compute_dtype,
    cross_moments,
    over_ranks,
    shards_of,
    unit_rows,
)

__all__ = ["BarlowTwinsLoss", "barlow_twins_loss"]


class BarlowTwinsArguments(GroupArguments, total=False):
    """Keyword arguments of `barlow_twins_loss`."""

    std: Literal["biased", "unbiased"]
    std_eps: float | None
    normalize: bool


@loss_function
@over_ranks
def barlow_twins_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    lambd: float | Tensor = 0.0051,
    std: Literal["biased", "unbiased"] = "biased",
    std_eps: float | None = None,
    normalize: bool = False,
    group: Group | None = None,
) -> Tensor:
    r"""Return the loss of Barlow Twins, which takes the cross-correlation of two views' features towards the identity.

    .. math:: L = \sum_a (1 - C_{aa})^2 + \lambda \sum_{a \ne b} C_{ab}^2, \qquad
        C = \hat z_0^\top \hat z_1 / N

    with :math:`\hat z` the columns of z with mean 0 and variance 1 over the batch. Formed from D x D or N x N products,
    whichever take less work.

    Args:
        z0: ``(N, D)``, N >= 2, the first view.
        z1: ``(N, D)``, the second view.
        lambd: weight of the redundancy term; float or 0-dim tensor (differentiable).
        std: ``"biased"``: divide by ``sqrt(var + 1e-5)`` with the variance over N, as batch normalisation does;
            ``"unbiased"``: by the root of the variance over N - 1, without epsilon (a constant column gives NaN).
        std_eps: divide by the deviation, biased or unbiased, plus this number instead: ``sqrt(var) + std_eps``. Where
            it is positive a constant column is 0.
        normalize: rows to unit norm before.
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch. None: this
            process alone.

    Returns:
        0-dim, float32 (float64 for float64 inputs). The batch enters through its moments: there is no loss per row.

    Raises:
        ValueError: shapes that do not fit, fewer than two rows, an unknown std, a negative std_eps.
        TypeError: dtypes that differ or are not floating.
        RuntimeError: tensors on different devices.

    Source: Zbontar, Jing, Misra, LeCun, Deny, ICML 2021, arXiv:2103.03230, eq. 1 and 2.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> z0, z1 = torch.randn(2, 16, 8).unbind(0)
        >>> ck.barlow_twins_loss(z0, z1).shape
        torch.Size([])
    """
    shards = shards_of(group)
    checks.paired("z0", z0, "z1", z1)
    checks.two_rows("z0", z0, "the loss is one of variances", shards.total(z0.shape[0]))
    checks.choice("std", std, ("biased", "unbiased"))
    if std_eps is not None:
        checks.positive("std_eps", std_eps, zero=True)
    lambd = checks.scalar("lambd", lambd, z0)
    first, second = (_standard_columns(unit_rows(z, normalize), std, std_eps, shards) for z in (z0, z1))
    diagonal, off_diagonal = cross_moments(first, second, shards)
    n = shards.total(first.shape[0])
    loss = (1 - diagonal / n).square().sum() + lambd * (off_diagonal / n**2)
    return loss.to(diagonal.dtype)


class BarlowTwinsLoss(LossModule):
    """`barlow_twins_loss` as a module.

    Args:
        lambd: weight of the redundancy term.
        options: further keyword arguments of `barlow_twins_loss`.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.BarlowTwinsLoss(5e-3)(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(barlow_twins_loss)

    def __init__(
        self,
        lambd: float | Tensor = 0.0051,
        **options: Unpack[BarlowTwinsArguments],
    ) -> None:
        super().__init__(lambd=lambd, **options)

    def forward(
        self,
        z0: Tensor,
        z1: Tensor,
    ) -> Tensor:
        """Return the loss."""
        return self.function(z0, z1, **self.options())


def _standard_columns(x: Tensor, std: str, std_eps: float | None, shards: Shards) -> Tensor:
    """Return the columns of x with mean 0 and variance 1."""
    wide = x.to(compute_dtype(x))
    if shards.alone and std == "biased" and std_eps is None:
        # without the mean first: on one thread its sums lose the digits of rows far from the origin
        return F.batch_norm(wide - wide.detach().mean(0), None, None, training=True, eps=1e-5)
    centred = wide - shards.column_means(wide)
    if std == "biased":
        variance = shards.column_means(centred.square())
    else:
        variance = shards.sum(centred.square().sum(0)) / (shards.total(x.shape[0]) - 1)
    if std_eps is None:
        return centred * (variance + 1e-5 if std == "biased" else variance).rsqrt()
    constant = variance == 0  # the root has no derivative there, but the column has one
    deviation = variance.masked_fill(constant, 1).sqrt().masked_fill(constant, 0)
    return centred / (deviation + std_eps)
