"""The C++ operators against a dense float64 computation on the same, already rounded, inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn.functional import normalize, softplus

from contrastive_kernels.engine import spec, terms
from contrastive_kernels.engine.backends import cpp
from tests.support.primitives import kept_by_ids
from tests.support.testing import thread_count

pytestmark = [
    pytest.mark.skipif(cpp.missing is not None, reason=str(cpp.missing)),
    pytest.mark.usefixtures("poison"),
]

ops = torch.ops.contrastive_kernels

# Relative to the largest value of the reference. A gradient in half precision is a product of rounded factors.
VALUE_TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6}
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

TERMS = {
    "identity": ((), lambda v: v),
    "count": ((), lambda v: 1 + 0 * v),
    "square": ((), torch.square),
    "band": ((0.1, 0.5), lambda v: (((1 - v) / 2 - 0.1) * (0.5 - (1 - v) / 2)).clamp(min=0)),
    "softplus": ((), softplus),
    "hinge": ((), torch.relu),
    "distance_hinge": ((), torch.relu),
    # below 0 the value of 0 with its slope
    "student": ((2.5,), lambda v: (1 + torch.where(v < 0, v - v.detach(), v)) ** -2.5),
    "gaussian": ((2.0,), lambda v: torch.exp(4 * (v - 1))),
}


@dataclass(frozen=True)
class Case:
    """A sweep: its shape (m = 0: x against itself) and everything that can be switched on."""

    n: int = 130
    m: int = 70
    d: int = 24
    exponents: tuple[float, ...] = (1.0,)
    column_lse: bool = False
    maximum: bool = False
    ids: int = 0  # how many different ones
    keep_equal_ids: bool = False
    diagonals: int = 0
    bias: bool = False
    cutoff: bool = False
    term: str = ""
    term_operands: bool = False
    temperature: float = 0.1

    def __str__(self) -> str:
        shape = f"N{self.n}-M{self.m or 'self'}-D{self.d}"
        exponents = "q" + "_".join(map(str, self.exponents))
        names = ("column_lse", "maximum", "keep_equal_ids", "diagonals", "bias", "cutoff", "term_operands")
        switches = [name for name in names if getattr(self, name)]
        return "-".join([shape, exponents, f"ids{self.ids}", *switches, f"tau{self.temperature}", self.term])

    def inputs(self, dtype: torch.dtype) -> spec.Inputs:
        torch.manual_seed(0)
        compute = spec.compute_dtype(torch.empty(0, dtype=dtype))
        m = self.m or self.n

        def unit(rows: int) -> torch.Tensor:
            return normalize(torch.randn(rows, self.d, dtype=torch.float64), dim=1).to(dtype)

        def ids(rows: int, nowhere: bool = False) -> torch.Tensor:
            drawn, places = torch.randint(max(self.ids, 1), (rows,)), torch.arange(rows) // 2
            places[drawn == 0] = 2**32 - 1 if nowhere else 0  # of one class no column has the rows' place
            return spec.with_places(drawn, places) if self.diagonals == spec.PLACES else drawn

        def when(condition: bool, tensor: torch.Tensor) -> torch.Tensor | None:
            return (tensor.to(compute) if tensor.is_floating_point() else tensor) if condition else None

        return spec.Inputs(
            unit(self.n),
            unit(m) if self.m else None,
            torch.tensor(1 / self.temperature, dtype=compute),
            when(self.bias, torch.randn(m)),
            when(self.ids > 0, ids(self.n, self.m > 0)),
            when(self.ids > 0 and self.m > 0, ids(m)),
            when(self.cutoff, 0.3 * torch.rand(self.n)),
            when(self.term_operands, torch.tensor(1.7)),
            when(self.term_operands, torch.randn(self.n)),
        )

    def description(self) -> spec.Description:
        constants = TERMS[self.term][0] if self.term else ()
        return spec.Description(
            self.exponents, self.column_lse, self.term, constants, self.keep_equal_ids, self.diagonals
        )


# A plain log-sum-exp of the rows.
PLAIN = spec.Description((1.0,), column_lse=False, term="", constants=(), keep_equal_ids=False, diagonals=0)


def plain_inputs(x: torch.Tensor, y: torch.Tensor | None, scale: float = 1.0) -> spec.Inputs:
    return spec.Inputs(x, y, torch.tensor(scale, dtype=spec.compute_dtype(x)), *[None] * 6)


def wanted(*names: str) -> spec.Wanted:
    return spec.Wanted(*(field in names for field in spec.Wanted._fields))


def log_sum_exp(logits: torch.Tensor, kept: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the log-sum-exp over the kept pairs; -inf with zero gradient where there are none."""
    some = kept.any(dim, keepdim=True)
    masked = torch.where(some, logits.masked_fill(~kept, -torch.inf), 0 * logits)
    return masked.logsumexp(dim).masked_fill(~some.squeeze(dim), -torch.inf)


def dense(case: Case, inputs: spec.Inputs) -> spec.Statistics:
    """Return the statistics as `engine.spec` defines them, from the full matrix."""
    x, y, scale, bias, x_ids, y_ids, cutoff, term_scale, term_offset = inputs
    s = x @ (x if y is None else y).T
    kept = torch.ones_like(s, dtype=torch.bool)
    if x_ids is not None:
        kept = kept_by_ids(case.description(), x_ids, x_ids if y is None else y_ids)
    if case.diagonals > 0:
        place = torch.arange(max(s.shape)) % (max(s.shape) // case.diagonals)
        kept = kept & (place[: len(x), None] != place[: s.shape[1]])
    if cutoff is not None:
        kept = kept & ~(s > cutoff[:, None])
    offset = 0 if bias is None else bias
    none = s.new_empty(0)

    def maximum(dim: int) -> torch.Tensor:
        return (scale * s + offset).masked_fill(~kept, -torch.inf).amax(dim)

    base = -(2 - 2 * s).clamp(min=1e-12).sqrt() if case.term == "distance_hinge" else s
    argument = base if term_scale is None else term_scale * base + term_offset[:, None]
    return spec.Statistics(
        torch.stack([log_sum_exp(q * scale * s + offset, kept, 1) for q in case.exponents]) if case.exponents else none,
        log_sum_exp(scale * s, kept, 0) if case.column_lse else none,
        torch.where(kept, TERMS[case.term][1](argument), 0).sum(1) if case.term else none,
        maximum(1) if case.maximum else none,
        maximum(0) if case.maximum and case.column_lse else none,
        none,
    )


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    actual = actual.double()
    assert actual.numel() == expected.numel(), what
    if expected.numel() == 0:
        return
    finite = expected.isfinite()
    torch.testing.assert_close(actual[~finite], expected[~finite], equal_nan=True, msg=f"{what}: other infinities")
    if finite.any():
        # A sum over all pairs may cancel: there 1 is small.
        floor = 1.0 if expected.dim() == 0 else 1e-3
        error = (actual - expected)[finite].abs().max() / expected[finite].abs().max().clamp(min=floor)
        assert error <= tolerance, f"{what}: relative error {error:.1e}"


def run(case: Case, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Compare statistics and gradients of the operators with the dense computation, and return them."""
    inputs, what = case.inputs(dtype), case.description()
    actual = spec.Statistics(*ops.cpp_forward(*inputs, *what, case.maximum))

    exact = spec.Inputs(*(t.double().clone() if t is not None and t.is_floating_point() else t for t in inputs))
    leaves = {name: leaf for name in spec.DERIVATIVES if (leaf := getattr(exact, name)) is not None}
    for leaf in leaves.values():
        leaf.requires_grad_()
    expected = dense(case, exact)
    for name, a, e in zip(spec.Statistics._fields, actual, expected, strict=True):
        assert_near(a, e.detach(), VALUE_TOLERANCE[dtype], name)

    upstream = [torch.randn_like(e) for e in expected[:3]]
    total = sum((g * e.masked_fill(e == -torch.inf, 0)).sum() for g, e in zip(upstream, expected[:3], strict=True))
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    references = {**dict(zip(leaves, gradients, strict=True)), "total": total.detach()}
    upstream[0] = upstream[0].reshape(len(case.exponents), case.n)
    alone = case.term != "" and not case.exponents and not case.column_lse
    names = [*leaves, "total"] if alone else list(leaves)
    found = spec.Gradients(*ops.cpp_backward(*upstream, actual.row_lse, actual.col_lse, *inputs, *what, wanted(*names)))
    for name, gradient in zip(spec.Gradients._fields, found, strict=True):
        if name in names:
            assert_near(gradient, references[name], GRADIENT_TOLERANCE[dtype], f"gradient of {name}")
        else:
            assert gradient.numel() == 0, name
    assert found.x.dtype == dtype
    return list(actual), list(found)


@pytest.fixture(params=[1, 2], ids=lambda threads: f"threads{threads}")
def threads(request):
    with thread_count(request.param):
        yield request.param


SELF = Case(m=0, n=200)
SWITCHES = [
    Case(),
    Case(column_lse=True, maximum=True),
    Case(column_lse=True, ids=5),
    Case(column_lse=True, exponents=(), maximum=True),
    Case(exponents=(1.0, 2.5), ids=20, maximum=True),
    Case(exponents=(2.0,), maximum=True),
    Case(bias=True, cutoff=True, maximum=True),
    Case(ids=3, keep_equal_ids=True, term="softplus", term_operands=True),
    Case(term="band", ids=40),
    Case(column_lse=True, temperature=0.003),
    Case(temperature=-0.1, column_lse=True),
    SELF,
    replace(SELF, ids=100, maximum=True),
    *[replace(SELF, ids=4, keep_equal_ids=True, diagonals=d) for d in (1, spec.PLACES)],
    replace(SELF, diagonals=1, maximum=True),
    *[replace(SELF, n=840, diagonals=views, maximum=views == 3) for views in (2, 3, 40)],
    replace(SELF, n=840, diagonals=2, cutoff=True, term="band"),
    *[Case(n=700, m=900, column_lse=True, diagonals=d, ids=20, maximum=True) for d in (1, spec.PLACES)],
    Case(n=700, m=900, keep_equal_ids=True, diagonals=spec.PLACES, ids=5, term="softplus", term_operands=True),
    Case(n=900, m=700, diagonals=1, cutoff=True, term="square"),
    replace(SELF, exponents=(1.0, 2.0), ids=100, term="band"),
    replace(SELF, temperature=0.003),
    replace(SELF, column_lse=True),
    replace(SELF, bias=True, cutoff=True, keep_equal_ids=True, diagonals=1, ids=4),
    replace(SELF, exponents=(1.0, 2.0), ids=50, term="distance_hinge", term_operands=True),
    replace(SELF, diagonals=1, column_lse=True, term="student"),
    *[replace(SELF, exponents=(), ids=50, term=term) for term in TERMS],
    *[Case(exponents=(), term=term, term_operands=True) for term in TERMS],
]


def test_every_term_is_tested():
    assert set(TERMS) == set(terms.TERMS)


# Around the sizes of a vector, of a group of rows and of a tile (128 x 512), and odd everywhere.
SHAPES = [
    *[(1, 1, 1), (2, 1, 3), (1, 1000, 24), (1000, 1, 100), (63, 65, 200), (64, 64, 64), (127, 129, 1), (129, 127, 3)],
    *[(65, 1000, 100), (1000, 63, 24), (1000, 1000, 64), (300, 2000, 200)],
    *[(n, 0, d) for n, d in [(1, 1), (2, 3), (63, 24), (65, 64), (127, 100), (129, 200), (1000, 24)]],
]


@pytest.mark.parametrize("dtype", VALUE_TOLERANCE, ids=str)
@pytest.mark.parametrize("case", SWITCHES, ids=str)
def test_switches(case, dtype, threads):
    run(case, dtype)


@pytest.mark.parametrize("dtype", VALUE_TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype):
    n, m, d = shape
    run(Case(n, m, d, column_lse=m > 0, ids=50), dtype)


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (0, 0, 3), (5, 4, 0)], ids=str)
@pytest.mark.parametrize("dtype", VALUE_TOLERANCE, ids=str)
def test_empty(shape, dtype):
    n, m, d = shape
    x, y = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)
    inputs, what = plain_inputs(x, y), PLAIN._replace(column_lse=True, term="square")
    row_lse, col_lse, row_sum, row_max, *_ = ops.cpp_forward(*inputs, *what, True)
    exact = plain_inputs(x.double(), y.double())
    expected = dense(Case(column_lse=True, term="square"), exact)
    torch.testing.assert_close(row_lse, expected.row_lse.view(1, n))
    torch.testing.assert_close(col_lse, expected.col_lse)
    torch.testing.assert_close(row_sum, expected.row_sum)
    torch.testing.assert_close(row_max, torch.full((n,), 0.0 if m else -torch.inf, dtype=torch.float64))
    upstream = [torch.ones(1, n), torch.ones(m), torch.ones(n)]
    which = wanted("x", "y", "scale")
    dx, dy, dscale, *_ = ops.cpp_backward(*upstream, row_lse, col_lse, *inputs, *what, which)
    assert dx.shape == x.shape and dy.shape == y.shape and dscale == 0
    assert not dx.any() and not dy.any()


@pytest.mark.parametrize("dtype", VALUE_TOLERANCE, ids=str)
@pytest.mark.parametrize("m", [700, 0], ids=["two-operands", "self"])
def test_gradient_of_the_scale_alone(m, dtype):
    """Frozen features with a learned temperature take no matrix product, and give the same gradient."""
    case = Case(n=700, m=m)
    inputs = case.inputs(dtype)
    row_lse, col_lse, *_ = ops.cpp_forward(*inputs, *case.description(), False)
    upstream = [torch.randn_like(row_lse).to(inputs.scale.dtype), torch.empty(0), torch.empty(0)]
    arguments = (*upstream, row_lse, col_lse, *inputs, *case.description())
    names = ("x", "y", "scale") if m else ("x", "scale")
    everything = spec.Gradients(*ops.cpp_backward(*arguments, wanted(*names)))
    alone = spec.Gradients(*ops.cpp_backward(*arguments, wanted("scale")))
    assert torch.equal(alone.scale, everything.scale)
    assert not any(gradient.numel() for gradient in alone._replace(scale=torch.empty(0)))


@pytest.mark.parametrize("dtype", VALUE_TOLERANCE, ids=str)
@pytest.mark.parametrize("m", [700, 0], ids=["two-operands", "self"])
def test_repeats_bitwise(m, dtype):
    case = Case(n=700, m=m, column_lse=m > 0, ids=300, term="band")
    first = run(case, dtype)
    run(replace(case, n=65), dtype)
    for before, after in zip(first, run(case, dtype), strict=True):
        assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("layout", ["transposed", "every-other-row", "every-other-column", "expanded", "odd-offset"])
@pytest.mark.parametrize("dtype", VALUE_TOLERANCE, ids=str)
def test_strides(layout, dtype):
    inputs, what = Case(n=130, m=130, d=130).inputs(dtype), PLAIN._replace(column_lse=True)
    make = {
        "transposed": lambda t: t.T,
        "every-other-row": lambda t: t[::2],
        "every-other-column": lambda t: t[:, ::2],
        "expanded": lambda t: t[:1].expand(40, -1),
        "odd-offset": lambda t: t.flatten()[1 : 1 + 64 * 96].view(64, 96),
    }[layout]
    x, y = make(inputs.x), make(inputs.y)

    def both(x, y):
        tensors = inputs._replace(x=x, y=y)
        row_lse, col_lse, *_ = ops.cpp_forward(*tensors, *what, False)
        upstream = [torch.ones_like(row_lse), torch.ones_like(col_lse), torch.empty(0)]
        dx, dy, *_ = ops.cpp_backward(*upstream, row_lse, col_lse, *tensors, *what, wanted("x", "y"))
        return row_lse, col_lse, dx, dy

    for strided, contiguous in zip(both(x, y), both(x.contiguous(), y.contiguous()), strict=True):
        torch.testing.assert_close(strided, contiguous)


@pytest.mark.parametrize("dtype", VALUE_TOLERANCE, ids=str)
@pytest.mark.parametrize("m", [300, 0], ids=["two-operands", "self"])
def test_nan_stays_in_its_row(m, dtype):
    case = Case(n=300, m=m, term="square", maximum=True)
    inputs = case.inputs(dtype)
    inputs.x[7, 3] = torch.nan
    row_lse, _, row_sum, row_max, *_ = ops.cpp_forward(*inputs, *case.description(), True)
    expected = torch.ones(300, dtype=torch.bool) if m == 0 else torch.arange(300) == 7
    for statistic in (row_lse[0], row_sum, row_max):
        assert torch.equal(statistic.isnan(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_student_over_its_range(dtype):
    """Check the error of the power, at the edges of binades too; 16 equal columns use the vector instructions."""
    v = torch.cat([torch.tensor([0.0, 1e-9, 1e-3, 1, 3, 7, 2**20 - 1]), 10 ** torch.linspace(-6, 12, 500)]).to(dtype)

    def powers(v, exponent):
        inputs = plain_inputs(v[:, None], torch.ones(16, 1, dtype=dtype))
        what = PLAIN._replace(exponents=(), term="student", constants=(exponent,))
        return spec.Statistics(*ops.cpp_forward(*inputs, *what, False)).row_sum / 16

    for exponent in (0.75, 3.0):
        exact = (1 + v.double()) ** -exponent
        # the argument of the exponential is rounded, and so is the base
        bound = torch.finfo(dtype).eps * (2 + exponent * (1 + 1.5 * torch.log1p(v.double())))
        assert ((powers(v, exponent) / exact - 1).abs() <= bound).all()
    strange = powers(torch.tensor([torch.nan, torch.inf, -0.5], dtype=dtype), 3.0)
    torch.testing.assert_close(strange, torch.tensor([torch.nan, 0.0, 1.0]).double(), equal_nan=True)


@pytest.mark.parametrize("dtype", VALUE_TOLERANCE, ids=str)
def test_infinite_similarity(dtype):
    inputs = Case(n=300, m=300).inputs(dtype)
    inputs.x[7] = 0
    inputs.x[7, 0] = torch.inf
    row_lse, col_lse, _, row_max, *_ = ops.cpp_forward(*inputs, *PLAIN._replace(column_lse=True), True)
    assert torch.equal(row_lse[0] == torch.inf, torch.arange(300) == 7)
    assert torch.equal(row_max == torch.inf, torch.arange(300) == 7)
    assert torch.equal(col_lse == torch.inf, inputs.y[:, 0] > 0)
    assert not row_lse.isnan().any() and not col_lse.isnan().any()


@pytest.mark.parametrize("m", [150, 0], ids=["two-operands", "self"])
@pytest.mark.parametrize("dtype", VALUE_TOLERANCE, ids=str)
def test_nothing_kept(m, dtype):
    run(Case(n=150, m=m, ids=1, term="gaussian", column_lse=m > 0, maximum=True), dtype)


def unlike_inputs(kind: str, n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pairs that strain a log-sum-exp: ordinary ones, nearly equal rows, or every row and its opposite."""
    torch.manual_seed(0)
    x = torch.randn(n, d, dtype=torch.float64)
    if kind == "collapsed":
        x = x[:1] + 1e-3 * x
    y = -x + 1e-2 * torch.randn_like(x) if kind == "anti-aligned" else x + 0.5 * torch.randn_like(x)
    return normalize(x, dim=1), normalize(y, dim=1)


@pytest.mark.parametrize("kind", ["random", "collapsed", "anti-aligned"])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_within_a_multiple_of_pytorch(kind, temperature, dtype):
    x, y = (t.to(dtype) for t in unlike_inputs(kind, 500, 96))
    n, scale = len(x), 1 / temperature

    def clip(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        # Half-precision logits go into a float32 cross-entropy, as under autocast.
        logits = scale * (x @ y.T).to(spec.compute_dtype(x))
        rows, cols = logits.logsumexp(1), logits.logsumexp(0)
        return [rows.detach(), cols.detach(), *torch.autograd.grad(rows.mean() + cols.mean(), [x, y])]

    inputs, what = plain_inputs(x, y, scale), PLAIN._replace(column_lse=True)
    row_lse, col_lse, *_ = ops.cpp_forward(*inputs, *what, False)
    upstream = [torch.full((1, n), 1 / n), torch.full((n,), 1 / n), torch.empty(0)]
    dx, dy, *_ = ops.cpp_backward(*upstream, row_lse, col_lse, *inputs, *what, wanted("x", "y"))
    exact = clip(x.double(), y.double())
    for k, (ours, torchs, right) in enumerate(zip([row_lse[0], col_lse, dx, dy], clip(x, y), exact, strict=True)):
        for norm in (2, torch.inf):
            rounding = torch.finfo(ours.dtype if k >= 2 else torch.float32).eps * right.norm(norm)
            bound = (2 if k < 2 else 3) * (torchs - right).norm(norm) + rounding
            assert (ours - right).norm(norm) <= bound


@pytest.mark.parametrize("dtype", VALUE_TOLERANCE, ids=str)
@pytest.mark.parametrize(("n", "v", "d"), [(1, 2, 1), (7, 3, 5), (100, 4, 33), (0, 3, 4), (3, 2, 0)])
def test_views_least_pair(n, v, d, dtype):
    torch.manual_seed(0)
    views = torch.randn(n, v, d).to(dtype)
    first, second = torch.triu_indices(v, v, 1)
    products = (views.double() @ views.double().mT)[:, first, second]
    least = products.argmin(1)
    assert torch.equal(ops.cpp_views(views), torch.stack([first[least], second[least]], 1))


@pytest.mark.parametrize("views", [torch.ones(1, 4, 2), torch.zeros(1, 4, 2)], ids=["equal", "zero"])
def test_views_first_of_a_tie(views):
    assert ops.cpp_views(views).tolist() == [[0, 1]]


def test_views_nan_is_least():
    views = torch.tensor([[[1.0], [-1.0], [torch.nan], [2.0]]])
    assert ops.cpp_views(views).tolist() == [[0, 2]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"y": torch.randn(4, 5)}, ValueError, "same last dimension"),
        ({"y": torch.randn(4, 3).double()}, TypeError, "dtype of x"),
        ({"x": torch.ones(4, 3, dtype=torch.int32)}, TypeError, "must be float32"),
        ({"bias": torch.randn(5)}, ValueError, "bias"),
        ({"x_ids": torch.arange(4.0), "y_ids": torch.arange(4)}, TypeError, "x_ids"),
        ({"x_ids": torch.arange(4)}, ValueError, "given together"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses(change, error, message):
    inputs = plain_inputs(torch.randn(4, 3), torch.randn(4, 3))._replace(**change)
    with pytest.raises(error, match=message):
        ops.cpp_forward(*inputs, *PLAIN, False)


@pytest.mark.parametrize("diagonals", [-2, spec.PLACES, 3])
def test_refuses_diagonals_that_it_cannot_drop(diagonals):
    """Views that do not divide the rows, and places without ids."""
    inputs = plain_inputs(torch.randn(4, 3), None)
    with pytest.raises(ValueError, match="diagonals"):
        ops.cpp_forward(*inputs, *PLAIN._replace(diagonals=diagonals), False)


@pytest.mark.parametrize("dtype", VALUE_TOLERANCE, ids=str)
@pytest.mark.parametrize("case", [Case(n=300, m=700, column_lse=True, diagonals=1), Case(ids=9, cutoff=True)], ids=str)
def test_saved_scores(case, dtype):
    """The backward with saved similarities gives the same bits as the backward that computes them."""
    inputs = case.inputs(dtype)
    *statistics, scores = ops.cpp_forward(*inputs, *case.description(), True, True)
    torch.testing.assert_close(scores, (inputs.x @ inputs.y.T).to(scores.dtype), rtol=2e-2, atol=2e-2)
    upstream = [torch.randn_like(s).to(inputs.scale.dtype) for s in statistics[:3]]
    arguments = (*upstream, *statistics[:2], *inputs, *case.description(), wanted("x", "y", "scale"))
    for saved, recomputed in zip(ops.cpp_backward(*arguments, scores), ops.cpp_backward(*arguments), strict=True):
        assert torch.equal(saved, recomputed)
    with pytest.raises(ValueError, match="scores"):
        ops.cpp_backward(*arguments, scores[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 3, 700, 2000])
def test_selection_shapes(k, dtype):
    """Tiles of few rows for a large k, ragged tiles, and more candidates than there is room for at a time."""
    x, y = (torch.randint(-3, 4, (n, 5)).to(dtype) for n in (270, 1100))
    x_ids, y_ids = torch.randint(9, (270,)), torch.randint(9, (1100,))
    similarity = (x.double() @ y.double().T).masked_fill(x_ids[:, None] == y_ids, -torch.inf)
    similarity[torch.eye(270, 1100, dtype=torch.bool)] = -torch.inf
    expected, order = similarity.sort(dim=1, descending=True, stable=True)
    values, columns = ops.cpp_select(x, y, k, True, x_ids, y_ids, True)
    width = min(k, 1100)
    assert torch.equal(values[:, :width].double(), expected[:, :width])
    assert torch.equal(columns[:, :width], order[:, :width].masked_fill(expected[:, :width] == -torch.inf, -1))
    assert (columns[:, width:] == -1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (130, 17), (3, 5, 100), (0, 4), (3, 0)], ids=str)
def test_unit_row_shapes(shape, dtype):
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    unit, norm = ops.cpp_unit_rows(x)
    assert torch.equal(ops.cpp_unit_rows_backward(x, x, norm).isfinite(), torch.ones_like(x, dtype=torch.bool))
    torch.testing.assert_close(unit.double() * norm.double(), x.double(), rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match="norm"):
        ops.cpp_unit_rows_backward(x, x, torch.ones(7, 1))
