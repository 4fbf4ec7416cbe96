"""NT-Xent, the loss of SimCLR: the function and its module."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from typing import Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from contrastive_kernels.losses._arguments import ContrastiveStats, CutoffArguments, Loss, SoftmaxArguments
from contrastive_kernels.losses._module import LossModule
from contrastive_kernels.losses._options import REDUCTIONS, SoftmaxOptions
from contrastive_kernels.losses._polarization import Polarization
from contrastive_kernels.losses._softmax import Negatives, Positives, softmax_loss, softmax_value, sweep_negatives
from contrastive_kernels.losses._views import Anchors, check_views, stack_views
from contrastive_kernels.primitives import Group, checks, over_ranks

__all__ = ["NTXentLoss", "nt_xent_loss"]

NT_XENT_REDUCTIONS = (*REDUCTIONS, "sum_directions")


class NTXentArguments(SoftmaxArguments, CutoffArguments, total=False):
    """Keyword arguments of `nt_xent_loss`."""

    logit_scale: float | Tensor | None
    multi_view: Literal["out", "pairs"]
    ids: Tensor | None
    polarization: Polarization | None


@overload
def nt_xent_loss(
    z0: Tensor,
    z1: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    return_stats: Literal[False] = False,
    **options: Unpack[NTXentArguments],
) -> Loss: ...
@overload
def nt_xent_loss(
    z0: Tensor,
    z1: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    return_stats: Literal[True],
    **options: Unpack[NTXentArguments],
) -> tuple[Loss, ContrastiveStats]: ...
@overload
def nt_xent_loss(
    z0: Tensor,
    z1: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    return_stats: bool,
    **options: Unpack[NTXentArguments],
) -> Loss | tuple[Loss, ContrastiveStats]: ...
@over_ranks
def nt_xent_loss(
    z0: Tensor,
    z1: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    multi_view: Literal["out", "pairs"] = "out",
    normalize: bool = True,
    reduction: str = "mean",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ids: Tensor | None = None,
    cutoff: float | Tensor | None = None,
    cutoff_margin: float | Tensor | None = None,
    polarization: Polarization | None = None,
    return_stats: bool = False,
    backend: str | None = None,
    group: Group | None = None,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    r"""Return NT-Xent, the loss of SimCLR, without the 2N x 2N similarity matrix.

    .. math:: L = \frac{1}{2N} \sum_{i=1}^{2N} \Bigl[ \log \sum_{j \ne i} e^{u_{ij}} - u_{i p(i)} \Bigr],
        \qquad u_{ij} = \langle z_i, z_j \rangle / T

    over the rows z of both views, p(i) the other view of i.

    Args:
        z0: ``(N, D)``, the first view; or all views as ``(N, V, D)``, samples first, with ``z1=None``.
        z1: ``(N, D)``, the second view.
        temperature: T, float or 0-dim tensor (differentiable); 0.5 unless ``logit_scale`` is given.
        logit_scale: 1 / T instead.
        multi_view: for V > 2 views: ``"out"``, every other view of the sample is a positive and L the mean of their
            losses, all views in the denominator; or ``"pairs"``, the mean of the two-view loss over all pairs of views.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or ``"sum_directions"``, twice the mean, as the official code. The
            polarization is added once to either.
        weight: ``(N,)`` per sample; the mean is then sum(w l) / sum(w).
        label_smoothing: share of the target spread over all kept candidates.
        ids: ``(N,)`` integers; other samples with the same id are no negatives. -1 is an id as every other number.
        cutoff: float, ``(N,)`` or ``(2N,)``; negatives more similar than this are dropped, the positive never is.
        cutoff_margin: the same, as the positive's similarity plus a margin.
        polarization: adds `Polarization` over the negatives, from the same sweep.
        return_stats: also return `ContrastiveStats`.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch. None: this
            process alone.

    Returns:
        0-dim, or ``(2N,)`` for ``"none"``, first view first; float32 (float64 for float64 inputs). With
        ``return_stats`` the pair (loss, stats). 0 for N = 1.

    Raises:
        ValueError: shapes that do not fit, an empty batch, temperature near or below 0, ``multi_view="pairs"`` with
            ``reduction="none"``, ``return_stats`` or a cutoff per anchor.
        TypeError: dtypes that differ or are not floating (ids: not integer).
        RuntimeError: tensors on different devices.

    Source: Chen, Kornblith, Norouzi, Hinton, ICML 2020, arXiv:2002.05709, eq. 1.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> z0, z1 = torch.randn(2, 16, 8).unbind(0)
        >>> ck.nt_xent_loss(z0, z1, temperature=0.1).shape
        torch.Size([])
    """
    v = check_views(z0, z1)
    checks.choice("multi_view", multi_view, ("out", "pairs"))
    averaged = multi_view == "pairs" and v > 2
    if averaged and (reduction == "none" or return_stats):
        raise ValueError('multi_view="pairs" averages over pairs of views: no reduction="none", no return_stats')
    options = SoftmaxOptions.of(
        z0,
        temperature=temperature,
        logit_scale=logit_scale,
        default_temperature=0.5,
        reduction=reduction,
        weight=weight,
        label_smoothing=label_smoothing,
        polarization=polarization,
        return_stats=return_stats,
        backend=backend,
        group=group,
        reductions=NT_XENT_REDUCTIONS,
    )
    gather = partial(
        Anchors.of,
        normalize=normalize,
        ids=ids,
        cutoff=cutoff,
        cutoff_margin=cutoff_margin,
        backend=backend,
        shards=options.shards,
    )
    if averaged:
        pairs_of_views = combinations(stack_views(z0, z1), 2)
        terms = [_terms(gather(first, second), options) for first, second in pairs_of_views]
        return torch.stack([softmax_value(*term, options) for term in terms]).mean()
    return softmax_loss(*_terms(gather(z0, z1), options), options)


class NTXentLoss(LossModule):
    """`nt_xent_loss` as a module.

    Args:
        temperature: 0.5 unless ``logit_scale`` is given; an ``nn.Parameter`` is trained.
        options: further keyword arguments of `nt_xent_loss`.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.NTXentLoss(0.1)(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(nt_xent_loss)
    reductions = NT_XENT_REDUCTIONS

    def __init__(
        self,
        temperature: float | Tensor | None = None,
        *,
        return_stats: bool = False,
        **options: Unpack[NTXentArguments],
    ) -> None:
        super().__init__(temperature=temperature, return_stats=return_stats, **options)

    def forward(
        self,
        z0: Tensor,
        z1: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor | tuple[Tensor, ContrastiveStats]:
        """Return the loss; `inputs` are per-batch keyword arguments: weight, ids, cutoff."""
        return self.function(z0, z1, **self.options(**inputs))


def _terms(anchors: Anchors, options: SoftmaxOptions) -> tuple[list[Negatives], Positives]:
    return [sweep_negatives(anchors.z, None, anchors.pairs, options)], anchors.positives(options)
