"""Losses of squared distances between raw rows: uniformity and t-SimCLR."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from contrastive_kernels import checks
from contrastive_kernels.backends.torch import statistic_dtype
from contrastive_kernels.functional.common import rows
from contrastive_kernels.select import wide_products
from contrastive_kernels.similarity import row_dot, sweep, weighted_total
from contrastive_kernels.sweep import Pairs, Student, compute_dtype


def uniformity_loss(
    z: Tensor, *, t: float | Tensor = 2.0, normalize: bool = False, backend: str | None = None
) -> Tensor:
    r"""How far from uniform the rows are spread, without the N x N distances.

    .. math:: U = \log \frac{1}{N(N-1)} \sum_{i \ne j} e^{-t \lVert z_i - z_j \rVert^2}

    Half precision features are widened for it: where rows are close together, their products tell them apart no more.

    Args:
        z: ``(N, D)``, N >= 2; taken as it is, on the unit sphere or anywhere.
        t: float or tensor with one element (differentiable).
        normalize: rows to unit norm first.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.

    Returns:
        0-dim; float32 (float64 for float64 inputs). 0 where all rows are equal, negative elsewhere.

    Raises:
        ValueError: z is not (N, D) with at least 2 rows, or t has several elements.
        TypeError: z is not floating.

    Source: Wang & Isola, ICML 2020, arXiv:2005.10242.

    Example:
        >>> uniformity_loss(torch.randn(16, 8), normalize=True).shape
        torch.Size([])
    """
    checks.features("z", z)
    _check_rows("z", z)
    t = checks.scalar("t", t, z)
    z, n = rows(z, normalize, backend), z.shape[0]
    z = _centred(z.to(compute_dtype(z)))
    squares = row_dot(z, z, backend)
    options = dict(scale=2 * t, bias=-t * squares, backend=backend)
    with wide_products(z):
        row_lse = sweep(z, None, Pairs(exclude_diagonal=True), **options).row_lse.squeeze(0)
    # A value near 0 is the difference of two logarithms of N^2.
    rows_of_all = (row_lse - t * squares).to(statistic_dtype(z))
    return (rows_of_all.logsumexp(0) - math.log(n * (n - 1))).to(z.dtype)


def t_simclr_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor = 8.0,
    df: float = 5.0,
    normalize: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""t-SimCLR: the two views of a sample attract, all rows repel, under Student's kernel; no N x N distances.

    .. math:: L = \frac{\nu + 1}{2} \, \frac1N \sum_i \log q(z_i^0, z_i^1)
            + \log \sum_{i \ne j} q(z_i, z_j)^{-(\nu + 1)/2}, \qquad
        q(a, b) = 1 + \frac{\lVert a - b \rVert^2}{T \nu}

    The second sum is over all 2N rows; its logarithm is one for the whole batch. Half precision features are widened
    for it: the norms do not fit their dtype.

    Args:
        z0: first view, ``(N, D)``, N >= 2; taken as it is.
        z1: second view, ``(N, D)``.
        temperature: T, float or tensor with one element (differentiable), positive.
        df: :math:`\nu`, the degrees of freedom, positive.
        normalize: rows to unit norm first.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.

    Returns:
        0-dim; float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit, fewer than 2 samples, temperature or df not positive.
        TypeError: dtypes that differ or are not floating.
        RuntimeError: tensors on different devices.

    Source: Hu, Liu, Zhou, Wang, Huang, ICLR 2023, arXiv:2205.14814.

    Example:
        >>> t_simclr_loss(torch.randn(16, 8), torch.randn(16, 8)).shape
        torch.Size([])
    """
    checks.features("z0", z0)
    checks.features("z1", z1)
    checks.alike("z0", z0, "z1", z1)
    _check_rows("z0", z0)
    temperature = checks.temperature(temperature, z0)
    checks.number("df", df)
    for name, value in (("temperature", temperature), ("df", df)):
        if not isinstance(value, Tensor) and not value > 0:
            raise ValueError(f"{name} {value} must be positive")
    kappa, exponent, n = temperature * df, (df + 1) / 2, z0.shape[0]
    z = torch.cat([rows(z0, normalize, backend), rows(z1, normalize, backend)])
    z = _centred(z.to(compute_dtype(z)))
    attraction = torch.log1p((z[:n] - z[n:]).square().sum(1) / kappa).mean()

    # |a|^2 + |b|^2 - 2 <a, b> is linear in the product of (a, 1) and (b, -|b|^2 / 2), with an offset per row.
    squares = row_dot(z, z, backend)
    x, y = torch.cat([z, torch.ones_like(z[:, :1])], 1), torch.cat([z, -squares[:, None] / 2], 1)
    kernel = Student(exponent, -2 / kappa, squares / kappa)
    with wide_products(x):
        repulsion = weighted_total(x, y, Pairs(exclude_diagonal=True), term=kernel, backend=backend)
    return exponent * attraction + repulsion.log()


def _centred(z: Tensor) -> Tensor:
    """The rows without their mean: distances stay, and what |z|^2 loses to rounding is smallest."""
    return z - z.mean(0).detach()


def _check_rows(name: str, x: Tensor) -> None:
    """A distance takes two rows."""
    if x.shape[0] < 2:
        raise ValueError(f"{name} {checks.shape(x)} must have at least 2 rows")
