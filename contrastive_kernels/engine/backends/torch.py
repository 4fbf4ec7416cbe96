"""The sweep in plain PyTorch, a chunk of rows at a time: any device, any dtype, memory O(chunk * M).

It is the fallback where no kernel is available, the yardstick of the other backends, and, because every operation of
its backward is differentiable, the one that computes the second derivatives of all.

Longer than 500 lines because a backend is one module and this one has every operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from contrastive_kernels.engine.limits import workspace_limit
from contrastive_kernels.engine.spec import (
    NORM_EPSILON,
    PLACE_BITS,
    PLACES,
    Description,
    Gradients,
    Guide,
    Inputs,
    SoftmaxMean,
    SoftmaxMeanGradients,
    SoftmaxMeanUpstream,
    SoftmaxMeanWanted,
    SoftmaxTotal,
    Statistics,
    Upstream,
    Wanted,
    compute_dtype,
)
from contrastive_kernels.engine.terms import LEAST_SQUARE, TERMS, Term

name = "torch"
saved_scores_bytes = 0

# Elements of one chunk's score tile in float32, half as many in float64, and how many bytes there are to each: up to
# eight such tiles live at a time.
CHUNK_ELEMENTS = 1 << 20
ELEMENT_BYTES = 32

# A selection takes a chunk at a time on a CPU, and elsewhere as many as this: the time to launch an operation does not
# depend on its size.
SELECT_CHUNKS_ELSEWHERE = 8


def not_supported_reasons(x: Tensor) -> list[str]:
    """Return no reason: this backend runs on everything."""
    return []


def statistic_dtype(x: Tensor) -> torch.dtype:
    """Return float64 where the device has it: the backward subtracts statistics from logits as large as 1 / T."""
    return torch.float64 if x.device.type in ("cpu", "cuda", "meta") else compute_dtype(x)


def score_dtype(x: Tensor, y: Tensor | None) -> None:
    """Return None: no scores are saved."""


def _chunks(n: int, m: int, dtype: torch.dtype) -> list[slice]:
    elements = min(CHUNK_ELEMENTS, workspace_limit() // ELEMENT_BYTES) * 4 // dtype.itemsize
    step = max(1, elements // max(m, 1))
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def _logsumexp(v: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Return log-sum-exp in `dtype`, so that maximum and logarithm are not rounded together in the dtype of v."""
    exponentials, peak = _exponentials(v, dim)
    return exponentials.sum(dim).to(dtype).log() + peak.squeeze(dim).to(dtype)


def _exponentials(v: Tensor, dim: int, exp: Callable[[Tensor], Tensor] = torch.exp) -> tuple[Tensor, Tensor]:
    """Return exp(v - peak) and the peak of v, 0 where that is infinite or there is none."""
    peak = v.amax(dim, keepdim=True) if v.shape[dim] else v.sum(dim, keepdim=True)
    peak = torch.where(peak.abs() == torch.inf, torch.zeros_like(peak), peak)
    return exp(v - peak), peak


def _normal_exp(v: Tensor) -> Tensor:
    """Return exp(v) of numbers up to about 0, and 0 for what is subnormal, which is nothing beside the largest.

    A processor takes many times as long for it, and for the products.
    """
    return (v.masked_fill(v < math.log(torch.finfo(v.dtype).tiny), -torch.inf) if v.is_cpu else v).exp()


class _Scores:
    """The score matrix of one call, computed a chunk of rows at a time, with its mask of dropped pairs."""

    def __init__(self, inputs: Inputs, what: Description, guide: Guide | None = None) -> None:
        x, y = inputs.x, inputs.y
        self.dtype = compute_dtype(x)
        self.x = x.to(self.dtype)
        self.y = self.x if y is None else y.to(self.dtype)
        self.inputs, self.what, self.guide = inputs, what, guide
        self.y_ids = inputs.x_ids if y is None else inputs.y_ids
        self.n, self.m = self.x.shape[0], self.y.shape[0]
        self.chunks = _chunks(self.n, self.m, self.dtype)

    def similarities(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Return s (rows, M) and the mask of dropped pairs, None when all are kept."""
        s = self.x[rows] @ self.y.T
        dropped: Tensor | None = None
        x_ids, y_ids, cutoff, diagonals = self.inputs.x_ids, self.y_ids, self.inputs.cutoff, self.what.diagonals
        if x_ids is not None and y_ids is not None:
            places = diagonals == PLACES
            of_x, of_y = (ids >> PLACE_BITS if places else ids for ids in (x_ids[rows], y_ids))
            dropped = of_x[:, None] == of_y[None, :]
            dropped = ~dropped if self.what.keep_equal_ids else dropped
            if places:
                of_x, of_y = (ids & ((1 << PLACE_BITS) - 1) for ids in (x_ids[rows], y_ids))
                dropped = dropped | (of_x[:, None] == of_y[None, :])
        if diagonals > 0:
            index = torch.arange(max(self.n, self.m), device=s.device)
            if diagonals > 1:
                index = index % (self.n // diagonals)
            diagonal = index[rows, None] == index[None, : self.m]
            dropped = diagonal if dropped is None else dropped | diagonal
        if cutoff is not None:
            above = s > cutoff[rows, None]
            dropped = above if dropped is None else dropped | above
        if self.guide is not None:
            above = self._above_the_cutoff_of(self.guide, rows)
            dropped = above if dropped is None else dropped | above
        return s, dropped

    def _above_the_cutoff_of(self, guide: Guide, rows: slice) -> Tensor:
        """Return the mask of the pairs that the guide drops."""
        columns = (guide.guide_x if guide.guide_y is None else guide.guide_y).to(guide.guide_cutoff.dtype)
        return guide.guide_x[rows].to(columns.dtype) @ columns.T > guide.guide_cutoff[rows, None]

    def logits(self, s: Tensor, dropped: Tensor | None, exponent: float = 1.0, bias: bool = True) -> Tensor:
        """Return exponent * scale * s + bias, -inf where dropped."""
        scale = self.inputs.scale
        u = s * scale if exponent == 1 else s * (scale * exponent)
        if bias and self.inputs.bias is not None:
            u = u + self.inputs.bias
        return u if dropped is None else u.masked_fill(dropped, -torch.inf)

    def argument(self, rows: slice, base: Tensor) -> Tensor:
        """Return the argument of the term."""
        v = base if self.inputs.term_scale is None else base * self.inputs.term_scale
        return v if self.inputs.term_offset is None else v + self.inputs.term_offset[rows, None]


def _term(what: Description) -> type[Term] | None:
    if not what.term:
        return None
    if what.term not in TERMS:
        raise ValueError(f"unknown term {what.term!r}")
    return TERMS[what.term]


def _base(term: type[Term], s: Tensor) -> Tensor:
    """Return what the argument of the term is linear in: the similarity, or minus the distance of unit rows."""
    return -(2 - 2 * s).clamp(min=LEAST_SQUARE).sqrt() if term.of_distance else s


def _through_base(term: type[Term], s: Tensor, slope: Tensor) -> Tensor:
    """Return the slope times the derivative of the base."""
    if not term.of_distance:
        return slope
    square = 2 - 2 * s
    return (slope * square.clamp(min=LEAST_SQUARE).rsqrt()).masked_fill(square < LEAST_SQUARE, 0)


def forward(
    inputs: Inputs, what: Description, *, maximum: bool, save_scores: bool = False, guide: Guide | None = None
) -> Statistics:
    """Return the statistics that `engine.spec` describes."""
    scores, term, x = _Scores(inputs, what, guide), _term(what), inputs.x
    dtype, n, m = statistic_dtype(x), scores.n, scores.m
    row_lse = x.new_empty((len(what.exponents), n), dtype=dtype)
    row_sum = x.new_empty((n if term else 0,), dtype=dtype)
    row_max = x.new_empty((n if maximum else 0,), dtype=dtype)
    col_lse = x.new_full((m if what.column_lse else 0,), -torch.inf, dtype=dtype)
    col_max = x.new_full((m if what.column_lse and maximum else 0,), -torch.inf, dtype=dtype)
    for rows in scores.chunks:
        s, dropped = scores.similarities(rows)
        for q, exponent in enumerate(what.exponents):
            row_lse[q, rows] = _logsumexp(scores.logits(s, dropped, exponent), 1, dtype)
        if what.column_lse:
            logits = scores.logits(s, dropped, bias=False)
            col_lse = torch.logaddexp(col_lse, _logsumexp(logits, 0, dtype))
            col_max = torch.maximum(col_max, logits.amax(0)) if maximum else col_max
        if maximum:
            row_max[rows] = scores.logits(s, dropped).amax(1).to(dtype) if m else -torch.inf
        if term:
            values = term.value(scores.argument(rows, _base(term, s)), *what.constants)
            row_sum[rows] = (values if dropped is None else values.masked_fill(dropped, 0)).sum(1, dtype=dtype)
    return Statistics(row_lse, col_lse, row_sum, row_max, col_max, x.new_empty(0, dtype=compute_dtype(x)))


def _split(lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return lse as high + low in `dtype`; +inf for a row without kept pairs, whose weights exp(u - lse) are then 0."""
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    high = lse.to(dtype)
    low = (lse.detach() - high.detach().to(lse.dtype)).to(dtype)
    return high, low.masked_fill(high.isinf(), 0)


def _chunk_gradients(
    matrix: _Scores, upstream: Upstream, wanted: Wanted, rows: slice
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return what some rows of x add to `Gradients`, None where nothing; every operation is differentiable.

    Rows of x and of term_offset belong to one chunk each; the other gradients are sums over the chunks.
    """
    inputs, what, dtype = matrix.inputs, matrix.what, matrix.dtype
    totals_dtype, term = statistic_dtype(inputs.x), _term(what)
    row_high, row_low = _split(upstream.row_lse[:, rows], dtype)
    s, dropped = matrix.similarities(rows)
    weight = torch.zeros_like(s)  # dL / d(scale * s)
    d_bias = None
    for q, exponent in enumerate(what.exponents):
        shifted = matrix.logits(s, dropped, exponent) - row_high[q, :, None] - row_low[q, :, None]
        part = upstream.grad_row_lse[q, rows, None].to(dtype) * shifted.exp()
        weight = weight + (part if exponent == 1 else exponent * part)
        if wanted.bias:
            d_bias = part.sum(0) if d_bias is None else d_bias + part.sum(0)
    if what.column_lse:
        col_high, col_low = _split(upstream.col_lse, dtype)
        shares = (matrix.logits(s, dropped, bias=False) - col_high - col_low).exp()
        weight = weight + upstream.grad_col_lse.to(dtype) * shares
    grad = weight * inputs.scale
    d_scale = (s * weight).sum(dtype=totals_dtype) if wanted.scale else None
    d_term_scale = d_term_offset = total = None
    if term:
        base = _base(term, s)
        argument = matrix.argument(rows, base)
        grad_row_sum = upstream.grad_row_sum[rows, None].to(dtype)
        slope = grad_row_sum * term.slope(argument, *what.constants)
        slope = slope if dropped is None else slope.masked_fill(dropped, 0)
        through = _through_base(term, s, slope)
        grad = grad + (through if inputs.term_scale is None else through * inputs.term_scale)
        d_term_scale = (base * slope).sum(dtype=totals_dtype) if wanted.term_scale else None
        d_term_offset = slope.sum(1) if wanted.term_offset else None
        if wanted.total:
            values = grad_row_sum * term.value(argument, *what.constants)
            values = values if dropped is None else values.masked_fill(dropped, 0)
            total = values.sum(dtype=totals_dtype)
    d_x = grad @ matrix.y if wanted.x else None
    d_y = grad.T @ matrix.x[rows] if wanted.y or (wanted.x and inputs.y is None) else None
    return d_x, d_y, d_scale, d_bias, d_term_scale, d_term_offset, total


def backward(
    upstream: Upstream,
    inputs: Inputs,
    what: Description,
    wanted: Wanted,
    scores: Tensor | None = None,
    *,
    float32_gradients: bool = False,
    guide: Guide | None = None,
) -> Gradients:
    """Return the gradients that `engine.spec` describes; no scores are saved here."""
    matrix, x = _Scores(inputs, what, guide), inputs.x
    dtype, totals_dtype = matrix.dtype, statistic_dtype(x)

    def zeros(*shape: int) -> Tensor:
        return matrix.x.new_zeros(shape)

    scalar = zeros().to(totals_dtype)
    of_rows, of_offsets = [zeros(0, x.shape[1])], [zeros(0)]
    of_columns, of_bias = zeros(*matrix.y.shape), zeros(matrix.m)
    totals: list[Any] = [of_rows, of_columns, scalar, of_bias, scalar.clone(), of_offsets, scalar.clone()]
    for rows in matrix.chunks:
        for k, part in enumerate(_chunk_gradients(matrix, upstream, wanted, rows)):
            if part is None:
                continue
            if isinstance(totals[k], list):
                totals[k].append(part)
            else:
                totals[k] += part
    grads = Gradients(*(torch.cat(total) if isinstance(total, list) else total for total in totals))
    if inputs.y is None and wanted.x:
        grads = grads._replace(x=grads.x + grads.y, y=zeros(0))
    features = dtype if float32_gradients else x.dtype
    dtypes = (features, features, dtype, dtype, dtype, dtype, totals_dtype)
    cast = (grad.to(own) for grad, own in zip(grads, dtypes, strict=True))
    return Gradients(*(grad if want else grad.new_empty(0) for grad, want in zip(cast, wanted, strict=True)))


def softmax_total(
    weight: Tensor, own: Tensor, inputs: Inputs, what: Description, wanted: tuple[bool, bool, bool]
) -> SoftmaxTotal:
    """Return the total and the gradients that `engine.spec` describes."""
    matrix, (of_x, of_y, of_scale) = _Scores(inputs, what), wanted
    itself, dtype, wide = inputs.y is None, matrix.dtype, statistic_dtype(inputs.x)
    total = matrix.x.new_zeros((), dtype=wide)
    d_own, d_scale = torch.empty_like(own), torch.zeros_like(total)
    d_x = matrix.x.new_zeros(matrix.x.shape if of_x else 0)
    d_y = matrix.x.new_zeros(matrix.y.shape if of_y or (of_x and itself) else 0)
    for rows in matrix.chunks:
        s, dropped = matrix.similarities(rows)
        logits = matrix.logits(s, dropped)
        lse = _logsumexp(logits, 1, wide)
        excess = lse - own[rows]
        weights = weight[rows].to(wide)
        total += (weights * torch.logaddexp(excess, torch.zeros_like(excess))).sum()
        grad = weights * excess.sigmoid()
        d_own[rows] = -grad.to(dtype)
        if not any(wanted):
            continue
        high, low = _split(lse, dtype)
        g = grad.to(dtype)[:, None] * (logits - high[:, None] - low[:, None]).exp()
        if of_scale:
            d_scale += (s * g).sum(dtype=wide)
        g = g * inputs.scale
        if d_x.numel():
            d_x[rows] = g @ matrix.y
        if d_y.numel():
            d_y += g.T @ matrix.x[rows]
    if itself and of_x:
        d_x, d_y = d_x + d_y, matrix.x.new_zeros(0)
    features = inputs.x.dtype
    scale = d_scale.to(dtype) if of_scale else matrix.x.new_zeros(0)
    return SoftmaxTotal(d_x.to(features), d_y.to(features), scale, d_own, total)


def softmax_mean(values: Tensor, inputs: Inputs, what: Description) -> SoftmaxMean:
    """Return the means and the log-sum-exps that `engine.spec` describes."""
    matrix, wide = _Scores(inputs, what), statistic_dtype(inputs.x)
    values = values.to(matrix.dtype)
    mean = values.new_empty(matrix.n, values.shape[1])
    row_lse = values.new_empty(matrix.n, dtype=wide)
    for rows in matrix.chunks:
        exponentials, peak = _exponentials(matrix.logits(*matrix.similarities(rows)), 1, _normal_exp)
        total = exponentials.sum(1)
        row_lse[rows] = total.to(wide).log() + peak.squeeze(1).to(wide)
        mean[rows] = (exponentials @ values) / total.masked_fill(total == 0, 1)[:, None]
    return SoftmaxMean(mean, row_lse)


def _chunk_mean_gradients(
    matrix: _Scores,
    upstream: SoftmaxMeanUpstream,
    values: Tensor,
    wanted: SoftmaxMeanWanted,
    rows: slice,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return what some rows of x add to `SoftmaxMeanGradients`, None where nothing; all of it is differentiable."""
    high, low = _split(upstream.row_lse[rows], matrix.dtype)
    grad, s_and_dropped = upstream.grad_mean[rows], matrix.similarities(rows)
    shares = _normal_exp(matrix.logits(*s_and_dropped) - high[:, None] - low[:, None])
    d_values = shares.T @ grad if wanted.values else None
    if not any(wanted[:-1]):
        return None, None, None, None, d_values
    weight = shares * (grad @ values.T + upstream.shift[rows, None])  # dL / d(scale * s)
    d_scale = (s_and_dropped[0] * weight).sum(dtype=statistic_dtype(matrix.x)) if wanted.scale else None
    d_bias = weight.sum(0) if wanted.bias else None
    weight = weight * matrix.inputs.scale
    d_x = weight @ matrix.y if wanted.x else None
    d_y = weight.T @ matrix.x[rows] if wanted.y or (wanted.x and matrix.inputs.y is None) else None
    return d_x, d_y, d_scale, d_bias, d_values


def softmax_mean_backward(
    upstream: SoftmaxMeanUpstream, values: Tensor, inputs: Inputs, what: Description, wanted: SoftmaxMeanWanted
) -> SoftmaxMeanGradients:
    """Return the gradients that `engine.spec` describes."""
    matrix, wide = _Scores(inputs, what), values.to(compute_dtype(inputs.x))
    itself = inputs.y is None
    shapes = matrix.x.shape, matrix.y.shape, (), (matrix.m,), wide.shape
    summed = wanted._replace(y=wanted.y or (wanted.x and itself))
    totals = [wide.new_zeros(shape if want else 0) for shape, want in zip(shapes, summed, strict=True)]
    totals[2] = totals[2].to(statistic_dtype(inputs.x))
    for rows in matrix.chunks:
        parts = _chunk_mean_gradients(matrix, upstream, wide, wanted, rows)
        for k, part in enumerate(parts):
            if part is not None:
                total = totals[k][rows] if k == 0 else totals[k]
                total += part
    if itself and wanted.x:
        totals[0] = totals[0] + totals[1]
    dtypes = inputs.x.dtype, (inputs.x if inputs.y is None else inputs.y).dtype, *(matrix.dtype,) * 2, values.dtype
    cast = (total.to(dtype) for total, dtype in zip(totals, dtypes, strict=True))
    return SoftmaxMeanGradients(*(t if want else t.new_empty(0) for t, want in zip(cast, wanted, strict=True)))


def derivative(
    tensors: Sequence[Tensor | None], what: Description, wanted: Wanted, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return a derivative of `backward`, of any order, for the tensors that are needed and None for the others.

    The tensors are the fields of `Upstream` and `Inputs`, then what `_derivative` says.
    """
    given = len(Upstream._fields) + len(Inputs._fields)

    def flow(leaves: Sequence[Any], rows: slice) -> Tensor | None:
        return _chunk_flow(leaves, what, wanted, rows)

    return _derivative(tensors, needed, given, len(Gradients._fields), len(Upstream._fields), flow)


def guided_derivative(
    tensors: Sequence[Tensor | None], what: Description, wanted: Wanted, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return a derivative of `backward` with a guide, whose fields come after those of `Inputs`."""
    split = len(Upstream._fields) + len(Inputs._fields)
    given = split + len(Guide._fields)

    def flow(leaves: Sequence[Any], rows: slice) -> Tensor | None:
        return _chunk_flow((*leaves[:split], *leaves[given:]), what, wanted, rows, Guide(*leaves[split:given]))

    return _derivative(tensors, needed, given, len(Gradients._fields), len(Upstream._fields), flow)


def softmax_mean_derivative(
    tensors: Sequence[Tensor | None], what: Description, wanted: SoftmaxMeanWanted, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return a derivative of `softmax_mean_backward` as `derivative` does of `backward`.

    The tensors are the fields of `SoftmaxMeanUpstream`, the values and the fields of `Inputs`, then the same.
    """
    split = len(SoftmaxMeanUpstream._fields)
    given = split + 1 + len(Inputs._fields)

    def flow(leaves: Sequence[Any], rows: slice) -> Tensor | None:
        inputs, into = Inputs(*leaves[split + 1 : given]), SoftmaxMeanGradients(*leaves[given : given + len(wanted)])
        matrix, upstream = _Scores(inputs, what), SoftmaxMeanUpstream(*leaves[:split])
        parts = _chunk_mean_gradients(matrix, upstream, leaves[split].to(matrix.dtype), wanted, rows)
        into = into._replace(x=None if into.x is None else into.x[rows], y=into.x if inputs.y is None else into.y)
        return _flow(parts, into)

    return _derivative(tensors, needed, given, len(wanted), split + 1, flow)


def _derivative(
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    given: int,
    results: int,
    first_input: int,
    chunk_flow: Callable[[Sequence[Any], slice], Tensor | None],
) -> list[Tensor | None]:
    """Return a derivative, of any order, of a function that is a sum over the rows of x.

    The tensors are those `given` to it, among which x and y begin at `first_input`, then what flows into its results,
    then, for the next order, what flows into their derivatives, and so on; `needed` says which of those before the last
    are. `chunk_flow` returns the product of what some rows add to the results with what flows into these. The sum over
    the rows stays one in every order, so that a chunk at a time is differentiated here too.
    """
    bounds = [given, given + results]
    while bounds[-1] < len(tensors):
        bounds.append(bounds[-1] + bounds[-2])
    positions = [position for position, need in enumerate(needed) if need]
    found = [
        torch.zeros_like(tensor) if need and tensor is not None else None
        for tensor, need in zip(tensors, needed, strict=False)
    ]
    x, y = tensors[first_input : first_input + 2]
    assert x is not None
    for rows in _chunks(x.shape[0], (x if y is None else y).shape[0], compute_dtype(x)):
        with torch.enable_grad():
            leaves: list[Any] = [
                None if tensor is None else tensor.detach().requires_grad_(tensor.is_floating_point())
                for tensor in tensors
            ]
            flow = chunk_flow(leaves, rows)
            for end, following in pairwise(bounds[1:]):
                flow = _flow(_gradients(flow, leaves[: following - end], create_graph=True), leaves[end:following])
        for position, grad in zip(positions, _gradients(flow, [leaves[p] for p in positions]), strict=True):
            total = found[position]
            if grad is not None and total is not None:
                total += grad
    return found


def _chunk_flow(
    leaves: Sequence[Any], what: Description, wanted: Wanted, rows: slice, guide: Guide | None = None
) -> Tensor | None:
    """Return the product of what some rows add to `Gradients` with what flows into these."""
    split, given = len(Upstream._fields), len(Upstream._fields) + len(Inputs._fields)
    inputs, into = Inputs(*leaves[split:given]), Gradients(*leaves[given : given + len(Gradients._fields)])
    parts = _chunk_gradients(_Scores(inputs, what, guide), Upstream(*leaves[:split]), wanted, rows)
    into = into._replace(
        x=None if into.x is None else into.x[rows],
        y=into.x if inputs.y is None else into.y,
        term_offset=None if into.term_offset is None else into.term_offset[rows],
    )
    return _flow(parts, into)


def _flow(results: Sequence[Tensor | None], into: Sequence[Tensor | None]) -> Tensor | None:
    """Return the sum of the products of results with what flows into them; None where nothing flows."""
    products = [
        (result * grad.to(result.dtype)).sum()
        for result, grad in zip(results, into, strict=True)
        if result is not None and grad is not None
    ]
    return sum(products[1:], products[0]) if products else None


def _gradients(flow: Tensor | None, leaves: Sequence[Any], *, create_graph: bool = False) -> list[Tensor | None]:
    """Return the gradients of the leaves, None for those without."""
    positions = [p for p, leaf in enumerate(leaves) if leaf is not None and leaf.requires_grad]
    found: list[Tensor | None] = [None] * len(leaves)
    if flow is not None and flow.requires_grad and positions:
        grads = torch.autograd.grad(flow, [leaves[p] for p in positions], create_graph=create_graph, allow_unused=True)
        for position, grad in zip(positions, grads, strict=True):
            found[position] = grad
    return found


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows of unit norm in the dtype of x, and the norms in the compute dtype."""
    wide = x.to(compute_dtype(x))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    unit = (wide / norm.clamp_min(NORM_EPSILON)).to(x.dtype)
    return unit.contiguous(), norm.contiguous()  # as every backend's: compiled programs rely on it


def unit_rows_backward(grad: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    """Return the gradient of x."""
    wide, grad = x.to(norm.dtype), grad.to(norm.dtype)
    inverse = norm.clamp_min(NORM_EPSILON).reciprocal().masked_fill(norm < NORM_EPSILON, 0)
    # The cube of the inverse would leave the range of float32 at norms of 1e13.
    unit = wide * inverse
    along = torch.linalg.vecdot(grad, unit).unsqueeze(-1)
    return (torch.addcmul(grad, unit, along, value=-1) * inverse).to(x.dtype).contiguous()


def view_minimum(views: Tensor) -> Tensor:
    """Return (N, 2), the least similar pair j < k of each sample's views, the first in row-major order on a tie."""
    views = views.to(compute_dtype(views))
    first, second = torch.triu_indices(views.shape[1], views.shape[1], 1, device=views.device)
    least = (views @ views.mT)[:, first, second].argmin(1)
    return torch.stack([first[least], second[least]], 1)


def select(
    x: Tensor,
    y: Tensor | None,
    k: int,
    largest: bool,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    exclude_diagonal: bool,
) -> tuple[Tensor, Tensor]:
    """Return the values and columns that `primitives.select.row_select` describes."""
    dtype = compute_dtype(x)
    x = x.to(dtype)
    y, y_ids = (x, x_ids) if y is None else (y.to(dtype), y_ids)
    n, m = x.shape[0], y.shape[0]
    values = x.new_full((n, k), -torch.inf)
    columns = torch.full((n, k), -1, dtype=torch.int64, device=x.device)
    chunks, together = _chunks(n, m, dtype), 1 if x.is_cpu else SELECT_CHUNKS_ELSEWHERE
    for first in range(0, len(chunks) if m else 0, together):
        some = chunks[first : first + together]
        rows = slice(some[0].start, some[-1].stop)
        # The products of a sweep, shape by shape, so that its similarities have the same bits.
        parts = [x[chunk] @ y.T for chunk in some]
        similarity = parts[0] if len(parts) == 1 else torch.cat(parts)
        # The smallest are the largest of the negated ones.
        similarity = similarity if largest else -similarity
        dropped = _dropped(rows, m, x_ids, y_ids, exclude_diagonal, x.device)
        if dropped is not None:
            similarity = similarity.masked_fill(dropped, -torch.inf)
        chosen = _leading(similarity, k)
        values[rows, : chosen.shape[1]], columns[rows, : chosen.shape[1]] = similarity.gather(1, chosen), chosen
    columns = columns.masked_fill(values == -torch.inf, -1)
    return values if largest else -values, columns


def _dropped(
    rows: slice, m: int, x_ids: Tensor | None, y_ids: Tensor | None, exclude_diagonal: bool, device: torch.device
) -> Tensor | None:
    """Return the mask (rows, M) of the pairs that are not allowed, None when all are."""
    dropped = None if x_ids is None or y_ids is None else x_ids[rows, None] == y_ids
    if exclude_diagonal:
        row = torch.arange(rows.start, rows.stop, device=device)
        diagonal = row[:, None] == torch.arange(m, device=device)
        dropped = diagonal if dropped is None else dropped | diagonal
    return dropped


def _leading(key: Tensor, k: int) -> Tensor:
    """Return the positions of the k largest entries of each row in order, equal ones by position, NaN first."""
    width = key.shape[1]
    k = min(k, width)
    if k == 1:
        return key.argmax(1, keepdim=True)
    key = key.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if k == width:
        return key.sort(dim=1, descending=True, stable=True).indices
    # topk leaves open which of several entries that equal the last one it takes: those are looked up anew.
    values, positions = key.topk(k, 1)
    last = values[:, -1:]
    countdown = torch.arange(width, 0, -1, dtype=key.dtype, device=key.device)
    first_equal = width - torch.where(key == last, countdown, 0).topk(k, 1).values.to(torch.int64)
    above = values > last
    rank = torch.arange(k, device=key.device) - above.sum(1, keepdim=True)
    positions = torch.where(above, positions, first_equal.gather(1, rank.clamp(min=0)))
    # Equal entries above the last one stand in any order yet.
    positions = positions.sort(dim=1).values
    order = key.gather(1, positions).sort(dim=1, descending=True, stable=True).indices
    return positions.gather(1, order)


operators: Mapping[str, Callable[..., Any]] = {
    "forward": forward,
    "backward": backward,
    "softmax_total": softmax_total,
    "guided_forward": forward,
    "guided_backward": backward,
    "softmax_mean": softmax_mean,
    "softmax_mean_backward": softmax_mean_backward,
    "unit_rows": unit_rows,
    "unit_rows_backward": unit_rows_backward,
    "views": view_minimum,
    "select": select,
}
