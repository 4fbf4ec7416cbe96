"""The Triton kernels against dense float64: in the interpreter where TRITON_INTERPRET=1, on the GPU where there is one.

`test_triton_processes.py` starts the former in a process of its own: the variable counts when the kernels are imported.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from contrastive_kernels.backends import triton as backend

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETING else "cuda"
pytestmark = [
    pytest.mark.interpret if INTERPRETING else pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETING and not torch.cuda.is_available(), reason="no TRITON_INTERPRET=1 and no GPU"),
    # numpy's, for what the interpreter does with infinities and one-element arrays
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning"),
]

# Relative to the largest entry: of the statistics, whose products are exact or float32 whatever the dtype, and of the
# gradients, which are rounded to it.
VALUE_TOLERANCE = 2e-6
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

# (N, M, D, dtype). The interpreter's tiles are 32 x 32: two ragged ones each way; D = 300 takes `chunk`, in two steps.
GRIDS = [(37, 53, 24, torch.float32), (33, 45, 300, torch.float16)]
if not INTERPRETING:
    # D of one register tile with all of it used, of the largest one, and of the chunks
    GRIDS += [(260, 131, 128, torch.bfloat16), (130, 300, 256, torch.bfloat16), (129, 257, 520, torch.bfloat16)]


@pytest.fixture
def specialized(monkeypatch):
    """A table that prefers specialized tiles; a list of those that are launched, several times each."""
    from contrastive_kernels.backends.triton import grad, launch, tiles

    seen = []
    rows = [row for row in tiles.TABLE if row.kernel == "grad" and not row.heavy and row.takes_descriptors(128)]
    monkeypatch.setattr(tiles, "TABLE", tiles.TABLE + tuple(row.specialize() for row in rows))
    monkeypatch.setattr(grad, "blocks_of", lambda v, tile: seen.append(tile) or launch.blocks_of(v, tile))
    tiles.find.cache_clear()
    yield seen
    tiles.find.cache_clear()


@pytest.fixture(autouse=True)
def poison():
    """Uninitialised floating memory is filled with NaN; only warned of are the library's GEMMs."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case:
    """What a sweep computes; the inputs it needs are drawn for it."""

    self_similarity: bool = False
    exponents: tuple[float, ...] = (1.0,)
    columns: bool = False
    maximum: bool = False
    ids: bool = False
    same: bool = False
    exclude_diagonal: int = 0
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
    "columns": Case(columns=True),
    "columns-alone": Case(columns=True, exponents=()),
    "columns-maximum": Case(columns=True, maximum=True),
    "columns-ids": Case(columns=True, ids=True),
    "columns-ids-cutoff": Case(columns=True, ids=True, cutoff=True),
    "columns-negative_scale": Case(columns=True, scale=-7.0),
    "columns-zero_scale": Case(columns=True, ids=True, scale=0.0),
    "self": Case(self_similarity=True),
    "self-columns": Case(self_similarity=True, columns=True),
    "self-ids": Case(self_similarity=True, ids=True),
    "self-same": Case(self_similarity=True, ids=True, same=True, exclude_diagonal=1),
    "self-diagonal": Case(self_similarity=True, exclude_diagonal=1),
    "self-views": Case(self_similarity=True, exclude_diagonal=2),
    "self-views-cutoff": Case(self_similarity=True, exclude_diagonal=3, cutoff=True, maximum=True),
    "self-views-band": Case(
        self_similarity=True, exclude_diagonal=4, term="band", constants=(0.3, 0.6), exponents=(2.0, 1.0)
    ),
    "columns-diagonal": Case(columns=True, exclude_diagonal=1),
    "ids-diagonal": Case(ids=True, exclude_diagonal=1),
    "same-columns": Case(ids=True, same=True, columns=True),
    "exponents": Case(exponents=(2.0, 1.0)),
    "self-exponents-ids": Case(self_similarity=True, exponents=(1.5, 0.5), ids=True),
    "bias": Case(bias=True),
    "self-bias": Case(self_similarity=True, bias=True),
    "exponents-bias": Case(exponents=(2.0, 1.0), bias=True),
    "cutoff": Case(cutoff=True),
    "self-cutoff": Case(self_similarity=True, cutoff=True),
    "band-columns": Case(term="band", constants=(0.3, 0.6), columns=True),
    "self-band-ids": Case(term="band", constants=(0.3, 0.6), self_similarity=True, ids=True),
    "self-exponents-band": Case(
        term="band", constants=(0.3, 0.6), self_similarity=True, ids=True, exponents=(2.0, 1.0), maximum=True
    ),
    "self-softplus": Case(term="softplus", self_similarity=True, term_scale=3.0, term_offset=True),
    # scales at which some of the hinges are open
    "distance_hinge": Case(
        term="distance_hinge", exponents=(), term_scale=0.3, term_offset=True, exclude_diagonal=1
    ),
    "self-distance_hinge-soft": Case(
        term="distance_hinge", self_similarity=True, term_scale=0.3, term_offset=True, exclude_diagonal=1
    ),
    "student": Case(term="student", constants=(3.0,), exponents=(), term_scale=-2.0, term_offset=True),
    "self-student-ids": Case(term="student", constants=(0.75,), exponents=(), self_similarity=True, ids=True),
    "everything": Case(
        term="softplus", term_scale=-2.0, term_offset=True, self_similarity=True, exponents=(2.0, 1.0), bias=True,
        cutoff=True, ids=True, same=True, exclude_diagonal=1, maximum=True,
    ),
} | {
    f"{term}-alone": Case(exponents=(), term=term, constants=constants, term_scale=1.5, term_offset=True)
    for term, constants in TERMS.items()
}  # fmt: skip


def inputs(case: Case, n: int, m: int, d: int, dtype: torch.dtype) -> tuple:
    """x, y, scale, bias, x_ids, y_ids, cutoff, term_scale, term_offset."""
    n -= n % max(1, case.exclude_diagonal)  # whole views
    m = n if case.self_similarity else m
    generator = torch.Generator().manual_seed(n + m + d)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def ids(count):
        return torch.randint(0, max(2, n // 3), (count,), generator=generator) if case.ids else None

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
    return tuple(None if t is None else t.to(DEVICE) for t in drawn)


def description(case: Case) -> tuple:
    return list(case.exponents), case.columns, case.term, list(case.constants), case.same, case.exclude_diagonal


def dense(case: Case, x, y, scale, bias, x_ids, y_ids, cutoff, term_scale, term_offset) -> list[torch.Tensor]:
    """The five statistics, from the whole matrix in the dtype of the inputs."""
    if y is None:
        y, y_ids = x, x_ids
    s = x @ y.T
    kept = torch.ones_like(s, dtype=torch.bool)
    if case.ids:
        equal = x_ids[:, None] == y_ids[None, :]
        kept = equal if case.same else ~equal
    if case.exclude_diagonal:
        place = torch.arange(max(s.shape), device=x.device) % (max(s.shape) // case.exclude_diagonal)
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
        logits(1, 0.0).logsumexp(0) if case.columns else empty,
        torch.where(kept, phi(case.term, case.constants, v), 0).sum(1) if case.term else empty,
        logits(1, biases).amax(1) if case.maximum else empty,
        logits(1, 0.0).amax(0) if case.maximum and case.columns else empty,
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


def double(tensors) -> list:
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def assert_close(ours: torch.Tensor, exact: torch.Tensor, tolerance: float, magnitude: float = 0.0) -> None:
    assert ours.shape == exact.shape
    if exact.numel():
        torch.testing.assert_close(ours.double().isfinite(), exact.isfinite())
        ours, exact = ours.double().nan_to_num(neginf=0.0), exact.nan_to_num(neginf=0.0)
        assert (ours - exact).abs().max() <= tolerance * max(exact.abs().max(), magnitude)


NEEDS = ("x", "y", "scale", "bias", "term_scale", "term_offset")
POSITIONS = (0, 1, 2, 3, 7, 8)  # of these among the inputs


def alone(case: Case) -> bool:
    """Whether the backward sweep can return the term's total too."""
    return case.term != "" and not case.exponents and not case.columns


def check(case: Case, tensors: tuple, gradient_scale: float = 1.0, keep: bool = False) -> tuple:
    """Statistics and all gradients against float64 on the same, rounded inputs; returns ours."""
    statistics = backend.forward(*tensors, *description(case), case.maximum, keep)
    wide = double(tensors)
    leaves = {name: wide[k].requires_grad_() for name, k in zip(NEEDS, POSITIONS, strict=True) if wide[k] is not None}
    exact = dense(case, *wide)
    x, y = wide[0].detach(), (wide[0] if wide[1] is None else wide[1]).detach()
    largest = max(1.0, float((x @ y.T).abs().max())) if len(x) and len(y) else 1.0
    for ours, other in zip(statistics, exact, strict=False):
        assert ours.dtype == torch.float32
        assert_close(ours, other.detach(), VALUE_TOLERANCE, 1.0)

    incoming = [(torch.randn(t.shape) * gradient_scale).to(DEVICE) for t in exact[:3]]
    objective = sum(0.0 * leaf.sum() for leaf in leaves.values())
    for t, g in zip(exact, incoming, strict=False):
        objective = objective + (torch.where(t.isfinite(), t, 0.0) * g.double()).sum()
    wanted = torch.autograd.grad(objective, list(leaves.values()), allow_unused=True, materialize_grads=True)
    needs = [*(name in leaves for name in NEEDS), alone(case)]
    *gradients, total = backend.backward(
        *incoming, *statistics[:2], *tensors, *description(case), needs, statistics[5] if keep else None
    )
    assert total.numel() == alone(case)
    if alone(case):
        assert_close(total, objective.detach(), VALUE_TOLERANCE, float(incoming[2].abs().sum()))
    for name, ours in zip(NEEDS, gradients, strict=True):
        if name not in leaves:
            assert ours.numel() == 0
    for name, other in zip(leaves, wanted, strict=True):
        ours = gradients[NEEDS.index(name)]
        wide_result = name not in ("x", "y")
        assert ours.dtype == (torch.float32 if wide_result else tensors[0].dtype)
        # A sum over all pairs may cancel; its error is that of its terms.
        terms = largest * sum(float(g.abs().sum()) for g in incoming)
        magnitude = terms if name in ("scale", "term_scale") else gradient_scale
        assert_close(ours, other, GRADIENT_TOLERANCE[tensors[0].dtype], magnitude if wide_result else 0.0)
    return statistics, incoming, (*gradients, total)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"N{g[0]}-M{g[1]}-D{g[2]}-{str(g[3])[6:]}")
@pytest.mark.parametrize("name", CASES)
def test_sweep(name, grid):
    check(CASES[name], inputs(CASES[name], *grid))


@pytest.mark.parametrize("grid", GRIDS[1:], ids=lambda g: f"N{g[0]}-M{g[1]}-D{g[2]}-{str(g[3])[6:]}")
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.exponents or case.columns])
def test_sweep_with_saved_scores(name, grid):
    """A backward that reads the similarities and makes none."""
    check(CASES[name], inputs(CASES[name], *grid), keep=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("self_similarity", [False, True])
def test_saved_scores(self_similarity, dtype):
    """Within 2^-16 of the product of the norms, whatever norms other rows have; float32 as they are."""
    case = Case(self_similarity=self_similarity)
    x, y, *rest = inputs(case, 40, 70, 300, dtype)
    x[3], x[7] = 0, 100 * x[7]
    scores = backend.forward(x, y, *rest, *description(case), False, True)[-1]
    exact = x.double() @ (x if y is None else y).double().T
    norms = x.double().norm(dim=1)[:, None] * (x if y is None else y).double().norm(dim=1)
    if dtype == torch.float32:
        torch.testing.assert_close(scores.double(), exact, rtol=0, atol=1e-3)
    else:
        assert scores.dtype == torch.int16
        assert ((scores.double() / 32700 * norms - exact).abs() <= 0.501 / 32700 * norms + 1e-12).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_saved_scores_of_a_row_that_is_not_finite(value):
    case = Case(columns=True)
    tensors = inputs(case, 20, 35, 300, torch.float16)
    tensors[0][3, 5] = value
    *statistics, scores = backend.forward(*tensors, *description(case), False, True)
    incoming = [torch.ones_like(t) for t in statistics[:3]]
    needs = [True, True, False, False, False, False, False]
    d_x, d_y, *_ = backend.backward(*incoming, *statistics[:2], *tensors, *description(case), needs, scores)
    assert d_x[3].isnan().all()
    assert d_y.isnan().any(1).all()


SPECIALIZABLE = (
    "rows", "columns", "columns-alone", "columns-ids", "columns-negative_scale", "columns-zero_scale", "self",
    "self-columns", "self-ids", "self-same", "self-views", "self-diagonal", "columns-diagonal", "ids-diagonal",
    "same-columns", "softplus-alone",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "n", "m", "d"),
    [(name, 256, 128, 128) for name in SPECIALIZABLE]
    + [("columns", 200, 256, 64), ("columns", 128, 384, 96), ("self-views", 256, 256, 64)],
)
def test_sweep_specialized(name, n, m, d, specialized):
    """Loops over whole tiles with everything from descriptors; the owner may be ragged, and then has its own turn."""
    case = CASES[name]
    dtype = (torch.float32 if d == 64 else torch.float16) if INTERPRETING else torch.bfloat16
    check(case, inputs(case, n, m, d, dtype))
    assert specialized


@pytest.mark.parametrize(
    ("name", "n", "m", "d"),
    [("columns", 130, 127, 64), ("self", 130, 130, 64), ("columns", 128, 128, 20), ("columns", 128, 128, 256),
     ("bias", 130, 128, 64), ("cutoff", 130, 128, 64), ("exponents", 130, 128, 64)],
)  # fmt: skip
def test_sweep_not_specialized(name, n, m, d, specialized):
    """Ragged loops, rows that no descriptor takes, large D and heavy epilogues take the usual tile."""
    dtype = torch.float16 if INTERPRETING else torch.bfloat16
    check(CASES[name], inputs(CASES[name], n, m, d, dtype))
    assert not specialized


# One of everything; below, at and above a tile edge; a D of less than a dot's depth, odd, and of several depth steps.
@pytest.mark.parametrize("shape", [(1, 1, 1), (31, 33, 3), (64, 32, 17), (2, 65, 520)], ids=str)
@pytest.mark.parametrize("name", ["columns", "self-ids", "exponents-bias"])
def test_sweep_ragged(name, shape):
    check(CASES[name], inputs(CASES[name], *shape, torch.float32))


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
def test_sweep_empty(n, m):
    case = Case(columns=True, maximum=True, term="square")
    tensors = inputs(case, n, m, 8, torch.float32)
    statistics = backend.forward(*tensors, *description(case), True)
    for statistic, value in zip(statistics, (-torch.inf, -torch.inf, 0.0, -torch.inf, -torch.inf), strict=False):
        assert (statistic == value).all()
    needs = [True, True, True, False, False, False, False]
    d_x, d_y, d_scale, *_ = backend.backward(
        *map(torch.ones_like, statistics[:3]), *statistics[:2], *tensors, *description(case), needs
    )
    assert d_x.shape == tensors[0].shape
    assert d_y.shape == tensors[1].shape
    assert not d_x.any()
    assert not d_y.any()
    assert d_scale == 0


@pytest.mark.parametrize("d", [24, 300])
def test_sweep_needs(d):
    """Any single gradient is that of the call for all of them."""
    for case in (CASES["exponents-bias"], CASES["self-softplus"]):
        tensors = inputs(case, 20, 35, d, torch.float32)
        statistics, incoming, gradients = check(case, tensors)
        for k, expected in enumerate(gradients):
            if expected.numel():
                needs = [j == k for j in range(len(NEEDS) + 1)]
                alone = backend.backward(*incoming, *statistics[:2], *tensors, *description(case), needs)
                assert [g.numel() > 0 for g in alone] == needs
                torch.testing.assert_close(alone[k], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["columns-ids", "self-ids", "exponents", "self-band-ids"])
@pytest.mark.parametrize("d", [24, 300])
def test_sweep_all_excluded(name, d):
    case = CASES[name]
    tensors = list(inputs(case, 20, 35, d, torch.float32))
    tensors[4] = torch.zeros(20, dtype=torch.int64, device=DEVICE)
    tensors[5] = None if case.self_similarity else torch.zeros(35, dtype=torch.int64, device=DEVICE)
    case = Case(**{**case.__dict__, "ids": True})
    statistics, _, gradients = check(case, tuple(tensors))
    assert (statistics[0] == -torch.inf).all()
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("term", ["", *TERMS])
@pytest.mark.parametrize("cutoff", [False, True])
def test_sweep_nan_row(term, cutoff):
    """A row with NaN has NaN statistics, whatever the term; other rows do not notice; columns all do."""
    columns = not term and not cutoff
    case = Case(term=term, constants=TERMS.get(term, ()), cutoff=cutoff, columns=columns, maximum=not columns)
    tensors = inputs(case, 20, 35, 24, torch.float32)
    clean = backend.forward(*tensors, *description(case), case.maximum)
    tensors[0][3, 5] = torch.nan
    statistics = backend.forward(*tensors, *description(case), case.maximum)
    others = torch.arange(20, device=DEVICE) != 3
    for k in (0, 2, 3):
        if statistics[k].numel():
            assert statistics[k][..., 3].isnan().all() or (k == 2 and term == "count")
            torch.testing.assert_close(statistics[k][..., others], clean[k][..., others])
    assert statistics[1].isnan().all()
    incoming = [torch.ones_like(t) for t in statistics[:3]]
    needs = [True, True, False, False, False, False, False]
    d_x, d_y, *_ = backend.backward(*incoming, *statistics[:2], *tensors, *description(case), needs)
    assert d_y.isnan().any(1).all()
    assert d_x[3].isnan().any()


def test_sweep_nan_dropped():
    """A NaN pair that is dropped contributes nothing."""
    case = Case(self_similarity=True, ids=True, term="square", maximum=True)
    x, *rest = inputs(case, 40, 40, 24, torch.float32)
    rest[3] = torch.arange(40, device=DEVICE)
    x[7] = torch.nan
    rest[3][7] = rest[3][11]
    statistics = backend.forward(x, *rest, *description(case), True)
    assert not statistics[0][0, 11].isnan()
    assert not statistics[2][11].isnan()
    assert not statistics[3][11].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("cosine", [-1.0, -0.5, 1.0])
@pytest.mark.parametrize("self_similarity", [False, True])
def test_sweep_cold(cosine, self_similarity, dtype):
    """Scale 100, all pairs of about the same cosine: logits of -100 underflow the fixed shift, the flag must go up."""
    case = Case(columns=not self_similarity, self_similarity=self_similarity, scale=100.0)
    tensors = list(inputs(case, 37, 53, 24, torch.float32))
    axis = torch.eye(24, device=DEVICE)
    if self_similarity:
        tensors[0] = F.normalize(axis[0] + 0.02 * tensors[0], dim=1)
        tensors[2] = tensors[2] * cosine
    else:
        tensors[0] = F.normalize(axis[0] + 0.02 * tensors[0], dim=1)
        tensors[1] = F.normalize(cosine * axis[0] + (1 - cosine**2) ** 0.5 * axis[1] + 0.02 * tensors[1], dim=1)
    tensors[:2] = [None if t is None else t.to(dtype) for t in tensors[:2]]
    check(case, tuple(tensors))


@pytest.mark.parametrize("d", [24, 300])
def test_sweep_small_gradients(d):
    """float16: weights of 1e-8 would be flushed without their power of two."""
    for name in ("columns", "self-exponents-band", "square-alone"):
        *_, gradients = check(CASES[name], inputs(CASES[name], 20, 53, d, torch.float16), 1e-3)
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("d", [24, 300])
@pytest.mark.parametrize("name", ["columns", "self-ids", "self-softplus"])
def test_sweep_bitwise(name, d):
    """Twice the same, also after another size."""
    tensors = inputs(CASES[name], 40, 45, d, torch.float32)
    statistics, incoming, gradients = check(CASES[name], tensors)
    backend.forward(*inputs(CASES[name], 5, 6, d, torch.float32), *description(CASES[name]), False)
    again = backend.forward(*tensors, *description(CASES[name]), False)
    needs = [g.numel() > 0 for g in gradients]
    again += backend.backward(*incoming, *again[:2], *tensors, *description(CASES[name]), needs)
    assert all(torch.equal(a, b) for a, b in zip(again, (*statistics, *gradients), strict=True))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", ["columns", "self-ids", "self-softplus", "self-same", "self-student-ids", "self-bias"])
def test_sweep_small_workspace(name, keep, monkeypatch):
    """Partial sums and weights in several portions, the last one ragged."""
    from contrastive_kernels.backends.triton import chunk, sums, tiles

    n = 69 if INTERPRETING else 261
    monkeypatch.setattr(sums, "workspace_limit", lambda: 4 * n)
    monkeypatch.setattr(chunk, "workspace_limit", lambda: 1)
    monkeypatch.setattr(tiles, "ALIGNMENT", 32 if INTERPRETING else tiles.ALIGNMENT)
    check(CASES[name], inputs(CASES[name], n, 40, 257, torch.float32), keep=keep)


@pytest.mark.parametrize("name", ["columns", "columns-ids-cutoff", "self-ids", "self-exponents-ids", "band-columns"])
@pytest.mark.parametrize("spread", [10, 170, 400], ids=lambda spread: f"spread{spread}")
@pytest.mark.parametrize("n", [45, 128])
def test_sweep_centered(name, spread, n, request):
    """Log-sum-exps up to `spread` binades apart: one exponential for two of them, or where that will not do, two."""
    from contrastive_kernels.backends.triton import launch

    if n == 128:
        request.getfixturevalue("specialized")
    case = Case(**{**CASES[name].__dict__, "scale": 1.0})
    # on a GPU float32 has no gradient in registers; in the interpreter it has not the digits for more rows
    dtype = (torch.float32 if n == 45 else torch.float16) if INTERPRETING else torch.bfloat16
    x, y, *rest = inputs(case, n, n, 24, dtype)
    # all similarities of a row about equal, from -spread / 2 to spread / 2 in base 2; of x with itself from 0 on
    height = (
        spread
        / max(case.exponents)
        * math.log(2)
        * (torch.linspace(0, 1, n) if y is None else torch.linspace(-0.5, 0.5, n)).to(DEVICE)
    )
    x, y = (z if z is None else 0.1 * z for z in (x, y))
    x[:, 0], x[:, 1:3] = (height.sqrt(), 0) if y is None else (height, 0)
    if y is not None:
        y[:, 0] = 1
    if case.cutoff:
        rest[4] = torch.full_like(rest[4], 1e3)
    tensors = (x, y, *rest)
    statistics, *_ = check(case, tensors)
    sweep = launch.Sweep.of(*tensors, *description(case))
    *_, flag = launch.center_bwd(sweep, statistics[0], statistics[1]).tolist()
    assert bool(flag) == (spread == 400)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_sweep_center_of_what_is_no_number(value):
    """A log-sum-exp that is not finite, other than that of no pair, is left to the program that takes everything."""
    from contrastive_kernels.backends.triton import launch

    sweep = launch.Sweep.of(*inputs(CASES["columns"], 5, 7, 8, torch.float32), *description(CASES["columns"]))
    row_lse, col_lse = torch.zeros(1, 5, device=DEVICE), torch.zeros(7, device=DEVICE)
    row_lse[0, 3] = -math.inf
    center = launch.center_bwd(sweep, row_lse, col_lse)
    assert (center[0], center[2]) == (-100, 0)
    col_lse[6] = value
    assert launch.center_bwd(sweep, row_lse, col_lse)[2] == 1


@pytest.mark.parametrize(
    ("most", "d", "rows"),
    [(4096, 768, 2816), (4096, 1024, 4096), (4096, 512, 4096), (100, 512, 256), (0, 512, 256), (700, 4096, 512)],
)
def test_chunk_rows(most, d, rows):
    """On 132 processors: 22 x 6 tiles are one for each; more rows than the limit only where it is below one unit."""
    from contrastive_kernels.backends.triton import chunk

    assert chunk.chunk_rows(most, d, 132) == rows


@pytest.mark.parametrize("name", ["columns", "self-ids", "softplus-alone", "band-columns"])
@pytest.mark.parametrize("d", [24, 300])
def test_autotune(name, d, monkeypatch, capsys):
    """The tile that the stopwatch likes best is used, printed as a row of the table, and computes the same."""
    from contrastive_kernels.backends.triton import tiles, tune

    asked = []

    def milliseconds(tile, launch):
        asked.append(tile)
        launch(tile)
        return abs(tile.rows - 16) + abs(tile.columns - 64) + tile.stages

    monkeypatch.setattr(tune, "milliseconds", milliseconds)
    monkeypatch.setattr(tune, "_fastest", {})
    # in the interpreter these say nothing, and compiling them all on a GPU takes long
    monkeypatch.setattr(tune, "TRIALS", 12)
    check(CASES[name], inputs(CASES[name], 37, 53, d, torch.float32))
    assert not asked
    monkeypatch.setenv(tune.ENVIRONMENT_VARIABLE, "1")
    check(CASES[name], inputs(CASES[name], 37, 53, d, torch.float32))
    lines = capsys.readouterr().err.splitlines()
    found = [eval(line.strip().rstrip(","), {"Tile": tiles.Tile}) for line in lines if "Tile(" in line]
    assert {row.kernel for row in found} == {tile.kernel for tile in asked}
    for row in found:
        own = {tile for tile in asked if (tile.kernel, tile.heavy) == (row.kernel, row.heavy)}
        assert milliseconds(row, lambda tile: None) == min(milliseconds(tile, lambda tile: None) for tile in own)
    seen = len(asked)
    check(CASES[name], inputs(CASES[name], 40, 53, d, torch.float32))
    assert len(asked) == seen, "every tile is timed once"


@pytest.mark.parametrize(("n", "found"), [(128, True), (130, False)])
def test_autotune_specializes(n, found, monkeypatch, capsys):
    """Where a loop can be specialized, that is tried too; what is found computes the same."""
    from contrastive_kernels.backends.triton import tune

    monkeypatch.setattr(tune, "milliseconds", lambda tile, launch: launch(tile) or 2.0 - tile.specialized)
    monkeypatch.setattr(tune, "_fastest", {})
    monkeypatch.setattr(tune, "TRIALS", 6)
    monkeypatch.setenv(tune.ENVIRONMENT_VARIABLE, "1")
    check(CASES["columns"], inputs(CASES["columns"], n, n, 64, torch.float16 if INTERPRETING else torch.bfloat16))
    rows = [line for line in capsys.readouterr().err.splitlines() if "Tile('grad'" in line]
    assert rows
    assert all(row.endswith(f"{found}),") for row in rows)


def test_autotune_survives_what_does_not_compile():
    from contrastive_kernels.backends.triton import tiles, tune

    def launch(tile):
        raise RuntimeError("out of resource: shared memory")

    assert tune.milliseconds(tiles.TABLE[0], launch) == math.inf


@pytest.mark.parametrize("layout", ["columns", "rows", "expanded"])
def test_sweep_strided(layout):
    case = CASES["columns"]
    x, y, *rest = inputs(case, 37, 53, 24, torch.float32)
    x = {
        "columns": lambda: torch.stack([x, x + 1], 2)[..., 0],
        "rows": lambda: torch.cat([x, x + 1], 1)[:, :24],
        "expanded": lambda: x[:1].expand(37, 24),
    }[layout]()
    check(case, (x, y, *rest))


def test_exponents_refused():
    case = Case(exponents=(3.0, 2.0, 1.0))
    with pytest.raises(NotImplementedError, match="at most two exponents"):
        backend.forward(*inputs(case, 4, 5, 8, torch.float32), *description(case), False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETING), ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 1), (33, 4, 24), (40, 3, 100)], ids=str)
def test_view_minimum(shape, dtype):
    n, v, d = shape
    views = torch.randint(-3, 4, (n + 1, d + 1, v)).mT[1:, :, 1:].to(dtype).to(DEVICE)  # integers: products are exact
    views[n // 2, 0] = views[n // 2, 1]  # ties
    if n > 2:
        views[2, -1, 0] = torch.nan
    pairs = torch.tensor([(j, k) for j in range(v) for k in range(j + 1, v)], device=DEVICE)
    s = (views.double() @ views.double().mT)[:, pairs[:, 0], pairs[:, 1]]
    assert torch.equal(backend.view_minimum(views), pairs[s.argmin(1)])
