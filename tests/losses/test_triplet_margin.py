"""The triplet hinges: counts, ties, the margin; test_every_loss.py has what they share with other losses."""

import pytest
import torch

import contrastive_kernels as ck
import python_ref
from tests.support.losses import assert_module_is_function, assert_refused
from tests.support.testing import assert_outcomes_match, case_params, check, device_of, differentiate
from tests.support.variants import EVERY

SHAPE = (65, 129, 24)
NAMES = (
    "triplet_margin",
    "triplet_margin-euclidean-normalized",
    "triplet_margin-hardest-normalized",
    "triplet_margin-hardest-euclidean-normalized",
)
every_triplet = pytest.mark.parametrize("case", case_params({name: EVERY[name] for name in NAMES}))


OPTIONS = {
    "weight, ids": lambda n: {"weight": torch.rand(n, dtype=torch.float64), "ids": torch.randint(n // 2, (n,))},
    "nonzero mean": lambda n: {"reduction": "nonzero_mean"},
    "nonzero mean, weight, ids": lambda n: {
        "reduction": "nonzero_mean",
        "weight": torch.rand(n, dtype=torch.float64),
        "ids": torch.randint(n // 2, (n,)),
    },
    "large margin": lambda n: {"margin": 1.0, "reduction": "nonzero_mean"},
    "negative margin": lambda n: {"margin": -0.9, "reduction": "nonzero_mean"},
    "tensor margin": lambda n: {"margin": torch.tensor(0.1).double()},
    "other rows": lambda n: {"normalize": False, "margin": 0.5},
}


@pytest.mark.parametrize("name", OPTIONS)
@every_triplet
def test_options(case, name, backend, poison):
    check(case, SHAPE, torch.float32, backend, **OPTIONS[name](SHAPE[0]))


@pytest.mark.parametrize("reduction", ["mean", "nonzero_mean", "none"])
@every_triplet
def test_agreeing_rows(case, reduction, backend):
    """Few hinges are left: what they are counted by matters, and the gradients are checked without slack."""
    x = torch.randn(200, 8, dtype=torch.float64)
    features = {"anchor": x.float(), "positive": (x + 0.3 * torch.randn_like(x)).float()}
    on_device = {k: v.to(device_of(backend)) for k, v in features.items()}
    ours = differentiate(lambda **t: case(ck, t, margin=0.05, reduction=reduction, backend=backend), on_device)
    wide = {k: v.double() for k, v in features.items()}
    reference = differentiate(lambda **t: case(python_ref, t, margin=0.05, reduction=reduction), wide)
    assert reference.value.any()
    assert_outcomes_match(ours, reference, torch.float32)


@pytest.mark.parametrize("reduction", ["mean", "nonzero_mean", "sum", "none"])
@every_triplet
def test_no_negatives(case, reduction, backend, poison):
    """One anchor, or equal ids everywhere: loss 0, gradient 0."""
    for n in (1, 9):
        features = case.features((n, n, 24), torch.float32, device_of(backend))
        ids = torch.zeros(n, dtype=torch.int64, device=device_of(backend))
        weight = torch.rand(n, device=device_of(backend))
        for options in ({"ids": ids}, {"ids": ids, "weight": weight}, *([{}] if n == 1 else [])):
            out = differentiate(
                lambda **t: case(ck, t, reduction=reduction, backend=backend, **options),  # noqa: B023
                features,
            )
            for x in (out.value, *out.gradients.values()):
                assert not x.nan_to_num(1.0).any()


@every_triplet
def test_separated_rows_lose_nothing(case, backend):
    """No hinge is left, also to count."""
    x = torch.eye(24, device=device_of(backend))
    for reduction in ("mean", "nonzero_mean"):
        out = differentiate(
            lambda **t: case(ck, t, reduction=reduction, backend=backend),  # noqa: B023
            {"anchor": x, "positive": x},
        )
        assert out.value == 0
        assert not any(g.nan_to_num(1.0).any() for g in out.gradients.values())


@every_triplet
def test_nan_is_not_left_out_of_a_count(case, backend):
    for bad in (torch.nan, torch.inf):
        for name in ("anchor", "positive"):
            features = case.features(SHAPE, torch.float32, device_of(backend))
            features[name][0, 7] = bad
            for reduction in ("mean", "nonzero_mean"):
                loss = case(ck, features, normalize=True, reduction=reduction, backend=backend)
                assert loss.isnan(), f"{bad} in {name}"


def test_hardest_takes_the_first_on_a_tie(backend):
    """Three equal negatives: all of the gradient goes to the first of them."""
    device = device_of(backend)
    x = torch.eye(2, 4, device=device)[[0, 1, 1, 1]]
    y = torch.tensor([[0.8, 0.6, 0.0, 0.0]] * 4, device=device)
    anchor, positive = x.clone().requires_grad_(), y.clone().requires_grad_()
    loss = ck.triplet_margin_loss(
        anchor, positive, mining="hardest", normalize=False, reduction="none", backend=backend
    )
    loss[0].backward()
    # rows: y_1 for anchor 0; columns: x_1, with s = 0.6 - 0.8 + 0.2 = 0, the kink, which is no gradient
    assert loss[0].item() == pytest.approx(0.2, abs=1e-6)
    assert positive.grad[2:].count_nonzero() == 0
    assert torch.equal(positive.grad[1], x[0])


@pytest.mark.parametrize(("mining", "expected"), [("all", 0.2), ("hardest", 0.4)])
def test_equal_rows_have_a_finite_gradient(mining, expected, backend):
    """Below 1e-6 the distance has no slope."""
    x = torch.eye(24, device=device_of(backend))[:1].expand(9, 24).contiguous()
    out = differentiate(
        lambda **t: ck.triplet_margin_loss(**t, mining=mining, metric="euclidean", backend=backend),
        {"anchor": x, "positive": x.clone()},
    )
    assert out.value.item() == pytest.approx(expected, rel=1e-5)
    assert not any(g.nan_to_num(1.0).any() for g in out.gradients.values())


X = torch.randn(8, 16)
BAD = {
    "dimensions differ": (
        lambda: ck.triplet_margin_loss(X, X[:, :15]),
        ValueError,
        "anchor (8, 16) and positive (8, 15) must have the same last dimension",
    ),
    "empty": (lambda: ck.triplet_margin_loss(X[:0], X[:0]), ValueError, "anchor (0, 16) is an empty batch"),
    "mining": (lambda: ck.triplet_margin_loss(X, X, mining="semi"), ValueError, "mining 'semi' is unknown"),
    "metric": (lambda: ck.triplet_margin_loss(X, X, metric="l1"), ValueError, "metric 'l1' is unknown"),
    "margin": (lambda: ck.triplet_margin_loss(X, X, margin="wide"), TypeError, "margin must be a number"),
    "backend": (
        lambda: ck.triplet_margin_loss(X, X, mining="hardest", backend="cuda"),
        ValueError,
        "backend 'cuda' is unknown",
    ),
    "float ids": (lambda: ck.triplet_margin_loss(X, X, ids=X[:, 0]), TypeError, "ids has dtype torch.float32"),
    "weight": (lambda: ck.triplet_margin_loss(X, X, weight=X[:7, 0]), ValueError, "weight (7,)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    assert_refused(*BAD[name])


def test_module_is_its_function(backend):
    inputs = torch.randn(2, 12, 16, device=device_of(backend)).unbind(0)
    options = {"margin": 0.3, "mining": "hardest"}
    ids = torch.arange(12, device=inputs[0].device) // 2
    assert_module_is_function(ck.TripletMarginLoss, ck.triplet_margin_loss, inputs, options, backend, ids=ids)


def test_module_trains_its_margin(backend):
    x, y = torch.randn(2, 12, 16, device=device_of(backend))
    loss = ck.TripletMarginLoss(torch.nn.Parameter(torch.tensor(0.3)), mining="hardest", backend=backend).to(x.device)
    value = loss(x, y)
    assert torch.equal(value, ck.triplet_margin_loss(x, y, margin=0.3, mining="hardest", backend=backend))
    value.backward()
    assert loss.margin.grad > 0
