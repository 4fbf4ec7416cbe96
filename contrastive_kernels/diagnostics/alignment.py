"""Alignment, uniformity and the split of InfoNCE into the two."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from contrastive_kernels.diagnostics.common import check_alike, wide_rows, without_autocast
from contrastive_kernels.losses import uniformity_loss
from contrastive_kernels.losses._options import softplus
from contrastive_kernels.primitives import checks, row_dot

__all__ = ["InfoNCESplit", "alignment", "info_nce_split", "uniformity"]


class InfoNCESplit(NamedTuple):
    """The two parts of InfoNCE with one negative; their sum is the loss."""

    alignment: Tensor
    """0-dim: half the mean squared distance between anchor and positive."""
    regularizer: Tensor
    """0-dim: mean of ``log(e^p + e^n)`` less half the squared norms of anchor and positive."""


@without_autocast
def alignment(x: Tensor, y: Tensor, *, exponent: float = 2.0, normalize: bool = False) -> Tensor:
    r"""How far apart the two views of a sample are. Differentiable.

    .. math:: A = \frac1N \sum_i \lVert x_i - y_i \rVert^{\alpha}

    Args:
        x: ``(N, D)``, one view.
        y: ``(N, D)``, the other view.
        exponent: :math:`\alpha`, positive.
        normalize: rows to unit norm first.

    Returns:
        0-dim, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit, an empty batch, an exponent that is not positive.
        TypeError: dtypes that differ or are not floating.

    Source: Wang and Isola, ICML 2020.

    Example:
        >>> import torch
        >>> from contrastive_kernels import diagnostics
        >>> diagnostics.alignment(torch.ones(4, 2), torch.ones(4, 2)).item()
        0.0
    """
    checks.features("x", x)
    checks.features("y", y)
    check_alike("x", x, "y", y)
    checks.not_empty("x", x)
    exponent = checks.positive("exponent", exponent)
    squares = (wide_rows(x, normalize) - wide_rows(y, normalize)).square().sum(1)
    if exponent == 2:
        return squares.mean()
    # The power of 0 has no gradient below the exponent 2.
    same = squares == 0
    return (squares.masked_fill(same, 1) ** (exponent / 2)).masked_fill(same, 0).mean()


@without_autocast
def uniformity(z: Tensor, *, t: float = 2.0, normalize: bool = False, backend: str | None = None) -> Tensor:
    r"""How evenly the features cover the sphere, lower is more even; without the N x N distances. Differentiable.

    .. math:: U = \log \frac{1}{N (N - 1)} \sum_{i \ne j} e^{-t \lVert z_i - z_j \rVert^2}

    Args:
        z: ``(N, D)``, N >= 2.
        t: positive.
        normalize: rows to unit norm first.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.

    Returns:
        0-dim, float32 (float64 for float64 inputs).

    Raises:
        ValueError: z is not (N, D) or has fewer than two rows, t is not positive.
        TypeError: z is not floating.

    Source: Wang and Isola, ICML 2020.

    Example:
        >>> import torch
        >>> from contrastive_kernels import diagnostics
        >>> round(diagnostics.uniformity(torch.eye(4)).item(), 4)
        -4.0
    """
    t = checks.positive("t", t)
    checks.features("z", z)
    return uniformity_loss(wide_rows(z, False), t=t, normalize=normalize, backend=backend)


@without_autocast
def info_nce_split(query: Tensor, positive: Tensor, negative: Tensor, *, normalize: bool = True) -> InfoNCESplit:
    r"""InfoNCE with one negative and temperature 1 as alignment plus a regulariser. Differentiable.

    .. math:: -\log \frac{e^p}{e^p + e^n} = \tfrac12 \lVert q - k \rVert^2 + \bigl[ \log(e^p + e^n) - r^2 \bigr],
        \qquad p = \langle q, k \rangle, \ n = \langle q, k^- \rangle

    for features of norm r; for others :math:`r^2` stands for half the sum of both squared norms.

    Args:
        query: ``(N, D)``, q.
        positive: ``(N, D)``, k.
        negative: ``(N, D)``, one negative for each query.
        normalize: rows to unit norm first.

    Returns:
        `InfoNCESplit`, two 0-dim tensors; float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit or an empty batch.
        TypeError: dtypes that differ or are not floating.

    Source: the decomposition of Wang and Isola, ICML 2020, as used by Huang, Yi, Zhao, Jiang, ICLR 2023.

    Example:
        >>> import torch
        >>> from contrastive_kernels import diagnostics
        >>> round(sum(diagnostics.info_nce_split(*torch.eye(3).split(1))).item(), 4)  # log 2
        0.6931
    """
    for name, x in (("query", query), ("positive", positive), ("negative", negative)):
        checks.features(name, x)
    check_alike("query", query, "positive", positive)
    check_alike("query", query, "negative", negative)
    checks.not_empty("query", query)
    query, positive, negative = (wide_rows(x, normalize) for x in (query, positive, negative))
    distance = (query - positive).square().sum(1) / 2
    # log(e^p + e^n) - r^2 = softplus(n - p) - |q - k|^2 / 2, in which nothing grows with the norms.
    excess = softplus(row_dot(query, negative - positive))
    return InfoNCESplit(distance.mean(), (excess - distance).mean())
