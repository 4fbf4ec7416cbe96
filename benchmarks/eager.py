"""The losses in plain PyTorch as they are usually written, and two of them by ``F.linear_cross_entropy``.

One function per loss, by its name and in the order of `LOSSES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import contrastive_kernels as ck

TEMPERATURE = 0.1
BAND = ck.Polarization(lower=0.1, upper=0.5, weight=0.1)
# At a temperature of 0.1 the corrected sum of every row would be its lower bound.
TAU_PLUS, BETA, WARM = 0.1, 1.0, 0.5
MARGIN = 0.8  # most hinges are active
CLASSES = 100
LABELS = 1000  # rows of the label embeddings
TOP_K = 10  # false negatives of each row
EASIEST = 64  # kept negatives of each row
MMCL = {"sigma": 50.0, "C": 100.0, "reg": 0.1}


class Unavailable(Exception):
    """Raised when a provider cannot run here or does not compute a loss; the message is the reason."""


def info_nce(query: Tensor, positive_key: Tensor) -> Tensor:
    """Return InfoNCE with in-batch negatives."""
    logits = F.normalize(query, dim=-1) @ F.normalize(positive_key, dim=-1).T / TEMPERATURE
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def _self_similarity(z0: Tensor, z1: Tensor) -> Tensor:
    z = F.normalize(torch.cat([z0, z1]), dim=-1)
    return z @ z.T


def _nt_xent_of(similarity: Tensor) -> Tensor:
    n = len(similarity)
    logits = (similarity / TEMPERATURE).fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, torch.arange(n, device=logits.device).roll(n // 2))


def nt_xent(z0: Tensor, z1: Tensor) -> Tensor:
    """Return NT-Xent, the loss of SimCLR."""
    return _nt_xent_of(_self_similarity(z0, z1))


def clip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Return the loss of CLIP as in OpenAI's and Hugging Face's code: cross entropies of rows and columns."""
    logits = logit_scale * image_features @ text_features.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def siglip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Return the sigmoid loss of SigLIP."""
    logits = logit_scale * image_features @ text_features.T + logit_bias
    sign = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(sign * logits).sum() / len(logits)


def moco(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    """Return the loss of MoCo: the positive against a queue of past keys."""
    query, key, queue = F.normalize(query, dim=-1), F.normalize(key, dim=-1), F.normalize(queue, dim=-1)
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1) / TEMPERATURE
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


def sup_con(features: Tensor, labels: Tensor) -> Tensor:
    """Return the supervised contrastive loss, the mean over positives outside the logarithm as in the official code."""
    z = F.normalize(features.transpose(0, 1).flatten(0, 1), dim=-1)
    logits = (z @ z.T / TEMPERATURE).fill_diagonal_(float("-inf"))
    labels = labels.repeat(features.shape[1])
    positive = (labels[:, None] == labels).fill_diagonal_(False)
    log_probability = logits - logits.logsumexp(1, keepdim=True)
    return -(log_probability.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()


def _split_logits(z0: Tensor, z1: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the logits of the positives, (2N,), and of the negatives, (2N, 2N) with -inf within a sample."""
    logits = _self_similarity(z0, z1) / temperature
    rows = torch.arange(len(logits), device=logits.device)
    positive = logits[rows, rows.roll(len(z0))]
    return positive, logits.masked_fill((rows % len(z0))[:, None] == rows % len(z0), float("-inf"))


def _corrected_loss(positive: Tensor, total: Tensor, count: int) -> Tensor:
    """Return the loss from the sum over the negatives, corrected for the positives among them."""
    positive = positive.exp()
    corrected = (total - TAU_PLUS * count * positive) / (1 - TAU_PLUS)
    corrected = corrected.clamp(min=count * math.exp(-1 / WARM))
    return -(positive / (positive + corrected)).log().mean()


def debiased(z0: Tensor, z1: Tensor) -> Tensor:
    """Return the debiased contrastive loss."""
    positive, negatives = _split_logits(z0, z1, WARM)
    return _corrected_loss(positive, negatives.exp().sum(1), 2 * len(z0) - 2)


def hard_negative(z0: Tensor, z1: Tensor) -> Tensor:
    """Return the debiased loss with negatives weighted by their hardness."""
    positive, negatives = _split_logits(z0, z1, WARM)
    exponentials, weights = negatives.exp(), (BETA * negatives).exp()
    count = 2 * len(z0) - 2
    return _corrected_loss(positive, count * (weights * exponentials).sum(1) / weights.sum(1), count)


def decoupled(z0: Tensor, z1: Tensor) -> Tensor:
    """Return the decoupled contrastive loss, without the positive in the denominator."""
    positive, negatives = _split_logits(z0, z1, TEMPERATURE)
    return (negatives.logsumexp(1) - positive).mean()


def nnclr(z: Tensor, predictions: Tensor, support: Tensor) -> Tensor:
    """Return one direction of NNCLR: InfoNCE of the support rows nearest to one view and the other's predictions."""
    z, predictions, support = (F.normalize(x, dim=-1) for x in (z, predictions, support))
    nearest = support[(z @ support.T).argmax(1)]
    logits = nearest @ predictions.T / TEMPERATURE
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def false_negative(z0: Tensor, z1: Tensor) -> Tensor:
    """Return NT-Xent without the most similar negatives of each row."""
    similarity = _self_similarity(z0, z1)
    rows = torch.arange(len(similarity), device=similarity.device) % len(z0)
    others = similarity.detach().masked_fill(rows[:, None] == rows, float("-inf"))
    return _nt_xent_of(similarity.scatter(1, others.topk(TOP_K, 1).indices, float("-inf")))


def easy_negative(query: Tensor, positive_key: Tensor) -> Tensor:
    """Return InfoNCE against the least similar keys of each row."""
    similarity = F.normalize(query, dim=-1) @ F.normalize(positive_key, dim=-1).T
    itself = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    easiest = similarity.masked_fill(itself, float("inf")).topk(EASIEST, 1, largest=False).values
    logits = torch.cat([similarity.diagonal()[:, None], easiest], 1) / TEMPERATURE
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


def quick_thoughts(first: Tensor, second: Tensor) -> Tensor:
    """Return the loss of Quick-Thoughts: the neighbours of a sentence are its targets, its own logit is 0."""
    logits = (first @ second.T).fill_diagonal_(0)
    neighbours = torch.ones(len(first) - 1, device=first.device)
    target = torch.diag(neighbours, 1) + torch.diag(neighbours, -1)
    return F.cross_entropy(logits, target / target.sum(1, keepdim=True))


def arcl(views: Tensor) -> Tensor:
    """Return ArCL on SimCLR: the positive is the least similar pair of views, the denominator has the first two."""
    views = F.normalize(views, dim=-1)
    first, second = torch.triu_indices(views.shape[1], views.shape[1], 1, device=views.device)
    positive = (views @ views.mT)[:, first, second].min(1).values / TEMPERATURE
    anchor = views[:, 0]
    own = (anchor @ anchor.T).fill_diagonal_(float("-inf"))
    logits = torch.cat([own, anchor @ views[:, 1].T], 1) / TEMPERATURE
    return (logits.logsumexp(1) - positive).mean()


def moco_arcl(query: Tensor, keys: Tensor, queue: Tensor) -> Tensor:
    """Return ArCL on MoCo: the positive is the least similar key view."""
    query, keys, queue = F.normalize(query, dim=-1), F.normalize(keys, dim=-1), F.normalize(queue, dim=-1)
    positive = (keys @ query[:, :, None]).squeeze(-1).min(1, keepdim=True).values
    logits = torch.cat([positive, query @ queue.T], 1) / TEMPERATURE
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


def _band(similarity: Tensor) -> Tensor:
    distance = (1 - similarity) / 2
    return F.relu((distance - BAND.lower) * (BAND.upper - distance))


def distance_polarization(z: Tensor) -> Tensor:
    """Return the polarization regulariser."""
    z = F.normalize(z, dim=-1)
    # the distance of a row to itself is 0, outside the band
    return _band(z @ z.T).sum() / (len(z) * (len(z) - 1))


def lmcl(z0: Tensor, z1: Tensor) -> Tensor:
    """Return NT-Xent plus the distance polarization of its negatives."""
    similarity = _self_similarity(z0, z1)
    rows = torch.arange(len(similarity), device=similarity.device) % len(z0)
    band = _band(similarity).masked_fill(rows[:, None] == rows, 0.0)
    return _nt_xent_of(similarity) + BAND.weight * band.sum() / (len(rows) * (len(rows) - 2))


def spectral_contrastive(z0: Tensor, z1: Tensor) -> Tensor:
    """Return the spectral contrastive loss from the N x N similarities."""
    n = len(z0)
    squares = (z0 @ z1.T).square()
    return -2 * (z0 * z1).sum(1).mean() + (squares.sum() - squares.diagonal().sum()) / (n * (n - 1))


def barlow_twins(z0: Tensor, z1: Tensor) -> Tensor:
    """Return the loss of Barlow Twins from the D x D cross-correlation."""
    z0, z1 = (F.batch_norm(z, None, None, training=True) for z in (z0, z1))
    correlation = z0.T @ z1 / len(z0)
    diagonal = correlation.diagonal()
    return (1 - diagonal).square().sum() + 0.0051 * (correlation.square().sum() - diagonal.square().sum())


def vicreg(z0: Tensor, z1: Tensor) -> Tensor:
    """Return the loss of VICReg from two D x D covariances."""
    loss = 25 * F.mse_loss(z0, z1)
    for z in (z0, z1):
        centred = z - z.mean(0)
        covariance = centred.T @ centred / (len(z) - 1)
        variance = covariance.diagonal()
        loss = loss + 12.5 * F.relu(1 - (variance + 1e-4).sqrt()).mean()
        loss = loss + (covariance.square().sum() - variance.square().sum()) / z.shape[1]
    return loss


def simsiam(p0: Tensor, z0: Tensor, p1: Tensor, z1: Tensor) -> Tensor:
    """Return the loss as in the pseudocode of Chen and He."""
    return -(F.cosine_similarity(p0, z1, dim=1).mean() + F.cosine_similarity(p1, z0, dim=1).mean()) / 2


def byol(p0: Tensor, z0: Tensor, p1: Tensor, z1: Tensor) -> Tensor:
    """Return 2 - 2 cos of both pairs, the mean over the samples."""
    return (4 - 2 * F.cosine_similarity(p0, z1, dim=1) - 2 * F.cosine_similarity(p1, z0, dim=1)).mean()


def _view_distances(views: Tensor) -> Tensor:
    first, second = torch.triu_indices(views.shape[1], views.shape[1], 1, device=views.device)
    return (views[:, first] - views[:, second]).square().sum(2)


def alignment(views: Tensor) -> Tensor:
    """Return the mean squared distance of all pairs of views."""
    return _view_distances(views).mean()


def augmentation_robust(views: Tensor) -> Tensor:
    """Return the mean squared distance of the farthest pair of views."""
    return _view_distances(views).max(1).values.mean()


def uniformity(z: Tensor) -> Tensor:
    """Return the uniformity as in the code of Wang and Isola."""
    return torch.pdist(z).square().mul(-2).exp().mean().log()


def t_simclr(z0: Tensor, z1: Tensor) -> Tensor:
    """Return the loss of t-SimCLR: a Student kernel of the distances, normalised over all pairs."""
    z, degrees = torch.cat([z0, z1]), 5.0
    norms = z.square().sum(1)
    q = 1 + (norms[:, None] + norms - 2 * z @ z.T) / (8 * degrees)
    rows = torch.arange(len(z), device=z.device)
    kernel = q.pow(-(degrees + 1) / 2).fill_diagonal_(0)
    return (degrees + 1) / 2 * q[rows, rows.roll(len(z0))].log().mean() + kernel.sum().log()


def triplet_margin(anchor: Tensor, positive: Tensor) -> Tensor:
    """Return the triplet loss of similarities over all in-batch negatives."""
    similarity = F.normalize(anchor, dim=-1) @ F.normalize(positive, dim=-1).T
    n = len(similarity)
    hinge = F.relu(MARGIN + similarity - similarity.diagonal()[:, None])
    return (hinge.sum() - hinge.diagonal().sum()) / (n * (n - 1))


def label_pull(z: Tensor, labels: Tensor, label_embeddings: Tensor) -> Tensor:
    """Return the cross entropy over the embeddings of all labels."""
    logits = F.normalize(z, dim=-1) @ F.normalize(label_embeddings, dim=-1).T / TEMPERATURE
    return F.cross_entropy(logits, labels)


def mmcl(z0: Tensor, z1: Tensor) -> Tensor:
    """Return MMCL from one linear system of N - 1 unknowns for each of the N anchors, solved in float32 at least."""
    x, z = (F.normalize(view.to(torch.promote_types(view.dtype, torch.float32)), dim=-1) for view in (z0, z1))
    n = len(x)
    rows = torch.arange(n, device=x.device)
    others = rows.expand(n, n)[rows[:, None] != rows].view(n, n - 1)
    with torch.no_grad():
        kernel = ((x @ x.T - 1) * (2 / MMCL["sigma"])).exp()
        own = kernel.gather(1, others)
        systems = kernel[others[:, :, None], others[:, None]] + 1 - own[:, :, None] - own[:, None]
        systems.diagonal(dim1=1, dim2=2).add_(MMCL["reg"])
        # Positive definite; the LU factorisation of a large batch never ends in torch 2.13 on several threads.
        factors = torch.linalg.cholesky(systems)
        coefficients = torch.cholesky_solve(torch.full_like(own, 2.0)[:, :, None], factors)[:, :, 0].clamp(0, MMCL["C"])
    across = ((z @ x.T - 1) * (2 / MMCL["sigma"])).exp()
    return (coefficients * (across.gather(1, others) - across.diagonal()[:, None])).sum(1).mean()


# The cross entropy of a linear layer is InfoNCE with the keys as weight; CLIP is its mean over both directions. The
# scale multiplies the query.


def info_nce_by(row_loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return InfoNCE as a call of ``row_loss(query, key)``, the mean cross entropy of the rows of query keyᵀ."""

    def loss(query: Tensor, positive_key: Tensor) -> Tensor:
        return row_loss(F.normalize(query, dim=-1) / TEMPERATURE, F.normalize(positive_key, dim=-1))

    return loss


def clip_by(row_loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return CLIP as two calls of ``row_loss(query, key)``."""

    def loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        rows = row_loss(logit_scale * image_features, text_features)
        return (rows + row_loss(logit_scale * text_features, image_features)) / 2

    return loss


def linear_cross_entropy(query: Tensor, key: Tensor) -> Tensor:
    """Return the mean cross entropy of the rows by ``F.linear_cross_entropy``, which works in chunks."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable(f"needs torch 2.13, this is {torch.__version__}")
    target = torch.arange(len(query), device=query.device)
    return F.linear_cross_entropy(query, key, target, options=torch.nn.LinearCrossEntropyOptions())
