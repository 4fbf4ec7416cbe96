"""Losses over the ranks of a process group: whose rows are whose, what the ranks agree on, and sums over all of them.

The loss of rank r is W times its own part of the whole batch's loss, so that the mean over the W ranks is the loss of
the whole batch. Backward gives every tensor the gradient of the sum of all ranks' losses; averaged over the ranks, as
DistributedDataParallel does, that is the gradient of one process with the whole batch.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, Union

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import ParamSpec

from contrastive_kernels.engine import environment
from contrastive_kernels.engine.autograd import call
from contrastive_kernels.engine.backends import choose
from contrastive_kernels.engine.groups import exchange, header_device, process_group
from contrastive_kernels.engine.limits import workspace_limit
from contrastive_kernels.engine.terms import Term

__all__ = ["ALONE", "Group", "Shards", "one_process_only", "over_ranks", "set_shards", "shards_of", "shards_of_columns"]

Group = Union[ProcessGroup, DeviceMesh, Literal["world"]]  # noqa: UP007, | takes no class that is a stub

P = ParamSpec("P")
T = TypeVar("T")

# Arguments whose number of rows is each rank's own affair.
UNPAIRED = (
    "negative_keys",
    "key_ids",
    "contrast_features",
    "contrast_labels",
    "y",
    "y_ids",
    "y_bias",
    "values",
    "guide",
)
# Arguments that are the same on every rank.
COMMON = ("queue", "support", "label_embeddings")

INSTEAD = "gather the rows of all ranks yourself and pass group=None"

ENVIRONMENT_VARIABLE = "CONTRASTIVE_KERNELS_SHARDS"
MODES = ("exchange", "even")
_mode: str | None = None


def set_shards(mode: Literal["exchange", "even"] | None) -> None:
    """Say what is known of the shards of a group, in this process.

    Args:
        mode: ``"exchange"``: nothing; with every call of a loss the ranks exchange one small vector, learn each other's
            number of rows, and raise the same error if their calls do not fit. ``"even"``: a promise that all ranks
            have the same number of rows, the same workspace limit and make the same calls; nothing is exchanged, and
            a broken promise hangs or gives wrong values. Without it, ``torch.compile`` takes equal shards too, but
            compares the numbers of rows in every call, and raises on all ranks if they differ. None: what the
            environment variable ``CONTRASTIVE_KERNELS_SHARDS`` says, or ``"exchange"``.

    Raises:
        ValueError: the mode is unknown.

    Example:
        >>> from contrastive_kernels.distributed import set_shards
        >>> set_shards("even")
        >>> set_shards(None)
    """
    global _mode
    if mode is not None and mode not in MODES:
        raise ValueError(f"mode {mode!r} is unknown; choose one of {', '.join(map(repr, MODES))} or None")
    _mode = mode


def _are_even() -> bool:
    """Return whether all ranks have as many rows: by promise, or compiled."""
    return torch.compiler.is_compiling() or _are_promised()


def _are_promised() -> bool:
    return (_mode or environment.choice(ENVIRONMENT_VARIABLE, MODES)) == "even"


@dataclass(frozen=True)
class Shards:
    """How the rows of one batch lie on the ranks of a group, in rank order; `ALONE` for one process."""

    group: str = ""
    rank: int = 0
    rows: tuple[int, ...] = (1,)
    workspace: int = 0
    batch: Shards | None = None  # of the batch, where these are of something else

    @property
    def alone(self) -> bool:
        """Whether there is one process only."""
        return len(self.rows) == 1

    @property
    def world(self) -> int:
        """The number of ranks."""
        return len(self.rows)

    def of(self, x: Tensor) -> Shards:
        """Return how the rows of x lie, of which every rank has its own number."""
        if self.alone or _are_even():
            return self if self.alone else replace(self, rows=(x.shape[0],) * self.world, batch=self)
        group = process_group(self.group)
        own = torch.tensor([x.shape[0]], device=header_device(x, group))
        return replace(self, rows=tuple(exchange(own, group).flatten().tolist()), batch=self)

    def own(self, x: Tensor, like: Tensor) -> Tensor:
        """Return this rank's rows among those of all ranks, as many as there are in `like`."""
        before = sum(self.sizes(like)[: self.rank])
        return x if self.alone else x[before : before + like.shape[0]]

    def sizes(self, x: Tensor) -> list[int]:
        """Return how many rows of x every rank has, of which there are as many to a row of the batch on all ranks."""
        own = self.rows[self.rank]
        if self.alone or own == x.shape[0]:
            return [x.shape[0]] if self.alone else list(self.rows)
        return [x.shape[0] // own * n for n in self.rows]

    def total(self, n: int) -> int:
        """Return the number of all ranks' rows, of which this one has n, as many to a row of the batch on all ranks."""
        return n if self.alone else n // self.rows[self.rank] * sum(self.rows)

    def positions(self, n: int, device: torch.device) -> Tensor:
        """Return the places of n rows of this rank among the rows of all ranks."""
        before = 0 if self.alone else n // self.rows[self.rank] * sum(self.rows[: self.rank])
        return torch.arange(before, before + n, device=device)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks."""
        if self.alone:
            return x
        total: Tensor = call("group", "sum", x, self.group)
        return total

    def gather(self, x: Tensor) -> Tensor:
        """Return the rows of all ranks: for vectors and a few rows, since what travels is as long as the result."""
        if self.alone:
            return x
        sizes = self.sizes(x)
        before, after = (
            x.new_zeros(sum(sizes[: self.rank]), *x.shape[1:]),
            x.new_zeros(sum(sizes[self.rank + 1 :]), *x.shape[1:]),
        )
        return self.sum(torch.cat([before, x, after]))

    def column_means(self, x: Tensor) -> Tensor:
        """Return the mean over the rows of all ranks."""
        return x.mean(0) if self.alone else self.sum(x.sum(0)) / self.total(x.shape[0])

    def logsumexp(self, x: Tensor) -> Tensor:
        """Return the log-sum-exp of a vector over all ranks."""
        if self.alone:
            total: Tensor = x.logsumexp(0)
            return total
        return self.each(x.logsumexp(0)).logsumexp(0)

    def each(self, x: Tensor) -> Tensor:
        """Return (W,), the numbers x of all ranks."""
        return self.sum(torch.nn.functional.pad(x[None], (self.rank, self.world - 1 - self.rank)))

    def rows_at(self, y: Tensor, index: Tensor, views: int = 1) -> Tensor:
        """Return (n, D), the rows that `select_over` has numbered; zeros for a number below 0."""
        samples = y.shape[0] // views
        step = torch.arange(views, device=y.device)[:, None] * self.total(samples)
        return self.class_sums(y, (self.positions(samples, y.device) + step).flatten(), index)

    def class_sums(self, values: Tensor, value_ids: Tensor, ids: Tensor) -> Tensor:
        """Return (n, D), for each of the ids (n,) the sum of all ranks' values (m, D) that have it as value id."""
        sizes = self.sizes(value_ids), (self.batch or self).sizes(ids)
        sums: Tensor = call("group", "class_sums", values, value_ids, ids, self.group, *sizes, self.workspace)
        return sums

    def mean(self, losses: Tensor) -> Tensor:
        """Return this rank's part of the mean over the losses of all ranks, so that the mean of the parts is it."""
        if self.alone:
            return losses.mean()
        return losses.sum() * (self.world / self.total(losses.numel()))


ALONE = Shards()


def over_ranks(function: Callable[P, T]) -> Callable[P, T]:
    """Return a function whose ``group`` is made a `Shards` first, or None for one process; the ranks agree on the rest.

    Its first argument is the batch. Every rank raises the same error unless all call the same function with tensors of
    the same kinds and equal options: before anything large moves, and before the arguments are checked.
    """
    parameters = inspect.signature(function).parameters
    batch = next(iter(parameters))

    @functools.wraps(function)
    def wrapper(*args: Any, group: Any = None, **kwargs: Any) -> Any:
        if group is None:
            return function(*args, **kwargs)
        if not isinstance(group, Shards):
            group, rows = _resolved(group), args[0] if args else kwargs.get(batch)
            given = {name: p.default for name, p in parameters.items() if name != "group"}
            given |= dict(zip(parameters, args, strict=False)) | kwargs
            if not _are_even():
                group = _agreed(function.__name__, given, rows, group)
            elif group.size() == 1 or _are_promised():
                group = _even(rows, group)
            else:
                sizes = [value.shape[0] if isinstance(value, Tensor) and value.dim() else 0 for value in given.values()]
                given[batch] = call("group", "same_rows", rows, sizes, group.group_name)
                args, kwargs, group = (), given, _even(rows, group)
        return function(*args, **kwargs, group=group)

    return wrapper


def shards_for(group: object, name: str, rows: Tensor) -> Shards:
    """Return how such rows lie on the ranks, on all of which this is called with the same name."""
    if group is None:
        return ALONE
    resolved = _resolved(group)
    return _even(rows, resolved) if _are_even() else _agreed(name, {"rows": rows}, rows, resolved)


def shards_of(group: object) -> Shards:
    """Return what `over_ranks` has passed on in place of a group."""
    return group if isinstance(group, Shards) else ALONE


def shards_of_columns(group: object, y: Tensor | None) -> Shards:
    """Return how the rows of y lie, of which every rank has its own number, or those of x with itself."""
    shards = shards_of(group)
    return shards if y is None else shards.of(y)


def one_process_only(name: str, group: object, alternative: str = INSTEAD) -> None:
    """Raise if there is a group of more than one process."""
    if not shards_of(group).alone:
        raise NotImplementedError(f"{name} does not take a group of several processes; {alternative}")


def _resolved(group: object) -> Any:
    """Return the process group."""
    if isinstance(group, str) and group != "world":
        raise ValueError(f"group {group!r} is unknown; the only name is 'world'")
    # a group that is compiled has another type
    if not isinstance(group, (ProcessGroup, DeviceMesh, str)) and not torch.compiler.is_compiling():
        raise TypeError(f"group must be a ProcessGroup, a DeviceMesh, 'world' or None, not {type(group).__name__}")
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("group is given but torch.distributed is not initialised; call init_process_group() first")
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group is a mesh of {group.ndim} dimensions; pass that of the data, as mesh['dp']")
        return group.get_group()
    return dist.group.WORLD if isinstance(group, str) else group


def _even(rows: Any, group: Any) -> Shards:
    """Return shards that are as large as this one."""
    if group.size() == 1:
        return ALONE
    return Shards(group.group_name, group.rank(), (rows.shape[0],) * group.size(), workspace_limit())


def _agreed(name: str, given: dict[str, Any], rows: Any, group: Any) -> Shards:
    """Return the shards; raise the same error on all ranks if their calls do not fit each other.

    One small vector travels: the rows, the workspace limit, and a digest of everything else.
    """
    if group.size() == 1:
        return ALONE
    n = rows.shape[0] if isinstance(rows, Tensor) and rows.dim() else 0
    call_of_rank = _described(name, given, n)
    digest = hashlib.blake2b(repr(call_of_rank).encode(), digest_size=7).digest()
    header = torch.tensor([n, workspace_limit(), int.from_bytes(digest, "big")], device=header_device(rows, group))
    headers = exchange(header, group).tolist()
    sizes, limits, digests = zip(*headers, strict=True)
    if 0 in sizes:
        empty = ", ".join(str(rank) for rank, size in enumerate(sizes) if size == 0)
        raise ValueError(f"{name}: the batch of rank {empty} is empty; every rank of a group needs at least one row")
    if len(set(digests)) > 1:
        calls: list[Any] = [None] * group.size()
        dist.all_gather_object(calls, call_of_rank, group=group)
        _raise_difference(calls)
    return Shards(group.group_name, group.rank(), sizes, min(limits))


def _described(name: str, given: dict[str, Any], n: int) -> dict[str, str]:
    """Return what has to be equal on all ranks."""
    found = {"function": name}
    for argument, value in given.items():
        if isinstance(value, Tensor):
            found[argument] = _described_tensor(argument, value, n)
        elif isinstance(value, (tuple, list)) and any(isinstance(part, Tensor) for part in value):
            parts = [_described_tensor(argument, v, n) if isinstance(v, Tensor) else repr(v) for v in value]
            found[argument] = f"({', '.join(parts)})"
        elif isinstance(value, Term):
            scale, offset, constants = value.operands()
            grads = [isinstance(v, Tensor) and v.requires_grad and torch.is_grad_enabled() for v in (scale, offset)]
            found[argument] = f"{value.name} {constants} requires_grad={grads}"
        elif callable(value):
            found[argument] = type(value).__name__
        else:
            found[argument] = repr(value)
    features = next((v for v in given.values() if isinstance(v, Tensor)), None)
    if features is not None and features.is_floating_point() and "backend" in given:
        found["backend"] = choose(features, given["backend"]).name
    return found


def _described_tensor(argument: str, value: Tensor, n: int) -> str:
    """Return what has to be equal of a tensor on all ranks."""
    if type(value).__name__ == "DTensor":
        raise TypeError(f"{argument} is a DTensor; pass its .to_local() for features, .full_tensor() for a scale")
    shape = [_rows(argument, value.shape[0], n), *value.shape[1:]] if value.dim() else []
    grad = value.requires_grad and torch.is_grad_enabled()
    return f"{value.dtype} ({', '.join(map(str, shape))}) requires_grad={grad}"


def _rows(argument: str, size: int, n: int) -> str:
    """Return what has to be equal of the number of rows of an argument, beside a batch of n rows."""
    if argument in UNPAIRED:
        return "M"
    whole = n and size % n == 0 and argument not in COMMON
    return f"{size // n} N" if whole else str(size)


def _raise_difference(calls: list[dict[str, str]]) -> None:
    """Raise an error that names the first thing that is not equal on all ranks, and its values."""
    names = list(dict.fromkeys(name for of_rank in calls for name in of_rank))
    name = next(name for name in names if len({of_rank.get(name) for of_rank in calls}) > 1)
    values = ", ".join(f"rank {rank}: {of_rank.get(name, 'missing')}" for rank, of_rank in enumerate(calls))
    raise RuntimeError(f"{calls[0]['function']}: the ranks of the group differ in {name} ({values})")
