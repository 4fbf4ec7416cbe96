"""Distances between the views of a sample: their mean (alignment) and their maximum (augmentation-robust)."""

from __future__ import annotations

import torch
from torch import Tensor

from contrastive_kernels import checks
from contrastive_kernels.functional.common import check_options, reduce, rows
from contrastive_kernels.sweep import compute_dtype

__all__ = ["alignment_loss", "augmentation_robust_loss"]


def alignment_loss(
    views: Tensor, *, normalize: bool = False, reduction: str = "mean", weight: Tensor | None = None
) -> Tensor:
    r"""The mean squared distance between two distinct views of a sample.

    .. math:: L = \frac1N \sum_i \frac{2}{V (V - 1)} \sum_{j < k} \lVert z_{ij} - z_{ik} \rVert^2
        = \frac1N \sum_i \frac{2}{V - 1} \sum_j \lVert z_{ij} - \bar z_i \rVert^2

    Args:
        views: ``(N, V, D)``, V >= 2.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per sample; the mean is then sum(w l) / sum(w).

    Returns:
        0-dim, or ``(N,)`` for ``"none"``; float32 (float64 for float64 inputs).

    Raises:
        ValueError: fewer than two views, an empty batch, an unknown reduction.
        TypeError: views is not floating.

    Source: Wang, Isola, ICML 2020, arXiv:2005.10242, for V = 2 and exponent 2; ArCL's L_align for V > 2.

    Example:
        >>> alignment_loss(torch.randn(16, 4, 8), normalize=True).shape
        torch.Size([])
    """
    wide = _checked(views, normalize, reduction, weight)
    # Distances from the mean view: V of them rather than V (V - 1) / 2, and no difference of large numbers.
    spread = (wide - wide.mean(1, keepdim=True)).square().sum((1, 2))
    return reduce(spread * (2 / (wide.shape[1] - 1)), weight, reduction)


def augmentation_robust_loss(
    views: Tensor, *, normalize: bool = False, reduction: str = "mean", weight: Tensor | None = None
) -> Tensor:
    r"""The largest squared distance between two views of a sample; on unit rows 2 - 2 times the least similarity.

    .. math:: L = \frac1N \sum_i \max_{j < k} \lVert z_{ij} - z_{ik} \rVert^2

    Args:
        views: ``(N, V, D)``, V >= 2.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per sample; the mean is then sum(w l) / sum(w).

    Returns:
        0-dim, or ``(N,)`` for ``"none"``; float32 (float64 for float64 inputs). The gradient goes to the farthest
        pair, the first in row-major order on a tie.

    Raises:
        ValueError: fewer than two views, an empty batch, an unknown reduction.
        TypeError: views is not floating.

    Source: Zhao, Du, Wang, Yao, Huang, ICLR 2023 (ArCL), the augmentation-robust alignment L_AR.

    Example:
        >>> augmentation_robust_loss(torch.randn(16, 4, 8), normalize=True).shape
        torch.Size([])
    """
    wide = _checked(views, normalize, reduction, weight)
    n, v, d = wide.shape
    with torch.no_grad():
        # One view against the later ones at a time: no more than the views again.
        distances = torch.cat([(wide[:, j + 1 :] - wide[:, j : j + 1]).square().sum(2) for j in range(v - 1)], 1)
        pair = torch.triu_indices(v, v, 1, device=wide.device)[:, distances.argmax(1)]
    first, second = wide.gather(1, pair.T[:, :, None].expand(n, 2, d)).unbind(1)
    return reduce((first - second).square().sum(1), weight, reduction)


def _checked(views: Tensor, normalize: bool, reduction: str, weight: Tensor | None) -> Tensor:
    """The views in the dtype of the loss."""
    checks.views("views", views)
    checks.not_empty("views", views)
    check_options(views, reduction=reduction, weight=weight)
    views = rows(views, normalize)
    return views.to(compute_dtype(views))
