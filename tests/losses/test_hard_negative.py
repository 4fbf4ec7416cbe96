"""The hard-negative loss, and what it shares with the debiased loss, its limit for beta = 0."""

import math

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
import python_ref
from contrastive_kernels.losses import hard_negative
from tests.support.losses import assert_module_is_function, assert_refused
from tests.support.testing import (
    BAND,
    assert_outcomes_match,
    check,
    device_of,
    differentiate,
    errors,
    precise,
    sizes,
)
from tests.support.variants import EVERY

SHAPE = (65, 129, 24)
both_losses = pytest.mark.parametrize("loss", [ck.debiased_loss, ck.hard_negative_loss])


def views(shape=SHAPE, backend="torch", dtype=torch.float32):
    n, _, d = shape
    return {name: torch.randn(n, d, dtype=dtype, device=device_of(backend)) for name in ("z0", "z1")}


@pytest.mark.parametrize("argument", ["cutoff", "cutoff_margin"])
@pytest.mark.parametrize("name", ["debiased", "hard_negative", "hard_negative-polarized"])
def test_a_threshold_per_anchor_counts_per_anchor(name, argument, backend, poison):
    """Every row has its own number of negatives, also with a term in the sweep beside the count."""
    values = torch.linspace(-0.3, 0.3, 130).double()
    for threshold in (values, values[:65]):
        check(EVERY[name], SHAPE, torch.float32, backend, reduction="none", **{argument: threshold})


# The reference


def official(z0, z1, temperature, tau_plus, beta):
    """Return the loss as it is in the authors' code, from exponentials; the debiased one for beta = 0."""
    n = 2 * len(z0) - 2
    z = F.normalize(torch.cat([z0, z1]))
    exponentials = (z @ z.T / temperature).exp()
    sample = torch.arange(len(z), device=z.device) % len(z0)
    negative = exponentials[sample[:, None] != sample].reshape(len(z), n)
    positive = (F.normalize(z0) * F.normalize(z1)).sum(1)
    positive = (positive / temperature).exp().repeat(2)
    importance = (beta * negative.log()).exp()
    reweighted = (importance * negative).sum(1) / importance.mean(1)
    total = (-tau_plus * n * positive + reweighted) / (1 - tau_plus)
    total = total.clamp(min=n * math.exp(-1 / temperature))
    return -(positive / (positive + total)).log().mean()


@pytest.mark.parametrize("tau_plus", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 3.0])
def test_reference_is_the_official_code(beta, tau_plus):
    z = {"z0": torch.randn(20, 6).double(), "z1": torch.randn(20, 6).double()}
    options = dict(temperature=0.4, tau_plus=tau_plus, beta=beta)
    reference = differentiate(lambda **z: python_ref.hard_negative_loss(**z, **options), z)
    assert_outcomes_match(reference, differentiate(lambda **z: official(**z, **options), z), torch.float64, 1.0)


@pytest.mark.parametrize("reference", [python_ref.debiased_loss, python_ref.hard_negative_loss])
def test_reference_by_hand(reference):
    """Two orthogonal pairs, T = 1: both negatives at 1, the positive at e; Q = (2 - 2e/10) / 0.9, then the floor."""
    eye = torch.eye(2).double()
    estimate = (2 - 0.2 * math.e) / 0.9
    loss = reference(eye, eye, temperature=1.0)
    assert loss.item() == pytest.approx(math.log(math.e + estimate) - 1, rel=1e-12)
    on_floor = reference(eye, eye, temperature=1.0, tau_plus=0.5)
    assert on_floor.item() == pytest.approx(math.log(math.e + 2 / math.e) - 1, rel=1e-12)


# Precision


@pytest.mark.parametrize("temperature", [0.5, 0.05, 0.01])
@pytest.mark.parametrize("spread", [0.1, 1.0], ids=["aligned", "apart"])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_cold_temperatures_keep_five_digits(beta, spread, temperature, backend):
    """I21 tiny losses: on rows of float32, the views close together, as after training, or further apart."""
    tiny = torch.finfo(torch.float32).tiny
    z0 = F.normalize(torch.randn(65, 24), dim=1)
    z1 = F.normalize(z0 + spread * torch.randn(65, 24) / 24**0.5, dim=1)
    options = dict(temperature=temperature, tau_plus=0.01, beta=beta, normalize=False)
    ours = differentiate(
        lambda **z: ck.hard_negative_loss(**z, **options, backend=backend),
        {"z0": z0.to(device_of(backend)), "z1": z1.to(device_of(backend))},
    )
    reference = differentiate(
        lambda **z: python_ref.hard_negative_loss(**z, **options), {"z0": z0.double(), "z1": z1.double()}
    )
    assert reference.value.isfinite()
    # of views that close, at the coldest, the loss is exp(-200): 0 in float32
    assert abs(ours.value.item() - reference.value.item()) <= 1e-5 * reference.value.item() + tiny
    for name, gradient in ours.gradients.items():
        expected = reference.gradients[name]
        for error, size in zip(errors(gradient, expected), sizes(expected), strict=True):
            assert error <= 1e-4 * size + tiny
    if temperature == 0.01 and beta:
        assert not official(z0, z1, 0.01, 0.01, beta).isfinite(), "the plain form would do"


def test_a_tiny_loss_is_not_rounded_to_zero(backend):
    """One sample's views together, the other's opposite: the loss of the floor, log(1 + 2 e^(-2 / T)), T = 0.2."""
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], device=device_of(backend))
    for beta in (0.0, 1.0):
        loss = ck.hard_negative_loss(z, z, temperature=0.2, beta=beta, backend=backend)
        assert loss.item() == pytest.approx(math.log1p(2 * math.exp(-10)), rel=1e-5)


def test_the_logarithm_of_a_difference_is_accurate():
    """Near equality and far from it, in value and gradient; nothing left is -inf without a gradient."""
    for b in (-1e-8, -1e-3, -0.69, -0.7, -5.0, -80.0, -torch.inf):
        operands = {"a": torch.tensor(0.0), "b": torch.tensor(b)}
        ours = differentiate(hard_negative._logsubexp, operands)
        reference = differentiate(
            lambda a, b: a + torch.log1p(-(b - a).exp()), {k: v.double() for k, v in operands.items()}
        )
        assert_outcomes_match(ours, reference, torch.float32)
    for a, b in ((1.0, 1.0), (1.0, 2.0), (-torch.inf, 0.0)):
        nothing = differentiate(hard_negative._logsubexp, {"a": torch.tensor(a), "b": torch.tensor(b)})
        assert nothing.value == -torch.inf
        assert not any(gradient.any() for gradient in nothing.gradients.values())


# Identities


@pytest.mark.parametrize("options", [{}, {"cutoff": 0.2}, {"polarization": BAND}], ids=["plain", "cutoff", "band"])
def test_easy_is_nt_xent(options, backend):
    """I1 debiasing limits: the "easy" estimator."""
    z = views(backend=backend)
    options = {**options, "temperature": 0.5, "reduction": "none", "backend": backend}
    expected = differentiate(lambda **z: ck.nt_xent_loss(**z, **options), z)
    easy = differentiate(lambda **z: ck.hard_negative_loss(**z, estimator="easy", **options), z)
    assert_outcomes_match(easy, expected, torch.float32, 1.0)


def test_the_scale_gradient_is_that_of_the_rows_and_of_the_floor(backend):
    """I10 scale gradient: <Z, dZ> / 2 plus, for the rows on the floor, the derivative of the floor, -a w_i."""
    dtype, scale = precise(backend), 2.0
    z = {name: F.normalize(x, dim=1) for name, x in views((40, 0, 12), backend, dtype).items()}
    a = torch.tensor(scale, dtype=dtype, device=device_of(backend))
    for beta in (0.0, 1.0):
        options = dict(tau_plus=0.6, beta=beta, normalize=False, reduction="none", backend=backend)
        leaves = {name: x.clone().requires_grad_() for name, x in z.items()} | {"logit_scale": a.requires_grad_()}
        losses = ck.hard_negative_loss(**leaves, **options)
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
    z = views(backend=backend)
    z["z1"] = z["z0"] + 0.01 * z["z1"]
    for x in z.values():
        x.requires_grad_()
    losses = ck.hard_negative_loss(**z, tau_plus=0.9, beta=beta, reduction="none", backend=backend)
    gradient = torch.autograd.grad(losses[3], z["z0"])[0]
    assert gradient[3].any()
    gradient[3] = 0
    assert not gradient.any()


def test_detached_weights_change_the_gradient_alone(backend):
    z = views(backend=backend)
    losses = [
        differentiate(lambda **z: ck.hard_negative_loss(**z, detach_weights=d, backend=backend), z)  # noqa: B023
        for d in (False, True)
    ]
    torch.testing.assert_close(losses[0].value, losses[1].value)
    assert errors(losses[0].gradients["z0"], losses[1].gradients["z0"])[0] > 1e-3 * sizes(losses[0].gradients["z0"])[0]


# Edges


def test_some_anchors_without_negatives(backend, poison):
    """Four anchors' negatives all lie above their cutoffs; the others do not notice."""
    cutoff = torch.full((65,), 0.3).double()
    cutoff[:2] = -1.5
    ours, _ = check(EVERY["hard_negative"], SHAPE, torch.float32, backend, cutoff=cutoff, reduction="none")
    assert (ours.value == 0).nonzero().flatten().tolist() == [0, 1, 65, 66]


NAMES = ("debiased", "hard_negative", "hard_negative-detached", "hard_negative-easy", "hard_negative-polarized")


@pytest.mark.parametrize("name", NAMES)
def test_nan_and_infinity_reach_every_anchor(name, backend):
    """Every anchor has the row as a negative or as its positive, whatever the cutoff."""
    case = EVERY[name]
    for bad in (math.nan, math.inf):
        for view in ("z0", "z1"):
            features = case.features(SHAPE, torch.float32, device_of(backend))
            features[view][3, 7] = bad
            for options in ({}, {"cutoff": 0.1}):
                losses = case(ck, features, **options, reduction="none", backend=backend)
                assert losses.isnan().all(), f"{bad} in {view}"
                assert case(ck, features, **options, backend=backend).isnan()


def test_everything_from_one_sweep(monkeypatch, backend):
    """Both log-sum-exps, the band, the maximum, and with a cutoff the count: nothing is swept twice."""
    calls = []

    def counted(*arguments, **options):
        calls.append(options["exponents"])
        return sweep(*arguments, **options)

    sweep = hard_negative.sweep
    monkeypatch.setattr(hard_negative, "sweep", counted)
    monkeypatch.setattr("contrastive_kernels.primitives.sums.sweep", counted)
    z = views(backend=backend)
    ck.hard_negative_loss(**z, beta=0.5, cutoff=0.1, return_stats=True, backend=backend)
    ck.hard_negative_loss(**z, beta=0.5, polarization=BAND, return_stats=True, backend=backend)
    ck.debiased_loss(**z, polarization=BAND, backend=backend)
    assert calls == [(1.5, 0.5), (1.5, 0.5), (1.0,)]


def test_nothing_quadratic_is_saved(backend):
    z = {name: x.requires_grad_() for name, x in views((300, 0, 4), backend).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        ck.hard_negative_loss(**z, cutoff=0.5, return_stats=True, backend=backend)[0].backward()
    assert max(saved) <= 600 * 4


# The module and bad input


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.3, "beta": 0.5, "detach_weights": True}, {"estimator": "easy", "polarization": BAND}],
    ids=["hard", "easy"],
)
@pytest.mark.parametrize("with_ids", [False, True], ids=["all", "ids"])
def test_module_is_its_function(with_ids, options, backend):
    inputs = tuple(views((12, 0, 8), backend).values())
    ids = {"ids": torch.arange(12, device=inputs[0].device) // 2} if with_ids else {}
    assert_module_is_function(ck.HardNegativeLoss, ck.hard_negative_loss, inputs, options, backend, **ids)


def test_concentration_of_the_module_can_be_annealed():
    z, loss = views(), ck.HardNegativeLoss()
    for beta in (1.0, 0.5, 0.0):
        loss.beta = beta
        assert torch.equal(loss(*z.values()), ck.hard_negative_loss(**z, beta=beta))


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


@both_losses
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, loss):
    call, error, message = BAD[name]
    assert_refused(lambda: call(loss), error, message)


BAD_CONCENTRATION = {
    **{
        str(beta): (lambda beta=beta: ck.hard_negative_loss(Z, Z, beta=beta), ValueError, f"beta {beta} must be at le")
        for beta in (-0.5, math.inf, math.nan)
    },
    "tensor": (lambda: ck.hard_negative_loss(Z, Z, beta=Z), TypeError, "beta must be a number"),
    "estimator": (
        lambda: ck.hard_negative_loss(Z, Z, estimator="soft"),
        ValueError,
        "estimator 'soft' is unknown",
    ),
}


@pytest.mark.parametrize("name", BAD_CONCENTRATION)
def test_bad_concentration(name):
    assert_refused(*BAD_CONCENTRATION[name])
