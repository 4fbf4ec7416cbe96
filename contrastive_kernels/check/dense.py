"""Every loss in a few lines of plain PyTorch, with its N x N matrix: what the package's losses are checked against.

Products are made in the dtype of the rows; what follows is float32 at least, as under autocast. A function has the
name of its loss and returns the losses of all anchors, or the one value of a loss without anchors.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# The parts


def wide(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x: Tensor, normalize: bool = True) -> Tensor:
    """Return rows of norm 1, or the rows as they are."""
    return F.normalize(x, dim=-1) if normalize else x


def products(x: Tensor, y: Tensor) -> Tensor:
    """Return (N, M), the similarity of every row of x to every row of y."""
    return wide(x @ y.mT)


def dots(x: Tensor, y: Tensor) -> Tensor:
    """Return the similarities of paired rows."""
    return wide((x * y).sum(-1))


def squared_distances(z: Tensor) -> Tensor:
    """Return (N, N), the squared distances of all rows."""
    s = products(z, z)
    return s.diagonal()[:, None] + s.diagonal() - 2 * s


def same(ids: Tensor | None, n: int, views: int = 1) -> Tensor:
    """Return which pairs have equal ids, or without ids are of one sample; views stand one after the other."""
    ids = (torch.arange(n) if ids is None else ids).repeat(views)
    return ids[:, None] == ids


def oneself(s: Tensor) -> Tensor:
    """Return which pairs are a row with itself."""
    return torch.eye(len(s), dtype=torch.bool)


def lse(logits: Tensor, kept: Tensor) -> Tensor:
    """Return the log-sum-exp of the kept logits of every row."""
    return logits.masked_fill(~kept, -math.inf).logsumexp(1)


def mean(x: Tensor, kept: Tensor) -> Tensor:
    """Return the mean of the kept entries of every row, 0 without any."""
    return x.masked_fill(~kept, 0).sum(1) / kept.sum(1).clamp(min=1)


def softmax(positives: Tensor, negatives: Tensor, kept: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the mean cross entropy of the positives (N, K) among themselves and the kept negatives."""
    logits = torch.cat([positives, negatives], 1)
    kept = torch.cat([torch.ones_like(positives, dtype=torch.bool), kept], 1)
    target = positives.mean(1)
    return lse(logits, kept) - target + smoothing * (target - mean(logits, kept))


def rows_of_views(views: Tensor, normalize: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return of views (N, V, D) all similarities, those of every row to its other views, and which are of one sample.

    The V * N rows are those of the first view, then of the second.
    """
    n, v = views.shape[:2]
    z = unit(views, normalize).transpose(0, 1).flatten(0, 1)
    s, own = products(z, z), same(None, n, v)
    return s, s[own & ~oneself(s)].view(v * n, v - 1), own


def band(s: Tensor, lower: float, upper: float) -> Tensor:
    """Return how far inside the band the distances are."""
    distance = (1 - s) / 2
    return ((distance - lower) * (upper - distance)).relu()


# Candidate softmax


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    logit_scale: Tensor,
    in_batch_negatives: bool = False,
    symmetric: bool = False,
    negative_mode: str = "unpaired",
    query_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    normalize: bool = True,
    guide: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    x, y = unit(query, normalize), unit(positive_key, normalize)
    own, s, kept = dots(x, y)[:, None], [], []
    if negative_keys is None or in_batch_negatives:
        s, kept = [products(x, y)], [~same(query_ids, len(x))]
        if guide is not None:
            kept[0] &= products(*guide) <= dots(*guide)[:, None]
    if negative_keys is not None:
        further = unit(negative_keys, normalize)
        s.append(products(x, further) if negative_mode == "unpaired" else dots(x[:, None], further))
        kept.append(torch.ones_like(s[-1], dtype=torch.bool))
    candidates, allowed = torch.cat(s, 1), torch.cat(kept, 1)
    directions = [(candidates, allowed), (candidates.mT, allowed.mT)][: 1 + symmetric]
    losses = [softmax(logit_scale * own, logit_scale * part, kept, label_smoothing) for part, kept in directions]
    return torch.stack(losses) if symmetric else losses[0]


def nt_xent(
    z0: Tensor,
    z1: Tensor | None = None,
    *,
    logit_scale: Tensor,
    ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    normalize: bool = True,
) -> Tensor:
    views = z0 if z1 is None else torch.stack([z0, z1], 1)
    s, positives, _ = rows_of_views(views, normalize)
    return softmax(logit_scale * positives, logit_scale * s, ~same(ids, *views.shape[:2]), label_smoothing)


def clip(
    image_features: Tensor,
    text_features: Tensor,
    *,
    logit_scale: Tensor,
    logit_bias: Tensor | float = 0.0,
    ids: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    x, y = unit(image_features, normalize), unit(text_features, normalize)
    logits, dropped = logit_scale * products(x, y) + logit_bias, same(ids, len(x)) & ~same(None, len(x))
    target = torch.arange(len(x))
    directions = [(logits, dropped), (logits.mT, dropped.mT)]
    return torch.stack(
        [F.cross_entropy(u.masked_fill(out, -math.inf), target, reduction="none") for u, out in directions]
    )


def moco(query: Tensor, key: Tensor, queue: Tensor, *, logit_scale: Tensor) -> Tensor:
    return info_nce(query, key, queue, logit_scale=logit_scale)


def least(similarities: Tensor) -> Tensor:
    """Return the least similarity of every row, the first of equals."""
    return similarities.min(1).values


def arcl(
    views: Tensor, *, logit_scale: Tensor, positive: str = "min", denominator: str = "two_view", normalize: bool = True
) -> Tensor:
    v = views.shape[1]
    views = unit(views, normalize)
    j, k = torch.triu_indices(v, v, 1)
    pairs = wide(views @ views.mT)[:, j, k]
    aligned = logit_scale * (least(pairs) if positive == "min" else pairs.mean(1))
    one, two = (logit_scale * products(views[:, 0], views[:, view]) for view in (0, 1))
    if denominator == "one_view":
        return lse(one, ~oneself(one)) - aligned
    return lse(torch.cat([two, one], 1), torch.cat([oneself(two) | True, ~oneself(one)], 1)) - aligned


def moco_arcl(query: Tensor, keys: Tensor, queue: Tensor, *, logit_scale: Tensor, normalize: bool = True) -> Tensor:
    query, keys, queue = (unit(x, normalize) for x in (query, keys, queue))
    positive = least(dots(query[:, None], keys))
    s = products(query, queue)
    return softmax(logit_scale * positive[:, None], logit_scale * s, torch.ones_like(s, dtype=torch.bool))


def decoupled(
    z0: Tensor, z1: Tensor, *, logit_scale: Tensor, positive_weight: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    s, positives, own = rows_of_views(torch.stack([z0, z1], 1))
    share = 1.0 if positive_weight is None else wide(torch.cat(positive_weight))
    return lse(logit_scale * s, ~own) - share * (logit_scale * positives.squeeze(1))


def nnclr(z: Tensor, predictions: Tensor, support: Tensor, *, logit_scale: Tensor, normalize: bool) -> Tensor:
    z, predictions, support = (unit(x, normalize) for x in (z, predictions, support))
    return info_nce(support[products(z, support).argmax(1)], predictions, logit_scale=logit_scale, normalize=False)


def false_negative(
    z0: Tensor,
    z1: Tensor,
    *,
    logit_scale: Tensor,
    mode: str,
    threshold: float | None,
    top_k: int | None,
    normalize: bool,
) -> Tensor:
    s, positives, own = rows_of_views(torch.stack([z0, z1], 1), normalize)
    others = s.detach().masked_fill(own, -math.inf)
    false = others > (-math.inf if threshold is None else threshold)
    if top_k is not None:
        false &= others >= others.topk(min(top_k, len(s)), 1).values[:, -1:]
    if mode == "eliminate":
        return 2 * softmax(logit_scale * positives, logit_scale * s, ~own & ~false)
    pulled = mean(s, false | (own & ~oneself(s)))
    return 2 * (lse(logit_scale * s, ~oneself(s)) - logit_scale * pulled)


def easy_negative(
    query: Tensor,
    positive_key: Tensor,
    *,
    logit_scale: Tensor,
    normalize: bool,
    select: str,
    k: int | None = None,
    threshold: float = 0.0,
) -> Tensor:
    s = products(unit(query, normalize), unit(positive_key, normalize))
    others = s.detach().masked_fill(oneself(s), math.inf)
    kept = others <= threshold
    if k is not None:
        kept = others <= others.topk(min(k, len(s)), 1, largest=False).values[:, -1:]
    return softmax(logit_scale * s.diagonal()[:, None], logit_scale * s, kept & ~oneself(s))


def quick_thoughts(first: Tensor, second: Tensor, *, context_size: int) -> Tensor:
    s = products(first, second)
    s = s.masked_fill(oneself(s), 0)
    rows = torch.arange(len(s))
    near = (rows[:, None] - rows).abs() <= context_size
    return s.logsumexp(1) - mean(s, near & ~oneself(s))


# Classes


def sup_con(
    features: Tensor,
    labels: Tensor,
    contrast_features: Tensor | None = None,
    contrast_labels: Tensor | None = None,
    exclude: Tensor | None = None,
    *,
    logit_scale: Tensor,
    positives: str,
) -> Tensor:
    n, v = features.shape[:2]
    if contrast_features is None or contrast_labels is None or exclude is None:
        s, _, of_sample = rows_of_views(features)
        alike, itself = of_sample | (same(labels, n, v) & (labels >= 0).repeat(v)), oneself(s)
    else:
        s = products(unit(features).transpose(0, 1).flatten(0, 1), unit(contrast_features))
        alike = ((labels[:, None] == contrast_labels) & (labels >= 0)[:, None]).repeat(v, 1)
        itself = exclude.repeat(v)[:, None] == torch.arange(len(contrast_labels))
    logits = logit_scale * s
    others = alike & ~itself
    alone = ~others.any(1)
    if positives == "pairwise":
        losses = mean(torch.logaddexp(logits, lse(logits, ~alike & ~itself)[:, None]) - logits, others)
    else:
        # without positives, of anything: the loss is 0
        among = lse(logits, others | alone[:, None])
        pulled = mean(logits, others) if positives == "out" else among - others.sum(1).clamp(min=1).to(s.dtype).log()
        losses = lse(logits, ~itself) - pulled
    return losses.masked_fill(alone, 0)


def label_pull(
    z: Tensor, labels: Tensor, label_embeddings: Tensor, *, form: str, logit_scale: Tensor | float = 1.0
) -> Tensor:
    s, known = products(unit(z), unit(label_embeddings)), labels >= 0
    target = labels.clamp(min=0)
    if form == "pull":
        return (1 - s.gather(1, target[:, None]).squeeze(1)) * known
    return F.cross_entropy(logit_scale * s, target, reduction="none") * known


# Corrected negatives


def hard_negative(z0: Tensor, z1: Tensor, *, logit_scale: Tensor, tau_plus: float, beta: float) -> Tensor:
    s, positives, own = rows_of_views(torch.stack([z0, z1], 1))
    logits, positive, number = logit_scale * s, (logit_scale * positives.squeeze(1)).exp(), len(s) - 2
    exponentials = logits.exp().masked_fill(own, 0)
    weights = (beta * logits).exp().masked_fill(own, 0)
    weighted = number * (weights * exponentials).sum(1) / weights.sum(1)
    corrected = (weighted - tau_plus * number * positive) / (1 - tau_plus)
    corrected = torch.maximum(corrected, number * (-logit_scale).exp())
    return torch.log1p(corrected / positive)


def debiased(z0: Tensor, z1: Tensor, *, logit_scale: Tensor, tau_plus: float) -> Tensor:
    return hard_negative(z0, z1, logit_scale=logit_scale, tau_plus=tau_plus, beta=0.0)


# Sums over pairs


def siglip(
    image_features: Tensor,
    text_features: Tensor,
    *,
    logit_scale: Tensor,
    logit_bias: Tensor,
    ids: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    s = products(unit(image_features, normalize), unit(text_features, normalize))
    logits = logit_scale * s + logit_bias
    repelled = F.softplus(logits).masked_fill(same(ids, len(s)), 0).sum(1)
    return repelled + F.softplus(-logits.diagonal())


def distance_polarization(z: Tensor, *, lower: float, upper: float, normalize: bool) -> Tensor:
    s = products(unit(z, normalize), unit(z, normalize))
    return band(s, lower, upper).masked_fill(oneself(s), 0).sum(1)


def lmcl(
    first: Tensor,
    second: Tensor,
    *,
    logit_scale: Tensor,
    lower: float,
    upper: float,
    share: float,
    normalize: bool,
) -> Tensor:
    s, _, own = rows_of_views(torch.stack([first, second], 1), normalize)
    polarization = share * mean(band(s, lower, upper), ~own)
    return nt_xent(first, second, logit_scale=logit_scale, normalize=normalize) + polarization


def spectral_contrastive(z0: Tensor, z1: Tensor, *, method: str = "auto") -> Tensor:
    s = products(z0, z1)
    return mean(s.square(), ~oneself(s)) - 2 * s.diagonal()


def triplet_margin(
    anchor: Tensor, positive: Tensor, *, margin: Tensor, mining: str, metric: str, normalize: bool
) -> Tensor:
    s = products(unit(anchor, normalize), unit(positive, normalize))
    gap = s - s.diagonal()[:, None]
    back = s.mT - s.diagonal()[:, None]
    if metric == "euclidean":
        distance = (2 - 2 * s).clamp(min=1e-12).sqrt()  # rounding may give more than 1
        gap, back = (distance.diagonal()[:, None] - d for d in (distance, distance.mT))
    if mining == "all":
        return (margin + gap).relu().masked_fill(oneself(s), 0).sum(1)
    hardest = [x.masked_fill(oneself(s), -math.inf).max(1).values for x in (gap, back)]
    return (margin + hardest[0]).relu() + (margin + hardest[1]).relu()


def uniformity(z: Tensor, *, t: Tensor) -> Tensor:
    z = wide(z)
    distances = torch.pdist(z).square()
    return (-t * distances).logsumexp(0) - math.log(len(distances))


def t_simclr(z0: Tensor, z1: Tensor, *, temperature: Tensor, df: float) -> Tensor:
    n, z = len(z0), wide(torch.cat([z0, z1]))
    q = (1 + squared_distances(z) / (temperature * df)).log()
    exponent = (df + 1) / 2
    return exponent * q.diagonal(n)[:n].mean() + (-exponent * q)[~oneself(q)].logsumexp(0)


# Moments and views


def barlow_twins(z0: Tensor, z1: Tensor, *, lambd: Tensor, std_eps: float | None = None) -> Tensor:
    columns = []
    for z in (wide(z0), wide(z1)):
        variance = z.var(0, correction=0)
        deviation = (variance + 1e-5).sqrt() if std_eps is None else variance.sqrt() + std_eps
        columns.append((z - z.mean(0)) / deviation)
    c = columns[0].mT @ columns[1] / len(z0)
    return (1 - c.diagonal()).square().sum() + lambd * c.masked_fill(oneself(c), 0).square().sum()


def vicreg(z0: Tensor, z1: Tensor, *, sim_weight: Tensor, var_weight: Tensor, cov_weight: Tensor) -> Tensor:
    if z0.dim() > 2:
        weights = {"sim_weight": sim_weight, "var_weight": var_weight, "cov_weight": cov_weight}
        return torch.stack([vicreg(x, y, **weights) for x, y in zip(z0.unbind(1), z1.unbind(1), strict=True)]).mean()
    views, d = (wide(z0), wide(z1)), z0.shape[1]
    losses = sim_weight * F.mse_loss(*views)
    for x in views:
        covariance = x.mT.cov().view(d, d)
        losses = losses + var_weight / 2 * (1 - (x.var(0) + 1e-4).sqrt()).relu().mean()
        losses = losses + cov_weight * covariance.masked_fill(oneself(covariance), 0).square().sum() / d
    return losses


def simsiam(p0: Tensor, z0: Tensor, p1: Tensor, z1: Tensor) -> Tensor:
    return -(wide(unit(p0)) * wide(unit(z1)) + wide(unit(p1)) * wide(unit(z0))).sum(1) / 2


def byol(p0: Tensor, z0: Tensor, p1: Tensor, z1: Tensor) -> Tensor:
    return (wide(unit(p0)) - wide(unit(z1))).square().sum(1) + (wide(unit(p1)) - wide(unit(z0))).square().sum(1)


def view_distances(views: Tensor) -> Tensor:
    """Return (N, V (V - 1) / 2), the squared distances of the pairs of views."""
    j, k = torch.triu_indices(views.shape[1], views.shape[1], 1)
    return (wide(views[:, j]) - wide(views[:, k])).square().sum(2)


def alignment(views: Tensor) -> Tensor:
    return view_distances(views).mean(1)


def augmentation_robust(views: Tensor) -> Tensor:
    return view_distances(views).max(1).values


# Support vector machines


def mmcl(z0: Tensor, z1: Tensor, *, sigma: Tensor, C: float, reg: float) -> Tensor:
    x, z = wide(unit(z0)), wide(unit(z1))
    n = len(x)
    with torch.no_grad():
        kernel = ((2 * x @ x.mT - 2) / sigma).exp()
        others = (~torch.eye(n, dtype=torch.bool)).nonzero()[:, 1].view(n, n - 1)
        row = kernel.gather(1, others)
        programs = kernel[others[:, :, None], others[:, None]] + 1 - row[:, None] - row[:, :, None]
        twos = torch.full((n, n - 1, 1), 2.0, dtype=x.dtype)
        # positive definite; the LU factorisation of a large batch never ends in torch 2.13 on several threads
        factors = torch.linalg.cholesky(programs + reg * torch.eye(n - 1, dtype=x.dtype))
        alpha = torch.cholesky_solve(twos, factors)[:, :, 0].clamp(0, C)
    s = ((2 * z @ x.mT - 2) / sigma).exp()
    losses: Tensor = (alpha * (s.gather(1, others) - s.diagonal()[:, None])).sum(1)
    return losses
