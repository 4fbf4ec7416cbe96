"""The forward sweep: log-sum-exps of rows and columns, sums of a term, maxima.

Fast path
    When: a pair's exponential serves a row and a column, because both log-sum-exps are wanted or the matrix is
    symmetric, and there is one exponent of 1 and no bias, term or maximum.
    How: `_sums_fwd_kernel` computes one exponential per pair and adds it to the sums of its row and of its column. One
    constant shifts all logits. It follows from a bound of |logit|, the product of the largest norms and the scale: no
    exponential exceeds 2^100, so no sum overflows.
    How it fails: exponentials below 2^-126 are flushed, which loses a row or column whose logits all lie far below 0 at
    a very low temperature. `_fold_fwd_kernel` sets `shift_failed` on the device for these and for sums that are not
    finite; nothing is read back to the host.

Safe path
    In all other cases, and behind the fast path: `safe_forward`.

See docs/gpu.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastive_kernels.engine.backends.triton import tiles, tune
from contrastive_kernels.engine.backends.triton.bundles import (
    Block,
    Operand,
    Pairs,
    Scores,
    ScoreStore,
    ln2,
    log2e,
)
from contrastive_kernels.engine.backends.triton.epilogue import (
    exclude,
    load_block,
    load_ids,
    load_tile,
    load_vector,
    similarity,
    store_scores,
)
from contrastive_kernels.engine.backends.triton.launch import (
    Operands,
    block_count,
    launch_kernel,
    processors,
    score_store,
    splits_of,
    tiles_of,
)
from contrastive_kernels.engine.backends.triton.rows import block_sizes
from contrastive_kernels.engine.backends.triton.safe_forward import safe_again_fwd, safe_sums_fwd
from contrastive_kernels.engine.limits import workspace_limit

# Elements per program, and partial results read at a time, of the kernel that adds up.
FOLD_ROWS, FOLD_SLOTS = 64, 32


@triton.jit
def largest_norm(square, NORMS: tl.constexpr):
    """Return the norm whose square `_largest_norm_fwd_kernel` has left in parts."""
    # A warp at a time: a maximum over all warps costs registers in the whole kernel, and an occupancy.
    LANES: tl.constexpr = 32 if NORMS > 32 else NORMS
    b_bits = tl.zeros([LANES], tl.int32)
    for i_part in tl.static_range(0, NORMS, LANES):
        b_bits = tl.maximum(b_bits, tl.load(square + i_part + tl.arange(0, LANES)))
    return tl.sqrt(tl.max(b_bits, 0).to(tl.float32, bitcast=True))


@triton.jit
def bound_and_shift(scale, x_square, y_square, NORMS: tl.constexpr):
    """Return a bound of |logit|, and the shift for it: none while logits are safe as they are, the most accurate."""
    b_norms = largest_norm(x_square, NORMS) * largest_norm(y_square, NORMS)
    b_bound = tl.abs(tl.load(scale)) * log2e() * b_norms
    # exponentials up to 2^100, of which 2^26 may be added
    LARGEST_EXPONENT: tl.constexpr = 100.0
    return b_bound, tl.maximum(b_bound - LARGEST_EXPONENT, 0.0)


@triton.jit
def square_bits(x, first, step, N, stride, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """Return the bits of max ||x_n||^2 over every `step`-th block: from 0 on floats are ordered as these, NaN above."""
    b_bits = tl.zeros([BN], tl.int32)
    for i_block in range(first, tl.cdiv(N, BN), step):
        o_n, o_d = i_block * BN + tl.arange(0, BN).to(tl.int64), tl.arange(0, BD)
        b_square = tl.zeros([BN], tl.float32)
        for i_d in range(0, D, BD):
            b_x = load_tile(x, o_n, i_d + o_d, N, stride, D).to(tl.float32)
            b_square += tl.sum(b_x * b_x, 1)
        b_bits = tl.maximum(b_bits, b_square.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return tl.max(b_bits, 0)


@triton.jit
def _largest_norm_fwd_kernel(
    x, y, square, shift_failed, N, M, stride_x, stride_y, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Write into square (2, programs) the bits of the largest squared norm of a part of x, and of y; clear the flag."""
    i_part, parts = tl.program_id(0), tl.num_programs(0)
    if tl.program_id(1) == 0:
        tl.store(square + i_part, square_bits(x, i_part, parts, N, stride_x, D, BN, BD))
        if i_part == 0:
            tl.store(shift_failed, 0)
    else:
        tl.store(square + parts + i_part, square_bits(y, i_part, parts, M, stride_y, D, BN, BD))


@triton.jit
def _sums_fwd_kernel(
    x, y, x_tiles, y_tiles, x_ids, y_ids, scale, cutoff, x_square, y_square, store: ScoreStore,
    row_partial, col_partial,
    first_block, N, M, stride_x, stride_y,
    D: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, TRIANGLE: tl.constexpr,
    PAIR_SUM: tl.constexpr, NORMS: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Sum exp2(logit - shift): a program keeps a block of columns and visits every `splits`-th block of rows.

    row_partial (slots, N) has a row per column block from first_block on, col_partial (splits, M). TRIANGLE, for
    symmetric pairs and BN = BM: only row blocks up to the diagonal, where the row sums are complete by themselves.
    x_square and y_square: the bits of the largest squared norms of NORMS parts. x_tiles and y_tiles: x and y as
    descriptors, or None.
    """
    i_slot, i_split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    blocks = tl.cdiv(N, BN)
    if TRIANGLE:
        # the longest first
        i_slot = tl.num_programs(0) - 1 - i_slot
        blocks = first_block + i_slot.to(tl.int32) + 1
    i_m = (first_block + i_slot.to(tl.int32)) * BM
    o_m, o_d = i_m + tl.arange(0, BM).to(tl.int64), tl.arange(0, BD)
    b_scale = tl.load(scale) * log2e()
    _, b_shift = bound_and_shift(scale, x_square, y_square, NORMS)
    columns = Block(Operand(y, y_tiles, y_ids, M, stride_y), i_m, o_m)
    b_y = load_block(columns, 0, o_d, D)
    column_ids = load_ids(y_ids, o_m, M, 1, FLAGS.IDS)
    width = tl.minimum(M - i_m, BM)
    # Adding rows r and r + 8 first halves the accumulator where a thread holds both.
    b_col = tl.zeros([BN // 16, 8, BM] if PAIR_SUM else [BN, BM], tl.float32)
    for i_block in range(i_split, blocks, splits):
        i_n = i_block * BN
        o_n = i_n + tl.arange(0, BN).to(tl.int64)
        rows = Block(Operand(x, x_tiles, x_ids, N, stride_x), i_n, o_n)
        b_x = load_block(rows, 0, o_d, D)
        b_s = similarity(rows, columns, b_x, b_y, D, BD, FLAGS)
        if store.matrix is not None:
            store_scores(store, b_s, o_n, o_m, N, M)
        row_ids = load_ids(x_ids, o_n, N, 0, FLAGS.IDS)
        b_cutoff = load_vector(cutoff, o_n, N, 0) if FLAGS.CUT else 0.0
        b_u = b_s * b_scale - b_shift
        b_u = exclude(b_u, b_s, Pairs(row_ids, column_ids, i_m - i_n, M), b_cutoff, float("-inf"), FLAGS)
        # Zeros loaded outside would be logits of 0. Uniform branch, taken only by ragged tiles. A mask of the columns
        # alone would be the same in every tile, and be held in registers all the time.
        if (i_n + BN > N) | (width < BM):
            b_width = tl.where(o_n < N, width, 0)
            b_u = tl.where(tl.arange(0, BM)[None, :] < b_width[:, None], b_u, float("-inf"))
        b_e = tl.exp2(b_u)
        b_pair = tl.sum(tl.reshape(b_e, [BN // 16, 2, 8, BM]), 1) if PAIR_SUM else b_e
        if TRIANGLE:
            if i_n != i_m:
                b_col += b_pair
        else:
            b_col += b_pair
        tl.store(row_partial + i_slot * N + o_n, tl.sum(b_e, 1), mask=o_n < N)
    if PAIR_SUM:
        b_col = tl.reshape(b_col, [BN // 2, BM])
    tl.store(col_partial + i_split * M + o_m, tl.sum(b_col, 0), mask=o_m < M)


@triton.jit
def add_slots(b_total, partial, slots, first_block, o_n, N, BLOCK: tl.constexpr, BS: tl.constexpr):
    """Return b_total and the sum of partial (slots, N) in a fixed order.

    With a BLOCK slot k is of column block first_block + k, and has entries up to the end of that block only.
    """
    m_n = o_n < N
    for i_s in range(0, slots, BS):
        o_s = i_s + tl.arange(0, BS).to(tl.int64)
        m_p = (o_s < slots)[:, None] & m_n[None, :]
        if BLOCK:
            m_p = m_p & ((first_block + o_s)[:, None] >= (o_n // BLOCK)[None, :])
        b_total += tl.sum(tl.load(partial + o_s[:, None] * N + o_n[None, :], mask=m_p, other=0.0), 0)
    return b_total


@triton.jit
def finish(b_total, lse, shift_failed, b_bound, b_shift, terms, o_n, N):
    """Write the log-sum-exps of sums of so many terms, and set shift_failed if in doubt."""
    m_n = o_n < N
    # Exponentials below 2^-126 are flushed. If that of the least possible logit would be, the sum has to be 2^20
    # times what `terms` of them can amount to. An empty sum is then in doubt too.
    b_floor = tl.where(b_bound + b_shift <= 126.0, 0.0, terms * 2.0**-106)
    m_sure = (b_total >= b_floor) & (b_total < float("inf"))
    if tl.max((m_n & (m_sure == 0)).to(tl.int32), 0) > 0:
        tl.store(shift_failed, 1)
    tl.store(lse + o_n, (tl.log2(b_total) + b_shift) * ln2(), mask=m_n)


@triton.jit
def _fold_fwd_kernel(
    row_partial, col_partial, row_total, row_lse, col_lse, shift_failed, scale, x_square, y_square,
    slots, splits, first_block, N, M,
    BLOCK: tl.constexpr, ACCUMULATE: tl.constexpr, LAST: tl.constexpr, NORMS: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr,
):  # fmt: skip
    """row_total (+)= row_partial (slots, N); if LAST finish the rows, and by other programs the columns.

    With a BLOCK, for symmetric pairs, a row's sum goes on in the column sums: those above the diagonal are the row
    sums below it. col_lse is then row_lse again, or None.
    """
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    b_total = tl.zeros([BN], tl.float32)
    if LAST:
        b_bound, b_shift = bound_and_shift(scale, x_square, y_square, NORMS)
    if tl.program_id(1) == 0:
        if ACCUMULATE:
            b_total += tl.load(row_total + o_n, mask=o_n < N, other=0.0)
        b_total = add_slots(b_total, row_partial, slots, first_block, o_n, N, BLOCK, BS)
        if LAST:
            if BLOCK:
                b_total = add_slots(b_total, col_partial, splits, 0, o_n, N, 0, BS)
                if col_lse is not None:
                    finish(b_total, col_lse, shift_failed, b_bound, b_shift, M, o_n, N)
            finish(b_total, row_lse, shift_failed, b_bound, b_shift, M, o_n, N)
        else:
            tl.store(row_total + o_n, b_total, mask=o_n < N)
    elif LAST and not BLOCK:
        b_total = add_slots(b_total, col_partial, splits, 0, o_n, M, 0, BS)
        finish(b_total, col_lse, shift_failed, b_bound, b_shift, N, o_n, M)


def largest_norm_fwd(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the parts of the largest squared norms of x and of y, see `_largest_norm_fwd_kernel`, and a 0 as flag."""
    # As many parts as keep the device busy, a power of two: each program that needs the maximum reads all.
    parts, itself = 1 << (processors(x) - 1).bit_length(), x is y
    state = torch.empty((1 if itself else 2) * parts + 1, dtype=torch.int32, device=x.device)
    launch_kernel(
        _largest_norm_fwd_kernel,
        (parts, 1 if itself else 2),
        x=x,
        y=y,
        square=state,
        shift_failed=state[-1:],
        N=x.shape[0],
        M=y.shape[0],
        stride_x=x.stride(0),
        stride_y=y.stride(0),
        D=x.shape[1],
        **block_sizes(x.shape[1]),
    )
    return state[:parts], state[:parts] if itself else state[parts:-1], state[-1:]


def sums_fwd(operands: Operands, row_lse: Tensor, col_lse: Tensor | None, scores: Scores | None) -> None:
    """Fill row_lse (N,), col_lse (M,) unless it is None, and the scores, by the fast path.

    One exponential serves a pair, or the unordered pair of a symmetric matrix.
    """
    x, y, (n, d), m = operands.x, operands.y, operands.x.shape, operands.y.shape[0]
    # all pairs are saved
    triangle = operands.symmetric and scores is None
    x_square, y_square, shift_failed = largest_norm_fwd(x, y)
    store = score_store(scores)
    flags = operands.flags()._replace(COLUMN_LSE=False)

    def launch(tile: tiles.Tile) -> None:
        column_blocks, row_blocks = block_count(m, tile.width), block_count(n, tile.height)
        group = min(column_blocks, max(1, workspace_limit() // (4 * n)))
        splits = splits_of(group, row_blocks, x)
        row_partial = x.new_empty((group, n), dtype=torch.float32)
        col_partial = x.new_empty((splits, m), dtype=torch.float32)
        total = x.new_empty(n, dtype=torch.float32)
        x_tiles, y_tiles = tiles_of(x, tile.height, tile), tiles_of(y, tile.width, tile)
        for first in range(0, column_blocks, group):
            slots = min(group, column_blocks - first)
            launch_kernel(
                _sums_fwd_kernel,
                (slots, splits),
                x=x,
                y=y,
                x_tiles=x_tiles,
                y_tiles=y_tiles,
                x_ids=operands.x_ids,
                y_ids=operands.y_ids,
                scale=operands.scale,
                cutoff=operands.cutoff,
                x_square=x_square,
                y_square=y_square,
                store=store,
                row_partial=row_partial,
                col_partial=col_partial,
                first_block=first,
                N=n,
                M=m,
                stride_x=x.stride(0),
                stride_y=y.stride(0),
                D=d,
                **tile.blocks(d),
                TRIANGLE=triangle,
                PAIR_SUM=tile.pair_sum,
                NORMS=len(x_square),
                FLAGS=flags,
                **tile.options(),
            )
            last = first + slots == column_blocks
            columns = last and not triangle
            launch_kernel(
                _fold_fwd_kernel,
                (block_count(max(n, m) if columns else n, FOLD_ROWS), 2 if columns else 1),
                row_partial=row_partial,
                col_partial=col_partial,
                row_total=total,
                row_lse=row_lse,
                col_lse=col_lse,
                shift_failed=shift_failed,
                scale=operands.scale,
                x_square=x_square,
                y_square=y_square,
                slots=slots,
                splits=splits,
                first_block=first,
                N=n,
                M=m,
                BLOCK=tile.width if triangle else 0,
                ACCUMULATE=first > 0,
                LAST=last,
                NORMS=len(x_square),
                BN=FOLD_ROWS,
                BS=FOLD_SLOTS,
            )

    large_epilogue = operands.x_ids is not None or operands.cutoff is not None
    kernel = "sums" if scores is None else "saved_sums"
    tune.run(tiles.pick(kernel, x, large_epilogue), x, launch, square=triangle)
    safe_again_fwd(operands, row_lse, col_lse, shift_failed)


def forward(operands: Operands, maximum: bool, scores: Scores | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the statistics of `engine.spec` but for the scores, which are filled."""
    x, n, m = operands.x, operands.x.shape[0], operands.y.shape[0]

    def empty(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    row_lse, col_lse = empty(len(operands.exponents), n), empty(m if operands.column_lse else 0)
    row_sum = empty(n if operands.term else 0)
    row_max, col_max = empty(n if maximum else 0), empty(m if operands.column_lse and maximum else 0)
    both = operands.column_lse or (operands.symmetric and scores is None)
    nothing_else = operands.bias is None and not operands.term and not maximum
    if both and operands.exponents == (1.0,) and nothing_else and n and m:
        sums_fwd(operands, row_lse[0], col_lse if operands.column_lse else None, scores)
    else:
        if operands.exponents or operands.term or maximum or scores is not None:
            term_sum, largest = row_sum if operands.term else None, row_max if maximum else None
            safe_sums_fwd(operands, True, row_lse, term_sum, largest, scores=scores)
        if operands.column_lse:
            safe_sums_fwd(operands, False, col_lse[None], None, col_max if maximum else None)
    return row_lse, col_lse, row_sum, row_max, col_max
