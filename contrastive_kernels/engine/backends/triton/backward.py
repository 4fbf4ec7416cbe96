"""The backward sweep with the gradient in registers: S is recomputed tile by tile, dX = G Y never leaves the program.

dY is the same kernel with the operands exchanged and the owner acting as the sweep's columns; x against itself is one
kernel in both roles, dX = (G + G^T) X. `chunks` takes over if an operand's gradient does not fit in registers.

Where there are fewer blocks of the owner than the device takes, several programs share the walk of each, and
`_fold_bwd_kernel` adds up what they leave.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastive_kernels.engine.backends.triton import launch, tiles, tune
from contrastive_kernels.engine.backends.triton.bundles import (
    Block,
    Numbers,
    Operand,
    Packed,
    Pointer,
    Side,
)
from contrastive_kernels.engine.backends.triton.epilogue import (
    inverse_of,
    load_block,
    load_center,
    load_columns,
    load_ids,
    load_rows,
    load_scalars,
    similarity,
    tile_grad,
    weight_factor,
)
from contrastive_kernels.engine.backends.triton.launch import (
    Operands,
    PackedVectors,
    block_count,
    launch_kernel,
    tiles_of,
)
from contrastive_kernels.engine.backends.triton.terms import (
    term_base,
)
from contrastive_kernels.engine.limits import workspace_limit

# The outputs that are to be added up over the rows.
SUMS = ("scale", "term_scale", "total")

# A further program of a walk costs as much as passing so many rows of the other operand, by its start and a partial
# result that is written and read; the kernel that adds up costs as much. Predicted from an H100's bandwidth; untuned.
PROGRAM_ROWS = 512

# Programs per place of the device up to which walks are shared.
ROUNDS = 8

# Elements per program of the kernel that adds up partial results, and how many of these it reads at a time.
FOLD_ELEMENTS, FOLD_SLOTS = 256, 16


class Shares(NamedTuple):
    """Gradients by row of the owner, (N,); None is not computed. Those of `SUMS` are to be added up."""

    scale: Pointer | None
    term_scale: Pointer | None
    bias: Pointer | None
    term_offset: Pointer | None
    total: Pointer | None


@triton.jit
def _grad_bwd_kernel(
    x, y, y_tiles, x_ids, y_ids, row_stats, col_stats, center, scale, term_scale, grad_scale,
    dx, shares: Shares,
    N, M, stride_x, stride_y, stride_dx, row_stride, col_stride, numbers: Numbers,
    D: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    AS_ROWS: tl.constexpr, AS_COLUMNS: tl.constexpr, FACTORED: tl.constexpr, SPLIT: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """Walk from one block of the owner x over all of y. An output that is None is not computed.

    SPLIT: over every `splits`-th block of y alone, of which there are as many at least; the outputs are
    (splits, N, ...) in float32.
    dx (N, D) needs D <= BD. The share of the bias is final if x acts as the sweep's columns, that of the term's offset
    if it acts as the rows. y_tiles, if not None, is y as a descriptor, which then needs D <= BD.
    With a center this program or its twin computes everything: the FACTORED one unless the center fails.
    """
    Q: tl.constexpr = FLAGS.Q
    TERM: tl.constexpr = FLAGS.TERM
    centers = (0.0, 0.0)
    if center is not None:
        # read once: otherwise the compiler does not see that two exponentials are the same
        centers, center_fails = load_center(center)
        if FACTORED:
            if center_fails != 0.0:
                return
        elif center_fails == 0.0:
            return
    i_n = tl.program_id(0).to(tl.int64)
    o_n, o_d = i_n * BN + tl.arange(0, BN), tl.arange(0, BD)
    m_n = o_n < N
    scalars = load_scalars(scale, term_scale, numbers)
    packed = Packed(row_stats, col_stats, row_stride, col_stride, centers)
    own = Side(
        i_n * BN,
        load_ids(x_ids, o_n, N, 0, FLAGS.IDS),
        load_rows(packed, o_n, 0, FACTORED, FLAGS) if AS_ROWS else None,
        load_columns(packed, o_n, 0, FACTORED, FLAGS) if AS_COLUMNS else None,
    )
    other = Operand(y, y_tiles, y_ids, M, stride_y)

    # With one kind of weight, sum_ij w_ij s_ij is <x, w y>: a row dot at the end replaces a reduction in every tile.
    # Not if dx fills the registers, where x beside it spills, and not for terms of a distance.
    ROW_DOT: tl.constexpr = (
        dx is not None and BD <= 128 and not ((Q > 0 or FLAGS.COLUMN_LSE) and TERM != "") and TERM != "distance_hinge"
    )
    b_dx = tl.zeros([BN, BD], tl.float32)
    b_d_scale, b_d_term_scale = tl.zeros([BN], tl.float32), tl.zeros([BN], tl.float32)
    b_d_bias, b_d_term_offset = tl.zeros([BN], tl.float32), tl.zeros([BN], tl.float32)
    b_total = tl.zeros([BN], tl.float32)
    own_block = Block(Operand(x, None, x_ids, N, stride_x), 0, o_n)
    b_x = load_block(own_block, 0, o_d, D)
    first, step = 0, BM
    if SPLIT:
        first, step = tl.program_id(1) * BM, tl.num_programs(1) * BM
        # there are no more programs than blocks; not knowing it, ptxas serializes the products of some tiles (C7515)
        tl.assume(first < M)
    for i_m in range(first, M, step):
        other_block = Block(other, i_m, i_m + tl.arange(0, BM).to(tl.int64))
        b_y = load_block(other_block, 0, o_d, D)
        b_s = similarity(own_block, other_block, b_x, b_y, D, BD, FLAGS)
        b_g, b_soft, b_prob, b_slope, b_value = tile_grad(
            b_s, own, other, i_m, packed, scalars, AS_ROWS, AS_COLUMNS, FACTORED, FLAGS
        )
        if dx is not None:
            b_dx = tl.dot(b_g.to(b_y.dtype), b_y, b_dx, input_precision=FLAGS.PRECISION)
        if shares.scale is not None and not ROW_DOT:
            b_d_scale += tl.sum(b_soft * b_s, 1)
        if shares.term_scale is not None and not ROW_DOT:
            b_d_term_scale += tl.sum(b_slope * term_base(b_s, TERM), 1)
        if shares.bias is not None:
            b_d_bias += tl.sum(b_prob, 1)
        if shares.term_offset is not None:
            b_d_term_offset += tl.sum(b_slope, 1)
        if shares.total is not None:
            b_total += tl.sum(b_value, 1)

    b_inverse_scale = inverse_of(grad_scale)
    m_dx = m_n[:, None] & (o_d < D)[None, :]
    if ROW_DOT:
        # x is read again, in another way: otherwise the compiler keeps b_x in registers throughout the loop
        p_x = x + o_n[:, None] * stride_x + o_d[None, :]
        b_x = tl.load(p_x, mask=m_dx, other=0.0, eviction_policy="evict_first")
        b_dot = tl.sum(b_dx * b_x.to(tl.float32), 1)
        if AS_ROWS and AS_COLUMNS:
            b_dot *= 0.5  # every pair is met twice
        if TERM == "":
            b_d_scale = b_dot
        else:
            b_d_term_scale = b_dot
    o_out = o_n
    if SPLIT:
        o_out += tl.program_id(1).to(tl.int64) * N
    if dx is not None:
        b_dx *= weight_factor(grad_scale, scalars, FLAGS)
        tl.store(dx + o_out[:, None] * stride_dx + o_d[None, :], b_dx.to(dx.dtype.element_ty), mask=m_dx)
    if shares.scale is not None:
        tl.store(shares.scale + o_out, b_d_scale * b_inverse_scale, mask=m_n)
    if shares.term_scale is not None:
        tl.store(shares.term_scale + o_out, b_d_term_scale * b_inverse_scale, mask=m_n)
    if shares.bias is not None:
        tl.store(shares.bias + o_out, b_d_bias * b_inverse_scale, mask=m_n)
    if shares.term_offset is not None:
        tl.store(shares.term_offset + o_out, b_d_term_offset * b_inverse_scale, mask=m_n)
    if shares.total is not None:
        tl.store(shares.total + o_out, b_total * b_inverse_scale, mask=m_n)


@triton.jit
def fold(partial, total, splits, size, BN: tl.constexpr, BS: tl.constexpr):
    """Write to total (size,) the sum of partial (splits, size), in a fixed order; nothing if there is none."""
    if partial is not None:
        o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
        b_total = tl.zeros([BN], tl.float32)
        for i_s in range(0, splits, BS):
            o_s = i_s + tl.arange(0, BS).to(tl.int64)
            m_s = (o_s < splits)[:, None] & (o_n < size)[None, :]
            b_total += tl.sum(tl.load(partial + o_s[:, None] * size + o_n[None, :], mask=m_s, other=0.0), 0)
        tl.store(total + o_n, b_total.to(total.dtype.element_ty), mask=o_n < size)


@triton.jit
def _fold_bwd_kernel(
    dx_partial, partials: Shares, dx, shares: Shares, splits, N, dx_size, BN: tl.constexpr, BS: tl.constexpr
):  # fmt: skip
    """Add up what the programs of `_grad_bwd_kernel` left that shared a walk."""
    fold(dx_partial, dx, splits, dx_size, BN, BS)
    fold(partials.scale, shares.scale, splits, N, BN, BS)
    fold(partials.term_scale, shares.term_scale, splits, N, BN, BS)
    fold(partials.bias, shares.bias, splits, N, BN, BS)
    fold(partials.term_offset, shares.term_offset, splits, N, BN, BS)
    fold(partials.total, shares.total, splits, N, BN, BS)


def _kernel_in_table(wanted: set[str]) -> str:
    return "total" if "total" in wanted else "grad"


def fits_in_registers(operands: Operands, wanted: set[str]) -> bool:
    """Return whether there is a tile with dX in registers."""
    return tiles.find_for(_kernel_in_table(wanted), operands.x, operands.large_epilogue) is not None


@functools.lru_cache(maxsize=1024)
def shares_of_walk(blocks: int, others: int, width: int, places: int, most: int) -> int:
    """Return how many programs, at most `most`, are to share each block's walk so that the last of all ends soonest.

    `blocks` of the owner each walk over `others` blocks of `width` rows; the device runs `places` programs at a time.
    """

    def passed(splits: int) -> int:
        rounds, walk = block_count(blocks * splits, places), block_count(others, splits) * width
        extra = 0 if splits == 1 else PROGRAM_ROWS
        return rounds * (walk + extra) + extra

    most = max(1, min(others, most, ROUNDS * places // max(1, blocks)))
    return min(range(1, most + 1), key=passed)


def grad_bwd(
    operands: Operands, packed: PackedVectors, rows: bool, columns: bool, wanted: set[str]
) -> dict[str, Tensor]:
    """Return the wanted gradients with the owner, x or y, acting as the sweep's rows, its columns or both."""
    x, y, x_ids, y_ids = operands.x, operands.y, operands.x_ids, operands.y_ids
    if not rows:
        x, y, x_ids, y_ids = y, x, y_ids, x_ids
    (n, d), m, owner = x.shape, y.shape[0], "x" if rows else "y"
    if owner in wanted:
        tile = tiles.pick(_kernel_in_table(wanted), x, operands.large_epilogue)
    else:
        tile = tiles.pick("weights", x, operands.large_epilogue or "total" in wanted)

    def outputs(dtype: torch.dtype, *shape: int) -> tuple[Tensor | None, Shares]:
        """Return memory for the gradient of the owner and for the shares."""
        dx = x.new_empty((*shape, n, d), dtype=dtype) if owner in wanted else None
        own = (x.new_empty((*shape, n), dtype=torch.float32) if name in wanted else None for name in Shares._fields)
        return dx, Shares(*own)

    dx, shares = outputs(operands.gradient_dtype)
    numbers, flags = operands.numbers(), operands.flags()

    def run(tile: tiles.Tile) -> None:
        y_tiles = tiles_of(y, tile.width, tile) if d <= tile.blocks(d)["BD"] else None
        blocks, others = block_count(n, tile.height), block_count(m, tile.width)
        places = launch.processors(x) * tile.programs
        partial_bytes = 4 * max(1, n * len(wanted & set(Shares._fields)) + n * d * (owner in wanted))
        splits = shares_of_walk(blocks, others, tile.width, places, workspace_limit() // partial_bytes)
        splits = max(1, min(tiles.splits.get() or splits, others))
        partial = outputs(torch.float32, splits) if splits > 1 else (dx, shares)
        for factored in (False,) if packed.center is None else (True, False):
            launch_kernel(
                _grad_bwd_kernel,
                (blocks, splits),
                x=x,
                y=y,
                y_tiles=y_tiles,
                x_ids=x_ids,
                y_ids=y_ids,
                row_stats=packed.rows,
                col_stats=packed.columns,
                center=packed.center,
                scale=operands.scale,
                term_scale=operands.term_scale,
                grad_scale=packed.grad_scale,
                dx=partial[0],
                shares=partial[1],
                N=n,
                M=m,
                stride_x=x.stride(0),
                stride_y=y.stride(0),
                stride_dx=d,
                row_stride=packed.rows.shape[1],
                col_stride=packed.columns.shape[1],
                numbers=numbers,
                D=d,
                **tile.blocks(d),
                AS_ROWS=rows,
                AS_COLUMNS=columns,
                FACTORED=factored,
                SPLIT=splits > 1,
                FLAGS=flags,
                **tile.options(),
            )
        if splits > 1:
            launch_kernel(
                _fold_bwd_kernel,
                (block_count(n * d if owner in wanted else n, FOLD_ELEMENTS),),
                dx_partial=partial[0],
                partials=partial[1],
                dx=dx,
                shares=shares,
                splits=splits,
                N=n,
                dx_size=n * d,
                BN=FOLD_ELEMENTS,
                BS=FOLD_SLOTS,
            )

    tune.run(tile, x, run)
    gradients = {} if dx is None else {owner: dx}
    for name, share in shares._asdict().items():
        if share is not None:
            gradients[name] = share.sum() if name in SUMS else share
    return gradients


def backward(operands: Operands, packed: PackedVectors, wanted: set[str]) -> dict[str, Tensor]:
    """Return all wanted gradients, by the fewest launches."""
    if operands.self_similarity:
        # Without a product or a bias every pair is met in the role of rows already.
        return grad_bwd(operands, packed, True, bool(wanted & {"x", "bias"}), wanted)
    of_rows, of_columns = wanted & {"x", "term_offset"}, wanted & {"y", "bias"}
    scalars = wanted - of_rows - of_columns
    gradients: dict[str, Tensor] = {}
    if of_rows or not of_columns:
        gradients |= grad_bwd(operands, packed, True, False, of_rows | scalars)
        scalars = set()
    if of_columns:
        gradients |= grad_bwd(operands, packed, False, True, of_columns | scalars)
    return gradients
