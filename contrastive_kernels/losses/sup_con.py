"""SupCon in its three meanings, with partial labels: the function and its module."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from contrastive_kernels.losses._arguments import BackendArguments, ContrastiveStats, Loss, ReductionArguments
from contrastive_kernels.losses._module import LossModule
from contrastive_kernels.losses._options import UNLABELLED, SoftmaxOptions, mean_over, reduce, softplus
from contrastive_kernels.losses._softmax import Negatives, statistics, sweep_negatives
from contrastive_kernels.losses._views import other_views
from contrastive_kernels.primitives import (
    Group,
    Pairs,
    Shards,
    Softplus,
    checks,
    compute_dtype,
    gather_rows,
    over_ranks,
    row_dot,
    sweep,
    unit_rows,
    wide_sums,
)

__all__ = ["SupConLoss", "sup_con_loss"]


class SupConArguments(BackendArguments, ReductionArguments, total=False):
    """Keyword arguments of `sup_con_loss`."""

    logit_scale: float | Tensor | None
    base_temperature: float | Tensor | None
    positives: Literal["out", "in", "pairwise"]
    same_label: Literal["positive", "ignore", "negative"]
    average: Literal["all", "with_positives"]
    contrast_mode: Literal["all", "one"]


@overload
def sup_con_loss(
    features: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    return_stats: Literal[False] = False,
    **options: Unpack[SupConArguments],
) -> Loss: ...
@overload
def sup_con_loss(
    features: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    return_stats: Literal[True],
    **options: Unpack[SupConArguments],
) -> tuple[Loss, ContrastiveStats]: ...
@overload
def sup_con_loss(
    features: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    return_stats: bool,
    **options: Unpack[SupConArguments],
) -> Loss | tuple[Loss, ContrastiveStats]: ...
@over_ranks
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
    group: Group | None = None,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    r"""Return the supervised contrastive loss: every row of an anchor's class is its positive. No N x N matrix.

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
            positive pairs, whatever this says. Not with another reduction.
        contrast_mode: anchors are the rows of ``"all"`` views, or of view ``"one"``, the first.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``; the last two are made of the :math:`L_i` above.
        weight: ``(N,)`` per sample; the mean is then sum(w l) / sum(w).
        return_stats: also return `ContrastiveStats`, the positive being the mean logit of P(i), ``-inf`` (and never
            accurate) where there is none. Takes one more sweep for ``"out"`` with labels.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch. None: this
            process alone.

    Returns:
        0-dim, or for ``"none"`` ``(V * N,)``, first view first (``(N,)`` with ``contrast_mode="one"``); float32
        (float64 for float64 inputs). With ``return_stats`` the pair (loss, stats). An anchor without positives
        contributes 0.

    Raises:
        ValueError: shapes that do not fit, an empty batch, an unknown option, temperature near 0, an average without
            the reduction ``"mean"``.
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
    checks.choice("positives", positives, ("out", "in", "pairwise"))
    checks.choice("same_label", same_label, ("positive", "ignore", "negative"))
    checks.choice("average", average, ("all", "with_positives"))
    checks.choice("contrast_mode", contrast_mode, ("all", "one"))
    if reduction != "mean":
        checks.no_effect(f"reduction={reduction!r}", average=(average, "all"))
    n = features.shape[0]
    labels = checks.optional_ids("labels", labels, n, features)
    options = SoftmaxOptions.of(
        features,
        temperature=temperature,
        logit_scale=logit_scale,
        default_temperature=0.1,
        reduction=reduction,
        weight=weight,
        return_stats=return_stats,
        backend=backend,
        group=group,
    )
    base_temperature = _base_temperature(base_temperature, options.scale, features)

    views = unit_rows(features.transpose(0, 1), normalize, backend)
    shards = options.shards
    instances = shards.positions(n, views.device)
    ids = (
        instances
        if labels is None or same_label == "negative"
        else shards.own(_class_ids(shards.gather(labels)), labels)
    )
    batch = _Batch(views, views[:1] if contrast_mode == "one" else views, ids, shards)
    if labels is None or same_label != "positive":
        anchors = _towards_own_views(batch, positives, options)
    else:
        anchors = _towards_class(batch, positives, options)
    losses = anchors.losses
    if base_temperature is not None:
        losses = losses / (options.scale * base_temperature)
    share = None
    if reduction == "mean" and anchors.number is not None:
        share = _share(anchors.number, positives, average)
    loss = reduce(losses, weight, reduction, shards) if share is None else mean_over(losses, share, weight, shards)
    return loss if anchors.stats is None else (loss, anchors.stats)


class SupConLoss(LossModule):
    """`sup_con_loss` as a module.

    Args:
        temperature: 0.1 unless ``logit_scale`` is given; an ``nn.Parameter`` is trained.
        options: further keyword arguments of `sup_con_loss`.

    Example:
        >>> SupConLoss(0.07)(torch.randn(8, 2, 4), torch.randint(3, (8,))).shape
        torch.Size([])
    """

    function = staticmethod(sup_con_loss)

    def __init__(
        self,
        temperature: float | Tensor | None = None,
        *,
        return_stats: bool = False,
        **options: Unpack[SupConArguments],
    ) -> None:
        super().__init__(temperature=temperature, return_stats=return_stats, **options)

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor | tuple[Tensor, ContrastiveStats]:
        """Return the loss; `inputs` are per-batch keyword arguments: weight."""
        return self.function(features, labels, **self.options(), **inputs)


class _Batch(NamedTuple):
    """Unit rows and what tells their classes apart."""

    views: Tensor  # (V, N, D)
    heads: Tensor  # (V, N, D) or (1, N, D): the views whose rows are anchors
    ids: Tensor  # (N,): rows with equal ids are no negatives of each other
    shards: Shards

    @property
    def all_are_anchors(self) -> bool:
        """Whether every row is an anchor."""
        return len(self.heads) == len(self.views)

    def operands(self) -> tuple[Tensor, Tensor | None]:
        """Return the rows that are anchors (A, D) and those they are compared with, None for the same."""
        columns = self.views.flatten(0, 1)
        return (columns, None) if self.all_are_anchors else (self.heads[0], columns)

    def different(self) -> Pairs:
        """Return the pairs of different ids."""
        return Pairs(*self._ids())

    def equal(self) -> Pairs:
        """Return the pairs of equal ids but an anchor with itself, which is the column of its own number."""
        return Pairs(*self._ids(), keep_equal_ids=True, diagonals=1)

    def _ids(self) -> tuple[Tensor, Tensor | None]:
        return self.ids.repeat(len(self.heads)), None if self.all_are_anchors else self.ids.repeat(len(self.views))

    def positive_counts(self) -> Tensor:
        """Return (A,), the number of other rows with the anchor's id."""
        ones = torch.ones_like(self.ids, dtype=compute_dtype(self.views))
        samples = self._of_class(ones[:, None]).squeeze(1)
        return (samples * len(self.views) - 1).repeat(len(self.heads))

    def positive_sums(self) -> Tensor:
        """Return (A,), the sum of the similarities to them, from the sum of every class."""
        dtype = compute_dtype(self.views)
        # A long row's own share of the sum leaves no digits of the others' in float32.
        samples = self.views.sum(0, dtype=wide_sums(self.views))
        return row_dot(self.heads, (self._of_class(samples) - self.heads).to(dtype)).flatten()

    def _of_class(self, values: Tensor) -> Tensor:
        """Return the sums of the values of every sample's class."""
        if not self.shards.alone:
            return self.shards.class_sums(values, self.ids, self.ids)
        return gather_rows(torch.zeros_like(values).index_add(0, self.ids, values), self.ids)


class _Anchors(NamedTuple):
    """The loss of every anchor."""

    losses: Tensor
    number: Tensor | None = None  # of positives; None: the same for all anchors
    stats: ContrastiveStats | None = None  # where the options ask for them


def _towards_own_views(batch: _Batch, meaning: str, options: SoftmaxOptions) -> _Anchors:
    """Return the losses towards the other views of the sample: a few positives per anchor, and one sweep."""
    anchors, columns = batch.operands()
    negatives = sweep_negatives(anchors, columns, batch.different(), options)
    number = len(batch.views) - 1
    if number == 0:
        none = torch.full_like(negatives.lse, -torch.inf)
        # A product, so that a NaN is not lost.
        losses, mean, own_lse = 0 * row_dot(anchors, anchors), none, none
    else:
        if columns is None:
            own = options.scale * other_views(batch.views, options.backend)
        else:
            own = options.scale * torch.stack([row_dot(anchors, view, options.backend) for view in batch.views[1:]], 1)
        own_lse, mean = own.logsumexp(1), own.mean(1)
        if meaning == "pairwise" or number == 1:
            # Of a single positive all three meanings are this; the terms that cancel below would leave their rounding.
            losses = softplus(negatives.lse[:, None] - own).mean(1)
        else:
            losses = softplus(negatives.lse - own_lse) + (math.log(number) if meaning == "in" else own_lse - mean)
    if negatives.maximum is None:
        return _Anchors(losses)
    lse = torch.logaddexp(negatives.lse, mean if meaning == "pairwise" else own_lse)
    return _Anchors(losses, stats=statistics(mean, lse, negatives.maximum, options.shards))


def _towards_class(batch: _Batch, meaning: str, options: SoftmaxOptions) -> _Anchors:
    """Return the losses towards all other rows of the class: sums from the sum of the class, or from a sweep."""
    number = batch.positive_counts()
    alone, divisor = number == 0, number.clamp(min=1)
    anchors, columns = batch.operands()
    row_lse = partial(_row_lse, anchors, columns, options)

    def mean_logit() -> Tensor:
        return options.scale * batch.positive_sums() / divisor

    if meaning == "out":
        # Of two or more positives the loss is at least log 2: nothing cancels. Of a single one it does; to avoid that
        # would take a sweep more.
        mean = mean_logit()
        lse = row_lse(Pairs(diagonals=1))
        losses = (lse - mean).masked_fill(alone, 0)
        if not options.return_stats:
            return _Anchors(losses, number)
        maximum = _detached_negatives(batch, options).maximum
    else:
        negatives = sweep_negatives(anchors, columns, batch.different(), options)
        nothing = negatives.lse == -torch.inf
        if meaning == "in":
            own_lse = row_lse(batch.equal())
            losses = softplus(negatives.lse - own_lse.masked_fill(alone, 0)) + divisor.log()
        else:
            term = Softplus(-options.scale, negatives.lse.masked_fill(nothing, 0))
            sums = sweep(
                anchors, columns, batch.equal(), term=term, exponents=(), backend=options.backend, shards=options.shards
            ).row_sum
            losses = (sums / divisor).masked_fill(nothing, 0)
        losses = losses.masked_fill(alone, 0)
        if not options.return_stats:
            return _Anchors(losses, number)
        mean, maximum = mean_logit(), negatives.maximum
        own = own_lse if meaning == "in" else mean
        lse = torch.logaddexp(negatives.lse, own.masked_fill(alone, -torch.inf))
    assert maximum is not None
    return _Anchors(losses, number, statistics(mean.masked_fill(alone, -torch.inf), lse, maximum, options.shards))


def _row_lse(x: Tensor, y: Tensor | None, options: SoftmaxOptions, pairs: Pairs) -> Tensor:
    return sweep(x, y, pairs, scale=options.scale, backend=options.backend, shards=options.shards).row_lse.squeeze(0)


def _detached_negatives(batch: _Batch, options: SoftmaxOptions) -> Negatives:
    anchors, columns = batch.operands()
    columns = None if columns is None else columns.detach()
    return sweep_negatives(anchors.detach(), columns, batch.different(), options)


def _share(number: Tensor, meaning: str, average: str) -> Tensor | None:
    """Return how often each anchor counts in the mean, from the number of its positives; None: all count once."""
    if meaning == "pairwise":
        return number
    return number > 0 if average == "with_positives" else None


def _class_ids(labels: Tensor) -> Tensor:
    """Return ids in [0, N) of all ranks' labels: one for every label, and one of its own for every sample without.

    A label's id is its first place among the sorted labels; the samples without label share out the places of theirs.
    Static shapes, nothing read back.
    """
    labels = labels.contiguous()
    unlabelled = labels == UNLABELLED
    return torch.searchsorted(labels.sort().values, labels) + (unlabelled.cumsum(0) - 1) * unlabelled


def _base_temperature(value: float | Tensor | None, scale: float | Tensor, x: Tensor) -> float | Tensor | None:
    """Return a temperature that can be divided by; a tensor in the dtype of the loss."""
    if value is None:
        return None
    if not isinstance(scale, Tensor) and scale == 0:
        raise ValueError(f"logit_scale {scale} has no temperature that base_temperature could divide")
    value = checks.temperature(value, x, "base_temperature")
    return value.to(compute_dtype(x)) if isinstance(value, Tensor) else value
