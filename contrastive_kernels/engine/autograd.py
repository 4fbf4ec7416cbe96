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
    BackwardArguments,
    Description,
    ForwardArguments,
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
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]  # of a base class in C


def _spread(grads: Gradients, wanted: Wanted, arguments: int, first: int = 0) -> tuple[Tensor | None, ...]:
    """Return one gradient for each of so many arguments, among which the inputs of a sweep begin at `first`."""
    result: list[Tensor | None] = [None] * arguments
    for position, grad, want in zip(DIFFERENTIABLE, grads, wanted, strict=False):
        result[first + position] = grad if want else None
    return tuple(result)


class _Sweep(torch.autograd.Function):
    """The forward and the backward operator of one backend; takes the flat `ForwardArguments`, then the backend."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        *flat, backend = arguments
        return operator(backend, "forward")(*flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *flat, ctx.backend = inputs
        arguments, statistics = ForwardArguments.of(flat), Statistics(*output)
        ctx.what, ctx.save_scores, ctx.arguments = arguments.what, arguments.save_scores, len(inputs)
        ctx.mark_non_differentiable(statistics.row_max, statistics.col_max, statistics.scores)
        ctx.save_for_backward(statistics.row_lse, statistics.col_lse, *arguments.inputs, statistics.scores)
        # do not materialise zero gradients of unrequested statistics
        ctx.set_materialize_grads(False)
        ctx.shapes = [statistic.shape for statistic in statistics[:3]]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = Wanted(*(ctx.needs_input_grad[position] for position in DIFFERENTIABLE))
        row_lse, col_lse, *tensors, scores = ctx.saved_tensors
        of_rows, of_columns, of_sums = (
            row_lse.new_zeros(shape) if grad is None else grad
            for grad, shape in zip(grads[:3], ctx.shapes, strict=True)
        )
        arguments = BackwardArguments(
            upstream=Upstream(of_rows, of_columns, of_sums, row_lse, col_lse),
            inputs=Inputs(*tensors),
            what=ctx.what,
            wanted=wanted,
            scores=scores if ctx.save_scores else None,
        )
        return _spread(sweep_backward(arguments, ctx.backend), wanted, ctx.arguments)


class _SweepBackward(torch.autograd.Function):
    """The backward operator; its own derivative is that of the PyTorch backend, whose backward is differentiable."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        *flat, backend = arguments
        return operator(backend, "backward")(*flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *flat, _ = inputs
        arguments = BackwardArguments.of(flat)
        ctx.what, ctx.wanted, ctx.arguments = arguments.what, arguments.wanted, len(inputs)
        ctx.save_for_backward(*arguments.upstream, *arguments.inputs)

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
            outputs = torch_backend.backward(upstream, inputs, ctx.what, ctx.wanted, None)
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

    Takes the weights of the rows, then the flat inputs and description, what is wanted, and the backend.
    """

    @staticmethod
    def forward(weight: Tensor, *rest: Any) -> Any:
        *flat, wanted, backend = rest
        inputs, what = _grouped(flat)
        arguments = BackwardArguments(_of_row_sums(weight), inputs, what, Wanted(*wanted), None)
        *grads, total = operator(backend, "backward")(*arguments.flat())
        return total.to(weight.dtype), *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        weight, *flat, wanted, ctx.backend = inputs
        tensors, ctx.what = _grouped(flat)
        ctx.wanted, ctx.arguments = Wanted(*wanted), len(inputs)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(weight, *tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        weight, *tensors = ctx.saved_tensors
        split = len(Inputs._fields)
        inputs, grads, wanted = Inputs(*tensors[:split]), tensors[split:], ctx.wanted
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            upstream, without_total = _of_row_sums(grad * weight), wanted._replace(total=False)
            grads = sweep_backward(BackwardArguments(upstream, inputs, ctx.what, without_total, None), ctx.backend)
        else:
            grads = [(g.to(weight.dtype) * grad).to(g.dtype) for g in grads]
        return _spread(grads, wanted, ctx.arguments, first=1)


def _grouped(flat: Sequence[Any]) -> tuple[Inputs, Description]:
    split = len(Inputs._fields)
    return Inputs(*flat[:split]), Description(*flat[split:])


def _of_row_sums(grad: Tensor) -> Upstream:
    """Return what flows into a backward sweep when only the row sums have a gradient."""
    none, empty = grad.new_empty(0, len(grad)), grad.new_empty(0)
    return Upstream(none, empty, grad, none, empty)


def sweep_forward(arguments: ForwardArguments, backend: str) -> Statistics:
    """Return the statistics of a forward sweep, differentiable."""
    return Statistics(*apply(_Sweep, *arguments.flat(), backend))


def sweep_backward(arguments: BackwardArguments, backend: str) -> Gradients:
    """Return the gradients of a backward sweep, differentiable once more in eager mode."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return Gradients(*apply(_SweepBackward, *arguments.flat(), backend))
    return Gradients(*operator(backend, "backward")(*arguments.flat()))


def sweep_total(weight: Tensor, inputs: Inputs, what: Description, wanted: Wanted, backend: str) -> Tensor:
    """Return ``sum_i weight_i row_sum_i``, differentiable, from one backward sweep that also computes the gradients."""
    total, *_ = apply(_SweepTotal, weight, *inputs, *what, list(wanted), backend)
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
