"""The losses as people write them in plain PyTorch, and as ``F.linear_cross_entropy`` computes them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import contrastive_kernels as ck

TEMPERATURE = 0.1
BAND = ck.Polarization(lower=0.1, upper=0.5, weight=0.1)
# So warm that the correction leaves something of the negatives: at 0.1 every row ends on its floor.
TAU_PLUS, BETA, WARM = 0.1, 1.0, 0.5
MARGIN = 0.8  # so large that most hinges are active
CLASSES = 100
LABELS = 1000  # that label embeddings are chosen from
TOP_K = 10  # negatives of a row that count as false
EASIEST = 64  # negatives of a row that easy negatives keep
MMCL = {"sigma": 50.0, "C": 100.0, "reg": 0.1}


class Unavailable(Exception):
    """A provider cannot run here or does not compute this loss; the message says why."""


def info_nce(query: Tensor, positive_key: Tensor) -> Tensor:
    """InfoNCE with in-batch negatives."""
    logits = F.normalize(query, dim=-1) @ F.normalize(positive_key, dim=-1).T / TEMPERATURE
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def _nt_xent_of(similarity: Tensor) -> Tensor:
    n = len(similarity)
    logits = (similarity / TEMPERATURE).fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, torch.arange(n, device=logits.device).roll(n // 2))


def _self_similarity(z0: Tensor, z1: Tensor) -> Tensor:
    z = F.normalize(torch.cat([z0, z1]), dim=-1)
    return z @ z.T


def nt_xent(z0: Tensor, z1: Tensor) -> Tensor:
    """SimCLR's loss."""
    return _nt_xent_of(_self_similarity(z0, z1))


def clip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """The loss of OpenAI's and Hugging Face's CLIP: one product, cross entropy over its rows and columns."""
    logits = logit_scale * image_features @ text_features.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def siglip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """The sigmoid loss of SigLIP."""
    logits = logit_scale * image_features @ text_features.T + logit_bias
    sign = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(sign * logits).sum() / len(logits)


def moco(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    """MoCo: the positive beside a queue of past keys."""
    query, key, queue = F.normalize(query, dim=-1), F.normalize(key, dim=-1), F.normalize(queue, dim=-1)
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1) / TEMPERATURE
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


def sup_con(features: Tensor, labels: Tensor) -> Tensor:
    """Supervised contrastive loss, the mean of the positives outside the logarithm, as its official code."""
    z = F.normalize(features.transpose(0, 1).flatten(0, 1), dim=-1)
    logits = (z @ z.T / TEMPERATURE).fill_diagonal_(float("-inf"))
    labels = labels.repeat(features.shape[1])
    positive = (labels[:, None] == labels).fill_diagonal_(False)
    log_probability = logits - logits.logsumexp(1, keepdim=True)
    return -(log_probability.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()


def _corrected(positive: Tensor, total: Tensor, count: int) -> Tensor:
    """The loss from the sum over the negatives, corrected for the positives among them."""
    positive = positive.exp()
    corrected = (total - TAU_PLUS * count * positive) / (1 - TAU_PLUS)
    corrected = corrected.clamp(min=count * math.exp(-1 / WARM))
    return -(positive / (positive + corrected)).log().mean()


def _split(z0: Tensor, z1: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits of the positives (2N,) and of all others (2N, 2N), -inf at a row's own and at its positive."""
    logits = _self_similarity(z0, z1) / temperature
    rows = torch.arange(len(logits), device=logits.device)
    positive = logits[rows, rows.roll(len(z0))]
    return positive, logits.masked_fill((rows % len(z0))[:, None] == rows % len(z0), float("-inf"))


def debiased(z0: Tensor, z1: Tensor) -> Tensor:
    """Debiased contrastive loss."""
    positive, negatives = _split(z0, z1, WARM)
    return _corrected(positive, negatives.exp().sum(1), 2 * len(z0) - 2)


def hard_negative(z0: Tensor, z1: Tensor) -> Tensor:
    """Debiased loss with negatives weighted by their hardness."""
    positive, negatives = _split(z0, z1, WARM)
    exponentials, weights = negatives.exp(), (BETA * negatives).exp()
    count = 2 * len(z0) - 2
    return _corrected(positive, count * (weights * exponentials).sum(1) / weights.sum(1), count)


def decoupled(z0: Tensor, z1: Tensor) -> Tensor:
    """Decoupled contrastive loss: the positive is not in the denominator."""
    positive, negatives = _split(z0, z1, TEMPERATURE)
    return (negatives.logsumexp(1) - positive).mean()


def nnclr(z: Tensor, predictions: Tensor, support: Tensor) -> Tensor:
    """NNCLR, one direction: the nearest support row of one view is to pick the prediction of the other."""
    z, predictions, support = (F.normalize(x, dim=-1) for x in (z, predictions, support))
    nearest = support[(z @ support.T).argmax(1)]
    logits = nearest @ predictions.T / TEMPERATURE
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def false_negative(z0: Tensor, z1: Tensor) -> Tensor:
    """NT-Xent after dropping the most similar rows of other samples."""
    similarity = _self_similarity(z0, z1)
    rows = torch.arange(len(similarity), device=similarity.device) % len(z0)
    others = similarity.detach().masked_fill(rows[:, None] == rows, float("-inf"))
    return _nt_xent_of(similarity.scatter(1, others.topk(TOP_K, 1).indices, float("-inf")))


def easy_negative(query: Tensor, positive_key: Tensor) -> Tensor:
    """InfoNCE against the least similar keys of each row only."""
    similarity = F.normalize(query, dim=-1) @ F.normalize(positive_key, dim=-1).T
    itself = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    easiest = similarity.masked_fill(itself, float("inf")).topk(EASIEST, 1, largest=False).values
    logits = torch.cat([similarity.diagonal()[:, None], easiest], 1) / TEMPERATURE
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


def quick_thoughts(first: Tensor, second: Tensor) -> Tensor:
    """Quick-Thoughts: the neighbours of a sentence among all, its own logit set to 0."""
    logits = (first @ second.T).fill_diagonal_(0)
    neighbours = torch.ones(len(first) - 1, device=first.device)
    target = torch.diag(neighbours, 1) + torch.diag(neighbours, -1)
    return F.cross_entropy(logits, target / target.sum(1, keepdim=True))


def arcl(views: Tensor) -> Tensor:
    """ArCL on SimCLR: the least similar pair of views is the positive, both first views are in the denominator."""
    views = F.normalize(views, dim=-1)
    first, second = torch.triu_indices(views.shape[1], views.shape[1], 1, device=views.device)
    positive = (views @ views.mT)[:, first, second].min(1).values / TEMPERATURE
    anchor = views[:, 0]
    own = (anchor @ anchor.T).fill_diagonal_(float("-inf"))
    logits = torch.cat([own, anchor @ views[:, 1].T], 1) / TEMPERATURE
    return (logits.logsumexp(1) - positive).mean()


def moco_arcl(query: Tensor, keys: Tensor, queue: Tensor) -> Tensor:
    """ArCL on MoCo: the least similar key view is the positive."""
    query, keys, queue = F.normalize(query, dim=-1), F.normalize(keys, dim=-1), F.normalize(queue, dim=-1)
    positive = (keys @ query[:, :, None]).squeeze(-1).min(1, keepdim=True).values
    logits = torch.cat([positive, query @ queue.T], 1) / TEMPERATURE
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


def _band(similarity: Tensor) -> Tensor:
    distance = (1 - similarity) / 2
    return F.relu((distance - BAND.lower) * (BAND.upper - distance))


def distance_polarization(z: Tensor) -> Tensor:
    """The polarization regulariser alone; a row's distance to itself is 0, outside the band."""
    z = F.normalize(z, dim=-1)
    return _band(z @ z.T).sum() / (len(z) * (len(z) - 1))


def lmcl(z0: Tensor, z1: Tensor) -> Tensor:
    """NT-Xent plus the distance polarization of its negatives."""
    similarity = _self_similarity(z0, z1)
    rows = torch.arange(len(similarity), device=similarity.device) % len(z0)
    band = _band(similarity).masked_fill(rows[:, None] == rows, 0.0)
    return _nt_xent_of(similarity) + BAND.weight * band.sum() / (len(rows) * (len(rows) - 2))


def spectral_contrastive(z0: Tensor, z1: Tensor) -> Tensor:
    """Spectral contrastive loss through the N x N products."""
    n = len(z0)
    squares = (z0 @ z1.T).square()
    return -2 * (z0 * z1).sum(1).mean() + (squares.sum() - squares.diagonal().sum()) / (n * (n - 1))


def barlow_twins(z0: Tensor, z1: Tensor) -> Tensor:
    """Barlow Twins through the D x D cross-correlation."""
    z0, z1 = (F.batch_norm(z, None, None, training=True) for z in (z0, z1))
    correlation = z0.T @ z1 / len(z0)
    diagonal = correlation.diagonal()
    return (1 - diagonal).square().sum() + 0.0051 * (correlation.square().sum() - diagonal.square().sum())


def vicreg(z0: Tensor, z1: Tensor) -> Tensor:
    """VICReg through two D x D covariances."""
    loss = 25 * F.mse_loss(z0, z1)
    for z in (z0, z1):
        centred = z - z.mean(0)
        covariance = centred.T @ centred / (len(z) - 1)
        variance = covariance.diagonal()
        loss = loss + 12.5 * F.relu(1 - (variance + 1e-4).sqrt()).mean()
        loss = loss + (covariance.square().sum() - variance.square().sum()) / z.shape[1]
    return loss


def _view_distances(views: Tensor) -> Tensor:
    first, second = torch.triu_indices(views.shape[1], views.shape[1], 1, device=views.device)
    return (views[:, first] - views[:, second]).square().sum(2)


def alignment(views: Tensor) -> Tensor:
    """Mean squared distance of all pairs of views."""
    return _view_distances(views).mean()


def augmentation_robust(views: Tensor) -> Tensor:
    """Squared distance of the farthest pair of views."""
    return _view_distances(views).max(1).values.mean()


def uniformity(z: Tensor) -> Tensor:
    """Uniformity, as Wang and Isola's code."""
    return torch.pdist(z).square().mul(-2).exp().mean().log()


def t_simclr(z0: Tensor, z1: Tensor) -> Tensor:
    """t-SimCLR: a Student kernel of the distances, one normalisation for all pairs."""
    z, degrees = torch.cat([z0, z1]), 5.0
    norms = z.square().sum(1)
    q = 1 + (norms[:, None] + norms - 2 * z @ z.T) / (8 * degrees)
    rows = torch.arange(len(z), device=z.device)
    kernel = q.pow(-(degrees + 1) / 2).fill_diagonal_(0)
    return (degrees + 1) / 2 * q[rows, rows.roll(len(z0))].log().mean() + kernel.sum().log()


def triplet_margin(anchor: Tensor, positive: Tensor) -> Tensor:
    """Triplet loss over all in-batch negatives, on similarities."""
    similarity = F.normalize(anchor, dim=-1) @ F.normalize(positive, dim=-1).T
    n = len(similarity)
    hinge = F.relu(MARGIN + similarity - similarity.diagonal()[:, None])
    return (hinge.sum() - hinge.diagonal().sum()) / (n * (n - 1))


def label_pull(z: Tensor, labels: Tensor, label_embeddings: Tensor) -> Tensor:
    """Cross entropy over the embeddings of all labels."""
    logits = F.normalize(z, dim=-1) @ F.normalize(label_embeddings, dim=-1).T / TEMPERATURE
    return F.cross_entropy(logits, labels)


def mmcl(z0: Tensor, z1: Tensor) -> Tensor:
    """MMCL by one linear system of N - 1 unknowns for each of the N anchors, solved in float32 at least."""
    x, z = (F.normalize(view.to(torch.promote_types(view.dtype, torch.float32)), dim=-1) for view in (z0, z1))
    n = len(x)
    rows = torch.arange(n, device=x.device)
    others = rows.expand(n, n)[rows[:, None] != rows].view(n, n - 1)
    with torch.no_grad():
        kernel = ((x @ x.T - 1) * (2 / MMCL["sigma"])).exp()
        own = kernel.gather(1, others)
        systems = kernel[others[:, :, None], others[:, None]] + 1 - own[:, :, None] - own[:, None]
        systems.diagonal(dim1=1, dim2=2).add_(MMCL["reg"])
        coefficients = torch.linalg.solve(systems, torch.full_like(own, 2.0)).clamp(0, MMCL["C"])
    across = ((z @ x.T - 1) * (2 / MMCL["sigma"])).exp()
    return (coefficients * (across.gather(1, others) - across.diagonal()[:, None])).sum(1).mean()


# Cross entropy of a linear layer is InfoNCE where the keys are the weight; CLIP takes it once a direction. The scale
# goes into the query.


def info_nce_by(row_loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """InfoNCE through ``row_loss(query, key)``, the mean cross entropy of the rows of query keyᵀ."""

    def loss(query: Tensor, positive_key: Tensor) -> Tensor:
        return row_loss(F.normalize(query, dim=-1) / TEMPERATURE, F.normalize(positive_key, dim=-1))

    return loss


def clip_by(row_loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """CLIP as two calls of ``row_loss(query, key)``."""

    def loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        rows = row_loss(logit_scale * image_features, text_features)
        return (rows + row_loss(logit_scale * text_features, image_features)) / 2

    return loss


def linear_cross_entropy(query: Tensor, key: Tensor) -> Tensor:
    """The mean cross entropy of the rows in chunks, by ``F.linear_cross_entropy``."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable(f"needs torch 2.13, this is {torch.__version__}")
    target = torch.arange(len(query), device=query.device)
    return F.linear_cross_entropy(query, key, target, options=torch.nn.LinearCrossEntropyOptions())
