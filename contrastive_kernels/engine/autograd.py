"""The derivatives of the operators, and how an operator is called so that it has them.

An operator's derivative is one `Formula`, that of a thin autograd Function. Eager mode and `torch.func` call the
Function; compiled graphs and exported programs hold the bare operator, whose kernel for autograd calls it too.

Longer than 500 lines because the formulas of all operators are one table, which nothing else may add to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from contrastive_kernels.engine.backends import BACKENDS
from contrastive_kernels.engine.backends import torch as torch_backend
from contrastive_kernels.engine.operators import operator, register_autograd
from contrastive_kernels.engine.spec import (
    DIFFERENTIABLE,
    GROUP_SCHEMAS,
    BackwardArguments,
    Description,
    ForwardArguments,
    Gradients,
    GroupArguments,
    Guide,
    Inputs,
    SoftmaxArguments,
    SoftmaxMean,
    SoftmaxMeanArguments,
    SoftmaxMeanBackwardArguments,
    SoftmaxTotal,
    Statistics,
    Upstream,
    Wanted,
    compute_dtype,
)

__all__ = [
    "apply",
    "call",
    "group_total",
    "guided_forward",
    "softmax_mean",
    "softmax_total",
    "sweep_backward",
    "sweep_forward",
    "sweep_total",
]

# How an operator is called


def call(backend: str, name: str, *arguments: Any) -> Any:
    """Return what an operator of a backend returns for all arguments of its schema, differentiable."""
    if torch.compiler.is_compiling():
        return operator(backend, name)(*arguments)
    function = _function(backend, name)
    if torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:  # forward mode is refused also without gradients
        return _apply(function, *arguments)
    return function.forward(*arguments)


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Return ``function.apply(*args)``, without the inspection of its signature, which takes 80 us a call.

    PyTorch inspects the signature of every function with ``setup_context``; a small batch's loss takes less time. The
    forward of the Function must be differentiable itself: compiled, it stands for the Function.
    """
    if torch.compiler.is_compiling():
        # Dynamo rejects one tensor as two inputs of a Function, and gives a Function's backward no second derivative
        return function.forward(*args)
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return _apply(function, *args)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]  # of a base class in C


class Formula(NamedTuple):
    """The derivative of an operator, as an autograd Function has it, with the backend in front."""

    setup: Callable[[str, Any, tuple[Any, ...], Any], None]
    """Keep what the backward needs: backend, ctx, the arguments of the operator and its results."""
    backward: Callable[..., tuple[Tensor | None, ...]]
    """Return a gradient for every argument: backend, ctx and the gradients of the results."""


@cache
def _function(backend: str, name: str) -> type[torch.autograd.Function]:
    """Return the Function of an operator of a backend."""
    formula, overload = FORMULAS[name], operator(backend, name)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return overload(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            formula.setup(backend, ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return formula.backward(backend, ctx, *grads)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
            return _one_by_one(Function, info.batch_size, in_dims, arguments)

    Function.__name__ = Function.__qualname__ = f"{backend}_{name}"
    return Function


def _one_by_one(
    function: type[torch.autograd.Function], size: int, dims: Sequence[Any], arguments: Sequence[Any]
) -> tuple[Any, Any]:
    """Return the stacked results of a Function for every entry of a batch, and their batch dimensions: a vmap rule."""
    results = [
        apply(function, *(a.select(d, i) if isinstance(d, int) else a for a, d in zip(arguments, dims, strict=True)))
        for i in range(size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = tuple(None if column[0] is None else torch.stack(column) for column in zip(*results, strict=True))
    return stacked, tuple(None if column is None else 0 for column in stacked)


def _kernel(backend: str, name: str) -> Callable[..., Any]:
    """Return what the bare operator of a backend does where autograd meets it."""

    def kernel(*arguments: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                "a torch.func transform of a loss cannot be compiled or exported; transform the loss without "
                "torch.compile, or compile the loss and take its gradient with backward() or torch.autograd.grad"
            )
        return _apply(_function(backend, name), *arguments)

    return kernel


# The sweep and its backward


def _setup_forward(backend: str, ctx: Any, inputs: Sequence[Any], output: Any, *others: Tensor | None) -> None:
    tensors, ctx.what, _, ctx.save_scores = ForwardArguments.of(inputs)
    row_lse, col_lse, row_sum, row_max, col_max, scores = output
    ctx.arguments = len(inputs)
    ctx.mark_non_differentiable(row_max, col_max, scores)
    ctx.save_for_backward(row_lse, col_lse, scores, *tensors, *others)
    # do not materialise zero gradients of unrequested statistics
    ctx.set_materialize_grads(False)
    ctx.shapes = row_lse.shape, col_lse.shape, row_sum.shape


def _differentiate_forward(backend: str, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return _differentiate_sweep(sweep_backward, backend, ctx, *grads)


def _differentiate_sweep(
    function: Callable[..., Gradients], backend: str, ctx: Any, *grads: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a sweep from a function like `sweep_backward`, which takes what else was saved last."""
    wanted = Wanted(*(ctx.needs_input_grad[position] for position in DIFFERENTIABLE))
    row_lse, col_lse, scores, *tensors = ctx.saved_tensors
    inputs, others = Inputs(*tensors[: len(Inputs._fields)]), tensors[len(Inputs._fields) :]
    of_rows, of_columns, of_sums = (
        row_lse.new_zeros(shape) if grad is None else grad for grad, shape in zip(grads[:3], ctx.shapes, strict=True)
    )
    upstream = Upstream(of_rows, of_columns, of_sums, row_lse, col_lse)
    saved = scores if ctx.save_scores else None
    gradients = function(upstream, inputs, ctx.what, wanted, saved, backend, *others)
    return _spread(gradients, wanted, ctx.arguments)


def _setup_backward(backend: str, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    upstream, tensors, ctx.what, ctx.wanted, *_ = BackwardArguments.of(inputs)
    ctx.arguments = len(inputs)
    ctx.set_materialize_grads(False)
    # with a total come its gradients, ready but for the factor of its own gradient
    ready = output[:-1] if ctx.wanted.total else ()
    ctx.save_for_backward(*upstream, *tensors, *ready)


def _differentiate_backward(backend: str, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    split, end = len(Upstream._fields), len(Upstream._fields) + len(Inputs._fields)
    saved = ctx.saved_tensors
    upstream, inputs, ready = Upstream(*saved[:split]), Inputs(*saved[split:end]), saved[end:]
    *of_gradients, of_total = grads
    if any(grad is not None for grad in of_gradients) or any(ctx.needs_input_grad[:split]):
        needed = tuple(ctx.needs_input_grad[:end])
        found = apply(
            _HigherDerivative, *upstream, *inputs, *grads, torch_backend.derivative, ctx.what, ctx.wanted, needed
        )
        return *found, *[None] * (ctx.arguments - end)
    if of_total is None:
        return _no_gradients(ctx)
    needed = Wanted(*(ctx.needs_input_grad[split + position] for position in DIFFERENTIABLE))
    # a program may have been exported before its inputs needed gradients
    missing = any(need and not want for need, want in zip(needed, ctx.wanted, strict=True))
    if missing or torch.is_grad_enabled():
        upstream = _of_row_sums(of_total.to(upstream.grad_row_sum.dtype) * upstream.grad_row_sum)
        ready = sweep_backward(upstream, inputs, ctx.what, needed, None, backend)
    else:
        factor = of_total.to(inputs.scale.dtype)
        ready = tuple((grad.to(factor.dtype) * factor).to(grad.dtype) for grad in ready)
    return _spread(ready, needed, ctx.arguments, first=split)


def _differentiate_again(
    derivative: Callable[..., Any], constants: int, backend: str, ctx: Any, *grads: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the derivative of a backward from its tensors, which come first but for the last few, the constants."""
    tensors = ctx.saved_tensors
    first = len(tensors) - constants
    needed = *ctx.needs_input_grad[:first], *[False] * constants
    found = apply(_HigherDerivative, *tensors, *grads, derivative, ctx.what, ctx.wanted, needed)
    return *found[:first], *[None] * (ctx.arguments - first)


class _HigherDerivative(torch.autograd.Function):
    """A derivative of a backward operator, computed by the PyTorch backend for all; the next order is of its kind.

    Takes the tensors of `engine.backends.torch.derivative` or of another function like it, then that function,
    description, wanted and which tensors need a gradient.
    """

    @staticmethod
    def forward(*arguments: Any) -> Any:
        *tensors, derivative, what, wanted, needed = arguments
        return tuple(derivative(tensors, what, wanted, needed))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.derivative, ctx.what, ctx.wanted, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return _one_by_one(_HigherDerivative, info.batch_size, in_dims, arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, (*needed, _, _, _, _) = ctx.saved_tensors, ctx.needs_input_grad
        found = apply(_HigherDerivative, *tensors, *grads, ctx.derivative, ctx.what, ctx.wanted, tuple(needed))
        return *found, None, None, None, None


def _spread(grads: Sequence[Tensor], wanted: Wanted, arguments: int, first: int = 0) -> tuple[Tensor | None, ...]:
    """Return one gradient for each of so many arguments, among which the inputs of a sweep begin at `first`."""
    result: list[Tensor | None] = [None] * arguments
    for position, grad, want in zip(DIFFERENTIABLE, grads, wanted, strict=False):
        result[first + position] = grad if want else None
    return tuple(result)


def _no_gradients(ctx: Any) -> tuple[Tensor | None, ...]:
    nothing: list[Tensor | None] = [None] * ctx.arguments
    return tuple(nothing)


def _of_row_sums(grad: Tensor) -> Upstream:
    """Return what flows into a backward sweep when only the row sums have a gradient."""
    none, empty = grad.new_empty(0, grad.shape[0]), grad.new_empty(0)
    return Upstream(none, empty, grad, none, empty)


def sweep_forward(inputs: Inputs, what: Description, maximum: bool, save_scores: bool, backend: str) -> Statistics:
    """Return the statistics of a forward sweep, differentiable."""
    return Statistics(*call(backend, "forward", *inputs, *what, maximum, save_scores))


def sweep_backward(
    upstream: Upstream, inputs: Inputs, what: Description, wanted: Wanted, scores: Tensor | None, backend: str
) -> Gradients:
    """Return the gradients of a backward sweep, differentiable."""
    return Gradients(*call(backend, "backward", *upstream, *inputs, *what, list(wanted), scores))


def sweep_total(weight: Tensor, inputs: Inputs, what: Description, wanted: Wanted, backend: str) -> Tensor:
    """Return ``sum_i weight_i row_sum_i``, differentiable, from one backward sweep that also computes the gradients."""
    return sweep_backward(_of_row_sums(weight), inputs, what, wanted, None, backend).total.to(weight.dtype)


def group_total(weight: Tensor, inputs: Inputs, what: Description, wanted: Wanted, of_group: GroupArguments) -> Tensor:
    """Return `sweep_total` of this rank's rows with the rows of y, or of x with itself, of all ranks of a group."""
    arguments = *_of_row_sums(weight), *inputs, *what, list(wanted), *of_group
    return Gradients(*call("group", "sweep_backward", *arguments)).total.to(weight.dtype)


# The sweep with a guide


def _setup_guided_forward(backend: str, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    flat, guide = Guide.split(inputs)
    _setup_forward(backend, ctx, flat, output, *guide)
    ctx.arguments = len(inputs)


def _differentiate_guided_forward(backend: str, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    def backward(
        upstream: Upstream,
        inputs: Inputs,
        what: Description,
        wanted: Wanted,
        _: Tensor | None,
        backend: str,
        *guide: Tensor | None,
    ) -> Gradients:
        return Gradients(*call(backend, "guided_backward", *upstream, *inputs, *what, list(wanted), *guide))

    return _differentiate_sweep(backward, backend, ctx, *grads)


def _setup_guided_backward(backend: str, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    flat, guide = Guide.split(inputs)
    upstream, tensors, ctx.what, ctx.wanted, *_ = BackwardArguments.of(flat)
    ctx.arguments = len(inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*upstream, *tensors, *guide)


def guided_forward(inputs: Inputs, what: Description, maximum: bool, guide: Guide, backend: str) -> Statistics:
    """Return the statistics of a forward sweep over the pairs that a guide keeps, differentiable."""
    return Statistics(*call(backend, "guided_forward", *inputs, *what, maximum, *guide))


# The total of a softmax


def _setup_softmax_total(backend: str, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    weight, own, tensors, ctx.what, ctx.wanted = SoftmaxArguments.of(inputs)
    ready = output[:-1]
    ctx.arguments = len(inputs)
    ctx.mark_non_differentiable(*ready)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weight, own, *tensors, *ready)


def _differentiate_softmax_total(backend: str, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    *_, of_total = grads
    if of_total is None:
        return _no_gradients(ctx)
    saved = ctx.saved_tensors  # once: checkpointing does not give them twice
    weight, own, *tensors = saved[: 2 + len(Inputs._fields)]
    ready, (needs_weight, needs_own, *needed) = saved[-4:], ctx.needs_input_grad[:5]
    if needs_weight or torch.is_grad_enabled():  # an exported program may have a weight with a gradient
        composed = _composed_gradients(of_total, weight, own, Inputs(*tensors), ctx.what, needed, backend)
        of_weight, of_own = composed[-2] if needs_weight else None, composed[-1] if needs_own else None
        return of_weight, of_own, *_spread(composed, _first(needed), ctx.arguments - 2)
    if any(need and not want for need, want in zip(needed, ctx.wanted, strict=True)):  # as above, an exported program
        ready = call(backend, "softmax_total", weight, own, *tensors, *ctx.what, needed)[:-1]
    factor = of_total.to(own.dtype)
    found: list[Tensor | None] = [None] * ctx.arguments
    for position, grad, need in zip((2, 3, 4, 1), ready, (*needed, needs_own), strict=True):
        found[position] = (grad.to(factor.dtype) * factor).to(grad.dtype) if need else None
    return tuple(found)


def _first(needed: Sequence[bool]) -> Wanted:
    """Return that the gradients of x, y and the scale are wanted, as far as they are needed."""
    x, y, scale = needed
    return Wanted(x, y, scale, False, False, False)


def _composed_gradients(
    of_total: Tensor,
    weight: Tensor,
    own: Tensor,
    inputs: Inputs,
    what: Description,
    needed: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    """Return the gradients of x, y, scale, weight and own from two sweeps, which have derivatives of all orders."""
    row_lse = sweep_forward(inputs, what, False, False, backend).row_lse
    excess, factor = row_lse - own, of_total.to(row_lse.dtype)
    grad = factor * weight * excess.sigmoid()
    of_weight = (factor * torch.nn.functional.softplus(excess, threshold=37.0)).squeeze(0).to(own.dtype)
    empty = own.new_empty(0)
    upstream = Upstream(grad, empty, empty, row_lse, empty)
    found = sweep_backward(upstream, inputs, what, _first(needed), None, backend)
    return found.x, found.y, found.scale, of_weight, -grad.squeeze(0).to(own.dtype)


def softmax_total(
    weight: Tensor, own: Tensor, inputs: Inputs, what: Description, wanted: tuple[bool, bool, bool], backend: str
) -> Tensor:
    """Return the total of `SoftmaxTotal`, differentiable, from one visit of every row."""
    return SoftmaxTotal(*call(backend, "softmax_total", weight, own, *inputs, *what, list(wanted))).total.to(own.dtype)


# The mean under a softmax


def _setup_softmax_mean(backend: str, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    values, tensors, ctx.what = SoftmaxMeanArguments.of(inputs)
    ctx.arguments = len(inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(values, *tensors, *output)


def _differentiate_softmax_mean(
    backend: str, ctx: Any, of_mean: Tensor | None, of_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    if of_mean is None and of_lse is None:
        return _no_gradients(ctx)
    values, *tensors, mean, row_lse = ctx.saved_tensors
    of_mean = torch.zeros_like(mean) if of_mean is None else of_mean
    shift = -(of_mean * mean).sum(1)
    shift = shift if of_lse is None else shift + of_lse.to(shift.dtype)
    needs_values, *needs = ctx.needs_input_grad
    wanted = [*needs[:4], needs_values]
    flow = of_mean, shift, row_lse
    *of_inputs, of_values = call(backend, "softmax_mean_backward", *flow, values, *tensors, *ctx.what, wanted)
    found: list[Tensor | None] = [None] * ctx.arguments
    found[:5] = (
        grad if want else None for grad, want in zip((of_values, *of_inputs), ctx.needs_input_grad, strict=False)
    )
    return tuple(found)


def _setup_softmax_mean_backward(backend: str, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    upstream, values, tensors, ctx.what, ctx.wanted = SoftmaxMeanBackwardArguments.of(inputs)
    ctx.arguments = len(inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*upstream, values, *tensors)


def softmax_mean(values: Tensor, inputs: Inputs, what: Description, backend: str) -> SoftmaxMean:
    """Return the means of values under the softmax of every row, differentiable."""
    return SoftmaxMean(*call(backend, "softmax_mean", values, *inputs, *what))


# The rows


def _setup_unit_rows(backend: str, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, norm = output
    ctx.mark_non_differentiable(norm)
    ctx.save_for_backward(*inputs, norm)
    ctx.set_materialize_grads(False)


def _differentiate_unit_rows(backend: str, ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None]:
    if grad is None:
        return (None,)
    x, norm = ctx.saved_tensors
    if torch.is_grad_enabled():
        # the saved norm has no graph for a second derivative
        norm = torch.linalg.vector_norm(x.to(compute_dtype(x)), dim=-1, keepdim=True)
        return (torch_backend.unit_rows_backward(grad, x, norm),)
    return (call(backend, "unit_rows_backward", grad, x, norm),)


def _setup_row_dot(backend: str, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _row_dot_backward(grad: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    wide = grad.unsqueeze(-1)
    return (wide * y.to(grad.dtype)).to(x.dtype), (wide * x.to(grad.dtype)).to(x.dtype)


def _differentiate_row_dot(backend: str, ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    (x, y), wanted = ctx.saved_tensors, list(ctx.needs_input_grad)
    if torch.is_grad_enabled():
        dx, dy = _row_dot_backward(grad, x, y)
    else:
        dx, dy = call(backend, "row_dot_backward", grad, x, y, wanted)
    return dx if wanted[0] else None, dy if wanted[1] else None


def _setup_plain(backend: str, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep the tensors, which come first."""
    tensors = [argument for argument in inputs if isinstance(argument, Tensor)]
    ctx.arguments = len(inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _differentiate_plain(
    function: Callable[..., Any], backend: str, ctx: Any, *grads: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the derivative of the same function of the tensors in plain PyTorch."""
    create_graph = torch.is_grad_enabled()
    needed = [position for position, need in enumerate(ctx.needs_input_grad) if need]
    with torch.enable_grad():
        leaves = [
            tensor.view_as(tensor) if create_graph and need else tensor.detach().requires_grad_(need)
            for tensor, need in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        ]
        results = function(*leaves)
        pairs = [
            (result, grad)
            for result, grad in zip(results if isinstance(results, tuple) else (results,), grads, strict=True)
            if grad is not None and result.requires_grad
        ]
    found: list[Tensor | None] = [None] * ctx.arguments
    if pairs:
        outputs, upstream = zip(*pairs, strict=True)
        wanted = [leaves[position] for position in needed]
        derived = torch.autograd.grad(outputs, wanted, upstream, create_graph=create_graph, allow_unused=True)
        for position, grad in zip(needed, derived, strict=True):
            found[position] = grad
    return tuple(found)


# The selections, which have no derivative


def _setup_selection(backend: str, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))
    ctx.arguments = len(inputs)


def _differentiate_selection(backend: str, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return _no_gradients(ctx)


# Over a process group. The gradient of what all ranks compute: a sum's is the sum of all ranks' upstream gradients.


def _setup_group_sweep(backend: str, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    flat, ctx.of_group = GroupArguments.split(inputs)
    _setup_forward(backend, ctx, flat, output)
    ctx.arguments = len(inputs)


def _differentiate_group_sweep(backend: str, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    def backward(
        upstream: Upstream, inputs: Inputs, what: Description, wanted: Wanted, _: Tensor | None, backend: str
    ) -> Gradients:
        arguments = *upstream, *inputs, *what, list(wanted), *ctx.of_group
        return Gradients(*call(backend, "sweep_backward", *arguments))

    return _differentiate_sweep(backward, backend, ctx, *grads)


def _setup_group_sweep_backward(backend: str, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    flat, ctx.of_group = GroupArguments.split(inputs)
    _setup_backward(backend, ctx, tuple(flat), output)
    ctx.arguments = len(inputs)


def _differentiate_group_sweep_backward(backend: str, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    split, end = len(Upstream._fields), len(Upstream._fields) + len(Inputs._fields)
    *of_gradients, of_total = grads
    if any(grad is not None for grad in of_gradients) or any(ctx.needs_input_grad[:split]):
        _refuse_second_derivatives()
    if of_total is None:
        return _no_gradients(ctx)
    saved = ctx.saved_tensors
    upstream, inputs, ready = Upstream(*saved[:split]), Inputs(*saved[split:end]), Gradients(*(*saved[end:], of_total))
    needed = Wanted(*(ctx.needs_input_grad[split + position] for position in DIFFERENTIABLE))
    if torch.is_grad_enabled():
        flow = _of_row_sums(of_total.to(upstream.grad_row_sum.dtype) * upstream.grad_row_sum)
        arguments = *flow, *inputs, *ctx.what, list(needed), *ctx.of_group
        return _spread(call(backend, "sweep_backward", *arguments), needed, ctx.arguments, first=split)
    factor, itself = of_total.to(inputs.scale.dtype), inputs.y is None
    found = [grad * factor if need else grad for grad, need in zip(ready, needed, strict=True)]
    if needed.x if itself else needed.y:
        of_group = ctx.of_group
        home = call(backend, "sum_at_home", ready.y, factor, of_group.group, of_group.sizes, of_group.workspace)
        found[:2] = (found[0] + home, home) if itself else (found[0], home)
    dtype = inputs.x.dtype
    return _spread([found[0].to(dtype), found[1].to(dtype), *found[2:]], needed, ctx.arguments, first=split)


def _refuse_second_derivatives(*_: Any) -> Any:
    raise NotImplementedError(
        "a loss with group= has no second derivatives; take them in one process, with group=None and the whole batch"
    )


def _setup_group_same_rows(backend: str, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _differentiate_group_same_rows(backend: str, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad, None, None


def _setup_group_sum(backend: str, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.group = inputs[1]


def _differentiate_group_sum(backend: str, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return call(backend, "sum", grad.contiguous(), ctx.group), None


def _setup_group_class_sums(backend: str, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, value_ids, ids, *ctx.of_group = inputs
    ctx.save_for_backward(value_ids, ids)


def _differentiate_group_class_sums(backend: str, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    value_ids, ids = ctx.saved_tensors
    group, value_sizes, sizes, workspace = ctx.of_group
    arguments = grad.contiguous(), ids, value_ids, group, sizes, value_sizes, workspace
    return call(backend, "class_sums", *arguments), *[None] * 6


FORMULAS = {
    "forward": Formula(_setup_forward, _differentiate_forward),
    "backward": Formula(_setup_backward, _differentiate_backward),
    "softmax_total": Formula(_setup_softmax_total, _differentiate_softmax_total),
    "softmax_mean": Formula(_setup_softmax_mean, _differentiate_softmax_mean),
    "softmax_mean_backward": Formula(
        _setup_softmax_mean_backward, partial(_differentiate_again, torch_backend.softmax_mean_derivative, 0)
    ),
    "guided_forward": Formula(_setup_guided_forward, _differentiate_guided_forward),
    "guided_backward": Formula(
        _setup_guided_backward,
        partial(_differentiate_again, torch_backend.guided_derivative, len(Guide._fields)),
    ),
    "unit_rows": Formula(_setup_unit_rows, _differentiate_unit_rows),
    "unit_rows_backward": Formula(_setup_plain, partial(_differentiate_plain, torch_backend.unit_rows_backward)),
    "row_dot": Formula(_setup_row_dot, _differentiate_row_dot),
    "row_dot_backward": Formula(_setup_plain, partial(_differentiate_plain, _row_dot_backward)),
    "views": Formula(_setup_selection, _differentiate_selection),
    "select": Formula(_setup_selection, _differentiate_selection),
    "sweep": Formula(_setup_group_sweep, _differentiate_group_sweep),
    "sweep_backward": Formula(_setup_group_sweep_backward, _differentiate_group_sweep_backward),
    "sum_at_home": Formula(_setup_plain, _refuse_second_derivatives),
    "same_rows": Formula(_setup_group_same_rows, _differentiate_group_same_rows),
    "sum": Formula(_setup_group_sum, _differentiate_group_sum),
    "class_sums": Formula(_setup_group_class_sums, _differentiate_group_class_sums),
}

for _backend in BACKENDS.values():
    for _name in _backend.operators:
        register_autograd(_backend.name, _name, _kernel(_backend.name, _name))
for _name in GROUP_SCHEMAS:
    register_autograd("group", _name, _kernel("group", _name))
