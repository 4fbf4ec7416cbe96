"""What the tests of the adapters share: adapter and peer, the cases of both, and a watch for N x N tensors."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.libraries import adapter_and_original as modules
from contrastive_kernels.compat import ADAPTERS
from contrastive_kernels.compat.check.command import Library

__all__ = [
    "NOT_INSTALLABLE",
    "OTHER_SIGNATURES",
    "NoMatrix",
    "cases",
    "modules",
    "parameters",
    "require_peers",
]

# Those that no package index has, or not in the form that people use; tests compare with formulas of ours.
NOT_INSTALLABLE = ("supcontrast",)
# Signatures of other releases than the one that is installed.
OTHER_SIGNATURES = {("lightly", "MemoryBankModule"), ("solo", "simclr_loss_func")}


def require_peers() -> None:
    """Skip a module where the peers are not installed; where one alone is missing the tests of it fail."""
    pytest.importorskip("info_nce")


def cases(*names: str) -> list[Any]:
    """Return the cases of some libraries, of all that can be installed by default, as parameters."""
    chosen = names or [name for name in ADAPTERS if name not in NOT_INSTALLABLE]
    return [
        pytest.param(name, case, id=f"{name}-{case}".replace(" ", "_"))
        for name in chosen
        for case in Library(name).cases.CASES
    ]


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    """Return name, kind and default of every parameter: a signature without its annotations."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


class NoMatrix(TorchDispatchMode):
    """Fail where an operation returns n x n numbers or more."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it returns."""
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.numel() >= self.n**2 and x.untyped_storage().nbytes() >= self.n**2:
                raise AssertionError(f"{func} returns {tuple(x.shape)}")
        return out
