"""Rows of features: their normalisation, their products pair by pair, and the dtype that autocast gives them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_kernels.engine.autograd import call
from contrastive_kernels.engine.backends import choose
from contrastive_kernels.engine.backends import torch as torch_backend
from contrastive_kernels.engine.spec import compute_dtype
from contrastive_kernels.primitives.devices import reading_is_free
from contrastive_kernels.primitives.shards import ALONE, Shards

__all__ = [
    "cast_for_autocast",
    "gather_rows",
    "nan_unless_finite",
    "row_dot",
    "rows_for_distances",
    "takes_double",
    "unit_rows",
    "wide_products",
    "wide_sums",
]

# Asked once: torch.compile of torch 2.9 to 2.11 cannot trace the question.
_AUTOCAST_DEVICES = frozenset(
    device
    for device in ("cpu", "cuda", "hpu", "ipu", "maia", "mps", "mtia", "privateuseone", "xla", "xpu")
    if torch.amp.is_autocast_available(device)
)
# What float32 rows may add to the exponent of a kernel of their distances: its rounding is then that of a logit.
LARGEST_EXPONENT = 4.0


def unit_rows(x: Tensor, normalize: bool = True, backend: str | None = None) -> Tensor:
    """Return the rows that enter the similarities: of unit norm if asked for, in the dtype of x or of autocast."""
    return cast_for_autocast(call(choose(x, backend).name, "unit_rows", x)[0] if normalize else x)


def cast_for_autocast(x: Tensor) -> Tensor:
    """Return x in the dtype that autocast, if active, gives to matrix products."""
    device = x.device.type
    if x.dtype != torch.float64 and device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def wide_products(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which matrix products keep the dtype of their operands, also under autocast."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if device in _AUTOCAST_DEVICES else nullcontext()


def wide_sums(x: Tensor) -> torch.dtype:
    """Return the dtype for a sum over the whole batch: float64 where the device has it."""
    return torch_backend.statistic_dtype(x)


def takes_double(x: Tensor, backend: str | None = None) -> bool:
    """Return whether the backend that serves x would take it in float64 too."""
    return not choose(x, backend).not_supported_reasons(x.new_empty(0, dtype=torch.float64))


def row_dot(x: Tensor, y: Tensor, backend: str | None = None) -> Tensor:
    """Return ``<x_i, y_i>`` over the last dimension, accumulated in the compute dtype."""
    # The CPU always uses plain PyTorch; Dynamo rejects one tensor as two inputs of a Function.
    fused = (not x.is_cpu or backend is not None) and x is not y
    if fused and x.shape == y.shape and x.dtype == y.dtype:
        chosen = choose(x, backend, "row_dot")
        if "row_dot" in chosen.operators:
            product: Tensor = call(chosen.name, "row_dot", x, y)
            return product
    dtype = compute_dtype(x)
    return (x.to(dtype) * y.to(dtype)).sum(-1)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Return ``x[index]``, whose gradient adds up the rows in a fixed order: the same bits in every run on a CPU."""
    return F.embedding(index, x)


def rows_for_distances(z: Tensor, factor: float | Tensor, backend: str | None = None, shards: Shards = ALONE) -> Tensor:
    """Return the rows without their mean, whose distances are the same, in a dtype in which they may be subtracted.

    ``|x|^2 + |y|^2 - 2 <x, y>`` is off by the rounding of its largest term, times the factor. Where that is more than a
    few roundings of 1 the rows are float64, if the backend takes it; where reading waits, and over several ranks, they
    always are.
    """
    z = z.to(compute_dtype(z))
    if not shards.alone:
        wide = z.double() if takes_double(z, backend) else z
        return wide - shards.column_means(wide.detach())
    narrow = z - z.mean(0).detach()
    if z.dtype == torch.float64 or not takes_double(z, backend):
        return narrow
    if reading_is_free(z) and bool(abs(factor * narrow.detach().square().sum(1).amax()) <= LARGEST_EXPONENT):
        return narrow
    # Not from the narrow ones: a mean far from a row takes digits from it.
    wide = z.double()
    return wide - wide.mean(0).detach()


def nan_unless_finite(x: Tensor) -> Tensor:
    """Return 0, or NaN if x is not finite; added to losses that would hide it."""
    return (0 * x.detach()).sum().to(compute_dtype(x))
