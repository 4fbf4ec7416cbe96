"""The frozen description of one pass over the N x M similarities, and the meaning every backend gives it.

Notation: ``s_ij = <x_i, y_j>`` (float32 accumulation; float64 for float64 inputs), ``a`` the scale, ``b`` the bias.
A pair (i, j) is *kept* when every condition that was supplied holds:

- ids: ``x_ids[i] != y_ids[j]``; with ``same`` instead ``x_ids[i] == y_ids[j]``;
- diagonal: ``i != j`` with ``exclude_diagonal``; where that is V > 1, x holds V views of N / V samples, view after
  view, and the views of one sample are dropped, ``i = j`` modulo N / V (y None);
- cutoff: ``not (s_ij > cutoff[i])``, so that a NaN similarity is kept and survives.

Statistics of the forward sweep (an empty tensor where not asked for):

- ``row_lse[q, i] = log sum_j exp(exponents[q] * a * s_ij + b_j)``, ``-inf`` for a row with no kept pair;
- ``col_lse[j]    = log sum_i exp(a * s_ij)`` (``columns``; not together with bias or several exponents);
- ``row_sum[i]    = sum_j phi(term_scale * s_ij + term_offset[i])`` (``term``; a term of distances has
  ``-sqrt(max(2 - 2 s_ij, 1e-12))`` in place of ``s_ij``);
- ``row_max[i]    = max_j a * s_ij + b_j`` and, with ``columns``, ``col_max[j] = max_i a * s_ij`` (``maximum``; no
  gradient).

With ``keep`` a backend may also return the similarities, for its own backward: worth it where they are few. The
backward sweep recomputes every tile, or takes it from the ``scores`` that were kept, forms ``G_ij = dL/ds_ij`` from the
statistics and returns ``dx = G y``, ``dy = G^T x`` and the gradients of the scalars and vectors. G of a term alone
needs no statistics: then the same sweep can return the weighted total of the row sums too, and no forward sweep is
needed. ``y = None`` means x against itself: S and its mask are then symmetric unless there is a bias, a cutoff or a
term offset, and a backend may visit the upper triangle only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Band",
    "Count",
    "DistanceHinge",
    "Gaussian",
    "Hinge",
    "Identity",
    "Pairs",
    "Softplus",
    "Square",
    "Statistics",
    "Student",
    "Term",
    "compute_dtype",
]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of scores, losses and statistics: float64 for float64 features, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


NORM_EPSILON = 1e-12


class Pairs(NamedTuple):
    """Which pairs are kept; see the top of this file."""

    x_ids: Tensor | None = None  # (N,) int64
    y_ids: Tensor | None = None  # (M,) int64; None for x against itself
    cutoff: Tensor | None = None  # (N,)
    same: bool = False  # keep the pairs with equal ids, not the others
    exclude_diagonal: int = 0  # 1: drop i == j; V: the pairs of a sample's V views


ALL_PAIRS = Pairs()


class Statistics(NamedTuple):
    """What a forward sweep leaves behind; fields that were not asked for are empty."""

    row_lse: Tensor  # (Q, N)
    col_lse: Tensor  # (M,)
    row_sum: Tensor  # (N,)
    row_max: Tensor  # (N,)
    col_max: Tensor  # (M,)
    scores: Tensor  # (N, M), for the backward of the backend that keeps them


class Operands(NamedTuple):
    """A term as the kernels take it: ``phi(scale * s + offset)`` with constants; None stands for 1 and 0."""

    scale: float | Tensor | None = None
    offset: float | Tensor | None = None
    constants: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Term:
    """An elementwise function of the similarity, summed over the kept pairs of each row."""

    name: ClassVar[str]

    def operands(self) -> Operands:
        """Scale, offset and constants of ``phi``."""
        return Operands()


@dataclass(frozen=True, eq=False)
class Identity(Term):
    """The similarity ``s`` itself."""

    name = "identity"


@dataclass(frozen=True, eq=False)
class Count(Term):
    """1: the number of kept pairs. No gradient."""

    name = "count"


@dataclass(frozen=True, eq=False)
class Square(Term):
    """``s**2``."""

    name = "square"


@dataclass(frozen=True, eq=False)
class Band(Term):
    """``max(0, (d - lower) * (upper - d))`` of the distance ``d = (1 - s) / 2``, which is in [0, 1] for unit rows."""

    lower: float
    upper: float
    name = "band"

    def __post_init__(self) -> None:
        if not 0.0 <= self.lower < self.upper <= 1.0:
            raise ValueError(
                f"lower {self.lower} and upper {self.upper} must satisfy 0 <= lower < upper <= 1: "
                "they bound the distance (1 - s) / 2"
            )

    def operands(self) -> Operands:
        return Operands(constants=(float(self.lower), float(self.upper)))


@dataclass(frozen=True, eq=False)
class Softplus(Term):
    """``log(1 + exp(scale * s + bias))``; float or 0-dim with gradient, the bias also (N,), one per row."""

    scale: float | Tensor = 1.0
    bias: float | Tensor = 0.0
    name = "softplus"

    def operands(self) -> Operands:
        return Operands(self.scale, self.bias)


@dataclass(frozen=True, eq=False)
class Hinge(Term):
    """``max(0, s + margin)``; margin is a float or (N,), one per row, with gradient."""

    margin: float | Tensor = 0.0
    name = "hinge"

    def operands(self) -> Operands:
        return Operands(None, self.margin)


@dataclass(frozen=True, eq=False)
class DistanceHinge(Term):
    """``max(0, margin - d)`` of the distance ``d = sqrt(2 - 2 * s)`` between unit rows; margin as that of `Hinge`.

    A distance below 1e-6 counts as 1e-6, without gradient.
    """

    margin: float | Tensor = 0.0
    name = "distance_hinge"

    def operands(self) -> Operands:
        return Operands(None, self.margin)


@dataclass(frozen=True, eq=False)
class Student(Term):
    """``(1 + max(0, scale * s + offset))**-exponent``: Student's kernel of a squared distance, which is linear in s.

    scale is a float or 0-dim, offset a float or (N,), one per row, both with gradient. A squared distance that rounding
    made negative counts as 0, with the slope of 0.
    """

    exponent: float
    scale: float | Tensor = 1.0
    offset: float | Tensor = 0.0
    name = "student"

    def operands(self) -> Operands:
        return Operands(self.scale, self.offset, (float(self.exponent),))


@dataclass(frozen=True, eq=False)
class Gaussian(Term):
    """``exp(-t * (2 - 2 * s))``: the Gaussian of the squared distance between unit rows."""

    t: float = 2.0
    name = "gaussian"

    def operands(self) -> Operands:
        return Operands(constants=(float(self.t),))


# The schema of every backend's pair of operators, `<backend>_forward` and `<backend>_backward`.
# `scale` is 0-dim, `bias` (M,), ids int64, `cutoff` and `term_offset` (N,), `term_scale` 0-dim; all of them in the
# compute dtype: float64 for float64 features, float32 otherwise. `term` is a Term's name, "" for none. `exponents` is
# empty when no log-sum-exp is wanted. Statistics come in the backend's statistic dtype (at least the compute dtype).
INPUTS = (
    "Tensor x, Tensor? y, Tensor scale, Tensor? bias, Tensor? x_ids, Tensor? y_ids, Tensor? cutoff, "
    "Tensor? term_scale, Tensor? term_offset"
)
DESCRIPTION = "float[] exponents, bool columns, str term, float[] constants, bool same, int exclude_diagonal"
FORWARD_SCHEMA = (
    f"({INPUTS}, {DESCRIPTION}, bool maximum, bool keep=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# `needs` says which of x, y, scale, bias, term_scale, term_offset want a gradient, and last whether the total
# `sum_i grad_row_sum[i] * row_sum[i]` is wanted, which takes a term without log-sum-exps; the others come back empty.
# dx and dy have the dtype of x, the total the statistic dtype, the others the compute dtype.
BACKWARD_SCHEMA = (
    f"(Tensor grad_row_lse, Tensor grad_col_lse, Tensor grad_row_sum, Tensor row_lse, Tensor col_lse, {INPUTS}, "
    f"{DESCRIPTION}, bool[] needs, Tensor? scores=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
UNIT_ROWS_SCHEMA = "(Tensor x) -> (Tensor, Tensor)"  # x / max(|x|, NORM_EPSILON) over the last dimension; |x|, (..., 1)
UNIT_ROWS_BACKWARD_SCHEMA = "(Tensor grad, Tensor x, Tensor norm) -> Tensor"  # 0 for a row below NORM_EPSILON
ROW_DOT_SCHEMA = "(Tensor x, Tensor y) -> Tensor"  # <x_i, y_i> over the last dimension, in the compute dtype
ROW_DOT_BACKWARD_SCHEMA = "(Tensor grad, Tensor x, Tensor y, bool[] needs) -> (Tensor, Tensor)"  # empty if not needed
VIEWS_SCHEMA = "(Tensor views) -> Tensor"  # (N, V, D) -> (N, 2) int64: the least similar pair j < k, first on a tie
