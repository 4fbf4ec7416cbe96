"""Quick-Thoughts: the function and its module."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from contrastive_kernels.losses._arguments import SoftmaxArguments, loss_function
from contrastive_kernels.losses._module import LossModule
from contrastive_kernels.losses._options import SoftmaxOptions
from contrastive_kernels.losses._polarization import Polarization, add_polarization, check_polarization
from contrastive_kernels.losses._softmax import (
    Negatives,
    Positives,
    list_negatives,
    one_direction_loss,
    softmax_value,
    sweep_negatives,
    union,
)
from contrastive_kernels.primitives import (
    ALONE,
    Group,
    Pairs,
    Shards,
    checks,
    compute_dtype,
    gather_rows,
    over_ranks,
    row_dot,
    shards_of,
    unit_rows,
)

__all__ = ["QuickThoughtsLoss", "quick_thoughts_loss"]


class QuickThoughtsArguments(SoftmaxArguments, total=False):
    """Keyword arguments of `quick_thoughts_loss`."""

    diagonal: Literal["zero", "exclude"]
    temperature: float | Tensor | None
    logit_scale: float | Tensor | None
    ids: Tensor | None
    polarization: Polarization | None


@loss_function
@over_ranks
def quick_thoughts_loss(
    first: Tensor,
    second: Tensor,
    *,
    context_size: int = 1,
    diagonal: Literal["zero", "exclude"] = "zero",
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ids: Tensor | None = None,
    polarization: Polarization | None = None,
    backend: str | None = None,
    group: Group | None = None,
) -> Tensor:
    r"""Return the Quick-Thoughts loss, which picks the neighbouring sentences among all of a batch in corpus order.

    .. math:: L = \frac1N \sum_i \Bigl[ \log\bigl(1 + \sum_{j \ne i} e^{u_{ij}}\bigr)
        - \frac{1}{|C_i|} \sum_{j \in C_i} u_{ij} \Bigr], \qquad C_i = \{j : 0 < |i - j| \le \mathrm{context\_size}\}

    with :math:`u_{ij} = \langle f_i, g_j \rangle`, raw dot products. The 1 is a sentence's own logit, which the
    official code sets to 0 and leaves in.

    Args:
        first: f, ``(N, D)``, N >= 2, rows in corpus order.
        second: g, ``(N, D)``, the same sentences by the other encoder.
        context_size: the distance up to which sentences are neighbours.
        diagonal: ``"zero"``, or ``"exclude"``: without the 1.
        temperature: divides u, float or 0-dim tensor (differentiable); 1 unless ``logit_scale`` is given.
        logit_scale: multiplies u instead.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per sentence; the mean is then sum(w l) / sum(w).
        label_smoothing: share of the target spread over all that is in the denominator.
        ids: ``(N,)`` integers; sentences with equal ids that are no neighbours leave the denominator.
        polarization: adds `Polarization` over the cosines to the sentences that are neither the same nor neighbours;
            from the same sweep with ``normalize``, else a sweep of its own.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch. None: this
            process alone.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``; float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit, fewer than two rows, a context_size below 1, an unknown diagonal.
        TypeError: dtypes that differ or are not floating (ids, context_size: not integer).
        RuntimeError: tensors on different devices.

    Source: Logeswaran, Lee, ICLR 2018, arXiv:1803.02893.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> first, second = torch.randn(2, 16, 8).unbind(0)
        >>> ck.quick_thoughts_loss(first, second, context_size=2).shape
        torch.Size([])
    """
    shards = shards_of(group)
    checks.paired("first", first, "second", second)
    checks.two_rows("first", first, "a sentence needs a neighbour", shards.total(first.shape[0]))
    context_size = checks.count("context_size", context_size)
    checks.choice("diagonal", diagonal, ("zero", "exclude"))
    n = first.shape[0]
    ids = checks.optional_ids("ids", ids, n, first)
    check_polarization(polarization)
    options = SoftmaxOptions.of(
        first,
        temperature=temperature,
        logit_scale=logit_scale,
        default_temperature=1.0,
        reduction=reduction,
        weight=weight,
        label_smoothing=label_smoothing,
        backend=backend,
        group=group,
    )
    context = _Context.of(n, context_size, ids, first.device, shards)
    pairs = Pairs(ids, ids, diagonals=int(ids is None))
    fused = replace(options, polarization=polarization if normalize else None)
    x, y = unit_rows(first, normalize, backend), unit_rows(second, normalize, backend)
    similarity = _neighbours(x, y, context_size, context, shards)
    target = options.scale * (similarity.sum(1) / context.valid.sum(1))
    zero = torch.zeros_like(target)
    own = zero if diagonal == "zero" else None
    positives = Positives(target=target, lse=own, total=zero, number=int(own is not None))
    if ids is None and polarization is None:
        loss = one_direction_loss(x, y, pairs, positives, options)
        assert isinstance(loss, torch.Tensor)  # there are no statistics
        return loss
    swept = sweep_negatives(x, y, pairs, fused)
    negatives = swept
    if ids is not None:
        negatives = union(negatives, list_negatives(similarity, ~context.dropped, fused))
    loss = softmax_value([negatives], positives, options)
    if polarization is None:
        return loss
    if not normalize:
        x, y = unit_rows(first, True, backend), unit_rows(second, True, backend)
        fused = replace(options, label_smoothing=0.0, polarization=polarization)
        swept, similarity = sweep_negatives(x, y, pairs, fused), _neighbours(x, y, context_size, context, shards)
    band_sum, counts = _without(swept, list_negatives(similarity, ~context.kept, fused))
    return add_polarization(loss, band_sum, counts, polarization, reduction, shards)


class QuickThoughtsLoss(LossModule):
    """`quick_thoughts_loss` as a module.

    Args:
        context_size: the distance up to which sentences are neighbours.
        options: further keyword arguments of `quick_thoughts_loss`.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.QuickThoughtsLoss(2)(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(quick_thoughts_loss)

    def __init__(
        self,
        context_size: int = 1,
        **options: Unpack[QuickThoughtsArguments],
    ) -> None:
        super().__init__(context_size=context_size, **options)

    def forward(
        self,
        first: Tensor,
        second: Tensor,
        **inputs: Any,
    ) -> Tensor:
        """Return the loss; `inputs` are per-batch keyword arguments: weight, ids."""
        return self.function(first, second, **self.options(**inputs))


class _Context(NamedTuple):
    """The neighbours (N, 2 C) of every row, in the order +1, -1, +2, -2, ..."""

    valid: Tensor  # those that exist
    kept: Tensor  # of these, those that the sweep keeps
    dropped: Tensor  # those that it drops for their id

    @classmethod
    def of(
        cls, n: int, context_size: int, ids: Tensor | None, device: torch.device, shards: Shards = ALONE
    ) -> _Context:
        """Return the neighbours of n rows."""
        total = shards.total(n)
        distances = torch.arange(1, len(_distances(total, context_size)) + 1, device=device)
        index = shards.positions(n, device)[:, None] + torch.stack([distances, -distances], 1).flatten()
        valid = (index >= 0) & (index < total)
        if ids is None:
            return cls(valid, valid, torch.zeros_like(valid))
        equal = shards.gather(ids)[index.clamp(0, total - 1)] == ids[:, None]
        return cls(valid, valid & ~equal, valid & equal)


def _distances(n: int, context_size: int) -> range:
    return range(1, min(context_size, n - 1) + 1)


def _neighbours(x: Tensor, y: Tensor, context_size: int, context: _Context, shards: Shards) -> Tensor:
    """Return the similarities of the rows of x to their neighbours in y, (N, 2 C); 0 where there is none."""
    columns = []
    if not shards.alone:
        n, distances = x.shape[0], _distances(shards.total(x.shape[0]), context_size)
        around, c = _with_borders(y.to(compute_dtype(y)), len(distances), shards), len(distances)
        columns = [row_dot(x, around[c + k : c + k + n]) for distance in distances for k in (distance, -distance)]
        return torch.stack(columns, 1).masked_fill(~context.valid, 0)
    for k in _distances(x.shape[0], context_size):
        after, before = row_dot(x[:-k], y[k:]), row_dot(x[k:], y[:-k])
        columns += [torch.nn.functional.pad(after, (0, k)), torch.nn.functional.pad(before, (k, 0))]
    return torch.stack(columns, 1)


def _with_borders(y: Tensor, c: int, shards: Shards) -> Tensor:
    """Return y with the c rows before and after it, which lie on other ranks; zeros where there are none.

    What travels are the first and the last c rows of every shard, each row once.
    """
    ends = list(accumulate(shards.rows))
    borders = [
        [i for i in range(end - n, end) if i < end - n + c or i >= end - c]
        for n, end in zip(shards.rows, ends, strict=True)
    ]
    first, last = ends[shards.rank] - y.shape[0], ends[shards.rank]
    own = torch.tensor(borders[shards.rank], device=y.device) - first
    rows = replace(shards, rows=tuple(map(len, borders))).gather(gather_rows(y, own))
    place = {row: k for k, row in enumerate(chain.from_iterable(borders))}
    around = [*range(first - c, first), *range(last, last + c)]
    # the row after the last one is that of zeros
    index = torch.tensor([place.get(row, len(place)) for row in around], device=y.device)
    halo = gather_rows(torch.nn.functional.pad(rows, (0, 0, 0, 1)), index)
    return torch.cat([halo[:c], y, halo[c:]])


def _without(all_negatives: Negatives, some: Negatives) -> tuple[Tensor, Tensor]:
    """Return band sums and counts of all but some; a row of which nothing is left has the sum 0, not a rounding."""
    assert all_negatives.counts is not None and some.counts is not None
    assert all_negatives.band_sum is not None and some.band_sum is not None
    counts = all_negatives.counts - some.counts
    return (all_negatives.band_sum - some.band_sum).masked_fill(counts <= 0, 0), counts
