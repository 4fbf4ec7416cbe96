"""The hard-negative loss: the function and its module."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from contrastive_kernels.losses._arguments import (
    BackendArguments,
    ContrastiveStats,
    CutoffArguments,
    Loss,
    ReductionArguments,
)
from contrastive_kernels.losses._module import LossModule
from contrastive_kernels.losses._options import SoftmaxOptions
from contrastive_kernels.losses._polarization import Polarization
from contrastive_kernels.losses._softmax import Negatives, softmax_loss, sweep_negatives
from contrastive_kernels.losses._views import Anchors
from contrastive_kernels.primitives import Count, Group, Pairs, checks, kept_counts, over_ranks, sweep

__all__ = ["HardNegativeLoss", "hard_negative_loss"]


class HardNegativeArguments(BackendArguments, ReductionArguments, CutoffArguments, total=False):
    """Keyword arguments of `hard_negative_loss`."""

    logit_scale: float | Tensor | None
    estimator: Literal["hard", "easy"]
    detach_weights: bool
    ids: Tensor | None
    polarization: Polarization | None


@overload
def hard_negative_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor | None = None,
    tau_plus: float = 0.1,
    beta: float = 1.0,
    return_stats: Literal[False] = False,
    **options: Unpack[HardNegativeArguments],
) -> Loss: ...
@overload
def hard_negative_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor | None = None,
    tau_plus: float = 0.1,
    beta: float = 1.0,
    return_stats: Literal[True],
    **options: Unpack[HardNegativeArguments],
) -> tuple[Loss, ContrastiveStats]: ...
@overload
def hard_negative_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor | None = None,
    tau_plus: float = 0.1,
    beta: float = 1.0,
    return_stats: bool,
    **options: Unpack[HardNegativeArguments],
) -> Loss | tuple[Loss, ContrastiveStats]: ...
@over_ranks
def hard_negative_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    tau_plus: float = 0.1,
    beta: float = 1.0,
    estimator: Literal["hard", "easy"] = "hard",
    detach_weights: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
    weight: Tensor | None = None,
    ids: Tensor | None = None,
    cutoff: float | Tensor | None = None,
    cutoff_margin: float | Tensor | None = None,
    polarization: Polarization | None = None,
    return_stats: bool = False,
    backend: str | None = None,
    group: Group | None = None,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    r"""Return the hard-negative loss: the debiased loss with negatives weighted by their hardness, in one sweep.

    .. math:: L = \frac{1}{2N} \sum_{i=1}^{2N} \Bigl[ \log\bigl(e^{u_i^+} + N_i\bigr) - u_i^+ \Bigr], \qquad
        N_i = \max\Bigl(\frac{R_i - \tau^+ n_i e^{u_i^+}}{1 - \tau^+},\ n_i e^{-1/T}\Bigr), \qquad
        R_i = n_i \frac{\sum_j e^{(1 + \beta) u_{ij}}}{\sum_j e^{\beta u_{ij}}}

    over the rows of both views, :math:`u_{ij} = \langle z_i, z_j \rangle / T`, j running over the :math:`n_i` rows of
    other samples. Computed from logarithms, so that no temperature overflows.

    Args:
        z0: ``(N, D)``, the first view.
        z1: ``(N, D)``, the second view.
        temperature: T, float or 0-dim tensor (differentiable); 0.5 unless ``logit_scale`` is given.
        logit_scale: 1 / T instead.
        tau_plus: :math:`\tau^+`, the probability that a negative is a positive, in [0, 1).
        beta: concentration on the hard negatives, at least 0; 0 is `debiased_loss`.
        estimator: ``"hard"``, or ``"easy"``: :math:`N_i = \sum_j e^{u_{ij}}`, which is NT-Xent and takes
            neither tau_plus nor beta nor detach_weights.
        detach_weights: take the weights :math:`e^{\beta u_{ij}}` as constants; the official code differentiates them.
        normalize: rows to unit norm first; the lower bound of :math:`N_i` takes it for granted.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per sample; the mean is then sum(w l) / sum(w).
        ids: ``(N,)`` integers; other samples with the same id are no negatives.
        cutoff: float, ``(N,)`` or ``(2N,)``; negatives more similar than this are dropped, and not counted.
        cutoff_margin: the same, as the positive's similarity plus a margin.
        polarization: adds `Polarization` over the negatives, from the same sweep.
        return_stats: also return `ContrastiveStats`; its lse is :math:`\log(e^{u_i^+} + N_i)`.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch. None: this
            process alone.

    Returns:
        0-dim, or ``(2N,)`` for ``"none"``, first view first; float32 (float64 for float64 inputs). With
        ``return_stats`` the pair (loss, stats). 0 for N = 1 and for a row without negatives.

    Raises:
        ValueError: shapes that do not fit, an empty batch, tau_plus outside [0, 1), a negative beta, an unknown
            estimator, temperature near or below 0, options that ``"easy"`` does not take.
        TypeError: dtypes that differ or are not floating (ids: not integer).
        RuntimeError: tensors on different devices.

    Source: Robinson, Chuang, Sra, Jegelka, ICLR 2021, arXiv:2010.04592.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> z0, z1 = torch.randn(2, 16, 8).unbind(0)
        >>> ck.hard_negative_loss(z0, z1, temperature=0.2, beta=0.5).shape
        torch.Size([])
    """
    checks.paired("z0", z0, "z1", z1)
    checks.choice("estimator", estimator, ("hard", "easy"))
    tau_plus, beta = _correction(tau_plus, beta)
    if estimator == "easy":
        checks.no_effect(
            "estimator='easy'", tau_plus=(tau_plus, 0.1), beta=(beta, 1.0), detach_weights=(detach_weights, False)
        )
    options = SoftmaxOptions.of(
        z0,
        temperature=temperature,
        logit_scale=logit_scale,
        default_temperature=0.5,
        reduction=reduction,
        weight=weight,
        polarization=polarization,
        return_stats=return_stats,
        backend=backend,
        group=group,
    )
    anchors = Anchors.of(
        z0,
        z1,
        normalize=normalize,
        ids=ids,
        cutoff=cutoff,
        cutoff_margin=cutoff_margin,
        backend=backend,
        shards=options.shards,
    )
    positives = anchors.positives(options)
    if estimator == "easy":
        negatives = sweep_negatives(anchors.z, None, anchors.pairs, options)
    else:
        negatives = _weighted(anchors.z, anchors.pairs, options, beta, detach_weights)
        negatives = negatives._replace(lse=_corrected(negatives, positives.target, options.scale, tau_plus))
    return softmax_loss([negatives], positives, options)


class HardNegativeLoss(LossModule):
    """`hard_negative_loss` as a module; its ``beta`` may be set anew, to anneal it.

    Args:
        temperature: 0.5 unless ``logit_scale`` is given; an ``nn.Parameter`` is trained.
        tau_plus: the probability that a negative is a positive.
        beta: concentration on the hard negatives.
        options: further keyword arguments of `hard_negative_loss`.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.HardNegativeLoss(0.2, beta=0.5)(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(hard_negative_loss)

    def __init__(
        self,
        temperature: float | Tensor | None = None,
        tau_plus: float = 0.1,
        beta: float = 1.0,
        *,
        return_stats: bool = False,
        **options: Unpack[HardNegativeArguments],
    ) -> None:
        super().__init__(temperature=temperature, tau_plus=tau_plus, beta=beta, return_stats=return_stats, **options)

    def forward(
        self,
        z0: Tensor,
        z1: Tensor,
        **inputs: Any,
    ) -> Tensor | tuple[Tensor, ContrastiveStats]:
        """Return the loss; `inputs` are per-batch keyword arguments: weight, ids, cutoff."""
        return self.function(z0, z1, **self.options(**inputs))


def _correction(tau_plus: float, beta: float) -> tuple[float, float]:
    """Return both as Python's numbers; raise unless they are a probability and not negative."""
    tau_plus, beta = checks.number("tau_plus", tau_plus), checks.number("beta", beta)
    if not 0 <= tau_plus < 1:
        raise ValueError(f"tau_plus {tau_plus} must be at least 0 and below 1: it is a probability")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta {beta} must be at least 0 and finite")
    return tau_plus, beta


def _weighted(z: Tensor, pairs: Pairs, options: SoftmaxOptions, beta: float, detach_weights: bool) -> Negatives:
    """Return the negatives of the rows of z, whose log-sum-exp is that of the sum R of the weighted ones; one sweep."""
    band = None if options.polarization is None else options.polarization.band()
    # A number over a cutoff comes from the sweep that applies it, so that both see the same pairs.
    counted = band is None and pairs.cutoff is not None
    out = sweep(
        z,
        None,
        pairs,
        scale=options.scale,
        exponents=(1.0 + beta, beta) if beta else (1.0,),
        term=Count() if counted else band,
        maximum=options.return_stats,
        backend=options.backend,
        shards=options.shards,
    )
    number = out.row_sum.detach() if counted else kept_counts(z, None, pairs, options.backend, options.shards)
    # A row of no negatives has the log-sum-exps -inf, whose difference is NaN.
    empty = (number == 0) | (out.row_lse[0] == -torch.inf)
    lse = out.row_lse.masked_fill(empty, 0)
    total = lse[0]
    if beta:
        weighted, weights = lse
        if detach_weights:
            constant = weighted.detach()
            weighted, weights = constant + (weighted - constant) / (1 + beta), weights.detach()
        total = weighted - weights + number.clamp(min=1).log()
    return Negatives(
        lse=total.masked_fill(empty, -torch.inf),
        maximum=out.row_max if options.return_stats else None,
        counts=number,
        band_sum=None if band is None else out.row_sum,
    )


def _corrected(negatives: Negatives, positive: Tensor, scale: float | Tensor, tau_plus: float) -> Tensor:
    r"""Return ``log max((R - tau_plus n p) / (1 - tau_plus), n exp(-|scale|))``, -inf without gradient where n = 0."""
    assert negatives.counts is not None
    total, log_count = negatives.lse, negatives.counts.clamp(min=1).log()
    estimate = total
    if tau_plus:
        hidden = math.log(tau_plus) + log_count + positive
        estimate = _logsubexp(total, hidden) - math.log1p(-tau_plus)
    floor = log_count - (scale.abs() if isinstance(scale, Tensor) else abs(scale))
    # A NaN is not below the floor and stays.
    estimate = torch.where(estimate < floor, floor, estimate)
    return estimate.masked_fill(total == -torch.inf, -torch.inf)


def _logsubexp(a: Tensor, b: Tensor) -> Tensor:
    """Return ``log(exp(a) - exp(b))``, -inf without gradient where ``a <= b``."""
    x = b - a
    nothing = (x >= 0) | (a == -torch.inf)
    x = x.masked_fill(nothing, -1)
    # Each form where it is accurate, with a harmless argument elsewhere: the branch not taken has a gradient too.
    near = x > -math.log(2)
    log1mexp = torch.where(
        near, (-torch.expm1(x.masked_fill(~near, -0.5))).log(), torch.log1p(-x.masked_fill(near, -1).exp())
    )
    return (a.masked_fill(nothing, 0) + log1mexp).masked_fill(nothing, -torch.inf)
