"""CLIP's loss with the cross-entropy from a teacher's softmax over the same batch, in both directions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_kernels import workspace_limit
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


def _chunk(x: Tensor) -> int:
    """Return how many of the teacher's similarities are stored at a time."""
    return 2**19 if x.is_cpu else workspace_limit() // (4 * x.element_size())


def _expectation(x: Tensor, y: Tensor, teacher_x: Tensor, teacher_y: Tensor) -> Tensor:
    """Return the student's similarities, weighted by the teacher's softmax of rows plus that of columns, and summed."""
    texts = similarity_softmax_mean(teacher_x, teacher_y, y)
    images = similarity_softmax_mean(teacher_y, teacher_x, x)
    return row_dot(x, texts).sum() + row_dot(y, images).sum()


class _Expectation(torch.autograd.Function):
    """The same of a constant teacher: log-sum-exps by a sweep, then value and gradients in one pass over its rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, teacher_x: Tensor, teacher_y: Tensor) -> Tensor:
        """Return the sum."""
        n, dtype = x.shape[0], compute_dtype(x)
        with wide_products(x):
            wide_x, wide_y = x.to(dtype), y.to(dtype)
            row_lse, column_lse = similarity_logsumexp(teacher_x, teacher_y, columns=True)
            # to each image the weighted sum of the texts, to each text that of the images
            texts, images = torch.empty_like(wide_x), torch.zeros_like(wide_y)
            step = max(1, _chunk(x) // n)
            for part in (slice(start, start + step) for start in range(0, n, step)):
                logits = teacher_x[part] @ teacher_y.T
                weights = (logits - row_lse[part, None]).exp_()
                weights += logits.sub_(column_lse).exp_()
                torch.mm(weights, wide_y, out=texts[part])
                images.addmm_(weights.T, wide_x[part])
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
