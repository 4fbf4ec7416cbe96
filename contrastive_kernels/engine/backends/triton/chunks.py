"""The backward sweep through chunks of G, for D beyond what `backward` holds in registers, and for saved scores.

A chunk of rows and columns of G = dL/dS is written once, in the dtype of the features, by a GEMM with the epilogue of
all kernels. The library's GEMMs add G Y to a strip of dX and G^T X to dY, in float32. For x against itself a chunk
holds W = G + G^T, which is symmetric: the columns before a strip's first row are left out, and the columns after its
last row serve the rows there too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    Value,
)
from contrastive_kernels.engine.backends.triton.epilogue import (
    inverse_of,
    load_block,
    load_center,
    load_columns,
    load_ids,
    load_rows,
    load_scalars,
    load_scores,
    similarity,
    tile_grad,
)
from contrastive_kernels.engine.backends.triton.launch import (
    Operands,
    PackedVectors,
    launch_kernel,
    processors,
    tiles_of,
)
from contrastive_kernels.engine.backends.triton.terms import (
    term_base,
)
from contrastive_kernels.engine.limits import workspace_limit

# Row blocks that one column block is visited by before the next: the grouped order that keeps tiles in L2.
GROUP = 8


class TileShares(NamedTuple):
    """Gradients by column block and row of a chunk, to be added up over the blocks; None is not computed."""

    scale: Pointer | None
    term_scale: Pointer | None
    term_offset: Pointer | None
    total: Pointer | None


class Chunk(NamedTuple):
    """Where a chunk lies in the matrix, and where its weights go; made on the device."""

    first: Value
    last: Value
    first_column: Value
    last_column: Value
    weights: Pointer  # (last - first, last_column - first_column)
    stride: Value
    grad_scale: Pointer | None


@triton.jit
def write_weights(
    i_tile, own, other, scores, packed, scalars, chunk, shares,
    D: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
    AS_COLUMNS: tl.constexpr, FACTORED: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Write one tile of a chunk, and its shares of the other gradients."""
    TERM: tl.constexpr = FLAGS.TERM
    blocks_n = tl.cdiv(chunk.last - chunk.first, BN)
    blocks_m = tl.cdiv(chunk.last_column - chunk.first_column, BM)
    i_n, i_m = tl.swizzle2d(i_tile // blocks_m, i_tile % blocks_m, blocks_n, blocks_m, GROUP)
    o_g = i_n.to(tl.int64) * BN + tl.arange(0, BN)
    row, column = chunk.first + i_n * BN, chunk.first_column + i_m * BM
    # columns in 32 bits, which a tile holds more of: in 64 some epilogues spill
    o_n, o_m, o_d = chunk.first + o_g, column + tl.arange(0, BM), tl.arange(0, BD)
    m_n = o_n < chunk.last
    if scores.matrix is not None:
        b_s = load_scores(scores, o_n, o_m, chunk.last, other.size)
    else:
        own_block = Block(own, row, o_n)
        other_block = Block(other, column, o_m.to(tl.int64))
        b_x = load_block(own_block, 0, o_d, D)
        b_y = load_block(other_block, 0, o_d, D)
        b_s = similarity(own_block, other_block, b_x, b_y, D, BD, FLAGS)
    own_rows = load_rows(packed, o_n, 0, FACTORED, FLAGS)
    own_columns = load_columns(packed, o_n, 0, FACTORED, FLAGS) if AS_COLUMNS else None
    side = Side(row, load_ids(own.ids, o_n, chunk.last, 0, FLAGS.IDS), own_rows, own_columns)
    b_g, b_soft, _, b_slope, b_value = tile_grad(
        b_s, side, other, column.to(tl.int64), packed, scalars, True, AS_COLUMNS, FACTORED, FLAGS
    )
    b_inverse_scale = inverse_of(chunk.grad_scale)
    m_g = m_n[:, None] & (o_m < chunk.last_column)[None, :]
    p_g = chunk.weights - chunk.first_column + o_g[:, None] * chunk.stride + o_m[None, :]
    tl.store(p_g, b_g.to(chunk.weights.dtype.element_ty), mask=m_g)
    o_share = i_m.to(tl.int64) * (chunk.last - chunk.first) + o_g
    if shares.scale is not None:
        tl.store(shares.scale + o_share, tl.sum(b_soft * b_s, 1) * b_inverse_scale, mask=m_n)
    if shares.term_scale is not None:
        b_share = tl.sum(b_slope * term_base(b_s, TERM), 1)
        tl.store(shares.term_scale + o_share, b_share * b_inverse_scale, mask=m_n)
    if shares.term_offset is not None:
        tl.store(shares.term_offset + o_share, tl.sum(b_slope, 1) * b_inverse_scale, mask=m_n)
    if shares.total is not None:
        tl.store(shares.total + o_share, tl.sum(b_value, 1) * b_inverse_scale, mask=m_n)


@triton.jit
def _weights_bwd_kernel(
    x, y, x_tiles, y_tiles, x_ids, y_ids, scores: Scores, row_stats, col_stats, center, scale, term_scale, grad_scale,
    g, shares: TileShares,
    first, last, first_column, last_column, M, stride_x, stride_y, stride_g, row_stride, col_stride, numbers: Numbers,
    D: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
    AS_COLUMNS: tl.constexpr, FACTORED: tl.constexpr, PERSISTENT: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Write the weights of rows `first` to `last` and columns `first_column` to `last_column`, tile by tile.

    x acts as the sweep's rows and, AS_COLUMNS, as its columns too. x_tiles and y_tiles: x and y as descriptors, or
    None. A PERSISTENT program writes tile after tile, loading the next one under the epilogue; others write one.
    With a center this program or its twin computes everything: the FACTORED one unless the center fails.
    """
    centers = (0.0, 0.0)
    if center is not None:
        centers, center_fails = load_center(center)
        if FACTORED:
            if center_fails != 0.0:
                return
        elif center_fails == 0.0:
            return
    scalars = load_scalars(scale, term_scale, numbers)
    packed = Packed(row_stats, col_stats, row_stride, col_stride, centers)
    own = Operand(x, x_tiles, x_ids, last, stride_x)
    other = Operand(y, y_tiles, y_ids, M, stride_y)
    chunk = Chunk(first, last, first_column, last_column, g, stride_g, grad_scale)
    if PERSISTENT:
        blocks = tl.cdiv(last - first, BN) * tl.cdiv(last_column - first_column, BM)
        for i_tile in tl.range(tl.program_id(0), blocks, tl.num_programs(0), flatten=True):
            write_weights(
                i_tile, own, other, scores, packed, scalars, chunk, shares,
                D, BN, BM, BD, GROUP, AS_COLUMNS, FACTORED, FLAGS,
            )  # fmt: skip
    else:
        write_weights(
            tl.program_id(0), own, other, scores, packed, scalars, chunk, shares,
            D, BN, BM, BD, GROUP, AS_COLUMNS, FACTORED, FLAGS,
        )  # fmt: skip


def _add_in_float32(total: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    total.addmm_(a.float(), b.float(), beta=0 if fresh else 1)


def _add_widened(total: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    torch.addmm(total, a, b, beta=0 if fresh else 1, out_dtype=torch.float32, out=total)


def _add_widened_product(total: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    product = torch.mm(a, b, out_dtype=torch.float32)
    total.copy_(product) if fresh else total.add_(product)


def _add_rounded_product(total: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    product = torch.mm(a, b)
    total.copy_(product) if fresh else total.add_(product)


Addition = Callable[[Tensor, Tensor, Tensor, bool], None]


@functools.cache
def _addition_of(dtype: torch.dtype, device: torch.device) -> Addition:
    """Return how products of half precision are added up in float32: the first way that the library takes, tried once.

    Before torch 2.10 `torch.addmm` refuses a float32 total, and some builds for ROCm refuse all products of another
    dtype than their factors. bfloat16 rounds the product of a chunk then; float16 would leave its range.
    """
    last = _add_rounded_product if dtype == torch.bfloat16 else _add_in_float32
    ways: tuple[Addition, ...] = (_add_widened, _add_widened_product, last)
    total, a = (torch.zeros(16, 16, dtype=of, device=device) for of in (torch.float32, dtype))
    for way in ways[:-1]:
        try:
            way(total, a, a, False)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except RuntimeError:
            continue
        return way
    # if nothing works the library lacks more than a dtype, and is asked again by the next call
    last(total, a, a, False)
    return last


def _add_matmul(total: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    """Add a @ b to total in float32, or if `fresh` write it there."""
    add = _addition_of(a.dtype, a.device) if a.is_cuda and a.dtype != torch.float32 else _add_in_float32
    add(total, a, b, fresh)


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
    """Fill g (rows, columns) with the weights from row `first` and column `first_column` on.

    Return their share of the other wanted gradients, by row.
    """
    x, y, (rows, columns) = operands.x, operands.y, g.shape

    def launch(tile: tiles.Tile) -> TileShares:
        row_blocks, column_blocks = triton.cdiv(rows, tile.height), triton.cdiv(columns, tile.width)
        shares = TileShares(
            *(
                x.new_empty((column_blocks, rows), dtype=torch.float32) if name in wanted else None
                for name in TileShares._fields
            )
        )
        blocks = row_blocks * column_blocks
        for factored in (False,) if packed.center is None else (True, False):
            # With a cutoff two programs fit; the twin would spill, and seldom runs.
            persistent = tile.persistent and operands.cutoff is None and (factored or packed.center is None)
            launch_kernel(
                _weights_bwd_kernel,
                (min(blocks, processors(x)) if persistent else blocks,),
                x=x,
                y=y,
                x_tiles=tiles_of(x, tile.height, tile),
                y_tiles=tiles_of(y, tile.width, tile),
                x_ids=operands.x_ids,
                y_ids=operands.y_ids,
                scores=scores or Scores(None, None, None),
                row_stats=packed.rows,
                col_stats=packed.columns,
                center=packed.center,
                scale=operands.scale,
                term_scale=operands.term_scale,
                grad_scale=packed.grad_scale,
                g=g,
                shares=shares,
                first=first,
                last=first + rows,
                first_column=first_column,
                last_column=first_column + columns,
                M=y.shape[0],
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
                FACTORED=factored,
                PERSISTENT=persistent,
                FLAGS=operands.flags(),
                **tile.options(),
            )
        return shares

    shares = tune.run(tile, x, launch)._asdict()
    return {name: share.sum(0) for name, share in shares.items() if share is not None}


def _even_part(size: int, most: int) -> int:
    """Return the size of the fewest parts, about equal, of at most `most` and at least one unit of ALIGNMENT."""
    units = max(1, most // tiles.ALIGNMENT)
    parts = 1 if size <= most else triton.cdiv(size, units * tiles.ALIGNMENT)
    return tiles.round_up(triton.cdiv(size, parts), tiles.ALIGNMENT)


def chunk_shape(n: int, m: int, pairs: int, triangle: bool) -> tuple[int, int]:
    """Return the rows and columns of the chunks of an (n, m) matrix, of at most `pairs` where a unit allows.

    Every strip of c rows reads and writes all of dY, and every k columns the strip of dX unless they are all: 8 D / c
    and 8 D / k bytes a pair. Whole rows of at least half the side of a square move no more than squares do, and a
    longer matrix takes squares. A `triangle` makes the squares on its diagonal twice: it prefers whole rows for longer.
    """
    side, m = math.isqrt(pairs), tiles.round_up(m, 8)
    rows = _even_part(n, pairs // m if m <= (4 if triangle else 2) * side else side)
    return rows, _even_part(m, pairs // min(rows, n))


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
    if not n * m:
        shapes = {"x": (n, d), "y": (m, d), "bias": (m,), "term_offset": (n,)}
        return {name: (x if name in ("x", "y") else packed.rows).new_zeros(shapes.get(name, ())) for name in wanted}
    gradients = registers.grad_bwd(operands, packed, False, True, {"bias"}) if "bias" in wanted else {}
    kernel = "weights" if scores is None else "saved_weights"
    tile = tiles.pick(kernel, x, operands.large_epilogue or "total" in wanted)
    triangle = _is_triangle(operands, wanted)
    shares = set() if triangle else wanted
    height, width = chunk_shape(n, m, workspace_limit() // x.element_size(), triangle)
    # The GEMMs want rows of whole 16-byte vectors.
    buffer = x.new_empty((min(height, n), tiles.round_up(min(width, m), 8)))
    dx = x.new_empty((n, d), dtype=operands.gradient_dtype)
    strip = x.new_empty((len(buffer) if "x" in wanted and not triangle else 0, d), dtype=torch.float32)
    sums = y.new_empty((m if triangle or "y" in wanted else 0, d), dtype=torch.float32)
    factor = packed.product_factor(operands)
    parts: dict[str, list[Tensor]] = {name: [] for name in TileShares._fields if name in shares}
    for first in range(0, n, height):
        last = min(first + height, n)
        of_rows = sums[first:last] if triangle else strip[: last - first]
        for start in range(first if triangle else 0, m, width):
            end = min(start + width, m)
            g = buffer[: last - first, : end - start]
            found = weights_bwd(operands, packed, scores, g, first, start, shares, tile)
            for name, part in parts.items():
                # those of a row are added up over its chunks
                part.append(found[name] if start == 0 else part.pop() + found[name])
            if len(of_rows):
                _add_matmul(of_rows, g, y[start:end], start == 0)
            below = max(start, last) if triangle else start
            if len(sums) and below < end:
                _add_matmul(sums[below:end], g[:, below - start :].t(), x[first:last], first == 0)
        if len(strip):
            torch.mul(of_rows, factor, out=dx[first:last])
    for name, part in parts.items():
        by_row = part[0] if len(part) == 1 else torch.cat(part)
        gradients[name] = by_row if name == "term_offset" else by_row.sum()
    if triangle:
        torch.mul(sums, factor, out=dx)
        for name in wanted & {"scale", "term_scale"}:
            # every pair has been met twice
            gradients[name] = 0.5 * (sums * x).sum() / (1.0 if packed.grad_scale is None else packed.grad_scale)
    if "x" in wanted:
        gradients["x"] = dx
    if "y" in wanted:
        gradients["y"] = torch.mul(sums, factor, out=y.new_empty((m, d), dtype=operands.gradient_dtype))
    return gradients
