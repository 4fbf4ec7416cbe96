"""Small batches on a CPU: below the measured crossover the plain PyTorch formula takes less time than a sweep.

The formula has to give what the fused loss gives: rows by `unit_rows`, whose gradient of a row of zeros is 0; masked
entries by ``-inf``; no N x N matrix beyond the crossover.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from contrastive_kernels.primitives import checks, compute_dtype

__all__ = ["inverse", "is_small", "largest", "scalar"]

# So many similarities are less work than the calls of a sweep; at most 256 KiB of them are stored. Measured by
# `python -m benchmarks --preset peers` on two cores.
_largest = 256 * 256


def is_small(x: Tensor, similarities: int, crossover: float = 1.0) -> bool:
    """Return whether a loss of so many similarities of rows like x is taken from the plain formula.

    A loss whose sweep is overtaken later or earlier than others says so by `crossover`, a multiple of theirs.
    """
    return (
        similarities <= crossover * _largest
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def scalar(value: float | Tensor) -> float | Tensor:
    """Return a temperature or scale as our losses take it: a tensor of one element without its dimensions, floating."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        return value
    value = value.reshape(())
    return value if value.is_floating_point() else value.double()


def inverse(temperature: float | Tensor, x: Tensor) -> float | Tensor:
    """Return the scale of a temperature, whatever its dtype, in the dtype that a loss of rows like x is computed in.

    A temperature of the libraries may be negative, one of our losses may not: they get the scale.
    """
    value = checks.temperature(scalar(temperature), x)
    return 1 / (value.to(compute_dtype(x)) if isinstance(value, Tensor) else value)


@contextmanager
def largest(similarities: int) -> Iterator[None]:
    """Set the crossover for a block, to compare both paths."""
    global _largest
    before, _largest = _largest, similarities
    try:
        yield
    finally:
        _largest = before
