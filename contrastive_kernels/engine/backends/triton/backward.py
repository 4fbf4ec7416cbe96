"""The backward sweep with the gradient in registers: S is recomputed tile by tile, dX = G Y never leaves the program.

dY is the same kernel with the operands exchanged and the owner acting as the sweep's columns; x against itself is one
kernel in both roles, dX = (G + G^T) X. Where the gradient of an operand does not fit in registers `chunk` takes over.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastive_kernels.engine.backends.triton import tiles, tune
from contrastive_kernels.engine.backends.triton.epilogue import (
    FLAG,
    load_columns,
    load_ids,
    load_rows,
    load_tile,
    similarity,
    term_base,
    tile_grad,
    weight_factor,
)  # fmt: skip
from contrastive_kernels.engine.backends.triton.launch import Packed, Sweep, blocks_of, describable, tiles_of

# What comes as a share per row of the owner, in the order of the kernel's arguments, and what of it is to be added up.
SHARES = ("scale", "term_scale", "bias", "term_offset", "total")
SUMS = ("scale", "term_scale", "total")


@triton.jit
def _grad_bwd_kernel(
    x, y, x_tiles, y_tiles, x_ids, y_ids, row_stats, col_stats, center, scale, term_scale, unit,
    dx, d_scale, d_term_scale, d_bias, d_term_offset, total,
    N, M, stride_x, stride_y, stride_dx, row_stride, col_stride,
    exponent_0, exponent_1, constant_0, constant_1,
    D: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    AS_ROWS: tl.constexpr, AS_COLUMNS: tl.constexpr, Q: tl.constexpr, COLUMNS: tl.constexpr, TERM: tl.constexpr,
    BIASED: tl.constexpr, SHIFTED: tl.constexpr, IDS: tl.constexpr, SAME: tl.constexpr, DIAGONAL: tl.constexpr,
    CUT: tl.constexpr, FACTORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of the owner x against all of y. An output that is None is not computed.

    dx (N, D) needs D <= BD. Of the others every row of the owner leaves its share: d_bias is final where it acts as the
    sweep's columns, d_term_offset where it acts as its rows; d_scale, d_term_scale and total are to be added up.
    y_tiles, if not None, is y as a descriptor of tiles, which then needs D <= BD.
    x_tiles, if not None, is x likewise, and row_stats, col_stats and the ids are descriptors too: the loop is then
    specialized, some warps loading while others multiply. It admits neither a ragged last tile nor sums but by dots.
    With a center this program or its twin computes everything: the FACTORED one unless the flag beside it is up.
    """
    SPECIALIZED: tl.constexpr = x_tiles is not None
    centers = (0.0, 0.0)
    if center is not None:
        # read once, or the compiler does not see that two exponentials are the same
        centers = (tl.load(center), tl.load(center + 1))
        flag = tl.load(center + FLAG)
        if FACTORED:
            # without the return, which a specialized loop does not admit, the twin overwrites what is made here
            if not SPECIALIZED and flag != 0.0:
                return
        elif flag == 0.0:
            return
    i_n = tl.program_id(0).to(tl.int64)
    o_n, o_d = i_n * BN + tl.arange(0, BN), tl.arange(0, BD)
    m_n = o_n < N
    b_scale, b_term_scale = tl.load(scale), 1.0
    if term_scale is not None:
        b_term_scale = tl.load(term_scale)
    o_own = tl.program_id(0) * BN if SPECIALIZED else o_n
    own_id = load_ids(x_ids, o_own, N, 0, IDS)
    own_rows = load_rows(row_stats, o_own, row_stride, centers, 0, Q, TERM, SHIFTED, CUT, FACTORED) if AS_ROWS else None
    own_cols = load_columns(col_stats, o_own, col_stride, centers, 0, COLUMNS, BIASED, FACTORED) if AS_COLUMNS else None

    # With one kind of weight, sum_ij w_ij s_ij is <x, w y>: a row dot at the end for a reduction in every tile. Where
    # dx fills the registers, x beside it spills. Not where the term is of something else than s.
    ROW_DOT: tl.constexpr = (
        dx is not None and BD <= 128 and not ((Q > 0 or COLUMNS) and TERM != "") and TERM != "distance_hinge"
    )
    b_dx = tl.zeros([BN, BD], tl.float32)
    b_d_scale, b_d_term_scale = tl.zeros([BN], tl.float32), tl.zeros([BN], tl.float32)
    b_d_bias, b_d_term_offset = tl.zeros([BN], tl.float32), tl.zeros([BN], tl.float32)
    b_total = tl.zeros([BN], tl.float32)
    b_x = x_tiles.load([o_own, 0]) if SPECIALIZED else load_tile(x, o_n, o_d, N, stride_x, D)
    for i_m in tl.range(0, M, BM, warp_specialize=SPECIALIZED):
        o_m = i_m + tl.arange(0, BM).to(tl.int64)
        b_y = y_tiles.load([i_m, 0]) if y_tiles is not None else load_tile(y, o_m, o_d, M, stride_y, D)
        b_s = similarity(x, y, b_x, b_y, o_n, o_m, N, M, stride_x, stride_y, D, BD, PRECISION)
        b_g, b_soft, b_prob, b_slope, b_value = tile_grad(
            b_s, own_rows, own_cols, own_id, i_n * BN, row_stats, col_stats, centers, y_ids, i_m, M,
            row_stride, col_stride, b_scale, b_term_scale, exponent_0, exponent_1, constant_0, constant_1,
            AS_ROWS, AS_COLUMNS, Q, COLUMNS, TERM, BIASED, SHIFTED, IDS, SAME, DIAGONAL, CUT, FACTORED, SPECIALIZED,
        )  # fmt: skip
        if dx is not None:
            b_dx = tl.dot(b_g.to(b_y.dtype), b_y, b_dx, input_precision=PRECISION)
        if d_scale is not None and not ROW_DOT:
            b_d_scale += tl.sum(b_soft * b_s, 1)
        if d_term_scale is not None and not ROW_DOT:
            b_d_term_scale += tl.sum(b_slope * term_base(b_s, TERM), 1)
        if d_bias is not None:
            b_d_bias += tl.sum(b_prob, 1)
        if d_term_offset is not None:
            b_d_term_offset += tl.sum(b_slope, 1)
        if total is not None:
            b_total += tl.sum(b_value, 1)

    b_undo = weight_factor(unit, 1.0, 1.0, False, "")
    m_dx = m_n[:, None] & (o_d < D)[None, :]
    if ROW_DOT:
        # Read again, and in another way: or the compiler keeps b_x in registers throughout the loop.
        p_x = x + o_n[:, None] * stride_x + o_d[None, :]
        b_x = tl.load(p_x, mask=m_dx, other=0.0, eviction_policy="evict_first")
        b_dot = tl.sum(b_dx * b_x.to(tl.float32), 1)
        if AS_ROWS and AS_COLUMNS:
            b_dot *= 0.5  # every pair is met twice
        if TERM == "":
            b_d_scale = b_dot
        else:
            b_d_term_scale = b_dot
    if dx is not None:
        b_dx *= weight_factor(unit, b_scale, b_term_scale, Q > 0 or COLUMNS, TERM)
        tl.store(dx + o_n[:, None] * stride_dx + o_d[None, :], b_dx.to(dx.dtype.element_ty), mask=m_dx)
    if d_scale is not None:
        tl.store(d_scale + o_n, b_d_scale * b_undo, mask=m_n)
    if d_term_scale is not None:
        tl.store(d_term_scale + o_n, b_d_term_scale * b_undo, mask=m_n)
    if d_bias is not None:
        tl.store(d_bias + o_n, b_d_bias * b_undo, mask=m_n)
    if d_term_offset is not None:
        tl.store(d_term_offset + o_n, b_d_term_offset * b_undo, mask=m_n)
    if total is not None:
        tl.store(total + o_n, b_total * b_undo, mask=m_n)


def tile_for(sweep: Sweep, wanted: set[str], specializable: bool = False) -> tiles.Tile | None:
    """The tile with dX in registers; None where it does not fit."""
    return tiles.pick("total" if "total" in wanted else "grad", sweep.x, sweep.heavy, specializable)


def grad_bwd(sweep: Sweep, packed: Packed, rows: bool, columns: bool, wanted: set[str]) -> dict[str, Tensor]:
    """The wanted gradients with x acting as rows, y as columns or x as both; "x" or "y" is that of the owner."""
    x, y, x_ids, y_ids = sweep.x, sweep.y, sweep.x_ids, sweep.y_ids
    if not rows:
        x, y, x_ids, y_ids = y, x, y_ids, x_ids
    (n, d), m, owner = x.shape, y.shape[0], "x" if rows else "y"
    # What a specialized loop takes, see the kernel; heavy epilogues spill in it.
    specializable = (
        owner in wanted and not wanted & {"bias", "term_offset", "total"} and not sweep.heavy
        and m % tiles.SPECIALIZED_SIDE == 0 and all(describable(v) for v in (x, y, x_ids, y_ids) if v is not None)
    )  # fmt: skip
    if owner in wanted:
        tile = tile_for(sweep, wanted, specializable)
    else:
        tile = tiles.pick("weights", x, sweep.heavy or "total" in wanted)
    shapes = {owner: (n, d)} | dict.fromkeys(SHARES, (n,))
    outputs = {
        name: x.new_empty(shape, dtype=x.dtype if name == owner else torch.float32)
        for name, shape in shapes.items()
        if name in wanted
    }

    def launch(tile: tiles.Tile) -> None:
        for factored in (False,) if packed.center is None else (True, False):
            if tile.specialized and packed.center is not None and not factored:
                tile = tile_for(sweep, wanted)  # seldom needed, and two exponentials spill in a specialized loop
            y_tiles = tiles_of(y, tile.columns, tile) if d <= tile.blocks(d)["BD"] else None
            x_tiles, vectors = None, (x_ids, y_ids, packed.rows, packed.columns)
            if tile.specialized:
                x_tiles, vectors = tiles_of(x, tile.rows, tile), tuple(blocks_of(v, tile) for v in vectors)
            _grad_bwd_kernel[(triton.cdiv(n, tile.rows),)](
                x, y, x_tiles, y_tiles, *vectors, packed.center, sweep.scale, sweep.term_scale,
                packed.unit, outputs.get(owner), *(outputs.get(name) for name in SHARES),
                n, m, x.stride(0), y.stride(0), d, packed.rows.shape[1], packed.columns.shape[1], **sweep.scalars(),
                D=d, **tile.blocks(d), AS_ROWS=rows, AS_COLUMNS=columns, **sweep.flags(), FACTORED=factored,
                **tile.options(),
            )  # fmt: skip

    tune.run(tile, x, launch, specializable=specializable and tile.takes_descriptors(d))
    return {name: output.sum() if name in SUMS else output for name, output in outputs.items()}


def backward(sweep: Sweep, packed: Packed, wanted: set[str]) -> dict[str, Tensor]:
    """All wanted gradients, by the fewest launches."""
    if sweep.self_similarity:
        # Without a product or a bias every pair is met in the role of rows already.
        return grad_bwd(sweep, packed, True, bool(wanted & {"x", "bias"}), wanted)
    of_rows, of_columns = wanted & {"x", "term_offset"}, wanted & {"y", "bias"}
    scalars = wanted - of_rows - of_columns
    gradients = {}
    if of_rows or not of_columns:
        gradients |= grad_bwd(sweep, packed, True, False, of_rows | scalars)
        scalars = set()
    if of_columns:
        gradients |= grad_bwd(sweep, packed, False, True, of_columns | scalars)
    return gradients
