"""Losses of second moments: spectral contrastive, Barlow Twins, VICReg. No N x N matrix where N exceeds D."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from contrastive_kernels import checks
from contrastive_kernels.autograd import apply
from contrastive_kernels.functional.common import check_options, reduce, row_factors, rows
from contrastive_kernels.select import wide_products
from contrastive_kernels.similarity import row_dot, sweep, weighted_total
from contrastive_kernels.sweep import ALL_PAIRS, Pairs, Square, compute_dtype

__all__ = ["barlow_twins_loss", "spectral_contrastive_loss", "vicreg_loss"]


class _Gram(torch.autograd.Function):
    """``x.T @ x``; its gradient takes one product, where that of two factors takes two."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.T @ x

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with wide_products(x):
            return x @ (grad + grad.T)


class _RowSquares(torch.autograd.Function):
    """``sum_j <x_i, y_j>**2`` of every row of x, from the D x D moments of y; the forward product is x's gradient."""

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        product = x @ (y.T @ y)
        return row_dot(product, x), product

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, product = output
        ctx.mark_non_differentiable(product)
        ctx.save_for_backward(*inputs, product)

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, y, product = ctx.saved_tensors
        needs_x, needs_y = ctx.needs_input_grad
        grad = 2 * grad[:, None]
        with wide_products(x):
            if needs_x and torch.is_grad_enabled():
                # The product that was saved has no graph for a second derivative.
                product = x @ (y.T @ y)
            return grad * product if needs_x else None, y @ (x.T @ (grad * x)) if needs_y else None


def spectral_contrastive_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    mu: float = 1.0,
    project: bool = False,
    include_diagonal: bool = False,
    method: Literal["auto", "gram", "tile"] = "auto",
    normalize: bool = False,
    reduction: str = "mean",
    weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""The spectral contrastive loss: factorises the augmentation graph, without the N x N similarity matrix.

    .. math:: L = \frac1\mu \Bigl[ -\frac2N \sum_i s_{ii} + \frac{1}{N (N - 1)} \sum_{i \ne j} s_{ij}^2 \Bigr],
        \qquad s_{ij} = \langle x_i, y_j \rangle

    Args:
        z0: x, ``(N, D)``, raw: the first view, or the images.
        z1: y, ``(N, D)``, raw: the second view, or the texts.
        mu: positive number; 1 in the paper's CIFAR runs, 10 for its ImageNet head, both with ``project``.
        project: rows into the ball of radius sqrt(mu) first: ``z`` if shorter, else ``sqrt(mu) z / |z|``.
        include_diagonal: the squares of all N * N pairs, divided by N * N; biased, as i = j is no independent draw.
        method: ``"gram"``, from the D x D second moments, O(N D^2); ``"tile"``, over the pairs, O(N^2 D);
            ``"auto"``: the cheaper one, ``"gram"`` when N > D.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per row of z0; the mean is then sum(w l) / sum(w).
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device; serves ``"tile"``.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``: row i with its own squares, so that the mean is L; float32 (float64 for
        float64 inputs). For N = 1 the squares are none.

    Raises:
        ValueError: shapes that do not fit, an empty batch, mu not positive, an unknown method.
        TypeError: dtypes that differ or are not floating.
        RuntimeError: tensors on different devices.

    Source: HaoChen, Wei, Gaidon, Ma, NeurIPS 2021, arXiv:2106.04156.

    Example:
        >>> z0, z1 = torch.randn(2, 16, 8).unbind(0)
        >>> spectral_contrastive_loss(z0, z1, project=True).shape
        torch.Size([])
    """
    _check_two("z0", z0, "z1", z1)
    check_options(z0, reduction=reduction, weight=weight)
    checks.choice("method", method, ("auto", "gram", "tile"))
    checks.number("mu", mu)
    if not mu > 0:
        raise ValueError(f"mu {mu} must be positive: the loss is divided by it")
    x, y = rows(z0, normalize, backend), rows(z1, normalize, backend)
    if project:
        x, y = _in_ball(x, math.sqrt(mu)), _in_ball(y, math.sqrt(mu))
    n, d = x.shape
    own, columns = row_dot(x, y, backend), n if include_diagonal else max(n - 1, 1)
    # Of one row no pair is left, which the moments know up to rounding only.
    if (method == "gram" and n > 1) or (method == "auto" and n > d):
        with wide_products(x):
            squares = apply(_RowSquares, _wide(x), _wide(y))[0]
        # With more rows than dimensions the other pairs weigh at least about as much as the diagonal: no cancellation.
        squares = squares if include_diagonal else squares - own.square()
    else:
        pairs = ALL_PAIRS if include_diagonal else Pairs(exclude_diagonal=True)
        if reduction != "none":
            factors = row_factors(x, weight, reduction) / mu
            total = weighted_total(x, y, pairs, term=Square(), weight=factors / columns, backend=backend)
            return total - 2 * (factors * own).sum()
        squares = sweep(x, y, pairs, term=Square(), exponents=(), backend=backend).row_sum
    return reduce((squares / columns - 2 * own) / mu, weight, reduction)


def barlow_twins_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    lambd: float | Tensor = 0.0051,
    std: Literal["biased", "unbiased"] = "biased",
    normalize: bool = False,
) -> Tensor:
    r"""Barlow Twins: the cross-correlation of the two views' features towards the identity.

    .. math:: L = \sum_a (1 - C_{aa})^2 + \lambda \sum_{a \ne b} C_{ab}^2, \qquad
        C = \hat z_0^\top \hat z_1 / N

    with :math:`\hat z` the columns of z with mean 0 and variance 1 over the batch. Formed from D x D or N x N products,
    whichever is smaller.

    Args:
        z0: ``(N, D)``, N >= 2, the first view.
        z1: ``(N, D)``, the second view.
        lambd: weight of the redundancy term; float or 0-dim tensor (differentiable).
        std: ``"biased"``: divide by ``sqrt(var + 1e-5)`` with the variance over N, as batch normalisation does;
            ``"unbiased"``: by the root of the variance over N - 1, without epsilon (a constant column gives NaN).
        normalize: rows to unit norm before.

    Returns:
        0-dim, float32 (float64 for float64 inputs). The batch enters through its moments: there is no loss per row.

    Raises:
        ValueError: shapes that do not fit, fewer than two rows, an unknown std.
        TypeError: dtypes that differ or are not floating.
        RuntimeError: tensors on different devices.

    Source: Zbontar, Jing, Misra, LeCun, Deny, ICML 2021, arXiv:2103.03230, eq. 1 and 2.

    Example:
        >>> z0, z1 = torch.randn(2, 16, 8).unbind(0)
        >>> barlow_twins_loss(z0, z1).shape
        torch.Size([])
    """
    _check_two("z0", z0, "z1", z1, minimum=2)
    checks.choice("std", std, ("biased", "unbiased"))
    lambd = checks.scalar("lambd", lambd, z0)
    first, second = (_standard_columns(rows(z, normalize), std) for z in (z0, z1))
    diagonal, off_diagonal = _cross_moments(first, second)
    n = first.shape[0]
    return (1 - diagonal / n).square().sum() + lambd * (off_diagonal / n**2)


def vicreg_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    sim_weight: float | Tensor = 25.0,
    var_weight: float | Tensor = 25.0,
    cov_weight: float | Tensor = 1.0,
    eps: float = 1e-4,
    normalize: bool = False,
) -> Tensor:
    r"""VICReg: invariance between the views, variance and decorrelation of the features within each.

    .. math:: L = \alpha\, \mathrm{mse}(x, y)
        + \frac{\beta}{2} \sum_{z \in \{x, y\}} \frac1D \sum_a \max\bigl(0, 1 - \sqrt{\mathrm{var}_a z + \epsilon}\bigr)
        + \frac{\gamma}{D} \sum_{z \in \{x, y\}} \sum_{a \ne b} \mathrm{cov}(z)_{ab}^2

    with the variance and covariance over N - 1. Formed from D x D or N x N products, whichever is smaller.

    Args:
        z0: x, ``(N, D)``, N >= 2, the first view.
        z1: y, ``(N, D)``, the second view.
        sim_weight: :math:`\alpha`, float or 0-dim tensor (differentiable), as the other weights.
        var_weight: :math:`\beta`, shared by both views: each counts half.
        cov_weight: :math:`\gamma`.
        eps: added to the variance under the root.
        normalize: rows to unit norm before.

    Returns:
        0-dim, float32 (float64 for float64 inputs). The batch enters through its moments: there is no loss per row.

    Raises:
        ValueError: shapes that do not fit, fewer than two rows, a negative eps.
        TypeError: dtypes that differ or are not floating.
        RuntimeError: tensors on different devices.

    Source: Bardes, Ponce, LeCun, ICLR 2022, arXiv:2105.04906, eq. 1 to 6, with the constants of its code.

    Example:
        >>> z0, z1 = torch.randn(2, 16, 8).unbind(0)
        >>> vicreg_loss(z0, z1).shape
        torch.Size([])
    """
    _check_two("z0", z0, "z1", z1, minimum=2)
    checks.number("eps", eps)
    if not eps >= 0:
        raise ValueError(f"eps {eps} must not be negative: it is added to a variance under a root")
    weights = {"sim_weight": sim_weight, "var_weight": var_weight, "cov_weight": cov_weight}
    alpha, beta, gamma = (checks.scalar(name, value, z0) for name, value in weights.items())
    views = [_wide(rows(z, normalize)) for z in (z0, z1)]
    n, d = views[0].shape
    hinge, covariance = [], []
    for view in views:
        centred = view - view.mean(0)
        diagonal, off_diagonal = _cross_moments(centred, centred)
        hinge.append((1 - (diagonal / (n - 1) + eps).sqrt()).relu().mean())
        covariance.append(off_diagonal / ((n - 1) ** 2 * d))
    similarity = (views[0] - views[1]).square().mean()
    return alpha * similarity + beta * (hinge[0] + hinge[1]) / 2 + gamma * (covariance[0] + covariance[1])


def _check_two(name_x: str, x: Tensor, name_y: str, y: Tensor, minimum: int = 1) -> None:
    """Two batches of equal shape with enough rows."""
    checks.features(name_x, x)
    checks.features(name_y, y)
    checks.alike(name_x, x, name_y, y)
    checks.not_empty(name_x, x)
    if x.shape[0] < minimum:
        raise ValueError(f"{name_x} {checks.shape(x)} must have at least {minimum} rows: the loss is one of variances")


def _wide(x: Tensor) -> Tensor:
    """x in the dtype of products and moments."""
    return x.to(compute_dtype(x))


def _in_ball(x: Tensor, radius: float) -> Tensor:
    """Rows shorter than the radius as they are, the others at the radius."""
    wide = _wide(x)
    norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    return (wide * (radius / norm.clamp(min=radius))).to(x.dtype)


def _standard_columns(x: Tensor, std: str) -> Tensor:
    """The columns of x with mean 0 and variance 1."""
    wide = _wide(x)
    centred = wide - wide.mean(0)
    if std == "biased":
        return centred * (centred.square().mean(0) + 1e-5).rsqrt()
    return centred * (centred.square().sum(0) / (x.shape[0] - 1)).rsqrt()


def _cross_moments(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal (D,) of ``a.T @ b`` and the sum of the squares off it, from the smaller of D x D and N x N."""
    n, d = a.shape
    with wide_products(a):
        if n > d:
            moments = apply(_Gram, a) if b is a else a.T @ b
            diagonal = moments.diagonal()
            # Left out rather than subtracted: features that are decorrelated keep the digits of what is left.
            off_diagonal = moments.masked_fill(torch.eye(d, dtype=torch.bool, device=a.device), 0)
            return diagonal, off_diagonal.square().sum()
        # A matrix of rank below D has much off its diagonal: here the subtraction does not cancel.
        diagonal = (a * b).sum(0)
        gram_a = apply(_Gram, a.T)
        gram_b = gram_a if b is a else apply(_Gram, b.T)
        return diagonal, (gram_a * gram_b).sum() - diagonal.square().sum()
