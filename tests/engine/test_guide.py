"""A guide, the second similarity that drops pairs: values, every gradient, derivatives, compilation, errors."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import contrastive_kernels as ck
import python_ref
from contrastive_kernels.engine import spec
from contrastive_kernels.engine.operators import operator
from contrastive_kernels.primitives import Pairs, kept_counts, kept_sums, weighted_total
from tests.support.losses import Largest, assert_exact, assert_refused
from tests.support.primitives import DTYPES, SCALE, compare, pair
from tests.support.testing import assert_outcomes_match, device_of, differentiate, dtype_id

WIDTH = 5  # of the guide


def compare_guided(shape, backend, dtype, itself=False, guide_cutoff=0.3, tensors=None, **options):
    """Compare the log-sum-exps that a guide leaves; its products are exact, so that no rounding moves a pair."""
    n, m, _ = shape
    rows = {**pair(shape), "scale": torch.tensor(SCALE), **(tensors or {})}
    guide = [torch.randint(-3, 4, (k, WIDTH)) / 4.0 for k in (n, m)]
    if itself:
        del rows["y"]
        guide[1] = None

    def function(module, x, **arguments):
        given = tuple(None if part is None else part.to(x.device) for part in guide)
        limit = guide_cutoff.to(x.device) if torch.is_tensor(guide_cutoff) else guide_cutoff
        return module.similarity_logsumexp(x, guide=given, guide_cutoff=limit, **arguments)

    compare(function, rows, backend, dtype, SCALE, **options)


@pytest.fixture
def few_rows():
    """Let a chunk hold a few rows only."""
    ck.set_workspace_limit(32 * 1000)
    yield
    ck.set_workspace_limit(None)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("itself", [False, True])
def test_guide(itself, dtype, backend, poison, few_rows):
    compare_guided((65, 129, 24), backend, dtype, itself)


def test_guide_with_everything_else(backend, few_rows):
    """Ids, a bias, a cutoff of the similarity itself, and one of the guide for every row."""
    n, m, _ = shape = (65, 129, 24)
    tensors = {"x_ids": torch.randint(5, (n,)), "y_ids": torch.randint(5, (m,)), "y_bias": torch.randn(m).double()}
    limit, cutoff = torch.randint(-4, 8, (n,)) / 16 + 1 / 64, (torch.randn(n) / 20).to(device_of(backend))
    compare_guided(shape, backend, torch.float64, guide_cutoff=limit, tensors=tensors, cutoff=cutoff)


def test_a_guide_that_drops_nothing_or_all(backend):
    """NaN drops nothing, as a NaN similarity is not dropped by a cutoff."""
    x, y, of_x, of_y = (torch.randn(n, 4, device=device_of(backend)) for n in (9, 7, 9, 7))
    plain = ck.similarity_logsumexp(x, y, backend=backend)
    for guide, cutoff in (((of_x, of_y), 1e9), ((of_x * torch.nan, of_y), 0.0), ((of_x, of_y), torch.nan)):
        found = ck.similarity_logsumexp(x, y, guide=guide, guide_cutoff=cutoff, backend=backend)
        torch.testing.assert_close(found, plain)
    x.requires_grad_()
    nothing = ck.similarity_logsumexp(x, y, guide=(of_x, of_y), guide_cutoff=-1e9, backend=backend)
    assert nothing.isneginf().all()
    assert not torch.autograd.grad(nothing.sum(), x)[0].any()
    x.data[2, 1] = torch.nan
    assert ck.similarity_logsumexp(x, y, guide=(of_x, of_y), guide_cutoff=0.0, backend=backend)[2].isnan()


def test_derivatives():
    """First and second ones; a guide and its cutoff have none."""
    options = {"dtype": torch.float64, "requires_grad": True}
    x, y, bias = torch.randn(4, 3, **options), torch.randn(5, 3, **options), torch.randn(5, **options)
    scale, guide = torch.rand((), **options), tuple(torch.randn(n, 2, **options) for n in (4, 5))

    def rows(x, y, scale, bias):
        return ck.similarity_logsumexp(x, y, scale=scale, y_bias=bias, guide=guide, guide_cutoff=0.4)

    def itself(x, scale):
        return ck.similarity_logsumexp(x, scale=scale, guide=(guide[0], None), guide_cutoff=0.4)

    for function, inputs in ((rows, (x, y, scale, bias)), (itself, (x, scale))):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)
    assert torch.autograd.grad(rows(x, y, scale, bias).sum(), guide, allow_unused=True) == (None, None)


def test_compiles():
    torch.compiler.reset()

    def lse(x, y, scale):
        return ck.similarity_logsumexp(x, y, scale=scale, guide=(x.sin(), y.sin()), guide_cutoff=0.1)

    compiled = torch.compile(lse, fullgraph=True, backend="aot_eager")
    for n in (9, 12):
        x, y = torch.randn(2, n, 4, dtype=torch.float64).unbind()
        tensors = {"x": x, "y": y, "scale": x.new_tensor(2.0)}
        assert_outcomes_match(differentiate(compiled, tensors), differentiate(lse, tensors), torch.float64, 2.0)


@pytest.mark.parametrize("itself", [False, True])
def test_operators(itself):
    x, y = torch.randn(9, 4), None if itself else torch.randn(6, 4)
    guide = torch.randn(9, 3), None if itself else torch.randn(6, 3), torch.randn(9)
    inputs = spec.Inputs(x, y, torch.tensor(2.0), *[None] * 6)
    what = spec.Description([1.0], not itself, "softplus", [], False, 1)
    torch.library.opcheck(operator("torch", "guided_forward"), (*inputs, *what, True, *guide))
    statistics = operator("torch", "guided_forward")(*inputs, *what, True, *guide)
    wanted = [True, not itself, True, False, False, False, False]
    flow = [torch.randn_like(s, dtype=torch.float32) for s in statistics[:3]]
    arguments = (*flow, *statistics[:2], *inputs, *what, wanted, *guide)
    torch.library.opcheck(operator("torch", "guided_backward"), arguments)


def test_nothing_is_as_large_as_the_matrix(few_rows):
    n = 256
    x, y, of_x, of_y = (torch.randn(n, 4, requires_grad=True) for _ in range(4))
    with Largest() as largest:
        lse = ck.similarity_logsumexp(x, y, guide=(of_x, of_y), guide_cutoff=0.0)
        (gradient,) = torch.autograd.grad(lse.square().sum(), x, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), (x, y))
    assert largest.elements < n * n / 8


def test_counts_sums_and_totals_see_the_guide():
    """What else of the engine takes pairs; the kept ones are those of the mask."""
    x, y, of_x, of_y = torch.randn(4, 9, 4, dtype=torch.float64).unbind()
    pairs = Pairs(diagonals=1, guide=spec.Guide(of_x, of_y, torch.full((9,), 0.2, dtype=torch.float64)))
    kept = (of_x @ of_y.T <= 0.2) & ~torch.eye(9, dtype=torch.bool)
    assert_exact(kept_counts(x, y, pairs), kept.sum(1))
    assert_exact(kept_sums(x, y, pairs), (x @ y.T * kept).sum(1))
    assert_exact(weighted_total(x, y, pairs, term=ck.Square()), ((x @ y.T).square() * kept).sum())


X, G = torch.ones(8, 16), torch.ones(8, 3)
BAD = {
    "no cutoff": ({"guide": (G, G)}, ValueError, "guide is given but guide_cutoff is not"),
    "no guide": ({"guide_cutoff": 0.1}, ValueError, "guide_cutoff is given but guide is not"),
    "one tensor": ({"guide": G, "guide_cutoff": 0.1}, TypeError, "guide must be a pair of tensors"),
    "rows of x": ({"guide": (G[1:], G), "guide_cutoff": 0.1}, ValueError, "guide[0] (7, 3) must have 8 rows"),
    "rows of y": ({"guide": (G, G[1:]), "guide_cutoff": 0.1}, ValueError, "guide[1] (7, 3) must have 8 rows"),
    "widths": ({"guide": (G, G[:, 1:]), "guide_cutoff": 0.1}, ValueError, "guide[0] (8, 3) and guide[1] (8, 2)"),
    "none for y": ({"guide": (G, None), "guide_cutoff": 0.1}, ValueError, "the second None exactly where y is None"),
    "integers": ({"guide": (G.long(), G), "guide_cutoff": 0.1}, TypeError, "guide[0] has dtype torch.int64"),
    "cutoffs": ({"guide": (G, G), "guide_cutoff": G[0]}, ValueError, "guide_cutoff (3,) must have shape (8,)"),
    "device": ({"guide": (G.to("meta"), G), "guide_cutoff": 0.1}, RuntimeError, "guide[0] is on meta"),
    "columns": ({"guide": (G, G), "guide_cutoff": 0.1, "columns": True}, ValueError, "columns=True takes neither"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    options, error, message = BAD[name]
    assert_refused(lambda: ck.similarity_logsumexp(X, X, **options), error, message)


def test_reference_by_hand():
    """The guide drops the nearest column of the first row and nothing of the second."""
    x, y = torch.eye(2).double(), torch.tensor([[2.0, 1.0], [0.5, 3.0], [1.0, 1.0]]).double()
    guide = torch.tensor([[1.0], [-1.0]]).double(), torch.tensor([[1.0], [0.0], [0.5]]).double()
    s = x @ y.T
    expected = torch.stack([s[0, 1:].logsumexp(0), s[1].logsumexp(0)])
    assert_exact(python_ref.similarity_logsumexp(x, y, guide=guide, guide_cutoff=0.75), expected)
