"""Quick-Thoughts: contexts, the zero diagonal, raw logits; test_every_loss.py has what it shares with other losses."""

import math

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
import python_ref
from contrastive_kernels.losses import quick_thoughts as module
from tests.support.losses import assert_module_is_function, assert_refused
from tests.support.testing import BAND, check, device_of, differentiate
from tests.support.variants import EVERY, quick_thoughts

SHAPE = (65, 129, 24)
CASE = EVERY["quick_thoughts-raw"]


def sentences(backend, n=SHAPE[0]):
    return CASE.features((n, n, SHAPE[2]), torch.float32, device_of(backend))


def test_the_order_of_sentences_is_data(backend):
    """I17 permutation: the exception."""
    x = sentences(backend)
    order = torch.randperm(65).to(device_of(backend))
    loss, permuted = (
        ck.quick_thoughts_loss(*(t[i] for t in x.values()), backend=backend) for i in (slice(None), order)
    )
    assert abs(loss - permuted) > 1e-2


def test_large_dot_products(backend, poison):
    """Logits of several hundred, where exponentials overflow."""
    x = {name: 20 * t for name, t in sentences(backend).items()}
    for diagonal in ("zero", "exclude"):
        ours = differentiate(lambda **x: ck.quick_thoughts_loss(**x, diagonal=diagonal, backend=backend), x)  # noqa: B023
        reference = differentiate(
            lambda **x: python_ref.quick_thoughts_loss(**x, diagonal=diagonal),  # noqa: B023
            {k: v.cpu().double() for k, v in x.items()},
        )
        assert reference.value > 500
        # a logit of 1e4 in float32 is known to 1e-3, and so are its exponentials
        torch.testing.assert_close(ours.value.cpu().double(), reference.value, rtol=1e-6, atol=0)
        for name, gradient in ours.gradients.items():
            torch.testing.assert_close(gradient.cpu().double(), reference.gradients[name], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"polarization": BAND}], ids=str)
@pytest.mark.parametrize("n", [2, 3, 5])
def test_every_sentence_is_a_neighbour(n, options, backend, poison):
    """The context reaches beyond the text; the band has no pairs left."""
    for diagonal in ("zero", "exclude"):
        case = quick_thoughts(context_size=7, diagonal=diagonal)
        ours, _ = check(case, (n, 0, 24), torch.float32, backend, reduction="none", **options)
        if "polarization" in options:
            plain, _ = check(case, (n, 0, 24), torch.float32, backend, reduction="none")
            assert ours.value.shape == plain.value.shape
    x = sentences(backend, n)
    without = ck.quick_thoughts_loss(**x, context_size=7, backend=backend)
    strong = ck.Polarization(weight=1e8)
    polarized = ck.quick_thoughts_loss(**x, context_size=7, polarization=strong, backend=backend)
    torch.testing.assert_close(polarized, without, rtol=5e-7, atol=0)  # two sweeps, and one visit of the rows


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "unit"])
@pytest.mark.parametrize("diagonal", ["zero", "exclude"])
def test_neighbours_with_equal_ids_stay(diagonal, normalize, backend, poison):
    """Two sentences an id, so that neighbours share it; and one id for all, which leaves the neighbours alone."""
    case = quick_thoughts(diagonal=diagonal, normalize=normalize)
    for ids in (torch.arange(65) // 2, torch.zeros(65, dtype=torch.int64)):
        for options in ({}, {"label_smoothing": 0.1, "context_size": 2}, {"polarization": BAND}):
            check(case, SHAPE, torch.float32, backend, ids=ids, reduction="none", **options)


def test_the_polarization_is_that_of_unit_rows(backend):
    """Whatever the length of the rows and the scale; one sweep if the rows are unit anyway."""
    x = sentences(backend)
    extra = []
    for factor, normalize in ((1.0, False), (3.0, False), (1.0, True)):
        scaled = {name: factor * t for name, t in x.items()}
        options = dict(normalize=normalize, temperature=30.0, backend=backend)
        plain = ck.quick_thoughts_loss(**scaled, **options)
        extra.append(ck.quick_thoughts_loss(**scaled, **options, polarization=ck.Polarization(weight=50.0)) - plain)
    assert extra[0] > 0.1
    torch.testing.assert_close(extra[1], extra[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(extra[2], extra[0], rtol=1e-4, atol=1e-6)


def test_sweeps_are_counted(monkeypatch, backend):
    """Raw rows with a polarization take a second sweep."""
    calls = []

    def counted(*arguments, **options):
        calls.append(arguments)
        return sweep_negatives(*arguments, **options)

    sweep_negatives = module.sweep_negatives
    monkeypatch.setattr(module, "sweep_negatives", counted)
    x = sentences(backend)
    counts = []
    for options in ({"polarization": BAND, "normalize": True}, {"polarization": BAND}):
        ck.quick_thoughts_loss(**x, **options, backend=backend)
        counts.append(len(calls))
        calls.clear()
    assert counts == [1, 2]


@pytest.mark.parametrize(
    "options",
    [{"context_size": 2, "diagonal": "exclude"}, {"polarization": BAND, "normalize": True}],
    ids=["plain", "polarized"],
)
@pytest.mark.parametrize("with_ids", [False, True], ids=["all", "ids"])
def test_module_is_its_function(with_ids, options, backend):
    inputs = torch.randn(2, 12, 8, device=device_of(backend)).unbind()
    ids = {"ids": torch.arange(12, device=inputs[0].device) // 2} if with_ids else {}
    assert_module_is_function(ck.QuickThoughtsLoss, ck.quick_thoughts_loss, inputs, options, backend, **ids)


X = torch.ones(8, 16)


def loss(**options):
    return ck.quick_thoughts_loss(X, X, **options)


BAD = {
    "rows": (
        lambda: ck.quick_thoughts_loss(X, X[:7]),
        ValueError,
        "first (8, 16) and second (7, 16) must have the same first dimension",
    ),
    "one sentence": (
        lambda: ck.quick_thoughts_loss(X[:1], X[:1]),
        ValueError,
        "first (1, 16) must have at least 2 rows",
    ),
    "no sentence": (lambda: ck.quick_thoughts_loss(X[:0], X[:0]), ValueError, "first (0, 16) is an empty batch"),
    "no context": (lambda: loss(context_size=0), ValueError, "context_size 0 must be at least 1"),
    "half a context": (lambda: loss(context_size=1.5), TypeError, "context_size must be an int"),
    "diagonal": (lambda: loss(diagonal="one"), ValueError, "diagonal 'one' is unknown"),
    "ids": (lambda: loss(ids=torch.arange(9)), ValueError, "ids (9,) must have shape (8,)"),
    "float ids": (lambda: loss(ids=torch.ones(8)), TypeError, "ids has dtype torch.float32"),
    "reduction": (lambda: loss(reduction="row"), ValueError, "reduction 'row' is unknown"),
    "weight": (lambda: loss(weight=torch.ones(9)), ValueError, "weight (9,) must have shape (8,)"),
    "scales": (lambda: loss(temperature=1.0, logit_scale=1.0), ValueError, "temperature and log"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    assert_refused(*BAD[name])


def test_reference_by_hand():
    """Three sentences with the dot products 0 1 2 / 3 4 5 / 6 7 8, T = 1."""
    first, second = torch.eye(3).double(), torch.arange(9.0).reshape(3, 3).T.double()
    e = math.exp
    zero = [
        math.log(1 + e(1) + e(2)) - 1,
        math.log(e(3) + 1 + e(5)) - 4,
        math.log(e(6) + e(7) + 1) - 7,
    ]
    exclude = [math.log(e(1) + e(2)) - 1, math.log(e(3) + e(5)) - 4, math.log(e(6) + e(7)) - 7]
    for diagonal, expected in (("zero", zero), ("exclude", exclude)):
        losses = python_ref.quick_thoughts_loss(first, second, diagonal=diagonal, reduction="none")
        assert losses.tolist() == pytest.approx(expected, rel=1e-12)
    # all others are neighbours: the mean of both logits
    losses = python_ref.quick_thoughts_loss(first, second, context_size=2, reduction="none")
    assert losses.tolist() == pytest.approx([zero[0] - 0.5, zero[1], zero[2] + 0.5], rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_reference_is_cross_entropy(smoothing):
    x, y = torch.randn(2, 9, 5).double()
    logits = (x @ y.T).fill_diagonal_(0)
    distance = (torch.arange(9)[:, None] - torch.arange(9)).abs()
    targets = ((distance > 0) & (distance <= 2)).double()
    expected = F.cross_entropy(logits, targets / targets.sum(1, keepdim=True), label_smoothing=smoothing)
    loss = python_ref.quick_thoughts_loss(x, y, context_size=2, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)
