"""Debiased and hard-negative losses: values, gradients and options against the reference and against each other."""

import copy
import math
import pickle
from dataclasses import dataclass

import pytest
import torch
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
    errors,
    grid_params,
    matching_ids,
    name_id,
    option_params,
    precise,
    shape_id,
    sizes,
    supports,
    two,
)

import contrastive_kernels as ck
import python_ref
from contrastive_kernels.functional import negatives
from contrastive_kernels.functional.negatives import debiased_loss, hard_negative_loss
from contrastive_kernels.modules.negatives import DebiasedLoss, HardNegativeLoss
from python_ref import debiased_loss as debiased_reference
from python_ref import hard_negative_loss as hard_negative_reference

SHAPE = (65, 129, 24)
FUNCTIONS = {
    "debiased_loss": (debiased_loss, debiased_reference),
    "hard_negative_loss": (hard_negative_loss, hard_negative_reference),
}


@dataclass(frozen=True)
class Negatives(Case):
    def __call__(self, module, features, **options):
        function = FUNCTIONS[self.loss][module is python_ref]
        return function(**{**self.options, **options, **features})


CASES = {
    "debiased": Negatives("debiased_loss", two("z0", "z1")),
    "debiased-floor": Negatives("debiased_loss", two("z0", "z1"), {"tau_plus": 0.6, "temperature": 0.5}),
    "hard": Negatives("hard_negative_loss", two("z0", "z1")),
    "hard-floor": Negatives("hard_negative_loss", two("z0", "z1"), {"tau_plus": 0.6, "beta": 0.5}),
    "hard-detached": Negatives("hard_negative_loss", two("z0", "z1"), {"detach_weights": True, "beta": 2.5}),
    "hard-biased": Negatives("hard_negative_loss", two("z0", "z1"), {"tau_plus": 0.0}),
    "hard-easy": Negatives("hard_negative_loss", two("z0", "z1"), {"estimator": "easy"}),
    "hard-polarized": Negatives("hard_negative_loss", two("z0", "z1"), {"polarization": BAND}),
    "debiased-polarized": Negatives("debiased_loss", two("z0", "z1"), {"polarization": BAND}),
}
# What the paths through the code differ in; the others are the same with other numbers.
MAIN = {name: CASES[name] for name in ("debiased", "hard", "hard-detached", "hard-easy", "hard-polarized")}
OPTIONS = (
    "mean",
    "sum",
    "tensor scale",
    "tensor temperature",
    "negative scale",
    "other rows",
    "weight, none",
    "ids",
    "cutoff",
    "cutoff per anchor",
    "cutoff margin",
)


@pytest.mark.parametrize(("shape", "dtype"), grid_params())
@pytest.mark.parametrize("case", case_params(CASES))
def test_loss_and_gradients(case, shape, dtype, backend, poison):
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    check(case, shape, dtype, backend, reduction="none")


@pytest.mark.parametrize(("case", "options"), option_params(MAIN, OPTIONS))
def test_options(case, options, backend, poison):
    case = Negatives(case.loss, case.shapes, {k: v for k, v in case.options.items() if k != "temperature"})
    check(case, SHAPE, torch.float32, backend, **options(case, *SHAPE[:2]))


@pytest.mark.parametrize("with_ids", [False, True], ids=["all", "ids"])
@pytest.mark.parametrize("shape", [(1, 1, 24), SHAPE], ids=shape_id)
@pytest.mark.parametrize("case", case_params(MAIN))
def test_statistics(case, shape, with_ids, backend, poison):
    options = matching_ids(case, *shape[:2]) if with_ids else {}
    check_statistics(case, shape, torch.float32, backend, **options)
    check_statistics(case, shape, torch.float32, backend, cutoff_margin=0.1, reduction="none", **options)


@pytest.mark.parametrize("argument", ["cutoff", "cutoff_margin"])
def test_a_threshold_per_anchor_counts_per_anchor(argument, backend, poison):
    """Every row has its own number of negatives, also with a term in the sweep beside the count."""
    values = torch.linspace(-0.3, 0.3, 130).double()
    for name in ("debiased", "hard", "hard-polarized"):
        for threshold in (values, values[:65]):
            check(CASES[name], SHAPE, torch.float32, backend, reduction="none", **{argument: threshold})


def official(z0, z1, temperature, tau_plus, beta):
    """The loss as it is in the authors' code, from exponentials; `debiased` is beta = 0."""
    n = 2 * len(z0) - 2
    z = torch.nn.functional.normalize(torch.cat([z0, z1]))
    exponentials = (z @ z.T / temperature).exp()
    sample = torch.arange(len(z), device=z.device) % len(z0)
    negative = exponentials[sample[:, None] != sample].reshape(len(z), n)
    positive = (torch.nn.functional.normalize(z0) * torch.nn.functional.normalize(z1)).sum(1)
    positive = (positive / temperature).exp().repeat(2)
    importance = (beta * negative.log()).exp()
    reweighted = (importance * negative).sum(1) / importance.mean(1)
    total = (-tau_plus * n * positive + reweighted) / (1 - tau_plus)
    total = total.clamp(min=n * math.exp(-1 / temperature))
    return -(positive / (positive + total)).log().mean()


@pytest.mark.parametrize("tau_plus", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 3.0])
def test_the_reference_is_the_official_code(beta, tau_plus):
    z = {"z0": torch.randn(20, 6).double(), "z1": torch.randn(20, 6).double()}
    options = dict(temperature=0.4, tau_plus=tau_plus, beta=beta)
    reference = differentiate(lambda **z: hard_negative_reference(**z, **options), z)
    assert_outcomes_match(reference, differentiate(lambda **z: official(**z, **options), z), torch.float64, 1.0)


def test_the_reference_by_hand():
    """Two orthogonal pairs, T = 1: both negatives at 1, the positive at e; Q = (2 - 2e/10) / 0.9, then the floor."""
    eye = torch.eye(2).double()
    estimate = (2 - 0.2 * math.e) / 0.9
    for reference in (debiased_reference, hard_negative_reference):
        loss = reference(eye, eye, temperature=1.0)
        assert loss.item() == pytest.approx(math.log(math.e + estimate) - 1, rel=1e-12)
        on_floor = reference(eye, eye, temperature=1.0, tau_plus=0.5)
        assert on_floor.item() == pytest.approx(math.log(math.e + 2 / math.e) - 1, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 0.05, 0.01])
@pytest.mark.parametrize("spread", [0.1, 1.0], ids=["aligned", "apart"])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_cold_temperatures_keep_five_digits(beta, spread, temperature, backend):
    """In float32, on rows of float32: the views close together, as after training, or further apart."""
    tiny = torch.finfo(torch.float32).tiny
    z0 = torch.nn.functional.normalize(torch.randn(65, 24), dim=1)
    z1 = torch.nn.functional.normalize(z0 + spread * torch.randn(65, 24) / 24**0.5, dim=1)
    options = dict(temperature=temperature, tau_plus=0.01, beta=beta, normalize=False)
    ours = differentiate(
        lambda **z: hard_negative_loss(**z, **options, backend=backend),
        {"z0": z0.to(device_of(backend)), "z1": z1.to(device_of(backend))},
    )
    reference = differentiate(
        lambda **z: hard_negative_reference(**z, **options), {"z0": z0.double(), "z1": z1.double()}
    )
    assert reference.value.isfinite()
    # of views that close, at the coldest, the loss is exp(-200): 0 in float32
    assert abs(ours.value.item() - reference.value.item()) <= 1e-5 * reference.value.item() + tiny
    for name, gradient in ours.gradients.items():
        for error, size in zip(
            errors(gradient, reference.gradients[name]), sizes(reference.gradients[name]), strict=True
        ):
            assert error <= 1e-4 * size + tiny
    if temperature == 0.01 and beta:
        assert not official(z0, z1, 0.01, 0.01, beta).isfinite(), "the plain form would do"


def test_a_tiny_loss_is_not_rounded_to_zero(backend):
    """One sample's views together, the other's opposite: the loss of the floor, log(1 + 2 e^(-2 / T)), T = 0.2."""
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], device=device_of(backend))
    for beta in (0.0, 1.0):
        loss = hard_negative_loss(z, z, temperature=0.2, beta=beta, backend=backend)
        assert loss.item() == pytest.approx(math.log1p(2 * math.exp(-10)), rel=1e-5)


def test_the_logarithm_of_a_difference_is_accurate():
    """Near equality and far from it, in value and gradient; nothing left is -inf without a gradient."""
    for b in (-1e-8, -1e-3, -0.69, -0.7, -5.0, -80.0, -torch.inf):
        operands = {"a": torch.tensor(0.0), "b": torch.tensor(b)}
        ours = differentiate(negatives._logsubexp, operands)
        reference = differentiate(
            lambda a, b: a + torch.log1p(-(b - a).exp()), {k: v.double() for k, v in operands.items()}
        )
        assert_outcomes_match(ours, reference, torch.float32)
    for a, b in ((1.0, 1.0), (1.0, 2.0), (-torch.inf, 0.0)):
        nothing = differentiate(negatives._logsubexp, {"a": torch.tensor(a), "b": torch.tensor(b)})
        assert nothing.value == -torch.inf
        assert not any(gradient.any() for gradient in nothing.gradients.values())


def both(shape=SHAPE, backend="torch", dtype=torch.float32):
    n, _, d = shape
    return {name: torch.randn(n, d, dtype=dtype, device=device_of(backend)) for name in ("z0", "z1")}


def test_debiased_is_hard_without_concentration(backend):
    z = both(backend=backend)
    options = dict(temperature=0.3, tau_plus=0.2, cutoff=0.3, backend=backend)
    first = differentiate(lambda **z: debiased_loss(**z, **options), z)
    second = differentiate(lambda **z: hard_negative_loss(**z, beta=0.0, **options), z)
    assert_outcomes_match(first, second, torch.float32)
    # and the limit of a small concentration
    assert_matches(hard_negative_loss(**z, beta=1e-4, **options), second.value, torch.float32, scale=100)


@pytest.mark.parametrize("options", [{}, {"cutoff": 0.2}, {"polarization": BAND}], ids=["plain", "cutoff", "band"])
def test_easy_and_unbiased_are_nt_xent(options, backend):
    z = both(backend=backend)
    options = {**options, "temperature": 0.5, "reduction": "none", "backend": backend}
    expected = differentiate(lambda **z: ck.nt_xent_loss(**z, **options), z)
    easy = differentiate(lambda **z: hard_negative_loss(**z, estimator="easy", **options), z)
    assert_outcomes_match(easy, expected, torch.float32, 1.0)
    unbiased = differentiate(lambda **z: debiased_loss(**z, tau_plus=0.0, **options), z)
    assert_outcomes_match(unbiased, expected, torch.float32, 1.0)


def test_the_gradient_of_the_temperature_is_that_of_the_rows_and_of_the_floor(backend):
    """dL/dlog a = <Z, dZ> / 2 plus, for the rows on the floor, the derivative of the floor, -a w_i."""
    dtype, scale = precise(backend), 2.0
    z = both((40, 0, 12), backend, dtype)
    z = {name: torch.nn.functional.normalize(x, dim=1) for name, x in z.items()}
    a = torch.tensor(scale, dtype=dtype, device=device_of(backend))
    for beta in (0.0, 1.0):
        options = dict(tau_plus=0.6, beta=beta, normalize=False, reduction="none", backend=backend)
        leaves = {name: x.clone().requires_grad_() for name, x in z.items()} | {"logit_scale": a.requires_grad_()}
        losses = hard_negative_loss(**leaves, **options)
        gradients = torch.autograd.grad(losses.mean(), list(leaves.values()))
        positive = scale * (z["z0"] * z["z1"]).sum(1).repeat(2)
        floored = ((losses.exp() - 1) * positive.exp() / (2 * 40 - 2) * math.exp(scale) - 1).abs() < 1e-4
        assert 3 < floored.sum() < 77, "both kinds of rows should be here"
        floor = -(scale * floored * (1 - (-losses).exp())).mean()
        inner = sum((x * g).sum() for x, g in zip(z.values(), gradients, strict=False)) / 2
        torch.testing.assert_close(scale * gradients[-1], inner + floor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_rows_on_the_floor_repel_no_negative(beta, backend):
    """Their loss depends on their positive alone."""
    z = both(backend=backend)
    z["z1"] = z["z0"] + 0.01 * z["z1"]
    for x in z.values():
        x.requires_grad_()
    losses = hard_negative_loss(**z, tau_plus=0.9, beta=beta, reduction="none", backend=backend)
    gradient = torch.autograd.grad(losses[3], z["z0"])[0]
    assert gradient[3].any()
    gradient[3] = 0
    assert not gradient.any()


def test_samples_may_come_in_any_order(backend):
    z, order = both(backend=backend), torch.randperm(SHAPE[0])
    permuted = {name: x[order.to(x.device)] for name, x in z.items()}
    assert_matches(hard_negative_loss(**permuted, backend=backend), hard_negative_loss(**z, backend=backend).double(),
                   torch.float32)  # fmt: skip


def test_everything_from_one_sweep(monkeypatch, backend):
    """Both log-sum-exps, the band, the maximum, and with a cutoff the count: nothing is swept twice."""
    calls = []

    def counted(*arguments, **options):
        calls.append(options["exponents"])
        return sweep(*arguments, **options)

    sweep = negatives.sweep
    monkeypatch.setattr(negatives, "sweep", counted)
    monkeypatch.setattr("contrastive_kernels.functional.totals.sweep", counted)
    z = both(backend=backend)
    hard_negative_loss(**z, beta=0.5, cutoff=0.1, return_stats=True, backend=backend)
    hard_negative_loss(**z, beta=0.5, polarization=BAND, return_stats=True, backend=backend)
    debiased_loss(**z, polarization=BAND, backend=backend)
    assert calls == [(1.5, 0.5), (1.5, 0.5), (1.0,)]


def test_nothing_quadratic_is_saved(backend):
    z = {name: x.requires_grad_() for name, x in both((300, 0, 4), backend).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        hard_negative_loss(**z, cutoff=0.5, return_stats=True, backend=backend)[0].backward()
    assert max(saved) <= 600 * 4


@pytest.mark.parametrize("case", case_params(CASES))
def test_anchors_without_negatives_lose_nothing(case, backend, poison):
    """Equal ids, a cutoff below everything, a single sample."""
    features = case.features(SHAPE, torch.float32, device_of(backend))
    single = {name: x[:1] for name, x in features.items()}
    ids = torch.zeros(SHAPE[0], dtype=torch.int64, device=device_of(backend))
    for tensors, options in ((features, {"ids": ids}), (features, {"cutoff": -2.0}), (single, {})):
        out = differentiate(
            lambda **t: case(ck, t, **options, reduction="none", backend=backend),  # noqa: B023
            tensors,
        )
        for x in (out.value, *out.gradients.values()):
            assert not x.nan_to_num(1.0).any()
        _, stats = case(ck, tensors, **options, return_stats=True, backend=backend)
        assert stats.accuracy == 1
        torch.testing.assert_close(stats.lse, stats.positive_logit)


def test_some_anchors_without_negatives(backend, poison):
    """Four anchors' negatives all lie above their cutoffs; the others do not notice."""
    cutoff = torch.full((65,), 0.3).double()
    cutoff[:2] = -1.5
    ours, _ = check(CASES["hard"], SHAPE, torch.float32, backend, cutoff=cutoff, reduction="none")
    assert (ours.value == 0).nonzero().flatten().tolist() == [0, 1, 65, 66]


@pytest.mark.parametrize("case", case_params(MAIN))
def test_nan_and_infinity_give_nan(case, backend):
    for bad in (math.nan, math.inf):
        for name in ("z0", "z1"):
            features = case.features(SHAPE, torch.float32, device_of(backend))
            features[name][3, 7] = bad
            for options in ({}, {"cutoff": 0.1}):
                # every anchor has the row as a negative or as its positive
                losses = case(ck, features, **options, reduction="none", backend=backend)
                assert losses.isnan().all(), f"{bad} in {name}"
                assert case(ck, features, **options, backend=backend).isnan()


@pytest.mark.parametrize("case", case_params(MAIN))
def test_zero_rows_have_zero_gradients(case, backend):
    features = case.features(SHAPE, torch.float32, device_of(backend))
    for x in features.values():
        x[3] = 0
    ours = differentiate(lambda **t: case(ck, t, reduction="none", backend=backend), features)
    reference = differentiate(
        lambda **t: case(python_ref, t, reduction="none"), {k: v.cpu().double() for k, v in features.items()}
    )
    assert_outcomes_match(ours, reference, torch.float32, 20.0)
    for gradient in ours.gradients.values():
        assert not gradient[3].any()
        assert gradient[4].any()


@pytest.mark.parametrize("case", case_params(MAIN))
def test_inputs_stay_as_they_were_and_bits_repeat(case, backend, poison):
    features = case.features(SHAPE, torch.float32, device_of(backend))
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


@pytest.mark.parametrize("name", ["debiased-floor", "hard", "hard-easy", "hard-polarized"])
def test_gradcheck(name, backend):
    """All but the detached weights, whose gradient is not that of the value."""
    if not supports(backend, torch.float64):
        pytest.skip(f"{backend} does not take float64")
    z0, z1 = torch.randn(2, 4, 3, dtype=torch.float64, device=device_of(backend))
    scale = torch.tensor(1.7, dtype=torch.float64, device=z0.device)
    inputs = [x.requires_grad_() for x in (z0, z1, scale)]
    options = {k: v for k, v in CASES[name].options.items() if k != "temperature"}
    case = Negatives(CASES[name].loss, CASES[name].shapes, options)

    def loss(z0, z1, scale):
        return case(ck, {"z0": z0, "z1": z1}, logit_scale=scale, backend=backend)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_detached_weights_change_the_gradient_alone(backend):
    """And as 1 / (1 + beta) of the derivative of the weighted sum says."""
    z = both(backend=backend)
    losses = [
        differentiate(lambda **z: hard_negative_loss(**z, detach_weights=d, backend=backend), z)  # noqa: B023
        for d in (False, True)
    ]
    torch.testing.assert_close(losses[0].value, losses[1].value)
    assert errors(losses[0].gradients["z0"], losses[1].gradients["z0"])[0] > 1e-3 * sizes(losses[0].gradients["z0"])[0]


@pytest.mark.parametrize(
    ("module", "function", "options"),
    [
        (DebiasedLoss, debiased_loss, {"temperature": 0.3, "tau_plus": 0.05}),
        (DebiasedLoss, debiased_loss, {"logit_scale": 4.0, "reduction": "none"}),
        (HardNegativeLoss, hard_negative_loss, {"temperature": 0.3, "beta": 0.5, "detach_weights": True}),
        (HardNegativeLoss, hard_negative_loss, {"estimator": "easy", "polarization": BAND}),
    ],
    ids=name_id,
)
def test_module_is_its_function(module, function, options, backend):
    z = both((12, 0, 8), backend)
    loss = module(**options, backend=backend)
    ids = torch.arange(12, device=z["z0"].device) // 2
    assert torch.equal(loss(*z.values()), function(**z, **options, backend=backend))
    assert torch.equal(loss(*z.values(), ids=ids), function(**z, **options, ids=ids, backend=backend))
    again = pickle.loads(pickle.dumps(copy.deepcopy(loss)))
    assert torch.equal(again(*z.values()), loss(*z.values()))
    for option, value in options.items():
        assert f"{option}={value}" in repr(loss)


def test_the_modules_concentration_can_be_annealed():
    z, loss = both(), HardNegativeLoss()
    for beta in (1.0, 0.5, 0.0):
        loss.beta = beta
        assert torch.equal(loss(*z.values()), hard_negative_loss(**z, beta=beta))


@pytest.mark.parametrize(
    ("base", "function"), [("debiased", debiased_loss), ("hard_negative", hard_negative_loss)], ids=name_id
)
def test_lmcl_is_the_polarized_base(base, function, backend):
    z = both(backend=backend)
    loss = ck.LMCLLoss(base, lower=0.2, upper=0.7, weight=2.0, temperature=0.3, backend=backend)(*z.values())
    band = ck.Polarization(0.2, 0.7, 2.0)
    assert torch.equal(loss, function(**z, temperature=0.3, polarization=band, backend=backend))
    ids = torch.arange(65, device=loss.device).repeat(2)
    alone = ck.distance_polarization(torch.cat(list(z.values())), ids, lower=0.2, upper=0.7, backend=backend)
    torch.testing.assert_close(loss - function(**z, temperature=0.3, backend=backend), 2 * alone, rtol=1e-4, atol=1e-6)


Z = torch.ones(8, 16)
BAD = {
    "rows differ": (lambda f: f(Z, Z[:7]), ValueError, "z0 (8, 16) and z1 (7, 16) must have the same first"),
    "a vector": (lambda f: f(Z[0], Z[0]), ValueError, "z0 (16,) must have shape (N, D)"),
    "second view missing": (lambda f: f(Z, None), TypeError, "z1 must be a tensor"),
    "empty": (lambda f: f(Z[:0], Z[:0]), ValueError, "z0 (0, 16) is an empty batch"),
    "mixed dtypes": (lambda f: f(Z, Z.double()), TypeError, "z0 is torch.float32 and z1 is torch.float64"),
    "integers": (lambda f: f(Z.long(), Z.long()), TypeError, "z0 has dtype torch.int64"),
    "prior of one": (lambda f: f(Z, Z, tau_plus=1.0), ValueError, "tau_plus 1.0 must be at least 0 and below 1"),
    "negative prior": (lambda f: f(Z, Z, tau_plus=-0.1), ValueError, "tau_plus -0.1"),
    "prior NaN": (lambda f: f(Z, Z, tau_plus=math.nan), ValueError, "tau_plus nan"),
    "prior tensor": (lambda f: f(Z, Z, tau_plus=Z), TypeError, "tau_plus must be a number"),
    "both scales": (lambda f: f(Z, Z, temperature=1.0, logit_scale=1.0), ValueError, "temperature and logit_scale"),
    "temperature zero": (lambda f: f(Z, Z, temperature=0.0), ValueError, "temperature 0.0"),
    "reduction": (lambda f: f(Z, Z, reduction="row"), ValueError, "reduction 'row' is unknown"),
    "weight": (lambda f: f(Z, Z, weight=Z[0]), ValueError, "weight (16,) must have shape (8,)"),
    "ids": (lambda f: f(Z, Z, ids=torch.arange(16)), ValueError, "ids (16,) must have shape (8,)"),
    "float ids": (lambda f: f(Z, Z, ids=torch.ones(8)), TypeError, "ids has dtype torch.float32"),
    "cutoff": (lambda f: f(Z, Z, cutoff=torch.ones(9)), ValueError, "cutoff (9,)"),
    "both cutoffs": (lambda f: f(Z, Z, cutoff=0.1, cutoff_margin=0.1), ValueError, "cutoff and cutoff_margin"),
    "backend": (lambda f: f(Z, Z, backend="cuda"), ValueError, "backend 'cuda' is unknown"),
}


@pytest.mark.parametrize("function", [debiased_loss, hard_negative_loss])
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, function):
    call, error, message = BAD[name]
    with pytest.raises(error) as caught:
        call(function)
    assert message in str(caught.value)


def test_bad_concentration():
    for beta in (-0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"beta {beta} must be at least 0"):
            hard_negative_loss(Z, Z, beta=beta)
    with pytest.raises(TypeError, match="beta must be a number"):
        hard_negative_loss(Z, Z, beta=Z)
    with pytest.raises(ValueError, match="estimator 'soft' is unknown"):
        hard_negative_loss(Z, Z, estimator="soft")
