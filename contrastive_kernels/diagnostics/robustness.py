"""How far an input may move before the class-mean classifier changes its mind."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from contrastive_kernels.diagnostics.common import (
    check_labels,
    check_means,
    chunks,
    class_index,
    wide_rows,
    without_autocast,
)
from contrastive_kernels.primitives import checks

__all__ = ["adversarial_radius"]


@torch.no_grad()
@without_autocast
def adversarial_radius(
    features: Tensor,
    labels: Tensor,
    means: Tensor,
    *,
    lipschitz: float,
    bound: Literal["certified", "notes"] = "certified",
    clamp: bool = False,
    normalize: bool = True,
    normalize_means: bool = True,
) -> Tensor:
    r"""Radius around each input within which the class-mean classifier keeps the correct class i.

    .. math:: \rho(x) = \min_{j \ne i} \frac{c_i(x) - c_j(x)}{\lVert \bar f_i - \bar f_j \rVert G}
        \quad \text{(certified)}, \qquad \rho(x) = \frac{c_i(x) - \max_{j \ne i} c_j(x)}{G} \quad \text{(notes)}

    with the scores :math:`c_k(x) = \langle \bar f_k, f(x) \rangle` and G the Lipschitz constant of
    :math:`x \mapsto f(x)`. Gaps are products with differences of means, so that close means keep their digits; between
    equal means 0 / 0 counts as 0, for nothing tells the two classes apart. **The form "notes" is no certificate**: the
    difference of two scores changes up to :math:`\lVert \bar f_i - \bar f_j \rVert \le 2` times as fast as f, so the
    form is too large by up to that factor.

    Args:
        features: ``(N, D)``.
        labels: ``(N,)`` integers, the correct classes.
        means: ``(K, D)``, of `class_means`.
        lipschitz: G, positive, of the map to the features as they enter the scores (normalisation included).
        bound: ``"certified"`` or ``"notes"``.
        clamp: 0 instead of a negative value.
        normalize: features to unit norm first.
        normalize_means: means to unit norm first.

    Returns:
        ``(N,)``, float32 (float64 for float64 inputs); negative for a sample that is misclassified, inf with a single
        class, NaN for a label that is no class.

    Raises:
        ValueError: shapes that do not fit, an unknown bound, lipschitz not positive.
        TypeError: dtypes that differ or are not floating (labels: not integer).

    Example:
        >>> import torch
        >>> from contrastive_kernels import diagnostics
        >>> x, means = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> diagnostics.adversarial_radius(x, torch.tensor([0]), means, lipschitz=1.0).tolist()
        [1.0]
    """
    checks.features("features", features)
    labels = check_labels(labels, features)
    check_means(means, features)
    checks.choice("bound", bound, ("certified", "notes"))
    lipschitz = checks.positive("lipschitz", lipschitz)
    features, means = wide_rows(features, normalize), wide_rows(means, normalize_means)
    index, known = class_index(labels, len(means))
    radius = features.new_empty(len(features))
    # A class at a time: its samples share the differences of means, and one product has all their gaps.
    samples = index.argsort(stable=True).split(index.bincount(minlength=len(means)).tolist())
    for own, of_class in enumerate(samples):
        if not len(of_class):
            continue
        differences = means[own] - means
        speeds = torch.linalg.vector_norm(differences, dim=1)
        for part in chunks(len(of_class), max(means.shape)):
            rows = of_class[part]
            gaps = features[rows] @ differences.mT
            if bound == "certified":
                gaps = gaps / speeds.masked_fill(speeds == 0, torch.inf)
            radius[rows] = gaps.index_fill(1, index.new_tensor([own]), torch.inf).amin(1) / lipschitz
    radius = radius.masked_fill(~known, torch.nan)
    return radius.clamp(min=0) if clamp else radius
