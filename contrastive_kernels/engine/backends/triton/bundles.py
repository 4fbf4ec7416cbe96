"""The named tuples that the sweep's kernels and their helpers take, and the constants that they share.

A kernel takes a tuple itself only where its pointers and numbers keep their order: the registers of a binary depend on
it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton

# A tensor or a Python number at the launch; a pointer, a number or a value in registers on the device.
Pointer = Any
Number = Any
Value = Any

PACKED_ROWS = 9
CENTER_SIZE = 3


# Constants are compile-time functions, or local: Triton compares a kernel's global constants at every launch, about a
# microsecond each.


@triton.constexpr_function
def log2e() -> float:
    """Return the factor of natural logarithms that makes them binary ones."""
    return 1.4426950408889634


@triton.constexpr_function
def ln2() -> float:
    """Return the factor of binary logarithms that makes them natural ones."""
    return 0.6931471805599453


@triton.constexpr_function
def packed_row(name: str) -> int:
    """Return the row of a vector among those of `_pack_bwd_kernel`.

    The log-sum-exp and gradient of a second exponent are two rows further on, its factor one. Only the sweep's columns
    have a bias, in the place of the second log-sum-exp, which only rows have.
    """
    return {"lse": 0, "grad": 1, "grad_sum": 4, "offset": 5, "cutoff": 6, "factor": 7, "bias": 2}[name]


class Flags(NamedTuple):
    """What a kernel of the sweep is compiled for; one compile-time argument."""

    Q: int  # the number of exponents, each with a log-sum-exp per row
    COLUMN_LSE: bool
    TERM: str  # empty: none
    BIASED: bool  # logits have a bias per column
    SHIFTED: bool  # the term's argument has an offset per row
    IDS: bool
    KEEP_EQUAL_IDS: bool
    DIAGONALS: int
    CUT: bool  # similarities above a row's cutoff are dropped
    PRECISION: str  # of products, see `tl.dot`


class Numbers(NamedTuple):
    """The numbers of a sweep that the host knows; those that a flag switches off have some value."""

    exponent_0: Number
    exponent_1: Number
    constant_0: Number
    constant_1: Number


class Scores(NamedTuple):
    """Similarities that a forward saved for its backward, see `store_scores`."""

    matrix: Pointer | None  # (N, M): int16, or float32 without quanta; None: nothing is saved
    x_quantum: Pointer | None  # (N,)
    y_quantum: Pointer | None  # (M,)


class ScoreStore(NamedTuple):
    """Where a forward saves similarities, and the inverses of their quanta; no matrix: nowhere."""

    matrix: Pointer | None
    x_inverse: Pointer | None
    y_inverse: Pointer | None


# The named tuples below are made on the device.


class Operand(NamedTuple):
    """One side of the sweep: features (size, D) with inner stride 1."""

    features: Pointer
    tiles: Value  # the features as a descriptor of tiles, or None
    ids: Pointer | None
    size: Value
    stride: Value


class Block(NamedTuple):
    """A block of an operand's rows: the first, and the int64 offsets of all."""

    operand: Operand
    start: Value
    rows: Value


class Scalars(NamedTuple):
    """The numbers of a sweep."""

    scale: Value
    term_scale: Value
    exponent_0: Value
    exponent_1: Value
    constant_0: Value
    constant_1: Value


class Packed(NamedTuple):
    """The vectors of a backward sweep, see `_pack_bwd_kernel`, and the centers of its exponents."""

    rows: Pointer  # (PACKED_ROWS, row_stride)
    columns: Pointer  # (PACKED_ROWS, column_stride)
    row_stride: Value
    column_stride: Value
    centers: Value


class Pairs(NamedTuple):
    """What decides which pairs of a tile are kept."""

    own_ids: Value
    other_ids: Value
    ahead: Value  # how far the first other row is ahead of the first own one
    size: Value  # of the other operand


class RowVectors(NamedTuple):
    """What a gradient needs of the sweep's rows in a tile."""

    lse_0: Value
    grad_0: Value
    lse_1: Value
    grad_1: Value
    grad_sum: Value
    offset: Value
    cutoff: Value


class ColumnVectors(NamedTuple):
    """What a gradient needs of the sweep's columns in a tile."""

    lse: Value
    grad: Value
    bias: Value


class Side(NamedTuple):
    """What a gradient needs of a program's own block."""

    start: Value
    ids: Value
    rows: Value  # RowVectors, or None if the block never acts as the sweep's rows
    columns: Value  # ColumnVectors, or None
