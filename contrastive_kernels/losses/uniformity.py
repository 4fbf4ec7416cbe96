"""Uniformity: the function and its module."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from contrastive_kernels.losses._arguments import BackendArguments, loss_function
from contrastive_kernels.losses._module import LossModule
from contrastive_kernels.primitives import (
    Group,
    Pairs,
    checks,
    compute_dtype,
    over_ranks,
    row_dot,
    rows_for_distances,
    shards_of,
    sweep,
    unit_rows,
    wide_products,
    wide_sums,
)

__all__ = ["UniformityLoss", "uniformity_loss"]


@loss_function
@over_ranks
def uniformity_loss(
    z: Tensor,
    *,
    t: float | Tensor = 2.0,
    normalize: bool = False,
    backend: str | None = None,
    group: Group | None = None,
) -> Tensor:
    r"""Return how far from uniform the rows are spread, without the N x N distances.

    .. math:: U = \log \frac{1}{N(N-1)} \sum_{i \ne j} e^{-t \lVert z_i - z_j \rVert^2}

    Half precision features are widened: where rows are close together, their rounded products are all the same.

    Args:
        z: ``(N, D)``, N >= 2; taken as it is, on the unit sphere or anywhere.
        t: float or tensor with one element (differentiable).
        normalize: rows to unit norm first.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch. None: this
            process alone.

    Returns:
        0-dim; float32 (float64 for float64 inputs). 0 where all rows are equal, negative elsewhere.

    Raises:
        ValueError: z is not (N, D) with at least 2 rows, or t has several elements.
        TypeError: z is not floating.

    Source: Wang & Isola, ICML 2020, arXiv:2005.10242.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.uniformity_loss(torch.randn(16, 8), normalize=True).shape
        torch.Size([])
    """
    shards = shards_of(group)
    checks.features("z", z)
    checks.two_rows("z", z, "a distance takes two", shards.total(z.shape[0]))
    checks.backend(z, backend)
    t = checks.scalar("t", t, z)
    n, dtype = shards.total(z.shape[0]), compute_dtype(z)
    z = rows_for_distances(unit_rows(z, normalize, backend), t, backend, shards)
    squares = row_dot(z, z, backend)
    with wide_products(z):
        out = sweep(z, None, Pairs(diagonals=1), scale=2 * t, bias=-t * squares, backend=backend, shards=shards)
    # A value near 0 is the difference of two logarithms of N^2.
    rows_of_all = (out.row_lse.squeeze(0) - t * squares).to(wide_sums(z))
    pairs = rows_of_all.new_full((), n * (n - 1))  # a tensor: in a graph for every batch size n is a symbol
    return (shards.logsumexp(rows_of_all) - pairs.log()).to(dtype)


class UniformityLoss(LossModule):
    """`uniformity_loss` as a module.

    Args:
        t: of the Gaussian; an ``nn.Parameter`` is trained.
        options: further keyword arguments of `uniformity_loss`.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.UniformityLoss(normalize=True)(torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(uniformity_loss)

    def __init__(
        self,
        t: float | Tensor = 2.0,
        **options: Unpack[BackendArguments],
    ) -> None:
        super().__init__(t=t, **options)

    def forward(
        self,
        z: Tensor,
    ) -> Tensor:
        """Return the loss."""
        return self.function(z, **self.options())
