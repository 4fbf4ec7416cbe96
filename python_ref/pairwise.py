"""Sums over pairs of rows: SigLIP and the triplet hinges."""

from __future__ import annotations

import torch

from .dense import below, different, reduced, scale_of, softmax_statistics, threshold, unit_rows


def others(count, ids, device):
    """Mask of the pairs i != j whose ids differ."""
    kept = ~torch.eye(count, dtype=torch.bool, device=device)
    return kept if ids is None else kept & different(ids, ids)


def softplus(x):
    """``log(1 + e^x)``."""
    return torch.logaddexp(x, torch.zeros_like(x))


def siglip_loss(
    image_features,
    text_features,
    logit_scale=None,
    logit_bias=None,
    *,
    temperature=None,
    negative_only=False,
    normalize=False,
    reduction="mean",
    weight=None,
    ids=None,
    cutoff=None,
    cutoff_margin=None,
    return_stats=False,
):
    """``1/N sum_ij softplus(-z_ij (a s_ij + b))``, z = 1 on the diagonal (-1 with negative_only), -1 elsewhere.

    Source: Zhai et al. 2023, arXiv:2303.15343.
    """
    similarity = unit_rows(image_features, normalize) @ unit_rows(text_features, normalize).mT
    logits = scale_of(temperature, logit_scale) * similarity + (0.0 if logit_bias is None else logit_bias)
    positive, count, device = similarity.diagonal(), len(similarity), similarity.device
    kept = torch.ones_like(similarity, dtype=torch.bool) if negative_only else others(count, ids, device)
    kept = kept & below(similarity, threshold(positive, cutoff, cutoff_margin))
    rows = softplus(logits).masked_fill(~kept, 0.0).sum(1)
    if not negative_only:
        rows = rows + softplus(-logits.diagonal())
    loss = reduced(rows, reduction, weight)
    if not return_stats:
        return loss
    return loss, softmax_statistics(logits.diagonal(), logits.diagonal()[:, None], logits, kept)


def distance(similarity):
    """``sqrt(2 - 2 s)``, at least 1e-6."""
    return (2 - 2 * similarity).clamp(min=1e-12).sqrt()


def distance_hinge(similarity, margin):
    """``max(0, margin - d)``, gradient 0 at the kink; margin a number or one per row."""
    if torch.is_tensor(margin) and margin.dim() == 1:
        margin = margin[:, None]
    return torch.relu(margin - distance(similarity))


def hardest(closeness, kept):
    """Largest kept entry of each row, the first on a tie; -inf where nothing is kept."""
    masked = closeness.masked_fill(~kept, -torch.inf)
    return masked.gather(1, masked.detach().argmax(1, keepdim=True))[:, 0]


def triplet_margin_loss(
    anchor,
    positive,
    *,
    margin=0.2,
    mining="all",
    metric="similarity",
    normalize=True,
    reduction="mean",
    weight=None,
    ids=None,
):
    """``[m - c_ii + c_ij]_+`` of all j != i or of the closest both ways; closeness c = s or -sqrt(2 - 2 s).

    ``mean``: over the kept pairs (hardest: the anchors); ``nonzero_mean``: over the hinges above 0; ``none``: row sums.

    Source: Schroff et al. 2015; Faghri et al. 2018.
    """
    closeness = unit_rows(anchor, normalize) @ unit_rows(positive, normalize).mT
    closeness = -distance(closeness) if metric == "euclidean" else closeness
    kept = others(len(closeness), ids, closeness.device)
    own = closeness.diagonal()
    if mining == "all":
        hinges = torch.relu(margin - own[:, None] + closeness).masked_fill(~kept, 0.0)
    else:
        hinges = torch.stack([hardest(closeness, kept), hardest(closeness.mT, kept)], 1) - own[:, None]
        hinges = torch.relu(margin + hinges.masked_fill(~kept.any(1, keepdim=True), -torch.inf))
    rows = hinges.sum(1)
    if reduction in ("sum", "none") or (mining == "hardest" and reduction == "mean"):
        return reduced(rows, reduction, weight)
    counts = ((hinges > 0) if reduction == "nonzero_mean" else kept).sum(1).to(rows)
    weight = torch.ones_like(rows) if weight is None else weight
    number = (weight * counts).sum()
    return (weight * rows).sum() / torch.where(number == 0, 1.0, number)
