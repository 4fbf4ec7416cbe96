"""The sweep over a process group: this rank's rows of x with the rows of y of all ranks, block by block.

A backward sweep takes the final log-sum-exps, so that forward and backward operators of a backend compose over blocks
of columns: this rank's own, which alone has diagonals, and those of the other ranks. Their rows are gathered in slices
that the workspace limit bounds, the next one while this one is swept. What belongs to columns goes home to their rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from contrastive_kernels.engine.spec import Description, Gradients, Inputs, Statistics, Upstream, Wanted, compute_dtype

__all__ = ["Peers", "all_sum", "class_sums", "exchange", "process_group", "select", "sweep", "sweep_backward"]

Operator = Callable[..., Any]


class Peers(NamedTuple):
    """The ranks of a group and their rows, as operators take them: names and sizes."""

    group: str
    sizes: tuple[int, ...]  # rows of y of every rank
    workspace: int  # the smallest of the ranks' limits, in bytes

    @property
    def handle(self) -> Any:
        """The process group."""
        return process_group(self.group)

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return dist.get_rank(self.handle)

    @property
    def longest(self) -> int:
        """The rows of the rank that has most."""
        return max(self.sizes)


def process_group(name: str) -> Any:
    """Return the process group of that name."""
    resolve: Any = vars(dist.distributed_c10d)["_resolve_process_group"]
    return resolve(name)


# Collectives on flat buffers: torch 2.13 renamed those of single tensors and warns about the old names.


def _gather_flat(out: Tensor, own: Tensor, group: Any) -> Any:
    function = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return function(out, own, group=group, async_op=True)


def _scatter_sums_flat(out: Tensor, parts: Tensor, group: Any) -> None:
    function = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    function(out, parts, group=group)


def exchange(own: Tensor, group: Any) -> Tensor:
    """Return (W, ...), the tensors of all ranks, whose shapes and dtypes agree."""
    out = own.new_empty((dist.get_world_size(group), *own.shape))
    _gather_flat(out.view(-1).view(torch.uint8), own.contiguous().view(-1).view(torch.uint8), group).wait()
    return out


def _padded(rows: Tensor, length: int) -> Tensor:
    """Return the rows with zeros after them, contiguous."""
    if rows.shape[0] == length:
        return rows.contiguous()
    out = rows.new_zeros((length, *rows.shape[1:]))
    out[: rows.shape[0]] = rows
    return out


def _vectors(own: Tensor | None, peers: Peers) -> Tensor | None:
    """Return (W, longest), a vector of every rank, padded."""
    return None if own is None else exchange(_padded(own, peers.longest), peers.handle)


def _to_owners(parts: Tensor, peers: Peers) -> Tensor:
    """Return (W, longest), what every rank has for the columns of this one; parts are (W, longest)."""
    out = torch.empty_like(parts)
    dist.all_to_all_single(out, parts, group=peers.handle)
    return out


def _sum_at_owners(parts: Tensor, peers: Peers) -> Tensor:
    """Return the sum over the ranks of what they have for the columns of this one; parts are (W, rows, ...)."""
    out = parts.new_empty(parts.shape[1:])
    _scatter_sums_flat(out.view(-1), parts.view(-1), peers.handle)
    return out


def all_sum(x: Tensor, group: str) -> Tensor:
    """Return the sum of x over all ranks."""
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=process_group(group))
    return out


# Blocks


class _Columns(NamedTuple):
    """Some columns: rows start to stop of the ranks first to last, as far as they have so many."""

    peers: Peers
    first: int
    last: int
    start: int
    stop: int

    @classmethod
    def own(cls, peers: Peers) -> _Columns:
        """Return all columns of this rank."""
        return cls(peers, peers.rank, peers.rank + 1, 0, peers.longest)

    def lengths(self) -> list[int]:
        """Return the number of columns of each of the ranks."""
        return [max(0, min(self.stop, n) - self.start) for n in self.peers.sizes[self.first : self.last]]

    def of(self, padded: Tensor, start: int = 0) -> Tensor:
        """Return the entries of these columns in (W, ...), whose second dimension begins at row `start` of a rank."""
        lengths, offset = self.lengths(), self.start - start
        part = padded[self.first : self.last]
        if len(set(lengths)) < 2:  # a view of whole slices
            return part[:, offset : offset + max(lengths, default=0)].flatten(0, 1)
        return torch.cat([rows[offset : offset + length] for rows, length in zip(part, lengths, strict=True)])

    def put(self, values: Tensor, padded: Tensor, start: int = 0) -> None:
        """Write the entries of these columns where `of` reads them."""
        offset = self.start - start
        for rank, part in enumerate(values.split(self.lengths()), self.first):
            padded[rank, offset : offset + part.shape[0]] = part


def _slices(y: Tensor, peers: Peers, row_bytes: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield start, stop and (W, stop - start, D), the rows of all ranks, the next slice under way; first (0, 0, own).

    A rank whose rows are used up takes part with none. `row_bytes` is what a row of a slice takes.
    """
    world, group, longest = len(peers.sizes), peers.handle, peers.longest
    step = min(longest, max(1, peers.workspace // (world * row_bytes)))

    def begin(start: int) -> tuple[Tensor, Any]:
        length = min(step, longest - start)
        own = _padded(y[start : start + length], length)
        out = own.new_empty((world, *own.shape))
        return out, _gather_flat(out.view(-1).view(torch.uint8), own.view(-1).view(torch.uint8), group)

    rows, work = begin(0)
    yield 0, 0, y  # what needs no transfer comes first
    for start in range(0, longest, step):
        current, done = rows, work
        if start + step < longest:
            rows, work = begin(start + step)
        done.wait()
        yield start, start + current.shape[1], current


class _Block(NamedTuple):
    """A sweep of this rank's x with some columns."""

    inputs: Inputs
    what: Description
    columns: _Columns
    own: bool
    ends_slice: bool

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to sweep."""
        return not self.own and not any(self.columns.lengths())


def _blocks(inputs: Inputs, what: Description, peers: Peers, extra_bytes: int = 0) -> Iterator[_Block]:
    """Yield the own block, then for every slice the blocks of the ranks before this one and of those after it.

    `extra_bytes` is what a row of a slice takes beside its features.
    """
    x, y = inputs.x, inputs.x if inputs.y is None else inputs.y
    own_ids = inputs.x_ids if inputs.y is None else inputs.y_ids
    ids, bias = _vectors(own_ids, peers), _vectors(inputs.bias, peers)
    apart = what._replace(diagonals=0)  # a sample lies on one rank
    # Two slices live at a time, and a block may be a copy of one.
    for start, stop, rows in _slices(y, peers, 3 * x.shape[1] * x.element_size() + extra_bytes):
        if stop == 0:
            yield _Block(inputs, what, _Columns.own(peers), True, False)
            continue
        for first, last in ((0, peers.rank), (peers.rank + 1, len(peers.sizes))):
            columns = _Columns(peers, first, last, start, stop)
            others = inputs._replace(
                y=columns.of(rows, start),
                y_ids=None if ids is None else columns.of(ids),
                bias=None if bias is None else columns.of(bias),
            )
            yield _Block(others, apart, columns, False, last == len(peers.sizes))


# The sweep


def sweep(inputs: Inputs, what: Description, maximum: bool, peers: Peers, forward: Operator) -> Statistics:
    """Return the statistics of this rank's rows over the columns of all ranks, and of its columns over all rows."""
    found: Statistics | None = None
    of_columns: list[Tensor] = []
    for block in _blocks(inputs, what, peers):
        if block.is_empty:
            continue
        out = Statistics(*forward(*block.inputs, *block.what, maximum, False))
        if found is None:
            found, shape = out, (len(peers.sizes), peers.longest)
            of_columns = [v.new_full(shape, -torch.inf) for v in (out.col_lse, out.col_max)[: what.column_lse * 2]]
        else:
            found = found._replace(
                row_lse=torch.logaddexp(found.row_lse, out.row_lse),
                row_sum=found.row_sum + out.row_sum,
                row_max=torch.maximum(found.row_max, out.row_max),
            )
        for padded, values in zip(of_columns, (out.col_lse, out.col_max), strict=False):
            if values.numel():
                block.columns.put(values, padded)
    assert found is not None  # the own block comes first
    if what.column_lse:
        own = peers.sizes[peers.rank]
        found = found._replace(col_lse=_to_owners(of_columns[0], peers).logsumexp(0)[:own])
        if maximum:
            found = found._replace(col_max=_to_owners(of_columns[1], peers).amax(0)[:own])
    return found


def sweep_backward(
    upstream: Upstream, inputs: Inputs, what: Description, wanted: Wanted, peers: Peers, backward: Operator
) -> Gradients:
    """Return the gradients of what all ranks compute from this rank's rows; scalars' parts of this rank's sweeps."""
    only_rows = list(what.exponents) == [1.0] and not what.column_lse and not what.term
    symmetric = inputs.y is None and inputs.bias is None and inputs.cutoff is None
    gradients = _pull if only_rows and symmetric else _push
    return gradients(upstream, inputs, what, wanted, peers, backward)


class _Totals:
    """Gradients that add up over blocks, in a dtype that is not rounded in between."""

    def __init__(self, inputs: Inputs) -> None:
        self.dtype, self.sums = compute_dtype(inputs.x), dict[str, Tensor]()

    def add(self, grads: Gradients, wanted: Wanted, factors: dict[str, float] | None = None) -> None:
        """Add what is wanted of some gradients, times a factor."""
        for name, grad, want in zip(Gradients._fields, grads, wanted, strict=True):
            if want:
                grad = grad.to(self.dtype) * (factors or {}).get(name, 1.0)
                self.sums[name] = self.sums[name] + grad if name in self.sums else grad

    def gradients(self, inputs: Inputs) -> Gradients:
        """Return the sums in the dtypes of `Gradients`."""
        found = Gradients(*(self.sums.get(name, inputs.scale.new_empty(0)) for name in Gradients._fields))
        return found._replace(x=found.x.to(inputs.x.dtype), y=found.y.to(inputs.x.dtype))


def _pull(
    upstream: Upstream, inputs: Inputs, what: Description, wanted: Wanted, peers: Peers, backward: Operator
) -> Gradients:
    """Return the gradients of x with itself: S is symmetric, so that those of other ranks' rows need not travel.

    The columns of a block get the statistics and gradients that their own rank has for them as rows.
    """
    lse, grad = (_vectors(v[0], peers) for v in (upstream.row_lse, upstream.grad_row_lse))
    assert lse is not None and grad is not None
    totals = _Totals(inputs)
    for block in _blocks(inputs, what, peers):
        if block.own:
            totals.add(Gradients(*backward(*upstream, *block.inputs, *block.what, list(wanted), None)), wanted)
        elif not block.is_empty:
            both = upstream._replace(col_lse=block.columns.of(lse), grad_col_lse=block.columns.of(grad))
            mirrored = block.what._replace(column_lse=True)
            grads = Gradients(*backward(*both, *block.inputs, *mirrored, list(wanted), None))
            # the other rank sees the same pairs
            totals.add(grads, wanted, {"scale": 0.5})
    return totals.gradients(inputs)


def _push(
    upstream: Upstream, inputs: Inputs, what: Description, wanted: Wanted, peers: Peers, backward: Operator
) -> Gradients:
    """Return the gradients; those of other ranks' rows go home."""
    itself, totals = inputs.y is None, _Totals(inputs)
    apart = wanted._replace(y=wanted.x if itself else wanted.y)
    lse, grad = (_vectors(v if what.column_lse else None, peers) for v in (upstream.col_lse, upstream.grad_col_lse))
    width, world, own = inputs.x.shape[1], len(peers.sizes), peers.sizes[peers.rank]
    bias = inputs.scale.new_zeros(world, peers.longest)
    parts: Tensor | None = None
    extra = (width * bias.element_size() * 2) if apart.y else 0
    for block in _blocks(inputs, what, peers, extra):
        columns = block.columns
        if block.own:
            grads = Gradients(*backward(*upstream, *block.inputs, *block.what, list(wanted), None))
            totals.add(grads, wanted._replace(bias=False))
            if wanted.bias:
                columns.put(grads.bias, bias)
            continue
        if apart.y and parts is None:
            parts = inputs.scale.new_zeros(world, columns.stop - columns.start, width)
        if not block.is_empty:
            into = upstream
            if lse is not None and grad is not None:
                into = upstream._replace(col_lse=columns.of(lse), grad_col_lse=columns.of(grad))
            grads = Gradients(*backward(*into, *block.inputs, *block.what, list(apart), None))
            totals.add(grads, apart._replace(y=False, bias=False))
            if parts is not None:
                columns.put(grads.y.to(parts.dtype), parts, columns.start)
            if wanted.bias:
                columns.put(grads.bias, bias)
        if block.ends_slice and parts is not None:
            home = _sum_at_owners(parts, peers)[: max(0, own - columns.start)]
            stop = min(columns.stop, own)
            if home.numel():
                totals.sums["x" if itself else "y"][columns.start : stop] += home
            parts = None
    if wanted.bias:
        totals.sums["bias"] = _sum_at_owners(bias, peers)[:own]
    return totals.gradients(inputs)


def select(
    x: Tensor,
    y: Tensor | None,
    k: int,
    largest: bool,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    exclude_diagonal: bool,
    views: int,
    peers: Peers,
    select_own: Operator,
) -> tuple[Tensor, Tensor]:
    """Return the k leading similarities of every row and their columns, numbered as in one process.

    Of `views` views, one after the other on every rank, all of one view come before those of the next.
    """
    inputs = Inputs(x, y, x.new_zeros(()), None, x_ids, y_ids, None, None, None)
    what = Description((), False, "", (), False, int(exclude_diagonal))
    samples = [size // views for size in peers.sizes]
    numbers = torch.zeros(len(samples), peers.longest, dtype=torch.int64, device=x.device)
    for rank, n in enumerate(samples):
        rows = torch.arange(sum(samples[:rank]), sum(samples[: rank + 1]), device=x.device)
        numbers[rank, : n * views] = (rows + sum(samples) * torch.arange(views, device=x.device)[:, None]).flatten()
    found: list[tuple[Tensor, Tensor]] = []
    for block in _blocks(inputs, what, peers):
        if block.is_empty:
            continue
        tensors, of_block = block.inputs, block.columns.of(numbers)
        arguments = tensors.x, tensors.y, k, largest, tensors.x_ids, tensors.y_ids, bool(block.what.diagonals)
        values, columns = select_own(*arguments)
        columns = torch.where(columns < 0, columns, of_block[columns.clamp(min=0)])
        found = [_leading([*found, (values, columns)], k, largest)]
    return found[0]


def _leading(found: list[tuple[Tensor, Tensor]], k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """Return the k leading of some similarities and their columns: NaN first, equal ones by column."""
    values, columns = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    last = torch.iinfo(columns.dtype).max
    order = columns.masked_fill(columns < 0, last).sort(dim=1, stable=True).indices
    values, columns = values.gather(1, order), columns.gather(1, order)
    key = values if largest else -values
    order = key.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return values.gather(1, order), columns.gather(1, order)


def class_sums(values: Tensor, value_ids: Tensor, ids: Tensor, peers: Peers) -> Tensor:
    """Return (n, D), for every id of this rank the sum of the values (m, D) of all ranks' rows that have it."""
    ordered = ids.sort().values
    all_ids = _vectors(value_ids, peers)
    assert all_ids is not None
    sums = values.new_zeros(ids.shape[0], values.shape[1])
    everyone = _Columns(peers, 0, len(peers.sizes), 0, peers.longest)
    # Two slices live at a time, a copy of one, and its rows where they belong.
    for start, stop, rows in _slices(values, peers, 4 * values.shape[1] * values.element_size()):
        if stop == 0:
            continue
        columns = everyone._replace(start=start, stop=stop)
        theirs = columns.of(all_ids)
        slot = torch.searchsorted(ordered, theirs).clamp(max=ids.shape[0] - 1)
        known = (ordered[slot] == theirs)[:, None]
        sums.index_add_(0, slot, columns.of(rows, start).masked_fill(~known, 0))
    return sums[torch.searchsorted(ordered, ids)]
