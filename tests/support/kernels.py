"""The sweep as the tests of the Triton kernels call it, and the dense float64 computation that they compare it with."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from contrastive_kernels.engine.backends import triton as backend
from contrastive_kernels.engine.spec import (
    DERIVATIVES,
    DIFFERENTIABLE,
    PLACES,
    Description,
    Gradients,
    Inputs,
    Statistics,
    Upstream,
    Wanted,
    with_places,
)
from tests.support.primitives import kept_by_ids

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETING else "cuda"

# Relative to the largest entry: of the statistics, whose products are exact or float32 whatever the dtype, and of the
# gradients, which are rounded to it.
VALUE_TOLERANCE = 2e-6
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@dataclass(frozen=True)
class Case:
    """What a sweep computes; `inputs` draws its tensors."""

    self_similarity: bool = False
    exponents: tuple[float, ...] = (1.0,)
    column_lse: bool = False
    maximum: bool = False
    ids: bool = False
    keep_equal_ids: bool = False
    diagonals: int = 0
    bias: bool = False
    cutoff: bool = False
    term: str = ""
    constants: tuple[float, ...] = ()
    term_scale: float | None = None
    term_offset: bool = False
    scale: float = 7.0


TERMS = {
    "identity": (), "count": (), "square": (), "band": (0.3, 0.6), "softplus": (), "hinge": (), "distance_hinge": (),
    "student": (2.5,), "gaussian": (1.3,),
}  # fmt: skip
CASES = {
    "rows": Case(),
    "rows-maximum": Case(maximum=True),
    "columns": Case(column_lse=True),
    "columns-alone": Case(column_lse=True, exponents=()),
    "columns-maximum": Case(column_lse=True, maximum=True),
    "columns-ids": Case(column_lse=True, ids=True),
    "columns-ids-cutoff": Case(column_lse=True, ids=True, cutoff=True),
    "columns-negative_scale": Case(column_lse=True, scale=-7.0),
    "columns-zero_scale": Case(column_lse=True, ids=True, scale=0.0),
    "self": Case(self_similarity=True),
    "self-columns": Case(self_similarity=True, column_lse=True),
    "self-ids": Case(self_similarity=True, ids=True),
    "self-same": Case(self_similarity=True, ids=True, keep_equal_ids=True, diagonals=1),
    "self-diagonal": Case(self_similarity=True, diagonals=1),
    "self-views": Case(self_similarity=True, diagonals=2),
    "self-views-cutoff": Case(self_similarity=True, diagonals=3, cutoff=True, maximum=True),
    "self-views-band": Case(
        self_similarity=True, diagonals=4, term="band", constants=(0.3, 0.6), exponents=(2.0, 1.0)
    ),
    "columns-diagonal": Case(column_lse=True, diagonals=1),
    "ids-diagonal": Case(ids=True, diagonals=1),
    "same-columns": Case(ids=True, keep_equal_ids=True, column_lse=True),
    "places": Case(ids=True, diagonals=PLACES, maximum=True),
    "places-same-columns": Case(ids=True, keep_equal_ids=True, diagonals=PLACES, column_lse=True),
    "self-places-band": Case(
        self_similarity=True, ids=True, diagonals=PLACES, term="band", constants=(0.3, 0.6), exponents=()
    ),
    "exponents": Case(exponents=(2.0, 1.0)),
    "self-exponents-ids": Case(self_similarity=True, exponents=(1.5, 0.5), ids=True),
    "bias": Case(bias=True),
    "self-bias": Case(self_similarity=True, bias=True),
    "exponents-bias": Case(exponents=(2.0, 1.0), bias=True),
    "cutoff": Case(cutoff=True),
    "self-cutoff": Case(self_similarity=True, cutoff=True),
    "band-columns": Case(term="band", constants=(0.3, 0.6), column_lse=True),
    "self-band-ids": Case(term="band", constants=(0.3, 0.6), self_similarity=True, ids=True),
    "self-exponents-band": Case(
        term="band", constants=(0.3, 0.6), self_similarity=True, ids=True, exponents=(2.0, 1.0), maximum=True
    ),
    "self-softplus": Case(term="softplus", self_similarity=True, term_scale=3.0, term_offset=True),
    # scales at which some of the hinges are open
    "distance_hinge": Case(
        term="distance_hinge", exponents=(), term_scale=0.3, term_offset=True, diagonals=1
    ),
    "self-distance_hinge-soft": Case(
        term="distance_hinge", self_similarity=True, term_scale=0.3, term_offset=True, diagonals=1
    ),
    "student": Case(term="student", constants=(3.0,), exponents=(), term_scale=-2.0, term_offset=True),
    "self-student-ids": Case(term="student", constants=(0.75,), exponents=(), self_similarity=True, ids=True),
    "everything": Case(
        term="softplus", term_scale=-2.0, term_offset=True, self_similarity=True, exponents=(2.0, 1.0), bias=True,
        cutoff=True, ids=True, keep_equal_ids=True, diagonals=1, maximum=True,
    ),
} | {
    f"{term}-alone": Case(exponents=(), term=term, constants=constants, term_scale=1.5, term_offset=True)
    for term, constants in TERMS.items()
}  # fmt: skip


def inputs(case: Case, n: int, m: int, d: int, dtype: torch.dtype) -> Inputs:
    """Draw what the case needs."""
    n -= n % max(1, case.diagonals)  # whole views
    m = n if case.self_similarity else m
    generator = torch.Generator().manual_seed(n + m + d)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def ids(count):
        if not case.ids:
            return None
        drawn = torch.randint(0, max(2, n // 3), (count,), generator=generator)
        if case.diagonals != PLACES:
            return drawn
        places = torch.randint(0, max(2, m // 3), (count,), generator=generator)
        return with_places(drawn, places.masked_fill(places == 1, 2**32 - 1))

    x, y = (F.normalize(normal(count, d), dim=1).to(dtype) for count in (n, m))
    drawn = (
        x,
        None if case.self_similarity else y,
        torch.tensor(case.scale),
        normal(m) if case.bias else None,
        ids(n),
        None if case.self_similarity else ids(m),
        normal(n).abs() / d**0.5 if case.cutoff else None,
        None if case.term_scale is None else torch.tensor(case.term_scale),
        normal(n) * 0.5 if case.term_offset else None,
    )
    return Inputs(*(None if t is None else t.to(DEVICE) for t in drawn))


# Rows whose inner stride is not 1, that are not aligned, and that are all the same.
LAYOUTS = {
    "columns": lambda x: torch.stack([x, x + 1], 2)[..., 0],
    "rows": lambda x: torch.cat([x, x[:, :1] + 1], 1)[:, :-1],
    "expanded": lambda x: x[:1].expand_as(x),
}


def description(case: Case) -> Description:
    return Description(
        case.exponents, case.column_lse, case.term, case.constants, case.keep_equal_ids, case.diagonals
    )  # fmt: skip


def forward(case: Case, tensors: Inputs, save_scores: bool = False) -> Statistics:
    return backend.run_forward(tensors, description(case), maximum=case.maximum, save_scores=save_scores)


def backward(case: Case, incoming, statistics: Statistics, tensors: Inputs, wanted: Wanted, scores=None) -> Gradients:
    """Return the gradients; `incoming` are those of the first three statistics."""
    upstream = Upstream(*incoming, statistics.row_lse, statistics.col_lse)
    return backend.run_backward(upstream, tensors, description(case), wanted, scores)


def dense(case: Case, x, y, scale, bias, x_ids, y_ids, cutoff, term_scale, term_offset) -> list[torch.Tensor]:
    """Return the five statistics, from the whole matrix in the dtype of the inputs."""
    if y is None:
        y, y_ids = x, x_ids
    s = x @ y.T
    kept = torch.ones_like(s, dtype=torch.bool)
    if case.ids:
        kept = kept_by_ids(description(case), x_ids, y_ids)
    if case.diagonals > 0:
        place = torch.arange(max(s.shape), device=x.device) % (max(s.shape) // case.diagonals)
        kept = kept & (place[: len(x), None] != place[: len(y)])
    if case.cutoff:
        kept = kept & ~(s.detach() > cutoff[:, None])
    biases = 0.0 if bias is None else bias

    def logits(exponent, b):
        return torch.where(kept, exponent * scale * s + b, -torch.inf)

    empty = x.new_empty(0)
    row_lse = [logits(e, biases).logsumexp(1) for e in case.exponents]
    base = -(2 - 2 * s).clamp(min=1e-12).sqrt() if case.term == "distance_hinge" else s
    v = base if term_scale is None else base * term_scale
    v = v if term_offset is None else v + term_offset[:, None]
    return [
        torch.stack(row_lse) if row_lse else x.new_empty(0, len(x)),
        logits(1, 0.0).logsumexp(0) if case.column_lse else empty,
        torch.where(kept, phi(case.term, case.constants, v), 0).sum(1) if case.term else empty,
        logits(1, biases).amax(1) if case.maximum else empty,
        logits(1, 0.0).amax(0) if case.maximum and case.column_lse else empty,
    ]


def phi(term: str, constants, v: torch.Tensor) -> torch.Tensor:
    d = (1 - v) / 2
    return {
        "identity": lambda: v,
        "count": lambda: torch.ones_like(v),
        "square": lambda: v**2,
        "band": lambda: ((d - constants[0]) * (constants[1] - d)).relu(),
        "softplus": lambda: torch.logaddexp(v, torch.zeros_like(v)),
        "hinge": lambda: v.relu(),
        "distance_hinge": lambda: v.relu(),
        "student": lambda: (1 + torch.where(v < 0, v - v.detach(), v)) ** -constants[0],
        "gaussian": lambda: torch.exp(-constants[0] * (2 - 2 * v)),
    }[term]()


def double(tensors: Inputs) -> Inputs:
    return Inputs(*(t.double() if t is not None and t.is_floating_point() else t for t in tensors))


def assert_close(ours: torch.Tensor, exact: torch.Tensor, tolerance: float, magnitude: float = 0.0) -> None:
    assert ours.shape == exact.shape
    if exact.numel():
        torch.testing.assert_close(ours.double().isfinite(), exact.isfinite())
        ours, exact = ours.double().nan_to_num(neginf=0.0), exact.nan_to_num(neginf=0.0)
        assert (ours - exact).abs().max() <= tolerance * max(exact.abs().max(), magnitude)


WANTED_OF_TWO = Wanted(True, True, False, False, False, False)


def alone(case: Case) -> bool:
    """Return whether the backward sweep can return the term's total too."""
    return case.term != "" and not case.exponents and not case.column_lse


def check(case: Case, tensors: Inputs, gradient_scale: float = 1.0, save_scores: bool = False) -> tuple:
    """Compare statistics and all gradients with float64 on the same, rounded inputs; return ours."""
    statistics = forward(case, tensors, save_scores)
    wide = double(tensors)
    leaves = {
        name: wide[k].requires_grad_()
        for name, k in zip(DERIVATIVES, DIFFERENTIABLE, strict=True)
        if wide[k] is not None
    }
    exact = dense(case, *wide)
    x, y = wide.x.detach(), (wide.x if wide.y is None else wide.y).detach()
    largest = max(1.0, float((x @ y.T).abs().max())) if len(x) and len(y) else 1.0
    for ours, other in zip(statistics, exact, strict=False):
        assert ours.dtype == torch.float32
        assert_close(ours, other.detach(), VALUE_TOLERANCE, 1.0)

    incoming = [(torch.randn(t.shape) * gradient_scale).to(DEVICE) for t in exact[:3]]
    objective = sum(0.0 * leaf.sum() for leaf in leaves.values())
    for t, g in zip(exact, incoming, strict=False):
        objective = objective + (torch.where(t.isfinite(), t, 0.0) * g.double()).sum()
    expected = torch.autograd.grad(objective, list(leaves.values()), allow_unused=True, materialize_grads=True)
    wanted = Wanted(*(name in leaves for name in DERIVATIVES), total=alone(case))
    gradients = backward(case, incoming, statistics, tensors, wanted, statistics.scores if save_scores else None)
    assert gradients.total.numel() == alone(case)
    if alone(case):
        assert_close(gradients.total, objective.detach(), VALUE_TOLERANCE, float(incoming[2].abs().sum()))
    for name in DERIVATIVES:
        if name not in leaves:
            assert getattr(gradients, name).numel() == 0
    for name, other in zip(leaves, expected, strict=True):
        ours = getattr(gradients, name)
        wide_result = name not in ("x", "y")
        assert ours.dtype == (torch.float32 if wide_result else tensors.x.dtype)
        # A sum over all pairs may cancel; its error is that of its terms.
        terms = largest * sum(float(g.abs().sum()) for g in incoming)
        magnitude = terms if name in ("scale", "term_scale") else gradient_scale
        assert_close(ours, other, GRADIENT_TOLERANCE[tensors.x.dtype], magnitude if wide_result else 0.0)
    return statistics, incoming, gradients
