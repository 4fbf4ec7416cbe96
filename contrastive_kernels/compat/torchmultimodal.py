"""The CLIP loss of TorchMultimodal under its own names: `contrastive_kernels.compat.torchmultimodal`."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive_kernels.compat._peer import forwarding, warn_dense
from contrastive_kernels.compat._ranks import (
    gather,
    gather_constant,
    gather_own,
    is_initialised,
    rank,
    world,
    world_size,
)
from contrastive_kernels.compat._small import is_small
from contrastive_kernels.losses import clip_loss, info_nce_loss
from contrastive_kernels.primitives import checks, compute_dtype

__all__ = [
    "DEFAULT_LOGIT_SCALE",
    "BackpropType",
    "ContrastiveLossOutput",
    "ContrastiveLossWithTemperature",
    "contrastive_loss_with_temperature",
]

__getattr__ = forwarding(
    __name__, "torchmultimodal-nightly", "torchmultimodal.modules.losses.contrastive_loss_with_temperature"
)

DEFAULT_LOGIT_SCALE = math.log(1 / 0.07)
# The arguments of cross_entropy that need no logits.
FUSED = ("label_smoothing", "reduction")
# The label of a row that does not count.
IGNORED = -100


class BackpropType(Enum):
    """Where the gradient of gathered rows goes: to all ranks, to this one alone, or nowhere.

    A member is equal to the peer's of the same name, so that either library takes those of the other.
    """

    GLOBAL = 0
    LOCAL = 1
    NONE = 2

    def __eq__(self, other: object) -> bool:
        """Return whether it is a member of this name, here or in the peer."""
        return isinstance(other, Enum) and type(other).__name__ == "BackpropType" and other.name == self.name

    def __hash__(self) -> int:
        """Return the hash of the peer's member."""
        return hash(self.name)


@dataclass
class ContrastiveLossOutput(OrderedDict[str, Tensor]):
    """What `contrastive_loss_with_temperature` returns.

    Args:
        loss: the mean of both directions.
        logits_a: ``(N, M)``, of this process's rows a with all ranks' rows b; only the rows that the mask keeps. Those
            of a fused loss are computed when they are first read.
        logits_b: the same of the rows b with the rows a.
        loss_a: of the rows a.
        loss_b: of the rows b.
    """

    loss: Tensor
    logits_a: Tensor
    logits_b: Tensor
    loss_a: Tensor
    loss_b: Tensor

    @classmethod
    def deferred(
        cls,
        loss: Tensor,
        loss_a: Tensor,
        loss_b: Tensor,
        logits_a: Callable[[], Tensor],
        logits_b: Callable[[], Tensor],
    ) -> ContrastiveLossOutput:
        """Return losses whose logits are computed by functions, when they are first read."""
        output = cls.__new__(cls)
        output.loss, output.loss_a, output.loss_b = loss, loss_a, loss_b
        vars(output)["_logits"] = {"logits_a": logits_a, "logits_b": logits_b}
        return output

    def __getattr__(self, name: str) -> Tensor:
        """Compute logits; reached once for each, since they are then attributes."""
        logits: dict[str, Callable[[], Tensor]] = vars(self).get("_logits", {})
        if name not in logits:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = logits[name]()
        setattr(self, name, value)
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the tensors, for pickle and copy."""
        return type(self), (self.loss, self.logits_a, self.logits_b, self.loss_a, self.loss_b)


class ContrastiveLossWithTemperature(nn.Module):
    """`contrastive_loss_with_temperature` with a scale that is learnt: that of TorchMultimodal.

    Args:
        logit_scale: logarithm of the scale of the similarities, or a parameter that has it and is used as it is.
        logit_scale_min: the parameter is clamped in place at every call, not below this. None: no bound.
        logit_scale_max: nor above this. None: no bound.

    Raises:
        ValueError: both bounds are None or 0.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.torchmultimodal import ContrastiveLossWithTemperature
        >>> a, b = torch.nn.functional.normalize(torch.randn(2, 16, 8), dim=-1)
        >>> ContrastiveLossWithTemperature()(a, b).shape
        torch.Size([])
    """

    def __init__(
        self,
        logit_scale: float | nn.Parameter = DEFAULT_LOGIT_SCALE,
        logit_scale_min: float | None = math.log(1),
        logit_scale_max: float | None = math.log(100),
    ) -> None:
        super().__init__()
        if not logit_scale_min and not logit_scale_max:
            raise ValueError("logit_scale_min and logit_scale_max are both None or 0; give one of them another value")
        self.logit_scale_min = logit_scale_min
        self.logit_scale_max = logit_scale_max
        if isinstance(logit_scale, nn.Parameter):
            self.logit_scale = logit_scale
        else:
            self.logit_scale = nn.Parameter(logit_scale * torch.ones([]))

    def forward(
        self,
        embeddings_a: Tensor,
        embeddings_b: Tensor,
        backprop_type: BackpropType = BackpropType.GLOBAL,
        cross_entropy_kwargs: dict[str, Any] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the mean of both directions; the arguments are those of `contrastive_loss_with_temperature`."""
        self.logit_scale.data.clamp_(self.logit_scale_min, self.logit_scale_max)
        batch = _Batch(embeddings_a, embeddings_b, self.logit_scale.exp(), mask, _name(backprop_type))
        loss_a, loss_b, _ = _losses(batch, cross_entropy_kwargs or {})
        return (loss_a + loss_b) / 2


def contrastive_loss_with_temperature(
    embeddings_a: Tensor,
    embeddings_b: Tensor,
    logit_scale: Tensor,
    mask: Tensor | None = None,
    backprop_type: BackpropType = BackpropType.GLOBAL,
    cross_entropy_kwargs: dict[str, Any] | None = None,
) -> ContrastiveLossOutput:
    r"""Return the losses of CLIP in both directions, and logits that are computed only where they are read.

    .. math:: L_a = \frac1N \sum_i \Bigl[ \log \sum_j e^{u_{ij}} - u_{ii} \Bigr],
        \qquad L_b = \frac1N \sum_j \Bigl[ \log \sum_i e^{u_{ij}} - u_{jj} \Bigr],
        \qquad u_{ij} = e^s \langle a_i, b_j \rangle

    Args:
        embeddings_a: a, ``(N, D)``, taken as they are, not normalised.
        embeddings_b: b, ``(N, D)``; row i belongs to row i of a.
        logit_scale: s, the logarithm of the scale.
        mask: ``(N,)`` bool, the rows whose losses count, in both directions; all rows stay candidates. None: all.
        backprop_type: with a process group the rows of all ranks are candidates. GLOBAL: each has the gradient that
            all ranks compute for it; LOCAL: those of this rank alone have one, this rank's; NONE: no candidate has.
        cross_entropy_kwargs: of `torch.nn.functional.cross_entropy`. Any but ``label_smoothing`` and ``reduction``
            stores the logits, after a warning.

    Returns:
        `ContrastiveLossOutput`; losses float32 (float64 for float64 embeddings).

    Raises:
        ValueError: shapes that do not fit.
        TypeError: dtypes that differ or are not floating.
        IndexError: a mask of another length.

    Source: Radford et al., ICML 2021, arXiv:2103.00020; `contrastive_loss_with_temperature` of TorchMultimodal.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.torchmultimodal import contrastive_loss_with_temperature
        >>> a, b = torch.nn.functional.normalize(torch.randn(2, 16, 8), dim=-1)
        >>> output = contrastive_loss_with_temperature(a, b, torch.tensor(2.0))
        >>> output.loss.shape, output.logits_a.shape
        (torch.Size([]), torch.Size([16, 16]))
    """
    batch = _Batch(embeddings_a, embeddings_b, torch.exp(logit_scale), mask, _name(backprop_type))
    loss_a, loss_b, logits = _losses(batch, cross_entropy_kwargs or {})
    loss = (loss_a + loss_b) / 2
    if logits is None:
        # gathered now: only some of the ranks may read them
        of_a, of_b = batch.columns()
        logits = (
            lambda: batch.masked(batch.logits(embeddings_a, of_b)),
            lambda: batch.masked(batch.logits(embeddings_b, of_a)),
        )
    return ContrastiveLossOutput.deferred(loss, loss_a, loss_b, *logits)


# What returns the logits of both directions.
_Logits = tuple[Callable[[], Tensor], Callable[[], Tensor]]


class _Batch(NamedTuple):
    """What both directions have in common."""

    a: Tensor
    b: Tensor
    scale: Tensor
    mask: Tensor | None
    backprop: str  # the name of a `BackpropType`

    def columns(self) -> tuple[Tensor, Tensor]:
        """Return the rows a and b of all ranks, which are candidates."""
        if not is_initialised():
            return self.a, self.b
        gathering = {"GLOBAL": gather, "LOCAL": gather_own}.get(self.backprop, gather_constant)
        return gathering(self.a), gathering(self.b)

    def logits(self, x: Tensor, columns: Tensor) -> Tensor:
        """Return the logits of rows with the candidates."""
        return (x @ columns.T) * self.scale

    def masked(self, x: Tensor) -> Tensor:
        """Return the rows that the mask keeps."""
        return x if self.mask is None else x[self.mask]

    def places(self) -> Tensor:
        """Return the places of this rank's rows among those of all."""
        return torch.arange(self.a.shape[0], device=self.a.device) + rank() * self.a.shape[0]


def _name(backprop_type: BackpropType) -> str:
    """Return the name of a member; what is none is NONE, as in the peer, which asks whether it is one of the others."""
    return backprop_type.name if isinstance(backprop_type, Enum) else "NONE"


def _losses(batch: _Batch, options: dict[str, Any]) -> tuple[Tensor, Tensor, _Logits | None]:
    """Return the losses of both directions, and where the logits were needed for them what returns these."""
    unusual = next((name for name, value in options.items() if value is not None and name not in FUSED), None)
    if unusual is None and batch.scale.numel() != 1:
        unusual = "a logit_scale of several elements"
    if unusual is not None:
        warn_dense("contrastive_loss_with_temperature", unusual)
        return _dense(batch, options)
    reduction, label_smoothing = options.get("reduction", "mean"), options.get("label_smoothing", 0.0)
    checks.choice("reduction", reduction, ("mean", "sum", "none"))
    pairs = batch.a.shape[0] * batch.b.shape[0]
    if not is_initialised() and is_small(batch.a, pairs, crossover=4 if label_smoothing else 2):
        return _small(batch, label_smoothing, reduction)
    loss_a, loss_b = _reduced(_fused(batch, label_smoothing), batch.mask, reduction)
    return loss_a, loss_b, None


def _dense(batch: _Batch, options: dict[str, Any]) -> tuple[Tensor, Tensor, _Logits]:
    """Return the losses from the logits of the rows that the mask keeps."""
    a, b = batch.columns()
    logits_a, logits_b = batch.masked(batch.logits(batch.a, b)), batch.masked(batch.logits(batch.b, a))
    labels, dtype = batch.masked(batch.places()), compute_dtype(batch.a)
    loss_a, loss_b = (F.cross_entropy(logits.to(dtype), labels, **options) for logits in (logits_a, logits_b))
    return loss_a, loss_b, (lambda: logits_a, lambda: logits_b)


def _small(batch: _Batch, label_smoothing: float, reduction: str) -> tuple[Tensor, Tensor, _Logits]:
    """Return the losses of a small batch from one matrix of logits."""
    logits, labels = batch.logits(batch.a, batch.b), batch.places()
    mask = batch.mask
    if mask is not None and (mask.dtype != torch.bool or reduction == "none"):
        losses = [
            F.cross_entropy(x, labels, reduction="none", label_smoothing=label_smoothing) for x in (logits, logits.T)
        ]
        loss_a, loss_b = _reduced(torch.stack(losses), mask, reduction)
    else:
        if mask is not None:
            labels = labels.masked_fill(~_checked(mask, batch.a), IGNORED)
        loss_a, loss_b = (
            F.cross_entropy(x, labels, ignore_index=IGNORED, reduction=reduction, label_smoothing=label_smoothing)
            for x in (logits, logits.T)
        )
    return loss_a, loss_b, (lambda: batch.masked(logits), lambda: batch.masked(logits.T))


def _fused(batch: _Batch, label_smoothing: float) -> Tensor:
    """Return (2, N), the losses of all rows in both directions."""
    a, b, scale = batch.a, batch.b, batch.scale
    if not is_initialised() or batch.backprop == "GLOBAL":
        return clip_loss(a, b, scale, label_smoothing=label_smoothing, reduction="none", group=world())
    every = torch.arange(a.shape[0] * world_size(), device=a.device)

    def direction(x: Tensor, own: Tensor, columns: Tensor) -> Tensor:
        return info_nce_loss(
            x,
            own if batch.backprop == "LOCAL" else own.detach(),
            columns,
            logit_scale=scale,
            query_ids=batch.places(),
            key_ids=every,
            label_smoothing=label_smoothing,
            normalize=False,
            reduction="none",
        )

    of_a, of_b = batch.columns()
    return torch.stack([direction(a, b, of_b), direction(b, a, of_a)])


def _reduced(losses: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    """Return the losses (2, N) of the rows that the mask keeps, as cross_entropy reduces them."""
    if mask is not None and (mask.dtype != torch.bool or reduction == "none"):
        losses, mask = losses[:, mask], None
    if mask is not None:
        # a fixed shape: nothing is read back
        total = losses.masked_fill(~_checked(mask, losses[0]), 0).sum(1)
        return total if reduction == "sum" else total / mask.sum()
    if reduction == "none":
        return losses
    return losses.sum(1) if reduction == "sum" else losses.mean(1)


def _checked(mask: Tensor, rows: Tensor) -> Tensor:
    if tuple(mask.shape) != (rows.shape[0],):
        raise IndexError(f"mask {checks.shape(mask)} must have shape ({rows.shape[0]},), one entry per row")
    return mask
