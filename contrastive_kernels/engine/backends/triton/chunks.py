"""The backward sweep through chunks of G, for D beyond what `backward` holds in registers, and for saved scores.

A chunk of rows of G = dL/dS is written once, in the dtype of the features, by a GEMM with the epilogue of all kernels.
The library's GEMMs make dX = G Y and dY += G^T X of it, accumulating in float32. For x against itself the chunk holds
W = G + G^T: its product is the finished dX, or, as W is symmetric, a chunk begins at its own first column and serves
the rows below it too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.torch_version import TorchVersion

from contrastive_kernels.engine.backends.triton import backward as registers
from contrastive_kernels.engine.backends.triton import tiles, tune
from contrastive_kernels.engine.backends.triton.bundles import (
    Block,
    Numbers,
    Operand,
    Packed,
    Pointer,
    Scores,
    Side,
)
from contrastive_kernels.engine.backends.triton.epilogue import (
    inverse_of,
    load_block,
    load_columns,
    load_ids,
    load_rows,
    load_scalars,
    load_scores,
    similarity,
    tile_grad,
)
from contrastive_kernels.engine.backends.triton.launch import Operands, PackedVectors, processors, tiles_of
from contrastive_kernels.engine.backends.triton.terms import (
    term_base,
)
from contrastive_kernels.engine.limits import workspace_limit

# Row blocks that one column block is visited by before the next: the grouped order that keeps tiles in L2.
GROUP = 8

# The side of a library's tile of a product.
PRODUCT_TILE = 128

# Before torch 2.10 `torch.addmm` refuses a float32 total of half-precision matrices.
ADDS_TO_FLOAT32 = TorchVersion(torch.__version__) >= "2.10"


class TileShares(NamedTuple):
    """Gradients by column block and row of a chunk, to be added up over the blocks; None is not computed."""

    scale: Pointer | None
    term_scale: Pointer | None
    term_offset: Pointer | None
    total: Pointer | None


@triton.jit
def _weights_bwd_kernel(
    x, y, x_tiles, y_tiles, x_ids, y_ids, scores: Scores, row_stats, col_stats, scale, term_scale, grad_scale,
    g, shares: TileShares,
    first, last, first_column, M, stride_x, stride_y, stride_g, row_stride, col_stride, numbers: Numbers,
    D: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
    AS_COLUMNS: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Write one tile of the weights of rows `first` to `last` and of columns from `first_column` on.

    x acts as the sweep's rows and, AS_COLUMNS, as its columns too. x_tiles and y_tiles: x and y as descriptors, or
    None.
    """
    TERM: tl.constexpr = FLAGS.TERM
    blocks_n, blocks_m = tl.cdiv(last - first, BN), tl.cdiv(M - first_column, BM)
    i_tile = tl.program_id(0)
    i_n, i_m = tl.swizzle2d(i_tile // blocks_m, i_tile % blocks_m, blocks_n, blocks_m, GROUP)
    o_g = i_n.to(tl.int64) * BN + tl.arange(0, BN)
    column = first_column + i_m.to(tl.int64) * BM
    o_n, o_m, o_d = first + o_g, column + tl.arange(0, BM), tl.arange(0, BD)
    m_n = o_n < last
    scalars = load_scalars(scale, term_scale, numbers)
    packed = Packed(row_stats, col_stats, row_stride, col_stride, (0.0, 0.0))
    other = Operand(y, y_tiles, y_ids, M, stride_y)
    if scores.matrix is not None:
        b_s = load_scores(scores, o_n, o_m, last, M)
    else:
        own_block = Block(Operand(x, x_tiles, x_ids, last, stride_x), first + i_n * BN, o_n)
        other_block = Block(other, first_column + i_m * BM, o_m)
        b_x = load_block(own_block, 0, o_d, D)
        b_y = load_block(other_block, 0, o_d, D)
        b_s = similarity(own_block, other_block, b_x, b_y, D, BD, FLAGS)
    own_rows = load_rows(packed, o_n, 0, False, FLAGS)
    own_columns = load_columns(packed, o_n, 0, False, FLAGS) if AS_COLUMNS else None
    own = Side(first + i_n * BN, load_ids(x_ids, o_n, last, 0, FLAGS.IDS), own_rows, own_columns)
    b_g, b_soft, _, b_slope, b_value = tile_grad(
        b_s, own, other, column, packed, scalars, True, AS_COLUMNS, False, FLAGS
    )
    b_inverse_scale = inverse_of(grad_scale)
    if g is not None:
        m_g = m_n[:, None] & (o_m < M)[None, :]
        tl.store(g + o_g[:, None] * stride_g + o_m[None, :], b_g.to(g.dtype.element_ty), mask=m_g)
    o_share = i_m.to(tl.int64) * (last - first) + o_g
    if shares.scale is not None:
        tl.store(shares.scale + o_share, tl.sum(b_soft * b_s, 1) * b_inverse_scale, mask=m_n)
    if shares.term_scale is not None:
        b_share = tl.sum(b_slope * term_base(b_s, TERM), 1)
        tl.store(shares.term_scale + o_share, b_share * b_inverse_scale, mask=m_n)
    if shares.term_offset is not None:
        tl.store(shares.term_offset + o_share, tl.sum(b_slope, 1) * b_inverse_scale, mask=m_n)
    if shares.total is not None:
        tl.store(shares.total + o_share, tl.sum(b_value, 1) * b_inverse_scale, mask=m_n)


def _library_widens(a: Tensor) -> bool:
    """Return whether the library multiplies matrices like a, of half precision, into float32."""
    return a.dtype != torch.float32 and a.is_cuda and not torch.version.hip


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b accumulated and returned in float32."""
    if _library_widens(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to total in float32."""
    if not _library_widens(a):
        total.addmm_(a.float(), b.float())
    elif ADDS_TO_FLOAT32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += _matmul(a, b)


def weights_bwd(
    operands: Operands,
    packed: PackedVectors,
    scores: Scores | None,
    g: Tensor,
    first: int,
    first_column: int,
    wanted: set[str],
    tile: tiles.Tile,
) -> dict[str, Tensor]:
    """Fill g (rows, M), from a column on, with the weights of the rows from `first` on.

    Return their share of the other wanted gradients.
    """
    x, y, (rows, m) = operands.x, operands.y, g.shape

    def launch(tile: tiles.Tile) -> TileShares:
        row_blocks, column_blocks = triton.cdiv(rows, tile.height), triton.cdiv(m - first_column, tile.width)
        shares = TileShares(
            *(
                x.new_empty((column_blocks, rows), dtype=torch.float32) if name in wanted else None
                for name in TileShares._fields
            )
        )
        _weights_bwd_kernel[(row_blocks * column_blocks,)](
            x=x,
            y=y,
            x_tiles=tiles_of(x, tile.height, tile),
            y_tiles=tiles_of(y, tile.width, tile),
            x_ids=operands.x_ids,
            y_ids=operands.y_ids,
            scores=scores or Scores(None, None, None),
            row_stats=packed.rows,
            col_stats=packed.columns,
            scale=operands.scale,
            term_scale=operands.term_scale,
            grad_scale=packed.grad_scale,
            g=g,
            shares=shares,
            first=first,
            last=first + rows,
            first_column=first_column,
            M=m,
            stride_x=x.stride(0),
            stride_y=y.stride(0),
            stride_g=g.stride(0),
            row_stride=packed.rows.shape[1],
            col_stride=packed.columns.shape[1],
            numbers=operands.numbers(),
            D=x.shape[1],
            **tile.blocks(x.shape[1]),
            GROUP=GROUP,
            AS_COLUMNS=operands.self_similarity,
            FLAGS=operands.flags(),
            **tile.options(),
        )
        return shares

    shares = tune.run(tile, x, launch)._asdict()
    return {name: share.sum(0) for name, share in shares.items() if share is not None}


def chunk_rows(most: int, d: int, processors: int) -> int:
    """Return how many rows a chunk has, about `most`: as many as keep all processors busy while dX = G Y is multiplied.

    That product has the fewest tiles. Taken to be of 128 x 128, one for each processor at a time; untuned.
    """
    tiles_of_rows, tiles_across = triton.cdiv(tiles.ALIGNMENT, PRODUCT_TILE), triton.cdiv(d, PRODUCT_TILE)

    def busy(units: int) -> float:
        count = units * tiles_of_rows * tiles_across
        share: float = count / (triton.cdiv(count, processors) * processors)
        return share

    # Half of the limit at least: smaller chunks are read and added to more often.
    units = max(1, most // tiles.ALIGNMENT)
    return tiles.ALIGNMENT * max(range((units + 1) // 2, units + 1), key=lambda u: (round(busy(u), 2), u))


def _is_triangle(operands: Operands, wanted: set[str]) -> bool:
    """Return whether half of the weights will do.

    Not if shares are those of the part as rows alone, unless x * dX has them: see ROW_DOT of `backward`.
    """
    row_dots_suffice = not (operands.soft and operands.term) and operands.term != "distance_hinge"
    return (
        operands.self_similarity
        and not wanted & {"term_offset", "total"}
        and (row_dots_suffice or wanted <= {"x", "bias"})
    )


def backward(operands: Operands, packed: PackedVectors, wanted: set[str], scores: Scores | None) -> dict[str, Tensor]:
    """Return all wanted gradients, x or y among them."""
    x, y, (n, d), m = operands.x, operands.y, operands.x.shape, operands.y.shape[0]
    gradients = registers.grad_bwd(operands, packed, False, True, {"bias"}) if "bias" in wanted else {}
    kernel = "weights" if scores is None else "saved_weights"
    tile = tiles.pick(kernel, x, operands.large_epilogue or "total" in wanted)
    # The GEMMs want rows of whole 16-byte vectors.
    width = tiles.round_up(m, 8)
    # Twice the rows fit in one chunk whatever is chosen; looking further takes longer than a small batch.
    most = min(workspace_limit() // max(1, width * x.element_size()), 2 * tiles.round_up(n, tiles.ALIGNMENT))
    size = chunk_rows(most, d, processors(x))
    buffer = x.new_empty((min(size, n), width))
    size = max(1, buffer.shape[0])
    triangle = _is_triangle(operands, wanted)
    shares = set() if triangle else wanted
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums = y.new_zeros((m, d) if triangle or "y" in wanted else (0, d), dtype=torch.float32)
    factor, parts = packed.product_factor(operands), []
    for first in range(0, n, size):
        last = min(first + size, n)
        rows, g = slice(first, last), buffer[: last - first, :m]
        parts.append(weights_bwd(operands, packed, scores, g, first, first if triangle else 0, shares, tile))
        if triangle:
            _add_matmul(sums[rows], g[:, first:], x[first:])
            if last < n:
                _add_matmul(sums[last:], g[:, last:].t(), x[rows])
        elif "x" in wanted:
            torch.mul(_matmul(g, y), factor, out=dx[rows])
        if "y" in wanted:
            _add_matmul(sums, g.t(), x[rows])
    for name in shares.intersection(TileShares._fields):
        by_row = torch.cat([part[name] for part in parts])
        gradients[name] = by_row if name == "term_offset" else by_row.sum()
    if triangle:
        torch.mul(sums, factor, out=dx)
        for name in wanted & {"scale", "term_scale"}:
            # every pair has been met twice
            gradients[name] = 0.5 * (sums * x).sum() / (1.0 if packed.grad_scale is None else packed.grad_scale)
    if "x" in wanted:
        gradients["x"] = dx
    if "y" in wanted:
        gradients["y"] = torch.mul(sums, factor, out=torch.empty_like(y, memory_format=torch.contiguous_format))
    return gradients
