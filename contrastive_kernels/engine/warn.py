"""Warnings at the line of the user, also from a call that is compiled or exported: then while it is traced."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["called_while_traced", "warn"]

F = TypeVar("F", bound=Callable[..., Any])

# A frame of generated code has no name; only PyTorch generates any.
INSIDE = ("torch", "contrastive_kernels", "")


def called_while_traced(function: F) -> F:
    """Let Dynamo call a function while it traces a graph, with constants as arguments, not trace it.

    What `torch.compiler.assume_constant_result` does, which imports Dynamo and takes two seconds for it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@called_while_traced
def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the first frame that is neither of this package nor of PyTorch: the line that the user has written."""
    level, frame = 1, sys._getframe()
    while str(frame.f_globals.get("__name__", "")).partition(".")[0] in INSIDE and frame.f_back:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
