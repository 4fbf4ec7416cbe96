"""What happens to one tile of similarities, and the vectors that go with it: every kernel of the sweep uses this.

A kernel walks over pairs of an *owner*, whose block a program keeps, and a *streamed* operand. Either may hold the rows
of the sweep: vectors are put on the axis of the tile where their operand is, so that one epilogue serves dX, dY and the
self-similarity, where a tile plays both roles. Logits are in base 2.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# The square of the least distance that counts, for terms of distances.
LEAST_SQUARE = tl.constexpr(1e-12)
OUT = tl.constexpr(float("-inf"))

# Rows of the packed statistics, see `_pack_bwd_kernel`. Those of a sweep's row ...
LSE_0 = tl.constexpr(0)
GRAD_0 = tl.constexpr(1)
LSE_1 = tl.constexpr(2)
GRAD_1 = tl.constexpr(3)
GRAD_SUM = tl.constexpr(4)
OFFSET = tl.constexpr(5)
CUTOFF = tl.constexpr(6)
FACTOR_0 = tl.constexpr(7)
FACTOR_1 = tl.constexpr(8)
# ... and those of a sweep's column, which has one log-sum-exp in the places of the first.
BIAS = tl.constexpr(2)
PACKED_ROWS = 9

# What `_center_bwd_kernel` leaves behind: a center for each exponent, and whether one exponential will not do.
FLAG = tl.constexpr(2)
CENTER_SIZE = 3
# The largest exponent that a center lets an exponential have, and how far apart the log-sum-exps of one center may be:
# what is lost below 2^-126 is then 2^-46 of its own row.
HIGHEST = tl.constexpr(100.0)
SPREAD = tl.constexpr(180.0)


@triton.jit
def load_tile(p, o_n, o_d, N, stride, D: tl.constexpr):
    """Rows o_n and columns o_d of an (N, D) matrix with inner stride 1, 0 outside."""
    m_tile = (o_n < N)[:, None] & (o_d < D)[None, :]
    p_tile = p + o_n[:, None] * stride + o_d[None, :]
    return tl.load(p_tile, mask=m_tile, other=0.0)  # [BN, BD]


@triton.jit
def load_operand(p, tiles, i_n, i_d, o_n, o_d, N, stride, D: tl.constexpr):
    """The tile at row i_n and column i_d by the descriptor `tiles`; where that is None, `load_tile` of o_n and o_d."""
    return tiles.load([i_n, i_d]) if tiles is not None else load_tile(p, o_n, o_d, N, stride, D)  # [BN, BD]


@triton.jit
def load_vector(p, o_n, N, AXIS: tl.constexpr):
    """Entries o_n of a vector, 0 outside, as a tile operand whose extent is along AXIS.

    Of a descriptor instead of a pointer, one block: o_n is the first of its entries.
    """
    b_v = p.load([o_n]) if hasattr(p, "block_shape") else tl.load(p + o_n, mask=o_n < N, other=0)
    return tl.expand_dims(b_v, 1 - AXIS)


@triton.jit
def similarity(
    x, y, b_x, b_y, o_n, o_m, N, M, stride_x, stride_y, D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
    x_tiles=None, y_tiles=None, i_n=0, i_m=0,
):  # fmt: skip
    """s = <x_n, y_m> with float32 accumulation; b_x and b_y are the first BD columns of the two tiles.

    Where these are not all, the loop starts afresh, so that the compiler pipelines all of it and drops the two. With
    descriptors x_tiles and y_tiles it loads by them, from rows i_n and i_m on.
    """
    if D <= BD:
        b_s = tl.dot(b_x, tl.trans(b_y), input_precision=PRECISION)
    else:
        b_s = tl.zeros([b_x.shape[0], b_y.shape[0]], tl.float32)
        for i_d in range(0, D, BD):
            o_d = i_d + tl.arange(0, BD)
            b_xd = load_operand(x, x_tiles, i_n, i_d, o_n, o_d, N, stride_x, D)
            b_yd = load_operand(y, y_tiles, i_m, i_d, o_m, o_d, M, stride_y, D)
            b_s = tl.dot(b_xd, tl.trans(b_yd), b_s, input_precision=PRECISION)
    return b_s  # [BN, BM]


@triton.jit
def store_scores(scores, b_s, x_inverse, y_inverse, o_n, o_m, N, M):
    """Save a tile of similarities for the backward: times the inverses of both units, rounded to 16 bits.

    A similarity is at most the product of its rows' norms, so that the error is 2^-16 of that, whatever the range of
    the others. Without inverses they stay float32.
    """
    b_v = b_s
    if x_inverse is not None:
        b_v = b_s * load_vector(x_inverse, o_n, N, 0) * load_vector(y_inverse, o_m, M, 1)
        # adding 1.5 * 2^23 leaves the nearest integer in the low bits
        b_v = (b_v + 12582912.0).to(tl.int32, bitcast=True).to(tl.int16)
    tl.store(scores + o_n[:, None] * M + o_m[None, :], b_v, mask=(o_n < N)[:, None] & (o_m < M)[None, :])


@triton.jit
def load_scores(scores, x_unit, y_unit, o_n, o_m, N, M):
    """Similarities as `store_scores` left them, 0 outside."""
    m_s = (o_n < N)[:, None] & (o_m < M)[None, :]
    b_s = tl.load(scores + o_n[:, None] * M + o_m[None, :], mask=m_s, other=0).to(tl.float32)
    if x_unit is not None:
        b_s = b_s * load_vector(x_unit, o_n, N, 0) * load_vector(y_unit, o_m, M, 1)
    return b_s


@triton.jit
def exclude(
    b_v, b_s, own_id, str_id, ahead, M, cutoff, FILL: tl.constexpr,
    IDS: tl.constexpr, SAME: tl.constexpr, DIAGONAL: tl.constexpr, CUT: tl.constexpr,
    SPECIALIZED: tl.constexpr = False,
):  # fmt: skip
    """b_v with FILL at every dropped pair: a select, so that nothing of a dropped pair survives, not even NaN.

    `ahead` is how far the first streamed element is ahead of the owner's first. DIAGONAL views of M / DIAGONAL samples
    have as many diagonals on either side. A SPECIALIZED loop admits no branch.
    """
    if IDS:
        m_kept = own_id == str_id if SAME else own_id != str_id
        b_v = tl.where(m_kept, b_v, FILL)
    if DIAGONAL:
        # the same for the whole program: only tiles on a diagonal pay
        near = False
        for k in tl.static_range(2 * DIAGONAL - 1):
            i_k = ahead + (k + 1 - DIAGONAL) * (M // DIAGONAL)
            near = near | ((i_k < b_v.shape[0]) & (i_k > -b_v.shape[1]))
        if SPECIALIZED or near:
            o_n, o_m = tl.arange(0, b_v.shape[0])[:, None], tl.arange(0, b_v.shape[1])[None, :] + ahead.to(tl.int32)
            m_kept = o_n != o_m
            for k in tl.static_range(1, DIAGONAL):
                m_kept = m_kept & (o_n != o_m + k * (M // DIAGONAL)) & (o_n != o_m - k * (M // DIAGONAL))
            b_v = tl.where(m_kept, b_v, FILL)
    if CUT:
        # not `s <= cutoff`: a NaN similarity is kept
        b_v = tl.where(b_s > cutoff, FILL, b_v)
    return b_v


@triton.jit
def log1p_unit(b_v):
    """log(1 + v) for v in [0, 1], relative error 4e-7; NaN stays. The library's logarithm is far too slow per pair."""
    b_p = b_v * -0.00853916816 + 0.0440894887
    b_p = b_p * b_v - 0.107681513
    b_p = b_p * b_v + 0.177452266
    b_p = b_p * b_v - 0.244954571
    b_p = b_p * b_v + 0.332754791
    b_p = b_p * b_v - 0.499974042
    return (b_p * b_v + 0.999999821) * b_v


@triton.jit
def term_base(b_s, TERM: tl.constexpr):
    """What the argument of the term is linear in: the similarity, or minus the distance of unit rows."""
    if TERM == "distance_hinge":
        b_b = -tl.sqrt(tl.maximum(2.0 - 2.0 * b_s, LEAST_SQUARE, propagate_nan=tl.PropagateNan.ALL))
    else:
        b_b = b_s
    return b_b


@triton.jit
def through_base(b_s, b_slope, TERM: tl.constexpr):
    """The slope times the derivative of `term_base`."""
    if TERM == "distance_hinge":
        b_square = 2.0 - 2.0 * b_s
        b_g = tl.where(b_square < LEAST_SQUARE, 0.0, b_slope * tl.rsqrt(b_square))
    else:
        b_g = b_slope
    return b_g


@triton.jit
def phi(b_v, constant_0, constant_1, TERM: tl.constexpr):
    """The term; NaN stays NaN, for which tl.maximum has to be asked."""
    if TERM == "identity":
        b_p = b_v
    elif TERM == "count":
        b_p = tl.full(b_v.shape, 1.0, tl.float32)
    elif TERM == "square":
        b_p = b_v * b_v
    elif TERM == "band":
        b_d = 0.5 - 0.5 * b_v
        b_p = tl.maximum((b_d - constant_0) * (constant_1 - b_d), 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif TERM == "softplus":
        b_p = tl.maximum(b_v, 0.0) + log1p_unit(tl.exp2(-LOG2E * tl.abs(b_v)))
    elif TERM == "hinge" or TERM == "distance_hinge":
        b_p = tl.maximum(b_v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif TERM == "student":
        b_q = 1.0 + tl.maximum(b_v, 0.0, propagate_nan=tl.PropagateNan.ALL)
        b_p = tl.exp2(-constant_0 * tl.log2(b_q))
    else:
        tl.static_assert(TERM == "gaussian", "unknown term")
        b_p = tl.exp2((2.0 * LOG2E) * constant_0 * (b_v - 1.0))
    return b_p


@triton.jit
def phi_grad(b_v, constant_0, constant_1, TERM: tl.constexpr):
    """The derivative of the term. Comparisons single out where it is 0, so that NaN takes the other branch."""
    if TERM == "identity":
        b_p = tl.full(b_v.shape, 1.0, tl.float32)
    elif TERM == "count":
        b_p = tl.zeros(b_v.shape, tl.float32)
    elif TERM == "square":
        b_p = 2.0 * b_v
    elif TERM == "band":
        b_d = 0.5 - 0.5 * b_v
        b_p = tl.where((b_d <= constant_0) | (b_d >= constant_1), 0.0, b_d - 0.5 * (constant_0 + constant_1))
    elif TERM == "softplus":
        b_e = tl.exp2(-LOG2E * tl.abs(b_v))
        b_r = 1.0 / (1.0 + b_e)
        b_p = tl.where(b_v >= 0, b_r, b_e * b_r)
    elif TERM == "hinge" or TERM == "distance_hinge":
        b_p = tl.where(b_v <= 0, 0.0, 1.0 + 0.0 * tl.minimum(b_v, 0.0, propagate_nan=tl.PropagateNan.ALL))
    elif TERM == "student":
        b_q = 1.0 + tl.maximum(b_v, 0.0, propagate_nan=tl.PropagateNan.ALL)
        b_p = -constant_0 * tl.exp2((-constant_0 - 1.0) * tl.log2(b_q))
    else:
        tl.static_assert(TERM == "gaussian", "unknown term")
        b_p = 2.0 * constant_0 * tl.exp2((2.0 * LOG2E) * constant_0 * (b_v - 1.0))
    return b_p


@triton.jit
def widen(lse, N, b_least, b_most, b_bad, BN: tl.constexpr):
    """The range of logarithms in base 2, among them those of lse (N,); -inf are none, and NaN or +inf are bad."""
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        b_lse = tl.load(lse + o_n, mask=o_n < N, other=OUT) * LOG2E
        m_finite = tl.abs(b_lse) < -OUT
        b_least = tl.minimum(b_least, tl.where(m_finite, b_lse, -OUT))
        b_most = tl.maximum(b_most, tl.where(m_finite, b_lse, OUT))
        b_bad = tl.maximum(b_bad, tl.where(m_finite | (b_lse == OUT), 0, 1))
    return b_least, b_most, b_bad


@triton.jit
def _center_bwd_kernel(row_lse, col_lse, center, N, M, Q: tl.constexpr, COLUMNS: tl.constexpr, BN: tl.constexpr):
    """By how much to shift the logits of each exponent so that one exponential serves a row's and a column's statistic.

    A probability exp2(u - lse) is then exp2(u - center) times a factor of its row or column. As no logit exceeds its
    log-sum-exp, nothing overflows, and what underflows does not matter unless the log-sum-exps are very far apart.
    """
    b_bad = tl.zeros([BN], tl.int32)
    flag = 0
    for q in tl.static_range(Q):
        b_least, b_most = tl.full([BN], -OUT, tl.float32), tl.full([BN], OUT, tl.float32)
        b_least, b_most, b_bad = widen(row_lse + q * N.to(tl.int64), N, b_least, b_most, b_bad, BN)
        if COLUMNS and q == 0:
            b_least, b_most, b_bad = widen(col_lse, M, b_least, b_most, b_bad, BN)
        least, most = tl.min(b_least, 0), tl.max(b_most, 0)
        # no log-sum-exp is finite: nothing is multiplied by anything but 0
        tl.store(center + q, tl.where(most == OUT, 0.0, most - HIGHEST))
        flag |= (most - least > SPREAD).to(tl.int32)
    flag |= tl.max(b_bad, 0)
    tl.store(center + FLAG, flag.to(tl.float32))


@triton.jit
def _pack_bwd_kernel(
    lse, grad, grad_sum, offset, cutoff, bias, unit, center, packed, N, stride,
    Q: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The vectors of one axis of the sweep as tiles want them: (PACKED_ROWS, stride), stride a multiple of any tile.

    Padded and converted once, they are loaded without masks by every tile. A log-sum-exp of -inf (no pair kept) becomes
    +inf with gradient 0, so that its weights are exactly 0. `unit` scales all gradients, see `gradient_unit`.
    """
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < N
    p_packed = packed + o_n
    b_unit = 1.0
    if unit is not None:
        b_unit = tl.load(unit)
    for q in tl.static_range(Q):
        b_lse = tl.load(lse + q * N + o_n, mask=m_n, other=OUT)
        b_grad = tl.load(grad + q * N + o_n, mask=m_n, other=0.0) * b_unit
        m_none = b_lse == OUT
        tl.store(p_packed + 2 * q * stride, tl.where(m_none, -OUT, b_lse * LOG2E))
        tl.store(p_packed + (2 * q + 1) * stride, tl.where(m_none, 0.0, b_grad))
        if center is not None:
            b_factor = tl.exp2(tl.load(center + q) - b_lse * LOG2E) * b_grad
            tl.store(p_packed + (FACTOR_0 + q) * stride, tl.where(m_none, 0.0, b_factor))
    if grad_sum is not None:
        tl.store(p_packed + GRAD_SUM * stride, tl.load(grad_sum + o_n, mask=m_n, other=0.0) * b_unit)
    if offset is not None:
        tl.store(p_packed + OFFSET * stride, tl.load(offset + o_n, mask=m_n, other=0.0))
    if cutoff is not None:
        tl.store(p_packed + CUTOFF * stride, tl.load(cutoff + o_n, mask=m_n, other=0.0))
    if bias is not None:
        tl.store(p_packed + BIAS * stride, tl.load(bias + o_n, mask=m_n, other=0.0) * LOG2E)


@triton.jit
def packed_vector(packed, o_n, stride, i_row: tl.constexpr, WANTED: tl.constexpr, AXIS: tl.constexpr):
    """One packed vector on AXIS of the tile; a 0 that nobody reads where it is not wanted. o_n: see `load_vector`."""
    if WANTED:
        i_0 = i_row * stride
        b_v = packed.load([i_0 + o_n]) if hasattr(packed, "block_shape") else tl.load(packed + i_0 + o_n)
        b_v = tl.expand_dims(b_v, 1 - AXIS)
    else:
        b_v = 0.0
    return b_v


@triton.jit
def load_ids(ids, o_n, N, AXIS: tl.constexpr, IDS: tl.constexpr):
    """The ids of a block on AXIS of the tile."""
    return load_vector(ids, o_n, N, AXIS) if IDS else 0


@triton.jit
def load_statistic(
    packed, o_n, stride, centers, q: tl.constexpr, WANTED: tl.constexpr, FACTORED: tl.constexpr, AXIS: tl.constexpr
):
    """A log-sum-exp and its gradient; FACTORED, the center of all of them and a factor that makes up for it."""
    if FACTORED:
        b_lse = centers[q]
        b_grad = packed_vector(packed, o_n, stride, FACTOR_0 + q, WANTED, AXIS)
    else:
        b_lse = packed_vector(packed, o_n, stride, LSE_0 + 2 * q, WANTED, AXIS)
        b_grad = packed_vector(packed, o_n, stride, GRAD_0 + 2 * q, WANTED, AXIS)
    return b_lse, b_grad


@triton.jit
def load_rows(
    packed, o_n, stride, centers, AXIS: tl.constexpr,
    Q: tl.constexpr, TERM: tl.constexpr, SHIFTED: tl.constexpr, CUT: tl.constexpr, FACTORED: tl.constexpr,
):  # fmt: skip
    """What a gradient needs of the sweep's rows o_n."""
    lse_0, grad_0 = load_statistic(packed, o_n, stride, centers, 0, Q > 0, FACTORED, AXIS)
    lse_1, grad_1 = load_statistic(packed, o_n, stride, centers, 1, Q > 1, FACTORED, AXIS)
    return (
        lse_0,
        grad_0,
        lse_1,
        grad_1,
        packed_vector(packed, o_n, stride, GRAD_SUM, TERM != "", AXIS),
        packed_vector(packed, o_n, stride, OFFSET, SHIFTED, AXIS),
        packed_vector(packed, o_n, stride, CUTOFF, CUT, AXIS),
    )


@triton.jit
def load_columns(
    packed, o_m, stride, centers, AXIS: tl.constexpr, COLUMNS: tl.constexpr, BIASED: tl.constexpr,
    FACTORED: tl.constexpr,
):  # fmt: skip
    """What a gradient needs of the sweep's columns o_m."""
    lse, grad = load_statistic(packed, o_m, stride, centers, 0, COLUMNS, FACTORED, AXIS)
    return (
        lse,
        grad,
        packed_vector(packed, o_m, stride, BIAS, BIASED, AXIS),
    )


@triton.jit
def pair_grad(
    b_s, rows, cols, own_id, str_id, ahead, M,
    b_scale, b_term_scale, exponent_0, exponent_1, constant_0, constant_1,
    Q: tl.constexpr, COLUMNS: tl.constexpr, TERM: tl.constexpr, BIASED: tl.constexpr, SHIFTED: tl.constexpr,
    IDS: tl.constexpr, SAME: tl.constexpr, DIAGONAL: tl.constexpr, CUT: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """The three derivatives of a tile's pairs, each times the incoming gradients: with respect to scale * s (soft), to
    the logit's bias (prob) and to the argument of the term (slope); and the term's value, times its gradient likewise.
    What a kernel does not use, it does not compute.
    """
    lse_0, grad_0, lse_1, grad_1, grad_sum, offset, cutoff = rows
    col_lse, grad_col, bias = cols
    # Every derivative is assigned before it is added to: the compiler may not drop an addition of 0.
    b_zero = tl.zeros(b_s.shape, tl.float32)
    b_soft, b_prob, b_slope, b_value = b_zero, b_zero, b_zero, b_zero
    if Q > 0 or COLUMNS:
        # a column statistic beside that of the row has the same logits: its exponent is 1 then
        b_u = b_s * (b_scale * LOG2E * exponent_0)
        if BIASED:
            b_u += bias
        b_u = exclude(b_u, b_s, own_id, str_id, ahead, M, cutoff, OUT, IDS, SAME, DIAGONAL, CUT, SPECIALIZED)
    if Q > 0:
        b_e = tl.exp2(b_u - lse_0)
        b_soft, b_prob = b_e * (grad_0 * exponent_0), b_e * grad_0
    if Q > 1:
        b_v = b_s * (b_scale * LOG2E * exponent_1)
        if BIASED:
            b_v += bias
        b_v = exclude(b_v, b_s, own_id, str_id, ahead, M, cutoff, OUT, IDS, SAME, DIAGONAL, CUT, SPECIALIZED)
        b_e = tl.exp2(b_v - lse_1)
        b_soft, b_prob = b_soft + b_e * (grad_1 * exponent_1), b_prob + b_e * grad_1
    if COLUMNS:
        b_e = tl.exp2(b_u - col_lse) * grad_col
        b_soft = b_soft + b_e if Q > 0 else b_e
    if TERM != "":
        b_v = term_base(b_s, TERM) * b_term_scale
        if SHIFTED:
            b_v += offset
        b_slope = phi_grad(b_v, constant_0, constant_1, TERM) * grad_sum
        b_slope = exclude(b_slope, b_s, own_id, str_id, ahead, M, cutoff, 0.0, IDS, SAME, DIAGONAL, CUT, SPECIALIZED)
        b_value = phi(b_v, constant_0, constant_1, TERM) * grad_sum
        b_value = exclude(b_value, b_s, own_id, str_id, ahead, M, cutoff, 0.0, IDS, SAME, DIAGONAL, CUT, SPECIALIZED)
    return b_soft, b_prob, b_slope, b_value


@triton.jit
def tile_grad(
    b_s, own_rows, own_cols, own_id, i_n, row_stats, col_stats, centers, y_ids, i_m, M, row_stride, col_stride,
    b_scale, b_term_scale, exponent_0, exponent_1, constant_0, constant_1,
    AS_ROWS: tl.constexpr, AS_COLUMNS: tl.constexpr, Q: tl.constexpr, COLUMNS: tl.constexpr, TERM: tl.constexpr,
    BIASED: tl.constexpr, SHIFTED: tl.constexpr, IDS: tl.constexpr, SAME: tl.constexpr, DIAGONAL: tl.constexpr,
    CUT: tl.constexpr, FACTORED: tl.constexpr, SPECIALIZED: tl.constexpr = False,
):  # fmt: skip
    """The weights that multiply the streamed operand, the owner at i_n on axis 0, the streamed block at i_m on axis 1,
    and what the other results are sums of: (weights, soft, prob, slope, value), see `pair_grad`; 0 beyond the last
    streamed.

    The owner acts as the sweep's rows, as its columns, or, x against itself, as both. In that case soft, slope and
    value are those of its part as rows: every pair once. The weights lack `weight_factor`. FACTORED, the exponentials
    of both parts are the same number, which the compiler computes once. SPECIALIZED, what is streamed comes through
    descriptors and ends with a whole tile.
    """
    o_m = i_m + tl.arange(0, b_s.shape[1]).to(tl.int64)
    ahead = i_m - i_n
    o_str = i_m if SPECIALIZED else o_m
    str_id = load_ids(y_ids, o_str, M, 1, IDS)
    SOFT: tl.constexpr = Q > 0 or COLUMNS
    if AS_COLUMNS:
        str_rows = load_rows(row_stats, o_str, row_stride, centers, 1, Q, TERM, SHIFTED, CUT, FACTORED)
        b_soft, b_prob, b_slope, b_value = pair_grad(
            b_s, str_rows, own_cols, own_id, str_id, ahead, M,
            b_scale, b_term_scale, exponent_0, exponent_1, constant_0, constant_1,
            Q, COLUMNS, TERM, BIASED, SHIFTED, IDS, SAME, DIAGONAL, CUT, SPECIALIZED,
        )  # fmt: skip
        b_g = combine(b_soft, through_base(b_s, b_slope, TERM), b_scale, b_term_scale, SOFT, TERM)
    if AS_ROWS:
        str_cols = load_columns(col_stats, o_str, col_stride, centers, 1, COLUMNS, BIASED, FACTORED)
        b_soft, b_row_prob, b_slope, b_value = pair_grad(
            b_s, own_rows, str_cols, own_id, str_id, ahead, M,
            b_scale, b_term_scale, exponent_0, exponent_1, constant_0, constant_1,
            Q, COLUMNS, TERM, BIASED, SHIFTED, IDS, SAME, DIAGONAL, CUT, SPECIALIZED,
        )  # fmt: skip
        b_row_g = combine(b_soft, through_base(b_s, b_slope, TERM), b_scale, b_term_scale, SOFT, TERM)
        b_g, b_prob = (b_g + b_row_g, b_prob) if AS_COLUMNS else (b_row_g, b_row_prob)
    # The same for the whole program: only a ragged last tile pays. Zeros loaded for y do not suffice, 0 * inf is NaN.
    if not SPECIALIZED and i_m + b_s.shape[1] > M:
        m_m = o_m[None, :] < M
        b_g = tl.where(m_m, b_g, 0.0)
        b_soft = tl.where(m_m, b_soft, 0.0)
        b_prob = tl.where(m_m, b_prob, 0.0)
        b_slope = tl.where(m_m, b_slope, 0.0)
        b_value = tl.where(m_m, b_value, 0.0)
    return b_g, b_soft, b_prob, b_slope, b_value


@triton.jit
def combine(b_soft, b_slope, b_scale, b_term_scale, SOFT: tl.constexpr, TERM: tl.constexpr):
    """dL/ds up to `weight_factor`: the factors are applied per pair only where there are two of them."""
    if SOFT and TERM != "":
        b_g = b_soft * b_scale + b_slope * b_term_scale
    elif SOFT:
        b_g = b_soft
    else:
        b_g = b_slope
    return b_g


@triton.jit
def weight_factor(unit, b_scale, b_term_scale, SOFT: tl.constexpr, TERM: tl.constexpr):
    """What a sum of weights is to be multiplied by in float32."""
    b_factor = 1.0
    if unit is not None:
        b_factor /= tl.load(unit)
    if SOFT and TERM == "":
        b_factor *= b_scale
    if TERM != "" and not SOFT:
        b_factor *= b_term_scale
    return b_factor
