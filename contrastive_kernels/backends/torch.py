"""The sweep in plain PyTorch, a chunk of rows at a time: any device, any dtype, memory O(chunk * M).

The fallback where no kernel is available, the yardstick of the others, and, because every operation of its backward is
differentiable, the one that computes second derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from contrastive_kernels.sweep import NORM_EPSILON, Statistics, compute_dtype
from contrastive_kernels.workspace import workspace_limit

name = "torch"
SAVED_SCORES_BYTES = 0

# Elements of one chunk's score tile, and how many bytes there are to each: up to eight such tiles live at a time.
CHUNK_ELEMENTS = 1 << 20
ELEMENT_BYTES = 32

# The square of the least distance that counts, for terms of distances.
LEAST_SQUARE = 1e-12


def not_supported_reasons(x: Tensor) -> list[str]:
    """Why this backend cannot run on x: never."""
    return []


def statistic_dtype(x: Tensor) -> torch.dtype:
    """float64 where the device has it: the backward subtracts the statistics from logits of magnitude 1/temperature."""
    return torch.float64 if x.device.type in ("cpu", "cuda", "meta") else compute_dtype(x)


def score_dtype(x: Tensor, y: Tensor | None) -> None:
    """Saves no scores."""


def _chunks(n: int, m: int) -> list[slice]:
    step = max(1, min(CHUNK_ELEMENTS, workspace_limit() // ELEMENT_BYTES) // max(m, 1))
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def _logsumexp(v: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """log-sum-exp in `dtype`, so that maximum and logarithm are not rounded together in the dtype of v."""
    if v.shape[dim] == 0:
        return torch.logsumexp(v, dim).to(dtype)
    peak = v.amax(dim, keepdim=True)
    peak = torch.where(peak.abs() == torch.inf, torch.zeros_like(peak), peak)
    return (v - peak).exp().sum(dim).to(dtype).log() + peak.squeeze(dim).to(dtype)


class _Scores:
    """The score matrix of one call, produced a chunk of rows at a time, with its mask of dropped pairs."""

    def __init__(
        self, x, y, scale, bias, x_ids, y_ids, cutoff, term_scale, term_offset, same, exclude_diagonal
    ) -> None:
        self.dtype = compute_dtype(x)
        self.x = x.to(self.dtype)
        self.y = self.x if y is None else y.to(self.dtype)
        self.scale, self.bias = scale, bias
        self.x_ids, self.y_ids = x_ids, x_ids if y is None else y_ids
        self.cutoff, self.same, self.exclude_diagonal = cutoff, same, exclude_diagonal
        self.term_scale, self.term_offset = term_scale, term_offset
        self.n, self.m = self.x.shape[0], self.y.shape[0]
        self.chunks = _chunks(self.n, self.m)

    def similarities(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """s (rows, M) and the mask of dropped pairs, None when all are kept."""
        s, dropped = self.x[rows] @ self.y.T, None
        if self.x_ids is not None:
            dropped = self.x_ids[rows, None] == self.y_ids[None, :]
            dropped = ~dropped if self.same else dropped
        if self.exclude_diagonal:
            index = torch.arange(max(self.n, self.m), device=s.device)
            if self.exclude_diagonal > 1:
                index = index % (self.n // self.exclude_diagonal)
            diagonal = index[rows, None] == index[None, : self.m]
            dropped = diagonal if dropped is None else dropped | diagonal
        if self.cutoff is not None:
            above = s > self.cutoff[rows, None]
            dropped = above if dropped is None else dropped | above
        return s, dropped

    def logits(self, s: Tensor, dropped: Tensor | None, exponent: float = 1.0, bias: bool = True) -> Tensor:
        """exponent * scale * s + bias, -inf where dropped."""
        u = s * self.scale if exponent == 1 else s * (self.scale * exponent)
        if bias and self.bias is not None:
            u = u + self.bias
        return u if dropped is None else u.masked_fill(dropped, -torch.inf)

    def argument(self, rows: slice, base: Tensor) -> Tensor:
        """What the term is a function of."""
        v = base if self.term_scale is None else base * self.term_scale
        return v if self.term_offset is None else v + self.term_offset[rows, None]


def _base(term: str, s: Tensor) -> Tensor:
    """What the argument of the term is linear in: the similarity, or minus the distance of unit rows."""
    return -(2 - 2 * s).clamp(min=LEAST_SQUARE).sqrt() if term == "distance_hinge" else s


def _through_base(term: str, s: Tensor, slope: Tensor) -> Tensor:
    """The slope times the derivative of the base."""
    if term != "distance_hinge":
        return slope
    square = 2 - 2 * s
    return (slope * square.clamp(min=LEAST_SQUARE).rsqrt()).masked_fill(square < LEAST_SQUARE, 0)


def _phi(term: str, constants: Sequence[float], v: Tensor) -> Tensor:
    if term == "identity":
        return v
    if term == "count":
        return torch.ones_like(v)
    if term == "square":
        return v * v
    if term == "band":
        d = (1 - v) / 2
        return ((d - constants[0]) * (constants[1] - d)).clamp(min=0)
    if term == "softplus":
        return torch.logaddexp(v, torch.zeros_like(v))
    if term in ("hinge", "distance_hinge"):
        return v.clamp(min=0)
    if term == "student":
        return (1 + v.clamp(min=0)).pow(-constants[0])
    if term == "gaussian":
        return torch.exp(2 * constants[0] * (v - 1))
    raise ValueError(f"unknown term {term!r}")


def _phi_grad(term: str, constants: Sequence[float], v: Tensor) -> Tensor:
    # The comparisons keep the branch that a NaN takes a NaN: excluded are the values known to be outside.
    if term == "identity":
        return torch.ones_like(v)
    if term == "count":
        return torch.zeros_like(v)
    if term == "square":
        return 2 * v
    if term == "band":
        d = (1 - v) / 2
        return (d - (constants[0] + constants[1]) / 2).masked_fill((d <= constants[0]) | (d >= constants[1]), 0)
    if term == "softplus":
        return torch.sigmoid(v)
    if term in ("hinge", "distance_hinge"):
        return (1 + 0 * v.clamp(max=0)).masked_fill(v <= 0, 0)
    if term == "student":
        return -constants[0] * (1 + v.clamp(min=0)).pow(-constants[0] - 1)
    if term == "gaussian":
        return 2 * constants[0] * torch.exp(2 * constants[0] * (v - 1))
    raise ValueError(f"unknown term {term!r}")


def forward(
    x,
    y,
    scale,
    bias,
    x_ids,
    y_ids,
    cutoff,
    term_scale,
    term_offset,
    exponents,
    columns,
    term,
    constants,
    same,
    exclude_diagonal,
    maximum,
    keep=False,
) -> Statistics:
    """The statistics of `contrastive_kernels.sweep`."""
    scores = _Scores(x, y, scale, bias, x_ids, y_ids, cutoff, term_scale, term_offset, same, exclude_diagonal)
    dtype, n, m = statistic_dtype(x), scores.n, scores.m
    row_lse = x.new_empty((len(exponents), n), dtype=dtype)
    row_sum = x.new_empty((n if term else 0,), dtype=dtype)
    row_max = x.new_empty((n if maximum else 0,), dtype=dtype)
    col_lse = x.new_full((m if columns else 0,), -torch.inf, dtype=dtype)
    col_max = x.new_full((m if columns and maximum else 0,), -torch.inf, dtype=dtype)
    for rows in scores.chunks:
        s, dropped = scores.similarities(rows)
        for q, exponent in enumerate(exponents):
            row_lse[q, rows] = _logsumexp(scores.logits(s, dropped, exponent), 1, dtype)
        if columns:
            logits = scores.logits(s, dropped, bias=False)
            col_lse = torch.logaddexp(col_lse, _logsumexp(logits, 0, dtype))
            col_max = torch.maximum(col_max, logits.amax(0)) if maximum else col_max
        if maximum:
            row_max[rows] = scores.logits(s, dropped).amax(1).to(dtype) if m else -torch.inf
        if term:
            values = _phi(term, constants, scores.argument(rows, _base(term, s)))
            row_sum[rows] = (values if dropped is None else values.masked_fill(dropped, 0)).sum(1, dtype=dtype)
    return Statistics(row_lse, col_lse, row_sum, row_max, col_max, x.new_empty(0, dtype=compute_dtype(x)))


def _split(lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """lse as high + low in `dtype`; +inf for a row without kept pairs, so that every weight exp(u - lse) of it is 0."""
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    high = lse.to(dtype)
    low = (lse.detach() - high.detach().to(lse.dtype)).to(dtype)
    return high, low.masked_fill(high.isinf(), 0)


def backward(
    grad_row_lse, grad_col_lse, grad_row_sum, row_lse, col_lse, x, y, scale, bias, x_ids, y_ids, cutoff, term_scale,
    term_offset, exponents, columns, term, constants, same, exclude_diagonal, needs, scores=None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, y, scale, bias, term_scale and term_offset, and the total; differentiable in its turn."""
    scores = _Scores(x, y, scale, bias, x_ids, y_ids, cutoff, term_scale, term_offset, same, exclude_diagonal)
    dtype, totals_dtype = scores.dtype, statistic_dtype(x)
    needs_x, needs_y, needs_scale, needs_bias, needs_term_scale, needs_term_offset, needs_total = needs
    needs_y = needs_y or (needs_x and y is None)
    grad_row_lse, grad_col_lse, grad_row_sum = (g.to(dtype) for g in (grad_row_lse, grad_col_lse, grad_row_sum))
    row_high, row_low = _split(row_lse, dtype)
    col_high, col_low = _split(col_lse, dtype)

    def chunk(rows: slice) -> tuple[Tensor | None, ...]:
        s, dropped = scores.similarities(rows)
        weight = torch.zeros_like(s)  # dL / d(scale * s)
        d_bias = None
        for q, exponent in enumerate(exponents):
            shifted = scores.logits(s, dropped, exponent) - row_high[q, rows, None] - row_low[q, rows, None]
            part = grad_row_lse[q, rows, None] * shifted.exp()
            weight = weight + (part if exponent == 1 else exponent * part)
            if needs_bias:
                d_bias = part.sum(0) if d_bias is None else d_bias + part.sum(0)
        if columns:
            weight = weight + grad_col_lse * (scores.logits(s, dropped, bias=False) - col_high - col_low).exp()
        grad = weight * scale
        d_scale = (s * weight).sum(dtype=totals_dtype) if needs_scale else None
        d_term_scale = d_term_offset = total = None
        if term:
            base = _base(term, s)
            argument = scores.argument(rows, base)
            slope = grad_row_sum[rows, None] * _phi_grad(term, constants, argument)
            slope = slope if dropped is None else slope.masked_fill(dropped, 0)
            through = _through_base(term, s, slope)
            grad = grad + (through if term_scale is None else through * term_scale)
            d_term_scale = (base * slope).sum(dtype=totals_dtype) if needs_term_scale else None
            d_term_offset = slope.sum(1) if needs_term_offset else None
            if needs_total:
                values = grad_row_sum[rows, None] * _phi(term, constants, argument)
                values = values if dropped is None else values.masked_fill(dropped, 0)
                total = values.sum(dtype=totals_dtype)
        d_x = grad @ scores.y if needs_x else None
        d_y = grad.T @ scores.x[rows] if needs_y else None
        return d_x, d_y, d_scale, d_bias, d_term_scale, d_term_offset, total

    def zeros(*shape: int) -> Tensor:
        return scores.x.new_zeros(shape)

    # Rows of x and term_offset belong to one chunk each; the other gradients are sums over the chunks.
    scalar = zeros().to(totals_dtype)
    of_rows, of_offsets = [zeros(0, x.shape[1])], [zeros(0)]
    of_columns, of_bias = zeros(*scores.y.shape), zeros(scores.m)
    totals = [of_rows, of_columns, scalar, of_bias, scalar.clone(), of_offsets, scalar.clone()]
    for rows in scores.chunks:
        # With a graph to be built, a chunk is recomputed by its own backward: second derivatives in O(N * D) too.
        parts = checkpoint(chunk, rows, use_reentrant=False) if torch.is_grad_enabled() else chunk(rows)
        for k, part in enumerate(parts):
            if part is None:
                continue
            if isinstance(totals[k], list):
                totals[k].append(part)
            elif torch.is_grad_enabled():
                totals[k] = totals[k] + part
            else:
                totals[k] += part
    d_x, d_y, d_scale, d_bias, d_term_scale, d_term_offset, total = (
        torch.cat(total) if isinstance(total, list) else total for total in totals
    )
    if y is None and needs_x:
        d_x, d_y = d_x + d_y, zeros(0)
    grads = (d_x.to(x.dtype), d_y.to(x.dtype), d_scale.to(dtype), d_bias, d_term_scale.to(dtype), d_term_offset, total)
    return tuple(grad if need else grad.new_empty(0) for grad, need in zip(grads, needs, strict=True))


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of unit norm in the dtype of x, and the norms in the compute dtype."""
    wide = x.to(compute_dtype(x))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide / norm.clamp_min(NORM_EPSILON)).to(x.dtype), norm


def unit_rows_backward(grad: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    """The gradient of x."""
    wide, grad = x.to(norm.dtype), grad.to(norm.dtype)
    inverse = norm.clamp_min(NORM_EPSILON).reciprocal().masked_fill(norm < NORM_EPSILON, 0)
    along = torch.linalg.vecdot(grad, wide).unsqueeze(-1) * inverse.pow(3)
    return torch.addcmul(grad * inverse, wide, along, value=-1).to(x.dtype)


def view_minimum(views: Tensor) -> Tensor:
    """(N, 2): the least similar pair j < k of each sample's views, the first in row-major order on a tie."""
    views = views.to(compute_dtype(views))
    first, second = torch.triu_indices(views.shape[1], views.shape[1], 1, device=views.device)
    least = (views @ views.mT)[:, first, second].argmin(1)
    return torch.stack([first[least], second[least]], 1)
