"""SupCon in its meanings, with partial labels, among the views or against other rows: the function and its module."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from contrastive_kernels.losses._arguments import BackendArguments, ContrastiveStats, Loss, ReductionArguments
from contrastive_kernels.losses._classes import Candidates, OtherRows, Views, class_ids
from contrastive_kernels.losses._module import LossModule
from contrastive_kernels.losses._options import UNLABELLED, SoftmaxOptions, mean_over, reduce, softplus
from contrastive_kernels.losses._softmax import statistics, sweep_negatives
from contrastive_kernels.losses._views import other_views
from contrastive_kernels.primitives import (
    Group,
    Pairs,
    Softplus,
    checks,
    compute_dtype,
    over_ranks,
    row_dot,
    shards_of,
    sweep,
    unit_rows,
)

__all__ = ["SupConLoss", "sup_con_loss"]


class SupConArguments(BackendArguments, ReductionArguments, total=False):
    """Keyword arguments of `sup_con_loss`."""

    logit_scale: float | Tensor | None
    base_temperature: float | Tensor | None
    unlabelled: float | None
    contrast_features: Tensor | None
    contrast_labels: Tensor | None
    exclude: Tensor | None
    positives: Literal["out", "in", "sum", "pairwise"]
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
    unlabelled: float | None = UNLABELLED,
    contrast_features: Tensor | None = None,
    contrast_labels: Tensor | None = None,
    exclude: Tensor | None = None,
    positives: Literal["out", "in", "sum", "pairwise"] = "out",
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
        \text{sum:} \quad L_i &= -\log \frac{\sum_{p \in P(i)} e^{u_{ip}}}{\sum_{j \ne i} e^{u_{ij}}} \\
        \text{pairwise:} \quad L_i &= \frac{1}{k_i} \sum_{p \in P(i)}
            \log\Bigl(1 + \sum_{j \in \mathrm{Neg}(i)} e^{u_{ij} - u_{ip}}\Bigr)

    with :math:`u_{ij} = \langle z_i, z_j \rangle / T` over the rows z of all views, P(i) the :math:`k_i` other rows of
    i's class or sample, Neg(i) the rows of all others. Without labels P(i) are the other views of the sample; with two
    of them all four are NT-Xent. With ``contrast_features``, a memory or the rows of another batch, j and p are among
    those rows, and the anchors not among each other's.

    Args:
        features: ``(N, V, D)``, V views of each sample, samples first, or ``(N, D)``.
        labels: ``(N,)`` integers, bools or floats, which are compared by value. A sample whose label is ``unlabelled``
            or NaN has none and matches only its own views. None: no labels. With labels and ``"out"`` the loss of an
            anchor with one positive is rounded to 1e-7 or so in float32.
        temperature: T, float or 0-dim tensor (differentiable); 0.1 unless ``logit_scale`` is given.
        logit_scale: 1 / T instead.
        base_temperature: multiplies the loss by T / base_temperature; the official code has 0.07. None: factor 1.
        unlabelled: the value that means "no label". None: every value is a class.
        contrast_features: ``(M, D)``, the rows that the anchors are compared with in place of each other,
            differentiable. Needs both labels. None: the rows of all views.
        contrast_labels: ``(M,)``, floats if ``labels`` are and else none; a row without label is a negative of all.
        exclude: ``(N,)`` integers, or ``(N, V)`` for every row: which of ``contrast_features`` is the anchor's own copy
            and is left out, neither positive nor negative. Below 0 or None: none.
        positives: ``"out"``, the paper's loss; ``"in"``, the mean over positives inside the logarithm; ``"sum"``, their
            sum there, infinite for an anchor without any; ``"pairwise"``, each positive alone against the negatives
            (multi-positive NT-Xent).
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
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch, and so are
            their contrast rows, of which every rank has its own number; ``exclude`` counts in those of the anchor's
            rank. None: this process alone.

    Returns:
        0-dim, or for ``"none"`` ``(V * N,)``, first view first (``(N,)`` with ``contrast_mode="one"``); float32
        (float64 for float64 inputs). With ``return_stats`` the pair (loss, stats). An anchor without positives
        contributes 0, with ``"sum"`` infinity.

    Raises:
        ValueError: shapes that do not fit, an empty batch, an unknown option, temperature near or below 0, an
            average without the reduction ``"mean"``, contrast rows without labels, an option without effect.
        TypeError: features are not floating, dtypes that differ, integer labels beside floating ones.
        RuntimeError: tensors on different devices.

    Source: Khosla et al., NeurIPS 2020, arXiv:2004.11362, eq. 2 and 3; "sum" is the neighbourhood components analysis
    of Goldberger et al., NeurIPS 2004, with similarities; pairwise as in pytorch-metric-learning; other rows as in the
    cross-batch memory of Wang et al., CVPR 2020, arXiv:1912.06798.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> features, labels = torch.randn(16, 2, 8), torch.randint(4, (16,))
        >>> ck.sup_con_loss(features, labels, temperature=0.1).shape
        torch.Size([])
    """
    checks.tensor("features", features)
    if features.dim() == 2:
        checks.features("features", features)
        features = features[:, None]
    checks.views("features", features, minimum=1)
    checks.not_empty("features", features)
    checks.choice("positives", positives, ("out", "in", "sum", "pairwise"))
    checks.choice("same_label", same_label, ("positive", "ignore", "negative"))
    checks.choice("average", average, ("all", "with_positives"))
    checks.choice("contrast_mode", contrast_mode, ("all", "one"))
    if reduction != "mean":
        checks.no_effect(f"reduction={reduction!r}", average=(average, "all"))
    if unlabelled is not None:
        checks.number("unlabelled", unlabelled)
    if same_label == "negative":
        checks.no_effect("same_label='negative'", unlabelled=(unlabelled, UNLABELLED))
    n = features.shape[0]
    labels = None if labels is None else checks.labels("labels", labels, n, features)
    if contrast_features is None:
        given = {"contrast_labels": (contrast_labels, None), "exclude": (exclude, None)}
        checks.no_effect("contrast_features=None", **given)
    else:
        labels, contrast_labels, exclude = _check_contrast(
            features, labels, contrast_features, contrast_labels, exclude, same_label, shards_of(group).alone
        )
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

    shards = options.shards
    views = unit_rows(features.transpose(0, 1), normalize, backend)
    heads = views[:1] if contrast_mode == "one" else views
    if contrast_features is not None and labels is not None and contrast_labels is not None:
        rows = unit_rows(contrast_features, normalize, backend)
        others = OtherRows.of(heads, rows, labels, contrast_labels, unlabelled, exclude, shards)
        anchors = _towards_class(others, positives, options)
    else:
        ids = shards.positions(n, views.device)
        if labels is not None and same_label != "negative":
            ids = shards.own(class_ids(shards.gather(labels), unlabelled), labels)
        batch = Views(views, heads, ids, shards)
        towards = _towards_own_views if labels is None or same_label != "positive" else _towards_class
        anchors = towards(batch, positives, options)
    losses, share = anchors.losses, None
    if reduction == "mean" and anchors.number is not None:
        share = _share(anchors.number, positives, average)
    if share is not None:
        # of a sum without positives, which does not count; a NaN does
        losses = losses.masked_fill((share == 0) & (losses == torch.inf), 0)
    if base_temperature is not None:
        losses = losses / (options.scale * base_temperature)
    loss = reduce(losses, weight, reduction, shards) if share is None else mean_over(losses, share, weight, shards)
    return loss if anchors.stats is None else (loss, anchors.stats)


class SupConLoss(LossModule):
    """`sup_con_loss` as a module.

    Args:
        temperature: 0.1 unless ``logit_scale`` is given; an ``nn.Parameter`` is trained.
        options: further keyword arguments of `sup_con_loss`.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.SupConLoss(0.07)(torch.randn(8, 2, 4), torch.randint(3, (8,))).shape
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
        """Return the loss; `inputs` are per-batch keyword arguments: weight, contrast_features, exclude, ..."""
        return self.function(features, labels, **self.options(**inputs))


class _Anchors(NamedTuple):
    """The loss of every anchor."""

    losses: Tensor
    number: Tensor | None = None  # of positives; None: the same for all anchors
    stats: ContrastiveStats | None = None  # where the options ask for them


def _towards_own_views(batch: Views, meaning: str, options: SoftmaxOptions) -> _Anchors:
    """Return the losses towards the other views of the sample: a few positives per anchor, and one sweep."""
    anchors, columns = batch.operands()
    negatives = sweep_negatives(anchors, columns, batch.different(), options)
    number = len(batch.views) - 1
    if number == 0:
        none = torch.full_like(negatives.lse, -torch.inf)
        # A product, so that a NaN is not lost.
        losses, mean, own_lse = 0 * row_dot(anchors, anchors), none, none
        losses = losses + torch.inf if meaning == "sum" else losses
    else:
        if columns is None:
            own = options.scale * other_views(batch.views, options.backend)
        else:
            own = options.scale * torch.stack([row_dot(anchors, view, options.backend) for view in batch.views[1:]], 1)
        own_lse, mean = own.logsumexp(1), own.mean(1)
        if meaning == "pairwise" or number == 1:
            # Of a single positive all meanings are this; the terms that cancel below would leave their rounding.
            losses = softplus(negatives.lse[:, None] - own).mean(1)
        else:
            beside: dict[str, Tensor | float] = {"out": own_lse - mean, "in": math.log(number), "sum": 0.0}
            losses = softplus(negatives.lse - own_lse) + beside[meaning]
    numbers = torch.zeros_like(losses) if number == 0 else None
    if negatives.maximum is None:
        return _Anchors(losses, numbers)
    lse = torch.logaddexp(negatives.lse, mean if meaning == "pairwise" else own_lse)
    return _Anchors(losses, numbers, statistics(mean, lse, negatives.maximum, options.shards))


def _towards_class(batch: Candidates, meaning: str, options: SoftmaxOptions) -> _Anchors:
    """Return the losses towards all other rows of the class: sums from the sum of the class, or from a sweep."""
    number = batch.positive_counts()
    alone, divisor = number == 0, number.clamp(min=1)
    anchors, columns = batch.operands()
    swept = replace(options, shards=batch.shards)

    def row_lse(pairs: Pairs) -> Tensor:
        out = sweep(anchors, columns, pairs, scale=options.scale, backend=options.backend, shards=batch.shards)
        return out.row_lse.squeeze(0)

    def mean_logit() -> Tensor:
        return options.scale * batch.positive_sums() / divisor

    def of_all(losses: Tensor, lse: Tensor) -> Tensor:
        # A difference, so that a NaN is not lost.
        lse = lse.masked_fill(lse == -torch.inf, 0)
        return torch.where(alone, lse - lse + (torch.inf if meaning == "sum" else 0.0), losses)

    if meaning == "out":
        # Of two or more positives the loss is at least log 2: nothing cancels. Of a single one it does; to avoid that
        # would take a sweep more.
        mean = mean_logit()
        lse = row_lse(batch.all_pairs())
        losses = of_all(lse - mean, lse)
        if not options.return_stats:
            return _Anchors(losses, number)
        frozen = None if columns is None else columns.detach()
        maximum = sweep_negatives(anchors.detach(), frozen, batch.different(), swept).maximum
    else:
        negatives = sweep_negatives(anchors, columns, batch.different(), swept)
        nothing = negatives.lse == -torch.inf
        if meaning == "pairwise":
            term = Softplus(-options.scale, negatives.lse.masked_fill(nothing, 0))
            sums = sweep(
                anchors, columns, batch.equal(), term=term, exponents=(), backend=options.backend, shards=batch.shards
            ).row_sum
            losses = (sums / divisor).masked_fill(nothing, 0)
        else:
            own_lse = row_lse(batch.equal())
            losses = softplus(negatives.lse - own_lse.masked_fill(alone, 0))
            losses = losses + divisor.log() if meaning == "in" else losses
        losses = of_all(losses, negatives.lse)
        if not options.return_stats:
            return _Anchors(losses, number)
        mean, maximum = mean_logit(), negatives.maximum
        own = mean if meaning == "pairwise" else own_lse
        lse = torch.logaddexp(negatives.lse, own.masked_fill(alone, -torch.inf))
    assert maximum is not None
    return _Anchors(losses, number, statistics(mean.masked_fill(alone, -torch.inf), lse, maximum, options.shards))


def _share(number: Tensor, meaning: str, average: str) -> Tensor | None:
    """Return how often each anchor counts in the mean, from the number of its positives; None: all count once."""
    if meaning == "pairwise":
        return number
    return number > 0 if average == "with_positives" else None


def _check_contrast(
    features: Tensor,
    labels: Tensor | None,
    contrast_features: Tensor,
    contrast_labels: Tensor | None,
    exclude: Tensor | None,
    same_label: str,
    alone: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return both labels in one dtype and `exclude` as (V, N)."""
    checks.features("contrast_features", contrast_features)
    checks.alike("features", features, "contrast_features", contrast_features, rows=False)
    if alone:
        checks.not_empty("contrast_features", contrast_features)
    if labels is None or contrast_labels is None:
        missing = "labels" if labels is None else "contrast_labels"
        raise ValueError(f"contrast_features is given but {missing} is not; the positives are the rows of equal labels")
    if same_label != "positive":
        raise ValueError(f"same_label {same_label!r} leaves no positive among contrast_features; leave it out")
    contrast_labels = checks.labels("contrast_labels", contrast_labels, contrast_features.shape[0], features)
    if labels.is_floating_point() != contrast_labels.is_floating_point():
        raise TypeError(
            f"labels became {labels.dtype} and contrast_labels {contrast_labels.dtype}; cast one of them, so that both "
            "are integers or both are floats"
        )
    common = torch.promote_types(labels.dtype, contrast_labels.dtype)
    n, v = features.shape[:2]
    if exclude is not None:
        checks.tensor("exclude", exclude)
        exclude = checks.ids("exclude", exclude, (n, v) if exclude.dim() == 2 else (n,), features)
        exclude = exclude.expand(v, n) if exclude.dim() == 1 else exclude.T
    return labels.to(common), contrast_labels.to(common), exclude


def _base_temperature(value: float | Tensor | None, scale: float | Tensor, x: Tensor) -> float | Tensor | None:
    """Return a temperature that can be divided by; a tensor in the dtype of the loss."""
    if value is None:
        return None
    if not isinstance(scale, Tensor) and scale == 0:
        raise ValueError(f"logit_scale {scale} has no temperature that base_temperature could divide")
    value = checks.temperature(value, x, "base_temperature")
    return value.to(compute_dtype(x)) if isinstance(value, Tensor) else value
