"""Losses with labels: SupCon in its three meanings, partial labels, and the pull to label embeddings."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from contrastive_kernels import checks
from contrastive_kernels.functional.candidates import Negatives, Positives, Request, candidate_loss, statistics, swept
from contrastive_kernels.functional.common import (
    ContrastiveStats,
    check_options,
    other_views,
    reduce,
    rows,
    scale_from,
    softplus,
)
from contrastive_kernels.similarity import row_dot, sweep
from contrastive_kernels.sweep import Pairs, Softplus, compute_dtype

__all__ = ["label_pull_loss", "sup_con_loss"]

UNLABELLED = -1


def sup_con_loss(
    features: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    base_temperature: float | Tensor | None = None,
    positives: Literal["out", "in", "pairwise"] = "out",
    same_label: Literal["positive", "ignore", "negative"] = "positive",
    average: Literal["all", "with_positives"] = "all",
    contrast_mode: Literal["all", "one"] = "all",
    normalize: bool = True,
    reduction: str = "mean",
    weight: Tensor | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    r"""Supervised contrastive loss: every row of an anchor's class is its positive. No similarity or label matrix.

    .. math::
        \text{out:} \quad L_i &= \frac{1}{k_i} \sum_{p \in P(i)}
            \Bigl[ \log \sum_{j \ne i} e^{u_{ij}} - u_{ip} \Bigr] \\
        \text{in:} \quad L_i &= -\log \frac{\frac{1}{k_i} \sum_{p \in P(i)} e^{u_{ip}}}{\sum_{j \ne i} e^{u_{ij}}} \\
        \text{pairwise:} \quad L_i &= \frac{1}{k_i} \sum_{p \in P(i)}
            \log\Bigl(1 + \sum_{j \in \mathrm{Neg}(i)} e^{u_{ij} - u_{ip}}\Bigr)

    with :math:`u_{ij} = \langle z_i, z_j \rangle / T` over the rows z of all views, P(i) the :math:`k_i` other rows of
    i's class or sample, Neg(i) the rows of all others. Without labels P(i) are the other views of the sample; with two
    of them all three are NT-Xent.

    Args:
        features: ``(N, V, D)``, V views of each sample, or ``(N, D)``.
        labels: ``(N,)`` integers, -1 for a sample without label, which matches only its own views. None: no labels.
            With labels and ``"out"`` the loss of an anchor with one positive is rounded to 1e-7 or so in float32.
        temperature: T, float or 0-dim tensor (differentiable); 0.1 unless ``logit_scale`` is given.
        logit_scale: 1 / T instead.
        base_temperature: multiplies the loss by T / base_temperature; the official code has 0.07. None: factor 1.
        positives: ``"out"``, the paper's loss; ``"in"``, the sum over positives inside the logarithm; ``"pairwise"``,
            each positive alone against the negatives (multi-positive NT-Xent).
        same_label: what other samples of the anchor's class are: ``"positive"``; ``"ignore"``, neither positive nor
            negative; ``"negative"``, as without labels.
        average: the mean is over ``"all"`` anchors or those ``"with_positives"``. For ``"pairwise"`` it is over the
            positive pairs, whatever this says.
        contrast_mode: anchors are the rows of ``"all"`` views, or of view ``"one"``, the first.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``; the last two are made of the :math:`L_i` above.
        weight: ``(N,)`` per sample; the mean is then sum(w l) / sum(w).
        return_stats: also return `ContrastiveStats`, the positive being the mean logit of P(i), ``-inf`` (and never
            accurate) where there is none. Takes one more sweep for ``"out"`` with labels.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.

    Returns:
        0-dim, or for ``"none"`` ``(V * N,)``, first view first (``(N,)`` with ``contrast_mode="one"``); float32
        (float64 for float64 inputs). With ``return_stats`` the pair (loss, stats). An anchor without positives
        contributes 0.

    Raises:
        ValueError: shapes that do not fit, an empty batch, an unknown option, temperature near 0.
        TypeError: features are not floating or labels are not integers.
        RuntimeError: tensors on different devices.

    Source: Khosla et al., NeurIPS 2020, arXiv:2004.11362, eq. 2 and 3; pairwise as in pytorch-metric-learning.

    Example:
        >>> features, labels = torch.randn(16, 2, 8), torch.randint(4, (16,))
        >>> sup_con_loss(features, labels, temperature=0.1).shape
        torch.Size([])
    """
    checks.tensor("features", features)
    if features.dim() == 2:
        checks.features("features", features)
        features = features[:, None]
    checks.views("features", features, minimum=1)
    checks.not_empty("features", features)
    check_options(features, reduction=reduction, weight=weight)
    checks.choice("positives", positives, ("out", "in", "pairwise"))
    checks.choice("same_label", same_label, ("positive", "ignore", "negative"))
    checks.choice("average", average, ("all", "with_positives"))
    checks.choice("contrast_mode", contrast_mode, ("all", "one"))
    n = features.shape[0]
    labels = None if labels is None else checks.ids("labels", labels, n, features)
    scale = scale_from(temperature, logit_scale, features, default=0.1)
    base_temperature = _base_temperature(base_temperature, scale, features)

    views = rows(features.transpose(0, 1), normalize, backend)
    by_instance = labels is None or same_label == "negative"
    ids = torch.arange(n, device=views.device) if by_instance else _class_ids(labels)
    request = Request(scale, return_stats=return_stats, backend=backend)
    batch = _Batch(views, views[:1] if contrast_mode == "one" else views, ids)
    if labels is None or same_label != "positive":
        anchors = _towards_own_views(batch, positives, request)
    else:
        anchors = _towards_class(batch, positives, request)
    losses = anchors.losses
    if base_temperature is not None:
        losses = losses / (scale * base_temperature)
    # Only with labels do the anchors differ in the number of their positives.
    share = None
    if anchors.count is not None and reduction == "mean":
        share = anchors.count if positives == "pairwise" else anchors.count > 0 if average == "with_positives" else None
    loss = reduce(losses, weight, reduction) if share is None else _mean_over(losses, share, weight)
    if not return_stats:
        return loss
    return loss, statistics(anchors.positive_logit, anchors.lse, anchors.negative_max)


def label_pull_loss(
    z: Tensor,
    labels: Tensor,
    label_embeddings: Tensor,
    *,
    form: Literal["pull", "softmax"] = "pull",
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Pulls labelled rows to the embeddings of their labels, such as word vectors of the class names.

    .. math::
        \text{pull:} \quad L_i = 1 - \langle z_i, w_{y_i} \rangle, \qquad
        \text{softmax:} \quad L_i = \log \sum_{c=1}^K e^{u_{ic}} - u_{i y_i},
        \quad u_{ic} = \langle z_i, w_c \rangle / T

    A term to be added to another loss with a weight of the user's; no published weight is known to us.

    Args:
        z: ``(N, D)``.
        labels: y, ``(N,)`` integers below K; -1 for a row without label, which contributes 0. Any other value makes
            the loss NaN: it is found without reading the labels back.
        label_embeddings: w, ``(K, D)``, usually fixed; they get a gradient if they require one.
        form: ``"pull"``, half the squared distance of unit rows, or ``"softmax"``, InfoNCE over the K embeddings.
        temperature: T of ``"softmax"``, float or 0-dim tensor (differentiable); 0.1 unless ``logit_scale`` is given.
        logit_scale: 1 / T instead.
        normalize: rows of z and of label_embeddings to unit norm first.
        reduction: ``"mean"`` over the labelled rows, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per row; the mean is then sum(w l) / sum(w) over the labelled rows.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``; float32 (float64 for float64 inputs). 0 when no row is labelled.

    Raises:
        ValueError: shapes that do not fit, an empty batch, no embeddings, an unknown option, temperature near 0.
        TypeError: dtypes that differ or are not floating (labels: not integer).
        RuntimeError: tensors on different devices.

    Source: no paper is known to us for ``"pull"``; related to Frome et al., NeurIPS 2013 (DeViSE).

    Example:
        >>> z, labels, words = torch.randn(16, 8), torch.randint(-1, 4, (16,)), torch.randn(4, 8)
        >>> label_pull_loss(z, labels, words).shape
        torch.Size([])
    """
    checks.features("z", z)
    checks.features("label_embeddings", label_embeddings)
    checks.alike("z", z, "label_embeddings", label_embeddings, rows=False)
    checks.not_empty("z", z)
    checks.not_empty("label_embeddings", label_embeddings)
    check_options(z, reduction=reduction, weight=weight)
    checks.choice("form", form, ("pull", "softmax"))
    labels = checks.ids("labels", labels, z.shape[0], z)
    scale = scale_from(temperature, logit_scale, z, default=0.1)

    z, embeddings = rows(z, normalize, backend), rows(label_embeddings, normalize, backend)
    classes = embeddings.shape[0]
    similarity = row_dot(z, embeddings[labels.clamp(0, classes - 1)], backend)
    if form == "pull":
        losses = 1 - similarity
    else:
        request = Request(scale, backend=backend)
        pairs = Pairs(labels, torch.arange(classes, device=z.device))
        directions = swept(z, embeddings, pairs, request)
        positives = Positives.single(scale * similarity)
        losses = candidate_loss(directions, positives, request, weight=None, reduction="none")
    labelled = labels != UNLABELLED
    # A product, so that a NaN in a row without label is not lost.
    losses = losses * labelled.to(losses.dtype)
    losses = losses.masked_fill(labelled & ((labels < 0) | (labels >= classes)), torch.nan)
    return _mean_over(losses, labelled, weight) if reduction == "mean" else reduce(losses, weight, reduction)


class _Batch(NamedTuple):
    """Unit rows and what tells their classes apart."""

    views: Tensor  # (V, N, D)
    heads: Tensor  # (V, N, D) or (1, N, D): the views whose rows are anchors
    ids: Tensor  # (N,): rows with equal ids are no negatives of each other

    def operands(self) -> tuple[Tensor, Tensor | None]:
        """The rows that are anchors (A, D) and those they are compared with, None for the same."""
        columns = self.views.flatten(0, 1)
        return (columns, None) if len(self.heads) == len(self.views) else (self.heads[0], columns)

    def pairs(self, same: bool = False) -> Pairs:
        """The pairs of different ids; with `same` those of equal ids but i itself, which is column i in either case."""
        x_ids = self.ids.repeat(len(self.heads))
        y_ids = None if len(self.heads) == len(self.views) else self.ids.repeat(len(self.views))
        return Pairs(x_ids, y_ids, same=same, exclude_diagonal=same)

    def positive_counts(self) -> Tensor:
        """(A,): the number of other rows with the anchor's id."""
        ones = torch.ones_like(self.ids, dtype=compute_dtype(self.views))
        samples = torch.zeros_like(ones).index_add(0, self.ids, ones)[self.ids]
        return (samples * len(self.views) - 1).repeat(len(self.heads))

    def positive_sums(self) -> Tensor:
        """(A,): the sum of the similarities to them, from the sum of every class."""
        samples = self.views.sum(0, dtype=compute_dtype(self.views))
        classes = torch.zeros_like(samples).index_add(0, self.ids, samples)[self.ids]
        return row_dot(self.heads, classes - self.heads).flatten()


class _Anchors(NamedTuple):
    """The loss of every anchor; the last three only where statistics are wanted."""

    losses: Tensor
    count: Tensor | None  # the number of positives, None: the same for all
    positive_logit: Tensor | None = None
    lse: Tensor | None = None
    negative_max: Tensor | None = None


def _towards_own_views(batch: _Batch, meaning: str, request: Request) -> _Anchors:
    """The positives are the other views of the sample: a few per anchor, listed, and one sweep over the negatives."""
    anchors, columns = batch.operands()
    negatives = swept(anchors, columns, batch.pairs(), request)[0]
    count = len(batch.views) - 1
    if count == 0:
        # A product, so that a NaN is not lost.
        return _Anchors(
            0 * row_dot(anchors, anchors), None, torch.full_like(negatives.lse, -torch.inf), negatives.lse,
            negatives.maximum,
        )  # fmt: skip
    if columns is None:
        own = request.scale * other_views(batch.views, request.backend)
    else:
        own = request.scale * torch.stack([row_dot(anchors, view, request.backend) for view in batch.views[1:]], 1)
    own_lse, mean = own.logsumexp(1), own.mean(1)
    if meaning == "pairwise" or count == 1:
        # Of a single positive all three meanings are this; the terms that cancel below would leave their rounding.
        losses = softplus(negatives.lse[:, None] - own).mean(1)
    else:
        losses = softplus(negatives.lse - own_lse) + (math.log(count) if meaning == "in" else own_lse - mean)
    lse = torch.logaddexp(negatives.lse, mean if meaning == "pairwise" else own_lse) if request.return_stats else None
    return _Anchors(losses, None, mean, lse, negatives.maximum)


def _towards_class(batch: _Batch, meaning: str, request: Request) -> _Anchors:
    """The positives are all other rows of the class: sums over them from the sum of the class, or from a sweep."""
    anchors, columns = batch.operands()
    options = dict(scale=request.scale, backend=request.backend)
    count = batch.positive_counts()
    alone, divisor = count == 0, count.clamp(min=1)
    mean = request.scale * batch.positive_sums() / divisor if meaning == "out" or request.return_stats else None
    if meaning == "out":
        # Of two or more positives the loss is at least log 2: nothing cancels. Of a single one it does; to avoid that
        # would take a sweep more.
        lse = sweep(anchors, columns, Pairs(exclude_diagonal=True), **options).row_lse.squeeze(0)
        losses = lse - mean
        negatives = _detached_negatives(batch, request) if request.return_stats else None
    else:
        negatives = swept(anchors, columns, batch.pairs(), request)[0]
        nothing = negatives.lse == -torch.inf
        same = batch.pairs(same=True)
        if meaning == "in":
            own_lse = sweep(anchors, columns, same, **options).row_lse.squeeze(0)
            losses = softplus(negatives.lse - own_lse.masked_fill(alone, 0)) + divisor.log()
        else:
            own_lse = mean
            term = Softplus(-request.scale, negatives.lse.masked_fill(nothing, 0))
            sums = sweep(anchors, columns, same, term=term, exponents=(), backend=request.backend).row_sum
            losses = (sums / divisor).masked_fill(nothing, 0)
        lse = torch.logaddexp(negatives.lse, own_lse.masked_fill(alone, -torch.inf)) if request.return_stats else None
    losses = losses.masked_fill(alone, 0)
    if not request.return_stats:
        return _Anchors(losses, count)
    return _Anchors(losses, count, mean.masked_fill(alone, -torch.inf), lse, negatives.maximum)


def _detached_negatives(batch: _Batch, request: Request) -> Negatives:
    anchors, columns = batch.operands()
    return swept(anchors.detach(), None if columns is None else columns.detach(), batch.pairs(), request)[0]


def _class_ids(labels: Tensor) -> Tensor:
    """Ids in [0, N): one for every label, and one of its own for every sample without.

    A label's id is its first place among the sorted labels; the samples without label share out the places of theirs.
    Static shapes, nothing read back.
    """
    labels = labels.contiguous()
    unlabelled = labels == UNLABELLED
    return torch.searchsorted(labels.sort().values, labels) + (unlabelled.cumsum(0) - 1) * unlabelled


def _base_temperature(value: float | Tensor | None, scale: float | Tensor, x: Tensor) -> float | Tensor | None:
    """A temperature that can be divided by; a tensor in the dtype of the loss."""
    if value is None:
        return None
    if not isinstance(scale, Tensor) and scale == 0:
        raise ValueError(f"logit_scale {scale} has no temperature that base_temperature could divide")
    value = checks.scalar("base_temperature", value, x)
    if isinstance(value, Tensor):
        return value.to(compute_dtype(x))
    if abs(value) < 1e-8:
        raise ValueError(f"base_temperature {value} is too close to zero: its absolute value must be at least 1e-8")
    return value


def _mean_over(losses: Tensor, share: Tensor, weight: Tensor | None) -> Tensor:
    """The mean in which an anchor counts `share` times; 0 where none counts."""
    share = share.to(losses.dtype)
    if weight is not None:
        share = share * weight.to(losses.dtype).repeat(losses.numel() // weight.numel())
    total = share.sum()
    return (share * losses).sum() / total.masked_fill(total == 0, 1)
