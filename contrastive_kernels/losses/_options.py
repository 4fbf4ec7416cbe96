"""Options that losses share: the scale, the reduction, the cutoff, their checks, and all of a softmax loss together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_kernels.losses._polarization import Polarization, check_polarization
from contrastive_kernels.primitives import ALONE, Shards, checks, compute_dtype, shards_of

REDUCTIONS: tuple[str, ...] = ("mean", "sum", "none")
# The label of a sample without one.
UNLABELLED = -1


def scale_from(
    temperature: float | Tensor | None, logit_scale: float | Tensor | None, x: Tensor, default: float | None = None
) -> float | Tensor:
    """Return the factor of the similarities: logit_scale or 1 / temperature."""
    if temperature is not None and logit_scale is not None:
        raise ValueError("temperature and logit_scale are both given; one is the inverse of the other, pass one")
    if logit_scale is not None:
        return checks.scalar("logit_scale", logit_scale, x)
    if temperature is None:
        if default is None:
            raise ValueError("neither logit_scale nor temperature is given; pass one of them")
        temperature = default
    temperature = checks.temperature(temperature, x)
    if isinstance(temperature, Tensor):
        return temperature.to(compute_dtype(x)).reciprocal()
    scale = 1.0 / temperature
    if scale < 0:
        raise ValueError(f"temperature {temperature} must be positive; pass logit_scale={scale} if you mean it")
    return scale


def check_reduction(
    x: Tensor, reduction: str, weight: Tensor | None = None, reductions: tuple[str, ...] = REDUCTIONS
) -> None:
    """Raise unless the reduction is known and there is one weight per row of x."""
    checks.choice("reduction", reduction, reductions)
    if weight is not None:
        checks.vector("weight", weight, x, "the features")


def reduce(losses: Tensor, weight: Tensor | None, reduction: str, shards: Shards = ALONE) -> Tensor:
    """Return the weighted mean or sum, or the weighted losses; a weight per sample serves every view or direction.

    "sum_directions" is twice the mean: the sum of the means of the two views' halves. With shards a mean or sum is W
    times this rank's part of that over all ranks.
    """
    if weight is not None:
        weight = weight.to(losses.dtype).repeat(losses.numel() // weight.numel()).reshape(losses.shape)
    weighted = losses if weight is None else losses * weight
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum() if shards.alone else weighted.sum() * shards.world
    if weight is None:
        mean = shards.mean(losses)
    elif not shards.alone:
        mean = shards.world * weighted.sum() / shards.sum(weight.sum())
    else:
        # From a point near the mean: what the gradient of a weight subtracts is then no larger than what is left.
        total = weight.sum()
        near = (weighted.sum() / total).detach().nan_to_num(0.0, 0.0, 0.0)
        mean = near + (weight * (losses - near)).sum() / total
    return 2 * mean if reduction == "sum_directions" else mean


def mean_over(losses: Tensor, share: Tensor, weight: Tensor | None, shards: Shards = ALONE) -> Tensor:
    """Return the mean in which an anchor counts `share` times; 0 where none counts."""
    share = share.to(losses.dtype)
    if weight is not None:
        share = share * weight.to(losses.dtype).repeat(losses.numel() // weight.numel())
    total = shards.sum(share.sum())
    mean = (share * losses).sum() / total.masked_fill(total == 0, 1)
    return mean if shards.alone else mean * shards.world


def row_factors(x: Tensor, weight: Tensor | None, reduction: str, shards: Shards = ALONE) -> Tensor:
    """Return (N,), the factor of each row's loss in a weighted "mean" or "sum"."""
    dtype = compute_dtype(x)
    factors = torch.ones(x.shape[0], dtype=dtype, device=x.device) if weight is None else weight.to(dtype)
    if reduction != "sum":
        factors = factors / shards.sum(factors.sum())
    return factors if shards.alone else factors * shards.world


def check_cutoff(
    x: Tensor, cutoff: float | Tensor | None, cutoff_margin: float | Tensor | None, views: int = 1
) -> None:
    """Raise unless at most one is given: a number, or a vector with an entry per row of x, or per row of every view."""
    if cutoff is not None and cutoff_margin is not None:
        raise ValueError("cutoff and cutoff_margin are both given; pass one of them")
    name, value = ("cutoff", cutoff) if cutoff_margin is None else ("cutoff_margin", cutoff_margin)
    if value is None:
        return
    if not isinstance(value, Tensor):
        checks.number(name, value)
    elif value.dim() == 0:
        checks.same_device(name, value, x)
    else:
        rows = x.new_empty(1).expand(views * x.shape[0]) if value.shape == (views * x.shape[0],) else x
        checks.vector(name, value, rows, "the features")


def cutoff_from(
    cutoff: float | Tensor | None, cutoff_margin: float | Tensor | None, positive_similarity: Tensor, views: int = 1
) -> Tensor | None:
    """Return the similarity above which a negative is dropped, per anchor, without gradient; arguments as checked.

    A vector per sample serves every view of it.
    """
    anchors = positive_similarity.detach()
    value = cutoff if cutoff_margin is None else cutoff_margin
    if isinstance(value, Tensor) and value.dim() == 1 and value.shape[0] < anchors.shape[0]:
        value = value.repeat(views)
    threshold = checks.per_row("cutoff", value, anchors)
    return threshold if cutoff_margin is None or threshold is None else anchors + threshold


def softplus(x: Tensor) -> Tensor:
    """Return ``log(1 + exp(x))`` to the last digit.

    Beyond the threshold that is x. Below, `F.softplus` multiplies a gradient by ``exp(x)``: no larger, or a gradient of
    1e27 leaves the range of float32.
    """
    return F.softplus(x, threshold=37.0 if x.dtype == torch.float64 else 18.0)


def detached(value: float | Tensor) -> float | Tensor:
    """Return a number as it is, a tensor without its graph."""
    return value.detach() if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class SoftmaxOptions:
    """The options of a candidate softmax, checked."""

    scale: float | Tensor
    shards: Shards  # without a default, which Dynamo of torch 2.11 cannot make
    reduction: str = "mean"
    weight: Tensor | None = None
    label_smoothing: float = 0.0
    polarization: Polarization | None = None
    return_stats: bool = False
    backend: str | None = None

    @classmethod
    def of(
        cls,
        x: Tensor,
        *,
        temperature: float | Tensor | None,
        logit_scale: float | Tensor | None,
        default_temperature: float | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        polarization: Polarization | None = None,
        return_stats: bool = False,
        backend: str | None = None,
        group: object = None,
        reductions: tuple[str, ...] = REDUCTIONS,
    ) -> SoftmaxOptions:
        """Check the options of a loss of features x, whose rows are the samples."""
        check_reduction(x, reduction, weight, reductions)
        label_smoothing = checks.label_smoothing(label_smoothing)
        check_polarization(polarization)
        checks.backend(x, backend)
        scale = scale_from(temperature, logit_scale, x, default_temperature)
        shards = shards_of(group)
        return cls(scale, shards, reduction, weight, label_smoothing, polarization, return_stats, backend)
