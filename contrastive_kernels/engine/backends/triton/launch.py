"""What every launcher needs: the inputs of one sweep, its compile-time flags, scalars and packed vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from contrastive_kernels.engine.backends.triton import tiles
from contrastive_kernels.engine.backends.triton.epilogue import (
    CENTER_SIZE,
    PACKED_ROWS,
    _center_bwd_kernel,
    _pack_bwd_kernel,
)
from contrastive_kernels.engine.spec import Description, Inputs, Upstream

# Elements that the one program of `_center_bwd_kernel` reads at a time.
CENTER_ROWS = 1024

# Of 16 bits, what 1 has in them; a little less than there is, for similarities that rounding has made larger.
STEPS = 32700.0


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _dense(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.contiguous()


@dataclass(frozen=True, eq=False)
class Sweep:
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

    @classmethod
    def of(cls, inputs: Inputs, what: Description) -> Sweep:
        """Return the inputs of an operator as the kernels take them."""
        exponents = tuple(what.exponents)
        if len(exponents) > 2 or (what.column_lse and exponents not in ((), (1.0,))):
            raise NotImplementedError(
                f"at most two exponents, with columns only 1, not {list(exponents)}; backend='torch' takes any"
            )
        rows, x_ids, y = _rows(inputs.x), _dense(inputs.x_ids), inputs.y
        return cls(
            x=rows,
            y=rows if y is None else _rows(y),
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
    def heavy(self) -> bool:
        """Whether the epilogue holds more than one pair of vectors per side of the tile, or a second tile of slopes."""
        mixed = (self.soft and self.term != "") or self.term == "distance_hinge"
        return len(self.exponents) > 1 or self.bias is not None or self.cutoff is not None or mixed

    @property
    def precision(self) -> str:
        """How tl.dot multiplies float32, after `torch.set_float32_matmul_precision`; of no effect on half precision.

        "highest" means float32 accuracy, which three bf16 products do not reach. AMD has float32 matrix instructions.
        """
        if self.x.dtype != torch.float32 or not self.x.is_cuda or torch.version.hip:
            return "ieee"
        return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"

    def scalars(self) -> dict[str, float]:
        """The run-time scalars; those that a flag switches off have some value."""
        exponents, constants = (*self.exponents, 1.0, 1.0), (*self.constants, 0.0, 0.0)
        return dict(exponent_0=exponents[0], exponent_1=exponents[1], constant_0=constants[0], constant_1=constants[1])

    def flags(self) -> dict[str, object]:
        """The compile-time description of the epilogue."""
        return dict(
            Q=len(self.exponents), COLUMNS=self.column_lse, TERM=self.term, BIASED=self.bias is not None,
            SHIFTED=self.term_offset is not None, IDS=self.x_ids is not None, SAME=self.keep_equal_ids,
            DIAGONAL=self.diagonals, CUT=self.cutoff is not None, PRECISION=self.precision,
        )  # fmt: skip

    def largest_similarity(self) -> Tensor:
        """A bound of |s|: the product of the largest norms. On the device, as everything that depends on values."""
        x = torch.linalg.vector_norm(self.x, dim=1, dtype=torch.float32).amax()
        return x * (x if self.self_similarity else torch.linalg.vector_norm(self.y, dim=1, dtype=torch.float32).amax())


def _largest(v: Tensor) -> Tensor:
    return v.abs().amax() if v.numel() else v.new_zeros(())


def _largest_slope(sweep: Sweep) -> Tensor | float:
    """A bound of |phi'|, for a distance times its own; 1 holds for every other term that does not grow with s."""
    if sweep.term == "student":
        return sweep.constants[0]
    if sweep.term == "distance_hinge":
        return 1e6
    if sweep.term not in ("square", "gaussian"):
        return 1.0
    v = sweep.largest_similarity()
    if sweep.term_scale is not None:
        v = v * sweep.term_scale.abs()
    if sweep.term_offset is not None:
        v = v + _largest(sweep.term_offset)
    if sweep.term == "square":
        return 2 * v
    t = sweep.constants[0]
    return 2 * abs(t) * torch.exp(2 * abs(t) * v - 2 * t)


@dataclass(frozen=True, eq=False)
class Scores:
    """The similarities of a sweep, saved for its backward, and their units by row and column, see `store_scores`."""

    values: Tensor  # (N, M): int16, or float32 without units
    x_unit: Tensor | None = None
    y_unit: Tensor | None = None

    @classmethod
    def of(cls, sweep: Sweep, values: Tensor) -> Scores:
        """Values that are or will be those of the sweep."""
        if values.dtype == torch.float32:
            return cls(values)
        x_norm, y_norm = (
            torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).nan_to_num(torch.nan, torch.nan)
            for rows in (sweep.x, sweep.y)
        )
        return cls(values, x_norm / STEPS, y_norm)

    def inverses(self) -> tuple[Tensor | None, Tensor | None]:
        """Of the units; 0 for rows of zeros, and for those that are not finite, whose units are NaN."""
        if self.x_unit is None:
            return None, None
        return tuple(torch.where(unit > 0, 1 / unit, 0.0) for unit in (self.x_unit, self.y_unit))


@dataclass(frozen=True, eq=False)
class Packed:
    """The vectors of a backward sweep, packed for the tiles, and the power of two that its weights carry."""

    rows: Tensor  # (PACKED_ROWS, stride)
    columns: Tensor  # (PACKED_ROWS, stride)
    unit: Tensor | None
    center: Tensor | None  # of `_center_bwd_kernel`, where one exponential may serve two statistics

    @classmethod
    def of(cls, sweep: Sweep, upstream: Upstream, centered: bool) -> Packed:
        """Pack what flows back; `centered` if one exponential may serve the statistics of two sides."""
        grad_row_lse, grad_col_lse, grad_row_sum, row_lse, col_lse = upstream
        unit = gradient_unit(sweep, grad_row_lse, grad_col_lse, grad_row_sum)
        grad_row_sum = grad_row_sum if sweep.term else None
        n, m, none = sweep.x.shape[0], sweep.y.shape[0], col_lse.new_empty(0, 0)
        center = center_bwd(sweep, row_lse, col_lse) if centered else None
        rows = pack_bwd(n, row_lse, grad_row_lse, grad_row_sum, sweep.term_offset, sweep.cutoff, None, unit, center)
        col_lse, grad_col_lse = (col_lse[None], grad_col_lse[None]) if sweep.column_lse else (none, none)
        columns = pack_bwd(m, col_lse, grad_col_lse, None, None, None, sweep.bias, unit, center)
        return cls(rows, columns, unit, center)

    def factor(self, sweep: Sweep) -> Tensor | float:
        """`tile.weight_factor` for the products that a library makes."""
        factor = 1.0 if self.unit is None else 1.0 / self.unit
        if sweep.soft and not sweep.term:
            factor = sweep.scale * factor
        if sweep.term and not sweep.soft and sweep.term_scale is not None:
            factor = sweep.term_scale * factor
        return factor


def gradient_unit(sweep: Sweep, grad_row_lse: Tensor, grad_col_lse: Tensor, grad_row_sum: Tensor) -> Tensor | None:
    """A power of two that brings the largest weight below 2^14: float16 holds neither 1 / N^2 nor more than 65504.

    No softmax probability exceeds 1 and no slope its bound, so the incoming gradients bound the weights.
    """
    if sweep.x.dtype != torch.float16:
        return None
    soft = _largest(grad_col_lse)
    for exponent, grad in zip(sweep.exponents, grad_row_lse, strict=True):
        soft = soft + abs(exponent) * _largest(grad)
    slope = _largest(grad_row_sum) * _largest_slope(sweep) if sweep.term else 0.0
    if sweep.term and sweep.soft:
        soft = soft * sweep.scale.abs()
        slope = slope if sweep.term_scale is None else slope * sweep.term_scale.abs()
    # x against itself adds the weights of both roles.
    bound = (soft + slope) * (2 if sweep.self_similarity else 1)
    return torch.exp2(14 - bound.clamp(min=2.0**-100).log2().ceil())


def center_bwd(sweep: Sweep, row_lse: Tensor, col_lse: Tensor) -> Tensor:
    """(CENTER_SIZE,), see the kernel."""
    center = row_lse.new_empty(CENTER_SIZE)
    _center_bwd_kernel[(1,)](
        row_lse.contiguous(), col_lse.contiguous(), center, sweep.x.shape[0], sweep.y.shape[0],
        Q=len(sweep.exponents), COLUMNS=sweep.column_lse, BN=CENTER_ROWS,
    )  # fmt: skip
    return center


def pack_bwd(n, lse, grad, grad_sum, offset, cutoff, bias, unit, center) -> Tensor:
    """(PACKED_ROWS, n padded to whole tiles), see the kernel; lse and grad are (Q, n)."""
    packed = lse.new_empty((PACKED_ROWS, tiles.round_up(n, tiles.ALIGNMENT)))
    _pack_bwd_kernel[(packed.shape[1] // tiles.ALIGNMENT,)](
        lse.contiguous(), grad.contiguous(), _dense(grad_sum), offset, cutoff, bias, unit, center, packed, n,
        packed.shape[1],
        Q=lse.shape[0], BN=tiles.ALIGNMENT,
    )  # fmt: skip
    return packed


def describable(v: Tensor) -> bool:
    """Whether the hardware takes a descriptor of v, whose inner stride is 1."""
    outer = v.stride()[:-1]
    return v.numel() > 0 and v.data_ptr() % 16 == 0 and all(s > 0 and s * v.element_size() % 16 == 0 for s in outer)


def tiles_of(x: Tensor, side: int, tile: tiles.Tile) -> TensorDescriptor | None:
    """x as a descriptor of tiles of `side` rows, which the hardware loads and fills up with zeros; None: use pointers.

    Pointers where the tile does not gain, or the first row or the distance between rows is not aligned to 16 bytes.
    """
    d = x.shape[1]
    if not tile.takes_descriptors(d) or not describable(x):
        return None
    return TensorDescriptor(x, [x.shape[0], d], [x.stride(0), 1], [side, tile.blocks(d)["BD"]])


def blocks_of(v: Tensor | None, tile: tiles.Tile) -> TensorDescriptor | None:
    """All of v in a row, as a descriptor of blocks of tile.columns."""
    return None if v is None else TensorDescriptor(v.view(-1), [v.numel()], [1], [tile.columns])


def processors(x: Tensor) -> int:
    """Streaming multiprocessors (compute units) of x's device; a few in the interpreter, so that work gets split."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
