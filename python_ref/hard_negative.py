"""The debiased contrastive loss with weighted negatives."""

from __future__ import annotations

import torch

from ._dense import reduce, scale_of
from ._polarization import polarization_term
from ._softmax import softmax_statistics
from ._views import two_view_pairs


def corrected_negatives(logits, positive, kept, scale, tau_plus, beta, detach_weights):
    """Return ``max((R - tau_plus n e^{u_p}) / (1 - tau_plus), n e^{-|a|})`` for n kept negatives; 0 where n = 0.

    R is n times the mean of ``e^u`` with the weights ``e^{beta u}``.
    """
    count = kept.sum(1).to(logits)
    empty = count == 0
    weights = (beta * logits).exp().masked_fill(~kept, 0.0)
    weights = weights.detach() if detach_weights else weights
    total = (weights * logits.exp()).sum(1) / weights.sum(1).masked_fill(empty, 1.0) * count
    estimate = (total - tau_plus * count * positive.exp()) / (1 - tau_plus)
    least = count * torch.exp(-abs(torch.as_tensor(scale).to(logits)))
    return torch.where(estimate >= least, estimate, least).masked_fill(empty, 0.0)


def hard_negative_loss(
    z0,
    z1,
    *,
    temperature=0.5,
    logit_scale=None,
    tau_plus=0.1,
    beta=1.0,
    estimator="hard",
    detach_weights=False,
    normalize=True,
    reduction="mean",
    weight=None,
    ids=None,
    cutoff=None,
    cutoff_margin=None,
    polarization=None,
    return_stats=False,
):
    """Return ``mean_i log(1 + Ng_i / e^{u_ip})``, Ng the corrected sum over the rows of other samples.

    Source: Robinson et al. 2021, arXiv:2010.04592.
    """
    scale = scale_of(temperature, logit_scale)
    similarity, positive, kept = two_view_pairs(z0, z1, normalize, ids, cutoff, cutoff_margin)
    logits, positive = (scale * similarity).masked_fill(~kept, 0.0), scale * positive
    if estimator == "easy":
        negatives = logits.exp().masked_fill(~kept, 0.0).sum(1)
    else:
        negatives = corrected_negatives(logits, positive, kept, scale, tau_plus, beta, detach_weights)
    losses = torch.log1p(negatives * (-positive).exp())
    loss = reduce(losses, reduction, weight)
    if polarization is not None:
        loss = loss + polarization_term(similarity, kept, polarization, reduction)
    if not return_stats:
        return loss
    stats = softmax_statistics(positive, positive[:, None], logits, kept)
    return loss, stats._replace(lse=(losses + positive).detach())
