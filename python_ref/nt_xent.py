"""NT-Xent, the loss of SimCLR."""

from __future__ import annotations

from itertools import combinations

import torch

from ._dense import scale_of, unit_rows
from ._pairs import below, different, threshold
from ._polarization import polarization_term
from ._softmax import softmax_outcome
from ._views import per_anchor, stack_views


def nt_xent_loss(
    z0,
    z1=None,
    *,
    temperature=0.5,
    logit_scale=None,
    multi_view="out",
    normalize=True,
    reduction="mean",
    weight=None,
    label_smoothing=0.0,
    ids=None,
    cutoff=None,
    cutoff_margin=None,
    polarization=None,
    return_stats=False,
):
    """Return ``mean_i (lse_i - mean_p u_ip)``, the lse over all rows but i, p the other views of i's sample.

    ``multi_view="pairs"`` averages the losses of all pairs of views instead.

    Source: Chen et al. 2020, arXiv:2002.05709.
    """
    views, scale = unit_rows(stack_views(z0, z1), normalize), scale_of(temperature, logit_scale)
    count_views, count = views.shape[:2]
    options = {"reduction": reduction, "weight": weight, "label_smoothing": label_smoothing}
    if multi_view == "pairs" and count_views > 2:
        options |= {"ids": ids, "cutoff": cutoff, "cutoff_margin": cutoff_margin, "polarization": polarization}
        pairs = [nt_xent_loss(*pair, logit_scale=scale, normalize=False, **options) for pair in combinations(views, 2)]
        return torch.stack(pairs).mean()

    z = views.flatten(0, 1)
    similarity = z @ z.mT
    instance, view = torch.arange(len(z), device=z.device) % count, torch.arange(len(z), device=z.device) // count
    others = ~different(instance, instance) & different(view, view)
    own = similarity[others].reshape(len(z), count_views - 1)
    kept = different(instance, instance)
    if ids is not None:
        kept = kept & different(ids.repeat(count_views), ids.repeat(count_views))
    thresholds = (per_anchor(value, count, count_views) for value in (cutoff, cutoff_margin))
    kept = kept & below(similarity, threshold(own.mean(1), *thresholds))

    directions = [(scale * own.mean(1), scale * own, scale * similarity, kept)]
    term = None if polarization is None else polarization_term(similarity, kept, polarization, reduction)
    return softmax_outcome(directions, **options, return_stats=return_stats, polarization=term)
