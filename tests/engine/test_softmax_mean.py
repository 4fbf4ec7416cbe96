"""`similarity_softmax_mean` against the dense reference: values, every gradient, masks, chunks, derivatives, groups."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import contrastive_kernels as ck
import python_ref
from contrastive_kernels.engine import spec
from contrastive_kernels.engine.operators import operator
from tests.support.losses import Largest, assert_refused
from tests.support.primitives import DTYPES, SCALE, SHAPES, compare, pair
from tests.support.testing import assert_outcomes_match, device_of, differentiate, dtype_id, errors, precise, shape_id

WIDTH = 7  # of the values


def softmax_mean(module, x, values, y=None, **arguments):
    return module.similarity_softmax_mean(x, y, values, **arguments)


def valued(shape, itself=False):
    """Return unit rows and values that are as many."""
    tensors = pair(shape)
    if itself:
        del tensors["y"]
    rows = shape[0] if itself else shape[1]
    return {**tensors, "values": torch.randn(rows, WIDTH, dtype=torch.float64), "scale": torch.tensor(SCALE)}


@pytest.fixture
def few_rows():
    """Let a chunk hold a few rows only."""
    ck.set_workspace_limit(32 * 1000)
    yield
    ck.set_workspace_limit(None)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=shape_id)
def test_softmax_mean(shape, dtype, backend, poison):
    compare(softmax_mean, valued(shape), backend, dtype, SCALE)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_softmax_mean_of_x_with_itself(dtype, backend, poison, few_rows):
    tensors = {**valued((129, 1, 24), itself=True), "x_ids": torch.arange(129) // 2}
    compare(softmax_mean, tensors, backend, dtype, SCALE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("name", ["ids", "bias", "cutoff", "everything", "negative scale"])
def test_softmax_mean_options(name, dtype, backend, poison, few_rows):
    """A small workspace makes many chunks of the rows."""
    n, m, _ = shape = (65, 129, 24)
    tensors, options = valued(shape), {}
    if name in ("ids", "everything"):
        tensors |= {"x_ids": torch.randint(5, (n,)), "y_ids": torch.randint(5, (m,))}
    if name in ("bias", "everything"):
        tensors["y_bias"] = torch.randn(m, dtype=torch.float64)
    if name in ("cutoff", "everything"):
        options["cutoff"] = (torch.randn(n) / 20).to(device_of(backend))
    if name == "negative scale":
        tensors["scale"] = torch.tensor(-SCALE)
    compare(softmax_mean, tensors, backend, dtype, SCALE, **options)


@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_errors_in_float32_are_those_of_plain_pytorch(scale, backend):
    """The contract of the losses: twice the error for the value, three times for the gradients, over some seeds."""
    squares = []
    for seed in range(4):
        torch.manual_seed(seed)
        exact = {**valued((65, 129, 24)), "scale": torch.tensor(scale)}
        narrow = {name: x.float().to(device_of(backend)) for name, x in exact.items()}
        found = (
            differentiate(lambda **t: softmax_mean(ck, **t, backend=backend), narrow),
            differentiate(lambda **t: softmax_mean(python_ref, **t), narrow),
        )
        wide = differentiate(lambda **t: softmax_mean(python_ref, **t), {k: x.double() for k, x in narrow.items()})
        rows = [
            [errors(value, exact)[0] ** 2 for value, exact in zip(tensors_of(one), tensors_of(wide), strict=True)]
            for one in found
        ]
        squares.append(rows)
    ours, plain = torch.tensor(squares).mean(0).sqrt()
    bounds = plain * torch.tensor([2.0, *[3.0] * (len(plain) - 1)])
    assert (ours <= bounds).all(), (ours / plain).tolist()


def tensors_of(outcome):
    return [outcome.value, *outcome.gradients.values()]


def test_rows_without_pairs_are_zero(backend):
    """Without gradient, exactly."""
    device = device_of(backend)
    x, y, values = (torch.randn(n, 4, device=device, requires_grad=True) for n in (5, 3, 3))
    ids = torch.zeros(5, dtype=torch.int64, device=device)
    leaves = x, y, values
    for options in ({"x_ids": ids, "y_ids": ids[:3]}, {"cutoff": -1e4}):
        mean = ck.similarity_softmax_mean(x, y, values, **options, backend=backend)
        assert torch.equal(mean, torch.zeros_like(mean))
        for gradient in torch.autograd.grad(mean.sum(), leaves):
            assert torch.equal(gradient, torch.zeros_like(gradient))
    nothing = ck.similarity_softmax_mean(x, y[:0], values[:0], backend=backend)
    assert nothing.shape == (5, 4) and not nothing.any()
    assert ck.similarity_softmax_mean(x[:0], y, values, backend=backend).shape == (0, 4)


def test_large_logits_and_nan(backend):
    x = 20 * torch.randn(33, 24, dtype=torch.float64)
    y = -x.abs().mean(0) * torch.ones(65, 1)
    compare(softmax_mean, {"x": x, "y": y, "values": torch.randn(65, 3).double()}, backend, torch.float32, 40.0)
    for bad in range(3):
        tensors = [torch.randn(n, 4, device=device_of(backend)) for n in (5, 6, 6)]
        tensors[bad][1, 2] = torch.nan
        mean = ck.similarity_softmax_mean(*tensors, backend=backend)
        assert mean[1].isnan().any() and mean.isnan().any(1).all() == (bad > 0)


def test_values_of_another_dtype(backend):
    """Their gradient has it too; the result is that of the rows of x."""
    device = device_of(backend)
    x, y = torch.randn(2, 9, 4, device=device).unbind()
    values = torch.randn(9, 3, device=device).bfloat16().requires_grad_()
    mean = ck.similarity_softmax_mean(x, y, values, scale=2.0, backend=backend)
    wide = values.detach().float().requires_grad_()
    expected = ck.similarity_softmax_mean(x, y, wide, scale=2.0, backend=backend)
    assert torch.equal(mean, expected)
    (gradient,), (of_wide,) = (torch.autograd.grad(m.square().sum(), v) for m, v in ((mean, values), (expected, wide)))
    assert gradient.dtype == torch.bfloat16 and torch.equal(gradient, of_wide.bfloat16())


def test_distillation(backend):
    """The cross-entropy from the softmax of a teacher to that of a student, from its two log-sum-exps and a mean."""
    tensors = {name: torch.randn(n, 6, dtype=precise(backend)) for name, n in (("k", 17), ("q", 17), ("queue", 33))}

    def ours(k, q, queue):
        mean = ck.similarity_softmax_mean(k, queue, queue, scale=3.0, backend=backend)
        return ck.similarity_logsumexp(q, queue, scale=2.0, backend=backend) - 2.0 * (q * mean).sum(1)

    def dense(k, q, queue):
        return F.cross_entropy(2.0 * q @ queue.T, (3.0 * k @ queue.T).softmax(1), reduction="none")

    on_device = {name: x.to(device_of(backend)) for name, x in tensors.items()}
    expected = differentiate(dense, {name: x.double() for name, x in tensors.items()})
    assert_outcomes_match(differentiate(ours, on_device), expected, precise(backend), 10.0)


def leaves_of(backend):
    options = {"dtype": torch.float64, "device": device_of(backend), "requires_grad": True}
    rows = [torch.randn(n, d, **options) for n, d in ((4, 3), (5, 3), (5, 2))]
    return [*rows, torch.rand((), **options), torch.randn(5, **options)]


def biased(backend, x, y, values, scale, bias):
    return ck.similarity_softmax_mean(x, y, values, scale=scale, y_bias=bias, backend=backend)


def test_derivatives(backend):
    """First and second ones, of what the operator returns too."""
    if precise(backend) != torch.float64:
        pytest.skip(f"{backend} has no float64")
    x, y, values, scale, bias = leaves_of(backend)
    ids = torch.tensor([0, 0, 1, 2], device=x.device)
    own = torch.randn_like(x).requires_grad_()

    def itself(x, values, scale):
        return ck.similarity_softmax_mean(x, None, values, scale=scale, x_ids=ids, backend=backend)

    def bare(x, y, values, scale, bias):
        inputs = spec.Inputs(x, y, scale, bias, *[None] * 5)
        what = spec.Description((1.0,), False, "", (), False, 0)
        return operator("torch", "softmax_mean")(values, *inputs, *what)

    for function, inputs in (
        (lambda *leaves: biased(backend, *leaves), (x, y, values, scale, bias)),
        (itself, (x, own, scale)),
        (bare, (x, y, values, scale, bias)),
    ):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


def test_higher_derivatives_take_a_chunk_at_a_time(few_rows):
    """Three orders against the dense form, from many chunks."""
    leaves = [torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (40, 60, 60)]

    def third(module):
        value = module.similarity_softmax_mean(*leaves, scale=2.0).sin().sum()
        for leaf in leaves:
            (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
            value = gradient.sin().sum()
        return value.detach()

    torch.testing.assert_close(third(ck), third(python_ref))
    with Largest() as largest:
        mean = ck.similarity_softmax_mean(*leaves)
        (gradient,) = torch.autograd.grad(mean.square().sum(), leaves[0], create_graph=True)
        torch.autograd.grad(gradient.square().sum(), leaves)
    assert largest.elements < 40 * 60


def test_compiles():
    """To one graph, at two sizes, the second of which makes the graph dynamic; all backends call one operator."""
    torch.compiler.reset()

    def loss(x, y, values, scale):
        ids = torch.arange(x.shape[0], device=x.device)
        return ck.similarity_softmax_mean(x, y, values, scale=scale, x_ids=ids, y_ids=ids)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for n in (9, 12):
        rows = torch.randn(3, n, 4, dtype=torch.float64).unbind()
        tensors = dict(zip(("x", "y", "values"), rows, strict=True)) | {"scale": rows[0].new_tensor(2.0)}
        assert_outcomes_match(differentiate(compiled, tensors), differentiate(loss, tensors), torch.float64, 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("itself", [False, True])
def test_operators(dtype, itself):
    x, y, values = torch.randn(9, 4, dtype=dtype), torch.randn(6, 4, dtype=dtype), torch.randn(6, 3)
    if itself:
        y, values = None, torch.randn(9, 3)
    bias = None if itself else torch.randn(6)
    inputs = spec.Inputs(
        x, y, torch.tensor(2.0), bias, torch.arange(9) % 5, None if itself else torch.arange(6), *[None] * 3
    )
    what = spec.Description([1.0], False, "", [], False, 0)
    torch.library.opcheck(operator("torch", "softmax_mean"), (values, *inputs, *what))
    mean, row_lse = operator("torch", "softmax_mean")(values, *inputs, *what)
    for wanted in (
        [True, not itself, True, not itself, True],
        [False, False, False, False, True],
        [True, *[False] * 4],
    ):
        arguments = (torch.randn_like(mean), torch.randn(9), row_lse, values, *inputs, *what, wanted)
        torch.library.opcheck(operator("torch", "softmax_mean_backward"), arguments)


@pytest.mark.parametrize("itself", [False, True])
def test_autocast(itself):
    """Features are rounded as for a product, values are not; the result is float32."""
    x, values = torch.randn(8, 4), torch.randn(8, 3)
    y = None if itself else torch.randn(8, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean = ck.similarity_softmax_mean(x, y, values)
    rounded = None if y is None else y.bfloat16()
    assert mean.dtype == torch.float32
    assert torch.equal(mean, ck.similarity_softmax_mean(x.bfloat16(), rounded, values))


def test_subnormal_exponentials(monkeypatch):
    """A sharp softmax is as fast as a flat one: no product takes numbers for which a processor needs far longer."""
    matmul, factors = torch.Tensor.__matmul__, []

    def watched(self, other):
        factors.extend([self.detach(), other.detach()])
        return matmul(self, other)

    y = torch.eye(64)
    y[:, 0] = torch.linspace(0.02, 1, 64)
    scores = 100 * (y[:, 0] - 1)
    assert ((scores < -88) & (scores > -103)).any(), "none of the exponentials is subnormal"
    tensors = {"x": torch.eye(64)[:1], "y": y, "values": torch.randn(64, 3)}
    expected = differentiate(
        lambda **t: python_ref.similarity_softmax_mean(**t, scale=100.0), {k: x.double() for k, x in tensors.items()}
    )
    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    found = differentiate(lambda **t: ck.similarity_softmax_mean(**t, scale=100.0, backend="torch"), tensors)
    assert len(factors) > 4
    assert not any(((x != 0) & (x.abs() < torch.finfo(x.dtype).tiny)).any() for x in factors)
    assert_outcomes_match(found, expected, torch.float32)


X = torch.ones(8, 16)
BAD = {
    "rows": (
        lambda: ck.similarity_softmax_mean(X, X[:3], X),
        ValueError,
        "values (8, 16) must have 3 rows, one for every row of y (3, 16)",
    ),
    "rows of x": (lambda: ck.similarity_softmax_mean(X, None, X[:3]), ValueError, "one for every row of x (8, 16)"),
    "a vector": (lambda: ck.similarity_softmax_mean(X, X, X[:, 0]), ValueError, "values (8,) must have shape (N, D)"),
    "integers": (lambda: ck.similarity_softmax_mean(X, X, X.long()), TypeError, "values has dtype torch.int64"),
    "device": (lambda: ck.similarity_softmax_mean(X, X, X.to("meta")), RuntimeError, "values is on meta"),
    "width": (lambda: ck.similarity_softmax_mean(X, X[:, 1:], X), ValueError, "must have the same last dimension"),
    "ids": (lambda: ck.similarity_softmax_mean(X, X, X, x_ids=torch.arange(8)), ValueError, "y_ids is not"),
    "bias": (lambda: ck.similarity_softmax_mean(X, X, X, y_bias=torch.ones(7)), ValueError, "y_bias (7,)"),
    "scale": (lambda: ck.similarity_softmax_mean(X, X, X, scale=torch.ones(2)), ValueError, "scale (2,)"),
    "backend": (lambda: ck.similarity_softmax_mean(X, X, X, backend="triton"), NotImplementedError, "device is cpu"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert_refused(*BAD[name])
