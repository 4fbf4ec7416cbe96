"""`row_select` against the dense reference: ties, restrictions, NaN, chunks of any size, bounded memory, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import python_ref
from contrastive_kernels import Count, row_select, similarity_logsumexp, similarity_sum
from contrastive_kernels.engine.backends import BACKENDS
from contrastive_kernels.engine.backends import torch as torch_backend
from contrastive_kernels.primitives import selecting_cutoff
from tests.support.testing import assert_matches, device_of, dtype_id, shape_id, supports, thread_count


@pytest.fixture
def selecting(backend, monkeypatch):
    """Make `backend` the default one; return its device."""
    monkeypatch.setenv("CONTRASTIVE_KERNELS_BACKEND", backend)
    return device_of(backend)


def selections():
    for largest in (True, False):
        for k in (1, 2, 5, 40):
            for restriction in ("none", "ids", "diagonal", "both"):
                yield pytest.param(
                    largest, k, restriction, id=f"{'largest' if largest else 'smallest'}-{k}-{restriction}"
                )


def restricted(restriction, n, m):
    options = {}
    if restriction in ("ids", "both"):
        options |= {"x_ids": torch.randint(5, (n,)), "y_ids": torch.randint(5, (m,))}
    return options | ({"exclude_diagonal": True} if restriction in ("diagonal", "both") else {})


@pytest.mark.parametrize(("largest", "k", "restriction"), list(selections()))
@pytest.mark.parametrize("elements", [None, 1, 300])
def test_against_the_reference(largest, k, restriction, elements, monkeypatch, poison, selecting, backend):
    """Small integers tie most similarities exactly; `elements` makes chunks of a few rows."""
    if not supports(backend, torch.float64):
        pytest.skip(f"{backend} does not take float64")
    if elements is not None:
        monkeypatch.setattr(torch_backend, "CHUNK_ELEMENTS", elements)
    # default tiles: several of them each way, the last ones ragged
    for n, m in ((33, 65), (9, 20), (3, 1), *([(270, 1100)] if elements is None else [])):
        x, y = (torch.randint(-2, 3, (rows, 3)).double() for rows in (n, m))
        options = {"k": k, "largest": largest, **restricted(restriction, n, m)}
        values, found = row_select(x, y, **options)
        expected, order = python_ref.row_select(x, y, **options)
        assert torch.equal(values, expected)
        assert torch.equal(found, order)
        options.pop("y_ids", None)
        for got, want in zip(row_select(x, **options), python_ref.row_select(x, **options), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_accumulates_in_float32(dtype, selecting, backend):
    if not supports(backend, dtype) or selecting != "cpu":
        pytest.skip("not this dtype, or not the CPU's autocast")
    x, y = (torch.randn(n, 200).to(dtype).requires_grad_() for n in (33, 129))
    values, columns = row_select(x, y, 4)
    assert values.dtype == torch.float32
    assert not values.requires_grad
    similarity = x.detach().float() @ y.detach().float().T
    torch.testing.assert_close(values, similarity.sort(1, descending=True).values[:, :4])
    torch.testing.assert_close(similarity.gather(1, columns), values)
    with torch.autocast("cpu", torch.bfloat16):
        values, _ = row_select(x.detach().float(), y.detach().float(), 4)
    expected = x.detach().bfloat16().double() @ y.detach().bfloat16().double().T
    assert_matches(values, expected.sort(1, descending=True).values[:, :4], torch.float32)


@pytest.mark.parametrize("largest", [True, False])
def test_nan_comes_first(largest, selecting):
    x, y = torch.randn(5, 8), torch.randn(20, 8)
    y[[3, 17], 2] = torch.nan
    values, columns = row_select(x, y, 3, largest=largest)
    assert torch.equal(columns[:, :2], torch.tensor([[3, 17]]).expand(5, 2))
    assert values[:, :2].isnan().all()
    assert values[:, 2].isfinite().all()
    # but a pair that is not allowed does not
    values, _ = row_select(x, y, 3, largest=largest, x_ids=torch.zeros(5).long(), y_ids=y[:, 2].isfinite().long())
    assert values.isfinite().all()


def test_no_rows_or_no_columns(selecting):
    for n, m in ((0, 5), (5, 0), (0, 0)):
        values, columns = row_select(torch.randn(n, 4), torch.randn(m, 4), 3)
        assert values.shape == columns.shape == (n, 3)
        assert (values == -math.inf).all()
        assert (columns == -1).all()


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


def test_the_matrix_is_not_stored(selecting):
    """200 rows against 20,000 fill four chunks: no tensor is larger than a chunk."""
    x, y = torch.randn(200, 2), torch.randn(20_000, 2)
    with Largest() as largest:
        row_select(x, y, 3)
    assert largest.elements <= torch_backend.CHUNK_ELEMENTS * 1.01


NEAR = [
    pytest.param(shape, dtype, id=f"{shape_id(shape)}-{dtype_id(dtype)}")
    for shape in ((65, 129, 24), (300, 1100, 100), (520, 70, 7))
    for dtype in (torch.float32, torch.float64, torch.bfloat16)
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize(("shape", "dtype"), NEAR)
def test_a_sweep_drops_what_was_selected(shape, dtype, largest, threads, selecting, backend):
    """Rows that all but coincide, ordered by roundings: both sweeps compare the bits of the selection."""
    if "select" not in BACKENDS[backend].operators or not supports(backend, dtype):
        pytest.skip(f"{backend} does not select, or not in {dtype}")
    (n, m, d), k = shape, 9
    spread = 8 * torch.finfo(dtype).eps
    x, y = (F.normalize(1 + spread * torch.randn(rows, d, dtype=torch.float64), dim=1).to(dtype) for rows in (n, m))
    with thread_count(threads):
        for other, columns in ((y, m), (None, n)):
            cutoff = selecting_cutoff(x, other, k, largest=largest)
            values, _ = row_select(x, other, columns, largest=largest)
            kept = (values <= cutoff[:, None]).sum(1)
            differ = values[:, k - 1] != values[:, k]
            assert (kept[differ] == (columns - k if largest else k)).all()
            counted = similarity_sum(x, other, term=Count(), cutoff=cutoff)
            assert torch.equal(counted, kept.to(counted.dtype))
            # the weights of a row's kept pairs add up to 1
            bias = torch.zeros(columns, dtype=counted.dtype, requires_grad=True)
            similarity_logsumexp(x, other, scale=1.0, y_bias=bias, cutoff=cutoff).sum().backward()
            assert bias.grad.sum().item() == pytest.approx((kept > 0).sum().item(), rel=1e-5)


def f(*shape):
    return torch.randn(*shape)


BAD = {
    "k of a bool": (lambda: row_select(f(8, 16), k=True), TypeError, "k must be an integer"),
    "k of nothing": (lambda: row_select(f(8, 16), k=0), ValueError, "k 0 must be at least 1"),
    "dimensions": (
        lambda: row_select(f(8, 16), f(9, 15)),
        ValueError,
        "x (8, 16) and y (9, 15) must have the same last dimension",
    ),
    "one of two ids": (
        lambda: row_select(f(8, 16), f(9, 16), x_ids=torch.zeros(8).long()),
        ValueError,
        "y_ids is not",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert message in str(caught.value)
