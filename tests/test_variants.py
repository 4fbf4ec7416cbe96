"""Decoupled loss and Quick-Thoughts: values, gradients and options against the reference."""

import copy
import math
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from testing import (
    BAND,
    Case,
    assert_matches,
    assert_outcomes_match,
    case_params,
    check,
    check_statistics,
    device_of,
    differentiate,
    grid_params,
    matching_ids,
    option_params,
    precise,
    shape_id,
    supports,
    two,
)

import contrastive_kernels as ck
import python_ref
from contrastive_kernels.functional import variants
from contrastive_kernels.functional.variants import decoupled_loss, quick_thoughts_loss
from contrastive_kernels.modules.variants import DecoupledLoss, QuickThoughtsLoss
from python_ref import decoupled_loss as decoupled_reference
from python_ref import quick_thoughts_loss as quick_thoughts_reference

SHAPE = (65, 129, 24)
FUNCTIONS = {
    "decoupled_loss": (decoupled_loss, decoupled_reference),
    "quick_thoughts_loss": (quick_thoughts_loss, quick_thoughts_reference),
}


def mises_fisher(z0, z1):
    """The weights of the paper, for sigma = 0.5."""
    return 2 - len(z0) * ((z0 * z1).sum(1) / 0.5).softmax(0)


@dataclass(frozen=True)
class Variant(Case):
    def __call__(self, module, features, **options):
        function = FUNCTIONS[self.loss][module is python_ref]
        return function(**{**self.options, **options, **features})


DECOUPLED = {
    "decoupled": Variant("decoupled_loss", two("z0", "z1")),
    "decoupled-weighted": Variant("decoupled_loss", two("z0", "z1"), {"positive_weight": mises_fisher}),
}
QUICK_THOUGHTS = {
    "quick_thoughts": Variant("quick_thoughts_loss", two("first", "second")),
    "quick_thoughts-3": Variant("quick_thoughts_loss", two("first", "second"), {"context_size": 3}),
    "quick_thoughts-exclude": Variant("quick_thoughts_loss", two("first", "second"), {"diagonal": "exclude"}),
    "quick_thoughts-polarized": Variant("quick_thoughts_loss", two("first", "second"), {"polarization": BAND}),
    "quick_thoughts-unit": Variant(
        "quick_thoughts_loss", two("first", "second"), {"normalize": True, "polarization": BAND, "context_size": 2}
    ),
}
CASES = {**DECOUPLED, **QUICK_THOUGHTS}
OPTIONS = (
    "mean",
    "tensor scale",
    "tensor temperature",
    "negative scale",
    "other rows",
    "weight",
    "weight, none",
    "ids",
    "label smoothing",
    "label smoothing, ids",
)
CUTOFFS = ("cutoff", "cutoff per anchor", "cutoff margin", "label smoothing of survivors")


def enough(case, shape):
    """A sentence needs a neighbour."""
    return (max(shape[0], 2), *shape[1:]) if "first" in case.shapes(1, 1, 1) else shape


@pytest.mark.parametrize(("shape", "dtype"), grid_params())
@pytest.mark.parametrize("case", case_params(CASES))
def test_loss_and_gradients(case, shape, dtype, backend, poison):
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    check(case, enough(case, shape), dtype, backend, reduction="none")


@pytest.mark.parametrize(("case", "options"), option_params(CASES, OPTIONS) + option_params(DECOUPLED, CUTOFFS))
def test_options(case, options, backend, poison):
    check(case, SHAPE, torch.float32, backend, **options(case, *SHAPE[:2]))


@pytest.mark.parametrize("with_ids", [False, True], ids=["all", "ids"])
@pytest.mark.parametrize("shape", [(1, 1, 24), SHAPE], ids=shape_id)
@pytest.mark.parametrize("case", case_params(DECOUPLED))
def test_statistics(case, shape, with_ids, backend, poison):
    options = matching_ids(case, *shape[:2]) if with_ids else {}
    check_statistics(case, shape, torch.float32, backend, **options)
    check_statistics(case, shape, torch.float32, backend, cutoff_margin=0.1, reduction="none", **options)


def test_the_references_by_hand():
    """Two orthogonal pairs at T = 1; three sentences with the dot products 0 1 2 / 3 4 5 / 6 7 8."""
    eye = torch.eye(2).double()
    assert decoupled_reference(eye, eye, temperature=1.0).item() == pytest.approx(math.log(2) - 1, rel=1e-12)
    first, second = torch.eye(3).double(), torch.arange(9.0).reshape(3, 3).T.double()
    e = math.exp
    zero = [
        math.log(1 + e(1) + e(2)) - 1,
        math.log(e(3) + 1 + e(5)) - 4,
        math.log(e(6) + e(7) + 1) - 7,
    ]
    exclude = [math.log(e(1) + e(2)) - 1, math.log(e(3) + e(5)) - 4, math.log(e(6) + e(7)) - 7]
    for diagonal, expected in (("zero", zero), ("exclude", exclude)):
        losses = quick_thoughts_reference(first, second, diagonal=diagonal, reduction="none")
        assert losses.tolist() == pytest.approx(expected, rel=1e-12)
    # all others are neighbours: the mean of both logits
    losses = quick_thoughts_reference(first, second, context_size=2, reduction="none")
    assert losses.tolist() == pytest.approx([zero[0] - 0.5, zero[1], zero[2] + 0.5], rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_quick_thoughts_reference_is_cross_entropy(smoothing):
    x, y = torch.randn(2, 9, 5).double()
    logits = (x @ y.T).fill_diagonal_(0)
    distance = (torch.arange(9)[:, None] - torch.arange(9)).abs()
    targets = ((distance > 0) & (distance <= 2)).double()
    expected = F.cross_entropy(logits, targets / targets.sum(1, keepdim=True), label_smoothing=smoothing)
    loss = quick_thoughts_reference(x, y, context_size=2, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)


def test_the_decoupled_reference_is_nt_xent_without_the_positive():
    z0, z1 = torch.randn(2, 9, 5).double()
    z = F.normalize(torch.cat([z0, z1]))
    logits = z @ z.T / 0.1
    positive = torch.cat([logits.diagonal(9), logits.diagonal(-9)])
    sample = torch.arange(18) % 9
    expected = logits.masked_fill(sample[:, None] == sample, -math.inf).logsumexp(1) - positive
    torch.testing.assert_close(decoupled_reference(z0, z1, reduction="none"), expected)


def both(case, shape=SHAPE, backend="torch", dtype=torch.float32):
    return case.features(shape, dtype, device_of(backend))


def test_decoupled_is_nt_xent_without_its_softplus(backend):
    """log(1 + e^x) of the decoupled loss x is NT-Xent."""
    z = both(DECOUPLED["decoupled"], backend=backend)
    losses = decoupled_loss(**z, temperature=0.3, reduction="none", backend=backend)
    expected = ck.nt_xent_loss(**z, temperature=0.3, reduction="none", backend=backend)
    torch.testing.assert_close(losses.exp().log1p(), expected, rtol=1e-5, atol=1e-6)


def test_positive_weight_as_a_tensor_and_as_a_callable(backend):
    """Of unit views; without a gradient; 1 is none at all."""
    case = DECOUPLED["decoupled"]
    z = both(case, backend=backend)
    weights = mises_fisher(*(F.normalize(x, dim=1) for x in z.values()))
    options = dict(reduction="none", backend=backend)
    called = differentiate(lambda **z: decoupled_loss(**z, positive_weight=mises_fisher, **options), z)
    given = differentiate(lambda **z: decoupled_loss(**z, positive_weight=weights, **options), z)
    assert_outcomes_match(called, given, torch.float32, 10.0)
    plain = differentiate(lambda **z: decoupled_loss(**z, **options), z)
    ones = differentiate(lambda **z: decoupled_loss(**z, positive_weight=torch.ones_like(weights), **options), z)
    assert_outcomes_match(ones, plain, torch.float32)
    assert not torch.allclose(called.value, plain.value)
    check(case, SHAPE, torch.float32, backend, positive_weight=torch.rand(65).double(), label_smoothing=0.1)


@pytest.mark.parametrize("name", ["decoupled", "quick_thoughts", "quick_thoughts-exclude"])
def test_the_gradient_of_the_scale_is_that_of_the_rows(name, backend):
    """dL/dlog a = <X, dX> = <Y, dY> of two operands, half of <Z, dZ> of one."""
    case = CASES[name]
    leaves = both(case, (40, 0, 12), backend, precise(backend))
    leaves = {k: F.normalize(x, dim=1).requires_grad_() for k, x in leaves.items()}
    scale = torch.tensor(3.0, dtype=precise(backend), device=device_of(backend), requires_grad=True)
    loss = case(ck, leaves, logit_scale=scale, normalize=False, backend=backend)
    *gradients, of_scale = torch.autograd.grad(loss, [*leaves.values(), scale])
    inner = [(x * g).sum() for x, g in zip(leaves.values(), gradients, strict=True)]
    expected = [sum(inner) / 2] if name == "decoupled" else inner
    for value in expected:
        torch.testing.assert_close(3.0 * of_scale, value, rtol=1e-4, atol=1e-6)


def test_the_order_of_sentences_is_data(backend):
    x = both(QUICK_THOUGHTS["quick_thoughts"], backend=backend)
    z = both(DECOUPLED["decoupled"], backend=backend)
    order = torch.randperm(65).to(device_of(backend))
    loss, permuted = (quick_thoughts_loss(*(t[i] for t in x.values()), backend=backend) for i in (slice(None), order))
    assert abs(loss - permuted) > 1e-2
    losses = [decoupled_loss(*(t[i] for t in z.values()), backend=backend) for i in (slice(None), order)]
    assert_matches(losses[1], losses[0].double(), torch.float32)


def test_large_dot_products(backend, poison):
    """Logits of several hundred, where exponentials overflow."""
    x = {name: 20 * t for name, t in both(QUICK_THOUGHTS["quick_thoughts"], backend=backend).items()}
    for diagonal in ("zero", "exclude"):
        ours = differentiate(lambda **x: quick_thoughts_loss(**x, diagonal=diagonal, backend=backend), x)  # noqa: B023
        reference = differentiate(
            lambda **x: quick_thoughts_reference(**x, diagonal=diagonal),  # noqa: B023
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
        case = Variant("quick_thoughts_loss", two("first", "second"), {"context_size": 7, "diagonal": diagonal})
        ours, _ = check(case, (n, 0, 24), torch.float32, backend, reduction="none", **options)
        if "polarization" in options:
            plain, _ = check(case, (n, 0, 24), torch.float32, backend, reduction="none")
            assert ours.value.shape == plain.value.shape
    x = both(QUICK_THOUGHTS["quick_thoughts"], (n, 0, 24), backend)
    without = quick_thoughts_loss(**x, context_size=7, backend=backend)
    strong = ck.Polarization(weight=1e8)
    assert torch.equal(quick_thoughts_loss(**x, context_size=7, polarization=strong, backend=backend), without)


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "unit"])
@pytest.mark.parametrize("diagonal", ["zero", "exclude"])
def test_neighbours_with_equal_ids_stay(diagonal, normalize, backend, poison):
    """Two sentences an id, so that neighbours share it; and one id for all, which leaves the neighbours alone."""
    case = Variant("quick_thoughts_loss", two("first", "second"), {"diagonal": diagonal, "normalize": normalize})
    for ids in (torch.arange(65) // 2, torch.zeros(65, dtype=torch.int64)):
        for options in ({}, {"label_smoothing": 0.1, "context_size": 2}, {"polarization": BAND}):
            check(case, SHAPE, torch.float32, backend, ids=ids, reduction="none", **options)


def test_the_polarization_of_quick_thoughts_is_that_of_unit_rows(backend):
    """Whatever the length of the rows and the scale; one sweep if the rows are unit anyway."""
    x = both(QUICK_THOUGHTS["quick_thoughts"], backend=backend)
    extra = []
    for factor, normalize in ((1.0, False), (3.0, False), (1.0, True)):
        scaled = {name: factor * t for name, t in x.items()}
        options = dict(normalize=normalize, temperature=30.0, backend=backend)
        plain = quick_thoughts_loss(**scaled, **options)
        extra.append(quick_thoughts_loss(**scaled, **options, polarization=ck.Polarization(weight=50.0)) - plain)
    assert extra[0] > 0.1
    torch.testing.assert_close(extra[1], extra[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(extra[2], extra[0], rtol=1e-4, atol=1e-6)


def test_sweeps_are_counted(monkeypatch, backend):
    calls = []

    def counted(*arguments, **options):
        calls.append(arguments)
        return swept(*arguments, **options)

    swept = variants.swept
    monkeypatch.setattr(variants, "swept", counted)
    x = both(QUICK_THOUGHTS["quick_thoughts"], backend=backend)
    counts = []
    for options in ({}, {"polarization": BAND, "normalize": True}, {"polarization": BAND}):
        quick_thoughts_loss(**x, **options, backend=backend)
        counts.append(len(calls))
        calls.clear()
    assert counts == [1, 1, 2]


@pytest.mark.parametrize("case", case_params(DECOUPLED))
def test_anchors_without_negatives_lose_nothing(case, backend, poison):
    """Equal ids, a cutoff below everything, a single sample."""
    features = both(case, backend=backend)
    single = {name: x[:1] for name, x in features.items()}
    ids = torch.zeros(SHAPE[0], dtype=torch.int64, device=device_of(backend))
    for tensors, options in ((features, {"ids": ids}), (features, {"cutoff": -2.0}), (single, {})):
        for smoothing in (0.0, 0.1):
            out = differentiate(
                lambda **t: case(ck, t, **options, label_smoothing=smoothing, reduction="none", backend=backend),  # noqa: B023
                tensors,
            )
            # the sums that smoothing takes cancel to a rounding
            bound = 1e-4 if smoothing else 0.0
            for x in (out.value, *out.gradients.values()):
                assert x.nan_to_num(1.0).abs().max() <= bound
        _, stats = case(ck, tensors, **options, return_stats=True, backend=backend)
        assert stats.accuracy == 1
        assert stats.lse.isneginf().all()


@pytest.mark.parametrize("case", case_params(CASES))
def test_nan_and_infinity_give_nan(case, backend):
    for bad in (math.nan, math.inf):
        for name in case.shapes(*SHAPE):
            features = both(case, backend=backend)
            features[name][3, 7] = bad
            assert case(ck, features, normalize=True, backend=backend).isnan(), f"{bad} in {name}"


@pytest.mark.parametrize("case", case_params(CASES))
def test_zero_rows_have_zero_gradients(case, backend):
    features = both(case, backend=backend)
    for x in features.values():
        x[3] = 0
    ours = differentiate(lambda **t: case(ck, t, normalize=True, reduction="none", backend=backend), features)
    reference = differentiate(
        lambda **t: case(python_ref, t, normalize=True, reduction="none"),
        {k: v.cpu().double() for k, v in features.items()},
    )
    assert_outcomes_match(ours, reference, torch.float32, 20.0)
    for gradient in ours.gradients.values():
        assert not gradient[3].any()
        assert gradient[4].any()


@pytest.mark.parametrize("case", case_params(CASES))
def test_inputs_stay_as_they_were_and_bits_repeat(case, backend, poison):
    features = both(case, backend=backend)
    before = {k: v.clone() for k, v in features.items()}
    strided = {k: v.T.contiguous().T for k, v in features.items()}

    def run(features):
        return differentiate(lambda **t: case(ck, t, backend=backend), features)

    first, again = run(features), run(features)
    assert all(torch.equal(before[k], features[k]) for k in features)
    assert torch.equal(first.value, again.value)
    assert all(torch.equal(first.gradients[k], again.gradients[k]) for k in features)
    # the norms are summed in another order there
    assert_outcomes_match(run(strided), first, torch.float32, 1.0)


@pytest.mark.parametrize("case", case_params(CASES))
def test_unneeded_gradients_are_not_computed(case, backend):
    features = both(case, backend=backend)
    full = differentiate(lambda **t: case(ck, t, backend=backend), features).gradients
    for name in features:
        alone = differentiate(
            lambda **t: case(ck, {**features, **t}, backend=backend),
            {name: features[name]},
        )
        torch.testing.assert_close(alone.gradients[name], full[name], rtol=1e-5, atol=1e-6)
    assert not case(ck, features, backend=backend).requires_grad


@pytest.mark.parametrize("name", ["decoupled", "quick_thoughts-exclude", "quick_thoughts-polarized"])
def test_gradcheck(name, backend):
    """All but the weighted positives, whose gradient is not that of the value."""
    if not supports(backend, torch.float64):
        pytest.skip(f"{backend} does not take float64")
    case = CASES[name]
    names = case.shapes(1, 1, 1)
    inputs = [torch.randn(5, 3, dtype=torch.float64, device=device_of(backend)) for _ in names]
    inputs.append(torch.tensor(0.7, dtype=torch.float64, device=device_of(backend)))

    def loss(first, second, scale):
        tensors = dict(zip(names, (first, second), strict=True))
        return case(ck, tensors, logit_scale=scale, label_smoothing=0.1, backend=backend)

    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize(
    ("module", "function", "options"),
    [
        (DecoupledLoss, decoupled_loss, {"temperature": 0.3, "label_smoothing": 0.1}),
        (DecoupledLoss, decoupled_loss, {"positive_weight": mises_fisher, "reduction": "none"}),
        (QuickThoughtsLoss, quick_thoughts_loss, {"context_size": 2, "diagonal": "exclude"}),
        (QuickThoughtsLoss, quick_thoughts_loss, {"polarization": BAND, "normalize": True}),
    ],
    ids=["decoupled", "decoupled-weighted", "quick_thoughts", "quick_thoughts-polarized"],
)
def test_module_is_its_function(module, function, options, backend):
    inputs = torch.randn(2, 12, 8, device=device_of(backend)).unbind()
    loss = module(**options, backend=backend)
    ids = torch.arange(12, device=inputs[0].device) // 2
    assert torch.equal(loss(*inputs), function(*inputs, **options, backend=backend))
    assert torch.equal(loss(*inputs, ids=ids), function(*inputs, **options, ids=ids, backend=backend))
    again = pickle.loads(pickle.dumps(copy.deepcopy(loss)))
    assert torch.equal(again(*inputs), loss(*inputs))
    for option, value in options.items():
        assert f"{option}={value}" in repr(loss)


def test_lmcl_of_quick_thoughts(backend):
    inputs = torch.randn(2, 12, 8, device=device_of(backend)).unbind()
    loss = ck.LMCLLoss("quick_thoughts", lower=0.2, upper=0.7, weight=2.0, context_size=2, backend=backend)
    band = ck.Polarization(0.2, 0.7, 2.0)
    expected = quick_thoughts_loss(*inputs, context_size=2, polarization=band, backend=backend)
    assert torch.equal(loss(*inputs), expected)
    assert expected > quick_thoughts_loss(*inputs, context_size=2, backend=backend)


X = torch.ones(8, 16)
BAD = {
    "decoupled rows": (lambda: decoupled_loss(X, X[:7]), ValueError, "z0 (8, 16) and z1 (7, 16) must have the same"),
    "decoupled empty": (lambda: decoupled_loss(X[:0], X[:0]), ValueError, "z0 (0, 16) is an empty batch"),
    "decoupled dtypes": (lambda: decoupled_loss(X, X.double()), TypeError, "z0 is torch.float32 and z1"),
    "weight too long": (
        lambda: decoupled_loss(X, X, positive_weight=torch.ones(16)),
        ValueError,
        "positive_weight (16,) must have shape (8,)",
    ),
    "weight too short": (
        lambda: decoupled_loss(X, X, positive_weight=lambda z0, z1: z0[:7, 0]),
        ValueError,
        "positive_weight (7,) must have shape (8,)",
    ),
    "weight a number": (lambda: decoupled_loss(X, X, positive_weight=2.0), TypeError, "positive_weight must be a ten"),
    "decoupled smoothing": (lambda: decoupled_loss(X, X, label_smoothing=2), ValueError, "label_smoothing 2"),
    "both cutoffs": (lambda: decoupled_loss(X, X, cutoff=0.1, cutoff_margin=0.1), ValueError, "cutoff and cutoff_m"),
    "temperature": (lambda: decoupled_loss(X, X, temperature=0.0), ValueError, "temperature 0.0"),
    "sentences": (
        lambda: quick_thoughts_loss(X, X[:7]),
        ValueError,
        "first (8, 16) and second (7, 16) must have the same first dimension",
    ),
    "one sentence": (lambda: quick_thoughts_loss(X[:1], X[:1]), ValueError, "first (1, 16) must have at least two"),
    "no sentence": (lambda: quick_thoughts_loss(X[:0], X[:0]), ValueError, "first (0, 16) must have at least two"),
    "no context": (lambda: quick_thoughts_loss(X, X, context_size=0), ValueError, "context_size 0 must be at least 1"),
    "half a context": (lambda: quick_thoughts_loss(X, X, context_size=1.5), TypeError, "context_size must be an int"),
    "diagonal": (lambda: quick_thoughts_loss(X, X, diagonal="one"), ValueError, "diagonal 'one' is unknown"),
    "ids": (lambda: quick_thoughts_loss(X, X, ids=torch.arange(9)), ValueError, "ids (9,) must have shape (8,)"),
    "float ids": (lambda: quick_thoughts_loss(X, X, ids=torch.ones(8)), TypeError, "ids has dtype torch.float32"),
    "reduction": (lambda: quick_thoughts_loss(X, X, reduction="row"), ValueError, "reduction 'row' is unknown"),
    "weight": (lambda: quick_thoughts_loss(X, X, weight=torch.ones(9)), ValueError, "weight (9,) must have shape (8,)"),
    "scales": (lambda: quick_thoughts_loss(X, X, temperature=1.0, logit_scale=1.0), ValueError, "temperature and log"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
