"""What the sweep's kernels do with one tile of similarities and with the vectors beside it.

A kernel walks over pairs of its *owner*, the operand of which a program keeps a block (`own`), and of the *other*
operand. Either may hold the rows of the sweep. A vector lies on the axis of the tile where its operand is, so that one
epilogue serves dX, dY and the self-similarity, where a tile plays both roles. Logits are in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from contrastive_kernels.engine.backends.triton.bundles import (
    ColumnVectors,
    Pairs,
    RowVectors,
    Scalars,
    log2e,
    packed_row,
)
from contrastive_kernels.engine.backends.triton.terms import (
    phi,
    phi_grad,
    term_base,
    through_base,
)


@triton.jit
def load_tile(p, o_n, o_d, N, stride, D: tl.constexpr):
    """Return rows o_n and columns o_d of an (N, D) matrix with inner stride 1, 0 outside."""
    m_tile = (o_n < N)[:, None] & (o_d < D)[None, :]
    p_tile = p + o_n[:, None] * stride + o_d[None, :]
    return tl.load(p_tile, mask=m_tile, other=0.0)  # [BN, BD]


@triton.jit
def load_block(block, i_d, o_d, D: tl.constexpr):
    """Return the features of a block from column i_d on, by a descriptor or else at columns o_d."""
    x = block.operand
    if x.tiles is not None:
        b_x = x.tiles.load([block.start, i_d])
    else:
        b_x = load_tile(x.features, block.rows, o_d, x.size, x.stride, D)
    return b_x  # [BN, BD]


@triton.jit
def load_vector(p, o_n, N, AXIS: tl.constexpr):
    """Return entries o_n of a vector, 0 outside, on AXIS of the tile."""
    return tl.expand_dims(tl.load(p + o_n, mask=o_n < N, other=0), 1 - AXIS)


@triton.jit
def load_ids(ids, o_n, N, AXIS: tl.constexpr, IDS: tl.constexpr):
    """Return the ids of a block on AXIS of the tile; an unused 0 unless IDS."""
    return load_vector(ids, o_n, N, AXIS) if IDS else 0


@triton.jit
def load_scalars(scale, term_scale, numbers):
    """Return all `Scalars`."""
    b_scale, b_term_scale = tl.load(scale), 1.0
    if term_scale is not None:
        b_term_scale = tl.load(term_scale)
    return Scalars(
        b_scale, b_term_scale, numbers.exponent_0, numbers.exponent_1, numbers.constant_0, numbers.constant_1
    )  # fmt: skip


@triton.jit
def similarity(x, y, b_x, b_y, D: tl.constexpr, BD: tl.constexpr, FLAGS: tl.constexpr):
    """Return s = <x_n, y_m> of two blocks with float32 accumulation; b_x and b_y are their first BD columns.

    If D exceeds BD, the loop starts afresh, so that the compiler pipelines all of it and drops b_x and b_y.
    """
    if D <= BD:
        b_s = tl.dot(b_x, tl.trans(b_y), input_precision=FLAGS.PRECISION)
    else:
        b_s = tl.zeros([b_x.shape[0], b_y.shape[0]], tl.float32)
        for i_d in range(0, D, BD):
            o_d = i_d + tl.arange(0, BD)
            b_xd = load_block(x, i_d, o_d, D)
            b_yd = load_block(y, i_d, o_d, D)
            b_s = tl.dot(b_xd, tl.trans(b_yd), b_s, input_precision=FLAGS.PRECISION)
    return b_s  # [BN, BM]


@triton.jit
def store_scores(store, b_s, o_n, o_m, N, M):
    """Save a tile of similarities for the backward, as multiples of a quantum per row times one per column.

    A similarity is at most the product of its rows' norms, which 16 bits resolve to 2^-16 whatever the other rows are.
    Without quanta similarities stay float32.
    """
    b_v = b_s
    if store.x_inverse is not None:
        b_v = b_s * load_vector(store.x_inverse, o_n, N, 0) * load_vector(store.y_inverse, o_m, M, 1)
        # adding 1.5 * 2^23 leaves the nearest integer in the low bits
        b_v = (b_v + 12582912.0).to(tl.int32, bitcast=True).to(tl.int16)
    tl.store(store.matrix + o_n[:, None] * M + o_m[None, :], b_v, mask=(o_n < N)[:, None] & (o_m < M)[None, :])


@triton.jit
def load_scores(scores, o_n, o_m, N, M):
    """Return similarities as `store_scores` left them, 0 outside."""
    m_s = (o_n < N)[:, None] & (o_m < M)[None, :]
    b_s = tl.load(scores.matrix + o_n[:, None] * M + o_m[None, :], mask=m_s, other=0).to(tl.float32)
    if scores.x_quantum is not None:
        b_s = b_s * load_vector(scores.x_quantum, o_n, N, 0) * load_vector(scores.y_quantum, o_m, M, 1)
    return b_s


@triton.jit
def exclude(b_v, b_s, pairs, cutoff, FILL: tl.constexpr, FLAGS: tl.constexpr):
    """Return b_v with FILL at every dropped pair: a select, so that nothing of a dropped pair survives, not even NaN.

    DIAGONALS views of pairs.size / DIAGONALS samples have as many diagonals on either side. `PLACES`, below 0:
    an id has a class in its upper half, and in the lower one a place.
    """
    DIAGONALS: tl.constexpr = FLAGS.DIAGONALS
    if DIAGONALS < 0:
        b_different = pairs.own_ids ^ pairs.other_ids
        m_equal = (b_different >> 32) == 0
        m_kept = m_equal if FLAGS.KEEP_EQUAL_IDS else m_equal == 0
        b_v = tl.where(m_kept & (b_different.to(tl.int32) != 0), b_v, FILL)
    elif FLAGS.IDS:
        m_kept = pairs.own_ids == pairs.other_ids if FLAGS.KEEP_EQUAL_IDS else pairs.own_ids != pairs.other_ids
        b_v = tl.where(m_kept, b_v, FILL)
    if DIAGONALS > 0:
        # uniform branch, taken only by tiles on a diagonal
        near = False
        for k in tl.static_range(2 * DIAGONALS - 1):
            i_k = pairs.ahead + (k + 1 - DIAGONALS) * (pairs.size // DIAGONALS)
            near = near | ((i_k < b_v.shape[0]) & (i_k > -b_v.shape[1]))
        if near:
            o_n = tl.arange(0, b_v.shape[0])[:, None]
            o_m = tl.arange(0, b_v.shape[1])[None, :] + pairs.ahead.to(tl.int32)
            m_kept = o_n != o_m
            for k in tl.static_range(1, DIAGONALS):
                samples = pairs.size // DIAGONALS
                m_kept = m_kept & (o_n != o_m + k * samples) & (o_n != o_m - k * samples)
            b_v = tl.where(m_kept, b_v, FILL)
    if FLAGS.CUT:
        # not `s <= cutoff`: a NaN similarity is kept
        b_v = tl.where(b_s > cutoff, FILL, b_v)
    return b_v


@triton.jit
def widen(lse, N, b_least, b_most, b_bad, BN: tl.constexpr):
    """Widen a range of base-2 logarithms by those of lse (N,); -inf is no logarithm, NaN and +inf set b_bad."""
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        b_lse = tl.load(lse + o_n, mask=o_n < N, other=float("-inf")) * log2e()
        m_finite = tl.abs(b_lse) < float("inf")
        b_least = tl.minimum(b_least, tl.where(m_finite, b_lse, float("inf")))
        b_most = tl.maximum(b_most, tl.where(m_finite, b_lse, float("-inf")))
        b_bad = tl.maximum(b_bad, tl.where(m_finite | (b_lse == float("-inf")), 0, 1))
    return b_least, b_most, b_bad


@triton.jit
def find_center(row_lse, col_lse, N, M, q: tl.constexpr, COLUMN_LSE: tl.constexpr, BN: tl.constexpr):
    """Return the shift of an exponent's logits with which one exponential serves a row's and a column's statistic.

    A probability exp2(u - lse) is exp2(u - center) times a factor of its row or column. No logit exceeds its
    log-sum-exp, so nothing overflows; what underflows does not matter unless the log-sum-exps are very far apart: the
    second result is then 1, and else 0. See docs/gpu.md.
    """
    # exponentials up to 2^60, so that factors keep gradients down to 2^-66; of log-sum-exps up to 140 apart, what is
    # lost below 2^-126 is 2^-46 of its own row
    LARGEST_EXPONENT: tl.constexpr = 60.0
    LARGEST_SPREAD: tl.constexpr = 140.0
    b_bad = tl.zeros([BN], tl.int32)
    b_least, b_most = tl.full([BN], float("inf"), tl.float32), tl.full([BN], float("-inf"), tl.float32)
    b_least, b_most, b_bad = widen(row_lse + q * N, N, b_least, b_most, b_bad, BN)
    if COLUMN_LSE and q == 0:
        b_least, b_most, b_bad = widen(col_lse, M, b_least, b_most, b_bad, BN)
    least, most = tl.min(b_least, 0), tl.max(b_most, 0)
    fails = (most - least > LARGEST_SPREAD).to(tl.int32) | tl.max(b_bad, 0)
    # if no log-sum-exp is finite, all factors are 0
    return tl.where(most == float("-inf"), 0.0, most - LARGEST_EXPONENT), fails


@triton.jit
def find_centers(row_lse, col_lse, N, M, Q: tl.constexpr, COLUMN_LSE: tl.constexpr, BN: tl.constexpr):
    """Return `find_center` of both exponents, that of the first for a second which is not there."""
    center_0, fails = find_center(row_lse, col_lse, N, M, 0, COLUMN_LSE, BN)
    center_1 = center_0
    if Q > 1:
        center_1, fails_1 = find_center(row_lse, col_lse, N, M, 1, COLUMN_LSE, BN)
        fails |= fails_1
    return (center_0, center_1), fails


@triton.jit
def store_center(center, centers, fails):
    """Write the (CENTER_SIZE,) vector that `load_center` reads."""
    tl.store(center, centers[0])
    tl.store(center + 1, centers[1])
    tl.store(center + 2, fails.to(tl.float32))


@triton.jit
def _center_bwd_kernel(row_lse, col_lse, center, N, M, Q: tl.constexpr, COLUMN_LSE: tl.constexpr, BN: tl.constexpr):
    """Write the center, see `find_center`, by one program."""
    centers, fails = find_centers(row_lse, col_lse, N, M, Q, COLUMN_LSE, BN)
    store_center(center, centers, fails)


@triton.jit
def load_center(center):
    """Return the centers of both exponents, and whether they cannot be used (not 0)."""
    return (tl.load(center), tl.load(center + 1)), tl.load(center + 2)


@triton.jit
def pack_vector(packed, name: tl.constexpr, b_v, o_n, stride):
    """Write one vector among the packed ones."""
    tl.store(packed + packed_row(name) * stride + o_n, b_v)


@triton.jit
def pack_statistics(
    packed, lse, grad, o_n, N, stride, b_grad_scale, centers, Q: tl.constexpr, CENTERED: tl.constexpr
):  # fmt: skip
    """Write the log-sum-exps (Q, N) of one axis, their gradients, and if CENTERED their factors.

    A log-sum-exp of -inf (no pair kept) becomes +inf with gradient 0, so that its weights are exactly 0.
    """
    m_n = o_n < N
    for q in tl.static_range(Q):
        b_lse = tl.load(lse + q * N + o_n, mask=m_n, other=float("-inf"))
        b_grad = tl.load(grad + q * N + o_n, mask=m_n, other=0.0) * b_grad_scale
        m_none = b_lse == float("-inf")
        p_packed = packed + 2 * q * stride + o_n
        tl.store(p_packed, tl.where(m_none, float("inf"), b_lse * log2e()))
        tl.store(p_packed + stride, tl.where(m_none, 0.0, b_grad))
        if CENTERED:
            b_factor = tl.exp2(centers[q] - b_lse * log2e()) * b_grad
            tl.store(packed + (packed_row("factor") + q) * stride + o_n, tl.where(m_none, 0.0, b_factor))


@triton.jit
def _pack_bwd_kernel(
    row_lse, row_grad, grad_sum, offset, cutoff, col_lse, col_grad, bias, grad_scale, center, rows, columns,
    N, M, row_stride, col_stride,
    Q: tl.constexpr, COLUMN_LSE: tl.constexpr, FIND_CENTER: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the vectors of the sweep's rows and columns into (PACKED_ROWS, stride), stride a multiple of any tile.

    Padded and converted once, they are loaded without masks by every tile. `grad_scale` scales all gradients, see
    `gradient_scale`. The second grid index is 1 for the columns. If FIND_CENTER, every program finds the center, which
    saves a launch, and one writes it.
    """
    centers = (0.0, 0.0)
    if FIND_CENTER:
        centers, fails = find_centers(row_lse, col_lse, N, M, Q, COLUMN_LSE, BC)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            store_center(center, centers, fails)
    elif center is not None:
        centers, _ = load_center(center)
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    b_grad_scale = 1.0
    if grad_scale is not None:
        b_grad_scale = tl.load(grad_scale)
    if tl.program_id(1) == 0:
        if tl.program_id(0) * BN < row_stride:
            m_n = o_n < N
            pack_statistics(rows, row_lse, row_grad, o_n, N, row_stride, b_grad_scale, centers, Q, center is not None)
            if grad_sum is not None:
                b_grad_sum = tl.load(grad_sum + o_n, mask=m_n, other=0.0) * b_grad_scale
                pack_vector(rows, "grad_sum", b_grad_sum, o_n, row_stride)
            if offset is not None:
                pack_vector(rows, "offset", tl.load(offset + o_n, mask=m_n, other=0.0), o_n, row_stride)
            if cutoff is not None:
                pack_vector(rows, "cutoff", tl.load(cutoff + o_n, mask=m_n, other=0.0), o_n, row_stride)
    elif tl.program_id(0) * BN < col_stride:
        if COLUMN_LSE:
            pack_statistics(
                columns, col_lse, col_grad, o_n, M, col_stride, b_grad_scale, centers, 1, center is not None
            )
        if bias is not None:
            b_bias = tl.load(bias + o_n, mask=o_n < M, other=0.0) * log2e()
            pack_vector(columns, "bias", b_bias, o_n, col_stride)


@triton.jit
def packed_vector(packed, o_n, stride, i_row: tl.constexpr, WANTED: tl.constexpr, AXIS: tl.constexpr):
    """Return one packed vector on AXIS of the tile; an unused 0.0 unless WANTED."""
    return tl.expand_dims(tl.load(packed + i_row * stride + o_n), 1 - AXIS) if WANTED else 0.0


@triton.jit
def load_statistic(
    packed, o_n, stride, centers, q: tl.constexpr, WANTED: tl.constexpr, FACTORED: tl.constexpr, AXIS: tl.constexpr
):
    """Return a log-sum-exp and its gradient; if FACTORED, the common center and a factor that makes up for it."""
    if FACTORED:
        b_lse = centers[q]
        b_grad = packed_vector(packed, o_n, stride, packed_row("factor") + q, WANTED, AXIS)
    else:
        b_lse = packed_vector(packed, o_n, stride, packed_row("lse") + 2 * q, WANTED, AXIS)
        b_grad = packed_vector(packed, o_n, stride, packed_row("grad") + 2 * q, WANTED, AXIS)
    return b_lse, b_grad


@triton.jit
def load_rows(packed, o_n, AXIS: tl.constexpr, FACTORED: tl.constexpr, FLAGS: tl.constexpr):
    """Return the `RowVectors` of the sweep's rows o_n."""
    p, stride = packed.rows, packed.row_stride
    lse_0, grad_0 = load_statistic(p, o_n, stride, packed.centers, 0, FLAGS.Q > 0, FACTORED, AXIS)
    lse_1, grad_1 = load_statistic(p, o_n, stride, packed.centers, 1, FLAGS.Q > 1, FACTORED, AXIS)
    return RowVectors(
        lse_0,
        grad_0,
        lse_1,
        grad_1,
        packed_vector(p, o_n, stride, packed_row("grad_sum"), FLAGS.TERM != "", AXIS),
        packed_vector(p, o_n, stride, packed_row("offset"), FLAGS.SHIFTED, AXIS),
        packed_vector(p, o_n, stride, packed_row("cutoff"), FLAGS.CUT, AXIS),
    )


@triton.jit
def load_columns(packed, o_m, AXIS: tl.constexpr, FACTORED: tl.constexpr, FLAGS: tl.constexpr):
    """Return the `ColumnVectors` of the sweep's columns o_m."""
    p, stride = packed.columns, packed.column_stride
    lse, grad = load_statistic(p, o_m, stride, packed.centers, 0, FLAGS.COLUMN_LSE, FACTORED, AXIS)
    return ColumnVectors(lse, grad, packed_vector(p, o_m, stride, packed_row("bias"), FLAGS.BIASED, AXIS))


@triton.jit
def pair_grad(b_s, rows, columns, pairs, scalars, FLAGS: tl.constexpr):
    """Return (soft, prob, slope, value) of a tile's pairs, each times its incoming gradient.

    The derivatives are with respect to scale * s (soft), to the logit's bias (prob) and to the argument of the term
    (slope); value is the term itself. A kernel computes only those that it uses.
    """
    Q: tl.constexpr = FLAGS.Q
    TERM: tl.constexpr = FLAGS.TERM
    # no derivative begins with the addition of 0, which the compiler may not drop
    b_zero = tl.zeros(b_s.shape, tl.float32)
    b_soft, b_prob, b_slope, b_value = b_zero, b_zero, b_zero, b_zero
    if Q > 0 or FLAGS.COLUMN_LSE:
        # a column statistic beside that of the row has the same logits: its exponent is 1 then
        b_u = b_s * (scalars.scale * log2e() * scalars.exponent_0)
        if FLAGS.BIASED:
            b_u += columns.bias
        b_u = exclude(b_u, b_s, pairs, rows.cutoff, float("-inf"), FLAGS)
    if Q > 0:
        b_e = tl.exp2(b_u - rows.lse_0)
        b_soft, b_prob = b_e * (rows.grad_0 * scalars.exponent_0), b_e * rows.grad_0
    if Q > 1:
        b_v = b_s * (scalars.scale * log2e() * scalars.exponent_1)
        if FLAGS.BIASED:
            b_v += columns.bias
        b_v = exclude(b_v, b_s, pairs, rows.cutoff, float("-inf"), FLAGS)
        b_e = tl.exp2(b_v - rows.lse_1)
        b_soft, b_prob = b_soft + b_e * (rows.grad_1 * scalars.exponent_1), b_prob + b_e * rows.grad_1
    if FLAGS.COLUMN_LSE:
        b_e = tl.exp2(b_u - columns.lse) * columns.grad
        b_soft = b_soft + b_e if Q > 0 else b_e
    if TERM != "":
        b_v = term_base(b_s, TERM) * scalars.term_scale
        if FLAGS.SHIFTED:
            b_v += rows.offset
        b_slope = phi_grad(b_v, scalars.constant_0, scalars.constant_1, TERM) * rows.grad_sum
        b_slope = exclude(b_slope, b_s, pairs, rows.cutoff, 0.0, FLAGS)
        b_value = phi(b_v, scalars.constant_0, scalars.constant_1, TERM) * rows.grad_sum
        b_value = exclude(b_value, b_s, pairs, rows.cutoff, 0.0, FLAGS)
    return b_soft, b_prob, b_slope, b_value


@triton.jit
def tile_grad(
    b_s, own, other, i_m, packed, scalars,
    AS_ROWS: tl.constexpr, AS_COLUMNS: tl.constexpr, FACTORED: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Return the weights that multiply the other features, and soft, prob, slope and value of `pair_grad`.

    The own block is on axis 0, that of the other operand begins at i_m; everything is 0 beyond the other one's last
    row. The own block acts as the sweep's rows, as its columns, or, x against itself, as both: soft, slope and value
    are then those of its part as rows, every pair once. The weights lack `weight_factor`. If FACTORED, the exponentials
    of both parts are the same number, which the compiler computes once.
    """
    TERM: tl.constexpr = FLAGS.TERM
    o_m = i_m + tl.arange(0, b_s.shape[1]).to(tl.int64)
    ahead = i_m - own.start
    pairs = Pairs(own.ids, load_ids(other.ids, o_m, other.size, 1, FLAGS.IDS), ahead, other.size)
    if AS_COLUMNS:
        other_rows = load_rows(packed, o_m, 1, FACTORED, FLAGS)
        b_soft, b_prob, b_slope, b_value = pair_grad(b_s, other_rows, own.columns, pairs, scalars, FLAGS)
        b_g = combine(b_soft, through_base(b_s, b_slope, TERM), scalars, FLAGS)
    if AS_ROWS:
        other_columns = load_columns(packed, o_m, 1, FACTORED, FLAGS)
        b_soft, b_row_prob, b_slope, b_value = pair_grad(b_s, own.rows, other_columns, pairs, scalars, FLAGS)
        b_row_g = combine(b_soft, through_base(b_s, b_slope, TERM), scalars, FLAGS)
        b_g, b_prob = (b_g + b_row_g, b_prob) if AS_COLUMNS else (b_row_g, b_row_prob)
    # uniform branch, taken only by a ragged last tile; zeros loaded for y do not suffice, 0 * inf is NaN
    if i_m + b_s.shape[1] > other.size:
        m_m = o_m[None, :] < other.size
        b_g = tl.where(m_m, b_g, 0.0)
        b_soft = tl.where(m_m, b_soft, 0.0)
        b_prob = tl.where(m_m, b_prob, 0.0)
        b_slope = tl.where(m_m, b_slope, 0.0)
        b_value = tl.where(m_m, b_value, 0.0)
    return b_g, b_soft, b_prob, b_slope, b_value


@triton.jit
def combine(b_soft, b_slope, scalars, FLAGS: tl.constexpr):
    """Return dL/ds up to `weight_factor`: the factors are applied per pair only if there are two of them."""
    SOFT: tl.constexpr = FLAGS.Q > 0 or FLAGS.COLUMN_LSE
    if SOFT and FLAGS.TERM != "":
        b_g = b_soft * scalars.scale + b_slope * scalars.term_scale
    elif SOFT:
        b_g = b_soft
    else:
        b_g = b_slope
    return b_g


@triton.jit
def inverse_of(grad_scale):
    """Return the factor that takes the gradients' power of two out of a sum."""
    b_factor = 1.0
    if grad_scale is not None:
        b_factor /= tl.load(grad_scale)
    return b_factor


@triton.jit
def weight_factor(grad_scale, scalars, FLAGS: tl.constexpr):
    """Return the float32 factor of a sum of weights."""
    SOFT: tl.constexpr = FLAGS.Q > 0 or FLAGS.COLUMN_LSE
    b_factor = inverse_of(grad_scale)
    if SOFT and FLAGS.TERM == "":
        b_factor *= scalars.scale
    if FLAGS.TERM != "" and not SOFT:
        b_factor *= scalars.term_scale
    return b_factor
