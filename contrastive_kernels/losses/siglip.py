"""The sigmoid loss of SigLIP: the function and its module."""

from __future__ import annotations

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
from contrastive_kernels.losses._options import (
    check_cutoff,
    check_reduction,
    cutoff_from,
    detached,
    reduce,
    row_factors,
    scale_from,
    softplus,
)
from contrastive_kernels.losses._softmax import statistics
from contrastive_kernels.primitives import (
    Group,
    Pairs,
    Softplus,
    checks,
    over_ranks,
    row_dot,
    shards_of,
    sweep,
    unit_rows,
    weighted_total,
)

__all__ = ["SigLipLoss", "siglip_loss"]


class SigLipArguments(BackendArguments, ReductionArguments, CutoffArguments, total=False):
    """Keyword arguments of `siglip_loss`."""

    temperature: float | Tensor | None
    negative_only: bool
    ids: Tensor | None


@overload
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor | None = None,
    logit_bias: float | Tensor | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[SigLipArguments],
) -> Loss: ...
@overload
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor | None = None,
    logit_bias: float | Tensor | None = None,
    *,
    return_stats: Literal[True],
    **options: Unpack[SigLipArguments],
) -> tuple[Loss, ContrastiveStats]: ...
@overload
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor | None = None,
    logit_bias: float | Tensor | None = None,
    *,
    return_stats: bool,
    **options: Unpack[SigLipArguments],
) -> Loss | tuple[Loss, ContrastiveStats]: ...
@over_ranks
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor | None = None,
    logit_bias: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    negative_only: bool = False,
    normalize: bool = False,
    reduction: str = "mean",
    weight: Tensor | None = None,
    ids: Tensor | None = None,
    cutoff: float | Tensor | None = None,
    cutoff_margin: float | Tensor | None = None,
    return_stats: bool = False,
    backend: str | None = None,
    group: Group | None = None,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    r"""Return the pairwise sigmoid loss of SigLIP from one sweep, without the N x N logits.

    .. math:: L = \frac1N \Bigl[ \sum_i \log(1 + e^{-u_{ii}}) + \sum_{i \ne j} \log(1 + e^{u_{ij}}) \Bigr],
        \qquad u_{ij} = a \langle x_i, y_j \rangle + b

    Divided by N, not by the number of pairs.

    Args:
        image_features: x, ``(N, D)``, of unit norm (as the model gives them).
        text_features: y, ``(N, D)``, likewise.
        logit_scale: a, already exponentiated; float or tensor with one element (differentiable). Raw rows and the
            logarithm of a scale are no error; the ``logit_max`` of ``return_stats`` shows them, as for `clip_loss`.
        logit_bias: b, likewise; None for 0. Training starts from about -10.
        temperature: 1 / a instead of logit_scale.
        negative_only: every pair is a negative, those with i = j too: the texts are another device's.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (row sums).
        weight: ``(N,)`` per image; the mean is then sum(w l) / sum(w).
        ids: ``(N,)`` integers; other pairs with the same id are no negatives (duplicate captions or images).
        cutoff: float or ``(N,)``; negatives more similar to the image than this are dropped, the positive never is.
        cutoff_margin: the same, as the positive's similarity plus a margin.
        return_stats: also return `ContrastiveStats` of the rows of logits; ``lse`` is over all kept texts.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch. None: this
            process alone.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``; float32 (float64 for float64 inputs). With ``return_stats`` the pair
        (loss, stats).

    Raises:
        ValueError: shapes that do not fit, an empty batch, neither or both of logit_scale and temperature, or
            ``negative_only`` with an option that refers to positives (ids, cutoff_margin, return_stats).
        TypeError: dtypes that differ or are not floating (ids: not integer).
        RuntimeError: tensors on different devices.

    Source: Zhai, Mustafa, Kolesnikov, Beyer, ICCV 2023, arXiv:2303.15343.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 16, 8), dim=-1).unbind(0)
        >>> log_scale, bias = torch.nn.Parameter(torch.tensor(10.0).log()), torch.nn.Parameter(torch.tensor(-10.0))
        >>> ck.siglip_loss(image, text, log_scale.exp(), bias).shape
        torch.Size([])
    """
    shards = shards_of(group)
    checks.paired("image_features", image_features, "text_features", text_features)
    check_reduction(image_features, reduction, weight)
    check_cutoff(image_features, cutoff, cutoff_margin)
    checks.backend(image_features, backend)
    if negative_only:
        _check_no_positives(ids=ids, cutoff_margin=cutoff_margin, return_stats=return_stats or None)
    ids = checks.optional_ids("ids", ids, image_features.shape[0], image_features)
    scale = scale_from(temperature, logit_scale, image_features)
    bias = 0.0 if logit_bias is None else checks.scalar("logit_bias", logit_bias, image_features)

    x, y = unit_rows(image_features, normalize, backend), unit_rows(text_features, normalize, backend)
    similarity = row_dot(x, y, backend)
    limit = cutoff_from(cutoff, cutoff_margin, similarity)
    pairs = Pairs(ids, ids, limit, diagonals=int(not negative_only))
    term, positive = Softplus(scale, bias), scale * similarity + bias
    attraction = 0.0 if negative_only else softplus(-positive)
    if return_stats:
        out = sweep(x, y, pairs, scale=detached(scale), term=term, maximum=True, backend=backend, shards=shards)
        negative_lse, negative_max = (v + detached(bias) for v in (out.row_lse.squeeze(0), out.row_max))
        loss = reduce(out.row_sum + attraction, weight, reduction, shards)
        return loss, statistics(positive, torch.logaddexp(negative_lse, positive), negative_max, shards)
    if reduction == "none":
        row_sum = sweep(x, y, pairs, term=term, exponents=(), backend=backend, shards=shards).row_sum
        return reduce(row_sum + attraction, weight, reduction, shards)
    factors = row_factors(x, weight, reduction, shards)
    repulsion = weighted_total(x, y, pairs, term=term, weight=factors, backend=backend, shards=shards)
    return repulsion if negative_only else repulsion + (factors * attraction).sum()


class SigLipLoss(LossModule):
    """`siglip_loss` as a module; the learnable scale and bias belong to the model and come with every call.

    Args:
        options: keyword arguments of `siglip_loss`.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.SigLipLoss(normalize=True)(torch.randn(8, 4), torch.randn(8, 4), torch.tensor(10.0), -10.0).shape
        torch.Size([])
    """

    function = staticmethod(siglip_loss)

    def __init__(
        self,
        *,
        return_stats: bool = False,
        **options: Unpack[SigLipArguments],
    ) -> None:
        super().__init__(return_stats=return_stats, **options)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor | None = None,
        logit_bias: float | Tensor | None = None,
        **inputs: Any,
    ) -> Tensor | tuple[Tensor, ContrastiveStats]:
        """Return the loss; `inputs` are per-batch keyword arguments: weight, ids, cutoff, negative_only."""
        return self.function(image_features, text_features, logit_scale, logit_bias, **self.options(**inputs))


def _check_no_positives(**given: object) -> None:
    """Raise if an option is given that refers to positives."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} refers to the positive pairs, and with negative_only=True there are none")
