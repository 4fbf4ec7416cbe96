"""The spectral contrastive loss: the function and its module."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from contrastive_kernels.losses._arguments import BackendArguments, ReductionArguments, loss_function
from contrastive_kernels.losses._module import LossModule
from contrastive_kernels.losses._options import check_reduction, reduce, row_factors
from contrastive_kernels.primitives import (
    ALL_PAIRS,
    Group,
    Pairs,
    Square,
    checks,
    compute_dtype,
    moments_pay,
    over_ranks,
    row_dot,
    row_squares,
    shards_of,
    sweep,
    unit_rows,
    weighted_total,
    wide_sums,
)

__all__ = ["SpectralContrastiveLoss", "spectral_contrastive_loss"]


class SpectralContrastiveArguments(BackendArguments, ReductionArguments, total=False):
    """Keyword arguments of `spectral_contrastive_loss`."""

    project: bool
    include_diagonal: bool
    method: Literal["auto", "gram", "tile"]


@loss_function
@over_ranks
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
    group: Group | None = None,
) -> Tensor:
    r"""Return the spectral contrastive loss, which factorises the augmentation graph. No N x N similarity matrix.

    .. math:: L = \frac1\mu \Bigl[ -\frac2N \sum_i s_{ii} + \frac{1}{N (N - 1)} \sum_{i \ne j} s_{ij}^2 \Bigr],
        \qquad s_{ij} = \langle x_i, y_j \rangle

    Args:
        z0: x, ``(N, D)``, raw: the first view, or the images.
        z1: y, ``(N, D)``, raw: the second view, or the texts.
        mu: positive number; 1 in the paper's CIFAR runs, 10 for its ImageNet head, both with ``project``.
        project: rows into the ball of radius sqrt(mu) first: ``z`` if shorter, else ``sqrt(mu) z / |z|``.
        include_diagonal: the squares of all N * N pairs, divided by N * N; biased, as i = j is no independent draw.
        method: ``"gram"``, from the D x D second moments, O(N D^2); ``"tile"``, over the pairs, O(N^2 D);
            ``"auto"``: the cheaper one, ``"gram"`` when 3 N > 4 D.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per row of z0; the mean is then sum(w l) / sum(w).
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device; serves ``"tile"``.
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch. None: this
            process alone.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``: row i with its own squares, so that the mean is L; float32 (float64 for
        float64 inputs). For N = 1 the squares are none.

    Raises:
        ValueError: shapes that do not fit, an empty batch, mu not positive, an unknown method.
        TypeError: dtypes that differ or are not floating.
        RuntimeError: tensors on different devices.

    Source: HaoChen, Wei, Gaidon, Ma, NeurIPS 2021, arXiv:2106.04156.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> z0, z1 = torch.randn(2, 16, 8).unbind(0)
        >>> ck.spectral_contrastive_loss(z0, z1, project=True).shape
        torch.Size([])
    """
    shards = shards_of(group)
    checks.paired("z0", z0, "z1", z1)
    check_reduction(z0, reduction, weight)
    checks.choice("method", method, ("auto", "gram", "tile"))
    checks.backend(z0, backend)
    mu = checks.number("mu", mu)
    if not mu > 0:
        raise ValueError(f"mu {mu} must be positive: the loss is divided by it")
    x, y = unit_rows(z0, normalize, backend), unit_rows(z1, normalize, backend)
    if project:
        x, y = _in_ball(x, math.sqrt(mu)), _in_ball(y, math.sqrt(mu))
    n, d = shards.total(x.shape[0]), x.shape[1]
    columns = n if include_diagonal else max(n - 1, 1)
    # Of one row no pair is left, which the moments know up to rounding only.
    if (method == "gram" and n > 1) or (method == "auto" and moments_pay(n, d)):
        x, y = x.to(compute_dtype(x)), y.to(compute_dtype(y))
        # A long row's similarity and its squares nearly cancel.
        own = (x * y).sum(1, dtype=wide_sums(x))
        squares = row_squares(x, y, None if include_diagonal else own, shards)
        return reduce((squares / columns - 2 * own) / mu, weight, reduction, shards).to(x.dtype)
    own = row_dot(x, y, backend)
    pairs = ALL_PAIRS if include_diagonal else Pairs(diagonals=1)
    if reduction != "none":
        factors = row_factors(x, weight, reduction, shards) / mu
        total = weighted_total(x, y, pairs, term=Square(), weight=factors / columns, backend=backend, shards=shards)
        return total - 2 * (factors * own).sum()
    squares = sweep(x, y, pairs, term=Square(), exponents=(), backend=backend, shards=shards).row_sum
    return reduce((squares / columns - 2 * own) / mu, weight, reduction, shards)


class SpectralContrastiveLoss(LossModule):
    """`spectral_contrastive_loss` as a module.

    Args:
        mu: divides the loss and bounds the projected rows.
        options: further keyword arguments of `spectral_contrastive_loss`.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.SpectralContrastiveLoss(project=True)(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(spectral_contrastive_loss)

    def __init__(
        self,
        mu: float = 1.0,
        **options: Unpack[SpectralContrastiveArguments],
    ) -> None:
        super().__init__(mu=mu, **options)

    def forward(
        self,
        z0: Tensor,
        z1: Tensor,
        **inputs: Any,
    ) -> Tensor:
        """Return the loss; `inputs` are per-batch keyword arguments: weight."""
        return self.function(z0, z1, **self.options(**inputs))


def _in_ball(x: Tensor, radius: float) -> Tensor:
    """Return rows shorter than the radius as they are, the others at the radius."""
    wide = x.to(compute_dtype(x))
    norm: Tensor = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    return (wide * (radius / norm.clamp(min=radius))).to(x.dtype)
