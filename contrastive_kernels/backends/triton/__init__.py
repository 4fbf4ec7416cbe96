"""The sweep in Triton, on GPUs, and in Triton's interpreter on the CPU.

Importing this module imports no Triton and asks no driver. `sums` is the forward, `grad` and `chunk` the backward,
`rows` the normalisation and the positives, `views` the view minimum; `tile` is what the sweep's kernels share on the
device, `launch` on the host, `tiles` the tile table.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os

import torch
from torch import Tensor

name = "triton"
SAVED_SCORES_BYTES = 0
# The largest D whose gradients any row of the tile table holds in registers.
REGISTER_DEPTH = 256
installed = importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def not_supported_reasons(x: Tensor) -> list[str]:
    """Why this backend cannot run on x; empty if it can."""
    reasons = []
    if not installed:
        reasons.append("triton is not installed")
    if x.device.type != "cuda" and not (x.device.type == "cpu" and _interpreting()):
        reasons.append(f"device is {x.device.type}, not cuda (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        reasons.append(f"dtype is {x.dtype}, not float32, float16 or bfloat16; the torch backend takes it")
    if x.dtype == torch.bfloat16 and _interpreting():
        reasons.append("the bfloat16 products of Triton's interpreter are wrong")
    return reasons


def statistic_dtype(x: Tensor) -> torch.dtype:
    """float32, as the accumulators."""
    return torch.float32


def score_dtype(x: Tensor, y: Tensor | None) -> torch.dtype | None:
    """In what the similarities are saved, see `tile.store_scores`; None where gradients are made in registers."""
    if x.dtype == torch.float32:
        return torch.float32
    return torch.int16 if x.shape[1] > REGISTER_DEPTH else None


def forward(
    x, y, scale, bias, x_ids, y_ids, cutoff, term_scale, term_offset, exponents, columns, term, constants, same,
    exclude_diagonal, maximum, keep=False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The statistics of `contrastive_kernels.sweep`."""
    from contrastive_kernels.backends.triton import sums
    from contrastive_kernels.backends.triton.launch import Scores, Sweep

    sweep = Sweep.of(
        x, y, scale, bias, x_ids, y_ids, cutoff, term_scale, term_offset, exponents, columns, term, constants, same,
        exclude_diagonal,
    )  # fmt: skip
    with torch.cuda.device_of(x):
        dtype = score_dtype(x, y)
        keep = keep and dtype is not None
        values = x.new_empty((len(sweep.x), len(sweep.y)) if keep else (0,), dtype=dtype or torch.float32)
        return *sums.forward(sweep, maximum, Scores.of(sweep, values) if keep else None), values


def backward(
    grad_row_lse, grad_col_lse, grad_row_sum, row_lse, col_lse, x, y, scale, bias, x_ids, y_ids, cutoff, term_scale,
    term_offset, exponents, columns, term, constants, same, exclude_diagonal, needs, scores=None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, y, scale, bias, term_scale and term_offset, and the total; empty where `needs` says so."""
    from contrastive_kernels.backends.triton import chunk, grad
    from contrastive_kernels.backends.triton.launch import Packed, Scores, Sweep

    sweep = Sweep.of(
        x, y, scale, bias, x_ids, y_ids, cutoff, term_scale, term_offset, exponents, columns, term, constants, same,
        exclude_diagonal,
    )  # fmt: skip
    names = ("x", "y", "scale", "bias", "term_scale", "term_offset", "total")
    wanted = {name for name, need in zip(names, needs, strict=True) if need}
    # The products of `chunk` are done by the library, where autocast would round their float32 operands.
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        if sweep.columns and sweep.symmetric and sweep.exponents:
            # E_ij is in row i's and in column i's statistic alike: one exponential for both.
            grad_row_lse = grad_row_lse + grad_col_lse
            sweep = dataclasses.replace(sweep, columns=False)
        product = bool(wanted & {"x", "y"})
        in_registers = not product or (scores is None and grad.tile_for(sweep, wanted) is not None)
        # Where S stays in registers an exponential costs as much as a product; before a chunk is written it is hidden.
        both_roles = sweep.columns or (sweep.self_similarity and sweep.bias is None)
        centered = in_registers and len(sweep.exponents) > 0 and both_roles
        packed = Packed.of(sweep, grad_row_lse, grad_col_lse, grad_row_sum, row_lse, col_lse, centered)
        if in_registers:
            gradients = grad.backward(sweep, packed, wanted)
        else:
            saved = None if scores is None else Scores.of(sweep, scores)
            gradients = chunk.backward(sweep, packed, wanted, saved)
    return tuple(gradients.get(name, scale.new_empty(0)) for name in names)


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of unit norm in the dtype of x, and the norms in float32."""
    from contrastive_kernels.backends.triton import rows

    with torch.cuda.device_of(x):
        return rows.unit_rows_fwd(x)


def unit_rows_backward(grad: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    """The gradient of x."""
    from contrastive_kernels.backends.triton import rows

    with torch.cuda.device_of(x):
        return rows.unit_rows_bwd(grad, x, norm)


def row_dot(x: Tensor, y: Tensor) -> Tensor:
    """``<x_i, y_i>`` over the last dimension, in float32."""
    from contrastive_kernels.backends.triton import rows

    with torch.cuda.device_of(x):
        return rows.row_dot_fwd(x, y)


def row_dot_backward(grad: Tensor, x: Tensor, y: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    """The gradients of x and y; empty where `needs` says so."""
    from contrastive_kernels.backends.triton import rows

    with torch.cuda.device_of(x):
        return rows.row_dot_bwd(grad, x, y, needs)


def view_minimum(views: Tensor) -> Tensor:
    """(N, 2): the least similar pair j < k of each sample's views, the first on a tie; NaN is least."""
    from contrastive_kernels.backends.triton import views as kernels

    with torch.cuda.device_of(views):
        return kernels.view_minimum_fwd(views)
