"""CLIP's loss with the cross-entropy from a teacher's softmax over the same batch, in both directions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_kernels.compat._small import is_small, scalar
from contrastive_kernels.compat._towers import CROSSOVER
from contrastive_kernels.primitives import (
    Pairs,
    cast_for_autocast,
    compute_dtype,
    row_dot,
    similarity_logsumexp,
    similarity_softmax_mean,
    sweep,
    wide_products,
)

__all__ = ["distilled_clip"]


def distilled_clip(
    x: Tensor, y: Tensor, scale: float | Tensor, teacher_x: Tensor, teacher_y: Tensor, teacher_scale: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Return the contrastive and the distillation loss; both of the student's log-sum-exps come from one sweep."""
    n, scale, dtype = x.shape[0], scalar(scale), compute_dtype(x)
    # half precision is widened before it is scaled
    teacher_x, teacher_y = scalar(teacher_scale) * teacher_x.to(dtype), teacher_y.to(dtype)
    contrastive = distilled = x.new_zeros((), dtype=dtype)
    if is_small(x, n**2, CROSSOVER):
        logits, teacher = (scale * x) @ y.T, teacher_x @ teacher_y.T
        for dim in (1, 0):
            log_shares = logits.log_softmax(dim)
            contrastive = contrastive - log_shares.diagonal().sum() / (2 * n)
            distilled = distilled - (teacher.softmax(dim) * log_shares).sum() / (2 * n)
        return contrastive, distilled
    x, y = cast_for_autocast(x), cast_for_autocast(y)
    positive = scale * row_dot(x, y)
    out = sweep(x, y, Pairs(diagonals=1), scale=scale, column_lse=True)
    for negatives in (out.row_lse.squeeze(0), out.col_lse):
        contrastive = contrastive - F.logsigmoid(positive - negatives).sum() / (2 * n)
        distilled = distilled + torch.logaddexp(negatives, positive).sum() / (2 * n)
    learns = torch.is_grad_enabled() and (teacher_x.requires_grad or teacher_y.requires_grad)
    if learns or torch.compiler.is_compiling():
        expected = _expectation(x, y, teacher_x, teacher_y)
    else:
        expected = _Expectation.apply(x, y, teacher_x, teacher_y)  # type: ignore[no-untyped-call]
    return contrastive, distilled - scale * expected / (2 * n)


def _expectation(x: Tensor, y: Tensor, teacher_x: Tensor, teacher_y: Tensor) -> Tensor:
    """Return the student's similarities, weighted by the teacher's softmax of rows plus that of columns, and summed."""
    texts = similarity_softmax_mean(teacher_x, teacher_y, y)
    images = similarity_softmax_mean(teacher_y, teacher_x, x)
    return row_dot(x, texts).sum() + row_dot(y, images).sum()


class _Expectation(torch.autograd.Function):
    """The same of a constant teacher, from one sweep forward and one backward over the teacher.

    The weights are the derivatives of the sum of the teacher's log-sum-exps. Columns of zeros appended to its images,
    with the student's texts opposite, change no logit, and their gradients are the weighted sums of those texts.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, teacher_x: Tensor, teacher_y: Tensor) -> Tensor:
        """Return the sum."""
        d, dtype = x.shape[1], compute_dtype(x)
        with torch.enable_grad(), wide_products(x):
            wide_x, wide_y = x.detach().to(dtype), y.detach().to(dtype)
            zeros = torch.zeros_like(wide_x)
            rows = torch.cat([teacher_x.detach(), zeros, wide_x], 1).requires_grad_()
            columns = torch.cat([teacher_y.detach(), wide_y, zeros], 1).requires_grad_()
            row_lse, column_lse = similarity_logsumexp(rows, columns, columns=True)
            of_rows, of_columns = torch.autograd.grad(row_lse.sum() + column_lse.sum(), (rows, columns))
        texts, images = of_rows[:, -2 * d : -d], of_columns[:, -d:]
        ctx.save_for_backward(x, y, teacher_x, teacher_y, texts, images)
        return row_dot(wide_x, texts).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the weighted sums of the texts and of the images."""
        x, y, teacher_x, teacher_y, texts, images = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return (grad * texts).to(x.dtype), (grad * images).to(y.dtype), None, None
        inputs = [rows for rows in (x, y) if rows.requires_grad]
        value = _expectation(x, y, teacher_x, teacher_y)
        grads = iter(torch.autograd.grad(value, inputs, grad, create_graph=True))
        return (*(next(grads) if rows.requires_grad else None for rows in (x, y)), None, None)
