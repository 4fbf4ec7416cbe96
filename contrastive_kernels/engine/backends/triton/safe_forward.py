"""The safe path of the forward sweep, which does everything and never fails.

When: in all other cases, and behind the fast path, where it returns at once unless `shift_failed` is set.
How: `_safe_sums_fwd_kernel` keeps a running maximum per row, in one launch for the rows and in another for the
columns, and computes terms and maxima beside it. Behind the fast path one launch serves both.
How it fails: it does not; the sum of a row with a kept pair is at least 1.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastive_kernels.engine.backends.triton import tiles, tune
from contrastive_kernels.engine.backends.triton.bundles import (
    Block,
    Flags,
    Numbers,
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
from contrastive_kernels.engine.backends.triton.terms import (
    phi,
    term_base,
)

# Rows per program of the kernel that merges partial results.
MERGE_ROWS = 128


@triton.constexpr_function
def partial_row(name: str) -> int:
    """Return where the safe kernel puts a partial result; "end" is their number."""
    return {"max_0": 0, "sum_0": 1, "max_1": 2, "sum_1": 3, "term_sum": 4, "largest": 5, "end": 6}[name]


@triton.jit
def running_lse(b_max, b_sum, b_u):
    """Return the running maximum and sum of rows after one more tile of logits; no logit at all leaves -inf and 0."""
    b_new = tl.maximum(b_max, tl.max(b_u, 1))
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_sum = b_sum * tl.exp2(b_max - b_shift) + tl.sum(tl.exp2(b_u - b_shift[:, None]), 1)
    return b_new, b_sum


@triton.jit
def finished_lse(b_max, b_sum):
    """Return the natural log-sum-exp of a maximum and a sum, -inf of none.

    No select by the maximum, which passes over NaN: in a row of NaN it is -inf, as in a row without pairs.
    """
    return (b_max + tl.log2(b_sum)) * ln2()


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
    shift_failed, lse, other_lse, partial,
    N, M, stride_x, stride_y, numbers: Numbers,
    D: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, AS_ROWS: tl.constexpr,
    MAXIMUM: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Walk from one block of the owner x over every `splits`-th block of y, into partial (splits, rows, N).

    x acts as the sweep's rows or as its columns; bias and term go with the rows. x_tiles and y_tiles: x and y as
    descriptors, or None. With shift_failed the kernel leaves everything to the fast path unless that is set; then it
    writes lse (N,) itself, and where the second grid index is 1 other_lse (M,), with x and y exchanged.
    """
    i_n, i_split, splits = tl.program_id(0) * BN, tl.program_id(1), tl.num_programs(1)
    size = N
    if shift_failed is not None:
        if tl.load(shift_failed) == 0:
            return
        exchanged = i_split == 1
        i_split, splits = 0, 1
        if other_lse is not None:
            x, y, lse = tl.where(exchanged, y, x), tl.where(exchanged, x, y), tl.where(exchanged, other_lse, lse)
            N, M = tl.where(exchanged, M, N), tl.where(exchanged, N, M)
            stride_x, stride_y = tl.where(exchanged, stride_y, stride_x), tl.where(exchanged, stride_x, stride_y)
            if FLAGS.IDS:
                x_ids, y_ids = tl.where(exchanged, y_ids, x_ids), tl.where(exchanged, x_ids, y_ids)
    Q: tl.constexpr = FLAGS.Q
    TERM: tl.constexpr = FLAGS.TERM
    o_n, o_d = i_n + tl.arange(0, BN).to(tl.int64), tl.arange(0, BD)
    b_scale, b_term_scale = tl.load(scale) * log2e(), 1.0
    if term_scale is not None:
        b_term_scale = tl.load(term_scale)
    own = Block(Operand(x, x_tiles, x_ids, N, stride_x), i_n, o_n)
    b_x = load_block(own, 0, o_d, D)
    own_ids = load_ids(x_ids, o_n, N, 0, FLAGS.IDS)
    own_cutoff = load_vector(cutoff, o_n, size, 0) if FLAGS.CUT and AS_ROWS else 0.0
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
        if FLAGS.CUT and other_lse is not None:
            b_cutoff = tl.where(exchanged, load_vector(cutoff, o_m, size, 1), own_cutoff)
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


def launch_safe_sums(
    operands: Operands, tile: tiles.Tile, grid: tuple[int, int], rows: bool, *, flags: Flags, **arguments: Any
) -> None:
    """Launch `_safe_sums_fwd_kernel`; rows: x acts as the sweep's rows."""
    x, y, x_ids, y_ids = operands.x, operands.y, operands.x_ids, operands.y_ids
    if not rows:
        x, y, x_ids, y_ids = y, x, y_ids, x_ids
    launch_kernel(
        _safe_sums_fwd_kernel,
        grid,
        x=x,
        y=y,
        x_ids=x_ids,
        y_ids=y_ids,
        scale=operands.scale,
        bias=operands.bias,
        cutoff=operands.cutoff,
        term_scale=operands.term_scale,
        term_offset=operands.term_offset,
        N=x.shape[0],
        M=y.shape[0],
        stride_x=x.stride(0),
        stride_y=y.stride(0),
        numbers=operands.numbers(),
        D=x.shape[1],
        **tile.blocks(x.shape[1]),
        AS_ROWS=rows,
        FLAGS=flags,
        **arguments,
        **tile.options(),
    )


def safe_again_fwd(operands: Operands, row_lse: Tensor, col_lse: Tensor | None, shift_failed: Tensor) -> None:
    """Fill row_lse (N,), and col_lse (M,) unless it is None, once more if shift_failed is set; in one launch.

    The usual launch returns at once, so that descriptors would cost more on the host than they ever gain.
    """
    n, m = operands.x.shape[0], operands.y.shape[0]
    tile = tiles.pick("safe_sums", operands.x, operands.large_safe_epilogue)
    both = col_lse is not None
    launch_safe_sums(
        operands,
        tile,
        (block_count(max(n, m) if both else n, tile.height), 2 if both else 1),
        True,
        flags=operands.flags()._replace(COLUMN_LSE=False),
        x_tiles=None,
        y_tiles=None,
        store=score_store(None),
        shift_failed=shift_failed,
        lse=row_lse,
        other_lse=col_lse,
        partial=None,
        MAXIMUM=False,
    )


def safe_sums_fwd(
    operands: Operands,
    rows: bool,
    lse: Tensor,
    term_sum: Tensor | None,
    largest: Tensor | None,
    *,
    scores: Scores | None = None,
) -> None:
    """Fill lse (Q, n), term_sum and largest of the sweep's rows, or of its columns; None or Q = 0 if not wanted.

    Fill the scores too, with the rows.
    """
    x, y = (operands.x, operands.y) if rows else (operands.y, operands.x)
    n, m = x.shape[0], y.shape[0]
    flags = operands.flags()._replace(Q=lse.shape[0], COLUMN_LSE=False)
    if not rows:
        flags = flags._replace(TERM="", BIASED=False, SHIFTED=False)
    maximum, store = largest is not None, score_store(scores)

    def launch(tile: tiles.Tile) -> None:
        blocks, others = block_count(n, tile.height), block_count(m, tile.width)
        splits = splits_of(blocks, others, x)
        partial = x.new_empty((splits, partial_row("end"), n), dtype=torch.float32)
        launch_safe_sums(
            operands,
            tile,
            (blocks, splits),
            rows,
            flags=flags,
            x_tiles=tiles_of(x, tile.height, tile),
            y_tiles=tiles_of(y, tile.width, tile),
            store=store,
            shift_failed=None,
            lse=None,
            other_lse=None,
            partial=partial,
            MAXIMUM=maximum,
        )
        launch_kernel(
            _merge_fwd_kernel,
            (block_count(n, MERGE_ROWS),),
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

    tune.run(tiles.pick("safe_sums", x, operands.large_safe_epilogue or maximum or scores is not None), x, launch)
