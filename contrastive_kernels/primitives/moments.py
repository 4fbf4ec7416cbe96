"""Second moments of the features, from D x D or N x N products, and their gradients in few products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contrastive_kernels.engine.autograd import apply
from contrastive_kernels.primitives.rows import row_dot, wide_products

__all__ = ["cross_moments", "row_squares"]


class _Gram(torch.autograd.Function):
    """``x.T @ x``; its gradient takes one product, where that of two factors takes two."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.T @ x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x: Tensor
        (x,) = ctx.saved_tensors
        with wide_products(x):
            return x @ (grad + grad.T)


class _RowSquares(torch.autograd.Function):
    """``sum_j <x_i, y_j>**2`` of every row of x, from the D x D moments of y; the forward product is x's gradient."""

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        product = x @ (y.T @ y)
        return row_dot(product, x), product

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, product = output
        ctx.mark_non_differentiable(product)
        ctx.save_for_backward(*inputs, product)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, y, product = ctx.saved_tensors
        needs_x, needs_y = ctx.needs_input_grad
        grad = 2 * grad[:, None]
        with wide_products(x):
            if needs_x and torch.is_grad_enabled():
                # The product that was saved has no graph for a second derivative.
                product = x @ (y.T @ y)
            return grad * product if needs_x else None, y @ (x.T @ (grad * x)) if needs_y else None


def row_squares(x: Tensor, y: Tensor) -> Tensor:
    """Return ``sum_j <x_i, y_j>**2`` of every row of x, O(N D^2)."""
    with wide_products(x):
        squares: Tensor = apply(_RowSquares, x, y)[0]
    return squares


def cross_moments(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the diagonal (D,) of ``a.T @ b`` and the sum of squares off it, from the smaller of D x D and N x N."""
    n, d = a.shape
    with wide_products(a):
        if n > d:
            moments = apply(_Gram, a) if b is a else a.T @ b
            diagonal = moments.diagonal()
            # Left out rather than subtracted: features that are decorrelated keep the digits of what is left.
            off_diagonal = moments.masked_fill(torch.eye(d, dtype=torch.bool, device=a.device), 0)
            return diagonal, off_diagonal.square().sum()
        # A matrix of rank below D has much off its diagonal: here the subtraction does not cancel.
        diagonal = (a * b).sum(0)
        gram_a = apply(_Gram, a.T)
        gram_b = gram_a if b is a else apply(_Gram, b.T)
        return diagonal, (gram_a * gram_b).sum() - diagonal.square().sum()
