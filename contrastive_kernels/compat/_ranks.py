"""The default process group as the peers use it: looked up at the call, equal shards, three kinds of gradient."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from contrastive_kernels.engine.autograd import call
from contrastive_kernels.engine.groups import exchange

__all__ = [
    "gather",
    "gather_constant",
    "gather_own",
    "is_gathered",
    "is_initialised",
    "rank",
    "sum_over_ranks",
    "world",
    "world_size",
]

# Asked once: lightly asks in its constructors alone.
_AVAILABLE = dist.is_available()


def is_gathered() -> bool:
    """Return whether there is a default process group of several ranks."""
    return world_size() > 1


def is_initialised() -> bool:
    """Return whether there is a default process group, of one rank or more: then rows that are gathered are copies."""
    return _AVAILABLE and dist.is_initialized()


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if is_initialised() else 1


def world() -> Literal["world"] | None:
    """Return what our losses take as their group: all ranks, None in one process."""
    return "world" if is_gathered() else None


def rank() -> int:
    """Return the place of this process; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def gather_constant(x: Tensor) -> Tensor:
    """Return the rows of all ranks, in rank order, without gradient."""
    return exchange(x.detach(), dist.group.WORLD).flatten(0, 1) if world_size() > 1 else x.detach()


def gather(x: Tensor) -> Tensor:
    """Return the rows of all ranks; the gradient of a row is the sum over the ranks of what each computes for it."""
    if world_size() == 1:
        return x
    rows: Tensor = _Gather.apply(x)  # type: ignore[no-untyped-call]
    return rows


def gather_own(x: Tensor) -> Tensor:
    """Return the rows of all ranks, of which this rank's own block alone has a gradient, this rank's."""
    if world_size() == 1:
        return x
    rows = gather_constant(x)
    before, n = rank() * x.shape[0], x.shape[0]
    return torch.cat([rows[:before], x, rows[before + n :]])


class _Gather(torch.autograd.Function):
    """The rows of all ranks, and backward the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return the rows of all ranks."""
        ctx.rows = x.shape[0]
        return gather_constant(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Return the own block of the sum."""
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total[rank() * ctx.rows :][: ctx.rows]


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum over the ranks; its gradient is the sum of theirs."""
    if world_size() == 1:
        return x
    world: Any = dist.group.WORLD
    total: Tensor = call("group", "sum", x, world.group_name)
    return total
