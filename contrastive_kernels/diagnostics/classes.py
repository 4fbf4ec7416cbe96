"""Class means: the classifier they make, how far apart they are, and the bound on its error that follows."""

from __future__ import annotations

from itertools import combinations
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from contrastive_kernels.diagnostics.common import (
    check_labels,
    check_means,
    chunks,
    class_index,
    wide_rows,
)
from contrastive_kernels.primitives import checks

__all__ = [
    "CentreBound",
    "ClassMeans",
    "Classification",
    "augmented_distance",
    "centre_bound",
    "class_means",
    "class_similarity",
    "classify",
]


class ClassMeans(NamedTuple):
    """The mean feature of every class and how many samples it has."""

    means: Tensor
    """(K, D); 0 for a class without samples: drop these rows before classifying, a score of 0 can be the largest."""
    counts: Tensor
    """(K,) int64."""


class Classification(NamedTuple):
    """What a classifier says of every sample."""

    prediction: Tensor
    """(N,) int64; the lowest class on a tie."""
    confidence: Tensor
    """(N,): the largest score."""
    margin: Tensor
    """(N,): the largest score less the second largest; inf with a single class."""


class CentreBound(NamedTuple):
    """The quantities of the bound on the error of the nearest class centre; 0-dim except where said."""

    divergence: Tensor
    """The largest inner product of two class centres, lower is better; -inf with a single class."""
    mean_divergence: Tensor
    """Their mean inner product over pairs of classes."""
    centre_shrinkage: Tensor
    """``1 - min_k |mu_k|^2 / r^2``: how much the samples of a class spread."""
    misaligned: Tensor
    """Fraction of samples two of whose views are more than epsilon apart."""
    rho_max: Tensor
    """``2 (1 - sigma) + misaligned / min_k p_k + sigma (lipschitz delta / r + 2 epsilon / r)``."""
    threshold: Tensor
    """``r^2 (1 - rho_max - sqrt(2 rho_max) - centre_shrinkage / 2)``."""
    holds: Tensor
    """Bool: the divergence is below the threshold, so that the bound holds."""
    error_bound: Tensor
    """``(1 - sigma) + misaligned``: the error of the nearest centre is at most this if the bound holds."""


def _as_views(features: Tensor) -> Tensor:
    """(N, D) as one view each."""
    checks.tensor("features", features)
    if features.dim() == 2:
        checks.features("features", features)
        return features[:, None]
    checks.views("features", features, minimum=1)
    return features


@torch.no_grad()
def class_means(features: Tensor, labels: Tensor, num_classes: int, *, normalize: bool = True) -> ClassMeans:
    """The mean over samples and views of every class, not normalised again.

    Args:
        features: ``(N, D)``, or all views as ``(N, V, D)``.
        labels: ``(N,)`` integers below num_classes; others, such as -1, are left out.
        num_classes: K.
        normalize: rows to unit norm first.

    Returns:
        `ClassMeans`: means ``(K, D)``, float32 (float64 for float64 inputs), and counts ``(K,)``.

    Raises:
        ValueError: features of another shape, labels of another length, no class.
        TypeError: features are not floating or labels are not integers.

    Source: Huang, Yi, Zhao, Jiang, ICLR 2023.

    Example:
        >>> class_means(torch.eye(4), torch.tensor([0, 0, 1, 1]), 2).counts.tolist()
        [2, 2]
    """
    features = _as_views(features)
    labels = check_labels(labels, features)
    checks.count("num_classes", num_classes)
    features = wide_rows(features, normalize).mean(1)
    index, known = class_index(labels, num_classes)
    counts = torch.zeros(num_classes, dtype=torch.int64, device=features.device).index_add(0, index, known.long())
    # A select, not a product: the NaN of a row that is left out is no NaN of the means.
    kept = torch.where(known[:, None], features, torch.zeros_like(features))
    sums = features.new_zeros(num_classes, features.shape[1]).index_add(0, index, kept)
    return ClassMeans(sums / counts.clamp(min=1)[:, None], counts)


@torch.no_grad()
def class_similarity(means: Tensor, *, normalize: bool = True) -> Tensor:
    """The similarity of every pair of class means, K x K: the cosine, or with ``normalize=False`` the inner product.

    Args:
        means: ``(K, D)``, of `class_means`.
        normalize: means to unit norm first.

    Returns:
        ``(K, K)``, float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: means are not a floating (K, D) tensor.

    Example:
        >>> class_similarity(torch.eye(2)).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    checks.features("means", means)
    means = wide_rows(means, normalize)
    return means @ means.mT


@torch.no_grad()
def classify(
    features: Tensor,
    means: Tensor,
    *,
    rule: Literal["similarity", "nearest"] = "similarity",
    normalize: bool = True,
    normalize_means: bool | None = None,
) -> Classification:
    r"""Classifies by the class means, a chunk of samples at a time.

    .. math:: c_k(x) = \langle \bar f_k, f(x) \rangle \quad \text{or} \quad
        c_k(x) = \langle \mu_k, f(x) \rangle - \tfrac12 \lVert \mu_k \rVert^2

    Args:
        features: ``(N, D)``.
        means: ``(K, D)``, of `class_means`.
        rule: ``"similarity"``, the first form; ``"nearest"``, the second, which is the nearest mean.
        normalize: features to unit norm first.
        normalize_means: means to unit norm first; None: for ``"similarity"``, where 1 is then the highest score.

    Returns:
        `Classification`: predicted class, its score and the gap to the second best, each ``(N,)``.

    Raises:
        ValueError: shapes that do not fit or an unknown rule.
        TypeError: dtypes that differ or are not floating.

    Example:
        >>> classify(torch.eye(2), torch.eye(2)).prediction.tolist()
        [0, 1]
    """
    checks.features("features", features)
    check_means(means, features)
    checks.choice("rule", rule, ("similarity", "nearest"))
    features = wide_rows(features, normalize)
    means = wide_rows(means, rule == "similarity" if normalize_means is None else normalize_means)
    offset = means.square().sum(1) / 2 if rule == "nearest" else 0
    parts = [decide(features[rows] @ means.mT - offset) for rows in chunks(len(features), len(means))]
    return joined(parts, features)


def decide(scores: Tensor) -> Classification:
    """The classification that scores (N, K) amount to."""
    confidence, prediction = scores.max(1)
    others = scores.scatter(1, prediction[:, None], -torch.inf)
    return Classification(prediction, confidence, confidence - others.amax(1))


def joined(parts: list[Classification], features: Tensor) -> Classification:
    """The classification of all chunks; empty where there is no sample."""
    if parts:
        return Classification(*(torch.cat(part) for part in zip(*parts, strict=True)))
    nothing = features.new_zeros(0)
    return Classification(nothing.long(), nothing, nothing.clone())


@torch.no_grad()
def centre_bound(
    views: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    sigma: float,
    delta: float,
    lipschitz: float,
    epsilon: float,
    radius: float = 1.0,
    normalize: bool = True,
) -> CentreBound:
    r"""When the nearest class centre classifies well: the divergence of the centres against its threshold.

    .. math:: \max_{k \ne l} \mu_k^T \mu_l < r^2 \Bigl( 1 - \rho_{\max} - \sqrt{2 \rho_{\max}}
        - \tfrac12 \Delta_\mu \Bigr) \implies \mathrm{error} \le (1 - \sigma) + R_\epsilon

    The augmentation is :math:`(\sigma, \delta)`: a part of each class of conditional probability at least sigma has
    augmented distance at most delta. That is the caller's knowledge; `augmented_distance` measures it.

    Args:
        views: ``(N, V, D)``, V >= 2 views of each sample.
        labels: ``(N,)`` integers below num_classes; others, such as -1, are left out.
        num_classes: K.
        sigma: in (0, 1].
        delta: not negative, in units of the input.
        lipschitz: constant of the encoder, not negative.
        epsilon: distance of two views beyond which a sample is misaligned, in units of the feature.
        radius: r, the norm of the features.
        normalize: rows to norm r first; without it they are taken as they are.

    Returns:
        `CentreBound`, float32 (float64 for float64 inputs). Classes without samples are left out; no sample at all
        gives NaN.

    Raises:
        ValueError: shapes that do not fit or a number out of its range.
        TypeError: views are not floating or labels are not integers.

    Source: Huang, Yi, Zhao, Jiang, ICLR 2023.

    Example:
        >>> views = torch.eye(2)[:, None].expand(2, 2, 2)
        >>> bool(centre_bound(views, torch.arange(2), 2, sigma=1.0, delta=0.0, lipschitz=1.0, epsilon=0.0).holds)
        True
    """
    checks.views("views", views)
    labels = check_labels(labels, views)
    checks.count("num_classes", num_classes)
    checks.positive("sigma", sigma)
    if sigma > 1:
        raise ValueError(f"sigma {sigma} is a probability: it must be at most 1")
    for name, value in (("delta", delta), ("lipschitz", lipschitz), ("epsilon", epsilon)):
        checks.positive(name, value, zero=True)
    checks.positive("radius", radius)
    views = wide_rows(views, normalize) * (radius if normalize else 1)
    means, counts = class_means(views, labels, num_classes, normalize=False)
    known = class_index(labels, num_classes)[1]
    total, present = counts.sum().to(views.dtype), counts > 0

    pairs = present[:, None] & present & ~torch.eye(num_classes, dtype=torch.bool, device=views.device)
    products = means @ means.mT
    divergence = products.masked_fill(~pairs, -torch.inf).amax()
    mean_divergence = products.masked_fill(~pairs, 0).sum() / pairs.sum().clamp(min=1)
    norms = means.square().sum(1).masked_fill(~present, torch.inf).amin()
    shrinkage = 1 - norms / radius**2

    misaligned = ((_widest_pair(views) > epsilon) & known).sum() / total
    rarest = counts.masked_fill(~present, torch.iinfo(counts.dtype).max).amin() / total
    rho = 2 * (1 - sigma) + misaligned / rarest + sigma * (lipschitz * delta + 2 * epsilon) / radius
    threshold = radius**2 * (1 - rho - (2 * rho).sqrt() - shrinkage / 2)
    return CentreBound(
        divergence, mean_divergence, shrinkage, misaligned, rho, threshold, divergence < threshold,
        (1 - sigma) + misaligned,
    )  # fmt: skip


def _widest_pair(views: Tensor) -> Tensor:
    """(N,): the largest distance between two views of a sample, from differences, which do not cancel."""
    pairs = combinations(range(views.shape[1]), 2)
    return torch.stack([(views[:, j] - views[:, k]).square().sum(1) for j, k in pairs]).amax(0).sqrt()


@torch.no_grad()
def augmented_distance(first: Tensor, second: Tensor) -> Tensor:
    r"""The distance of samples under augmentation: that of their two nearest views, in input space.

    .. math:: d_A(x, y) = \min_{x' \in A(x),\ y' \in A(y)} \lVert x' - y' \rVert

    Args:
        first: ``(N, V, D)``, the views of N samples, flattened.
        second: ``(N, W, D)``, the views of N others.

    Returns:
        ``(N,)``, float32 (float64 for float64 inputs): row i is the distance of the i-th samples.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: dtypes that differ or are not floating.

    Source: Huang, Yi, Zhao, Jiang, ICLR 2023.

    Example:
        >>> augmented_distance(torch.zeros(3, 2, 4), torch.ones(3, 5, 4)).tolist()
        [2.0, 2.0, 2.0]
    """
    checks.views("first", first, minimum=1)
    checks.views("second", second, minimum=1)
    checks.alike("first", first, "second", second)
    first, second = wide_rows(first, False), wide_rows(second, False)
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist").flatten(1).amin(1)
