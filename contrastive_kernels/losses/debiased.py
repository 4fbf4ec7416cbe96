"""The debiased loss: the function and its module."""

from __future__ import annotations

from typing import Any, Literal, overload

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
from contrastive_kernels.losses._polarization import Polarization
from contrastive_kernels.losses.hard_negative import hard_negative_loss
from contrastive_kernels.primitives import Group, over_ranks

__all__ = ["DebiasedLoss", "debiased_loss"]


class DebiasedArguments(BackendArguments, ReductionArguments, CutoffArguments, total=False):
    """Keyword arguments of `debiased_loss`."""

    logit_scale: float | Tensor | None
    ids: Tensor | None
    polarization: Polarization | None


@overload
def debiased_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor | None = None,
    tau_plus: float = 0.1,
    return_stats: Literal[False] = False,
    **options: Unpack[DebiasedArguments],
) -> Loss: ...
@overload
def debiased_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor | None = None,
    tau_plus: float = 0.1,
    return_stats: Literal[True],
    **options: Unpack[DebiasedArguments],
) -> tuple[Loss, ContrastiveStats]: ...
@overload
def debiased_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor | None = None,
    tau_plus: float = 0.1,
    return_stats: bool,
    **options: Unpack[DebiasedArguments],
) -> Loss | tuple[Loss, ContrastiveStats]: ...
@over_ranks
def debiased_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    tau_plus: float = 0.1,
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
    r"""Return the debiased loss: NT-Xent whose negatives are corrected for the positives hidden among them.

    .. math:: L = \frac{1}{2N} \sum_{i=1}^{2N} \Bigl[ \log\bigl(e^{u_i^+} + N_i\bigr) - u_i^+ \Bigr], \qquad
        N_i = \max\Bigl(\frac{\sum_j e^{u_{ij}} - \tau^+ n_i e^{u_i^+}}{1 - \tau^+},\ n_i e^{-1/T}\Bigr)

    over the rows of both views, :math:`u_{ij} = \langle z_i, z_j \rangle / T`, j running over the :math:`n_i` rows of
    other samples. Not the decoupled loss, which is abbreviated alike.

    Args:
        z0: ``(N, D)``, the first view.
        z1: ``(N, D)``, the second view.
        temperature: T, float or 0-dim tensor (differentiable); 0.5 unless ``logit_scale`` is given.
        logit_scale: 1 / T instead.
        tau_plus: :math:`\tau^+`, the probability that a negative is a positive, in [0, 1).
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
        ValueError: shapes that do not fit, an empty batch, tau_plus outside [0, 1), temperature near or below 0.
        TypeError: dtypes that differ or are not floating (ids: not integer).
        RuntimeError: tensors on different devices.

    Source: Chuang, Robinson, Lin, Torralba, Jegelka, NeurIPS 2020, arXiv:2007.00224.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> z0, z1 = torch.randn(2, 16, 8).unbind(0)
        >>> ck.debiased_loss(z0, z1, tau_plus=0.05).shape
        torch.Size([])
    """
    return hard_negative_loss(
        z0,
        z1,
        temperature=temperature,
        logit_scale=logit_scale,
        tau_plus=tau_plus,
        beta=0.0,
        normalize=normalize,
        reduction=reduction,
        weight=weight,
        ids=ids,
        cutoff=cutoff,
        cutoff_margin=cutoff_margin,
        polarization=polarization,
        return_stats=return_stats,
        backend=backend,
        group=group,
    )


class DebiasedLoss(LossModule):
    """`debiased_loss` as a module.

    Args:
        temperature: 0.5 unless ``logit_scale`` is given; an ``nn.Parameter`` is trained.
        tau_plus: the probability that a negative is a positive.
        options: further keyword arguments of `debiased_loss`.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.DebiasedLoss(0.2, tau_plus=0.05)(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(debiased_loss)

    def __init__(
        self,
        temperature: float | Tensor | None = None,
        tau_plus: float = 0.1,
        *,
        return_stats: bool = False,
        **options: Unpack[DebiasedArguments],
    ) -> None:
        super().__init__(temperature=temperature, tau_plus=tau_plus, return_stats=return_stats, **options)

    def forward(
        self,
        z0: Tensor,
        z1: Tensor,
        **inputs: Any,
    ) -> Tensor | tuple[Tensor, ContrastiveStats]:
        """Return the loss; `inputs` are per-batch keyword arguments: weight, ids, cutoff."""
        return self.function(z0, z1, **self.options(**inputs))
