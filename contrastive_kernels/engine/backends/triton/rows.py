"""Rows of unit norm, the products of paired rows, and the gradients of both, each in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastive_kernels.engine.backends.triton.launch import block_count, launch_kernel
from contrastive_kernels.engine.spec import NORM_EPSILON

# Elements of D at a time, and of a program's block. untuned
DEPTH, BLOCK = 1024, 4096


@triton.jit
def _unit_rows_fwd_kernel(
    x, unit, norm, N, stride, EPSILON: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Write unit (N, D) and norm (N,) of x (N, D)."""
    o_n, o_d = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN), tl.arange(0, BD)
    m_n = o_n < N
    b_square = tl.zeros([BN], tl.float32)
    for i_d in range(0, D, BD):
        m_x = m_n[:, None] & (i_d + o_d < D)[None, :]
        b_x = tl.load(x + o_n[:, None] * stride + (i_d + o_d)[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_square += tl.sum(b_x * b_x, 1)
    b_norm = tl.sqrt(b_square)
    tl.store(norm + o_n, b_norm, mask=m_n)
    # NaN stays NaN
    b_divisor = tl.where(b_norm < EPSILON, EPSILON, b_norm)
    for i_d in range(0, D, BD):
        m_x = m_n[:, None] & (i_d + o_d < D)[None, :]
        b_x = tl.load(x + o_n[:, None] * stride + (i_d + o_d)[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_unit = b_x / b_divisor[:, None]
        tl.store(unit + o_n[:, None] * D + (i_d + o_d)[None, :], b_unit.to(unit.dtype.element_ty), mask=m_x)


@triton.jit
def _unit_rows_bwd_kernel(
    grad, x, norm, dx, N, stride_grad, stride,
    EPSILON: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write dx (N, D) from the gradient of the unit rows."""
    o_n, o_d = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN), tl.arange(0, BD)
    m_n = o_n < N
    b_norm = tl.load(norm + o_n, mask=m_n, other=1.0)
    b_inverse = tl.where(b_norm < EPSILON, 0.0, 1.0 / b_norm)
    b_dot = tl.zeros([BN], tl.float32)
    for i_d in range(0, D, BD):
        m_x = m_n[:, None] & (i_d + o_d < D)[None, :]
        b_g = tl.load(grad + o_n[:, None] * stride_grad + (i_d + o_d)[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_x = tl.load(x + o_n[:, None] * stride + (i_d + o_d)[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_dot += tl.sum(b_g * b_x, 1)
    # the cube of the inverse would leave the range of float32 at norms of 1e13
    b_along = b_dot * b_inverse
    for i_d in range(0, D, BD):
        m_x = m_n[:, None] & (i_d + o_d < D)[None, :]
        b_g = tl.load(grad + o_n[:, None] * stride_grad + (i_d + o_d)[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_x = tl.load(x + o_n[:, None] * stride + (i_d + o_d)[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_dx = (b_g - b_x * b_inverse[:, None] * b_along[:, None]) * b_inverse[:, None]
        tl.store(dx + o_n[:, None] * D + (i_d + o_d)[None, :], b_dx.to(dx.dtype.element_ty), mask=m_x)


@triton.jit
def _row_dot_fwd_kernel(x, y, dot, N, stride_x, stride_y, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """Write dot (N,), <x_n, y_n>."""
    o_n, o_d = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN), tl.arange(0, BD)
    m_n = o_n < N
    b_dot = tl.zeros([BN], tl.float32)
    for i_d in range(0, D, BD):
        m_x = m_n[:, None] & (i_d + o_d < D)[None, :]
        b_x = tl.load(x + o_n[:, None] * stride_x + (i_d + o_d)[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_y = tl.load(y + o_n[:, None] * stride_y + (i_d + o_d)[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_dot += tl.sum(b_x * b_y, 1)
    tl.store(dot + o_n, b_dot, mask=m_n)


@triton.jit
def _row_dot_bwd_kernel(
    grad, x, y, dx, dy, N, stride_x, stride_y, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Write dx and dy (N, D) from the gradient of the products; None is not computed."""
    o_n, o_d = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN), tl.arange(0, BD)
    m_n = o_n < N
    b_grad = tl.load(grad + o_n, mask=m_n, other=0.0)[:, None]
    for i_d in range(0, D, BD):
        m_x = m_n[:, None] & (i_d + o_d < D)[None, :]
        p_out = o_n[:, None] * D + (i_d + o_d)[None, :]
        if dx is not None:
            b_y = tl.load(y + o_n[:, None] * stride_y + (i_d + o_d)[None, :], mask=m_x, other=0.0).to(tl.float32)
            tl.store(dx + p_out, (b_grad * b_y).to(dx.dtype.element_ty), mask=m_x)
        if dy is not None:
            b_x = tl.load(x + o_n[:, None] * stride_x + (i_d + o_d)[None, :], mask=m_x, other=0.0).to(tl.float32)
            tl.store(dy + p_out, (b_grad * b_x).to(dy.dtype.element_ty), mask=m_x)


def block_sizes(d: int) -> dict[str, int]:
    """Return the block sizes as compile-time arguments."""
    depth = min(DEPTH, max(16, 1 << (d - 1).bit_length()))
    return dict(BN=max(1, BLOCK // depth), BD=depth)


def _matrix(x: Tensor) -> Tensor:
    """Return x as (rows, D) with inner stride 1."""
    x = x.flatten(0, -2) if x.dim() > 2 else x
    return x if x.stride(-1) == 1 else x.contiguous()


def _statistic(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return float32 memory for a number per row of x; 0 if rows have no entries."""
    return x.new_empty(shape, dtype=torch.float32) if x.numel() else x.new_zeros(shape, dtype=torch.float32)


def unit_rows_fwd(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unit rows (..., D) and the norms (..., 1)."""
    unit = torch.empty_like(x, memory_format=torch.contiguous_format)
    norm = _statistic(x, (*x.shape[:-1], 1))
    if x.numel():
        rows, sizes = _matrix(x), block_sizes(x.shape[-1])
        n, d = rows.shape
        launch_kernel(
            _unit_rows_fwd_kernel,
            (block_count(n, sizes["BN"]),),
            x=rows,
            unit=unit,
            norm=norm,
            N=n,
            stride=rows.stride(0),
            EPSILON=NORM_EPSILON,
            D=d,
            **sizes,
        )
    return unit, norm


def unit_rows_bwd(grad: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    """Return the gradient of x."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        rows, grad, sizes = _matrix(x), _matrix(grad), block_sizes(x.shape[-1])
        n, d = rows.shape
        launch_kernel(
            _unit_rows_bwd_kernel,
            (block_count(n, sizes["BN"]),),
            grad=grad,
            x=rows,
            norm=norm.contiguous(),
            dx=dx,
            N=n,
            stride_grad=grad.stride(0),
            stride=rows.stride(0),
            EPSILON=NORM_EPSILON,
            D=d,
            **sizes,
        )
    return dx


def row_dot_fwd(x: Tensor, y: Tensor) -> Tensor:
    """Return the products (...) of rows (..., D)."""
    dot = _statistic(x, x.shape[:-1])
    if x.numel():
        rows, others, sizes = _matrix(x), _matrix(y), block_sizes(x.shape[-1])
        n, d = rows.shape
        launch_kernel(
            _row_dot_fwd_kernel,
            (block_count(n, sizes["BN"]),),
            x=rows,
            y=others,
            dot=dot,
            N=n,
            stride_x=rows.stride(0),
            stride_y=others.stride(0),
            D=d,
            **sizes,
        )
    return dot


def row_dot_bwd(grad: Tensor, x: Tensor, y: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and y, empty if not wanted."""
    dx, dy = (torch.empty_like(x, memory_format=torch.contiguous_format) if want else x.new_empty(0) for want in wanted)
    if x.numel() and any(wanted):
        rows, others, sizes = _matrix(x), _matrix(y), block_sizes(x.shape[-1])
        n, d = rows.shape
        launch_kernel(
            _row_dot_bwd_kernel,
            (block_count(n, sizes["BN"]),),
            grad=grad.contiguous(),
            x=rows,
            y=others,
            dx=dx if wanted[0] else None,
            dy=dy if wanted[1] else None,
            N=n,
            stride_x=rows.stride(0),
            stride_y=others.stride(0),
            D=d,
            **sizes,
        )
    return dx, dy
