"""The total of a softmax from one visit of the rows: values, gradients, the same bits, where two sweeps take over."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import contrastive_kernels as ck
from contrastive_kernels.engine.backends import BACKENDS
from contrastive_kernels.engine.operators import operator
from contrastive_kernels.engine.spec import Description, Inputs
from contrastive_kernels.primitives import Pairs, softmax_total
from tests.support.testing import (
    Outcome,
    assert_outcomes_match,
    device_of,
    differentiate,
    dtype_id,
    shape_id,
    supports,
    thread_count,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# one row, few columns, several strips of rows and tiles of columns, a tall strip where the columns have no gradient
SHAPES = [(1, 1, 1), (3, 130, 5), (257, 65, 33), (600, 1100, 24), (1100, 300, 16)]
OPTIONS = ("all", "ids", "diagonal", "cutoff", "self", "ids and cutoff", "one id", "cold", "negative")


@pytest.fixture(autouse=True)
def one_visit(backend):
    if "softmax_total" not in BACKENDS[backend].operators:
        pytest.skip(f"{backend} takes two sweeps")


def tensors_of(shape, dtype, device, temperature=0.1):
    """Return x, y, scale and what stands beside each row, with a few rows of y that are rows of x."""
    n, m, d = shape
    x, y = (F.normalize(torch.randn(rows, d, dtype=torch.float64), dim=1) for rows in (n, m))
    y[: min(n, m) // 2] = x[: min(n, m) // 2]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    small = torch.tensor(1 / temperature, dtype=wide), torch.randn(n, dtype=wide), torch.rand(n, dtype=wide)
    return [t.to(device) for t in (x.to(dtype), y.to(dtype), *small)]


def pairs_of(options, n, m, device):
    x_ids, y_ids = (torch.arange(k, device=device) % 7 for k in (n, m))
    cutoff = torch.linspace(0.1, 0.6, n, device=device)
    return {
        "ids": Pairs(x_ids, y_ids),
        "diagonal": Pairs(diagonals=1),
        "cutoff": Pairs(cutoff=cutoff),
        "self": Pairs(x_ids, cutoff=cutoff),
        "ids and cutoff": Pairs(x_ids, y_ids, cutoff),
        "one id": Pairs(0 * x_ids + (x_ids == 1), 0 * y_ids),  # rows without any pair
    }.get(options, Pairs())


def dense(x, y, scale, own, weight, pairs, similarities):
    """Return the total from the whole matrix; the cutoff compares `similarities`."""
    y = x if y is None else y
    dropped = torch.zeros(x.shape[0], y.shape[0], dtype=torch.bool, device=x.device)
    if pairs.x_ids is not None:
        dropped |= pairs.x_ids[:, None] == (pairs.x_ids if pairs.y_ids is None else pairs.y_ids)
    if pairs.diagonals:
        dropped |= torch.eye(*dropped.shape, dtype=torch.bool, device=x.device)
    if pairs.cutoff is not None:
        dropped |= similarities > pairs.cutoff[:, None]
    logits = (scale * (x @ y.T)).masked_fill(dropped, -torch.inf)
    nothing = dropped.all(1)
    lse = logits.masked_fill(nothing[:, None], 0).logsumexp(1).masked_fill(nothing, -torch.inf)
    return (weight * torch.logaddexp(lse - own, torch.zeros_like(own))).sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    ("shape", "options"),
    [*((shape, "all") for shape in SHAPES), *(((300, 700, 24), options) for options in OPTIONS[1:])],
    ids=str,
)
def test_values_and_gradients(shape, options, dtype, backend, poison):
    """I18 closed gradient: those of the whole matrix in float64, on one thread and on two."""
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    n, m, _ = shape
    device = device_of(backend)
    temperature = {"cold": 0.003, "negative": -0.1}.get(options, 0.1)
    x, y, scale, own, weight = tensors_of(shape, dtype, device, temperature)
    itself = options == "self"
    pairs = pairs_of(options, n, n if itself else m, device)
    tensors = {"x": x, "scale": scale, "own": own} if itself else {"x": x, "y": y, "scale": scale, "own": own}

    def ours(x, scale, own, y=None):
        return softmax_total(x, y, pairs, scale=scale, own=own, weight=lambda: weight, backend=backend)

    def expected(x, scale, own, y=None):
        other = (x if y is None else y).detach()
        return dense(x, y, scale, own, weight.to(x.dtype), pairs, (x.detach() @ other.T).to(torch.float64))

    reference = differentiate(expected, {name: t.double() for name, t in tensors.items()})
    for threads in (1, 2) if backend == "cpp" else (1,):
        with thread_count(threads):
            outcome = differentiate(ours, tensors)
            assert all(outcome.gradients[name].dtype == tensors[name].dtype for name in tensors)
            assert_outcomes_match(outcome, reference, dtype, weight.sum().item() * abs(scale.item()))
            again = differentiate(ours, tensors)
            with torch.no_grad():
                value = ours(**tensors)
        assert torch.equal(value, outcome.value) and torch.equal(again.value, outcome.value)
        assert all(torch.equal(again.gradients[name], outcome.gradients[name]) for name in tensors)


@pytest.mark.parametrize("wanted", ["x", "y", "scale", "own"])
def test_only_one_input_needs_a_gradient(wanted, backend, poison):
    """The gradient is the same as beside the others; without that of the columns strips are taller."""
    x, y, scale, own, weight = tensors_of((1100, 130, 24), torch.float32, device_of(backend))
    tensors = {"x": x, "y": y, "scale": scale, "own": own}

    def total(**given):
        return softmax_total(pairs=Pairs(), weight=lambda: weight, backend=backend, **given)

    every = differentiate(total, tensors)
    others = {name: t for name, t in tensors.items() if name != wanted}
    alone = differentiate(lambda **leaf: total(**leaf, **others), {wanted: tensors[wanted]})
    assert torch.equal(alone.value, every.value)
    torch.testing.assert_close(alone.gradients[wanted], every.gradients[wanted], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (0, 0, 4), (3, 2, 0)], ids=shape_id)
def test_empty_inputs(shape, backend, poison):
    """No rows, no columns or no features."""
    x, y, scale, own, weight = tensors_of((*shape[:2], max(shape[2], 1)), torch.float32, device_of(backend))
    x, y = (t[:, : shape[2]] for t in (x, y))
    found = differentiate(
        lambda x, y: softmax_total(x, y, Pairs(), scale=scale, own=own, weight=lambda: weight, backend=backend),
        {"x": x, "y": y},
    )
    expected = dense(x, y, scale, own, weight, Pairs(), None) if shape[1] else torch.zeros_like(found.value)
    torch.testing.assert_close(found.value, expected)
    assert [found.gradients[k].shape for k in "xy"] == [x.shape, y.shape]
    assert not any(found.gradients[k].any() for k in "xy")


@pytest.mark.parametrize("where", ["x", "y", "own", "weight", "dropped"])
def test_nan(where, backend, poison):
    """NaN in, NaN out, but for a dropped pair."""
    x, y, scale, own, weight = tensors_of((300, 70, 8), torch.float32, device_of(backend))
    {"x": x, "y": y, "own": own, "weight": weight}.get(where, y)[-1] = torch.nan
    ids = None
    if where == "dropped":
        x_ids, y_ids = (torch.ones(k, dtype=torch.int64, device=x.device) for k in (300, 70))
        y_ids[:-1] = 0
        ids = x_ids, y_ids
    pairs = Pairs() if ids is None else Pairs(*ids)
    found = differentiate(
        lambda x, scale: softmax_total(x, y, pairs, scale=scale, own=own, weight=lambda: weight, backend=backend),
        {"x": x, "scale": scale},
    )
    if where == "dropped":
        assert found.value.isfinite()
        return
    assert found.value.isnan() and found.gradients["scale"].isnan()
    rows = found.gradients["x"].isnan().all(1)
    assert rows.all() if where == "y" else rows.tolist() == [False] * 299 + [True]


def test_derivatives(backend):
    """First and second derivatives, of the function and of the bare operator, which an exported program calls."""
    options = {"dtype": torch.float64, "device": device_of(backend), "requires_grad": True}
    if not supports(backend, torch.float64):
        pytest.skip(f"{backend} has no float64")
    x, y, scale, own = (torch.rand(shape, **options) for shape in ((4, 3), (5, 3), (), (4,)))
    weight = torch.rand(4, dtype=torch.float64, device=x.device)
    pairs = Pairs(torch.arange(4, device=x.device), torch.arange(5, device=x.device))

    def function(x, y, scale, own):
        return softmax_total(x, y, pairs, scale=scale, own=own, weight=lambda: weight, backend=backend)

    def bare(x, y, scale, own, wanted=(True, True, True)):
        inputs, what = Inputs(x, y, scale, None, *pairs[:2], *[None] * 3), Description((1.0,), False, "", (), False, 0)
        return operator(backend, "softmax_total")(weight, own, *inputs, *what, [*wanted])[-1]

    def exported_without_gradients(*leaves):
        return bare(*leaves, wanted=(False, False, False))

    assert gradcheck(function, (x, y, scale, own))
    assert gradgradcheck(function, (x, y, scale, own))
    expected = torch.autograd.grad(function(x, y, scale, own), (x, y, scale, own))
    for total in (bare, exported_without_gradients):
        gradients = torch.autograd.grad(total(x, y, scale, own), (x, y, scale, own))
        assert all(map(torch.equal, gradients, expected)), total.__name__


class Called(TorchDispatchMode):
    """The names of the package's operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "contrastive_kernels":
            self.names.append(function._schema.name.split("_", 2)[-1])
        return function(*args, **(kwargs or {}))


def called(function):
    with Called() as calls:
        function().backward()
    return {name.removeprefix("kernels::") for name in calls.names}


X, Y, Z = (torch.randn(9, 4, requires_grad=True) for _ in range(3))
LABELS = torch.arange(9) % 3
ONE_DIRECTION = {
    "info_nce": lambda **options: ck.info_nce_loss(X, Y, **options),
    "info_nce with negatives": lambda **options: ck.info_nce_loss(X, Y, Z, **options),
    "moco": lambda **options: ck.moco_loss(X, Y, Z, **options),
    "moco_arcl": lambda **options: ck.moco_arcl_loss(X, torch.stack([Y, Z], 1), Z, **options),
    "nnclr": lambda **options: ck.nnclr_loss(X, Y, Z, **options),
    "nnclr of both": lambda **options: ck.nnclr_loss(torch.stack([X, Y], 1), torch.stack([Y, Z], 1), Z, **options),
    "easy_negative": lambda **options: ck.easy_negative_loss(X, Y, k=3, **options),
    "false_negative": lambda **options: ck.false_negative_loss(X, Y, top_k=2, **options),
    "arcl with a cutoff": lambda **options: ck.arcl_loss(
        torch.stack([X, Y], 1), cutoff=0.5, denominator="positive+one_view", **options
    ),
    "quick_thoughts": lambda **options: ck.quick_thoughts_loss(X, Y, **options),
    "label_pull": lambda **options: ck.label_pull_loss(X, LABELS, Y[:3], form="softmax", **options),
}


@pytest.mark.parametrize("name", ONE_DIRECTION)
def test_one_visit(name, backend):
    """A mean or sum takes no forward and no backward sweep; it is that of the losses of the rows, also with weights."""
    if device_of(backend) != "cpu":
        pytest.skip("these tensors are on the CPU")
    loss = ONE_DIRECTION[name]
    names = called(lambda: loss(backend=backend))
    assert any("softmax_total" in called for called in names), names
    assert not any(called.endswith(("_forward", "_backward")) and "unit_rows" not in called for called in names), names
    weight = torch.linspace(0.1, 1, 9)
    for options in ({}, {"reduction": "sum"}, {"weight": weight}, {"reduction": "sum", "weight": weight}):
        leaves = [t for t in (X, Y) if not (name == "nnclr" and t is X)]
        fused = loss(backend=backend, **options)
        rows = loss(backend=backend, reduction="none", **{k: v for k, v in options.items() if k != "reduction"})
        divisor = 1.0
        if options.get("reduction") != "sum":
            divisor = rows.numel() if "weight" not in options else weight.sum() * rows.numel() / 9
        expected = rows.sum() / divisor
        torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-6)
        ours, theirs = (torch.autograd.grad(v, leaves, allow_unused=True) for v in (fused, expected))
        for mine, other in zip(ours, theirs, strict=True):
            assert (mine is None) == (other is None)
            if mine is not None:
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_two_sweeps(backend):
    """Where one visit is not for, the function says so and the loss takes two sweeps."""
    x, y, scale, own, weight = tensors_of((9, 12, 4), torch.float32, device_of(backend))
    options = {"scale": scale, "own": own, "weight": lambda: weight, "backend": backend}
    assert softmax_total(x, y, Pairs(), **options) is not None
    assert softmax_total(x, None, Pairs(), **options) is None
    assert softmax_total(x, y, Pairs(), **{**options, "weight": lambda: weight.clone().requires_grad_()}) is None
    if supports(backend, torch.float16):
        assert softmax_total(x.half(), y.half(), Pairs(), **options) is None
    ck.set_workspace_limit(4 * 256 * 12 - 1)
    try:
        assert softmax_total(x, y, Pairs(), **options) is None
        found = differentiate(lambda x, y: ck.info_nce_loss(x, y, backend=backend), {"x": x, "y": x + 0.1 * y[:9]})
    finally:
        ck.set_workspace_limit(None)
    expected = differentiate(lambda x, y: ck.info_nce_loss(x, y, backend=backend), {"x": x, "y": x + 0.1 * y[:9]})
    wide = Outcome(expected.value.double(), {k: v.double() for k, v in expected.gradients.items()})
    assert_outcomes_match(found, wide, torch.float32, scale.item())
