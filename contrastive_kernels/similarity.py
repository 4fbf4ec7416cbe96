"""The primitives every loss is written from, and the one autograd.Function over a sweep."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from contrastive_kernels import checks
from contrastive_kernels.autograd import apply
from contrastive_kernels.backends import BACKENDS, choose_backend
from contrastive_kernels.backends import torch as torch_backend
from contrastive_kernels.operators import operator
from contrastive_kernels.sweep import ALL_PAIRS, Pairs, Statistics, Term, compute_dtype
from contrastive_kernels.workspace import saved_scores_limit, workspace_limit

__all__ = ["min_view_similarity", "row_dot", "similarity_logsumexp", "similarity_sum", "sweep"]


class _SweepFunction(torch.autograd.Function):
    """Forward and backward operator of one backend. The arguments are those of the forward schema, then the backend."""

    @staticmethod
    def forward(x, y, scale, bias, x_ids, y_ids, cutoff, term_scale, term_offset, exponents, columns, term, constants,
                same, exclude_diagonal, maximum, keep, backend):  # fmt: skip
        return operator(backend, "forward")(
            x, y, scale, bias, x_ids, y_ids, cutoff, term_scale, term_offset, exponents, columns, term, constants, same,
            exclude_diagonal, maximum, keep,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors, (*ctx.description, _, ctx.kept, ctx.backend) = inputs[:9], inputs[9:]
        row_lse, col_lse, _, row_max, col_max, scores = output
        ctx.mark_non_differentiable(row_max, col_max, scores)
        ctx.save_for_backward(row_lse, col_lse, *tensors, scores)
        # no zeros for the statistics that nobody asked for
        ctx.set_materialize_grads(False)
        ctx.shapes = [statistic.shape for statistic in output[:3]]

    @staticmethod
    def backward(ctx, *grads):
        needs = [*(ctx.needs_input_grad[i] for i in _DIFFERENTIABLE), False]
        *tensors, scores = ctx.saved_tensors
        grads = [
            tensors[0].new_zeros(shape) if grad is None else grad
            for grad, shape in zip(grads[:3], ctx.shapes, strict=True)
        ]
        arguments = (*grads, *tensors, *ctx.description, needs, scores if ctx.kept else None)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = apply(_SweepBackward, *arguments, ctx.backend)
        else:
            grads = operator(ctx.backend, "backward")(*arguments)
        all_grads = [None] * 18
        for i, grad, need in zip(_DIFFERENTIABLE, grads[:-1], needs[:-1], strict=True):
            all_grads[i] = grad if need else None
        return tuple(all_grads)


# Of the forward schema: x, y, scale, bias, term_scale, term_offset.
_DIFFERENTIABLE = (0, 1, 2, 3, 7, 8)


class _SweepBackward(torch.autograd.Function):
    """The backward operator; its own derivative is that of the one backend whose backward is differentiable."""

    @staticmethod
    def forward(*arguments):
        *arguments, backend = arguments
        return operator(backend, "backward")(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors, ctx.description = inputs[:14], inputs[14:21]
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *grad_outputs):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "third derivatives of a similarity sweep are not supported; write the loss densely, as in python_ref"
            )
        with torch.enable_grad():
            inputs = [
                None if tensor is None else tensor.detach().requires_grad_(need)
                for tensor, need in zip(ctx.saved_tensors, ctx.needs_input_grad[:14], strict=True)
            ]
            outputs = torch_backend.backward(*inputs, *ctx.description)
            pairs = [(out, grad) for out, grad in zip(outputs, grad_outputs, strict=True) if out.requires_grad]
            wanted = [i for i, tensor in enumerate(inputs) if tensor is not None and tensor.requires_grad]
            grads = torch.autograd.grad(
                [out for out, _ in pairs], [inputs[i] for i in wanted], [grad for _, grad in pairs], allow_unused=True
            )
        all_grads = [None] * 23
        for i, grad in zip(wanted, grads, strict=True):
            all_grads[i] = grad
        return tuple(all_grads)


def sweep(
    x: Tensor,
    y: Tensor | None = None,
    pairs: Pairs = ALL_PAIRS,
    *,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    exponents: tuple[float, ...] = (1.0,),
    columns: bool = False,
    term: Term | None = None,
    maximum: bool = False,
    backend: str | None = None,
) -> Statistics:
    """One pass over the similarities of x (N, D) and y (M, D), or of x with itself; see `contrastive_kernels.sweep`.

    Arguments are taken as checked. Under autocast the features are cast to its dtype; everything else keeps float32.
    """
    *arguments, backend = _arguments(x, y, pairs, scale, bias, exponents, columns, term, backend)
    x, y, scale = arguments[:3]
    wanted = torch.is_grad_enabled() and (x.requires_grad or (y is not None and y.requires_grad))
    keep = wanted and _may_be_saved(x, y, pairs, backend)
    statistics = apply(_SweepFunction, *arguments, maximum, keep, backend)
    asked_for = (bool(exponents), columns, term is not None, maximum, maximum and columns, False)
    dtype = scale.dtype
    return Statistics(*(s.to(dtype) if asked else s for s, asked in zip(statistics, asked_for, strict=True)))


def _may_be_saved(x: Tensor, y: Tensor | None, pairs: Pairs, backend: str) -> bool:
    """Whether the similarities may be kept for the backward.

    Rounded ones not with a cutoff: a pair that was dropped could come back, and it is in no log-sum-exp.
    """
    dtype, limit = BACKENDS[backend].score_dtype(x, y), saved_scores_limit()
    if pairs.cutoff is not None and dtype == torch.int16:
        return False
    if limit is None:
        limit = min(BACKENDS[backend].SAVED_SCORES_BYTES, workspace_limit())
    m = (x if y is None else y).shape[0]
    return dtype is not None and 0 < x.shape[0] * m * dtype.itemsize <= limit


def _arguments(x, y, pairs, scale, bias, exponents, columns, term, backend) -> tuple:
    """What both operators take, as far as they take the same, and the backend."""
    x, y = autocast(x), None if y is None else autocast(y)
    dtype = compute_dtype(x)
    x_ids, y_ids, cutoff, same, exclude_diagonal = pairs
    if y_ids is not None and y_ids is x_ids and torch.compiler.is_compiling():
        y_ids = y_ids.clone()  # Dynamo refuses the same tensor twice among the inputs of a Function
    backend = choose_backend(x, backend)
    term_scale, term_offset, constants = (None, None, ()) if term is None else term.operands()
    if term_offset is not None:
        term_offset = _as_tensor(term_offset, x, dtype).expand(x.shape[0])
    return (
        x,
        y,
        _as_tensor(scale, x, dtype),
        None if bias is None else bias.to(dtype),
        x_ids,
        y_ids,
        None if cutoff is None else cutoff.detach().to(dtype),
        None if term_scale is None else _as_tensor(term_scale, x, dtype),
        term_offset,
        list(exponents),
        columns,
        "" if term is None else term.name,
        list(constants),
        same,
        int(exclude_diagonal),
        backend,
    )


class _TotalFunction(torch.autograd.Function):
    """The weighted sum of a term over all pairs: the backward operator run at once, its gradients kept until asked for.

    The arguments are the weights of the rows, then those of the backward schema between the statistics and `needs`.
    """

    @staticmethod
    def forward(weight, x, y, scale, bias, x_ids, y_ids, cutoff, term_scale, term_offset, *rest):
        *description, needs, backend = rest
        none, empty = weight.new_empty(0, len(weight)), weight.new_empty(0)
        *grads, total = operator(backend, "backward")(
            none, empty, weight, none, empty, x, y, scale, bias, x_ids, y_ids, cutoff, term_scale, term_offset,
            *description, needs,
        )  # fmt: skip
        return total.to(weight.dtype), *grads

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors, (*ctx.description, ctx.needs, ctx.backend) = inputs[:10], inputs[10:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx, grad, *_):
        (weight, *tensors), grads = ctx.saved_tensors[:10], ctx.saved_tensors[10:]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            none, empty = weight.new_empty(0, len(weight)), weight.new_empty(0)
            needs = [*ctx.needs[:-1], False]
            arguments = (none, empty, grad * weight, none, empty, *tensors, *ctx.description, needs, None)
            grads = apply(_SweepBackward, *arguments, ctx.backend)[:-1]
        else:
            grads = [(g.to(weight.dtype) * grad).to(g.dtype) for g in grads]
        all_grads = [None] * 18
        for i, g, need in zip(_DIFFERENTIABLE, grads, ctx.needs[:-1], strict=True):
            all_grads[1 + i] = g if need else None
        return tuple(all_grads)


def weighted_total(
    x: Tensor,
    y: Tensor | None = None,
    pairs: Pairs = ALL_PAIRS,
    *,
    term: Term,
    weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``sum_i weight_i sum_j phi(s_ij)``, 0-dim; its gradients come from the same sweep: three products, not four.

    The weights (N,) default to 1. Arguments are taken as checked, as those of `sweep`.
    """
    arguments = _arguments(x, y, pairs, 1.0, None, (), False, term, backend)
    x, y, *tensors, term_scale, term_offset = arguments[:9]
    leaves = (x, y, None, None, term_scale, term_offset)
    needs = [torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves]
    # Of float16 features the gradients are kept for the end: before the loss's own factor they are beyond its range.
    if not any(needs) or x.dtype == torch.float16 or (weight is not None and weight.requires_grad):
        row_sum = sweep(x, y, pairs, term=term, exponents=(), backend=backend).row_sum
        return (row_sum if weight is None else row_sum * weight).sum()
    weight = tensors[0].new_ones(x.shape[0]) if weight is None else weight.detach().to(tensors[0])
    return apply(_TotalFunction, weight, *arguments[:-1], [*needs, True], arguments[-1])[0]


def autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast, if active, gives to matrix products."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


class _RowDotFunction(torch.autograd.Function):
    """`row_dot` by the operators of a backend that has them: a launch each way for four and for six."""

    @staticmethod
    def forward(x, y, backend):
        return operator(backend, "row_dot")(x, y)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, ctx.backend = inputs
        ctx.save_for_backward(x, y)

    @staticmethod
    def backward(ctx, grad):
        (x, y), needs = ctx.saved_tensors, ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            grads = [(grad.unsqueeze(-1) * other.to(grad.dtype)).to(x.dtype) for other in (y, x)]
        else:
            grads = operator(ctx.backend, "row_dot_backward")(grad, x, y, needs)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None


def row_dot(x: Tensor, y: Tensor, backend: str | None = None) -> Tensor:
    """``<x_i, y_i>`` over the last dimension, accumulated in the compute dtype whatever the dtype of the features."""
    # on a CPU nobody has to be asked; Dynamo refuses the same tensor twice among the inputs of a Function
    elsewhere = (not x.is_cpu or backend == "triton") and x is not y
    if elsewhere and x.shape == y.shape and x.dtype == y.dtype and choose_backend(x, backend) == "triton":
        return apply(_RowDotFunction, x, y, "triton")
    dtype = compute_dtype(x)
    return (x.to(dtype) * y.to(dtype)).sum(-1)


def _as_tensor(value: float | Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(x.device, dtype)
    return torch.full((), value, dtype=dtype, device=x.device)


@overload
def similarity_logsumexp(
    x: Tensor,
    y: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    y_bias: Tensor | None = None,
    cutoff: float | Tensor | None = None,
    columns: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def similarity_logsumexp(
    x: Tensor,
    y: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    y_bias: Tensor | None = None,
    cutoff: float | Tensor | None = None,
    columns: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def similarity_logsumexp(
    x, y=None, *, scale=1.0, x_ids=None, y_ids=None, y_bias=None, cutoff=None, columns=False, backend=None
):
    r"""Log-sum-exp of every row (and column) of the similarity matrix, which is never stored.

    .. math::
        \ell_i = \log \sum_{j \in A(i)} \exp(\mathrm{scale} \, \langle x_i, y_j \rangle + b_j), \qquad
        A(i) = \{j : \mathrm{id}(x_i) \ne \mathrm{id}(y_j),\ \langle x_i, y_j \rangle \le c_i\}

    Args:
        x: ``(N, D)``, float16, bfloat16, float32 or float64; taken as it is, not normalised.
        y: ``(M, D)``, or None for x against itself (self pairs included unless ``x_ids`` leaves them out).
        scale: inverse temperature; float or 0-dim tensor, differentiable.
        x_ids: ``(N,)`` integers; a pair with equal ids is left out. With ``y=None`` they serve both sides.
        y_ids: ``(M,)`` integers; given exactly when ``x_ids`` and ``y`` are.
        y_bias: ``(M,)``, added to the logits of column j, differentiable. Not with ``columns``.
        cutoff: float or ``(N,)``; pairs with ``<x_i, y_j>`` above it are left out. No gradient, not with ``columns``.
        columns: also return the log-sum-exp of every column.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.

    Returns:
        ``(N,)``, or ``((N,), (M,))`` with ``columns``; float32 (float64 for float64 inputs), differentiable.
        A row or column with no pair left is ``-inf`` and has zero gradient.

    Raises:
        ValueError: shapes that do not fit, or ``columns`` together with ``y_bias`` or ``cutoff``.
        TypeError: dtypes that differ or are not floating (ids: not integer).
        RuntimeError: tensors on different devices.
        NotImplementedError: the requested backend does not take these inputs.

    Example:
        >>> x = torch.nn.functional.normalize(torch.randn(8, 4), dim=1)
        >>> similarity_logsumexp(x, scale=10.0, x_ids=torch.arange(8)).shape
        torch.Size([8])
    """
    x_ids, y_ids = checks.primitive(x, y, x_ids, y_ids, cutoff)
    scale = checks.scalar("scale", scale, x)
    if y_bias is not None:
        checks.vector("y_bias", y_bias, x if y is None else y, "x" if y is None else "y")
    if columns and (y_bias is not None or cutoff is not None):
        raise ValueError("columns=True takes neither y_bias nor cutoff; call twice with x and y exchanged")
    pairs = Pairs(x_ids, y_ids, checks.per_row("cutoff", cutoff, x))
    out = sweep(x, y, pairs, scale=scale, bias=y_bias, columns=columns, backend=backend)
    row_lse = out.row_lse.squeeze(0)
    return (row_lse, out.col_lse) if columns else row_lse


def similarity_sum(
    x: Tensor,
    y: Tensor | None = None,
    *,
    term: Term,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    cutoff: float | Tensor | None = None,
    reduction: Literal["none", "sum"] = "none",
    backend: str | None = None,
) -> Tensor:
    r"""Sum of an elementwise function over every row of the similarity matrix, which is never stored.

    .. math:: r_i = \sum_{j \in A(i)} \phi(\langle x_i, y_j \rangle)

    Args:
        x, y, x_ids, y_ids, cutoff, backend: as in `similarity_logsumexp`; the same pairs are left out.
        term: the function: `Band`, `Softplus`, `Square`, `Hinge`, `DistanceHinge`, `Student`, `Gaussian`, `Identity` or
            `Count`.
        reduction: ``"none"``, or ``"sum"`` over the rows too: then one sweep computes the value and the gradients,
            three matrix products instead of four.

    Returns:
        ``(N,)``, or 0-dim for ``"sum"``; float32 (float64 for float64 inputs), differentiable in x, y and the term's
        tensors.

    Raises:
        ValueError, TypeError, RuntimeError, NotImplementedError: as `similarity_logsumexp`.

    Example:
        >>> x = torch.nn.functional.normalize(torch.randn(8, 4), dim=1)
        >>> similarity_sum(x, term=Band(0.1, 0.5), x_ids=torch.arange(8)).shape
        torch.Size([8])
    """
    if not isinstance(term, Term):
        raise TypeError(f"term must be a Term such as Band(0.1, 0.5), not {type(term).__name__}")
    x_ids, y_ids = checks.primitive(x, y, x_ids, y_ids, cutoff)
    checks.term_operands(term, x)
    checks.choice("reduction", reduction, ("none", "sum"))
    pairs = Pairs(x_ids, y_ids, checks.per_row("cutoff", cutoff, x))
    if reduction == "sum":
        return weighted_total(x, y, pairs, term=term, backend=backend)
    return sweep(x, y, pairs, term=term, exponents=(), backend=backend).row_sum


def min_view_similarity(
    views: Tensor, *, reduce: Literal["min", "mean"] = "min", backend: str | None = None
) -> tuple[Tensor, Tensor | None]:
    r"""The least (or mean) similarity between two distinct views of each sample.

    .. math:: s_i = \min_{j < k} \langle z_{ij}, z_{ik} \rangle \quad \text{or} \quad
        s_i = \frac{\lVert \sum_j z_{ij} \rVert^2 - \sum_j \lVert z_{ij} \rVert^2}{V (V - 1)}

    Args:
        views: ``(N, V, D)`` with ``V >= 2``, rows of unit norm.
        reduce: ``"min"`` or ``"mean"``.
        backend: as in `similarity_logsumexp`.

    Returns:
        values ``(N,)``, float32 (float64 for float64 inputs), differentiable (the whole gradient of a minimum goes to
        its pair), and the pairs ``(N, 2)`` int64, j < k, the first in row-major order on a tie; None for ``"mean"``.

    Raises:
        ValueError: views is not (N, V, D) with V >= 2, or reduce is unknown.

    Source: Zhao, Du, Wang, Yao, Huang 2023 (ArCL), the alignment term.

    Example:
        >>> views = torch.nn.functional.normalize(torch.randn(8, 4, 16), dim=-1)
        >>> values, pairs = min_view_similarity(views)
    """
    checks.views("views", views)
    checks.choice("reduce", reduce, ("min", "mean"))
    views = autocast(views)
    if reduce == "mean":
        dtype, v = compute_dtype(views), views.shape[1]
        total = views.sum(1, dtype=dtype)
        return (row_dot(total, total) - row_dot(views, views).sum(1)) / (v * (v - 1)), None
    pairs = operator(choose_backend(views, backend), "views")(views.detach())
    index = pairs.unsqueeze(-1).expand(-1, -1, views.shape[2])
    first, second = views.gather(1, index).unbind(1)
    return row_dot(first, second, backend), pairs
