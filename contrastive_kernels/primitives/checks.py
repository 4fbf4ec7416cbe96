"""Argument checks and their messages. Shapes, dtypes and devices only: no check reads a tensor's values.

A check returns nothing, or the argument in the form that the primitives take, and raises otherwise.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from contrastive_kernels.engine.backends import choose
from contrastive_kernels.engine.spec import Guide, compute_dtype
from contrastive_kernels.engine.terms import Term
from contrastive_kernels.engine.warn import warn

FEATURE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LEAST_TEMPERATURE = 1e-8
# More views than this and than samples are taken for samples.
MANY_VIEWS = 16

# Tensors


def shape(x: Tensor) -> str:
    """Return the shape as messages print it."""
    return str(tuple(x.shape))


def tensor(name: str, x: object) -> None:
    """Raise unless x is a dense tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if x.is_nested:
        raise TypeError(f"{name} is a nested tensor; stack its rows, or pad them by torch.nested.to_padded_tensor")
    if x.layout != torch.strided:
        raise TypeError(f"{name} has layout {x.layout}; expected a dense tensor, which to_dense() returns")


def _floating(name: str, x: Tensor) -> None:
    tensor(name, x)
    if x.dtype not in FEATURE_DTYPES:
        raise TypeError(f"{name} has dtype {x.dtype}; expected float16, bfloat16, float32 or float64")


def _features(name: str, x: Tensor, dimensions: str) -> None:
    tensor(name, x)
    if x.dim() != dimensions.count(",") + 1:
        raise ValueError(f"{name} {shape(x)} must have shape ({dimensions})")
    _floating(name, x)


def features(name: str, x: Tensor) -> None:
    """Raise unless x is a floating (N, D) tensor."""
    _features(name, x, "N, D")


def lists(name: str, x: Tensor, minimum: int, dimensions: str = "N, M, D") -> None:
    """Raise unless x is a floating (N, M, D) tensor, at least `minimum` rows for each of N."""
    _features(name, x, dimensions)
    if x.shape[1] < minimum:
        what = "views" if dimensions == "N, V, D" else "rows"
        raise ValueError(f"{name} {shape(x)} must have at least {minimum} {what} in its second dimension")


def views(name: str, x: Tensor, minimum: int = 2) -> None:
    """Raise unless x is floating (N, V, D) with at least `minimum` views; warn where it looks like (V, N, D)."""
    lists(name, x, minimum, "N, V, D")
    n, v = x.shape[:2]
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value

        if not (has_static_value(n) and has_static_value(v)):  # to compare others would compile for some sizes alone
            return
    if v > max(n, MANY_VIEWS):
        warn(
            f"{name} {shape(x)} is {v} views of {n} samples, since views are (N, V, D); "
            f"if it is (V, N, D), pass {name}.transpose(0, 1)"
        )


def not_empty(name: str, x: Tensor) -> None:
    """Raise unless x has a row: a loss of no rows has no mean."""
    if x.shape[0] == 0:
        raise ValueError(f"{name} {shape(x)} is an empty batch; a loss needs at least one row")


def alike(name_x: str, x: Tensor, name_y: str, y: Tensor, *, rows: bool = True) -> None:
    """Raise unless two feature tensors agree in device, dtype, last dimension and, with `rows`, in the first."""
    if x.device != y.device:
        raise RuntimeError(f"{name_x} is on {x.device} and {name_y} on {y.device}; move them to one device")
    if x.dtype != y.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{name_x} is {x.dtype} and {name_y} is {y.dtype}; cast one of them")
    if rows and x.shape[0] != y.shape[0]:
        raise ValueError(f"{name_x} {shape(x)} and {name_y} {shape(y)} must have the same first dimension")
    if x.shape[-1] != y.shape[-1]:
        turned = not rows and y.dim() == 2 and y.shape[0] == x.shape[-1]
        hint = f"; {name_y} holds its rows as columns, pass {name_y}.T" if turned else ""
        raise ValueError(f"{name_x} {shape(x)} and {name_y} {shape(y)} must have the same last dimension{hint}")


def two_rows(name: str, x: Tensor, why: str, rows: int | None = None) -> None:
    """Raise unless x has at least two rows, or there are so many on all ranks."""
    if (x.shape[0] if rows is None else rows) < 2:
        raise ValueError(f"{name} {shape(x)} must have at least 2 rows: {why}")


def paired(name_x: str, x: Tensor, name_y: str, y: Tensor) -> None:
    """Raise unless x and y are two batches of paired rows, (N, D) both, N > 0."""
    features(name_x, x)
    features(name_y, y)
    alike(name_x, x, name_y, y)
    not_empty(name_x, x)


def paired_positions(name_x: str, x: Tensor, name_y: str, y: Tensor) -> None:
    """Raise unless x and y are two batches of paired rows, of one or of several positions: (N, ..., D) both, N > 0."""
    for name, value in ((name_x, x), (name_y, y)):
        _floating(name, value)
        if value.dim() < 2:
            raise ValueError(f"{name} {shape(value)} must have shape (N, D) or (N, ..., D)")
    alike(name_x, x, name_y, y)
    if x.shape != y.shape:
        raise ValueError(f"{name_x} {shape(x)} and {name_y} {shape(y)} must have the same shape")
    not_empty(name_x, x)
    if 0 in x.shape[1:-1]:
        raise ValueError(f"{name_x} {shape(x)} has no positions between its first and its last dimension")


def same_device(name: str, value: Tensor, x: Tensor) -> None:
    """Raise unless a vector is on the device of the features."""
    if value.device != x.device:
        raise RuntimeError(f"{name} is on {value.device} and the features are on {x.device}; move it there")


def ids(name: str, value: Tensor, rows: int | tuple[int, ...], x: Tensor) -> Tensor:
    """Return integer ids, one per row, as int64."""
    tensor(name, value)
    expected = rows if isinstance(rows, tuple) else (rows,)  # a size may be symbolic, which is no int
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {value.dtype}; ids must be integers")
    if tuple(value.shape) != expected:
        raise ValueError(f"{name} {shape(value)} must have shape {expected}, one id per row")
    same_device(name, value, x)
    return value.to(torch.int64)


def labels(name: str, value: Tensor, rows: int, x: Tensor) -> Tensor:
    """Return labels, one per row, which are compared by their value: as int64, or as float32 or float64."""
    tensor(name, value)
    if value.dtype.is_complex:
        raise TypeError(f"{name} has dtype {value.dtype}; labels must be integers, bools or floats")
    if not value.dtype.is_floating_point:
        value = value.to(torch.int64)
    elif value.dtype != torch.float64:
        value = value.detach().to(torch.float32)
    if tuple(value.shape) != (rows,):
        raise ValueError(f"{name} {shape(value)} must have shape ({rows},), one label per row")
    same_device(name, value, x)
    return value.detach()


def optional_ids(name: str, value: Tensor | None, rows: int | tuple[int, ...], x: Tensor) -> Tensor | None:
    """Return integer ids as int64, or None if there are none."""
    return None if value is None else ids(name, value, rows, x)


def vector(name: str, value: Tensor, x: Tensor, x_name: str) -> None:
    """Raise unless value is a floating vector with one entry per row of x."""
    tensor(name, value)
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {value.dtype}; expected a floating dtype")
    if tuple(value.shape) != (x.shape[0],):
        raise ValueError(f"{name} {shape(value)} must have shape ({x.shape[0]},), one entry per row of {x_name}")
    same_device(name, value, x)


def per_row(name: str, value: float | Tensor | None, x: Tensor) -> Tensor | None:
    """Return a float or a vector as a vector of the compute dtype, one entry per row of x."""
    dtype = compute_dtype(x)
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return torch.full((x.shape[0],), number(name, value), dtype=dtype, device=x.device)
    if value.dim() == 0:
        same_device(name, value, x)
        return value.to(dtype).expand(x.shape[0])
    vector(name, value, x, "x")
    return value.to(dtype)


def guide(
    value: tuple[Tensor, Tensor | None] | None, cutoff: float | Tensor | None, x: Tensor, y: Tensor | None
) -> Guide | None:
    """Return the second similarity of the pairs; raise unless it has a row for every row of x and of y."""
    if value is None:
        if cutoff is not None:
            raise ValueError("guide_cutoff is given but guide is not; it bounds the similarities of the guide's rows")
        return None
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError("guide must be a pair of tensors, the guide's rows for x and for y (None where y is None)")
    if cutoff is None:
        raise ValueError("guide is given but guide_cutoff is not; a pair above it is left out")
    of_x, of_y = value
    guide_rows("guide[0]", of_x, x, "x")
    if (of_y is None) != (y is None):
        raise ValueError("guide must be (rows for x, rows for y), the second None exactly where y is None")
    if of_y is not None and y is not None:
        guide_rows("guide[1]", of_y, y, "y")
        alike("guide[0]", of_x, "guide[1]", of_y, rows=False)
    limit = per_row("guide_cutoff", cutoff, of_x)
    assert limit is not None
    return Guide(of_x.detach(), None if of_y is None else of_y.detach(), limit.detach())


def guide_rows(name: str, value: Tensor, x: Tensor, x_name: str) -> None:
    """Raise unless a guide has a row for every row of x."""
    features(name, value)
    same_device(name, value, x)
    if value.shape[0] != x.shape[0]:
        raise ValueError(f"{name} {shape(value)} must have {x.shape[0]} rows, one for every row of {x_name} {shape(x)}")


# Numbers and choices


def choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise unless value is one of the strings allowed."""
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(map(repr, allowed))}")


def plain(value: Any) -> Any:
    """Return a real number of another library, as NumPy's, as Python's; anything else as it is."""
    if isinstance(value, (int, float)) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def number(name: str, value: object) -> float:
    """Return a real number as Python's; a bool is none."""
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        allowed = "a number" if isinstance(value, Tensor) else "a number or a tensor"
        raise TypeError(f"{name} must be {allowed}, not {type(value).__name__}")
    return found


def positive(name: str, value: object, *, zero: bool = False) -> float:
    """Return a number above 0, or with `zero` not below it, as Python's."""
    value = number(name, value)
    if not (value >= 0 if zero else value > 0):
        raise ValueError(f"{name} {value} must {'not be negative' if zero else 'be positive'}")
    return value


def no_effect(condition: str, **given: tuple[object, object]) -> None:
    """Raise if an argument that is without effect is not its default; each comes with its default.

    A default that is passed explicitly cannot be told from one that is not.
    """
    for name, (value, default) in given.items():
        if isinstance(value, Tensor) or value != default:
            shown = name if isinstance(value, Tensor) else f"{name} {value!r}"
            raise ValueError(f"{shown} has no effect with {condition}; leave it out")


def count(name: str, value: object) -> int:
    """Return an integer of at least 1, one of NumPy's too, as Python's."""
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, int):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    if found < 1:
        raise ValueError(f"{name} {value} must be at least 1")
    return found


def scalar(name: str, value: float | Tensor, x: Tensor) -> float | Tensor:
    """Return a number, or a tensor with one element as 0-dim on the device of x."""
    if not isinstance(value, Tensor):
        return float(number(name, value))
    if value.numel() != 1:
        raise ValueError(f"{name} {shape(value)} must be a float or a tensor with one element")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {value.dtype}; expected a floating dtype")
    return value.reshape(()).to(x.device)


def temperature(value: float | Tensor, x: Tensor, name: str = "temperature") -> float | Tensor:
    """Return a temperature; raise for a number too small to divide by."""
    value = scalar(name, value, x)
    if not isinstance(value, Tensor) and abs(value) < LEAST_TEMPERATURE:
        raise ValueError(f"{name} {value} is too close to zero: abs({name}) must be at least {LEAST_TEMPERATURE:g}")
    return value


def label_smoothing(value: float) -> float:
    """Return a number in [0, 1], as in `F.cross_entropy`, as Python's."""
    value = number("label_smoothing", value)
    if not 0 <= value <= 1:
        raise ValueError(f"label_smoothing {value} must be between 0 and 1")
    return value


def backend(x: Tensor, requested: str | None) -> None:
    """Raise unless the requested backend exists and takes x; None is always fine."""
    if requested is not None:
        choose(x, requested)


# Primitives


def term_operands(term: Term, x: Tensor) -> None:
    """Raise unless the tensors of a term fit the features."""
    scale, offset, _ = term.operands()
    if scale is not None:
        scalar("scale", scale, x)
    if isinstance(offset, Tensor) and offset.dim() > 0:
        vector(term.offset_name, offset, x, "x")
    elif offset is not None:
        scalar(term.offset_name, offset, x)


def primitive(
    x: Tensor,
    y: Tensor | None,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    cutoff: float | Tensor | None,
    same: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the ids as int64; raise unless features, ids and cutoff fit each other."""
    features("x", x)
    if y is not None:
        features("y", y)
        alike("x", x, "y", y, rows=False)
    if y is None and y_ids is not None:
        raise ValueError("y_ids is given but y is not; x_ids serves both sides of x against itself")
    if y is not None and (x_ids is None) != (y_ids is None):
        missing, given = ("x_ids", "y_ids") if x_ids is None else ("y_ids", "x_ids")
        raise ValueError(f"{given} is given but {missing} is not; a pair is left out when its two ids are equal")
    if same and x_ids is None:
        raise ValueError("same=True is given but x_ids is not; it keeps the pairs whose two ids are equal")
    if isinstance(cutoff, Tensor) and cutoff.dim() > 0:
        vector("cutoff", cutoff, x, "x")
    y_rows = (x if y is None else y).shape[0]
    return optional_ids("x_ids", x_ids, x.shape[0], x), optional_ids("y_ids", y_ids, y_rows, x)
