"""The terms of `engine.terms` on the device: values, slopes, and what their arguments are linear in."""

from __future__ import annotations

import triton
import triton.language as tl

from contrastive_kernels.engine.backends.triton.bundles import log2e


@triton.constexpr_function
def least_square() -> float:
    """Return the square of the least distance that counts, for terms of distances."""
    return 1e-12


@triton.jit
def log1p_unit(b_v):
    """Return log(1 + v) for v in [0, 1], relative error 4e-7; NaN stays. The library's logarithm is too slow a pair."""
    b_p = b_v * -0.00853916816 + 0.0440894887
    b_p = b_p * b_v - 0.107681513
    b_p = b_p * b_v + 0.177452266
    b_p = b_p * b_v - 0.244954571
    b_p = b_p * b_v + 0.332754791
    b_p = b_p * b_v - 0.499974042
    return (b_p * b_v + 0.999999821) * b_v


@triton.jit
def term_base(b_s, TERM: tl.constexpr):
    """Return what the term's argument is linear in: the similarity, or minus the distance of unit rows."""
    if TERM == "distance_hinge":
        b_b = -tl.sqrt(tl.maximum(2.0 - 2.0 * b_s, least_square(), propagate_nan=tl.PropagateNan.ALL))
    else:
        b_b = b_s
    return b_b


@triton.jit
def through_base(b_s, b_slope, TERM: tl.constexpr):
    """Return the slope times the derivative of `term_base`."""
    if TERM == "distance_hinge":
        b_square = 2.0 - 2.0 * b_s
        b_g = tl.where(b_square < least_square(), 0.0, b_slope * tl.rsqrt(b_square))
    else:
        b_g = b_slope
    return b_g


@triton.jit
def phi(b_v, constant_0, constant_1, TERM: tl.constexpr):
    """Return the term; NaN stays NaN, which tl.maximum does only if told so."""
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
        b_p = tl.maximum(b_v, 0.0) + log1p_unit(tl.exp2(-log2e() * tl.abs(b_v)))
    elif TERM == "hinge" or TERM == "distance_hinge":
        b_p = tl.maximum(b_v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif TERM == "student":
        b_q = 1.0 + tl.maximum(b_v, 0.0, propagate_nan=tl.PropagateNan.ALL)
        b_p = tl.exp2(-constant_0 * tl.log2(b_q))
    else:
        tl.static_assert(TERM == "gaussian", "unknown term")
        b_p = tl.exp2((2.0 * log2e()) * constant_0 * (b_v - 1.0))
    return b_p


@triton.jit
def phi_grad(b_v, constant_0, constant_1, TERM: tl.constexpr):
    """Return the derivative of the term. Comparisons single out where it is 0, so that NaN takes the other branch."""
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
        b_e = tl.exp2(-log2e() * tl.abs(b_v))
        b_r = 1.0 / (1.0 + b_e)
        b_p = tl.where(b_v >= 0, b_r, b_e * b_r)
    elif TERM == "hinge" or TERM == "distance_hinge":
        b_p = tl.where(b_v <= 0, 0.0, 1.0 + 0.0 * tl.minimum(b_v, 0.0, propagate_nan=tl.PropagateNan.ALL))
    elif TERM == "student":
        b_q = 1.0 + tl.maximum(b_v, 0.0, propagate_nan=tl.PropagateNan.ALL)
        b_p = -constant_0 * tl.exp2((-constant_0 - 1.0) * tl.log2(b_q))
    else:
        tl.static_assert(TERM == "gaussian", "unknown term")
        b_p = 2.0 * constant_0 * tl.exp2((2.0 * log2e()) * constant_0 * (b_v - 1.0))
    return b_p
