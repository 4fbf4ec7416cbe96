"""A call that adapter and peer have in common, and how far their values and gradients are apart."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["TOLERANCE", "Case", "Draw", "difference", "outcome"]

# Of float64, relative to the largest number of a tensor, or to 1.
TOLERANCE = 1e-10


class Draw:
    """Seeded inputs of a case; those that have a gradient are compared by it.

    Args:
        n: the number of rows that a case should take, or a little more or less.
        seed: of all that is drawn.
        dtype: of all floating inputs.
    """

    def __init__(self, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        self.n = n
        self.dtype = dtype
        self.leaves: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(seed)

    def rows(self, *shape: int, grad: bool = True) -> Tensor:
        """Return normally distributed numbers."""
        return self.leaf(torch.randn(shape, generator=self.generator, dtype=torch.float64), grad)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Return integers from 0 to high - 1."""
        return torch.randint(high, shape, generator=self.generator)

    def leaf(self, value: float | Tensor, grad: bool = True) -> Tensor:
        """Return an input of that value, by default one whose gradient is compared."""
        x = torch.as_tensor(value).detach().to(self.dtype).clone().requires_grad_(grad)
        if grad:
            self.leaves.append(x)
        return x


@dataclass(frozen=True)
class Case:
    """Something to call.

    Args:
        name: the public name that it is about.
        what: the option or quirk.
        run: returns tensors, in a mapping, a sequence or alone, from a module (the adapter or the peer) and inputs.
    """

    name: str
    what: str
    run: Callable[[Any, Draw], Any]

    def __str__(self) -> str:
        return f"{self.name} {self.what}".strip()


def outcome(case: Case, module: Any, draw: Draw) -> dict[str, Tensor]:
    """Return what a case gives: its tensors, and the gradients of all inputs, None where there is no path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        found = _flat("value", case.run(module, draw))
        # other weights for other numbers, so that no two gradients cancel
        zero = torch.zeros((), dtype=torch.float64)
        weighted = [(x.double() * (torch.arange(x.numel()) + 1.0).view(x.shape).rsqrt()).sum() for x in found.values()]
        total = sum((x for x in weighted if x.requires_grad), zero)
        if total.requires_grad and draw.leaves:
            grads = torch.autograd.grad(total, draw.leaves, allow_unused=True)
            for i, (leaf, grad) in enumerate(zip(draw.leaves, grads, strict=True)):
                found[f"gradient {i}"] = torch.zeros_like(leaf) if grad is None else grad
    return {name: x.detach() for name, x in found.items()}


def difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Return the largest relative difference; infinite where the tensors are not the same ones."""
    if ours.keys() != theirs.keys():
        return math.inf
    return max((_difference(ours[name], theirs[name]) for name in ours), default=0.0)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return math.inf
    if not ours.numel():
        return 0.0
    a, b = ours.double(), theirs.double()
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite) or not torch.equal(a[~finite].nan_to_num(7.0), b[~finite].nan_to_num(7.0)):
        return math.inf
    a, b = (x.nan_to_num(0.0, 0.0, 0.0) for x in (a, b))
    return float((a - b).abs().amax() / b.abs().amax().clamp(min=1.0))


def _flat(name: str, found: Any) -> dict[str, Tensor]:
    """Return the tensors of a nested result by name."""
    if isinstance(found, Tensor):
        return {name: found}
    if isinstance(found, Mapping):
        parts: Sequence[tuple[Any, Any]] = list(found.items())
    else:
        parts = list(enumerate(found))
    return {key: x for part, value in parts for key, x in _flat(f"{name} {part}", value).items()}
