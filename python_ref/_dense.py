"""Unit rows, masked reductions and what else most of the dense losses share."""

from __future__ import annotations

import torch

INFINITY = float("inf")


def unit_rows(x, normalize=True):
    """``x / max(|x|, 1e-12)`` with gradient 0 where ``|x| < 1e-12``.

    Source: ``F.normalize``.
    """
    if not normalize:
        return x
    squares = x.square().sum(-1, keepdim=True)
    tiny = squares.sqrt() < 1e-12
    norm = squares.masked_fill(tiny, 1.0).sqrt()
    return torch.where(tiny, (x / 1e-12).detach(), x / norm)


def scale_of(temperature, logit_scale):
    """``a = logit_scale`` or ``1 / temperature``."""
    return 1.0 / temperature if logit_scale is None else logit_scale


def softplus(x):
    """``log(1 + e^x)``."""
    return torch.logaddexp(x, torch.zeros_like(x))


def kept_logsumexp(logits, kept, dim=-1):
    """``log sum_kept exp(logits)``; -inf without gradient where nothing is kept."""
    empty = ~kept.any(dim, keepdim=True)
    total = logits.masked_fill(~(kept | empty), -INFINITY).logsumexp(dim)
    return total.masked_fill(empty.squeeze(dim), -INFINITY)


def kept_mean(values, kept):
    """Mean over the kept entries of each row; 0 where nothing is kept."""
    return values.masked_fill(~kept, 0.0).sum(-1) / kept.sum(-1).clamp(min=1)


def off_diagonal(matrix):
    """The matrix with zeros on its diagonal."""
    return matrix.masked_fill(torch.eye(len(matrix), dtype=torch.bool, device=matrix.device), 0.0)


def reduced(values, reduction, weight=None):
    """``mean`` (``sum w l / sum w``), ``sum`` (``sum w l``), ``none`` (``w l``), ``sum_directions`` (2 mean)."""
    weight = torch.ones_like(values) if weight is None else weight.to(values)
    if values.dim() == 1:
        weight = weight.repeat(len(values) // len(weight))
    weight = weight.expand_as(values)
    if reduction == "none":
        return weight * values
    total = (weight * values).sum()
    return total if reduction == "sum" else {"mean": 1, "sum_directions": 2}[reduction] * total / weight.sum()
