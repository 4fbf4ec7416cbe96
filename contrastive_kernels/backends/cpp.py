"""The sweep in C++ (``csrc/``): tiles that stay in the cache, on every core of the CPU."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from contrastive_kernels.sweep import compute_dtype

name = "cpp"
# Few scores are saved unasked: a fourth product takes longer than to read them.
SAVED_SCORES_BYTES = 4 << 20

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

try:
    importlib.import_module("contrastive_kernels._C")
    missing = None
except ImportError as error:
    missing = f"the extension is not built ({error}); build it with `python setup.py build_ext --inplace`"


def not_supported_reasons(x: Tensor) -> list[str]:
    """Why this backend cannot run on x; empty if it can."""
    reasons = [missing] if missing else []
    if x.device.type != "cpu":
        reasons.append(f"x is on {x.device}, not on the CPU")
    if x.dtype not in DTYPES:
        reasons.append(f"x is {x.dtype}, not one of {', '.join(map(str, DTYPES))}")
    return reasons


def statistic_dtype(x: Tensor) -> torch.dtype:
    """float64: sums of exponentials are carried in it, and the backward subtracts them from logits of magnitude 100."""
    return torch.float64


def score_dtype(x: Tensor, y: Tensor | None) -> torch.dtype | None:
    """In what the similarities are saved; None of x with itself, where the visited half depends on the threads."""
    return None if y is None else compute_dtype(x)


def forward(*arguments):
    """The statistics of `contrastive_kernels.sweep`."""
    return torch.ops.contrastive_kernels.cpp_forward(*arguments)


def backward(*arguments):
    """The gradients of `contrastive_kernels.sweep`."""
    return torch.ops.contrastive_kernels.cpp_backward(*arguments)


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of unit norm in the dtype of x, and the norms in the compute dtype."""
    return torch.ops.contrastive_kernels.cpp_unit_rows(x)


def unit_rows_backward(grad: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    """The gradient of x."""
    return torch.ops.contrastive_kernels.cpp_unit_rows_backward(grad, x, norm)


def view_minimum(views: Tensor) -> Tensor:
    """(N, 2): the least similar pair j < k of each sample's views, the first in row-major order on a tie."""
    return torch.ops.contrastive_kernels.cpp_views(views)
