"""The function `sweep`, one pass over the similarities, from which every loss and every other primitive is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from contrastive_kernels.engine import autograd
from contrastive_kernels.engine.autograd import call, group_total, guided_forward, sweep_forward, sweep_total
from contrastive_kernels.engine.backends import Backend, choose
from contrastive_kernels.engine.limits import saved_scores_limit, workspace_limit
from contrastive_kernels.engine.spec import (
    Description,
    GroupArguments,
    Guide,
    Inputs,
    Statistics,
    Wanted,
    compute_dtype,
)
from contrastive_kernels.engine.terms import Term
from contrastive_kernels.primitives.devices import known
from contrastive_kernels.primitives.rows import cast_for_autocast
from contrastive_kernels.primitives.shards import ALONE, Shards

__all__ = ["ALL_PAIRS", "Pairs", "Statistics", "softmax_mean", "softmax_total", "sweep", "weighted_total"]


class Pairs(NamedTuple):
    """Which pairs are kept; `engine.spec` has the conditions."""

    x_ids: Tensor | None = None  # (N,) int64
    y_ids: Tensor | None = None  # (M,) int64; None for x against itself
    cutoff: Tensor | None = None  # (N,)
    keep_equal_ids: bool = False
    diagonals: int = 0  # 1: drop i == j; V: drop the pairs of a sample's V views; PLACES: drop equal places
    guide: Guide | None = None  # of one process

    def by_similarity(self) -> bool:  # no property: Dynamo before torch 2.10 reads none of a named tuple
        """Return whether similarities decide, so that the kept pairs are not known before a sweep."""
        return self.cutoff is not None or self.guide is not None

    def turned(self) -> Pairs:
        """Return the pairs (j, i) of as many rows of y, each with the cutoffs of its row of x."""
        guide = self.guide
        if guide is not None and guide.guide_y is not None:
            guide = guide._replace(guide_x=guide.guide_y, guide_y=guide.guide_x)
        return self._replace(x_ids=self.y_ids, y_ids=self.x_ids, guide=guide)


ALL_PAIRS = Pairs()


def sweep(
    x: Tensor,
    y: Tensor | None = None,
    pairs: Pairs = ALL_PAIRS,
    *,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    exponents: tuple[float, ...] = (1.0,),
    column_lse: bool = False,
    term: Term | None = None,
    maximum: bool = False,
    backend: str | None = None,
    shards: Shards = ALONE,
) -> Statistics:
    """Return the statistics of one pass over the similarities of x (N, D) and y (M, D), or of x with itself.

    With shards, y (or x) is this rank's part of the columns; the statistics are those of its rows and of its columns.

    `engine.spec` says what they are. The arguments are not checked. Under autocast the features are cast to its dtype;
    everything else keeps float32.
    """
    inputs, what, chosen = _prepare(x, y, pairs, scale, bias, exponents, column_lse, term, backend)
    x, y = inputs.x, inputs.y
    if pairs.guide is not None:
        statistics = guided_forward(inputs, what, maximum, pairs.guide, choose(x, backend, "guided_forward").name)
    elif shards.alone:
        differentiable = torch.is_grad_enabled() and (x.requires_grad or (y is not None and y.requires_grad))
        save_scores = differentiable and _may_be_saved(inputs, chosen)
        statistics = sweep_forward(inputs, what, maximum, save_scores, chosen.name)
    else:
        of_group = _of_group(inputs, chosen, shards)
        statistics = Statistics(*call("group", "sweep", *inputs, *what, maximum, *of_group))
    dtype = inputs.scale.dtype
    asked_for = (len(exponents) > 0, column_lse, term is not None, maximum, maximum and column_lse, False)
    return Statistics(*(s.to(dtype) if asked else s for s, asked in zip(statistics, asked_for, strict=True)))


def weighted_total(
    x: Tensor,
    y: Tensor | None = None,
    pairs: Pairs = ALL_PAIRS,
    *,
    term: Term,
    weight: Tensor | None = None,
    backend: str | None = None,
    shards: Shards = ALONE,
) -> Tensor:
    """Return ``sum_i weight_i sum_j phi(s_ij)``, 0-dim, with gradients from the same sweep: three products, not four.

    The weights (N,) default to 1. The arguments are not checked, as those of `sweep`. With shards the sum is over this
    rank's rows; it takes two sweeps where half of the workspace does not hold the gradients of all ranks' rows.
    """
    inputs, what, chosen = _prepare(x, y, pairs, 1.0, None, (), False, term, backend)
    x, y = inputs.x, inputs.y

    def wants(leaf: Tensor | None) -> bool:
        return torch.is_grad_enabled() and leaf is not None and leaf.requires_grad

    # scale and bias do not enter a term
    wanted = Wanted(wants(x), wants(y), False, False, wants(inputs.term_scale), wants(inputs.term_offset))
    # float16 takes two sweeps: a gradient stored before the incoming factor leaves its range
    two_sweeps = x.dtype == torch.float16 or (weight is not None and weight.requires_grad) or pairs.guide is not None
    of_group = None if shards.alone else _of_group(inputs, chosen, shards)
    if of_group is not None:
        # those of other ranks' rows wait here for the factor of this rank's loss
        waiting = len(of_group.sizes) * max(of_group.sizes) * x.shape[1] * inputs.scale.element_size()
        two_sweeps = two_sweeps or not known(2 * waiting <= of_group.workspace)
    if two_sweeps:
        row_sum = sweep(x, y, pairs, term=term, exponents=(), backend=backend, shards=shards).row_sum
        return (row_sum if weight is None else row_sum * weight).sum()
    # also where no gradient is wanted: the value has the same bits
    weight = inputs.scale.new_ones(x.shape[0]) if weight is None else weight.to(inputs.scale)
    wanted = wanted._replace(total=True)
    if of_group is not None:
        return group_total(weight, inputs, what, wanted, of_group)
    return sweep_total(weight, inputs, what, wanted, chosen.name)


def _of_group(inputs: Inputs, backend: Backend, shards: Shards) -> GroupArguments:
    """Return how the columns lie on the ranks."""
    sizes = shards.sizes(inputs.x if inputs.y is None else inputs.y)
    return GroupArguments(backend.name, shards.group, sizes, shards.workspace)


# The rows that are visited together by `softmax_total`, csrc/tile/tile_math.h.
STRIP_ROWS = 256


def softmax_total(
    x: Tensor,
    y: Tensor | None,
    pairs: Pairs,
    *,
    scale: float | Tensor,
    own: Tensor,
    weight: Callable[[], Tensor],
    backend: str | None = None,
) -> Tensor | None:
    """Return ``sum_i weight_i log(1 + exp(row_lse_i - own_i))``, 0-dim, with gradients from the same visit of the rows.

    None where two sweeps serve better or have to: on a GPU; of x with itself where one triangle holds all pairs; for
    float16, as in `weighted_total`; for a weight with a gradient; with a guide; and where the exponentials of some rows
    do not fit in the workspace. The arguments are not checked; `weight` is called only where the total is computed.
    """
    if (y is None and pairs.cutoff is None) or pairs.guide is not None:
        return None
    inputs, what, chosen = _prepare(x, y, pairs, scale, None, (1.0,), False, None, backend)
    x, y = inputs.x, inputs.y
    strip = STRIP_ROWS * (x if y is None else y).shape[0] * inputs.scale.dtype.itemsize
    if "softmax_total" not in chosen.operators or x.dtype == torch.float16 or not known(strip <= workspace_limit()):
        return None
    factors = weight()
    if factors.requires_grad:
        return None
    differentiable = torch.is_grad_enabled()
    wanted = (
        differentiable and x.requires_grad,
        differentiable and y is not None and y.requires_grad,
        differentiable and inputs.scale.requires_grad,
    )
    return autograd.softmax_total(factors.to(inputs.scale), own.to(inputs.scale), inputs, what, wanted, chosen.name)


def softmax_mean(
    x: Tensor,
    y: Tensor | None,
    values: Tensor,
    pairs: Pairs = ALL_PAIRS,
    *,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return (N, D'), the mean of the values (M, D') under the softmax of every row. The arguments are not checked."""
    inputs, what, _ = _prepare(x, y, pairs, scale, bias, (1.0,), False, None, backend)
    return autograd.softmax_mean(values, inputs, what, choose(inputs.x, backend, "softmax_mean").name).mean


def _prepare(
    x: Tensor,
    y: Tensor | None,
    pairs: Pairs,
    scale: float | Tensor,
    bias: Tensor | None,
    exponents: tuple[float, ...],
    column_lse: bool,
    term: Term | None,
    backend: str | None,
) -> tuple[Inputs, Description, Backend]:
    """Return the arguments as the operators take them, and the backend."""
    x, y = cast_for_autocast(x), None if y is None else cast_for_autocast(y)
    dtype = compute_dtype(x)
    x_ids, y_ids, cutoff, keep_equal_ids, diagonals, _ = pairs
    term_scale, term_offset, constants = (None, None, ()) if term is None else term.operands()
    inputs = Inputs(
        x,
        y,
        _as_tensor(scale, x, dtype),
        None if bias is None else bias.to(dtype),
        x_ids,
        y_ids,
        None if cutoff is None else cutoff.detach().to(dtype),
        None if term_scale is None else _as_tensor(term_scale, x, dtype),
        None if term_offset is None else _as_tensor(term_offset, x, dtype).expand(x.shape[0]),
    )
    name = "" if term is None else term.name
    what = Description(exponents, column_lse, name, constants, keep_equal_ids, int(diagonals))
    return inputs, what, choose(x, backend, pairs=x.shape[0] * (x if y is None else y).shape[0])


def _may_be_saved(inputs: Inputs, backend: Backend) -> bool:
    """Return whether the similarities may be saved for the backward.

    Rounded ones may not be with a cutoff: a pair that was dropped could come back, and no log-sum-exp counts it.
    """
    x, y = inputs.x, inputs.y
    dtype, limit = backend.score_dtype(x, y), saved_scores_limit()
    if dtype is None or (inputs.cutoff is not None and dtype == torch.int16):
        return False
    if limit is None:
        limit = min(backend.saved_scores_bytes, workspace_limit())
    m = (x if y is None else y).shape[0]
    size = x.shape[0] * m * dtype.itemsize
    return known(size > 0) and known(size <= limit)


def _as_tensor(value: float | Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(x.device, dtype)
    return torch.full((), value, dtype=dtype, device=x.device)
