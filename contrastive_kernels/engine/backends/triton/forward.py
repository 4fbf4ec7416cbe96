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
    When: in all other cases, and behind the fast path, where it returns at once unless `shift_failed` is set.
    How: `_safe_sums_fwd_kernel` keeps a running maximum per row, in one launch for the rows and in another for the
    columns, and computes terms and maxima beside it.
    How it fails: it does not; the sum of a row with a kept pair is at least 1.

See docs/gpu.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastive_kernels.engine.backends.triton import tiles, tune
from contrastive_kernels.engine.backends.triton.epilogue import (
    Block,
    Numbers,
    Operand,
    Pairs,
    Scores,
    ScoreStore,
    exclude,
    ln2,
    load_block,
    load_ids,
    load_tile,
    load_vector,
    log2e,
    phi,
    similarity,
    store_scores,
    term_base,
)
from contrastive_kernels.engine.backends.triton.launch import Operands, processors, score_store, tiles_of
from contrastive_kernels.engine.backends.triton.rows import block_sizes
from contrastive_kernels.engine.limits import workspace_limit

# Elements per program, and partial results read at a time, of the kernels that add up.
FOLD_ROWS, FOLD_SLOTS = 64, 32
MERGE_ROWS = 128


@triton.constexpr_function
def partial_row(name: str) -> int:
    """Return where the safe kernel puts a partial result; "end" is their number."""
    return {"max_0": 0, "sum_0": 1, "max_1": 2, "sum_1": 3, "term_sum": 4, "largest": 5, "end": 6}[name]


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


@triton.jit
def running_lse(b_max, b_sum, b_u):
    """Return the running maximum and sum of rows after one more tile of logits; no logit at all leaves -inf and 0."""
    b_new = tl.maximum(b_max, tl.max(b_u, 1))
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_sum = b_sum * tl.exp2(b_max - b_shift) + tl.sum(tl.exp2(b_u - b_shift[:, None]), 1)
    return b_new, b_sum


@triton.jit
def finished_lse(b_max, b_sum):
    """Return the natural log-sum-exp of a maximum and a sum, -inf of none."""
    return tl.where(b_max == float("-inf"), float("-inf"), (b_max + tl.log2(b_sum)) * ln2())


@triton.jit
def admit(b_v, b_s, pairs, i_m, cutoff, FILL: tl.constexpr, FLAGS: tl.constexpr):
    """Return `exclude`, with FILL also beyond the last row of the other operand, whose block begins at i_m."""
    o_m = i_m + tl.arange(0, b_v.shape[1]).to(tl.int64)
    b_v = exclude(b_v, b_s, pairs, cutoff, FILL, FLAGS)
    if i_m + b_v.shape[1] > pairs.size:
        b_v = tl.where(o_m[None, :] < pairs.size, b_v, FILL)
    return b_v


@triton.jit
def _safe_sums_fwd_kernel(
    x, y, x_tiles, y_tiles, x_ids, y_ids, scale, bias, cutoff, term_scale, term_offset, store: ScoreStore,
    shift_failed, lse, partial,
    N, M, stride_x, stride_y, numbers: Numbers,
    D: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, AS_ROWS: tl.constexpr,
    MAXIMUM: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Walk from one block of the owner x over every `splits`-th block of y, into partial (splits, rows, N).

    x acts as the sweep's rows or as its columns; bias and term go with the rows. With shift_failed, and one split, the
    kernel writes lse (N,) itself, and leaves it to the fast path unless shift_failed is set. x_tiles and y_tiles: x and
    y as descriptors, or None.
    """
    if shift_failed is not None:  # noqa: SIM102 (a compile-time and a run-time condition)
        if tl.load(shift_failed) == 0:
            return
    Q: tl.constexpr = FLAGS.Q
    TERM: tl.constexpr = FLAGS.TERM
    i_n, i_split, splits = tl.program_id(0) * BN, tl.program_id(1), tl.num_programs(1)
    o_n, o_d = i_n + tl.arange(0, BN).to(tl.int64), tl.arange(0, BD)
    b_scale, b_term_scale = tl.load(scale) * log2e(), 1.0
    if term_scale is not None:
        b_term_scale = tl.load(term_scale)
    own = Block(Operand(x, x_tiles, x_ids, N, stride_x), i_n, o_n)
    b_x = load_block(own, 0, o_d, D)
    own_ids = load_ids(x_ids, o_n, N, 0, FLAGS.IDS)
    own_cutoff = load_vector(cutoff, o_n, N, 0) if FLAGS.CUT and AS_ROWS else 0.0
    b_offset = load_vector(term_offset, o_n, N, 0) if FLAGS.SHIFTED else 0.0

    b_max_0, b_sum_0 = tl.full([BN], float("-inf"), tl.float32), tl.zeros([BN], tl.float32)
    b_max_1, b_sum_1 = tl.full([BN], float("-inf"), tl.float32), tl.zeros([BN], tl.float32)
    b_largest, b_term = tl.full([BN], float("-inf"), tl.float32), tl.zeros([BN], tl.float32)
    for i_m in range(i_split * BM, M, splits * BM):
        o_m = i_m + tl.arange(0, BM).to(tl.int64)
        other = Block(Operand(y, y_tiles, y_ids, M, stride_y), i_m, o_m)
        b_y = load_block(other, 0, o_d, D)
        b_s = similarity(own, other, b_x, b_y, D, BD, FLAGS)
        if store.matrix is not None:
            store_scores(store, b_s, o_n, o_m, N, M)
        pairs = Pairs(own_ids, load_ids(y_ids, o_m, M, 1, FLAGS.IDS), i_m - i_n, M)
        b_cutoff = load_vector(cutoff, o_m, M, 1) if FLAGS.CUT and not AS_ROWS else own_cutoff
        b_bias = load_vector(bias, o_m, M, 1) * log2e() if FLAGS.BIASED else 0.0
        if Q > 0:
            b_u = b_s * (b_scale * numbers.exponent_0) + b_bias
            b_u = admit(b_u, b_s, pairs, i_m, b_cutoff, float("-inf"), FLAGS)
            b_max_0, b_sum_0 = running_lse(b_max_0, b_sum_0, b_u)
        if Q > 1:
            b_u = b_s * (b_scale * numbers.exponent_1) + b_bias
            b_u = admit(b_u, b_s, pairs, i_m, b_cutoff, float("-inf"), FLAGS)
            b_max_1, b_sum_1 = running_lse(b_max_1, b_sum_1, b_u)
        if MAXIMUM:
            b_u = admit(b_s * b_scale + b_bias, b_s, pairs, i_m, b_cutoff, float("-inf"), FLAGS)
            # tl.max passes over NaN
            b_nan = tl.max((b_u != b_u).to(tl.int32), 1) > 0
            b_top = tl.where(b_nan, float("nan"), tl.max(b_u, 1))
            b_largest = tl.maximum(b_largest, b_top, propagate_nan=tl.PropagateNan.ALL)
        if TERM != "":
            b_v = term_base(b_s, TERM) * b_term_scale + b_offset
            b_p = phi(b_v, numbers.constant_0, numbers.constant_1, TERM)
            b_p = admit(b_p, b_s, pairs, i_m, b_cutoff, 0.0, FLAGS)
            b_term += tl.sum(b_p, 1)

    m_n = o_n < N
    if shift_failed is not None:
        tl.store(lse + o_n, finished_lse(b_max_0, b_sum_0), mask=m_n)
    else:
        p_partial = partial + i_split.to(tl.int64) * partial_row("end") * N + o_n
        if Q > 0:
            tl.store(p_partial + partial_row("max_0") * N, b_max_0, mask=m_n)
            tl.store(p_partial + partial_row("sum_0") * N, b_sum_0, mask=m_n)
        if Q > 1:
            tl.store(p_partial + partial_row("max_1") * N, b_max_1, mask=m_n)
            tl.store(p_partial + partial_row("sum_1") * N, b_sum_1, mask=m_n)
        if TERM != "":
            tl.store(p_partial + partial_row("term_sum") * N, b_term, mask=m_n)
        if MAXIMUM:
            tl.store(p_partial + partial_row("largest") * N, b_largest, mask=m_n)


@triton.jit
def _merge_fwd_kernel(
    partial, lse, term_sum, largest, splits, N,
    Q: tl.constexpr, TERM: tl.constexpr, MAXIMUM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Merge results of `_safe_sums_fwd_kernel`, in a fixed order, into lse (Q, N), term_sum and largest (N,)."""
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < N
    for q in tl.static_range(Q):
        b_max, b_sum = tl.full([BN], float("-inf"), tl.float32), tl.zeros([BN], tl.float32)
        p_partial = partial + 2 * q * N + o_n
        for _ in range(0, splits):
            b_part = tl.load(p_partial + partial_row("max_0") * N, mask=m_n, other=float("-inf"))
            b_new = tl.maximum(b_max, b_part)
            b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_part_sum = tl.load(p_partial + partial_row("sum_0") * N, mask=m_n, other=0.0)
            b_sum = b_sum * tl.exp2(b_max - b_shift) + b_part_sum * tl.exp2(b_part - b_shift)
            b_max = b_new
            p_partial += partial_row("end") * N
        tl.store(lse + q * N + o_n, finished_lse(b_max, b_sum), mask=m_n)
    if TERM != "" or MAXIMUM:
        b_term, b_largest = tl.zeros([BN], tl.float32), tl.full([BN], float("-inf"), tl.float32)
        p_partial = partial + o_n
        for _ in range(0, splits):
            if TERM != "":
                b_term += tl.load(p_partial + partial_row("term_sum") * N, mask=m_n, other=0.0)
            if MAXIMUM:
                b_part = tl.load(p_partial + partial_row("largest") * N, mask=m_n, other=float("-inf"))
                b_largest = tl.maximum(b_largest, b_part, propagate_nan=tl.PropagateNan.ALL)
            p_partial += partial_row("end") * N
        if TERM != "":
            tl.store(term_sum + o_n, b_term, mask=m_n)
        if MAXIMUM:
            tl.store(largest + o_n, b_largest * ln2(), mask=m_n)


def _splits(blocks: int, others: int, x: Tensor) -> int:
    """Return into how many programs to cut the walk over the other blocks, so that two per processor start."""
    wanted: int = triton.cdiv(2 * processors(x), max(1, blocks))
    return max(1, min(others, wanted))


def safe_sums_fwd(
    operands: Operands,
    rows: bool,
    lse: Tensor,
    term_sum: Tensor | None,
    largest: Tensor | None,
    *,
    scores: Scores | None = None,
    shift_failed: Tensor | None = None,
) -> None:
    """Fill lse (Q, n), term_sum and largest of the sweep's rows, or of its columns; None or Q = 0 if not wanted.

    Fill the scores too, with the rows. With shift_failed fill lse alone, Q = 1, and only if that is set.
    """
    x, y, x_ids, y_ids = operands.x, operands.y, operands.x_ids, operands.y_ids
    if not rows:
        x, y, x_ids, y_ids = y, x, y_ids, x_ids
    (n, d), m = x.shape, y.shape[0]
    flags = operands.flags()._replace(Q=lse.shape[0], COLUMN_LSE=False)
    if not rows:
        flags = flags._replace(TERM="", BIASED=False, SHIFTED=False)
    maximum, store = largest is not None, score_store(scores)

    def launch(tile: tiles.Tile) -> None:
        blocks, others = triton.cdiv(n, tile.height), triton.cdiv(m, tile.width)
        splits, partial = 1, None
        if shift_failed is None:
            splits = _splits(blocks, others, x)
            partial = x.new_empty((splits, partial_row("end"), n), dtype=torch.float32)
        _safe_sums_fwd_kernel[(blocks, splits)](
            x=x,
            y=y,
            x_tiles=tiles_of(x, tile.height, tile),
            y_tiles=tiles_of(y, tile.width, tile),
            x_ids=x_ids,
            y_ids=y_ids,
            scale=operands.scale,
            bias=operands.bias,
            cutoff=operands.cutoff,
            term_scale=operands.term_scale,
            term_offset=operands.term_offset,
            store=store,
            shift_failed=shift_failed,
            lse=lse,
            partial=partial,
            N=n,
            M=m,
            stride_x=x.stride(0),
            stride_y=y.stride(0),
            numbers=operands.numbers(),
            D=d,
            **tile.blocks(d),
            AS_ROWS=rows,
            MAXIMUM=maximum,
            FLAGS=flags,
            **tile.options(),
        )
        if partial is not None:
            _merge_fwd_kernel[(triton.cdiv(n, MERGE_ROWS),)](
                partial=partial,
                lse=lse,
                term_sum=term_sum,
                largest=largest,
                splits=splits,
                N=n,
                Q=flags.Q,
                TERM=flags.TERM,
                MAXIMUM=maximum,
                BN=MERGE_ROWS,
            )

    tile = tiles.pick("safe_sums", x, operands.large_epilogue or maximum)
    if shift_failed is None:
        tune.run(tile, x, launch)
    else:
        launch(tile)  # it usually returns at once, which says nothing about the tile


def largest_norm_fwd(x: Tensor, largest_bits: Tensor) -> None:
    """Raise largest_bits, see `_largest_norm_fwd_kernel`."""
    sizes = block_sizes(x.shape[1])
    _largest_norm_fwd_kernel[(triton.cdiv(x.shape[0], sizes["BN"]),)](
        x=x, largest_bits=largest_bits, N=x.shape[0], stride=x.stride(0), D=x.shape[1], **sizes
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
    _fold_fwd_kernel[(triton.cdiv(n, FOLD_ROWS),)](
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
        column_blocks, row_blocks = triton.cdiv(m, tile.width), triton.cdiv(n, tile.height)
        group = min(column_blocks, max(1, workspace_limit() // (4 * n)))
        splits = _splits(group, row_blocks, x)
        row_partial = x.new_empty((group, n), dtype=torch.float32)
        col_partial = x.new_empty((splits, m), dtype=torch.float32)
        total = x.new_empty(n, dtype=torch.float32)
        x_tiles, y_tiles = tiles_of(x, tile.height, tile), tiles_of(y, tile.width, tile)
        for first in range(0, column_blocks, group):
            slots = min(group, column_blocks - first)
            _sums_fwd_kernel[(slots, splits)](
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
