"""What most of the dense losses share: unit rows, masked sums, reductions."""

from __future__ import annotations

import torch

INFINITY = float("inf")


def unit_rows(x, normalize=True):
    """Return ``x / max(|x|, 1e-12)``, with gradient 0 where ``|x| < 1e-12``; x itself without normalize.

    Source: ``F.normalize``.
    """
    if not normalize:
        return x
    squares = x.square().sum(-1, keepdim=True)
    tiny = squares.sqrt() < 1e-12
    norm = squares.masked_fill(tiny, 1.0).sqrt()
    return torch.where(tiny, (x / 1e-12).detach(), x / norm)


def scale_of(temperature, logit_scale):
    """Return the factor a of the similarities: logit_scale, or ``1 / temperature`` without one."""
    return 1.0 / temperature if logit_scale is None else logit_scale


def softplus(x):
    """Return ``log(1 + e^x)``; `F.softplus` switches to x above a threshold."""
    return torch.logaddexp(x, torch.zeros_like(x))


def kept_logsumexp(logits, kept, dim=-1):
    """Return ``log sum_kept exp(logits)``; -inf, without a gradient, where nothing is kept."""
    empty = ~kept.any(dim, keepdim=True)
    total = logits.masked_fill(~(kept | empty), -INFINITY).logsumexp(dim)
    return total.masked_fill(empty.squeeze(dim), -INFINITY)


def kept_mean(values, kept):
    """Return the mean over the kept entries of each row; 0 where nothing is kept."""
    return values.masked_fill(~kept, 0.0).sum(-1) / kept.sum(-1).clamp(min=1)


def off_diagonal(matrix):
    """Return the matrix with zeros on its diagonal."""
    return matrix.masked_fill(torch.eye(len(matrix), dtype=torch.bool, device=matrix.device), 0.0)


def reduce(values, reduction, weight=None):
    """Return ``sum w l / sum w`` (mean), ``sum w l`` (sum), ``w l`` (none) or twice the mean (sum_directions).

    The weights of N samples are repeated for the V N values of all views.
    """
    weight = torch.ones_like(values) if weight is None else weight.to(values)
    if values.dim() == 1:
        weight = weight.repeat(len(values) // len(weight))
    weight = weight.expand_as(values)
    if reduction == "none":
        return weight * values
    total = (weight * values).sum()
    return total if reduction == "sum" else {"mean": 1, "sum_directions": 2}[reduction] * total / weight.sum()
