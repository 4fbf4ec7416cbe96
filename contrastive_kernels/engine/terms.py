"""Terms: the elementwise functions of a similarity that a sweep can sum, with the values and slopes that define them.

The kernels of the other backends know a term by its name; CONTRIBUTING.md lists what a new one takes.
"""

from __future__ import annotations

from collections.abc import Callable
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
    "Softplus",
    "Square",
    "Student",
    "Term",
]

# The square of the least distance that counts, for terms of distances.
LEAST_SQUARE = 1e-12

# The class of every term by its name.
TERMS: dict[str, type[Term]] = {}


class Operands(NamedTuple):
    """A term as the kernels take it: ``phi(scale * s + offset)`` with constants; None stands for 1 and 0."""

    scale: float | Tensor | None = None
    offset: float | Tensor | None = None
    constants: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Term:
    """An elementwise function of the similarity, summed over the kept pairs of each row.

    `value` and `slope` are phi and its derivative, functions of the argument ``v = scale * s + offset``. Comparisons in
    a slope single out where it is 0, so that NaN takes the other branch and stays NaN.
    """

    name: ClassVar[str]
    of_distance: ClassVar[bool] = False
    """Whether ``s`` in the argument is minus the distance of unit rows, ``-sqrt(2 - 2 s)``."""
    offset_name: ClassVar[str] = "offset"
    """What messages call the offset."""
    value: ClassVar[Callable[..., Tensor]]
    """``phi(v, *constants)``, a static method."""
    slope: ClassVar[Callable[..., Tensor]]
    """``phi'(v, *constants)``, a static method."""

    def __init_subclass__(cls) -> None:
        TERMS[cls.name] = cls

    def operands(self) -> Operands:
        """Return scale, offset and constants of ``phi``."""
        return Operands()


@dataclass(frozen=True, eq=False)
class Identity(Term):
    """The similarity ``s`` itself."""

    name = "identity"

    @staticmethod
    def value(v: Tensor) -> Tensor:
        return v

    @staticmethod
    def slope(v: Tensor) -> Tensor:
        return torch.ones_like(v)


@dataclass(frozen=True, eq=False)
class Count(Term):
    """1: the number of kept pairs. No gradient."""

    name = "count"

    @staticmethod
    def value(v: Tensor) -> Tensor:
        return torch.ones_like(v)

    @staticmethod
    def slope(v: Tensor) -> Tensor:
        return torch.zeros_like(v)


@dataclass(frozen=True, eq=False)
class Square(Term):
    """``s**2``."""

    name = "square"

    @staticmethod
    def value(v: Tensor) -> Tensor:
        return v * v

    @staticmethod
    def slope(v: Tensor) -> Tensor:
        return 2 * v


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

    @staticmethod
    def value(v: Tensor, lower: float, upper: float) -> Tensor:
        d = (1 - v) / 2
        return ((d - lower) * (upper - d)).clamp(min=0)

    @staticmethod
    def slope(v: Tensor, lower: float, upper: float) -> Tensor:
        d = (1 - v) / 2
        return (d - (lower + upper) / 2).masked_fill((d <= lower) | (d >= upper), 0)


@dataclass(frozen=True, eq=False)
class Softplus(Term):
    """``log(1 + exp(scale * s + bias))``; float or 0-dim with gradient, the bias also (N,), one per row."""

    scale: float | Tensor = 1.0
    bias: float | Tensor = 0.0
    name = "softplus"
    offset_name = "bias"

    def operands(self) -> Operands:
        return Operands(self.scale, self.bias)

    @staticmethod
    def value(v: Tensor) -> Tensor:
        return torch.logaddexp(v, torch.zeros_like(v))

    @staticmethod
    def slope(v: Tensor) -> Tensor:
        return torch.sigmoid(v)


@dataclass(frozen=True, eq=False)
class Hinge(Term):
    """``max(0, s + margin)``; margin is a float or (N,), one per row, with gradient."""

    margin: float | Tensor = 0.0
    name = "hinge"
    offset_name = "margin"

    def operands(self) -> Operands:
        return Operands(None, self.margin)

    @staticmethod
    def value(v: Tensor) -> Tensor:
        return v.clamp(min=0)

    @staticmethod
    def slope(v: Tensor) -> Tensor:
        return (1 + 0 * v.clamp(max=0)).masked_fill(v <= 0, 0)


@dataclass(frozen=True, eq=False)
class DistanceHinge(Hinge):
    """``max(0, margin - d)`` of the distance ``d = sqrt(2 - 2 * s)`` between unit rows; margin as that of `Hinge`.

    A distance below 1e-6 counts as 1e-6, without gradient.
    """

    name = "distance_hinge"
    of_distance = True


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

    @staticmethod
    def value(v: Tensor, exponent: float) -> Tensor:
        return (1 + v.clamp(min=0)).pow(-exponent)

    @staticmethod
    def slope(v: Tensor, exponent: float) -> Tensor:
        return -exponent * (1 + v.clamp(min=0)).pow(-exponent - 1)


@dataclass(frozen=True, eq=False)
class Gaussian(Term):
    """``exp(-t * (2 - 2 * s))``: the Gaussian of the squared distance between unit rows."""

    t: float = 2.0
    name = "gaussian"

    def operands(self) -> Operands:
        return Operands(constants=(float(self.t),))

    @staticmethod
    def value(v: Tensor, t: float) -> Tensor:
        return torch.exp(2 * t * (v - 1))

    @staticmethod
    def slope(v: Tensor, t: float) -> Tensor:
        return 2 * t * torch.exp(2 * t * (v - 1))
