"""VICReg: the function and its module."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from contrastive_kernels.losses._arguments import GroupArguments, loss_function
from contrastive_kernels.losses._module import LossModule
from contrastive_kernels.primitives import (
    Group,
    Shards,
    centred_rows,
    checks,
    compute_dtype,
    cross_moments,
    moments_pay,
    over_ranks,
    shards_of,
    unit_rows,
)

__all__ = ["VICRegLoss", "vicreg_loss"]

# Moments of several positions are formed at once, so many numbers of them.
MOMENTS_AT_ONCE = 1 << 20
# Moments of so few dimensions take less time than the calls for products of the rows of every position.
FEW_DIMENSIONS = 128


class VICRegArguments(GroupArguments, total=False):
    """Keyword arguments of `vicreg_loss`."""

    eps: float
    normalize: bool


@loss_function
@over_ranks
def vicreg_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    sim_weight: float | Tensor = 25.0,
    var_weight: float | Tensor = 25.0,
    cov_weight: float | Tensor = 1.0,
    eps: float = 1e-4,
    normalize: bool = False,
    group: Group | None = None,
) -> Tensor:
    r"""Return VICReg: invariance between the views, variance and decorrelation of the features within each.

    .. math:: L = \alpha\, \mathrm{mse}(x, y)
        + \frac{\beta}{2} \sum_{z \in \{x, y\}} \frac1D \sum_a \max\bigl(0, 1 - \sqrt{\mathrm{var}_a z + \epsilon}\bigr)
        + \frac{\gamma}{D} \sum_{z \in \{x, y\}} \sum_{a \ne b} \mathrm{cov}(z)_{ab}^2

    with the variance and covariance over N - 1. Formed from D x D or N x N products, whichever take less
    work. Rows of several positions, as those of a feature map, have the mean of the positions' losses.

    Args:
        z0: x, ``(N, D)`` or ``(N, ..., D)``, N >= 2, the first view; the dimensions in between are the positions.
        z1: y, of the same shape, the second view.
        sim_weight: :math:`\alpha`, float or 0-dim tensor (differentiable), as the other weights.
        var_weight: :math:`\beta`, shared by both views: each counts half.
        cov_weight: :math:`\gamma`.
        eps: added to the variance under the root.
        normalize: rows to unit norm before.
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch. None: this
            process alone.

    Returns:
        0-dim, float32 (float64 for float64 inputs). The batch enters through its moments: there is no loss per row.

    Raises:
        ValueError: shapes that do not fit, fewer than two rows, a negative eps.
        TypeError: dtypes that differ or are not floating.
        RuntimeError: tensors on different devices.

    Source: Bardes, Ponce, LeCun, ICLR 2022, arXiv:2105.04906, eq. 1 to 6, with the constants of its code.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> z0, z1 = torch.randn(2, 16, 8).unbind(0)
        >>> ck.vicreg_loss(z0, z1).shape
        torch.Size([])
    """
    shards = shards_of(group)
    checks.paired_positions("z0", z0, "z1", z1)
    checks.two_rows("z0", z0, "the loss is one of variances", shards.total(z0.shape[0]))
    eps = checks.number("eps", eps)
    if not eps >= 0:
        raise ValueError(f"eps {eps} must not be negative: it is added to a variance under a root")
    weights = {"sim_weight": sim_weight, "var_weight": var_weight, "cov_weight": cov_weight}
    alpha, beta, gamma = (checks.scalar(name, value, z0) for name, value in weights.items())
    rows = (unit_rows(z, normalize) for z in (z0, z1))
    views = [z.to(compute_dtype(z)) for z in rows]
    n, numbers = shards.total(views[0].shape[0]), views[0][0].numel()
    hinge, covariance = [], []
    for view in views:
        blocks = [_spread(rows, n, eps, shards) for rows in _blocks(centred_rows(view, shards), shards)]
        hinge.append(sum(of_variances for of_variances, _ in blocks) / numbers)
        covariance.append(sum(of_covariances for _, of_covariances in blocks) / ((n - 1) ** 2 * numbers))
    similarity = F.mse_loss(views[0], views[1]) if shards.alone else shards.mean((views[0] - views[1]).square())
    loss = alpha * similarity + beta * (hinge[0] + hinge[1]) / 2 + gamma * (covariance[0] + covariance[1])
    return loss.to(similarity.dtype)


def _blocks(view: Tensor, shards: Shards) -> tuple[Tensor, ...]:
    """Return the rows (P, N, D) of positions whose moments are formed at once, or (N, D) of one position each."""
    n, d = view.shape[0], view.shape[-1]
    if view.dim() == 2:
        return (view,)
    positions = view.flatten(1, -2).transpose(0, 1)
    if shards.alone and d > FEW_DIMENSIONS and moments_pay(d, n):
        return positions.unbind()
    blocks: tuple[Tensor, ...] = positions.split(max(1, MOMENTS_AT_ONCE // d**2))
    return blocks


def _spread(rows: Tensor, n: int, eps: float, shards: Shards) -> tuple[Tensor, Tensor]:
    """Return the hinges of the deviations and the squares off the diagonal of the second moments, summed up."""
    diagonal, off_diagonal = cross_moments(rows, rows, shards)
    return (1 - (diagonal / (n - 1) + eps).sqrt()).relu().sum(), off_diagonal


class VICRegLoss(LossModule):
    """`vicreg_loss` as a module.

    Args:
        sim_weight, var_weight, cov_weight: of the invariance, variance and covariance terms.
        options: further keyword arguments of `vicreg_loss`.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.VICRegLoss()(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(vicreg_loss)

    def __init__(
        self,
        sim_weight: float | Tensor = 25.0,
        var_weight: float | Tensor = 25.0,
        cov_weight: float | Tensor = 1.0,
        **options: Unpack[VICRegArguments],
    ) -> None:
        super().__init__(sim_weight=sim_weight, var_weight=var_weight, cov_weight=cov_weight, **options)

    def forward(
        self,
        z0: Tensor,
        z1: Tensor,
    ) -> Tensor:
        """Return the loss."""
        return self.function(z0, z1, **self.options())
