"""What all losses share: unit rows, the scale, the reduction, the options and the statistics."""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_kernels import checks
from contrastive_kernels.autograd import apply
from contrastive_kernels.backends import choose_backend
from contrastive_kernels.backends import torch as torch_backend
from contrastive_kernels.operators import operator
from contrastive_kernels.similarity import autocast, row_dot
from contrastive_kernels.sweep import Pairs, compute_dtype

REDUCTIONS = ("mean", "sum", "none")
# Of more views ids are compared: a kernel holds a comparison for every diagonal.
MOST_DIAGONALS = 8


class ContrastiveStats(NamedTuple):
    """Detached by-products of a loss, from the same sweep, in the dtype of the loss."""

    accuracy: Tensor
    """0-dim: fraction of anchors whose positive logit exceeds every negative's (a tie is not a win)."""
    positive_logit: Tensor
    """Per anchor."""
    lse: Tensor
    """Per anchor: log-sum-exp over the loss's whole denominator."""
    logit_max: Tensor
    """Per anchor: the largest logit among the positive and the kept negatives."""


class _UnitRows(torch.autograd.Function):
    """``x / max(|x|, eps)``, computed in float32; unlike `F.normalize` with zero gradient for a row below eps."""

    @staticmethod
    def forward(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        return operator(backend, "unit_rows")(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, ctx.backend = inputs
        _, norm = output
        ctx.mark_non_differentiable(norm)
        ctx.save_for_backward(x, norm)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad: Tensor | None, _: None) -> tuple[Tensor | None, None]:
        if grad is None:
            return None, None
        x, norm = ctx.saved_tensors
        if torch.is_grad_enabled():
            # The norm that was saved has no graph for a second derivative.
            norm = torch.linalg.vector_norm(x.to(compute_dtype(x)), dim=-1, keepdim=True)
            return torch_backend.unit_rows_backward(grad, x, norm), None
        return operator(ctx.backend, "unit_rows_backward")(grad, x, norm), None


def rows(x: Tensor, normalize: bool, backend: str | None = None) -> Tensor:
    """The rows that enter the similarities: of unit norm if asked for, in the dtype of x or of autocast."""
    return autocast(apply(_UnitRows, x, choose_backend(x, backend))[0] if normalize else x)


def poison(x: Tensor) -> Tensor:
    """0, or NaN if an entry of x is not finite: for what infinite similarities would not show in."""
    return (0 * x.detach()).sum().to(compute_dtype(x))


def scale_from(
    temperature: float | Tensor | None, logit_scale: float | Tensor | None, x: Tensor, default: float | None = None
) -> float | Tensor:
    """The factor of the similarities: logit_scale or 1 / temperature."""
    if temperature is not None and logit_scale is not None:
        raise ValueError("temperature and logit_scale are both given; one is the inverse of the other, pass one")
    if logit_scale is not None:
        return checks.scalar("logit_scale", logit_scale, x)
    if temperature is None:
        if default is None:
            raise ValueError("neither logit_scale nor temperature is given; pass one of them")
        temperature = default
    temperature = checks.temperature(temperature, x)
    return temperature.to(compute_dtype(x)).reciprocal() if isinstance(temperature, Tensor) else 1.0 / temperature


def reduce(losses: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Weighted mean, sum or none; a weight per sample serves every view or direction of it."""
    if weight is not None:
        weight = weight.to(losses.dtype).repeat(losses.numel() // weight.numel()).reshape(losses.shape)
        losses = losses * weight
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.mean() if weight is None else losses.sum() / weight.sum()


def softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))`` to the last digit; F.softplus by default ends where float32 does."""
    return F.softplus(x, threshold=50.0)


def row_factors(x: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """(N,): what a weighted "mean" or "sum" multiplies the loss of each row of x by."""
    dtype = compute_dtype(x)
    factors = torch.ones(len(x), dtype=dtype, device=x.device) if weight is None else weight.to(dtype)
    return factors if reduction == "sum" else factors / factors.sum()


def check_options(
    x: Tensor,
    *,
    reduction: str,
    weight: Tensor | None,
    label_smoothing: float = 0.0,
    reductions: tuple[str, ...] = REDUCTIONS,
) -> None:
    """The options that every loss takes."""
    checks.choice("reduction", reduction, reductions)
    checks.label_smoothing(label_smoothing)
    if weight is not None:
        checks.vector("weight", weight, x, "the features")


def view_major(z0: Tensor, z1: Tensor | None) -> Tensor:
    """(V, N, D), checked."""
    if z1 is None:
        checks.views("z0", z0)
        checks.not_empty("z0", z0)
        return z0.transpose(0, 1)
    checks.features("z0", z0)
    checks.features("z1", z1)
    checks.alike("z0", z0, "z1", z1)
    checks.not_empty("z0", z0)
    return torch.stack([z0, z1])


def other_views(views: Tensor, backend: str | None = None) -> Tensor:
    """(V * N, V - 1): the similarities of every row to the other views of its sample, from views (V, N, D)."""
    pair = {(j, k): row_dot(views[j], views[k], backend) for j, k in combinations(range(len(views)), 2)}
    others = [[pair[min(j, k), max(j, k)] for k in range(len(views)) if k != j] for j in range(len(views))]
    return torch.cat([torch.stack(row, 1) for row in others])


def other_samples(ids: Tensor | None, n: int, v: int, x: Tensor) -> Pairs:
    """Of V views of n samples, view after view: the pairs of different samples, or of different ids."""
    if ids is None and v <= MOST_DIAGONALS:
        return Pairs(exclude_diagonal=v)
    ids = torch.arange(n, device=x.device) if ids is None else checks.ids("ids", ids, n, x)
    return Pairs(ids.repeat(v))


def per_view(value: float | Tensor | None, n: int, v: int) -> float | Tensor | None:
    """A vector per sample as one per anchor."""
    return value.repeat(v) if isinstance(value, Tensor) and value.shape == (n,) else value
