"""The pull to label embeddings: the function and its module."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from contrastive_kernels.losses._arguments import BackendArguments, ReductionArguments, loss_function
from contrastive_kernels.losses._module import LossModule
from contrastive_kernels.losses._options import UNLABELLED, SoftmaxOptions, mean_over, reduce
from contrastive_kernels.losses._softmax import Positives, softmax_value, sweep_negatives, weighted_row_losses
from contrastive_kernels.primitives import ALONE, Group, Pairs, checks, gather_rows, over_ranks, row_dot, unit_rows

__all__ = ["LabelPullLoss", "label_pull_loss"]


class LabelPullArguments(BackendArguments, ReductionArguments, total=False):
    """Keyword arguments of `label_pull_loss`."""

    temperature: float | Tensor | None
    logit_scale: float | Tensor | None


@loss_function
@over_ranks
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
    group: Group | None = None,
) -> Tensor:
    r"""Return the loss that pulls labelled rows to the embeddings of their labels, such as word vectors of class names.

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
        logit_scale: 1 / T instead, also of ``"softmax"`` alone.
        normalize: rows of z and of label_embeddings to unit norm first.
        reduction: ``"mean"`` over the labelled rows, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per row; the mean is then sum(w l) / sum(w) over the labelled rows.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch. None: this
            process alone.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``; float32 (float64 for float64 inputs). 0 when no row is labelled.

    Raises:
        ValueError: shapes that do not fit, an empty batch, no embeddings, an unknown option, temperature near or below
            0, a temperature or logit_scale of ``"pull"``.
        TypeError: dtypes that differ or are not floating (labels: not integer).
        RuntimeError: tensors on different devices.

    Source: no paper is known to us for ``"pull"``; related to Frome et al., NeurIPS 2013 (DeViSE).

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> z, labels, words = torch.randn(16, 8), torch.randint(-1, 4, (16,)), torch.randn(4, 8)
        >>> ck.label_pull_loss(z, labels, words).shape
        torch.Size([])
    """
    checks.features("z", z)
    checks.features("label_embeddings", label_embeddings)
    checks.alike("z", z, "label_embeddings", label_embeddings, rows=False)
    checks.not_empty("z", z)
    checks.not_empty("label_embeddings", label_embeddings)
    checks.choice("form", form, ("pull", "softmax"))
    labels = checks.ids("labels", labels, z.shape[0], z)
    options = SoftmaxOptions.of(
        z,
        temperature=temperature,
        logit_scale=logit_scale,
        default_temperature=0.1,
        reduction=reduction,
        weight=weight,
        backend=backend,
        group=group,
    )
    if form == "pull":
        checks.no_effect("form='pull'", temperature=(temperature, None), logit_scale=(logit_scale, None))

    z, embeddings = unit_rows(z, normalize, backend), unit_rows(label_embeddings, normalize, backend)
    classes = embeddings.shape[0]
    similarity = row_dot(z, gather_rows(embeddings, labels.clamp(0, classes - 1)), backend)
    labelled = labels != UNLABELLED
    unknown = labelled & ((labels < 0) | (labels >= classes))
    if form == "pull":
        losses = 1 - similarity
    else:
        pairs, logit = Pairs(labels, torch.arange(classes, device=z.device)), options.scale * similarity
        if reduction != "none" and options.shards.alone:

            def shares() -> Tensor:
                """Return the factor of each sample's loss."""
                share = labelled.to(logit.dtype) if weight is None else labelled * weight.to(logit.dtype)
                if reduction == "mean":
                    number = share.sum()
                    share = share / number.masked_fill(number == 0, 1)
                return share.masked_fill(unknown, 0)

            total = weighted_row_losses(z, embeddings, pairs, logit, shares, options)
            if total is not None:
                return total + torch.zeros_like(total).masked_fill(unknown.any(), torch.nan)
        negatives = sweep_negatives(z, embeddings, pairs, replace(options, shards=ALONE))
        each = replace(options, reduction="none", weight=None)
        losses = softmax_value([negatives], Positives.single(logit), each)
    # A product, so that a NaN in a row without label is not lost.
    losses = losses * labelled.to(losses.dtype)
    losses = losses.masked_fill(unknown, torch.nan)
    return (
        mean_over(losses, labelled, weight, options.shards)
        if reduction == "mean"
        else reduce(losses, weight, reduction, options.shards)
    )


class LabelPullLoss(LossModule):
    """`label_pull_loss` as a module; the label embeddings belong to the caller and come with every call.

    Args:
        form: ``"pull"`` or ``"softmax"``.
        options: further keyword arguments of `label_pull_loss`.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.LabelPullLoss("softmax")(torch.randn(8, 4), torch.randint(3, (8,)), torch.randn(3, 4)).shape
        torch.Size([])
    """

    function = staticmethod(label_pull_loss)

    def __init__(
        self,
        form: Literal["pull", "softmax"] = "pull",
        **options: Unpack[LabelPullArguments],
    ) -> None:
        super().__init__(form=form, **options)

    def forward(
        self,
        z: Tensor,
        labels: Tensor,
        label_embeddings: Tensor,
        **inputs: Any,
    ) -> Tensor:
        """Return the loss; `inputs` are per-batch keyword arguments: weight."""
        return self.function(z, labels, label_embeddings, **self.options(**inputs))
