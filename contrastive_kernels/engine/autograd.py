"""The derivatives of the operators: thin autograd Functions around a backend's forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from contrastive_kernels.engine.backends import torch as torch_backend
from contrastive_kernels.engine.operators import operator
from contrastive_kernels.engine.spec import (
    DIFFERENTIABLE,
    Description,
    Gradients,
    Inputs,
    Statistics,
    Upstream,
    Wanted,
    compute_dtype,
)

__all__ = ["apply", "sweep_backward", "sweep_forward", "sweep_total"]


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Return ``function.apply(*args)``, without the inspection of its signature, which takes 80 us a call.

    PyTorch inspects the signature of every function with ``setup_context``; a small batch's loss takes less time.
    """
    if torch.compiler.is_compiling():
        differentiable = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        # without gradients Dynamo counts the parameters of `forward` and takes `*arguments` for one
        return function.apply(*args) if differentiable else function.forward(*args)
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]  # of a base class in C


def _spread(grads: Sequence[Tensor], wanted: Wanted, arguments: int, first: int = 0) -> tuple[Tensor | None, ...]:
    """Return one gradient for each of so many arguments, among which the inputs of a sweep begin at `first`."""
    result: list[Tensor | None] = [None] * arguments
    for position, grad, want in zip(DIFFERENTIABLE, grads, wanted, strict=False):
        result[first + position] = grad if want else None
    return tuple(result)


class _Sweep(torch.autograd.Function):
    """The forward operator; takes the fields of `Inputs`, then description, maximum, save_scores and backend."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        *inputs, what, maximum, save_scores, backend = arguments
        return operator(backend, "forward")(*inputs, *what, maximum, save_scores)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.what, _, ctx.save_scores, ctx.backend = inputs
        row_lse, col_lse, row_sum, row_max, col_max, scores = output
        ctx.arguments = len(inputs)
        ctx.mark_non_differentiable(row_max, col_max, scores)
        ctx.save_for_backward(row_lse, col_lse, scores, *tensors)
        # do not materialise zero gradients of unrequested statistics
        ctx.set_materialize_grads(False)
        ctx.shapes = row_lse.shape, col_lse.shape, row_sum.shape

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = Wanted(*(ctx.needs_input_grad[position] for position in DIFFERENTIABLE))
        row_lse, col_lse, scores, *tensors = ctx.saved_tensors
        of_rows, of_columns, of_sums = (
            row_lse.new_zeros(shape) if grad is None else grad
            for grad, shape in zip(grads[:3], ctx.shapes, strict=True)
        )
        upstream = Upstream(of_rows, of_columns, of_sums, row_lse, col_lse)
        saved = scores if ctx.save_scores else None
        gradients = sweep_backward(upstream, Inputs(*tensors), ctx.what, wanted, saved, ctx.backend)
        return _spread(gradients, wanted, ctx.arguments)


class _SweepBackward(torch.autograd.Function):
    """The backward operator; its own derivative is that of the PyTorch backend, whose backward is differentiable.

    Takes the fields of `Upstream` and of `Inputs`, then description, wanted, saved scores and backend.
    """

    @staticmethod
    def forward(*arguments: Any) -> Any:
        *tensors, what, wanted, scores, backend = arguments
        return operator(backend, "backward")(*tensors, *what, wanted, scores)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.what, ctx.wanted, _, _ = inputs
        ctx.arguments = len(inputs)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "third derivatives of a similarity sweep are not supported; write the loss densely, as in python_ref"
            )
        with torch.enable_grad():
            tensors: list[Any] = [
                None if tensor is None else tensor.detach().requires_grad_(need)
                for tensor, need in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
            ]
            split = len(Upstream._fields)
            upstream, inputs = Upstream(*tensors[:split]), Inputs(*tensors[split:])
            outputs = torch_backend.backward(upstream, inputs, ctx.what, Wanted(*ctx.wanted), None)
            pairs = [(out, grad) for out, grad in zip(outputs, grad_outputs, strict=True) if out.requires_grad]
            needed = [i for i, tensor in enumerate(tensors) if tensor is not None and tensor.requires_grad]
            grads = torch.autograd.grad(
                [out for out, _ in pairs], [tensors[i] for i in needed], [grad for _, grad in pairs], allow_unused=True
            )
        result: list[Tensor | None] = [None] * ctx.arguments
        for i, grad in zip(needed, grads, strict=True):
            result[i] = grad
        return tuple(result)


class _SweepTotal(torch.autograd.Function):
    """The weighted sum of a term over all pairs: the backward operator run at once, its gradients kept until asked for.

    Takes the weights of the rows, the fields of `Inputs`, then description, wanted and backend.
    """

    @staticmethod
    def forward(weight: Tensor, *arguments: Any) -> Any:
        *inputs, what, wanted, backend = arguments
        *grads, total = operator(backend, "backward")(*_of_row_sums(weight), *inputs, *what, wanted, None)
        return total.to(weight.dtype), *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.what, ctx.wanted, ctx.backend = inputs
        ctx.arguments = len(inputs)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        weight, *tensors = ctx.saved_tensors
        split = len(Inputs._fields)
        inputs, grads, wanted = Inputs(*tensors[:split]), tensors[split:], Wanted(*ctx.wanted)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            without_total = wanted._replace(total=False)
            grads = sweep_backward(_of_row_sums(grad * weight), inputs, ctx.what, without_total, None, ctx.backend)
        else:
            grads = [(g.to(weight.dtype) * grad).to(g.dtype) for g in grads]
        return _spread(grads, wanted, ctx.arguments, first=1)


def _of_row_sums(grad: Tensor) -> Upstream:
    """Return what flows into a backward sweep when only the row sums have a gradient."""
    none, empty = grad.new_empty(0, len(grad)), grad.new_empty(0)
    return Upstream(none, empty, grad, none, empty)


def sweep_forward(inputs: Inputs, what: Description, maximum: bool, save_scores: bool, backend: str) -> Statistics:
    """Return the statistics of a forward sweep, differentiable."""
    return Statistics(*apply(_Sweep, *inputs, what, maximum, save_scores, backend))


def sweep_backward(
    upstream: Upstream, inputs: Inputs, what: Description, wanted: Wanted, scores: Tensor | None, backend: str
) -> Gradients:
    """Return the gradients of a backward sweep, differentiable once more in eager mode."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return Gradients(*apply(_SweepBackward, *upstream, *inputs, what, list(wanted), scores, backend))
    return Gradients(*operator(backend, "backward")(*upstream, *inputs, *what, list(wanted), scores))


def sweep_total(weight: Tensor, inputs: Inputs, what: Description, wanted: Wanted, backend: str) -> Tensor:
    """Return ``sum_i weight_i row_sum_i``, differentiable, from one backward sweep that also computes the gradients."""
    total, *_ = apply(_SweepTotal, weight, *inputs, what, list(wanted), backend)
    return cast(Tensor, total)


class UnitRows(torch.autograd.Function):
    """``x / max(|x|, eps)`` in the compute dtype; unlike `F.normalize` with zero gradient for a row below eps."""

    @staticmethod
    def forward(x: Tensor, backend: str) -> Any:
        return operator(backend, "unit_rows")(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, ctx.backend = inputs
        _, norm = output
        ctx.mark_non_differentiable(norm)
        ctx.save_for_backward(x, norm)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
        if grad is None:
            return None, None
        x, norm = ctx.saved_tensors
        if torch.is_grad_enabled():
            # the saved norm has no graph for a second derivative
            norm = torch.linalg.vector_norm(x.to(compute_dtype(x)), dim=-1, keepdim=True)
            return torch_backend.unit_rows_backward(grad, x, norm), None
        return operator(ctx.backend, "unit_rows_backward")(grad, x, norm), None


class RowDot(torch.autograd.Function):
    """``<x_i, y_i>`` by the operators of a backend that has them: one launch each way instead of four and six."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, backend: str) -> Any:
        return operator(backend, "row_dot")(x, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, y, ctx.backend = inputs
        ctx.save_for_backward(x, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, y), wanted = ctx.saved_tensors, ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            dx, dy = ((grad.unsqueeze(-1) * other.to(grad.dtype)).to(x.dtype) for other in (y, x))
        else:
            dx, dy = operator(ctx.backend, "row_dot_backward")(grad, x, y, wanted)
        return dx if wanted[0] else None, dy if wanted[1] else None, None
