"""The spectral contrastive loss of a known distribution: its value, and the features that minimise it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from contrastive_kernels.diagnostics.common import check_alike, without_autocast
from contrastive_kernels.primitives import checks, compute_dtype

__all__ = ["SpectralOptimum", "normalized_adjacency", "spectral_optimum", "spectral_population_loss"]


class SpectralOptimum(NamedTuple):
    """The minimum of the population loss with k features."""

    loss: Tensor
    """0-dim: minus the sum of the squares of the k largest eigenvalues (singular values)."""
    values: Tensor
    """All eigenvalues (singular values) of the normalised adjacency, the largest first, which is 1."""
    x_features: Tensor
    """(n, k): f(x) of every x; 0 for one of probability 0."""
    y_features: Tensor
    """(m, k): g(y) of every y; the same as x_features where there is one tower."""


def _joint(joint: Tensor, symmetric: bool) -> Tensor:
    """Return the joint distribution in the compute dtype; for one tower, where pairs have no order, symmetrised."""
    checks.features("joint", joint)
    if 0 in joint.shape:
        raise ValueError(f"joint {checks.shape(joint)} has no entries")
    if symmetric and joint.shape[0] != joint.shape[1]:
        raise ValueError(f"joint {checks.shape(joint)} must be square for one tower; for two pass two_towers=True or g")
    joint = joint.to(compute_dtype(joint))
    return (joint + joint.mT) / 2 if symmetric else joint


def _inverse_root(p: Tensor) -> Tensor:
    """Return 1 / sqrt(p), 0 where p is 0."""
    return p.masked_fill(p == 0, torch.inf).rsqrt()


def _adjacency(joint: Tensor) -> Tensor:
    return _inverse_root(joint.sum(1))[:, None] * joint * _inverse_root(joint.sum(0))


@torch.no_grad()
@without_autocast
def normalized_adjacency(joint: Tensor) -> Tensor:
    r"""The joint distribution of positive pairs, normalised: the matrix that the spectral loss factorises.

    .. math:: \bar A_{xy} = \frac{p(x, y)}{\sqrt{p(x) p(y)}}

    Args:
        joint: ``(n, m)``, p(x, y): not negative, of sum 1. For views of one kind symmetric.

    Returns:
        ``(n, m)``, float32 (float64 for float64 inputs); singular values in [0, 1], the largest 1.

    Raises:
        ValueError, TypeError: joint is not a floating matrix.

    Source: HaoChen, Wei, Gaidon, Ma, NeurIPS 2021.

    Example:
        >>> import torch
        >>> from contrastive_kernels import diagnostics
        >>> diagnostics.normalized_adjacency(torch.eye(4) / 4).diagonal().tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    return _adjacency(_joint(joint, symmetric=False))


@without_autocast
def spectral_population_loss(joint: Tensor, f: Tensor, g: Tensor | None = None) -> Tensor:
    r"""The spectral contrastive loss of a whole distribution. Differentiable.

    .. math:: L = -2 \sum_{xy} p(x, y) \langle f_x, g_y \rangle + \sum_{xy} p(x) p(y) \langle f_x, g_y \rangle^2
        = \lVert \bar A - F G^T \rVert_F^2 - \lVert \bar A \rVert_F^2

    with the rows :math:`\sqrt{p(x)} f_x` of F and likewise G. With one tower a pair has no order: :math:`p(x, y)` is
    the symmetric part of the joint distribution.

    Args:
        joint: ``(n, m)``, the distribution of positive pairs; square with one tower.
        f: ``(n, k)``, the features of every x.
        g: ``(m, k)``, those of every y; None: f, one tower.

    Returns:
        0-dim, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit.
        TypeError: dtypes that differ or are not floating.

    Source: HaoChen, Wei, Gaidon, Ma, NeurIPS 2021.

    Example:
        >>> import torch
        >>> from contrastive_kernels import diagnostics
        >>> round(diagnostics.spectral_population_loss(torch.eye(2) / 2, torch.eye(2) * 2**0.5).item(), 4)
        -2.0
    """
    joint = _joint(joint, symmetric=g is None)
    g, g_name = (f, "f") if g is None else (g, "g")
    for name, features, n in (("f", f, joint.shape[0]), (g_name, g, joint.shape[1])):
        checks.features(name, features)
        if features.shape[0] != n:
            raise ValueError(f"{name} {checks.shape(features)} must have {n} rows, as joint {checks.shape(joint)} says")
        checks.same_device(name, features, joint)
    check_alike("f", f, g_name, g, rows=False)
    dtype = torch.promote_types(joint.dtype, compute_dtype(f))
    joint, similarity = joint.to(dtype), f.to(dtype) @ g.to(dtype).mT
    independent = joint.sum(1)[:, None] * joint.sum(0)
    return (independent * similarity.square() - 2 * joint * similarity).sum()


@torch.no_grad()
@without_autocast
def spectral_optimum(joint: Tensor, k: int, *, two_towers: bool = False) -> SpectralOptimum:
    r"""The minimum of `spectral_population_loss` over all features of dimension k, for small distributions.

    .. math:: \min L = -\sum_{i=1}^{k} \lambda_i^2, \qquad F = U_k \Lambda_k^{1/2}, \quad f_x = F_x / \sqrt{p(x)}

    Args:
        joint: ``(n, m)``, the distribution of positive pairs; with one tower square, and its symmetric part counts.
        k: the dimension of the features, at most n and m.
        two_towers: x and y are of two kinds, with encoders of their own.

    Returns:
        `SpectralOptimum`, float32 (float64 for float64 inputs: advisable). An eigenvalue below 0, which no augmentation
        gives, counts as 0. NaN if the normalised adjacency is not finite.

    Raises:
        ValueError: joint is not square for one tower, k out of range.
        TypeError: joint is not floating or k no integer.

    Source: HaoChen, Wei, Gaidon, Ma, NeurIPS 2021.

    Example:
        >>> import torch
        >>> from contrastive_kernels import diagnostics
        >>> diagnostics.spectral_optimum(torch.eye(4) / 4, 2).loss.item()
        -2.0
    """
    joint = _joint(joint, symmetric=not two_towers)
    k = checks.count("k", k)
    if k > min(joint.shape):
        raise ValueError(f"k {k} is more than joint {checks.shape(joint)} has rows or columns")
    adjacency = _adjacency(joint)
    # The decompositions raise for NaN.
    broken = ~adjacency.isfinite().all()
    adjacency = adjacency.masked_fill(broken, 0)
    if two_towers:
        left, values, right = torch.linalg.svd(adjacency, full_matrices=False)
        right = right.mT
    else:
        values, left = torch.linalg.eigh(adjacency)
        values, left = values.flip(0), left.flip(1)
        right = left
    kept = values[:k].clamp(min=0)
    x_features = _inverse_root(joint.sum(1))[:, None] * left[:, :k] * kept.sqrt()
    y_features = _inverse_root(joint.sum(0))[:, None] * right[:, :k] * kept.sqrt()
    found = (-kept.square().sum(), values, x_features, y_features)
    return SpectralOptimum(*(x.masked_fill(broken, torch.nan) for x in found))
