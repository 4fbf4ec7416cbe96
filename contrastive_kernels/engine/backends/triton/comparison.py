"""A kernel against the PyTorch backend in float64, on drawn rows, with the options and the layout of a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from contrastive_kernels.engine.backends import torch as plain
from contrastive_kernels.engine.backends.triton import tiles
from contrastive_kernels.engine.spec import (
    PLACES,
    Description,
    Gradients,
    Inputs,
    Statistics,
    Upstream,
    compute_dtype,
    with_places,
)

__all__ = ["PLAIN", "features", "objection", "row_count"]

# Rows that are compared. On a GPU so many that a program walks over several tiles, within a few megabytes; few with a
# cutoff, because the whole matrix is made to find one that no rounding crosses.
ROWS, LEAST_ROWS, ELEMENTS, ROWS_WITH_CUTOFF, ROWS_ELSEWHERE = 4096, 256, 1 << 20, 512, 32
# The second scale raises the flags on which the fast paths hand over to their twins.
SCALES = (8.0, 300.0)
# Among how many programs a gradient kernel shares each walk: more than one is other code, whose choice is by size.
SPLITS = (1, 2)
# Allowed RMS errors: of a similarity, of a saved one, of a statistic and of a gradient, the last two relative; and how
# many times the error of PyTorch in float32. One wrong row of 4,096 is off by 1.5e-2.
OF_SIMILARITY, OF_SAVED_SIMILARITY, OF_STATISTIC, TIMES_PLAIN = 1e-5, 2.0**-15, 1e-5, 8.0
OF_GRADIENT = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 4e-3}
# Of both if the caller allows TF32, whose operands lose 13 bits.
OF_TF32 = 2.0**-9
# The gradients that flow in: so small that float16 holds what thousands of rows send to one column.
UPSTREAM = 2.0**-6

Function = Callable[..., Any]


def features(operator: str, arguments: tuple[Any, ...]) -> Tensor:
    """Return the features among the arguments of an operator."""
    x: Tensor
    if operator == "forward":
        x = arguments[0].x
    elif operator == "backward":
        x = arguments[1].x
    else:
        x = arguments[1 if operator.endswith("_backward") else 0]
    return x


def row_count(x: Tensor) -> int:
    """Return the number of rows."""
    return x.shape[0] if x.dim() == 2 else x.numel() // x.shape[-1]


def _row_dot(x: Tensor, y: Tensor) -> Tensor:
    return (x.to(compute_dtype(x)) * y.to(compute_dtype(x))).sum(-1)


def _row_dot_backward(grad: Tensor, x: Tensor, y: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
    return tuple(
        (grad.unsqueeze(-1) * other.to(grad.dtype)).to(x.dtype) if want else x.new_empty(0)
        for other, want in zip((y, x), wanted, strict=True)
    )


PLAIN: Mapping[str, Function] = {**plain.operators, "row_dot": _row_dot, "row_dot_backward": _row_dot_backward}


def objection(operator: str, function: Function, arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
    """Return what is wrong with the kernel, empty if nothing is: on drawn rows, against the PyTorch backend in float64.

    The rows are drawn, because those of a caller may be all equal, or not finite.
    """
    names, errors = list[str](), list[Tensor]()
    for scale in SCALES if operator in ("forward", "backward") else SCALES[:1]:
        drawn = _drawn(operator, function, arguments, scale)
        found = []
        for splits in SPLITS if operator == "backward" else (None,):
            with tiles.split(splits):
                found.append(_results(operator, drawn, function(*drawn, **options)))
        rough, exact = (
            _results(operator, drawn, PLAIN[operator](*_widened(drawn, dtype), **options))
            for dtype in (torch.float32, torch.float64)
        )
        for name, value in exact.items():
            allowed = TIMES_PLAIN * _rms(rough[name], value) + _floor(operator, name, value, drawn, scale)
            for one in found:
                names.append(name)
                errors.append(torch.stack([_rms(one[name], value), allowed]))
    for name, (error, allowed) in zip(names, torch.stack(errors).tolist(), strict=True):
        if not error <= allowed:
            return f"{name} differs from PyTorch in float64 by {error:.2g} where {allowed:.2g} is allowed"
    return ""


def _rms(found: Tensor, exact: Tensor) -> Tensor:
    """Return the root of the mean square of the difference; equal infinities differ by 0."""
    difference = found.double() - exact
    return torch.where(found == exact, 0.0, difference).square().mean().sqrt()


def _floor(operator: str, name: str, exact: Tensor, drawn: tuple[Any, ...], scale: float) -> Tensor:
    """Return the error that a right kernel may make where PyTorch makes none."""
    size = torch.where(exact.isfinite(), exact, 0.0).square().mean().sqrt()
    x = features(operator, drawn)
    of_tf32 = OF_TF32 if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else 0.0
    if operator == "forward":
        if name == "row_sum":
            return (OF_STATISTIC + of_tf32) * size
        return 0.1 * OF_STATISTIC * size + 2 * (OF_SIMILARITY + of_tf32) * scale
    if operator == "backward":
        if exact.dim() == 0:  # a sum that may cancel: its error is that of its terms
            size = size + sum(grad.abs().sum() for grad in drawn[0][:3])
        of_similarity = of_tf32 + (OF_SIMILARITY if drawn[4] is None else OF_SAVED_SIMILARITY)
        return (OF_GRADIENT[x.dtype] + of_tf32 + 2 * of_similarity * scale) * size
    rounded = OF_STATISTIC if name in ("norm", "row_dot", "least similarity") else OF_GRADIENT[x.dtype]
    return rounded * size + OF_SIMILARITY


def _results(operator: str, drawn: tuple[Any, ...], result: Any) -> dict[str, Tensor]:
    """Return the results of an operator that are compared, by name."""
    if isinstance(result, (Statistics, Gradients)):
        named = {name: value for name, value in result._asdict().items() if name != "scores"}
    elif operator == "views":
        named = {"least similarity": _similarity_of(drawn[0].double(), result)}
    elif operator == "unit_rows":
        named = dict(zip(("unit rows", "norm"), result, strict=True))
    elif isinstance(result, Tensor):
        named = {operator: result}
    else:
        named = {f"{operator}, {name}": value for name, value in zip("xy", result, strict=True)}
    return {name: value for name, value in named.items() if value.numel()}


def _similarity_of(views: Tensor, pairs: Tensor) -> Tensor:
    """Return the similarity of each sample's pair of views, infinite for what is no pair."""
    first, second = pairs.unbind(1)
    valid = (first >= 0) & (first < second) & (second < views.shape[1])
    index = torch.where(valid[:, None], pairs, 0)
    chosen = views.gather(1, index.unsqueeze(-1).expand(-1, -1, views.shape[2]))
    return torch.where(valid, (chosen[:, 0] * chosen[:, 1]).sum(-1), torch.inf)


def _widened(value: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Return arguments in a wider dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (Inputs, Upstream)):
        return type(value)(*(_widened(one, dtype) for one in value))
    return tuple(_widened(one, dtype) for one in value) if type(value) is tuple else value


# What is drawn


def _drawn(operator: str, function: Function, arguments: tuple[Any, ...], scale: float) -> tuple[Any, ...]:
    """Return arguments like those of a call: the same dtypes, D, options and variants, other rows and numbers."""
    draw = _Draw(features(operator, arguments))
    if operator == "forward":
        inputs, what = arguments
        return draw.sweep(inputs, what, scale)
    if operator == "backward":
        _, inputs, what, wanted, scores = arguments
        inputs, what = draw.sweep(inputs, what, scale)
        if scores is not None:
            from contrastive_kernels.engine.backends import triton as backend

            scores = backend.run_forward(inputs, what, maximum=False, save_scores=True).scores
        return draw.upstream(inputs, what), inputs, what, wanted, scores
    if operator == "views":
        views = arguments[0]
        n = draw.count(views.shape[0], views.shape[1])
        return (draw.unit(n * views.shape[1]).to(views.dtype).view(n, *views.shape[1:]),)
    rows = draw.rows(draw.x)
    norm = (0.1 + draw.uniform(len(rows), 1)) * rows.shape[1] ** 0.5
    x = (rows.float() * norm).to(rows.dtype)
    if operator == "unit_rows":
        return (x,)
    if operator == "unit_rows_backward":
        return draw.normal(*x.shape).to(x.dtype), x, plain.unit_rows(x)[1]
    if operator == "row_dot":
        return rows, draw.rows(arguments[1])
    return draw.normal(len(rows)), rows, draw.rows(arguments[2]), arguments[3]


class _Draw:
    """Draws arguments in the place of a call's; touches no global generator."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.d = x, x.shape[-1]
        self.generator = torch.Generator(x.device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.x.device, dtype=torch.float32)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.x.device, dtype=torch.float32)

    def count(self, n: int, multiple: int = 1, most: int = ROWS) -> int:
        """Return a number of rows that is 1, a multiple of 16 or neither, as n is, and a multiple as n is."""
        if n == 1:
            return 1
        most = min(most, max(LEAST_ROWS, ELEMENTS // self.d)) if self.x.is_cuda else ROWS_ELSEWHERE
        return max(1, most // (16 * multiple)) * 16 * multiple + (multiple if n % 16 else 0)

    def unit(self, n: int) -> Tensor:
        """Return n unit rows whose similarities are all over [-1, 1], in float32."""
        noise = torch.nn.functional.normalize(self.normal(n, self.d))
        along = (1.8 * self.uniform(n, 1) - 0.9).expand(-1, self.d) / self.d**0.5
        return torch.nn.functional.normalize(along + (1 - along.square().sum(1, keepdim=True)).sqrt() * noise)

    def rows(self, like: Tensor, multiple: int = 1, most: int = ROWS) -> Tensor:
        """Return unit rows in the dtype and with the alignment of others."""
        n, d = self.count(row_count(like), multiple, most), self.d
        values = self.unit(n).to(like.dtype)
        if like.dim() != 2 or like.stride(1) != 1 or like.stride(0) < d:
            return values
        offset, stride = like.data_ptr() % 16 // like.element_size(), d + (like.stride(0) - d) % 16
        memory = values.new_zeros(offset + n * stride)
        return memory.as_strided((n, d), (stride, 1), offset).copy_(values)

    def sweep(self, inputs: Inputs, what: Description, scale: float) -> tuple[Inputs, Description]:
        most = ROWS if inputs.cutoff is None else ROWS_WITH_CUTOFF
        x = self.rows(inputs.x, max(1, what.diagonals) if inputs.y is None else 1, most)
        y = None if inputs.y is None else self.rows(inputs.y, 1, most)
        n, m = len(x), len(x if y is None else y)
        drawn = Inputs(
            x,
            y,
            inputs.scale.new_full((), scale),
            None if inputs.bias is None else self.normal(m),
            None if inputs.x_ids is None else self.ids(n, m, what),
            None if inputs.y_ids is None else self.ids(m, n, what),
            None if inputs.cutoff is None else _between(x, x if y is None else y),
            None if inputs.term_scale is None else inputs.term_scale.new_full((), 1.5),
            None if inputs.term_offset is None else 0.5 * self.normal(n),
        )
        exponents = (1.5, 0.5) if len(what.exponents) == 2 else (1.0,) * len(what.exponents)
        return drawn, what._replace(exponents=exponents)

    def ids(self, n: int, others: int, what: Description) -> Tensor:
        def drawn(most: int) -> Tensor:
            return torch.randint(most, (n,), generator=self.generator, device=self.x.device)

        ids, places = drawn(max(2, max(n, others) // 8)), what.diagonals == PLACES
        return with_places(ids, drawn(n)) if places else ids

    def upstream(self, inputs: Inputs, what: Description) -> Upstream:
        """Return positive gradients, whose sums do not cancel, of the statistics that belong to the inputs."""
        statistics = plain.forward(_widened(inputs), what, maximum=False, save_scores=False)
        of_rows, of_columns, of_sums = (UPSTREAM * (0.5 + self.uniform(*values.shape)) for values in statistics[:3])
        return Upstream(of_rows, of_columns, of_sums, statistics.row_lse.float(), statistics.col_lse.float())


def _between(x: Tensor, y: Tensor) -> Tensor:
    """Return a cutoff for each row, in the widest gap among the middle half of its similarities."""
    ordered = (x.double() @ y.double().T).sort(1).values
    if len(y) < 4:
        return ordered[:, -1].float() + 1
    middle = ordered[:, len(y) // 4 : -(len(y) // 4)]
    widest = middle.diff().argmax(1, keepdim=True)
    return (0.5 * (middle.gather(1, widest) + middle.gather(1, widest + 1))).squeeze(1).float()
