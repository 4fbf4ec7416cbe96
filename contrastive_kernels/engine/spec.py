"""The description of one sweep, a pass over the N x M similarities, and the meaning that every backend gives it.

Notation: ``s_ij = <x_i, y_j>`` (float32 accumulation; float64 for float64 inputs), ``a`` the scale, ``b`` the bias.
A pair (i, j) is *kept* when every condition that was supplied holds:

- ids: ``x_ids[i] != y_ids[j]``; with ``keep_equal_ids`` instead ``x_ids[i] == y_ids[j]``;
- diagonals: 0 drops none, 1 drops ``i = j``; V > 1 (y None) means that x holds V views of N / V samples, view after
  view, and drops the pairs of the views of one sample, ``i = j`` modulo N / V; `PLACES` (-1) drops the pairs of equal
  places: an id is then ``class * 2^32 + place``, and the condition on ids is one on classes;
- cutoff: ``not (s_ij > cutoff[i])``, so that a NaN similarity is kept and survives;
- `Guide`: ``not (<guide_x[i], guide_y[j]> > guide_cutoff[i])``, a second similarity. Its operators, ``guided_forward``
  and ``guided_backward``, are apart from those of the sweep, so that a backend need not have them.

The forward sweep computes `Statistics`; a statistic that was not asked for is an empty tensor:

- ``row_lse[q, i] = log sum_j exp(exponents[q] * a * s_ij + b_j)``, ``-inf`` for a row with no kept pair;
- ``col_lse[j]    = log sum_i exp(a * s_ij)`` (``column_lse``; not together with bias or several exponents);
- ``row_sum[i]    = sum_j phi(term_scale * s_ij + term_offset[i])`` (``term``; a term of distances has
  ``-sqrt(max(2 - 2 s_ij, 1e-12))`` in place of ``s_ij``);
- ``row_max[i]    = max_j a * s_ij + b_j`` and, with ``column_lse``, ``col_max[j] = max_i a * s_ij`` (``maximum``; no
  gradient).

With ``save_scores`` a backend may also return the similarities for its own backward, which pays where they are few.
The backward sweep recomputes every tile, or reads it from the saved ``scores``, forms ``G_ij = dL/ds_ij`` from the
statistics and returns ``dx = G y``, ``dy = G^T x`` and the gradients of the scalars and vectors. The G of a term alone
needs no statistics: the same sweep can then return the weighted total of the row sums too, and no forward sweep is
needed. So can the rows of a log-sum-exp whose loss is known: `SoftmaxTotal` comes from one visit of each strip of rows,
three products, of which the last two wait for the sums of the rows. `SoftmaxMean` gives every row the mean of further
rows, one for each y, under the softmax that belongs to its log-sum-exp.

``y = None`` means x against itself: S and its mask are then symmetric unless there is a bias, a cutoff or a
term offset, and a backend may visit the upper triangle only.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

__all__ = [
    "PLACES",
    "PLACE_BITS",
    "Description",
    "Gradients",
    "Guide",
    "Inputs",
    "SoftmaxMean",
    "SoftmaxTotal",
    "Statistics",
    "Upstream",
    "Wanted",
    "compute_dtype",
    "with_places",
]

NORM_EPSILON = 1e-12
# As `Description.diagonals`: ids hold a class and a place. No kernel needs a further vector for a row's own column,
# and the columns of a process group keep their places wherever they are swept.
PLACES = -1
PLACE_BITS = 32


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of scores, losses and statistics: float64 for float64 features, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def with_places(classes: Tensor, places: Tensor) -> Tensor:
    """Return ids of classes in [0, 2^31) and places in [0, 2^32)."""
    return (classes << PLACE_BITS) | places


class Inputs(NamedTuple):
    """The tensors of a sweep; all but x, y and the ids have the compute dtype."""

    x: Tensor  # (N, D)
    y: Tensor | None  # (M, D); None for x against itself
    scale: Tensor  # 0-dim
    bias: Tensor | None  # (M,)
    x_ids: Tensor | None  # (N,) int64
    y_ids: Tensor | None  # (M,) int64; None for x against itself
    cutoff: Tensor | None  # (N,)
    term_scale: Tensor | None  # 0-dim; None for 1
    term_offset: Tensor | None  # (N,); None for 0


class Description(NamedTuple):
    """What a sweep computes from its tensors."""

    exponents: tuple[float, ...]  # empty: no log-sum-exp
    column_lse: bool
    term: str  # the name of a `Term`; empty: none
    constants: tuple[float, ...]  # of the term
    keep_equal_ids: bool
    diagonals: int


class Guide(NamedTuple):
    """A second similarity of the rows, without gradient, that drops pairs above its own cutoff."""

    guide_x: Tensor  # (N, E)
    guide_y: Tensor | None  # (M, E); None for x against itself
    guide_cutoff: Tensor  # (N,), in the compute dtype of the guide

    @classmethod
    def split(cls, flat: Sequence[Any]) -> tuple[Sequence[Any], Guide]:
        """Return the arguments of the sweep and the guide, which comes last."""
        return flat[: -len(cls._fields)], cls(*flat[-len(cls._fields) :])


class Statistics(NamedTuple):
    """What a forward sweep computes, in the backend's statistic dtype; empty where not asked for."""

    row_lse: Tensor  # (Q, N)
    col_lse: Tensor  # (M,)
    row_sum: Tensor  # (N,)
    row_max: Tensor  # (N,)
    col_max: Tensor  # (M,)
    scores: Tensor  # (N, M), for the backward of the backend that saved them


class Upstream(NamedTuple):
    """What flows into a backward sweep: gradients of the statistics, and the statistics they belong to."""

    grad_row_lse: Tensor  # (Q, N)
    grad_col_lse: Tensor  # (M,)
    grad_row_sum: Tensor  # (N,)
    row_lse: Tensor  # (Q, N)
    col_lse: Tensor  # (M,)


class Gradients(NamedTuple):
    """What a backward sweep computes; empty where not wanted.

    x and y have the dtype of the features, or float32 for half precision if `float32_gradients` asks for what is added
    up elsewhere; the total has the statistic dtype, the others the compute dtype.
    """

    x: Tensor
    y: Tensor
    scale: Tensor
    bias: Tensor
    term_scale: Tensor
    term_offset: Tensor
    total: Tensor  # sum_i grad_row_sum[i] * row_sum[i], of a term without log-sum-exps


class Wanted(NamedTuple):
    """Which of `Gradients` are wanted."""

    x: bool
    y: bool
    scale: bool
    bias: bool
    term_scale: bool
    term_offset: bool
    total: bool = False


class SoftmaxTotal(NamedTuple):
    """``sum_i weight[i] * log(1 + exp(row_lse[0, i] - own[i]))`` and its gradients; empty where not wanted.

    Of one log-sum-exp, without bias, term or `column_lse`. x and y have the dtype of the features, the total the
    statistic dtype, the others the compute dtype.
    """

    x: Tensor
    y: Tensor
    scale: Tensor
    own: Tensor  # always
    total: Tensor


class SoftmaxMean(NamedTuple):
    """The mean of values (M, D') under the softmax of every row, and the log-sum-exp of its logits.

    ``mean[i] = sum_j exp(scale * s_ij + b_j - row_lse[i]) values[j]``, 0 for a row with no kept pair. Of one
    log-sum-exp, without term or `column_lse`.
    """

    mean: Tensor  # (N, D'), in the compute dtype
    row_lse: Tensor  # (N,), in the statistic dtype


class SoftmaxMeanUpstream(NamedTuple):
    """What flows into the backward of a `SoftmaxMean`, in the compute dtype, and the log-sum-exps."""

    grad_mean: Tensor  # (N, D')
    shift: Tensor  # (N,), the gradient of row_lse minus <grad_mean, mean>
    row_lse: Tensor  # (N,)


class SoftmaxMeanGradients(NamedTuple):
    """The gradients of a `SoftmaxMean`; empty where not wanted.

    With ``p_ij = exp(scale * s_ij + b_j - row_lse[i])`` and ``w_ij = p_ij (<grad_mean[i], values[j]> + shift[i])`` they
    are ``scale w y``, ``scale w^T x``, ``sum w * s``, the sums of the columns of w, and ``p^T grad_mean``. Those of x,
    y and values have the dtype of what they belong to, the others the compute dtype.
    """

    x: Tensor
    y: Tensor
    scale: Tensor
    bias: Tensor
    values: Tensor


class SoftmaxMeanWanted(NamedTuple):
    """Which of `SoftmaxMeanGradients` are wanted."""

    x: bool
    y: bool
    scale: bool
    bias: bool
    values: bool


# The fields of Gradients that are derivatives, and where each of them stands among the inputs.
DERIVATIVES = tuple(name for name in Gradients._fields if name in Inputs._fields)
DIFFERENTIABLE = tuple(Inputs._fields.index(name) for name in DERIVATIVES)


# Operators take flat arguments, in the order of the fields above; their kernels group them again.


class ForwardArguments(NamedTuple):
    """The arguments of a forward operator."""

    inputs: Inputs
    what: Description
    maximum: bool
    save_scores: bool

    @classmethod
    def of(cls, flat: Sequence[Any]) -> ForwardArguments:
        """Group flat arguments; save_scores may be missing, as in an exported program."""
        inputs, what, (maximum, *save_scores) = _grouped(flat)
        return cls(inputs, what, maximum, any(save_scores))


class BackwardArguments(NamedTuple):
    """The arguments of a backward operator."""

    upstream: Upstream
    inputs: Inputs
    what: Description
    wanted: Wanted
    scores: Tensor | None
    float32_gradients: bool

    @classmethod
    def of(cls, flat: Sequence[Any]) -> BackwardArguments:
        """Group flat arguments; those after wanted may be missing, as in an exported program."""
        split = len(Upstream._fields)
        inputs, what, (wanted, *rest) = _grouped(flat[split:])
        scores = rest[0] if rest else None
        return cls(Upstream(*flat[:split]), inputs, what, Wanted(*wanted), scores, any(rest[1:]))


class SoftmaxArguments(NamedTuple):
    """The arguments of a softmax_total operator."""

    weight: Tensor  # (N,) in the compute dtype, as own
    own: Tensor
    inputs: Inputs
    what: Description
    wanted: tuple[bool, bool, bool]  # the gradients of x, y and scale

    @classmethod
    def of(cls, flat: Sequence[Any]) -> SoftmaxArguments:
        """Group flat arguments."""
        inputs, what, ((of_x, of_y, of_scale),) = _grouped(flat[2:])
        return cls(flat[0], flat[1], inputs, what, (of_x, of_y, of_scale))


class SoftmaxMeanArguments(NamedTuple):
    """The arguments of a softmax_mean operator."""

    values: Tensor  # (M, D'), of any floating dtype
    inputs: Inputs
    what: Description

    @classmethod
    def of(cls, flat: Sequence[Any]) -> SoftmaxMeanArguments:
        """Group flat arguments."""
        inputs, what, _ = _grouped(flat[1:])
        return cls(flat[0], inputs, what)


class SoftmaxMeanBackwardArguments(NamedTuple):
    """The arguments of a softmax_mean_backward operator."""

    upstream: SoftmaxMeanUpstream
    values: Tensor
    inputs: Inputs
    what: Description
    wanted: SoftmaxMeanWanted

    @classmethod
    def of(cls, flat: Sequence[Any]) -> SoftmaxMeanBackwardArguments:
        """Group flat arguments."""
        split = len(SoftmaxMeanUpstream._fields)
        inputs, what, (wanted,) = _grouped(flat[split + 1 :])
        return cls(SoftmaxMeanUpstream(*flat[:split]), flat[split], inputs, what, SoftmaxMeanWanted(*wanted))


class GroupArguments(NamedTuple):
    """The last arguments of the operators of a sweep over a process group, after those of the sweep."""

    backend: str
    group: str
    sizes: list[int]  # rows of y, or of x with itself, of every rank
    workspace: int

    @classmethod
    def split(cls, flat: Sequence[Any]) -> tuple[Sequence[Any], GroupArguments]:
        """Return the arguments of the sweep and those of the group."""
        return flat[: -len(cls._fields)], cls(*flat[-len(cls._fields) :])


def _grouped(flat: Sequence[Any]) -> tuple[Inputs, Description, Sequence[Any]]:
    first = len(Inputs._fields)
    last = first + len(Description._fields)
    return Inputs(*flat[:first]), Description(*flat[first:last]), flat[last:]


# The schemas, without the operators' names, from the fields.

_TYPES = {Tensor: "Tensor", bool: "bool", int: "int", str: "str", float: "float"}


def _schema_type(hint: Any) -> str:
    """Return the name that a schema has for a Python type."""
    if get_origin(hint) in (Union, types.UnionType):
        return f"{_schema_type(get_args(hint)[0])}?"
    if get_origin(hint) is tuple:
        return f"{_schema_type(get_args(hint)[0])}[]"
    return _TYPES[hint]


def _parameters(fields: type) -> str:
    return ", ".join(f"{_schema_type(hint)} {name}" for name, hint in get_type_hints(fields).items())


def _results(fields: type) -> str:
    return "(" + ", ".join(_schema_type(hint) for hint in get_type_hints(fields).values()) + ")"


_SWEEP = f"{_parameters(Inputs)}, {_parameters(Description)}"
SCHEMAS = {
    "forward": f"({_SWEEP}, bool maximum, bool save_scores=False) -> {_results(Statistics)}",
    "backward": (
        f"({_parameters(Upstream)}, {_SWEEP}, bool[] wanted, Tensor? scores=None, bool float32_gradients=False) "
        f"-> {_results(Gradients)}"
    ),
    "softmax_total": f"(Tensor weight, Tensor own, {_SWEEP}, bool[] wanted) -> {_results(SoftmaxTotal)}",
    "guided_forward": f"({_SWEEP}, bool maximum, {_parameters(Guide)}) -> {_results(Statistics)}",
    "guided_backward": (
        f"({_parameters(Upstream)}, {_SWEEP}, bool[] wanted, {_parameters(Guide)}) -> {_results(Gradients)}"
    ),
    "softmax_mean": f"(Tensor values, {_SWEEP}) -> {_results(SoftmaxMean)}",
    "softmax_mean_backward": (
        f"({_parameters(SoftmaxMeanUpstream)}, Tensor values, {_SWEEP}, bool[] wanted) "
        f"-> {_results(SoftmaxMeanGradients)}"
    ),
    # x / max(|x|, NORM_EPSILON) over the last dimension, and |x| as (..., 1)
    "unit_rows": "(Tensor x) -> (Tensor, Tensor)",
    # 0 for a row below NORM_EPSILON
    "unit_rows_backward": "(Tensor grad, Tensor x, Tensor norm) -> Tensor",
    # <x_i, y_i> over the last dimension, in the compute dtype
    "row_dot": "(Tensor x, Tensor y) -> Tensor",
    # empty where not wanted
    "row_dot_backward": "(Tensor grad, Tensor x, Tensor y, bool[] wanted) -> (Tensor, Tensor)",
    # (N, V, D) -> (N, 2) int64: the least similar pair j < k of each sample, the first on a tie
    "views": "(Tensor views) -> Tensor",
    # values (N, k) in the compute dtype and columns (N, k) int64, see `primitives.select.row_select`
    "select": (
        "(Tensor x, Tensor? y, int k, bool largest, Tensor? x_ids, Tensor? y_ids, bool exclude_diagonal) "
        "-> (Tensor, Tensor)"
    ),
}
_OF_GROUP = "str backend, str group, SymInt[] sizes, int workspace"
GROUP_SCHEMAS = {
    "sweep": f"({_SWEEP}, bool maximum, {_OF_GROUP}) -> {_results(Statistics)}",
    # With a total, the gradients wait for the factor of this rank's loss: x and y have the compute dtype, and y is what
    # this rank has for the rows of all ranks, (W, longest, D), also of x with itself; `sum_at_home` takes it.
    "sweep_backward": f"({_parameters(Upstream)}, {_SWEEP}, bool[] wanted, {_OF_GROUP}) -> {_results(Gradients)}",
    # (n, D), the sum over the ranks of their parts for the rows of this one, each times its rank's factor
    "sum_at_home": "(Tensor parts, Tensor factor, str group, SymInt[] sizes, int workspace) -> Tensor",
    # values and columns as of `select`; columns are numbered view by view, in each rank by rank
    "select": (
        "(Tensor x, Tensor? y, int k, bool largest, Tensor? x_ids, Tensor? y_ids, bool exclude_diagonal, int views, "
        f"{_OF_GROUP}) -> (Tensor, Tensor)"
    ),
    # a copy of x; an error unless these numbers are the same on all ranks
    "same_rows": "(Tensor x, SymInt[] rows, str group) -> Tensor",
    # the sum over the ranks
    "sum": "(Tensor x, str group) -> Tensor",
    # (n, D), for every one of the ids (n,) the sum of the values (m, D) of all ranks that have it as value id; both
    # sizes, those of the values and those of the ids, are there for the derivative, which exchanges them
    "class_sums": (
        "(Tensor values, Tensor value_ids, Tensor ids, str group, SymInt[] value_sizes, SymInt[] sizes, int workspace) "
        "-> Tensor"
    ),
}
