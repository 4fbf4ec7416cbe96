"""t-SimCLR: the function and its module."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from contrastive_kernels.losses._arguments import BackendArguments, loss_function
from contrastive_kernels.losses._module import LossModule
from contrastive_kernels.primitives import (
    Group,
    Pairs,
    Student,
    checks,
    compute_dtype,
    over_ranks,
    row_dot,
    rows_for_distances,
    shards_of,
    unit_rows,
    weighted_total,
    wide_products,
)

__all__ = ["TSimCLRLoss", "t_simclr_loss"]


@loss_function
@over_ranks
def t_simclr_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor = 8.0,
    df: float = 5.0,
    normalize: bool = False,
    backend: str | None = None,
    group: Group | None = None,
) -> Tensor:
    r"""Return t-SimCLR: a sample's views attract, all rows repel, under Student's kernel; no N x N distances.

    .. math:: L = \frac{\nu + 1}{2} \, \frac1N \sum_i \log q(z_i^0, z_i^1)
            + \log \sum_{i \ne j} q(z_i, z_j)^{-(\nu + 1)/2}, \qquad
        q(a, b) = 1 + \frac{\lVert a - b \rVert^2}{T \nu}

    The second sum is over all 2N rows; its logarithm is one for the whole batch. Half precision features are widened:
    the norms do not fit their dtype.

    Args:
        z0: first view, ``(N, D)``, N >= 2; taken as it is.
        z1: second view, ``(N, D)``.
        temperature: T, float or tensor with one element (differentiable), positive.
        df: :math:`\nu`, the degrees of freedom, positive.
        normalize: rows to unit norm first.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch. None: this
            process alone.

    Returns:
        0-dim; float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit, fewer than 2 samples, temperature or df not positive.
        TypeError: dtypes that differ or are not floating.
        RuntimeError: tensors on different devices.

    Source: Hu, Liu, Zhou, Wang, Huang, ICLR 2023, arXiv:2205.14814.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.t_simclr_loss(torch.randn(16, 8), torch.randn(16, 8)).shape
        torch.Size([])
    """
    shards = shards_of(group)
    checks.paired("z0", z0, "z1", z1)
    checks.two_rows("z0", z0, "a distance takes two", shards.total(z0.shape[0]))
    checks.backend(z0, backend)
    temperature = checks.temperature(temperature, z0)
    df = checks.positive("df", df)
    if not isinstance(temperature, Tensor):
        checks.positive("temperature", temperature)
    kappa, exponent, n = temperature * df, (df + 1) / 2, z0.shape[0]
    dtype, z = compute_dtype(z0), torch.cat([unit_rows(z0, normalize, backend), unit_rows(z1, normalize, backend)])
    z = rows_for_distances(z, 1 / kappa, backend, shards)
    attraction = shards.mean(torch.log1p((z[:n] - z[n:]).square().sum(1) / kappa))

    # |a|^2 + |b|^2 - 2 <a, b> is linear in the product of (a, 1) and (b, -|b|^2 / 2), with an offset per row.
    squares = row_dot(z, z, backend)
    x, y = torch.cat([z, torch.ones_like(z[:, :1])], 1), torch.cat([z, -squares[:, None] / 2], 1)
    kernel = Student(exponent, -2 / kappa, squares / kappa)
    with wide_products(x):
        repulsion = weighted_total(x, y, Pairs(diagonals=1), term=kernel, backend=backend, shards=shards)
    return (exponent * attraction + shards.sum(repulsion).log()).to(dtype)


class TSimCLRLoss(LossModule):
    """`t_simclr_loss` as a module.

    Args:
        temperature: an ``nn.Parameter`` is trained.
        df: the degrees of freedom.
        options: further keyword arguments of `t_simclr_loss`.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.TSimCLRLoss(df=1.0)(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(t_simclr_loss)

    def __init__(
        self,
        temperature: float | Tensor = 8.0,
        df: float = 5.0,
        **options: Unpack[BackendArguments],
    ) -> None:
        super().__init__(temperature=temperature, df=df, **options)

    def forward(
        self,
        z0: Tensor,
        z1: Tensor,
    ) -> Tensor:
        """Return the loss."""
        return self.function(z0, z1, **self.options())
