"""The least similar pair of each sample's views."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastive_kernels.engine.backends.triton.launch import block_count, launch_kernel

# Samples per program and elements of D at a time: a few registers per thread for any number of views. untuned
ROWS, DEPTH = 32, 64


@triton.jit
def _view_minimum_fwd_kernel(
    views, pairs, N, V, stride_n, stride_v, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Write pairs (N, 2): the first pair j < k, in row-major order, with the least similarity; a NaN is least."""
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < N
    p_n = views + o_n[:, None] * stride_n
    b_least = tl.full([BN], float("inf"), tl.float32)
    b_first, b_second = tl.zeros([BN], tl.int64), tl.full([BN], 1, tl.int64)
    for i_j in range(0, V - 1):
        for i_k in range(i_j + 1, V):
            b_s = tl.zeros([BN], tl.float32)
            for i_d in range(0, D, BD):
                o_d = i_d + tl.arange(0, BD)
                m_d = m_n[:, None] & (o_d < D)[None, :]
                b_j = tl.load(p_n + i_j * stride_v + o_d[None, :], mask=m_d, other=0.0).to(tl.float32)
                b_k = tl.load(p_n + i_k * stride_v + o_d[None, :], mask=m_d, other=0.0).to(tl.float32)
                b_s += tl.sum(b_j * b_k, 1)  # [BN]
            m_less = (b_s < b_least) | ((b_s != b_s) & (b_least == b_least))
            b_least = tl.where(m_less, b_s, b_least)
            b_first, b_second = tl.where(m_less, i_j, b_first), tl.where(m_less, i_k, b_second)
    tl.store(pairs + 2 * o_n, b_first, mask=m_n)
    tl.store(pairs + 2 * o_n + 1, b_second, mask=m_n)


def view_minimum_fwd(views: Tensor) -> Tensor:
    """Return the pairs (N, 2), int64, of views (N, V, D)."""
    views = views if views.stride(2) == 1 else views.contiguous()
    n, v, d = views.shape
    pairs = torch.empty((n, 2), dtype=torch.int64, device=views.device)
    launch_kernel(
        _view_minimum_fwd_kernel,
        (block_count(n, ROWS),),
        views=views,
        pairs=pairs,
        N=n,
        V=v,
        stride_n=views.stride(0),
        stride_v=views.stride(1),
        D=d,
        BN=ROWS,
        BD=DEPTH,
    )
    return pairs
