"""Class means: the classifier they make, how far apart they are, and the bound on its error that follows."""

from __future__ import annotations

from itertools import combinations
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from contrastive_kernels.diagnostics.common import (
    centre,
    check_alike,
    check_labels,
    check_means,
    chunks,
    class_index,
    first_equal,
    wide_rows,
    without_autocast,
)
from contrastive_kernels.primitives import checks, compute_dtype, row_dot, wide_sums

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

# How `torch.cdist` takes differences, where the square of a binomial would cancel.
EXACT = "donot_use_mm_for_euclid_dist"


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
    """(N,): the largest score less the second largest; inf with a single class, 0 between equal means."""


class CentreBound(NamedTuple):
    """The quantities of the bound on the error of the nearest class centre; 0-dim except where said."""

    divergence: Tensor
    """The largest inner product of two class centres, lower is better; -inf with fewer than two classes."""
    mean_divergence: Tensor
    """Their mean inner product over pairs of classes."""
    centre_shrinkage: Tensor
    """``1 - min_k |mu_k|^2 / r^2``: how much the samples of a class spread."""
    misaligned: Tensor
    """Fraction of samples two of whose views are more than epsilon apart; NaN if a view is."""
    rho_max: Tensor
    """``2 (1 - sigma) + misaligned / min_k p_k + sigma (lipschitz delta / r + 2 epsilon / r)``."""
    threshold: Tensor
    """``r^2 (1 - rho_max - sqrt(2 rho_max) - centre_shrinkage / 2)``."""
    holds: Tensor
    """Bool: the divergence is below the threshold, so that the bound holds; False with NaN. It compares what both are
    below r^2, which rounding leaves apart where the two are close to it."""
    error_bound: Tensor
    """``(1 - sigma) + misaligned``: the error of the nearest centre is at most this if the bound holds."""


def _as_views(features: Tensor) -> Tensor:
    """Return (N, D) as one view each."""
    checks.tensor("features", features)
    if features.dim() == 2:
        checks.features("features", features)
        return features[:, None]
    checks.lists("features", features, 1, "N, V, D")
    return features


@torch.no_grad()
@without_autocast
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
        >>> import torch
        >>> from contrastive_kernels import diagnostics
        >>> diagnostics.class_means(torch.eye(4), torch.tensor([0, 0, 1, 1]), 2).counts.tolist()
        [2, 2]
    """
    features = _as_views(features)
    labels = check_labels(labels, features)
    num_classes = checks.count("num_classes", num_classes)
    features = wide_rows(features, normalize).mean(1)
    index, known = class_index(labels, num_classes)
    counts = torch.zeros(num_classes, dtype=torch.int64, device=features.device).index_add(0, index, known.long())
    return ClassMeans(_mean_over_classes(features, index, known, counts), counts)


def _mean_over_classes(values: Tensor, index: Tensor, known: Tensor, counts: Tensor) -> Tensor:
    """Return the means (K, D) of the values (N, D) whose class is known, summed in the widest dtype."""
    sums = values.new_zeros(len(counts), values.shape[1], dtype=wide_sums(values))
    for rows in chunks(len(values), values.shape[1]):
        # A select, not a product: the NaN of a row that is left out is no NaN of the means.
        sums.index_add_(0, index[rows], values[rows].to(sums.dtype).masked_fill(~known[rows, None], 0))
    return (sums / counts.clamp(min=1)[:, None]).to(values.dtype)


@torch.no_grad()
@without_autocast
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
        >>> import torch
        >>> from contrastive_kernels import diagnostics
        >>> diagnostics.class_similarity(torch.eye(2)).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    checks.features("means", means)
    means = wide_rows(means, normalize)
    return means @ means.mT


@torch.no_grad()
@without_autocast
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
        means: ``(K, D)``, of `class_means`, in float32 for features in half precision too.
        rule: ``"similarity"``, the first form; ``"nearest"``, the second, which is the nearest mean.
        normalize: features to unit norm first.
        normalize_means: means to unit norm first; None: for ``"similarity"``, where 1 is then the highest score.

    Returns:
        `Classification`: predicted class, its score and the gap to the second best, each ``(N,)``. The gap comes from
        the difference of the two means: it keeps its digits for raw rows far from the origin.

    Raises:
        ValueError: shapes that do not fit or an unknown rule.
        TypeError: dtypes that differ or are not floating.

    Example:
        >>> import torch
        >>> from contrastive_kernels import diagnostics
        >>> diagnostics.classify(torch.eye(2), torch.eye(2)).prediction.tolist()
        [0, 1]
    """
    checks.features("features", features)
    check_means(means, features)
    checks.choice("rule", rule, ("similarity", "nearest"))
    features = wide_rows(features, normalize)
    means = wide_rows(means, rule == "similarity" if normalize_means is None else normalize_means)
    return by_means(features, means, nearest=rule == "nearest")


def by_means(features: Tensor, means: Tensor, nearest: bool = False) -> Classification:
    """Return the classification by the largest ``<mean, f>``, with `nearest` less ``|mean|^2 / 2``."""
    equal, origin = first_equal(means), centre(means)
    offsets = means - origin
    parts = []
    for rows in chunks(len(features), max(means.shape)):
        f = features[rows]
        scores = (f - origin if nearest else f) @ offsets.mT - (row_dot(offsets, offsets) / 2 if nearest else 0)
        best, second = top_two(scores)
        parts.append(between(equal[best], equal[second], f, f, means, nearest))
    return joined(parts, features)


def top_two(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best and the second best column of each row, the lower of equals first; the same if there is one."""
    best = scores.max(1).indices
    return best, scores.scatter(1, best[:, None], -torch.inf).max(1).indices


def between(best: Tensor, second: Tensor, f: Tensor, g: Tensor, means: Tensor, nearest: bool = False) -> Classification:
    """Return the classification by the rows f in the best and g in the second best class.

    Their gap is made of differences, which do not cancel; where the scores were too coarse for it, the classes change
    places.
    """
    mean, other = means[best], means[second]
    if nearest:
        gap = row_dot((f - mean) + (f - other), mean - other) / 2
    else:
        gap = row_dot(f, mean - other)
        if f is not g:
            gap = gap + row_dot(f - g, other)
    swapped = (gap < 0) | ((gap == 0) & (second < best))
    prediction = torch.where(swapped, second, best)
    mean = means[prediction]
    confidence = row_dot(f if f is g else torch.where(swapped[:, None], g, f), mean)
    if nearest:
        confidence = confidence - row_dot(mean, mean) / 2
    return Classification(prediction, confidence, gap.abs() if len(means) > 1 else confidence + torch.inf)


def joined(parts: list[Classification], features: Tensor) -> Classification:
    """Return the classification of all chunks; empty where there is no sample."""
    if parts:
        return Classification(*(torch.cat(part) for part in zip(*parts, strict=True)))
    nothing = features.new_zeros(0)
    return Classification(nothing.long(), nothing, nothing.clone())


@torch.no_grad()
@without_autocast
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
        `CentreBound`, float32 (float64 for float64 inputs). Classes without samples are left out; no sample at all, or
        NaN in a labelled one, gives an ``error_bound`` of NaN, which does not hold.

    Raises:
        ValueError: shapes that do not fit or a number out of its range.
        TypeError: views are not floating or labels are not integers.

    Source: Huang, Yi, Zhao, Jiang, ICLR 2023.

    Example:
        >>> import torch
        >>> from contrastive_kernels import diagnostics
        >>> views, labels = torch.eye(2)[:, None].expand(2, 2, 2), torch.arange(2)
        >>> bound = diagnostics.centre_bound(views, labels, 2, sigma=1.0, delta=0.0, lipschitz=1.0, epsilon=0.0)
        >>> bool(bound.holds)
        True
    """
    checks.lists("views", views, 2, "N, V, D")
    labels = check_labels(labels, views)
    num_classes = checks.count("num_classes", num_classes)
    sigma, radius = checks.positive("sigma", sigma), checks.positive("radius", radius)
    if sigma > 1:
        raise ValueError(f"sigma {sigma} is a probability: it must be at most 1")
    delta, lipschitz = checks.positive("delta", delta, zero=True), checks.positive("lipschitz", lipschitz, zero=True)
    epsilon = checks.positive("epsilon", epsilon, zero=True)
    views = wide_rows(views, normalize) * (radius if normalize else 1)
    means, counts = class_means(views, labels, num_classes, normalize=False)
    index, known = class_index(labels, num_classes)
    total, present = counts.sum().to(views.dtype), counts > 0

    pairs = present[:, None] & present & ~torch.eye(num_classes, dtype=torch.bool, device=views.device)
    products = means @ means.mT
    divergence = products.masked_fill(~pairs, -torch.inf).amax()
    mean_divergence = products.masked_fill(~pairs, 0).sum() / pairs.sum().clamp(min=1)
    # r^2 - |mu_k|^2 as the mean square of the distances from mu_k, which does not cancel.
    missing = (views - means[index][:, None]).square().sum(2).mean(1)
    if not normalize:
        norms = torch.linalg.vector_norm(views, dim=2)
        missing = missing + ((radius - norms) * (radius + norms)).mean(1)
    missing = _mean_over_classes(missing[:, None], index, known, counts).squeeze(1)
    shrinkage = missing.masked_fill(~present, -torch.inf).amax() / radius**2

    # A comparison alone would count NaN as aligned.
    widest = _widest_pair(views)
    apart = (widest > epsilon).to(views.dtype).masked_fill(widest.isnan(), torch.nan)
    misaligned = apart.masked_fill(~known, 0).sum() / total
    rarest = counts.masked_fill(~present, torch.iinfo(counts.dtype).max).amin() / total
    rho = 2 * (1 - sigma) + misaligned / rarest + sigma * (lipschitz * delta + 2 * epsilon) / radius
    room = radius**2 * (rho + (2 * rho).sqrt() + shrinkage / 2)
    # r^2 - <mu_k, mu_l> in the same way, to compare with what the threshold is below r^2.
    gaps = (missing[:, None] + missing + torch.cdist(means, means, compute_mode=EXACT).square()) / 2
    return CentreBound(
        divergence, mean_divergence, shrinkage, misaligned, rho, radius**2 - room,
        gaps.masked_fill(~pairs, torch.inf).amin() > room, (1 - sigma) + misaligned,
    )  # fmt: skip


def _widest_pair(views: Tensor) -> Tensor:
    """Return (N,), the largest distance between two views of a sample, from differences, which do not cancel."""
    pairs = combinations(range(views.shape[1]), 2)
    return torch.stack([(views[:, j] - views[:, k]).square().sum(1) for j, k in pairs]).amax(0).sqrt()


@torch.no_grad()
@without_autocast
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
        >>> import torch
        >>> from contrastive_kernels import diagnostics
        >>> diagnostics.augmented_distance(torch.zeros(3, 2, 4), torch.ones(3, 5, 4)).tolist()
        [2.0, 2.0, 2.0]
    """
    checks.lists("first", first, 1, "N, V, D")
    checks.lists("second", second, 1, "N, V, D")
    check_alike("first", first, "second", second)
    nearest = torch.empty(len(first), dtype=compute_dtype(first), device=first.device)
    for rows in chunks(len(first), first.shape[1] * second.shape[1]):
        distances = torch.cdist(wide_rows(first[rows], False), wide_rows(second[rows], False), compute_mode=EXACT)
        nearest[rows] = distances.flatten(1).amin(1)
    return nearest
