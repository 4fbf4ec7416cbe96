"""The backward sweep through chunks of G, for D beyond what `grad` holds in registers, and for saved scores.

A chunk of rows of G = dL/dS is written once, in the dtype of the features, by a GEMM whose epilogue is that of every
kernel; the library's GEMMs make dX = G Y and dY += G^T X of it, accumulating in float32. For x against itself the
chunk holds W = G + G^T: its product is the finished dX, or, as W is symmetric, a chunk begins at its own first column
and serves the rows below it too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastive_kernels.engine.backends.triton import backward as registers
from contrastive_kernels.engine.backends.triton import tiles, tune
from contrastive_kernels.engine.backends.triton.epilogue import (
    load_columns,
    load_ids,
    load_operand,
    load_rows,
    load_scores,
    similarity,
    term_base,
    tile_grad,
    weight_factor,
)  # fmt: skip
from contrastive_kernels.engine.backends.triton.launch import Packed, Scores, Sweep, processors, tiles_of
from contrastive_kernels.engine.limits import workspace_limit

# Row blocks that one column block is visited by before the next: the grouped order that keeps tiles in L2.
GROUP = 8

# The side of a library's tile of a product.
PRODUCT_TILE = 128

# What comes as a share per row and column block, in the order of the kernel's arguments.
SHARES = ("scale", "term_scale", "term_offset", "total")


@triton.jit
def _weights_bwd_kernel(
    x, y, x_tiles, y_tiles, x_ids, y_ids, scores, x_unit, y_unit, row_stats, col_stats, scale, term_scale, unit,
    g, d_scale, d_term_scale, d_term_offset, total,
    first, last, first_column, M, stride_x, stride_y, stride_g, row_stride, col_stride,
    exponent_0, exponent_1, constant_0, constant_1,
    D: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
    AS_COLUMNS: tl.constexpr, Q: tl.constexpr, COLUMNS: tl.constexpr, TERM: tl.constexpr,
    BIASED: tl.constexpr, SHIFTED: tl.constexpr, IDS: tl.constexpr, SAME: tl.constexpr, DIAGONAL: tl.constexpr,
    CUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the weights of rows first to last and columns from first_column on, x acting as the sweep's rows and,
    AS_COLUMNS, as its columns too.

    d_scale, d_term_scale, d_term_offset and total are (column blocks, rows of the chunk): shares to be added up.
    x_tiles and y_tiles, if not None, are x and y as descriptors of tiles.
    """
    blocks_n, blocks_m = tl.cdiv(last - first, BN), tl.cdiv(M - first_column, BM)
    i_tile = tl.program_id(0)
    i_n, i_m = tl.swizzle2d(i_tile // blocks_m, i_tile % blocks_m, blocks_n, blocks_m, GROUP)
    o_g = i_n.to(tl.int64) * BN + tl.arange(0, BN)
    column = first_column + i_m.to(tl.int64) * BM
    o_n, o_m, o_d = first + o_g, column + tl.arange(0, BM), tl.arange(0, BD)
    m_n = o_n < last
    b_scale, b_term_scale = tl.load(scale), 1.0
    if term_scale is not None:
        b_term_scale = tl.load(term_scale)
    if scores is not None:
        b_s = load_scores(scores, x_unit, y_unit, o_n, o_m, last, M)
    else:
        i_x, i_y = first + i_n * BN, first_column + i_m * BM
        b_x = load_operand(x, x_tiles, i_x, 0, o_n, o_d, last, stride_x, D)
        b_y = load_operand(y, y_tiles, i_y, 0, o_m, o_d, M, stride_y, D)
        b_s = similarity(
            x, y, b_x, b_y, o_n, o_m, last, M, stride_x, stride_y, D, BD, PRECISION, x_tiles, y_tiles, i_x, i_y
        )
    b_g, b_soft, _, b_slope, b_value = tile_grad(
        b_s,
        load_rows(row_stats, o_n, row_stride, (0.0, 0.0), 0, Q, TERM, SHIFTED, CUT, False),
        load_columns(col_stats, o_n, col_stride, (0.0, 0.0), 0, COLUMNS, BIASED, False) if AS_COLUMNS else None,
        load_ids(x_ids, o_n, last, 0, IDS),
        first + i_n * BN, row_stats, col_stats, (0.0, 0.0), y_ids, column, M, row_stride, col_stride,
        b_scale, b_term_scale, exponent_0, exponent_1, constant_0, constant_1,
        True, AS_COLUMNS, Q, COLUMNS, TERM, BIASED, SHIFTED, IDS, SAME, DIAGONAL, CUT, False,
    )  # fmt: skip
    b_undo = weight_factor(unit, 1.0, 1.0, False, "")
    if g is not None:
        m_g = m_n[:, None] & (o_m < M)[None, :]
        tl.store(g + o_g[:, None] * stride_g + o_m[None, :], b_g.to(g.dtype.element_ty), mask=m_g)
    o_share = i_m.to(tl.int64) * (last - first) + o_g
    if d_scale is not None:
        tl.store(d_scale + o_share, tl.sum(b_soft * b_s, 1) * b_undo, mask=m_n)
    if d_term_scale is not None:
        tl.store(d_term_scale + o_share, tl.sum(b_slope * term_base(b_s, TERM), 1) * b_undo, mask=m_n)
    if d_term_offset is not None:
        tl.store(d_term_offset + o_share, tl.sum(b_slope, 1) * b_undo, mask=m_n)
    if total is not None:
        tl.store(total + o_share, tl.sum(b_value, 1) * b_undo, mask=m_n)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b accumulated and returned in float32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda and not torch.version.hip:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in float32."""
    if a.dtype != torch.float32 and a.is_cuda and not torch.version.hip:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def weights_bwd(
    sweep: Sweep, packed: Packed, scores: Scores | None, g: Tensor, first: int, first_column: int, wanted: set[str],
    tile: tiles.Tile,
) -> dict[str, Tensor]:  # fmt: skip
    """Fill g (rows, M), from a column on, with the weights of the rows from `first` on.

    Returns their share of the other gradients.
    """
    x, y, (rows, m) = sweep.x, sweep.y, g.shape
    saved = (None, None, None) if scores is None else (scores.values, scores.x_unit, scores.y_unit)

    def launch(tile: tiles.Tile) -> dict[str, Tensor]:
        blocks_n, blocks_m = triton.cdiv(rows, tile.rows), triton.cdiv(m - first_column, tile.columns)
        shares = {name: x.new_empty((blocks_m, rows), dtype=torch.float32) for name in SHARES if name in wanted}
        _weights_bwd_kernel[(blocks_n * blocks_m,)](
            x, y, tiles_of(x, tile.rows, tile), tiles_of(y, tile.columns, tile), sweep.x_ids, sweep.y_ids, *saved,
            packed.rows, packed.columns, sweep.scale, sweep.term_scale, packed.unit,
            g, *(shares.get(name) for name in SHARES),
            first, first + rows, first_column, m, x.stride(0), y.stride(0), g.stride(0), packed.rows.shape[1],
            packed.columns.shape[1], **sweep.scalars(), D=x.shape[1], **tile.blocks(x.shape[1]), GROUP=GROUP,
            AS_COLUMNS=sweep.self_similarity, **sweep.flags(), **tile.options(),
        )  # fmt: skip
        return shares

    return {name: share.sum(0) for name, share in tune.run(tile, x, launch).items()}


def chunk_rows(most: int, d: int, processors: int) -> int:
    """How many rows a chunk has, about `most`: as many as keep all processors busy while dX = G Y is multiplied.

    That product has the fewest tiles. Taken to be of 128 x 128, one for each processor at a time; untuned.
    """
    tiles_of_rows, tiles_across = triton.cdiv(tiles.ALIGNMENT, PRODUCT_TILE), triton.cdiv(d, PRODUCT_TILE)

    def busy(units: int) -> float:
        count = units * tiles_of_rows * tiles_across
        return count / (triton.cdiv(count, processors) * processors)

    # Half of the limit at least: smaller chunks are read and added to more often.
    units = max(1, most // tiles.ALIGNMENT)
    return tiles.ALIGNMENT * max(range((units + 1) // 2, units + 1), key=lambda u: (round(busy(u), 2), u))


def _is_triangle(sweep: Sweep, wanted: set[str]) -> bool:
    """Whether half of the weights will do.

    Not where shares are those of the part as rows alone, unless x * dX tells them: see ROW_DOT of `grad`.
    """
    told = not (sweep.soft and sweep.term) and sweep.term != "distance_hinge"
    return sweep.self_similarity and not wanted & {"term_offset", "total"} and (told or wanted <= {"x", "bias"})


def backward(sweep: Sweep, packed: Packed, wanted: set[str], scores: Scores | None) -> dict[str, Tensor]:
    """All wanted gradients, x or y among them."""
    x, y, (n, d), m = sweep.x, sweep.y, sweep.x.shape, sweep.y.shape[0]
    gradients = registers.grad_bwd(sweep, packed, False, True, {"bias"}) if "bias" in wanted else {}
    tile = tiles.pick("weights" if scores is None else "saved_weights", x, sweep.heavy or "total" in wanted)
    # The GEMMs want rows of whole 16-byte vectors.
    width = tiles.round_up(m, 8)
    size = chunk_rows(workspace_limit() // max(1, width * x.element_size()), d, processors(x))
    buffer = x.new_empty((min(size, n), width))
    size = max(1, buffer.shape[0])
    triangle = _is_triangle(sweep, wanted)
    shares = set() if triangle else wanted
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums = y.new_zeros((m, d) if triangle or "y" in wanted else (0, d), dtype=torch.float32)
    factor, parts = packed.factor(sweep), []
    for first in range(0, n, size):
        last = min(first + size, n)
        rows, g = slice(first, last), buffer[: last - first, :m]
        parts.append(weights_bwd(sweep, packed, scores, g, first, first if triangle else 0, shares, tile))
        if triangle:
            _add_matmul(sums[rows], g[:, first:], x[first:])
            if last < n:
                _add_matmul(sums[last:], g[:, last:].t(), x[rows])
        elif "x" in wanted:
            torch.mul(_matmul(g, y), factor, out=dx[rows])
        if "y" in wanted:
            _add_matmul(sums, g.t(), x[rows])
    for name in shares.intersection(SHARES):
        rows = torch.cat([part[name] for part in parts])
        gradients[name] = rows if name == "term_offset" else rows.sum()
    if triangle:
        torch.mul(sums, factor, out=dx)
        for name in wanted & {"scale", "term_scale"}:
            # every pair has been met twice
            gradients[name] = 0.5 * (sums * x).sum() / (1.0 if packed.unit is None else packed.unit)
    if "x" in wanted:
        gradients["x"] = dx
    if "y" in wanted:
        gradients["y"] = torch.mul(sums, factor, out=torch.empty_like(y, memory_format=torch.contiguous_format))
    return gradients
