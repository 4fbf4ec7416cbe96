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
)
from contrastive_kernels.primitives import checks

__all__ = ["adversarial_radius"]


@torch.no_grad()
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
    :math:`x \mapsto f(x)`. **The form "notes" is no certificate**: the difference of two scores changes up to
    :math:`\lVert \bar f_i - \bar f_j \rVert \le 2` times as fast as f, so the form is too large by up to that factor.

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
        >>> x, means = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> adversarial_radius(x, torch.tensor([0]), means, lipschitz=1.0).tolist()
        [1.0]
    """
    checks.features("features", features)
    labels = check_labels(labels, features)
    check_means(means, features)
    checks.choice("bound", bound, ("certified", "notes"))
    checks.positive("lipschitz", lipschitz)
    features, means = wide_rows(features, normalize), wide_rows(means, normalize_means)
    index, known = class_index(labels, len(means))
    radius = features.new_empty(len(features))
    for rows in chunks(len(features), len(means)):
        own = index[rows, None]
        scores = features[rows] @ means.mT
        gaps = scores.gather(1, own) - scores
        if bound == "certified":
            speeds = torch.cdist(means[index[rows]], means, compute_mode="donot_use_mm_for_euclid_dist")
            gaps = torch.where((gaps == 0) & (speeds == 0), torch.zeros_like(gaps), gaps / speeds)
        radius[rows] = gaps.scatter(1, own, torch.inf).amin(1) / lipschitz
    radius = radius.masked_fill(~known, torch.nan)
    return radius.clamp(min=0) if clamp else radius
