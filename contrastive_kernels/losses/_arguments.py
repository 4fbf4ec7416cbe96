"""Types of the losses: keyword arguments that several of them take, and what they return.

A loss lists its keyword arguments in its signature, with defaults and documentation, and once more in a TypedDict,
which types its overloads and the constructor of its module; a test holds the two together. A TypedDict leaves out
``return_stats`` and the positional arguments of the module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from typing_extensions import ParamSpec, TypedDict

from contrastive_kernels.primitives import Group

P = ParamSpec("P")

if TYPE_CHECKING:

    class Loss(Tensor):
        """A tensor whose ``backward`` has annotations, which ``mypy --strict`` asks for and `torch.Tensor` lacks."""

        def backward(
            self,
            gradient: Tensor | None = None,
            retain_graph: bool | None = None,
            create_graph: bool = False,
            inputs: Any = None,
        ) -> None: ...
        def __add__(self, other: Any) -> Loss: ...
        def __radd__(self, other: Any) -> Loss: ...
        def __mul__(self, other: Any) -> Loss: ...
        def __rmul__(self, other: Any) -> Loss: ...
        def __truediv__(self, other: Any) -> Loss: ...

else:
    Loss = Tensor


def loss_function(function: Callable[P, Tensor]) -> Callable[P, Loss]:
    """Return the function itself; its result is a `Loss` to a type checker."""
    return function  # type: ignore[return-value]  # at run time a Loss is a Tensor


class ContrastiveStats(NamedTuple):
    """Detached by-products of a loss, from the same sweep, in the dtype of the loss."""

    accuracy: Tensor
    """0-dim: fraction of anchors whose positive logit exceeds every negative's (a tie is not a win)."""
    positive_logit: Tensor
    """Per anchor."""
    lse: Tensor
    """Per anchor: log-sum-exp over the loss's whole denominator."""
    logit_max: Tensor
    """Per anchor: the largest logit among the positive and the kept negatives.

    Of unit rows it is at most the scale, plus the bias if there is one: a larger one tells of rows that are not, a
    largest one far below the scale that was meant of the logarithm of the scale.
    """


class GroupArguments(TypedDict, total=False):
    """Of every loss."""

    group: Group | None


class BackendArguments(GroupArguments, total=False):
    """Of a loss that takes rows and sweeps them."""

    normalize: bool
    backend: str | None


class ReductionArguments(TypedDict, total=False):
    """Of a loss with a value per sample."""

    reduction: str
    weight: Tensor | None


class CutoffArguments(TypedDict, total=False):
    """Of a loss that can drop negatives by their similarity."""

    cutoff: float | Tensor | None
    cutoff_margin: float | Tensor | None


class SoftmaxArguments(BackendArguments, ReductionArguments, total=False):
    """Of a candidate softmax, besides its scale."""

    label_smoothing: float
