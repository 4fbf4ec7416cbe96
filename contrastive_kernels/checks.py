"""Argument checks and their messages. Shapes, dtypes and devices only: nothing here reads a tensor's values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from contrastive_kernels.sweep import Term, compute_dtype

FEATURE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shape(x: Tensor) -> str:
    """The shape as messages print it."""
    return str(tuple(x.shape))


def tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")


def _features(name: str, x: Tensor, dimensions: str) -> None:
    tensor(name, x)
    if x.dim() != dimensions.count(",") + 1:
        raise ValueError(f"{name} {shape(x)} must have shape ({dimensions})")
    if x.dtype not in FEATURE_DTYPES:
        raise TypeError(f"{name} has dtype {x.dtype}; expected float16, bfloat16, float32 or float64")


def features(name: str, x: Tensor) -> None:
    """x is a floating (N, D) tensor."""
    _features(name, x, "N, D")


def views(name: str, x: Tensor, minimum: int = 2) -> None:
    """x is a floating (N, V, D) tensor with enough views."""
    _features(name, x, "N, V, D")
    if x.shape[1] < minimum:
        raise ValueError(f"{name} {shape(x)} must have at least {minimum} views in its second dimension")


def not_empty(name: str, x: Tensor) -> None:
    """A loss of no rows has no mean."""
    if x.shape[0] == 0:
        raise ValueError(f"{name} {shape(x)} is an empty batch; a loss needs at least one row")


def alike(name_x: str, x: Tensor, name_y: str, y: Tensor, *, rows: bool = True) -> None:
    """Two feature tensors agree in device, dtype, last dimension and, with `rows`, in the first."""
    if x.device != y.device:
        raise RuntimeError(f"{name_x} is on {x.device} and {name_y} on {y.device}; move them to one device")
    if x.dtype != y.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{name_x} is {x.dtype} and {name_y} is {y.dtype}; cast one of them")
    if rows and x.shape[0] != y.shape[0]:
        raise ValueError(f"{name_x} {shape(x)} and {name_y} {shape(y)} must have the same first dimension")
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"{name_x} {shape(x)} and {name_y} {shape(y)} must have the same last dimension")


def same_device(name: str, value: Tensor, x: Tensor) -> None:
    """A vector lives where the features live."""
    if value.device != x.device:
        raise RuntimeError(f"{name} is on {value.device} and the features are on {x.device}; move it there")


def choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """A string argument is one of those known."""
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(map(repr, allowed))}")


def ids(name: str, value: Tensor, rows: int | tuple[int, ...], x: Tensor) -> Tensor:
    """Integer ids, one per row, as int64."""
    tensor(name, value)
    expected = (rows,) if isinstance(rows, int) else rows
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {value.dtype}; ids must be integers")
    if tuple(value.shape) != expected:
        raise ValueError(f"{name} {shape(value)} must have shape {expected}, one id per row")
    same_device(name, value, x)
    return value.to(torch.int64)


def vector(name: str, value: Tensor, x: Tensor, x_name: str) -> None:
    """A floating vector with one entry per row of x."""
    tensor(name, value)
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {value.dtype}; expected a floating dtype")
    if tuple(value.shape) != (x.shape[0],):
        raise ValueError(f"{name} {shape(value)} must have shape ({x.shape[0]},), one entry per row of {x_name}")
    same_device(name, value, x)


def per_row(name: str, value: float | Tensor | None, x: Tensor) -> Tensor | None:
    """A float or a vector as a vector of the compute dtype, one entry per row of x."""
    dtype = compute_dtype(x)
    if value is None:
        return None
    if not isinstance(value, Tensor):
        number(name, value)
        return torch.full((x.shape[0],), value, dtype=dtype, device=x.device)
    if value.dim() == 0:
        same_device(name, value, x)
        return value.to(dtype).expand(x.shape[0])
    vector(name, value, x, "x")
    return value.to(dtype)


def number(name: str, value: object) -> None:
    """A Python number, not a bool."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a tensor, not {type(value).__name__}")


def scalar(name: str, value: float | Tensor, x: Tensor) -> float | Tensor:
    """A number or a tensor with one element, the latter as 0-dim on the device of x."""
    if not isinstance(value, Tensor):
        number(name, value)
        return float(value)
    if value.numel() != 1:
        raise ValueError(f"{name} {shape(value)} must be a float or a tensor with one element")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {value.dtype}; expected a floating dtype")
    return value.reshape(()).to(x.device)


def temperature(value: float | Tensor, x: Tensor) -> float | Tensor:
    """A temperature that can be divided by."""
    value = scalar("temperature", value, x)
    if not isinstance(value, Tensor) and abs(value) < 1e-8:
        raise ValueError(f"temperature {value} is too close to zero: abs(temperature) must be at least 1e-8")
    return value


def label_smoothing(value: float) -> None:
    """As `F.cross_entropy`: a number in [0, 1]."""
    number("label_smoothing", value)
    if not 0 <= value <= 1:
        raise ValueError(f"label_smoothing {value} must be between 0 and 1")


def term_operands(term: Term, x: Tensor) -> None:
    """The tensors of a term fit the features."""
    scale, offset, _ = term.operands()
    if scale is not None:
        scalar("scale", scale, x)
    if isinstance(offset, Tensor) and offset.dim() > 0:
        vector("bias" if term.name == "softplus" else "margin", offset, x, "x")
    elif offset is not None:
        scalar("bias", offset, x)


def primitive(
    x: Tensor, y: Tensor | None, x_ids: Tensor | None, y_ids: Tensor | None, cutoff: float | Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What all sweeps ask of features, ids and cutoff; returns the ids as int64."""
    features("x", x)
    if y is not None:
        features("y", y)
        alike("x", x, "y", y, rows=False)
    if y is None and y_ids is not None:
        raise ValueError("y_ids is given but y is not; x_ids serves both sides of x against itself")
    if y is not None and (x_ids is None) != (y_ids is None):
        missing, given = ("x_ids", "y_ids") if x_ids is None else ("y_ids", "x_ids")
        raise ValueError(f"{given} is given but {missing} is not; a pair is left out when its two ids are equal")
    if isinstance(cutoff, Tensor) and cutoff.dim() > 0:
        vector("cutoff", cutoff, x, "x")
    return (
        None if x_ids is None else ids("x_ids", x_ids, x.shape[0], x),
        None if y_ids is None else ids("y_ids", y_ids, y.shape[0], y),
    )
