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
    score_store,
    splits_of,
    tiles_of,
)
from contrastive_kernels.engine.backends.triton.rows import block_sizes
from contrastive_kernels.engine.backends.triton.safe_forward import safe_sums_fwd
from contrastive_kernels.engine.limits import workspace_limit

# Elements per program, and partial results read at a time, of the kernel that adds up.
FOLD_ROWS, FOLD_SLOTS = 64, 32


@triton.jit
def bound_and_shift(scale, x_square, y_square):
    """Return a bound of |logit|, and the shift for it: none while logits are safe as they are, the most accurate."""
    b_x, b_y = tl.load(x_square).to(tl.float32, bitcast=True), tl.load(y_square).to(tl.float32, bitcast=True)
    b_bound = tl.abs(tl.load(scale)) * log2e() * tl.sqrt(b_x) * tl.sqrt(b_y)
    # exponentials up to 2^100, of which 2^26 may be added
    LARGEST_EXPONENT: tl.constexpr = 100.0
    return b_bound, tl.maximum(b_bound - LARGEST_EXPONENT, 0.0)


@triton.jit
def _largest_norm_fwd_kernel(x, largest_bits, N, stride, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """Raise largest_bits, 0 before, to those of max ||x_n||^2: from 0 on floats are ordered as these, NaN above all."""
    o_n, o_d = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN), tl.arange(0, BD)
    b_square = tl.zeros([BN], tl.float32)
    for i_d in range(0, D, BD):
        b_x = load_tile(x, o_n, i_d + o_d, N, stride, D).to(tl.float32)
        b_square += tl.sum(b_x * b_x, 1)
    tl.atomic_max(largest_bits, tl.max(b_square.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0))


@triton.jit
def _sums_fwd_kernel(
    x, y, x_tiles, y_tiles, x_ids, y_ids, scale, cutoff, x_square, y_square, store: ScoreStore,
    row_partial, col_partial,
    first_block, N, M, stride_x, stride_y,
    D: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, TRIANGLE: tl.constexpr,
    PAIR_SUM: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Sum exp2(logit - shift): a program keeps a block of columns and visits every `splits`-th block of rows.

    row_partial (slots, N) has a row per column block from first_block on, col_partial (splits, M). TRIANGLE, for
    symmetric pairs and BN = BM: only row blocks up to the diagonal, where the row sums are complete by themselves.
    x_square and y_square: the bits of the largest squared norms. x_tiles and y_tiles: x and y as descriptors, or None.
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
    _, b_shift = bound_and_shift(scale, x_square, y_square)
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
def _fold_fwd_kernel(
    partial, total, lse, shift_failed, scale, x_square, y_square, slots, first_block, N, terms,
    BLOCK: tl.constexpr, TRIANGLE: tl.constexpr, ACCUMULATE: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """total (+)= partial (slots, N) summed in a fixed order; with lse, finish: its value, and shift_failed if in doubt.

    TRIANGLE: slot k is of column block first_block + k, and has entries up to the end of that block only.
    """
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < N
    b_total = tl.zeros([BN], tl.float32)
    if ACCUMULATE:
        b_total += tl.load(total + o_n, mask=m_n, other=0.0)
    for i_s in range(0, slots, BS):
        o_s = i_s + tl.arange(0, BS).to(tl.int64)
        m_p = (o_s < slots)[:, None] & m_n[None, :]
        if TRIANGLE:
            m_p = m_p & ((first_block + o_s)[:, None] >= (o_n // BLOCK)[None, :])
        b_total += tl.sum(tl.load(partial + o_s[:, None] * N + o_n[None, :], mask=m_p, other=0.0), 0)
    if lse is None:
        tl.store(total + o_n, b_total, mask=m_n)
    else:
        b_bound, b_shift = bound_and_shift(scale, x_square, y_square)
        # Exponentials below 2^-126 are flushed. If that of the least possible logit would be, the sum has to be 2^20
        # times what `terms` of them can amount to. An empty sum is then in doubt too.
        b_floor = tl.where(b_bound + b_shift <= 126.0, 0.0, terms * 2.0**-106)
        m_sure = (b_total >= b_floor) & (b_total < float("inf"))
        if tl.max((m_n & (m_sure == 0)).to(tl.int32), 0) > 0:
            tl.store(shift_failed, 1)
        tl.store(lse + o_n, (tl.log2(b_total) + b_shift) * ln2(), mask=m_n)


def largest_norm_fwd(x: Tensor, largest_bits: Tensor) -> None:
    """Raise largest_bits, see `_largest_norm_fwd_kernel`."""
    sizes = block_sizes(x.shape[1])
    launch_kernel(
        _largest_norm_fwd_kernel,
        (block_count(x.shape[0], sizes["BN"]),),
        x=x,
        largest_bits=largest_bits,
        N=x.shape[0],
        stride=x.stride(0),
        D=x.shape[1],
        **sizes,
    )


def fold_fwd(
    partial: Tensor,
    total: Tensor,
    terms: int,
    bound: tuple[Tensor, Tensor, Tensor],
    *,
    first_block: int = 0,
    block: int = 0,
    accumulate: bool = False,
    lse: Tensor | None = None,
    shift_failed: Tensor,
) -> None:
    """Add partial (slots, N) to total, or with lse finish it, see `_fold_fwd_kernel`.

    bound: the scale and the bits of the largest squared norms of x and y. A block makes slots triangular.
    """
    (slots, n), (scale, x_square, y_square) = partial.shape, bound
    launch_kernel(
        _fold_fwd_kernel,
        (block_count(n, FOLD_ROWS),),
        partial=partial,
        total=total,
        lse=lse,
        shift_failed=shift_failed,
        scale=scale,
        x_square=x_square,
        y_square=y_square,
        slots=slots,
        first_block=first_block,
        N=n,
        terms=float(terms),
        BLOCK=block,
        TRIANGLE=block > 0,
        ACCUMULATE=accumulate,
        BN=FOLD_ROWS,
        BS=FOLD_SLOTS,
    )


def sums_fwd(operands: Operands, row_lse: Tensor, col_lse: Tensor, scores: Scores | None) -> None:
    """Fill row_lse (N,), col_lse (M,) if it is wanted, and the scores, by the fast path.

    One exponential serves a pair, or the unordered pair of a symmetric matrix.
    """
    x, y, (n, d), m = operands.x, operands.y, operands.x.shape, operands.y.shape[0]
    # all pairs are saved
    triangle = operands.symmetric and scores is None
    # shift_failed and the bits of the largest squared norms
    state = torch.zeros(3, dtype=torch.int32, device=x.device)
    shift_failed, x_square = state[:1], state[1:]
    y_square = x_square if operands.self_similarity else state[2:]
    largest_norm_fwd(x, x_square)
    if not operands.self_similarity:
        largest_norm_fwd(y, y_square)
    bound, store = (operands.scale, x_square, y_square), score_store(scores)
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
                FLAGS=flags,
                **tile.options(),
            )
            last = not triangle and first + slots == column_blocks
            fold_fwd(
                row_partial[:slots],
                total,
                m,
                bound,
                first_block=first,
                block=tile.width if triangle else 0,
                accumulate=first > 0,
                lse=row_lse if last else None,
                shift_failed=shift_failed,
            )
        if triangle:
            # A symmetric matrix: the column sums above the diagonal are the row sums below it.
            fold_fwd(col_partial, total, m, bound, accumulate=True, lse=row_lse, shift_failed=shift_failed)
        else:
            fold_fwd(col_partial, total, n, bound, lse=col_lse, shift_failed=shift_failed)

    large_epilogue = operands.x_ids is not None or operands.cutoff is not None
    kernel = "sums" if scores is None else "saved_sums"
    tune.run(tiles.pick(kernel, x, large_epilogue), x, launch, square=triangle)
    safe_sums_fwd(operands, True, row_lse[None], None, None, shift_failed=shift_failed)
    if not triangle:
        safe_sums_fwd(operands, False, col_lse[None], None, None, shift_failed=shift_failed)
    elif operands.column_lse:
        col_lse.copy_(row_lse)


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
        sums_fwd(operands, row_lse[0], col_lse, scores)
    else:
        if operands.exponents or operands.term or maximum or scores is not None:
            term_sum, largest = row_sum if operands.term else None, row_max if maximum else None
            safe_sums_fwd(operands, True, row_lse, term_sum, largest, scores=scores)
        if operands.column_lse:
            safe_sums_fwd(operands, False, col_lse[None], None, col_max if maximum else None)
    return row_lse, col_lse, row_sum, row_max, col_max
