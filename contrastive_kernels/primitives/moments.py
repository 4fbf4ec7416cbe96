"""Second moments of the features, from D x D or N x N products, and their gradients in few products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contrastive_kernels.engine.autograd import apply
from contrastive_kernels.primitives.devices import known, reading_is_free
from contrastive_kernels.primitives.rows import gather_rows, wide_products, wide_sums
from contrastive_kernels.primitives.shards import ALONE, Shards

__all__ = ["centred_rows", "cross_moments", "moments_pay", "row_squares"]


class _Gram(torch.autograd.Function):
    """``x.T @ x``, also of a batch; its gradient takes one product, where that of two factors takes two."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.mT @ x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x: Tensor
        (x,) = ctx.saved_tensors
        both = grad + grad.mT
        with wide_products(x):
            # laid out as x: the operation before goes through its gradient once more
            return x @ both if x.is_contiguous() else (both @ x.mT).mT


class _Centred(torch.autograd.Function):
    """``x - x.mean(0)``, which is its own derivative; that of the mean alone would be a matrix like x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x - x.mean(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return centred_rows(grad)


class _RowSquares(torch.autograd.Function):
    """``sum_j <x_i, y_j>**2`` of every row of x, from the D x D moments of y; the forward product is x's gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        product = x @ (y.T @ y)
        return (product * x).sum(1, dtype=wide_sums(x)), product

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, product = output
        ctx.mark_non_differentiable(product)
        ctx.save_for_backward(*inputs, product)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, y, product = ctx.saved_tensors
        needs_x, needs_y = ctx.needs_input_grad
        grad = 2 * grad[:, None].to(x.dtype)
        with wide_products(x):
            if needs_x and torch.is_grad_enabled():
                # The product that was saved has no graph for a second derivative.
                product = x @ (y.T @ y)
            return grad * product if needs_x else None, y @ (x.T @ (grad * x)) if needs_y else None


def centred_rows(x: Tensor, shards: Shards = ALONE) -> Tensor:
    """Return the rows without their mean, that of all ranks."""
    found: Tensor = apply(_Centred, x) if shards.alone else x - shards.column_means(x)
    return found


def row_squares(x: Tensor, y: Tensor, own: Tensor | None = None, shards: Shards = ALONE) -> Tensor:
    """Return ``sum_j <x_i, y_j>**2`` of every row of x over the rows of y, O(N D^2), in the dtype of wide sums.

    With ``own``, the similarities of the pairs (i, i), over j != i only.
    """
    wide = wide_sums(x)
    with wide_products(x):
        if not shards.alone:
            # in wide sums from the start: whether a subtraction is safe is not known without the other ranks
            x, y = x.to(wide), y.to(wide)
            of_all = ((x @ shards.sum(y.T @ y)) * x).sum(1)
            return of_all if own is None else of_all - own.square()
        squares: Tensor = apply(_RowSquares, x, y)[0]
        if own is None:
            return squares
        own = own.square()
        if not _subtraction_is_safe(squares, own):
            longest, is_long = _longest(x, y, x.shape[1])
            to_longest = (x @ gather_rows(y, longest).T).masked_fill(_own(longest, x.shape[0]).T, 0)
            squares = apply(_RowSquares, x, y.masked_fill(is_long[:, None], 0))[0]
            squares = squares + to_longest.square().sum(1, dtype=wide)
            own = own.masked_fill(is_long, 0)
        return squares - own


def cross_moments(a: Tensor, b: Tensor, shards: Shards = ALONE) -> tuple[Tensor, Tensor]:
    """Return the diagonal (D,) of ``a.T @ b`` and the sum of squares off it, from D x D or from N x N products.

    Over several ranks from D x D products, which are summed, and of a batch (P, N, D): diagonals (P, D) and one sum.
    The sum is in the dtype of wide sums: a few large squares may be most of it.
    """
    (n, d), wide = a.shape[-2:], wide_sums(a)
    with wide_products(a):
        if a.dim() > 2 or not shards.alone or not moments_pay(d, n):
            moments = shards.sum(apply(_Gram, a) if b is a else a.mT @ b)
            # Left out rather than subtracted: features that are decorrelated keep the digits of what is left.
            off_diagonal = moments.masked_fill(torch.eye(d, dtype=torch.bool, device=a.device), 0)
            return moments.diagonal(dim1=-2, dim2=-1), off_diagonal.square().sum(dtype=wide)
        diagonal = (a * b).sum(0)
        squares, own = _all_squares(a, b), diagonal.square().sum(dtype=wide)
        if _subtraction_is_safe(squares, own):
            return diagonal, squares - own
        longest, is_long = _longest(a.T, b.T, n)
        rows = (gather_rows(a.T, longest) @ b).masked_fill(_own(longest, d), 0)
        columns = rows if b is a else gather_rows(b.T, longest) @ a
        of_longest = rows.square().sum(dtype=wide) + columns.masked_fill(is_long, 0).square().sum(dtype=wide)
        short_a = a.masked_fill(is_long, 0)
        squares = _all_squares(short_a, short_a if b is a else b.masked_fill(is_long, 0))
        return diagonal, of_longest + (squares - diagonal.masked_fill(is_long, 0).square().sum(dtype=wide))


def _all_squares(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of the squares of ``a.T @ b`` from N x N products."""
    gram_a: Tensor = apply(_Gram, a.T)
    gram_b: Tensor = gram_a if b is a else apply(_Gram, b.T)
    return (gram_a * gram_b).sum(dtype=wide_sums(a))


def _subtraction_is_safe(squares: Tensor, own: Tensor) -> bool:
    """Return whether a quarter or more of the squares is left without the diagonal's; False where reading waits."""
    return reading_is_free(squares) and bool((own <= 0.75 * squares).all())


def moments_pay(vectors: int, dimensions: int) -> bool:
    """Return whether moments take less work than the products of the vectors: four of theirs stand against three.

    Then vectors of one length are so many that the squares of the products of different ones weigh at least a third of
    those of their own.
    """
    return known(3 * vectors > 4 * dimensions)


def _longest(x: Tensor, y: Tensor, dimensions: int) -> tuple[Tensor, Tensor]:
    """Return the pairs (i, i) with the largest ``|x_i| |y_i|``, as indices and as a mask.

    Beside their squares in the moments the other pairs' have no digits left, so their products are formed one by one.
    They are so many that the squares of the longest pair left weigh no more than about four times its products with
    them.
    """
    sizes = torch.linalg.vector_norm(x.detach(), dim=1) * torch.linalg.vector_norm(y.detach(), dim=1)
    rows, most = x.shape[0], -(-dimensions // 4)
    # Dynamo takes a symbol for an int, and before torch 2.10 no torch.sym_min of numbers.
    count = min(rows, most) if isinstance(rows, int) else torch.sym_min(rows, most)
    longest = sizes.topk(count).indices
    return longest, torch.zeros(x.shape[0], dtype=torch.bool, device=x.device).index_fill(0, longest, True)


def _own(rows: Tensor, n: int) -> Tensor:
    """Return the mask (K, N) of each row's own column."""
    return rows[:, None] == torch.arange(n, device=rows.device)
