"""The sweep in Triton, on GPUs, and in Triton's interpreter on the CPU.

Importing this module imports no Triton and asks no driver. `forward` and `safe_forward` are the forward sweep,
`backward` and `chunks` the backward, `rows` the normalisation and the positives, `views` the view minimum. The sweep's
kernels share `epilogue`, `terms` and `bundles` on the device and `launch` on the host; `tiles` is the tile table,
`tune` measures for it, `first_use` compares a kernel with PyTorch before a device trusts it.
See docs/gpu.md.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from contrastive_kernels.engine.backends.triton.first_use import checked
from contrastive_kernels.engine.spec import Description, Gradients, Inputs, Statistics, Upstream, Wanted

name = "triton"
saved_scores_bytes = 0
# The largest D whose gradients a row of the tile table holds in registers.
REGISTER_DEPTH = 256
installed = importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _version(package: str) -> tuple[int, ...] | None:
    """Return the first two numbers of a package's version, None where it is not installed."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(int(number) for number in version.split(".")[:2])


@functools.cache
def _interpreter_problem() -> str | None:
    """Return why Triton's interpreter does not work with the installed NumPy."""
    numpy, own = _version("numpy"), _version("triton")
    if numpy is None:
        return "Triton's interpreter needs numpy, which is not installed"
    if own is not None and own < (3, 7) and numpy >= (2, 4):
        return (
            f"the interpreter of Triton {own[0]}.{own[1]} does not work with numpy {numpy[0]}.{numpy[1]}; "
            '`pip install "numpy<2.4"`, or Triton 3.7'
        )
    return None


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device_of(x)


def not_supported_reasons(x: Tensor) -> list[str]:
    """Return why this backend cannot run on x; nothing if it can."""
    reasons = []
    if not installed:
        reasons.append("triton is not installed")
    if x.device.type != "cuda" and not (x.device.type == "cpu" and _interpreting()):
        reasons.append(f"device is {x.device.type}, not cuda (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        reasons.append(f"dtype is {x.dtype}, not float32, float16 or bfloat16; the torch backend takes it")
    if x.dtype == torch.bfloat16 and _interpreting():
        reasons.append("the bfloat16 products of Triton's interpreter are wrong")
    if installed and _interpreting() and (problem := _interpreter_problem()):
        reasons.append(problem)
    return reasons


def statistic_dtype(x: Tensor) -> torch.dtype:
    """Return float32, the dtype of the accumulators."""
    return torch.float32


def score_dtype(x: Tensor, y: Tensor | None) -> torch.dtype | None:
    """Return the dtype of saved similarities, see `epilogue.store_scores`; None if gradients are made in registers."""
    if x.dtype == torch.float32:
        return torch.float32
    return torch.int16 if x.shape[1] > REGISTER_DEPTH else None


def run_forward(inputs: Inputs, what: Description, *, maximum: bool, save_scores: bool) -> Statistics:
    """Return the statistics that `engine.spec` describes."""
    from contrastive_kernels.engine.backends.triton import forward as kernels
    from contrastive_kernels.engine.backends.triton.launch import Operands, scores_of

    operands = Operands.of(inputs, what)
    x = inputs.x
    with _device_of(x):
        dtype = score_dtype(x, inputs.y)
        save_scores = save_scores and dtype is not None
        values = x.new_empty((len(operands.x), len(operands.y)) if save_scores else (0,), dtype=dtype or torch.float32)
        scores = scores_of(operands, values) if save_scores else None
        return Statistics(*kernels.forward(operands, maximum, scores), values)


def run_backward(
    upstream: Upstream,
    inputs: Inputs,
    what: Description,
    wanted: Wanted,
    scores: Tensor | None,
    *,
    float32_gradients: bool = False,
) -> Gradients:
    """Return the gradients that `engine.spec` describes; empty scores are none."""
    from contrastive_kernels.engine.backends.triton import backward as registers
    from contrastive_kernels.engine.backends.triton import chunks
    from contrastive_kernels.engine.backends.triton.launch import Operands, PackedVectors, scores_of

    operands, x = Operands.of(inputs, what), inputs.x
    if float32_gradients:
        operands = dataclasses.replace(operands, gradient_dtype=torch.float32)
    scores = None if scores is None or not scores.numel() else scores
    names = {name for name, want in zip(Wanted._fields, wanted, strict=True) if want}
    # The library's products in `chunks` keep float32 operands, which autocast would round.
    with _device_of(x), torch.autocast(x.device.type, enabled=False):
        if operands.column_lse and operands.symmetric and operands.exponents:
            # E_ij is in row i's and in column i's statistic alike: one exponential for both.
            upstream = upstream._replace(grad_row_lse=upstream.grad_row_lse + upstream.grad_col_lse)
            operands = dataclasses.replace(operands, column_lse=False)
        product = wanted.x or wanted.y
        in_registers = not product or (scores is None and registers.fits_in_registers(operands, names))
        # An exponential costs as much as a product of D = 128. Beside the loads of saved scores it is hidden, beside
        # products of float32 it is cheap, and a center some hundred binades away takes bits of float32.
        both_roles = operands.column_lse or (operands.self_similarity and operands.bias is None)
        costly = in_registers or (scores is None and x.dtype != torch.float32)
        centered = costly and len(operands.exponents) > 0 and both_roles
        packed = PackedVectors.of(operands, upstream, centered)
        if in_registers:
            gradients = registers.backward(operands, packed, names)
        else:
            saved = None if scores is None else scores_of(operands, scores)
            gradients = chunks.backward(operands, packed, names, saved)
    return Gradients(*(gradients.get(name, inputs.scale.new_empty(0)) for name in Gradients._fields))


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows of unit norm in the dtype of x, and the norms in float32."""
    from contrastive_kernels.engine.backends.triton import rows

    with _device_of(x):
        return rows.unit_rows_fwd(x)


def unit_rows_backward(grad: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    """Return the gradient of x."""
    from contrastive_kernels.engine.backends.triton import rows

    with _device_of(x):
        return rows.unit_rows_bwd(grad, x, norm)


def row_dot(x: Tensor, y: Tensor) -> Tensor:
    """Return ``<x_i, y_i>`` over the last dimension, in float32."""
    from contrastive_kernels.engine.backends.triton import rows

    with _device_of(x):
        return rows.row_dot_fwd(x, y)


def row_dot_backward(grad: Tensor, x: Tensor, y: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and y, empty if not wanted."""
    from contrastive_kernels.engine.backends.triton import rows

    with _device_of(x):
        return rows.row_dot_bwd(grad, x, y, wanted)


def view_minimum(views: Tensor) -> Tensor:
    """Return (N, 2), the least similar pair j < k of each sample's views, the first on a tie; NaN is least."""
    from contrastive_kernels.engine.backends.triton import views as kernels

    with _device_of(views):
        return kernels.view_minimum_fwd(views)


_functions: Mapping[str, Callable[..., Any]] = {
    "forward": run_forward,
    "backward": run_backward,
    "unit_rows": unit_rows,
    "unit_rows_backward": unit_rows_backward,
    "row_dot": row_dot,
    "row_dot_backward": row_dot_backward,
    "views": view_minimum,
}
operators: Mapping[str, Callable[..., Any]] = {
    operator: checked(operator, function) for operator, function in _functions.items()
}
