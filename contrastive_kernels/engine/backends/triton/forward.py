"""The forward sweep: log-sum-exps of rows and columns, sums of a term, maxima.

Two ways. Where one exponential serves a row and a column, `_sums_fwd_kernel` shifts all logits by one constant: none is
beyond |scale| * max ||x|| * max ||y||, and up to 2^TOP no sum overflows. Small terms, which a shift to 1 would
lose, are kept by that headroom unless the largest logit of a row is far below 0 at a very low temperature. The kernel
that adds up the partial sums raises a flag on the device where that might be. `_safe_sums_fwd_kernel` keeps a running
maximum instead and does everything; behind the other it returns at once while the flag is down. Nothing is read back to
the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastive_kernels.engine.backends.triton import tiles, tune
from contrastive_kernels.engine.backends.triton.epilogue import (
    LN2,
    LOG2E,
    OUT,
    exclude,
    load_ids,
    load_operand,
    load_tile,
    load_vector,
    phi,
    similarity,
    store_scores,
    term_base,
)  # fmt: skip
from contrastive_kernels.engine.backends.triton.launch import Scores, Sweep, processors, tiles_of
from contrastive_kernels.engine.backends.triton.rows import blocks as row_blocks
from contrastive_kernels.engine.limits import workspace_limit

# The largest exponent that the fixed shift lets an exponential have: 2^26 of them may be added.
TOP = tl.constexpr(100.0)

# Rows of the safe kernel's partial results.
MAX_0 = tl.constexpr(0)
SUM_0 = tl.constexpr(1)
MAX_1 = tl.constexpr(2)
SUM_1 = tl.constexpr(3)
TERM_SUM = tl.constexpr(4)
LARGEST = tl.constexpr(5)
PARTIALS = tl.constexpr(6)

# Elements per program, and partial results read at a time, of the kernels that add up.
FOLD_ROWS, FOLD_SLOTS = 64, 32
MERGE_ROWS = 128


@triton.jit
def reach_and_shift(scale, largest_x, largest_y):
    """A bound of |logit|, and the shift for it: none while logits are safe as they are, which is most accurate too."""
    b_x, b_y = tl.load(largest_x).to(tl.float32, bitcast=True), tl.load(largest_y).to(tl.float32, bitcast=True)
    b_reach = tl.abs(tl.load(scale)) * LOG2E * tl.sqrt(b_x) * tl.sqrt(b_y)
    return b_reach, tl.maximum(b_reach - TOP, 0.0)


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
    x, y, x_tiles, y_tiles, x_ids, y_ids, scale, cutoff, largest_x, largest_y, scores, x_inverse, y_inverse,
    row_partial, col_partial,
    first_block, N, M, stride_x, stride_y,
    D: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, TRIANGLE: tl.constexpr,
    PAIR_SUM: tl.constexpr, IDS: tl.constexpr, SAME: tl.constexpr, DIAGONAL: tl.constexpr, CUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of exp2(logit - shift): a block of columns stays, every `splits`-th block of rows passes by.

    row_partial (slots, N) has a row per column block from first_block on, col_partial (splits, M). TRIANGLE, for
    symmetric pairs and BN = BM: only row blocks up to the diagonal, where the row sums are complete by themselves.
    x_tiles and y_tiles, if not None, are x and y as descriptors of tiles.
    """
    i_slot, i_split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    blocks = tl.cdiv(N, BN)
    if TRIANGLE:
        # the longest first
        i_slot = tl.num_programs(0) - 1 - i_slot
        blocks = first_block + i_slot.to(tl.int32) + 1
    i_m = (first_block + i_slot.to(tl.int32)) * BM
    o_m, o_d = i_m + tl.arange(0, BM).to(tl.int64), tl.arange(0, BD)
    b_scale = tl.load(scale) * LOG2E
    _, b_shift = reach_and_shift(scale, largest_x, largest_y)
    b_y = load_operand(y, y_tiles, i_m, 0, o_m, o_d, M, stride_y, D)
    col_id = load_ids(y_ids, o_m, M, 1, IDS)
    columns = tl.minimum(M - i_m, BM)
    # Adding rows r and r + 8 first halves the accumulator where a thread holds both.
    b_col = tl.zeros([BN // 16, 8, BM] if PAIR_SUM else [BN, BM], tl.float32)
    for i_block in range(i_split, blocks, splits):
        i_n = i_block * BN
        o_n = i_n + tl.arange(0, BN).to(tl.int64)
        b_x = load_operand(x, x_tiles, i_n, 0, o_n, o_d, N, stride_x, D)
        b_s = similarity(
            x, y, b_x, b_y, o_n, o_m, N, M, stride_x, stride_y, D, BD, PRECISION, x_tiles, y_tiles, i_n, i_m
        )
        if scores is not None:
            store_scores(scores, b_s, x_inverse, y_inverse, o_n, o_m, N, M)
        row_id = load_ids(x_ids, o_n, N, 0, IDS)
        b_cutoff = load_vector(cutoff, o_n, N, 0) if CUT else 0.0
        b_u = b_s * b_scale - b_shift
        b_u = exclude(b_u, b_s, row_id, col_id, i_m - i_n, M, b_cutoff, OUT, IDS, SAME, DIAGONAL, CUT)
        # Zeros loaded outside would be logits of 0. The same for the whole program: only ragged tiles pay. A mask of
        # the columns alone would be the same in every tile, and be held in registers all the time.
        if (i_n + BN > N) | (columns < BM):
            b_columns = tl.where(o_n < N, columns, 0)
            b_u = tl.where(tl.arange(0, BM)[None, :] < b_columns[:, None], b_u, OUT)
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
    partial, total, lse, flag, scale, largest_x, largest_y, slots, first_block, N, terms,
    BLOCK: tl.constexpr, TRIANGLE: tl.constexpr, ACCUMULATE: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """total (+)= partial (slots, N) summed in a fixed order; with lse, finish: its value, and the flag if in doubt.

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
        b_reach, b_shift = reach_and_shift(scale, largest_x, largest_y)
        # Exponentials below 2^-126 are flushed. Where that of -reach would be, the sum has to be 2^20 times what
        # `terms` of them can amount to. An empty sum is then in doubt too.
        b_floor = tl.where(b_reach + b_shift <= 126.0, 0.0, terms * 2.0**-106)
        m_sure = (b_total >= b_floor) & (b_total < float("inf"))
        if tl.max((m_n & (m_sure == 0)).to(tl.int32), 0) > 0:
            tl.store(flag, 1)
        tl.store(lse + o_n, (tl.log2(b_total) + b_shift) * LN2, mask=m_n)


@triton.jit
def running_lse(b_max, b_sum, b_u):
    """One more tile of logits in the running maximum and sum of its rows; no logit at all leaves -inf and 0."""
    b_new = tl.maximum(b_max, tl.max(b_u, 1))
    b_shift = tl.where(b_new == OUT, 0.0, b_new)
    b_sum = b_sum * tl.exp2(b_max - b_shift) + tl.sum(tl.exp2(b_u - b_shift[:, None]), 1)
    return b_new, b_sum


@triton.jit
def finished_lse(b_max, b_sum):
    """The natural log-sum-exp of a maximum and a sum, -inf of none."""
    return tl.where(b_max == OUT, OUT, (b_max + tl.log2(b_sum)) * LN2)


@triton.jit
def admit(
    b_v, b_s, own_id, str_id, i_n, i_m, M, cutoff, FILL: tl.constexpr,
    IDS: tl.constexpr, SAME: tl.constexpr, DIAGONAL: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """`exclude`, and FILL beyond the last streamed element."""
    o_m = i_m + tl.arange(0, b_v.shape[1]).to(tl.int64)
    b_v = exclude(b_v, b_s, own_id, str_id, i_m - i_n, M, cutoff, FILL, IDS, SAME, DIAGONAL, CUT)
    if i_m + b_v.shape[1] > M:
        b_v = tl.where(o_m[None, :] < M, b_v, FILL)
    return b_v


@triton.jit
def _safe_sums_fwd_kernel(
    x, y, x_tiles, y_tiles, x_ids, y_ids, scale, bias, cutoff, term_scale, term_offset, scores, x_inverse, y_inverse,
    flag, lse, partial,
    N, M, stride_x, stride_y, exponent_0, exponent_1, constant_0, constant_1,
    D: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, AS_ROWS: tl.constexpr,
    Q: tl.constexpr, TERM: tl.constexpr, MAXIMUM: tl.constexpr, BIASED: tl.constexpr, SHIFTED: tl.constexpr,
    IDS: tl.constexpr, SAME: tl.constexpr, DIAGONAL: tl.constexpr, CUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of the owner x against every `splits`-th block of y, into partial (splits, PARTIALS, N).

    The owner acts as the sweep's rows or as its columns; bias and term go with the rows. With a flag, and one split, it
    writes lse (N,) itself, and leaves that to the other kernel while the flag is down. x_tiles and y_tiles: x and y as
    descriptors of tiles, or None.
    """
    if flag is not None:  # noqa: SIM102 (a compile-time and a run-time condition)
        if tl.load(flag) == 0:
            return
    i_n, i_split, splits = tl.program_id(0) * BN, tl.program_id(1), tl.num_programs(1)
    o_n, o_d = i_n + tl.arange(0, BN).to(tl.int64), tl.arange(0, BD)
    b_scale, b_term_scale = tl.load(scale) * LOG2E, 1.0
    if term_scale is not None:
        b_term_scale = tl.load(term_scale)
    b_x = load_operand(x, x_tiles, i_n, 0, o_n, o_d, N, stride_x, D)
    own_id = load_ids(x_ids, o_n, N, 0, IDS)
    own_cutoff = load_vector(cutoff, o_n, N, 0) if CUT and AS_ROWS else 0.0
    b_offset = load_vector(term_offset, o_n, N, 0) if SHIFTED else 0.0

    b_max_0, b_sum_0 = tl.full([BN], OUT, tl.float32), tl.zeros([BN], tl.float32)
    b_max_1, b_sum_1 = tl.full([BN], OUT, tl.float32), tl.zeros([BN], tl.float32)
    b_largest, b_term = tl.full([BN], OUT, tl.float32), tl.zeros([BN], tl.float32)
    for i_m in range(i_split * BM, M, splits * BM):
        o_m = i_m + tl.arange(0, BM).to(tl.int64)
        b_y = load_operand(y, y_tiles, i_m, 0, o_m, o_d, M, stride_y, D)
        b_s = similarity(
            x, y, b_x, b_y, o_n, o_m, N, M, stride_x, stride_y, D, BD, PRECISION, x_tiles, y_tiles, i_n, i_m
        )
        if scores is not None:
            store_scores(scores, b_s, x_inverse, y_inverse, o_n, o_m, N, M)
        str_id = load_ids(y_ids, o_m, M, 1, IDS)
        b_cutoff = load_vector(cutoff, o_m, M, 1) if CUT and not AS_ROWS else own_cutoff
        b_bias = load_vector(bias, o_m, M, 1) * LOG2E if BIASED else 0.0
        if Q > 0:
            b_u = b_s * (b_scale * exponent_0) + b_bias
            b_u = admit(b_u, b_s, own_id, str_id, i_n, i_m, M, b_cutoff, OUT, IDS, SAME, DIAGONAL, CUT)
            b_max_0, b_sum_0 = running_lse(b_max_0, b_sum_0, b_u)
        if Q > 1:
            b_u = b_s * (b_scale * exponent_1) + b_bias
            b_u = admit(b_u, b_s, own_id, str_id, i_n, i_m, M, b_cutoff, OUT, IDS, SAME, DIAGONAL, CUT)
            b_max_1, b_sum_1 = running_lse(b_max_1, b_sum_1, b_u)
        if MAXIMUM:
            b_u = admit(
                b_s * b_scale + b_bias, b_s, own_id, str_id, i_n, i_m, M, b_cutoff, OUT, IDS, SAME, DIAGONAL, CUT
            )
            # tl.max passes over NaN
            b_nan = tl.max((b_u != b_u).to(tl.int32), 1) > 0
            b_top = tl.where(b_nan, float("nan"), tl.max(b_u, 1))
            b_largest = tl.maximum(b_largest, b_top, propagate_nan=tl.PropagateNan.ALL)
        if TERM != "":
            b_p = phi(term_base(b_s, TERM) * b_term_scale + b_offset, constant_0, constant_1, TERM)
            b_p = admit(b_p, b_s, own_id, str_id, i_n, i_m, M, b_cutoff, 0.0, IDS, SAME, DIAGONAL, CUT)
            b_term += tl.sum(b_p, 1)

    m_n = o_n < N
    if flag is not None:
        tl.store(lse + o_n, finished_lse(b_max_0, b_sum_0), mask=m_n)
    else:
        p_partial = partial + i_split.to(tl.int64) * PARTIALS * N + o_n
        if Q > 0:
            tl.store(p_partial + MAX_0 * N, b_max_0, mask=m_n)
            tl.store(p_partial + SUM_0 * N, b_sum_0, mask=m_n)
        if Q > 1:
            tl.store(p_partial + MAX_1 * N, b_max_1, mask=m_n)
            tl.store(p_partial + SUM_1 * N, b_sum_1, mask=m_n)
        if TERM != "":
            tl.store(p_partial + TERM_SUM * N, b_term, mask=m_n)
        if MAXIMUM:
            tl.store(p_partial + LARGEST * N, b_largest, mask=m_n)


@triton.jit
def _merge_fwd_kernel(
    partial, lse, term_sum, largest, splits, N,
    Q: tl.constexpr, TERM: tl.constexpr, MAXIMUM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The partial results of `_safe_sums_fwd_kernel`, in a fixed order, into lse (Q, N), term_sum and largest (N,)."""
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < N
    for q in tl.static_range(Q):
        b_max, b_sum = tl.full([BN], OUT, tl.float32), tl.zeros([BN], tl.float32)
        p_partial = partial + 2 * q * N + o_n
        for _ in range(0, splits):
            b_part = tl.load(p_partial + MAX_0 * N, mask=m_n, other=OUT)
            b_new = tl.maximum(b_max, b_part)
            b_shift = tl.where(b_new == OUT, 0.0, b_new)
            b_part_sum = tl.load(p_partial + SUM_0 * N, mask=m_n, other=0.0)
            b_sum = b_sum * tl.exp2(b_max - b_shift) + b_part_sum * tl.exp2(b_part - b_shift)
            b_max = b_new
            p_partial += PARTIALS * N
        tl.store(lse + q * N + o_n, finished_lse(b_max, b_sum), mask=m_n)
    if TERM != "" or MAXIMUM:
        b_term, b_largest = tl.zeros([BN], tl.float32), tl.full([BN], OUT, tl.float32)
        p_partial = partial + o_n
        for _ in range(0, splits):
            if TERM != "":
                b_term += tl.load(p_partial + TERM_SUM * N, mask=m_n, other=0.0)
            if MAXIMUM:
                b_part = tl.load(p_partial + LARGEST * N, mask=m_n, other=OUT)
                b_largest = tl.maximum(b_largest, b_part, propagate_nan=tl.PropagateNan.ALL)
            p_partial += PARTIALS * N
        if TERM != "":
            tl.store(term_sum + o_n, b_term, mask=m_n)
        if MAXIMUM:
            tl.store(largest + o_n, b_largest * LN2, mask=m_n)


def _splits(blocks: int, streamed: int, x: Tensor) -> int:
    """Into how many programs to cut the walk over the streamed blocks, so that two per processor start."""
    return max(1, min(streamed, triton.cdiv(2 * processors(x), max(1, blocks))))


def safe_sums_fwd(
    sweep: Sweep, rows: bool, lse, term_sum, largest, *, scores: Scores | None = None, flag: Tensor | None = None
) -> None:
    """Fill lse (Q, n), term_sum and largest of the sweep's rows, or of its columns; None or Q = 0 where not wanted.

    And the scores, of rows. With a flag, only if that is up: then lse, Q = 1, is all there is.
    """
    x, y, x_ids, y_ids = sweep.x, sweep.y, sweep.x_ids, sweep.y_ids
    if not rows:
        x, y, x_ids, y_ids = y, x, y_ids, x_ids
    (n, d), m = x.shape, y.shape[0]
    flags = sweep.flags() | dict(Q=lse.shape[0], MAXIMUM=largest is not None)
    if not rows:
        flags |= dict(TERM="", BIASED=False, SHIFTED=False)
    del flags["COLUMNS"]
    saved = (None, None, None) if scores is None else (scores.values, *scores.inverses())

    def launch(tile: tiles.Tile) -> None:
        blocks, streamed = triton.cdiv(n, tile.rows), triton.cdiv(m, tile.columns)
        splits = _splits(blocks, streamed, x) if flag is None else 1
        partial = x.new_empty((splits, PARTIALS.value, n), dtype=torch.float32) if flag is None else None
        _safe_sums_fwd_kernel[(blocks, splits)](
            x, y, tiles_of(x, tile.rows, tile), tiles_of(y, tile.columns, tile), x_ids, y_ids, sweep.scale, sweep.bias,
            sweep.cutoff, sweep.term_scale, sweep.term_offset, *saved, flag, lse, partial, n, m, x.stride(0),
            y.stride(0), **sweep.scalars(), D=d, **tile.blocks(d), AS_ROWS=rows, **flags, **tile.options(),
        )  # fmt: skip
        if flag is None:
            _merge_fwd_kernel[(triton.cdiv(n, MERGE_ROWS),)](
                partial, lse, term_sum, largest, splits, n,
                Q=flags["Q"], TERM=flags["TERM"], MAXIMUM=flags["MAXIMUM"], BN=MERGE_ROWS,
            )  # fmt: skip

    # Behind a flag that is down it has nothing to do.
    tile = tiles.pick("safe_sums", x, sweep.heavy or largest is not None)
    launch(tile) if flag is not None else tune.run(tile, x, launch)


def largest_norm_fwd(x: Tensor, largest: Tensor) -> None:
    """See the kernel."""
    tile = row_blocks(x.shape[1])
    _largest_norm_fwd_kernel[(triton.cdiv(x.shape[0], tile["BN"]),)](
        x, largest, x.shape[0], x.stride(0), D=x.shape[1], **tile
    )


def fold_fwd(
    partial, total, terms, reach, *, first_block=0, block=0, accumulate=False, lse=None, flag=None
) -> None:  # fmt: skip
    """Add partial (slots, N) to total, or with lse finish it; a block makes slots triangular, see the kernel."""
    slots, n = partial.shape
    _fold_fwd_kernel[(triton.cdiv(n, FOLD_ROWS),)](
        partial, total, lse, flag, *reach, slots, first_block, n, float(terms),
        BLOCK=block, TRIANGLE=block > 0, ACCUMULATE=accumulate, BN=FOLD_ROWS, BS=FOLD_SLOTS,
    )  # fmt: skip


def sums_fwd(sweep: Sweep, row_lse: Tensor, col_lse: Tensor | None, scores: Scores | None) -> None:
    """Fill row_lse (N,), col_lse (M,) and the scores: one exponential per pair, or unordered pair of symmetric ones."""
    x, y, (n, d), m = sweep.x, sweep.y, sweep.x.shape, sweep.y.shape[0]
    # saved are all pairs
    triangle = sweep.symmetric and scores is None
    # the flag and the bits of the largest squared norms
    state = torch.zeros(3, dtype=torch.int32, device=x.device)
    flag, largest = state[:1], (state[1:], state[1:] if sweep.self_similarity else state[2:])
    largest_norm_fwd(x, largest[0])
    if not sweep.self_similarity:
        largest_norm_fwd(y, largest[1])
    reach = (sweep.scale, *largest)
    saved = (None, None, None) if scores is None else (scores.values, *scores.inverses())

    def launch(tile: tiles.Tile) -> None:
        blocks, row_blocks = triton.cdiv(m, tile.columns), triton.cdiv(n, tile.rows)
        group = min(blocks, max(1, workspace_limit() // (4 * n)))
        splits = _splits(group, row_blocks, x)
        row_partial = x.new_empty((group, n), dtype=torch.float32)
        col_partial = x.new_empty((splits, m), dtype=torch.float32)
        total = x.new_empty(n, dtype=torch.float32)
        flags = sweep.flags()
        x_tiles, y_tiles = tiles_of(x, tile.rows, tile), tiles_of(y, tile.columns, tile)
        for first in range(0, blocks, group):
            slots = min(group, blocks - first)
            _sums_fwd_kernel[(slots, splits)](
                x, y, x_tiles, y_tiles, sweep.x_ids, sweep.y_ids, sweep.scale, sweep.cutoff, *largest, *saved,
                row_partial, col_partial, first, n, m, x.stride(0), y.stride(0), D=d, **tile.blocks(d),
                TRIANGLE=triangle, PAIR_SUM=tile.pair_sum, **tile.options(),
                **{name: flags[name] for name in ("IDS", "SAME", "DIAGONAL", "CUT", "PRECISION")},
            )  # fmt: skip
            last = not triangle and first + slots == blocks
            fold_fwd(
                row_partial[:slots], total, m, reach, first_block=first, block=tile.columns if triangle else 0,
                accumulate=first > 0, lse=row_lse if last else None, flag=flag,
            )  # fmt: skip
        if triangle:
            # A symmetric matrix: the column sums above the diagonal are the row sums below it.
            fold_fwd(col_partial, total, m, reach, accumulate=True, lse=row_lse, flag=flag)
        else:
            fold_fwd(col_partial, total, n, reach, lse=col_lse, flag=flag)

    heavy = sweep.x_ids is not None or sweep.cutoff is not None
    kernel = "sums" if scores is None else "saved_sums"
    tune.run(tiles.pick(kernel, x, heavy), x, launch, square=triangle)
    safe_sums_fwd(sweep, True, row_lse[None], None, None, flag=flag)
    if not triangle:
        safe_sums_fwd(sweep, False, col_lse[None], None, None, flag=flag)
    elif sweep.column_lse:
        col_lse.copy_(row_lse)


def forward(sweep: Sweep, maximum: bool, scores: Scores | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The statistics of `contrastive_kernels.engine.spec`, but for the scores, which are filled."""
    x, n, m = sweep.x, sweep.x.shape[0], sweep.y.shape[0]

    def empty(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    row_lse, col_lse = empty(len(sweep.exponents), n), empty(m if sweep.column_lse else 0)
    row_sum = empty(n if sweep.term else 0)
    row_max, col_max = empty(n if maximum else 0), empty(m if sweep.column_lse and maximum else 0)
    both = sweep.column_lse or (sweep.symmetric and scores is None)
    if both and sweep.exponents == (1.0,) and sweep.bias is None and not (sweep.term or maximum) and n and m:
        sums_fwd(sweep, row_lse[0], col_lse, scores)
    else:
        if sweep.exponents or sweep.term or maximum or scores:
            term_sum, largest = row_sum if sweep.term else None, row_max if maximum else None
            safe_sums_fwd(sweep, True, row_lse, term_sum, largest, scores=scores)
        if sweep.column_lse:
            safe_sums_fwd(sweep, False, col_lse[None], None, col_max if maximum else None)
    return row_lse, col_lse, row_sum, row_max, col_max
