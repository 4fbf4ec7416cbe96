"""The loss of CLIP: the function and its module."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor
from typing_extensions import Unpack

from contrastive_kernels.losses._arguments import ContrastiveStats, CutoffArguments, Loss, SoftmaxArguments
from contrastive_kernels.losses._module import LossModule
from contrastive_kernels.losses._options import SoftmaxOptions, check_cutoff, cutoff_from, detached
from contrastive_kernels.losses._softmax import Positives, softmax_loss, sweep_both_directions
from contrastive_kernels.primitives import Group, Pairs, checks, over_ranks, row_dot, unit_rows

__all__ = ["ClipLoss", "clip_loss"]


class ClipArguments(SoftmaxArguments, CutoffArguments, total=False):
    """Keyword arguments of `clip_loss`."""

    temperature: float | Tensor | None
    ids: Tensor | None


@overload
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor | None = None,
    logit_bias: float | Tensor | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[ClipArguments],
) -> Loss: ...
@overload
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor | None = None,
    logit_bias: float | Tensor | None = None,
    *,
    return_stats: Literal[True],
    **options: Unpack[ClipArguments],
) -> tuple[Loss, ContrastiveStats]: ...
@overload
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor | None = None,
    logit_bias: float | Tensor | None = None,
    *,
    return_stats: bool,
    **options: Unpack[ClipArguments],
) -> Loss | tuple[Loss, ContrastiveStats]: ...
@over_ranks
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor | None = None,
    logit_bias: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ids: Tensor | None = None,
    cutoff: float | Tensor | None = None,
    cutoff_margin: float | Tensor | None = None,
    return_stats: bool = False,
    backend: str | None = None,
    group: Group | None = None,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    r"""Return the symmetric cross-entropy of CLIP, both directions from one sweep, without the N x N logits.

    .. math:: L = \frac{1}{2N} \sum_i \Bigl[ \log \sum_j e^{u_{ij}} - u_{ii} \Bigr]
                + \frac{1}{2N} \sum_j \Bigl[ \log \sum_i e^{u_{ij}} - u_{jj} \Bigr],
        \qquad u_{ij} = a \langle x_i, y_j \rangle + b

    Args:
        image_features: x, ``(N, D)``, of unit norm (as the model gives them; else ``normalize=True``).
        text_features: y, ``(N, D)``, likewise.
        logit_scale: a, already exponentiated; float or tensor with one element (differentiable). Neither raw rows nor
            the logarithm of a scale are an error: no value is read. ``return_stats`` shows them. Of unit rows no
            ``logit_max`` exceeds a + b; a largest one of 2 to 5 where a scale of 10 to 100 was meant is its logarithm.
        logit_bias: b; cancels in the loss and gets a zero gradient, accepted for models that have one.
        temperature: 1 / a instead of logit_scale.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per pair; the mean is then sum(w l) / sum(w).
        label_smoothing: share of the target spread over all kept candidates.
        ids: ``(N,)`` integers; other pairs with the same id are no negatives (duplicate captions or images).
        cutoff: float or ``(N,)``; negatives more similar to the anchor than this are dropped, the positive never is.
        cutoff_margin: the same, as the positive's similarity plus a margin. Cutoffs take a second sweep.
        return_stats: also return `ContrastiveStats`, its fields (2, N).
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch. None: this
            process alone.

    Returns:
        0-dim, or ``(2, N)`` for ``"none"``, images first; float32 (float64 for float64 inputs). With ``return_stats``
        the pair (loss, stats).

    Raises:
        ValueError: shapes that do not fit, an empty batch, neither or both of logit_scale and temperature.
        TypeError: dtypes that differ or are not floating (ids: not integer).
        RuntimeError: tensors on different devices.

    Source: Radford et al., ICML 2021, arXiv:2103.00020, figure 3.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 16, 8), dim=-1).unbind(0)
        >>> logit_scale = torch.nn.Parameter(torch.tensor(14.3).log())
        >>> ck.clip_loss(image, text, logit_scale.exp()).shape
        torch.Size([])
    """
    checks.paired("image_features", image_features, "text_features", text_features)
    check_cutoff(image_features, cutoff, cutoff_margin)
    ids = checks.optional_ids("ids", ids, image_features.shape[0], image_features)
    bias = None if logit_bias is None else checks.scalar("logit_bias", logit_bias, image_features)
    options = SoftmaxOptions.of(
        image_features,
        temperature=temperature,
        logit_scale=logit_scale,
        reduction=reduction,
        weight=weight,
        label_smoothing=label_smoothing,
        return_stats=return_stats,
        backend=backend,
        group=group,
    )

    x, y = unit_rows(image_features, normalize, backend), unit_rows(text_features, normalize, backend)
    positive_similarity = row_dot(x, y, backend)
    limit = cutoff_from(cutoff, cutoff_margin, positive_similarity)
    pairs = Pairs(ids, ids, limit, diagonals=int(ids is None))
    directions = sweep_both_directions(x, y, pairs, options)
    out = softmax_loss(directions, Positives.single(options.scale * positive_similarity), options)
    return out if bias is None else _with_bias(out, bias)


class ClipLoss(LossModule):
    """`clip_loss` as a module; the learnable scale and bias belong to the model and come with every call.

    Args:
        options: keyword arguments of `clip_loss`.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.ClipLoss(normalize=True)(torch.randn(8, 4), torch.randn(8, 4), torch.tensor(14.3)).shape
        torch.Size([])
    """

    function = staticmethod(clip_loss)

    def __init__(
        self,
        *,
        return_stats: bool = False,
        **options: Unpack[ClipArguments],
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
        """Return the loss; `inputs` are per-batch keyword arguments: weight, ids, cutoff."""
        return self.function(image_features, text_features, logit_scale, logit_bias, **self.options(**inputs))


def _with_bias(
    out: Tensor | tuple[Tensor, ContrastiveStats], bias: float | Tensor
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    """Return the same loss, in which the bias cancels, with its zero gradient; the statistics are of shifted logits."""
    loss, stats = out if isinstance(out, tuple) else (out, None)
    if isinstance(bias, Tensor):
        loss = loss + 0 * bias.to(loss.dtype)
    if stats is None:
        return loss
    return loss, ContrastiveStats(stats.accuracy, *(field + detached(bias) for field in stats[1:]))
