"""Views of the same samples: how they are stacked, their similarities to each other, the pairs of different samples."""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from contrastive_kernels.losses._options import SoftmaxOptions, check_cutoff, cutoff_from
from contrastive_kernels.losses._softmax import Positives
from contrastive_kernels.primitives import (
    ALONE,
    Pairs,
    Shards,
    checks,
    compute_dtype,
    row_dot,
    unit_rows,
    wide_products,
)

# Up to this many views are excluded by their diagonals, more by ids: a kernel holds a comparison for every diagonal.
MOST_DIAGONALS = 8


def check_views(z0: Tensor, z1: Tensor | None) -> int:
    """Return the number of views: two (N, D) batches, or all in one (N, V, D)."""
    if z1 is not None:
        checks.paired("z0", z0, "z1", z1)
        return 2
    checks.views("z0", z0)
    checks.not_empty("z0", z0)
    return z0.shape[1]


def stack_views(z0: Tensor, z1: Tensor | None) -> Tensor:
    """Return all views as (V, N, D)."""
    return z0.transpose(0, 1) if z1 is None else torch.stack([z0, z1])


def other_views(views: Tensor, backend: str | None = None) -> Tensor:
    """Return (V * N, V - 1), the similarities of every row to the other views of its sample, from views (V, N, D)."""
    if len(views) > 2:
        # V - 1 gradients of each view add up: in half precision each of them would be rounded.
        views = views.to(compute_dtype(views))
    pair = {(j, k): row_dot(views[j], views[k], backend) for j, k in combinations(range(len(views)), 2)}
    others = [[pair[min(j, k), max(j, k)] for k in range(len(views)) if k != j] for j in range(len(views))]
    return torch.cat([torch.stack(row, 1) for row in others])


def other_samples(ids: Tensor | None, n: int, v: int, device: torch.device, shards: Shards = ALONE) -> Pairs:
    """Return the pairs of different samples, or of different ids, of V views of n samples, view after view."""
    if ids is None and v <= MOST_DIAGONALS:
        return Pairs(diagonals=v)
    ids = shards.positions(n, device) if ids is None else ids
    return Pairs(ids.repeat(v))


def _widened(rows: Tensor, x: Tensor, normalize: bool, backend: str | None) -> Tensor:
    """Return the unit rows of x, as they are in half precision, in float32 with gradients in float32.

    Where rows are close, the gradients of many positives and of the negatives cancel, and would leave their roundings.
    """
    dtype = compute_dtype(x)
    if rows.dtype == dtype:
        return rows
    with wide_products(x):
        wide = unit_rows(x.to(dtype), normalize, backend)
    return wide + (rows.to(dtype) - wide).detach()


class Anchors(NamedTuple):
    """The rows of all views as one set of anchors, each with its positives in the other views."""

    z: Tensor  # (V N, D), first view first
    similarities: Tensor  # (V N, V - 1), of every row to the other views of its sample
    pairs: Pairs  # the negatives: the rows of other samples

    @classmethod
    def of(
        cls,
        z0: Tensor,
        z1: Tensor | None,
        *,
        normalize: bool,
        ids: Tensor | None,
        cutoff: float | Tensor | None,
        cutoff_margin: float | Tensor | None,
        backend: str | None,
        shards: Shards = ALONE,
    ) -> Anchors:
        """Stack checked views; the cutoff has one entry per sample or per anchor."""
        n, v = z0.shape[0], 2 if z1 is not None else z0.shape[1]
        check_cutoff(z0, cutoff, cutoff_margin, views=v)
        ids = checks.optional_ids("ids", ids, n, z0)
        stacked = stack_views(z0, z1)
        views = unit_rows(stacked, normalize, backend)
        if v == 2:
            first, second = views.unbind(0)  # one operation in the backward, where two indexings would be two
            similarities = row_dot(first, second, backend).repeat(2).unsqueeze(1)
        else:
            wide = _widened(views, stacked, normalize, backend)
            views, similarities = wide.to(views.dtype), other_views(wide, backend)
        own = similarities.squeeze(1) if v == 2 else similarities.mean(1)
        limit = cutoff_from(cutoff, cutoff_margin, own, views=v)
        pairs = other_samples(ids, n, v, z0.device, shards)._replace(cutoff=limit)
        return cls(views.flatten(0, 1), similarities, pairs)

    def positives(self, options: SoftmaxOptions) -> Positives:
        """Return the other views as positives, all in the denominator."""
        return Positives.several(options.scale * self.similarities)
