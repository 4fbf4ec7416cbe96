"""How much of the gradient pushes apart samples of one class."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from contrastive_kernels.diagnostics.common import check_alike, check_labels, wide_rows, without_autocast
from contrastive_kernels.losses._options import scale_from
from contrastive_kernels.primitives import Pairs, checks, row_dot, sweep

__all__ = ["FalseNegativeMass", "false_negative_mass"]


class FalseNegativeMass(NamedTuple):
    """The part of the softmax on negatives of the anchor's own class, per anchor, view 1 first."""

    mass: Tensor
    """(2N,): their probability among all candidates of NT-Xent, the size of their push."""
    share: Tensor
    """(2N,): their part of the probability of all negatives."""


@torch.no_grad()
@without_autocast
def false_negative_mass(
    z0: Tensor,
    z1: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    normalize: bool = True,
    backend: str | None = None,
) -> FalseNegativeMass:
    r"""The gradient of NT-Xent that falls on false negatives, from two log-sum-exps, without the 2N x 2N matrix.

    .. math:: m_i = \sum_{j:\ y_j = y_i,\ j \text{ another sample}} P_{ij} = e^{\ell_i - \mathrm{lse}_i} \cdot
        \mathrm{share}_i, \qquad \mathrm{share}_i = \frac{e^{\ell_i^=}}{e^{\ell_i^=} + e^{\ell_i^{\ne}}}

    with the log-sum-exps over other samples of the class and over samples of other classes, that over both and that of
    the denominator. No small share is the difference of larger numbers.

    Args:
        z0: ``(N, D)``, the first view.
        z1: ``(N, D)``, the second view.
        labels: ``(N,)`` integers; a negative one is no class, its sample has no false negatives.
        temperature: float or 0-dim tensor; 0.5 unless ``logit_scale`` is given.
        logit_scale: 1 / temperature instead.
        normalize: rows to unit norm first.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.

    Returns:
        `FalseNegativeMass`, each ``(2N,)``, float32 (float64 for float64 inputs); 0 without negatives.

    Raises:
        ValueError: shapes that do not fit, an empty batch, temperature near or below 0.
        TypeError: dtypes that differ or are not floating (labels: not integer).

    Example:
        >>> import torch
        >>> from contrastive_kernels import diagnostics
        >>> z, labels = torch.eye(4), torch.tensor([0, 0, 1, -1])
        >>> [round(s, 3) for s in diagnostics.false_negative_mass(z, z, labels).share.tolist()[:4]]
        [0.333, 0.333, 0.0, 0.0]
    """
    checks.features("z0", z0)
    checks.features("z1", z1)
    check_alike("z0", z0, "z1", z1)
    checks.not_empty("z0", z0)
    labels = check_labels(labels, z0)
    scale = scale_from(temperature, logit_scale, z0, default=0.5)
    first, second = wide_rows(z0, normalize), wide_rows(z1, normalize)
    z, positive = torch.cat([first, second]), scale * row_dot(first, second).repeat(2)
    index = torch.arange(len(first), device=z.device)
    # A sample without a class has an id of its own.
    classes = torch.where(labels < 0, -1 - index, labels).repeat(2)
    same, other = (
        sweep(z, None, pairs, scale=scale, backend=backend).row_lse.squeeze(0)
        # Views of one sample are of one class, but not negatives.
        for pairs in (Pairs(classes, keep_equal_ids=True, diagonals=2), Pairs(classes))
    )
    share = torch.sigmoid(same - other).masked_fill((same == -torch.inf) & (other == -torch.inf), 0)
    return FalseNegativeMass(share * torch.sigmoid(torch.logaddexp(same, other) - positive), share)
