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

from contrastive_kernels.engine.spec import Description, Gradients, Inputs, Statistics, Upstream, Wanted

__all__ = [
    "Peers",
    "all_sum",
    "class_sums",
    "exchange",
    "header_device",
    "process_group",
    "same_rows",
    "select",
    "sum_at_home",
    "sweep",
    "sweep_backward",
]

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
    return vars(dist.distributed_c10d)["_resolve_process_group"](name)


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


def header_device(x: Any, group: Any) -> torch.device:
    """Return a CPU if the group reaches it, so that no one waits for a device; else that of x."""
    if torch.device("cpu") in group._device_types:
        return torch.device("cpu")
    return x.device if isinstance(x, Tensor) else torch.device("cuda")


def same_rows(x: Tensor, rows: list[int], group: str) -> Tensor:
    """Return a copy of x, once all ranks are known to have as many rows of everything.

    On a device nothing is read back: the assertion fails ahead of transfers of what depends on the copy.
    """
    device = header_device(x, process_group(group))
    own = torch.stack([torch.full((), n, device=device) for n in rows])
    everyone = exchange(own, process_group(group))
    equal, shown = (everyone == own).all(), ""
    if device.type == "cpu" and not equal:
        shown = " (" + ", ".join(f"rank {r}: {sizes[sizes > 0].tolist()}" for r, sizes in enumerate(everyone)) + ")"
    torch._assert_async(
        equal,
        f"torch.compile takes a group's shards for equal, but the numbers of rows differ{shown}; drop the last, "
        "incomplete batch, or call the loss uncompiled, see contrastive_kernels.distributed.set_shards",
    )
    return x.clone()


def _padded(rows: Tensor, length: int) -> Tensor:
    """Return the rows with zeros after them, contiguous."""
    if rows.shape[0] == length:
        return rows.contiguous()
    out = rows.new_zeros((length, *rows.shape[1:]))
    out[: rows.shape[0]] = rows
    return out


def _of_all(own: Tensor, peers: Peers) -> Tensor:
    """Return (W, longest), a vector of every rank, padded."""
    return exchange(_padded(own, peers.longest), peers.handle)


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


# What slices may take on a CPU, whose cache is small and whose operators cost little to call.
SLICES_ON_A_CPU = 16 << 20


def _slice_bytes(x: Tensor, peers: Peers) -> int:
    """Return what slices may take, the same on all ranks."""
    return min(peers.workspace, SLICES_ON_A_CPU) if x.device.type == "cpu" else peers.workspace


def _slices(y: Tensor, peers: Peers, row_bytes: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield start, stop and (W, stop - start, D), the rows of all ranks, the next slice under way; first (0, 0, own).

    A rank whose rows are used up takes part with none. `row_bytes` is what a row of a slice takes.
    """
    world, group, longest = len(peers.sizes), peers.handle, peers.longest
    step = max(1, min(longest, _slice_bytes(y, peers) // (world * row_bytes)))

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
    """A sweep of this rank's x, or of some of its rows, with some columns."""

    inputs: Inputs
    what: Description
    columns: _Columns
    rows: slice  # of x
    own: bool
    gathered: range  # the rows of every rank that are there
    ends_slice: bool

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to sweep."""
        return not self.own and not (self.inputs.x.shape[0] and any(self.columns.lengths()))


def _places(peers: Peers, start: int, stop: int, once: bool) -> list[tuple[_Columns, slice]]:
    """Return the columns of a slice that this rank sweeps, and with which of its rows.

    `once`: what two ranks have in common is swept by one of them, by each with the ranks that follow it in a circle. Of
    two opposite ones the first takes one half of the other's rows as columns, and the other sweeps the second half.
    """
    rank, world, every = peers.rank, len(peers.sizes), slice(None)
    if not once:
        return [(_Columns(peers, *ranks, start, stop), every) for ranks in ((0, rank), (rank + 1, world))]
    end = rank + 1 + (world - 1) // 2
    following = (rank + 1, min(end, world)), (0, max(0, end - world))
    places = [(_Columns(peers, *ranks, start, stop), every) for ranks in following]
    if world % 2 == 0:
        opposite = (rank + world // 2) % world
        half = (peers.sizes[max(rank, opposite)] + 1) // 2
        columns = _Columns(peers, opposite, opposite + 1, start, stop)
        if rank < opposite:
            places.append((columns._replace(stop=max(start, min(stop, half))), every))
        else:
            places.append((columns, slice(half, None)))
    return places


def _blocks(
    inputs: Inputs, what: Description, peers: Peers, *, once: bool = False, extra_bytes: int = 0
) -> Iterator[_Block]:
    """Yield the own block, then for every slice the blocks of other ranks' columns that this one sweeps.

    `extra_bytes` is what a row of a slice takes beside its features.
    """
    x, y = inputs.x, inputs.x if inputs.y is None else inputs.y
    own_ids = inputs.x_ids if inputs.y is None else inputs.y_ids
    ids, bias = (None if v is None else _of_all(v, peers) for v in (own_ids, inputs.bias))
    # A sample lies on one rank, unlike places. Two slices live at a time, and a block may be a copy of one.
    apart = what._replace(diagonals=min(what.diagonals, 0), column_lse=what.column_lse or once)
    for start, stop, gathered in _slices(y, peers, 3 * x.shape[1] * x.element_size() + extra_bytes):
        if stop == 0:
            yield _Block(inputs, what, _Columns.own(peers), slice(None), True, range(0), False)
            continue
        places = _places(peers, start, stop, once)
        for place, (columns, rows) in enumerate(places, 1):
            others = inputs._replace(
                x=x[rows],
                x_ids=None if inputs.x_ids is None else inputs.x_ids[rows],
                y=columns.of(gathered, start),
                y_ids=None if ids is None else columns.of(ids),
                bias=None if bias is None else columns.of(bias),
            )
            yield _Block(others, apart, columns, rows, False, range(start, stop), place == len(places))


# The sweep


def _is_symmetric(inputs: Inputs, what: Description) -> bool:
    """Return whether one statistic is all, and that of the rows is that of the columns."""
    only_rows = list(what.exponents) == [1.0] and not what.column_lse and not what.term
    return only_rows and inputs.y is None and inputs.bias is None and inputs.cutoff is None


def sweep(inputs: Inputs, what: Description, maximum: bool, peers: Peers, forward: Operator) -> Statistics:
    """Return the statistics of this rank's rows over the columns of all ranks, and of its columns over all rows.

    Where S is symmetric, the rows of two ranks meet once; what their columns get is for the other's rows.
    """
    found: Statistics | None = None
    of_columns: list[Tensor] = []
    once = _is_symmetric(inputs, what)
    for block in _blocks(inputs, what, peers, once=once):
        if block.is_empty:
            continue
        out = Statistics(*forward(*block.inputs, *block.what, maximum, False))
        if found is None:
            found, shape = out, (len(peers.sizes), peers.longest)
            count = (what.column_lse or once) * (1 + maximum)
            of_columns = [out.row_lse.new_full(shape, -torch.inf) for _ in range(count)]
        else:
            lse, total, most = (v[..., block.rows] for v in (found.row_lse, found.row_sum, found.row_max))
            torch.logaddexp(lse, out.row_lse, out=lse)
            total += out.row_sum
            torch.maximum(most, out.row_max, out=most)
        for padded, values in zip(of_columns, (out.col_lse, out.col_max), strict=False):
            if values.numel():
                block.columns.put(values, padded)
    assert found is not None  # the own block comes first
    if of_columns:
        own = peers.sizes[peers.rank]
        by_rank = [_to_owners(padded, peers)[:, :own] for padded in of_columns]
        lse, most = by_rank[0].logsumexp(0), by_rank[1].amax(0) if maximum else found.col_max
        if not once:
            return found._replace(col_lse=lse, col_max=most)
        found = found._replace(row_lse=torch.logaddexp(found.row_lse, lse))
        found = found._replace(row_max=torch.maximum(found.row_max, most)) if maximum else found
    return found


# From so many rows of a rank on, what two ranks have in common takes one of them less time, gradients that travel
# included, than both. 8192 is modelled for an H100, not measured.
ROWS_TO_PUSH = {"cpu": 0, "cuda": 8192}


def sweep_backward(
    upstream: Upstream, inputs: Inputs, what: Description, wanted: Wanted, peers: Peers, backward: Operator
) -> Gradients:
    """Return the gradients of what all ranks compute from this rank's rows; scalars' parts of this rank's sweeps."""
    few = min(peers.sizes) < ROWS_TO_PUSH.get(inputs.x.device.type, 0)
    gradients = _pull if few and _is_symmetric(inputs, what) else _push
    return gradients(upstream, inputs, what, wanted, peers, backward)


class _Totals(dict[str, Tensor]):
    """Gradients that add up over blocks, by name; not rounded in between."""

    def add(self, grads: Gradients, wanted: Wanted, rows: slice = slice(None)) -> None:
        """Add what is wanted of some gradients, that of x to some of its rows."""
        for name, grad, want in zip(Gradients._fields, grads, wanted, strict=True):
            if want and name in self:
                total = self[name][rows] if name == "x" else self[name]
                total += grad
            elif want:
                self[name] = grad

    def gradients(self, inputs: Inputs) -> Gradients:
        """Return the sums; those of features are rounded to their dtype, unless a factor is still to come."""
        dtype = inputs.scale.dtype if "total" in self else inputs.x.dtype
        found = Gradients(*(self.get(name, inputs.scale.new_empty(0)) for name in Gradients._fields))
        return found._replace(x=found.x.to(dtype), y=found.y.to(dtype))


def _pull(
    upstream: Upstream, inputs: Inputs, what: Description, wanted: Wanted, peers: Peers, backward: Operator
) -> Gradients:
    """Return the gradients of x with itself: S is symmetric, so that those of other ranks' rows need not travel.

    The columns of a block get the statistics and gradients that their own rank has for them as rows.
    """
    lse, grad = (_of_all(v[0], peers) for v in (upstream.row_lse, upstream.grad_row_lse))
    totals = _Totals()
    for block in _blocks(inputs, what, peers):
        if block.own:
            grads = Gradients(*backward(*upstream, *block.inputs, *block.what, list(wanted), None, True))
            totals.add(grads, wanted)
        elif not block.is_empty:
            both = upstream._replace(col_lse=block.columns.of(lse), grad_col_lse=block.columns.of(grad))
            mirrored = block.what._replace(column_lse=True)
            grads = Gradients(*backward(*both, *block.inputs, *mirrored, list(wanted), None, True))
            # the other rank sees the same pairs
            totals.add(grads._replace(scale=0.5 * grads.scale), wanted)
    return totals.gradients(inputs)


def _push(
    upstream: Upstream, inputs: Inputs, what: Description, wanted: Wanted, peers: Peers, backward: Operator
) -> Gradients:
    """Return the gradients; those of other ranks' rows go home.

    Where S is symmetric, columns get the statistics and gradients that their own rank has for them as rows. With a
    total, nothing goes home before the factor of this rank's loss is known: y is (W, longest, D), for all ranks' rows.
    """
    itself, once, totals = inputs.y is None, _is_symmetric(inputs, what), _Totals()
    apart = wanted._replace(y=wanted.x if itself else wanted.y)
    of_columns = (upstream.row_lse[0], upstream.grad_row_lse[0]) if once else (upstream.col_lse, upstream.grad_col_lse)
    lse, grad = (_of_all(v, peers) if once or what.column_lse else None for v in of_columns)
    width, world, own = inputs.x.shape[1], len(peers.sizes), peers.sizes[peers.rank]
    bias = inputs.scale.new_zeros(world, peers.longest)
    parts = inputs.scale.new_zeros(world, peers.longest, width) if wanted.total and apart.y else None
    # The slices do not depend on what is wanted beside a total, so that it has the same bits.
    extra = (2 * width * bias.element_size()) if apart.y or wanted.total else 0
    peers = peers._replace(workspace=peers.workspace // 2) if wanted.total else peers  # what is kept has the other half
    for block in _blocks(inputs, what, peers, once=once, extra_bytes=extra):
        columns, rows = block.columns, block.rows
        gathered = range(peers.longest) if wanted.total else block.gathered
        if not block.is_empty:
            into = upstream._replace(grad_row_lse=upstream.grad_row_lse[:, rows], row_lse=upstream.row_lse[:, rows])
            if not block.own and lse is not None and grad is not None:
                into = into._replace(col_lse=columns.of(lse), grad_col_lse=columns.of(grad))
            want, is_home = wanted if block.own else apart, block.own and not wanted.total
            grads = Gradients(*backward(*into, *block.inputs, *block.what, list(want), None, True))
            totals.add(grads, want._replace(y=want.y and is_home, bias=False), rows)
            if want.bias:
                columns.put(grads.bias, bias)
            dy = grads.y
            del grads  # the parts do not live beside it
            if want.y and not is_home:  # a total's are there
                parts = inputs.scale.new_zeros(world, len(gathered), width) if parts is None else parts
                columns.put(dy, parts, gathered.start)
            del dy
        if block.ends_slice and apart.y and not wanted.total:
            parts = inputs.scale.new_zeros(world, len(gathered), width) if parts is None else parts
            home = _sum_at_owners(parts, peers)[: max(0, own - gathered.start)]
            totals["x" if itself else "y"][gathered.start : gathered.start + home.shape[0]] += home
            parts = None
    if wanted.bias:
        totals["bias"] = _sum_at_owners(bias, peers)[:own]
    if parts is not None:
        totals["y"] = parts
    return totals.gradients(inputs)


def sum_at_home(parts: Tensor, factor: Tensor, peers: Peers) -> Tensor:
    """Return the sum over the ranks of their parts for the rows of this one, each times its rank's factor."""
    # a product, a copy of it that a library may take, and the sum
    step = max(1, _slice_bytes(parts, peers) // (3 * parts[:, 0].nbytes))
    sums = [_sum_at_owners(parts[:, i : i + step] * factor, peers) for i in range(0, peers.longest, step)]
    return torch.cat(sums)[: peers.sizes[peers.rank]]


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
        if of_block.numel():  # a rank may have no rows of y
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
    all_ids = _of_all(value_ids, peers)
    sums = values.new_zeros(ids.shape[0], values.shape[1])
    everyone = _Columns(peers, 0, len(peers.sizes), 0, peers.longest)
    # Two slices live at a time, a copy of one, and its rows where they belong.
    for start, stop, rows in _slices(values, peers, 4 * values.shape[1] * values.element_size()):
        if stop == 0 or not ids.shape[0]:
            continue
        columns = everyone._replace(start=start, stop=stop)
        theirs = columns.of(all_ids)
        slot = torch.searchsorted(ordered, theirs).clamp(max=ids.shape[0] - 1)
        known = (ordered[slot] == theirs)[:, None]
        sums.index_add_(0, slot, columns.of(rows, start).masked_fill(~known, 0))
    return sums[torch.searchsorted(ordered, ids)]
