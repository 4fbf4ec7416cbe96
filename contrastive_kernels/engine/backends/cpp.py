"""The sweep in C++ (``csrc/``): tiles that stay in the cache, on every core of the CPU."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import torch
from torch import Tensor

from contrastive_kernels.engine.spec import compute_dtype

name = "cpp"
# Reading a few saved scores takes less time than a fourth product.
saved_scores_bytes = 4 << 20

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

try:
    importlib.import_module("contrastive_kernels._C")
    missing = None
except ImportError as error:
    missing = f"the extension is not built ({error}); build it with `python setup.py build_ext --inplace`"

# The extension registers the operators itself.
operators: Mapping[str, None] = (
    {} if missing else dict.fromkeys(("forward", "backward", "unit_rows", "unit_rows_backward", "views", "select"))
)


def not_supported_reasons(x: Tensor) -> list[str]:
    """Return why this backend cannot run on x; nothing if it can."""
    reasons = [missing] if missing else []
    if x.device.type != "cpu":
        reasons.append(f"x is on {x.device}, not on the CPU")
    if x.dtype not in DTYPES:
        reasons.append(f"x is {x.dtype}, not one of {', '.join(map(str, DTYPES))}")
    return reasons


def statistic_dtype(x: Tensor) -> torch.dtype:
    """Return float64: it carries sums of exponentials, and the backward subtracts them from logits of magnitude 100."""
    return torch.float64


def score_dtype(x: Tensor, y: Tensor | None) -> torch.dtype | None:
    """Return the compute dtype; None for x with itself, where the visited half depends on the threads."""
    return None if y is None else compute_dtype(x)
