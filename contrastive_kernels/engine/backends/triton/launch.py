"""What the launches of the sweep's kernels share on the host: their operands, compile-time flags and packed vectors."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from contrastive_kernels.engine.backends.triton import tiles
from contrastive_kernels.engine.backends.triton.bundles import (
    CENTER_SIZE,
    PACKED_ROWS,
    Flags,
    Numbers,
    Scores,
    ScoreStore,
)
from contrastive_kernels.engine.backends.triton.epilogue import (
    _center_bwd_kernel,
    _pack_bwd_kernel,
)
from contrastive_kernels.engine.spec import PLACES, Description, Inputs, Upstream

# Elements that the one program of `_center_bwd_kernel` reads at a time, and its warps.
CENTER_ROWS, CENTER_WARPS = 4096, 16
# Up to how many log-sum-exps all programs of `_pack_bwd_kernel` find the center themselves, which takes no longer than
# a kernel before it, and how many they read at a time. Predicted, not measured.
CENTER_TOGETHER, CENTER_ROWS_TOGETHER = 65536, 1024

# The integer that a saved similarity of 1 becomes: less than 2^15, for similarities that rounding has made larger.
STEPS = 32700.0

# Versions of Triton in which a kernel is compiled for no more than `_variant` tells apart: read, and tested. AMD's
# compiler also asks how much memory lies behind a pointer.
REPEATED_BY = ("3.6.", "3.7.", "3.8.", "3.9.")
REPEATS = triton.__version__.startswith(REPEATED_BY) and not torch.version.hip
# So many launches are remembered; numbers that change in every step would fill the memory otherwise.
REMEMBERED = 4096
# Types of arguments that stand for themselves in the key of a launch.
PLAIN = frozenset((int, float, bool, str, type(None), Flags, Numbers))

_remembered: dict[tuple[object, ...], tuple[Callable[..., None], Callable[[dict[str, Any]], tuple[Any, ...]]]] = {}


def launch_kernel(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch a kernel like ``kernel[grid](**arguments)``, a launch like an earlier one in less time.

    Triton binds arguments and looks for compiled code in every launch, 8 to 28 us on a CPU core. A launch that differs
    from an earlier one in pointers alone takes the compiled kernel at once, 5 to 15 us, by Triton's own interface for
    that, which reads the current stream and calls Triton's hooks. Every argument is named, none is a default.
    """
    if (
        not REPEATS
        or type(kernel) is not JITFunction
        or kernel.pre_run_hooks
        or knobs.runtime.add_stages_inspection_hook
    ):
        kernel[grid](**arguments)
        return
    switches = knobs.runtime.debug, knobs.compilation.instrumentation_mode
    described = [a if type(a) in PLAIN else _variant(a) for a in arguments.values()]
    key = (kernel.fn, grid, driver.active.get_current_device(), switches, *arguments, *described)
    found = _remembered.get(key)
    if found is not None:
        start, in_order = found
        start(*in_order(arguments))
        return
    compiled = kernel[grid](**arguments)
    if type(compiled) is CompiledKernel:
        if len(_remembered) >= REMEMBERED:
            _remembered.clear()
        _remembered[key] = compiled[(*grid, 1, 1)[:3]], operator.itemgetter(*kernel.arg_names)


def _variant(argument: object) -> object:
    """Return of an argument at least what Triton compiles a kernel for; of a number or a constant that is all of it."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    if isinstance(argument, TensorDescriptor):
        return argument.base.dtype, *argument.block_shape
    if isinstance(argument, tuple):
        return tuple([a if type(a) in PLAIN else _variant(a) for a in argument])
    return argument


def block_count(size: int, block: int) -> int:
    """Return how many blocks hold so many entries; `triton.cdiv` takes 2 us on the host."""
    return -(-size // block)


def _with_inner_stride_1(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _dense(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.contiguous()


def float32_precision() -> str:
    """Return how float32 is multiplied where the library's products are: by one TF32 product, or in full accuracy.

    Full accuracy takes three TF32 products; three of bfloat16 do not reach it. What is read here is also set by
    `torch.set_float32_matmul_precision`, whose getter raises once `fp32_precision` has been set.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


@dataclass(frozen=True, eq=False)
class Operands:
    """The inputs of one sweep as the kernels take them; y is x where a matrix meets itself."""

    x: Tensor
    y: Tensor
    scale: Tensor
    bias: Tensor | None
    x_ids: Tensor | None
    y_ids: Tensor | None
    cutoff: Tensor | None
    term_scale: Tensor | None
    term_offset: Tensor | None
    exponents: tuple[float, ...]
    column_lse: bool
    term: str
    constants: tuple[float, ...]
    keep_equal_ids: bool
    diagonals: int
    self_similarity: bool
    gradient_dtype: torch.dtype  # of dX and dY

    @classmethod
    def of(cls, inputs: Inputs, what: Description) -> Operands:
        """Return the operands of an operator's inputs.

        Raises:
            NotImplementedError: the kernels do not take these exponents.
        """
        exponents = tuple(what.exponents)
        if len(exponents) > 2 or (what.column_lse and exponents not in ((), (1.0,))):
            raise NotImplementedError(
                f"at most two exponents, with columns only 1, not {list(exponents)}; backend='torch' takes any"
            )
        x, x_ids, y = _with_inner_stride_1(inputs.x), _dense(inputs.x_ids), inputs.y
        return cls(
            x=x,
            y=x if y is None else _with_inner_stride_1(y),
            scale=inputs.scale,
            bias=_dense(inputs.bias),
            x_ids=x_ids,
            y_ids=x_ids if y is None else _dense(inputs.y_ids),
            cutoff=_dense(inputs.cutoff),
            term_scale=inputs.term_scale,
            term_offset=_dense(inputs.term_offset),
            exponents=exponents,
            column_lse=what.column_lse,
            term=what.term,
            constants=tuple(what.constants),
            keep_equal_ids=what.keep_equal_ids,
            diagonals=what.diagonals,
            self_similarity=y is None,
            gradient_dtype=x.dtype,
        )

    @property
    def symmetric(self) -> bool:
        """Whether kept pairs, logits and terms are the same for (i, j) and (j, i)."""
        return self.self_similarity and self.bias is None and self.cutoff is None and self.term_offset is None

    @property
    def soft(self) -> bool:
        """Whether there is a log-sum-exp."""
        return bool(self.exponents) or self.column_lse

    @property
    def large_epilogue(self) -> bool:
        """Whether the epilogue holds more than one pair of vectors per side of the tile, or a second tile of slopes."""
        mixed = (self.soft and self.term != "") or self.term == "distance_hinge"
        return len(self.exponents) > 1 or self.bias is not None or self.cutoff is not None or mixed

    @property
    def large_safe_epilogue(self) -> bool:
        """The same beside a running maximum, where halves of ids take too many registers as well."""
        return self.large_epilogue or self.diagonals == PLACES

    @property
    def precision(self) -> str:
        """How tl.dot multiplies float32; of no effect on half precision. AMD has float32 matrix instructions."""
        if self.x.dtype != torch.float32 or not self.x.is_cuda or torch.version.hip:
            return "ieee"
        return float32_precision()

    def numbers(self) -> Numbers:
        """Return the kernels' numbers, all of them floats: kernels are compiled for the type of a number."""
        exponents, constants = (*self.exponents, 1.0, 1.0), (*self.constants, 0.0, 0.0)
        return Numbers(*map(float, (*exponents[:2], *constants[:2])))

    def flags(self) -> Flags:
        """Return what the kernels are compiled for."""
        return Flags(
            Q=len(self.exponents),
            COLUMN_LSE=self.column_lse,
            TERM=self.term,
            BIASED=self.bias is not None,
            SHIFTED=self.term_offset is not None,
            IDS=self.x_ids is not None,
            KEEP_EQUAL_IDS=self.keep_equal_ids,
            DIAGONALS=self.diagonals,
            CUT=self.cutoff is not None,
            PRECISION=self.precision,
        )

    def largest_similarity(self) -> Tensor:
        """Return a bound of |s|, the product of the largest norms; on the device, as all that depends on values."""
        x = _largest(torch.linalg.vector_norm(self.x, dim=1, dtype=torch.float32))
        return x * (
            x if self.self_similarity else _largest(torch.linalg.vector_norm(self.y, dim=1, dtype=torch.float32))
        )


def _largest(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, torch.inf) if v.numel() else v.new_zeros(())


def _largest_slope(operands: Operands) -> Tensor | float:
    """Return a bound of |phi'|, for a distance times its own; 1 holds for all terms that do not grow with s."""
    if operands.term == "student":
        return operands.constants[0]
    if operands.term == "distance_hinge":
        return 1e6
    if operands.term not in ("square", "gaussian"):
        return 1.0
    v = operands.largest_similarity()
    if operands.term_scale is not None:
        v = v * operands.term_scale.abs()
    if operands.term_offset is not None:
        v = v + _largest(operands.term_offset)
    if operands.term == "square":
        return 2 * v
    t = operands.constants[0]
    return 2 * abs(t) * torch.exp(2 * abs(t) * v - 2 * t)


def scores_of(operands: Operands, values: Tensor) -> Scores:
    """Return saved values, or those to be filled, with their quanta; the quanta of a row that is not finite are NaN."""
    if values.dtype == torch.float32:
        return Scores(values, None, None)
    x_norm, y_norm = (
        torch.linalg.vector_norm(features, dim=1, dtype=torch.float32).nan_to_num(torch.nan, torch.nan)
        for features in (operands.x, operands.y)
    )
    return Scores(values, x_norm / STEPS, y_norm)


def score_store(scores: Scores | None) -> ScoreStore:
    """Return where to save similarities; the inverse is 0 of quanta that are 0 or NaN."""
    if scores is None:
        return ScoreStore(None, None, None)
    inverses = (None if q is None else torch.where(q > 0, 1 / q, 0.0) for q in (scores.x_quantum, scores.y_quantum))
    return ScoreStore(scores.matrix, *inverses)


@dataclass(frozen=True, eq=False)
class PackedVectors:
    """The vectors of a backward sweep, packed for the tiles, and the power of two that its weights carry."""

    rows: Tensor  # (PACKED_ROWS, stride)
    columns: Tensor  # (PACKED_ROWS, stride)
    grad_scale: Tensor | None  # None for 1
    center: Tensor | None  # of `_center_bwd_kernel`, if one exponential may serve two statistics

    @classmethod
    def of(cls, operands: Operands, upstream: Upstream, centered: bool) -> PackedVectors:
        """Pack what flows back; `centered` if one exponential may serve the statistics of two sides."""
        grad_scale = gradient_scale(operands, upstream)
        center = upstream.row_lse.new_empty(CENTER_SIZE) if centered else None
        rows, columns = pack_bwd(operands, upstream, grad_scale, center)
        return cls(rows, columns, grad_scale, center)

    def product_factor(self, operands: Operands) -> Tensor | float:
        """Return `epilogue.weight_factor` for the products that a library makes."""
        factor: Tensor | float = 1.0 if self.grad_scale is None else 1.0 / self.grad_scale
        if operands.soft and not operands.term:
            factor = operands.scale * factor
        if operands.term and not operands.soft and operands.term_scale is not None:
            factor = operands.term_scale * factor
        return factor


def gradient_scale(operands: Operands, upstream: Upstream) -> Tensor | None:
    """Return a power of two that brings the largest weight below 2^14; None for 1.

    float16 holds neither 1 / N^2 nor more than 65504. No softmax probability exceeds 1 and no slope its bound, so the
    incoming gradients bound the weights.
    """
    if operands.x.dtype != torch.float16 or not (operands.soft or operands.term):
        return None
    # No sum with 0 and no product with 1: each is a launch.
    bounds = []
    if operands.soft:
        soft = [_largest(upstream.grad_col_lse)] if upstream.grad_col_lse.numel() else []
        for exponent, grad in zip(operands.exponents, upstream.grad_row_lse, strict=True):
            largest = _largest(grad)
            soft.append(largest if abs(exponent) == 1 else abs(exponent) * largest)
        total = functools.reduce(torch.add, soft)
        bounds.append(total * operands.scale.abs() if operands.term else total)
    if operands.term:
        slope = _largest(upstream.grad_row_sum) * _largest_slope(operands)
        if operands.soft and operands.term_scale is not None:
            slope = slope * operands.term_scale.abs()
        bounds.append(slope)
    bound = functools.reduce(torch.add, bounds)
    if operands.self_similarity:
        bound = 2 * bound  # x against itself adds the weights of both roles
    return torch.exp2(14 - bound.clamp(min=2.0**-100).log2().ceil())


def pack_bwd(
    operands: Operands, upstream: Upstream, grad_scale: Tensor | None, center: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the vectors of the rows and of the columns, each (PACKED_ROWS, size padded to whole tiles).

    Fill the center, (CENTER_SIZE,).
    """
    row_lse, col_lse = upstream.row_lse.contiguous(), upstream.col_lse.contiguous()
    n, m = operands.x.shape[0], operands.y.shape[0]
    rows, columns = (
        operands.x.new_empty((PACKED_ROWS, tiles.round_up(size, tiles.ALIGNMENT)), dtype=torch.float32)
        for size in (n, m)
    )
    of_columns = operands.column_lse or operands.bias is not None
    size = max(rows.shape[1], columns.shape[1]) if of_columns else rows.shape[1]
    together = n + m <= CENTER_TOGETHER
    of_center = dict(Q=len(operands.exponents), COLUMN_LSE=operands.column_lse)
    if center is not None and not together:
        launch_kernel(
            _center_bwd_kernel,
            (1,),
            row_lse=row_lse,
            col_lse=col_lse,
            center=center,
            N=n,
            M=m,
            **of_center,
            BN=CENTER_ROWS,
            num_warps=CENTER_WARPS,
        )
    launch_kernel(
        _pack_bwd_kernel,
        (size // tiles.ALIGNMENT, 2 if of_columns else 1),
        row_lse=row_lse,
        row_grad=upstream.grad_row_lse.contiguous(),
        grad_sum=upstream.grad_row_sum.contiguous() if operands.term else None,
        offset=operands.term_offset,
        cutoff=operands.cutoff,
        col_lse=col_lse,
        col_grad=upstream.grad_col_lse.contiguous(),
        bias=operands.bias,
        grad_scale=grad_scale,
        center=center,
        rows=rows,
        columns=columns,
        N=n,
        M=m,
        row_stride=rows.shape[1],
        col_stride=columns.shape[1],
        **of_center,
        FIND_CENTER=center is not None and together,
        BN=tiles.ALIGNMENT,
        BC=CENTER_ROWS_TOGETHER,
    )
    return rows, columns


def tiles_of(x: Tensor, height: int, tile: tiles.Tile) -> TensorDescriptor | None:
    """Return x as a descriptor of tiles of `height` rows, which the hardware loads and pads with zeros, or None.

    None, so that the kernel takes pointers: the tile gains nothing by descriptors, or the first row or the distance
    between rows is not aligned to 16 bytes.
    """
    (n, d), stride = x.shape, x.stride(0)
    aligned = x.data_ptr() % 16 == 0 and stride > 0 and stride * x.element_size() % 16 == 0
    if not tile.takes_descriptors(d) or not x.numel() or not aligned:
        return None
    return TensorDescriptor(x, [n, d], [stride, 1], [height, tile.blocks(d)["BD"]])


def processors(x: Tensor) -> int:
    """Return the multiprocessors (compute units) of x's device; 2 in the interpreter, so that work gets split."""
    return _processors(x.device) if x.is_cuda else 2


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def splits_of(blocks: int, others: int, x: Tensor) -> int:
    """Return into how many programs to cut the walk over the other blocks, so that two per processor start."""
    blocks = max(1, blocks)
    wanted = (2 * processors(x) + blocks - 1) // blocks
    return max(1, min(others, wanted))
