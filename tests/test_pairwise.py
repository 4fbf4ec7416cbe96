"""SigLIP and the triplet hinges: values, gradients, options and edges against the reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from testing import (
    HALF,
    Case,
    assert_matches,
    assert_outcomes_match,
    case_params,
    check,
    check_statistics,
    device_of,
    differentiate,
    dtype_id,
    grid_params,
    precise,
    supports,
    two,
)
from torch.autograd import gradcheck, gradgradcheck

import contrastive_kernels as ck
import python_ref
from contrastive_kernels.functional import pairwise
from contrastive_kernels.modules.pairwise import SigLipLoss, TripletMarginLoss

SHAPE = (65, 129, 24)


class PairwiseCase(Case):
    """The losses by the files that they are in."""

    def __call__(self, module, features, **options):
        return super().__call__(pairwise if module is ck else module, features, **options)


SIGLIP = {
    "siglip": PairwiseCase(
        "siglip_loss",
        two("image_features", "text_features"),
        {"logit_scale": 10.0, "logit_bias": -3.0},
        scale="logit_scale",
        unit=True,
    )
}
TRIPLET = {
    f"triplet-{mining}-{metric}": PairwiseCase(
        "triplet_margin_loss", two("anchor", "positive"), {"mining": mining, "metric": metric}, unit=mining == "hardest"
    )
    for mining in ("all", "hardest")
    for metric in ("similarity", "euclidean")
}
CASES = SIGLIP | TRIPLET


def unit(*shape, dtype=torch.float32):
    return F.normalize(torch.randn(shape, dtype=torch.float64), dim=-1).to(dtype)


def alike(n, d, noise=0.3):
    """Anchors and positives that agree, as in training."""
    x = torch.randn(n, d, dtype=torch.float64)
    return {"anchor": x, "positive": x + noise * torch.randn_like(x)}


def with_names(case, x, y):
    return dict(zip(case.shapes(1, 1, 1), (x, y), strict=True))


@pytest.mark.parametrize(("shape", "dtype"), grid_params())
@pytest.mark.parametrize("case", case_params(CASES))
def test_loss_and_gradients(case, shape, dtype, backend, poison):
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    # normalised once more, rows of half precision would be rounded once more, and others would be the hardest
    as_they_are = {"normalize": False} if case.unit and dtype in HALF else {}
    check(case, shape, dtype, backend, reduction="none", **as_they_are)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("case", case_params(CASES))
def test_half_precision_rounds_the_gradients_only(case, dtype, backend, poison):
    """Unit rows as they are: the loss has the accuracy of float32, the gradient that of its dtype."""
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    features = with_names(case, *unit(2, *SHAPE[::2], dtype=dtype))
    on_device = {k: v.to(device_of(backend)) for k, v in features.items()}
    ours = differentiate(lambda **t: case(ck, t, normalize=False, backend=backend), on_device)
    wide = {k: v.double() for k, v in features.items()}
    reference = differentiate(lambda **t: case(python_ref, t, normalize=False), wide)
    assert_matches(ours.value, reference.value, torch.float32)
    for name, expected in reference.gradients.items():
        error = (ours.gradients[name].cpu().double() - expected).norm() / expected.norm()
        assert error <= 2 * torch.finfo(dtype).eps, name


OPTIONS = {
    "mean": lambda n: {},
    "sum": lambda n: {"reduction": "sum"},
    "weight": lambda n: {"weight": torch.rand(n, dtype=torch.float64)},
    "weight, none": lambda n: {"weight": torch.rand(n, dtype=torch.float64), "reduction": "none"},
    "ids": lambda n: {"ids": torch.randint(n // 2, (n,))},
}
SIGLIP_OPTIONS = OPTIONS | {
    "float scale": lambda n: {"logit_scale": 7.0, "logit_bias": None},
    "tensors": lambda n: {"logit_scale": torch.tensor(7.0).double(), "logit_bias": torch.tensor([-2.0]).double()},
    "temperature": lambda n: {"temperature": torch.tensor(0.2).double(), "logit_scale": None},
    "negative scale": lambda n: {"logit_scale": -7.0},
    "negative only": lambda n: {"negative_only": True, "logit_bias": torch.tensor(-2.0).double()},
    "negative only, cutoff": lambda n: {"negative_only": True, "cutoff": 0.1},
    "other rows": lambda n: {"normalize": True},
    "cutoff": lambda n: {"cutoff": torch.linspace(-0.1, 0.3, n, dtype=torch.float64)},
    "cutoff margin": lambda n: {"cutoff_margin": 0.05, "reduction": "none"},
}
TRIPLET_OPTIONS = OPTIONS | {
    "nonzero mean": lambda n: {"reduction": "nonzero_mean"},
    "nonzero mean, weight, ids": lambda n: {
        "reduction": "nonzero_mean",
        "weight": torch.rand(n, dtype=torch.float64),
        "ids": torch.randint(n // 2, (n,)),
    },
    "weight, ids": lambda n: {"weight": torch.rand(n, dtype=torch.float64), "ids": torch.randint(n // 2, (n,))},
    "large margin": lambda n: {"margin": 1.0, "reduction": "nonzero_mean"},
    "negative margin": lambda n: {"margin": -0.9, "reduction": "nonzero_mean"},
    "tensor margin": lambda n: {"margin": torch.tensor(0.1).double()},
    "other rows": lambda n: {"normalize": False, "margin": 0.5},
}


@pytest.mark.parametrize("name", SIGLIP_OPTIONS)
def test_siglip_options(name, backend, poison):
    ours, _ = check(SIGLIP["siglip"], SHAPE, torch.float32, backend, **SIGLIP_OPTIONS[name](SHAPE[0]))
    for argument in ("logit_scale", "logit_bias", "temperature"):
        if argument in ours.gradients:
            assert ours.gradients[argument].dtype == torch.float64
            assert ours.gradients[argument].any()


@pytest.mark.parametrize("name", TRIPLET_OPTIONS)
@pytest.mark.parametrize("case", case_params(TRIPLET))
def test_triplet_options(case, name, backend, poison):
    check(case, SHAPE, torch.float32, backend, **TRIPLET_OPTIONS[name](SHAPE[0]))


@pytest.mark.parametrize("reduction", ["mean", "nonzero_mean", "none"])
@pytest.mark.parametrize("case", case_params(TRIPLET))
def test_triplet_of_agreeing_rows(case, reduction, backend):
    """Few hinges are left: what they are counted by matters, and the gradients are checked without slack."""
    features = {k: v.float() for k, v in alike(200, 8).items()}
    on_device = {k: v.to(device_of(backend)) for k, v in features.items()}
    ours = differentiate(lambda **t: case(ck, t, margin=0.05, reduction=reduction, backend=backend), on_device)
    wide = {k: v.double() for k, v in features.items()}
    reference = differentiate(lambda **t: case(python_ref, t, margin=0.05, reduction=reduction), wide)
    assert reference.value.any()
    assert_outcomes_match(ours, reference, torch.float32)


def test_siglip_statistics(backend, poison):
    case, n = SIGLIP["siglip"], SHAPE[0]
    check_statistics(case, SHAPE, torch.float32, backend, ids=torch.randint(n // 2, (n,)))
    check_statistics(case, SHAPE, torch.float32, backend, cutoff_margin=0.1, reduction="none")
    check_statistics(case, (1, 1, 24), torch.float32, backend)


def test_siglip_is_its_definition(backend):
    """-log sigmoid(z u) over all pairs, and the form with one softplus a pair and the trace taken off."""
    x, y = unit(2, 65, 24, dtype=precise(backend)).to(device_of(backend))
    loss = pairwise.siglip_loss(x, y, 10.0, -10.0, backend=backend)
    logits = 10 * x @ y.T - 10
    signs = 2 * torch.eye(65, device=x.device, dtype=x.dtype) - 1
    torch.testing.assert_close(loss, -F.logsigmoid(signs * logits).sum() / 65)
    torch.testing.assert_close(loss, (F.softplus(logits).sum() - logits.trace()) / 65)


def test_siglip_cold(backend):
    """The losses of trained pairs are far below the rounding of 1, and keep their digits."""
    x = torch.eye(24, device=device_of(backend), dtype=torch.float32)
    loss = pairwise.siglip_loss(x, x, 60.0, -30.0, reduction="none", backend=backend)
    torch.testing.assert_close(loss.cpu().double(), torch.full((24,), 24 * math.exp(-30)).double(), rtol=1e-5, atol=0)
    loss = pairwise.siglip_loss(x, x, 100.0, -10.0, negative_only=True, backend=backend)
    torch.testing.assert_close(loss.cpu().double().item(), 90 + 23 * math.exp(-10), rtol=1e-6, atol=0)


def test_siglip_of_a_batch_on_two_devices(backend):
    """Each has its own texts, and the other's as negatives only."""
    x, y = unit(2, 64, 24).to(device_of(backend))
    scale, bias = 10.0, -3.0
    whole = pairwise.siglip_loss(x, y, scale, bias, reduction="sum", backend=backend)
    options = dict(reduction="sum", backend=backend)
    (x0, x1), (y0, y1) = x.chunk(2), y.chunk(2)
    parts = [
        pairwise.siglip_loss(a, b, scale, bias, negative_only=negative_only, **options)
        for a, b, negative_only in ((x0, y0, False), (x1, y1, False), (x0, y1, True), (x1, y0, True))
    ]
    torch.testing.assert_close(whole, sum(parts))


def test_siglip_scale_gradient_is_the_rows(backend):
    """<X, dX> = <Y, dY> = a dL/da."""
    x, y = unit(2, 65, 24, dtype=precise(backend)).to(device_of(backend))
    scale = torch.tensor(10.0, dtype=x.dtype, device=x.device)
    out = differentiate(
        lambda x, y, scale: pairwise.siglip_loss(x, y, scale, -3.0, backend=backend), {"x": x, "y": y, "scale": scale}
    ).gradients
    torch.testing.assert_close((x * out["x"]).sum(), scale * out["scale"])
    torch.testing.assert_close((y * out["y"]).sum(), scale * out["scale"])


@pytest.mark.parametrize("reduction", ["mean", "nonzero_mean", "sum", "none"])
@pytest.mark.parametrize("case", case_params(TRIPLET))
def test_triplet_without_negatives(case, reduction, backend, poison):
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


@pytest.mark.parametrize("case", case_params(TRIPLET))
def test_triplet_of_separated_rows_is_zero(case, backend):
    """No hinge is left, also to count."""
    x = torch.eye(24, device=device_of(backend))
    for reduction in ("mean", "nonzero_mean"):
        out = differentiate(
            lambda **t: case(ck, t, reduction=reduction, backend=backend),  # noqa: B023
            {"anchor": x, "positive": x},
        )
        assert out.value == 0
        assert not any(g.nan_to_num(1.0).any() for g in out.gradients.values())


def test_hardest_takes_the_first_on_a_tie(backend):
    """Three equal negatives: all of the gradient goes to the first of them."""
    device = device_of(backend)
    x = torch.eye(2, 4, device=device)[[0, 1, 1, 1]]
    y = torch.tensor([[0.8, 0.6, 0.0, 0.0]] * 4, device=device)
    anchor, positive = x.clone().requires_grad_(), y.clone().requires_grad_()
    loss = pairwise.triplet_margin_loss(
        anchor, positive, mining="hardest", normalize=False, reduction="none", backend=backend
    )
    loss[0].backward()
    # rows: y_1 for anchor 0; columns: x_1, with s = 0.6 - 0.8 + 0.2 = 0, the kink, which is no gradient
    assert loss[0].item() == pytest.approx(0.2, abs=1e-6)
    assert positive.grad[2:].count_nonzero() == 0
    assert torch.equal(positive.grad[1], x[0])


def test_triplet_of_equal_rows_is_finite(backend):
    """Distance 0: below 1e-6 it has no slope."""
    x = torch.eye(24, device=device_of(backend))[:1].expand(9, 24).contiguous()
    for mining in ("all", "hardest"):
        out = differentiate(
            lambda anchor, positive: pairwise.triplet_margin_loss(
                anchor,
                positive,
                mining=mining,  # noqa: B023
                metric="euclidean",
                backend=backend,
            ),
            {"anchor": x, "positive": x.clone()},
        )
        assert out.value.item() == pytest.approx(0.2 if mining == "all" else 0.4, rel=1e-5)
        assert not any(g.nan_to_num(1.0).any() for g in out.gradients.values())


@pytest.mark.parametrize("case", case_params(CASES))
def test_nan_and_infinity_give_nan(case, backend):
    for bad in (math.nan, math.inf):
        for name in case.shapes(*SHAPE):
            features = case.features(SHAPE, torch.float32, device_of(backend))
            features[name].reshape(-1)[7] = bad
            reductions = ("mean", "nonzero_mean") if case.loss == "triplet_margin_loss" else ("mean",)
            for reduction in reductions:
                loss = case(ck, features, normalize=True, reduction=reduction, backend=backend)
                assert loss.isnan(), f"{bad} in {name}"


@pytest.mark.parametrize("case", case_params(CASES))
def test_inputs_stay_as_they_were_and_bits_repeat(case, backend, poison):
    features = case.features(SHAPE, torch.float32, device_of(backend))
    before = {k: v.clone() for k, v in features.items()}
    strided = {k: v.T.contiguous().T for k, v in features.items()}

    def run(features):
        return differentiate(lambda **t: case(ck, t, backend=backend), features)

    first, again = run(features), run(features)
    assert all(torch.equal(before[k], features[k]) for k in features)
    assert torch.equal(first.value, again.value)
    assert all(torch.equal(g, again.gradients[k]) for k, g in first.gradients.items())
    assert_outcomes_match(run(strided), first, torch.float32, 1.0)


@pytest.mark.parametrize("case", case_params(CASES))
def test_derivatives(case, backend):
    if precise(backend) != torch.float64:
        pytest.skip(f"{backend} has no float64")
    features = case.features((5, 5, 3), torch.float64, device_of(backend))
    scalars = torch.tensor([1.3, 0.4], dtype=torch.float64, device=device_of(backend), requires_grad=True)

    def loss(x, y, scalars):
        options = {"margin": scalars[1]}
        if case.loss == "siglip_loss":
            options = {"logit_scale": scalars[0], "logit_bias": scalars[1]}
        return case(ck, with_names(case, x, y), backend=backend, **options)

    inputs = (*(x.requires_grad_() for x in features.values()), scalars)
    assert gradcheck(loss, inputs)
    assert gradgradcheck(loss, inputs)


def meta(*shape):
    return torch.randn(*shape, device="meta")


x = torch.randn(8, 16)
BAD = {
    "rows differ": (
        lambda: pairwise.siglip_loss(x, x[:7], 1.0),
        ValueError,
        "image_features (8, 16) and text_features (7, 16) must have the same first dimension",
    ),
    "dimensions differ": (
        lambda: pairwise.triplet_margin_loss(x, x[:, :15]),
        ValueError,
        "anchor (8, 16) and positive (8, 15) must have the same last dimension",
    ),
    "empty": (lambda: pairwise.triplet_margin_loss(x[:0], x[:0]), ValueError, "anchor (0, 16) is an empty batch"),
    "integers": (lambda: pairwise.siglip_loss(x.long(), x, 1.0), TypeError, "image_features has dtype torch.int64"),
    "devices": (lambda: pairwise.siglip_loss(x, meta(8, 16), 1.0), RuntimeError, "image_features is on cpu"),
    "no scale": (lambda: pairwise.siglip_loss(x, x), ValueError, "logit_scale"),
    "two scales": (lambda: pairwise.siglip_loss(x, x, 1.0, temperature=1.0), ValueError, "temperature and logit_scale"),
    "bias of two": (lambda: pairwise.siglip_loss(x, x, 1.0, torch.zeros(2)), ValueError, "logit_bias (2,)"),
    "no positives: ids": (
        lambda: pairwise.siglip_loss(x, x, 1.0, negative_only=True, ids=torch.arange(8)),
        ValueError,
        "ids refers to the positive pairs",
    ),
    "no positives: margin": (
        lambda: pairwise.siglip_loss(x, x, 1.0, negative_only=True, cutoff_margin=0.1),
        ValueError,
        "cutoff_margin refers",
    ),
    "no positives: stats": (
        lambda: pairwise.siglip_loss(x, x, 1.0, negative_only=True, return_stats=True),
        ValueError,
        "return_stats refers",
    ),
    "reduction": (
        lambda: pairwise.siglip_loss(x, x, 1.0, reduction="nonzero_mean"),
        ValueError,
        "reduction 'nonzero_mean' is unknown",
    ),
    "mining": (lambda: pairwise.triplet_margin_loss(x, x, mining="semi"), ValueError, "mining 'semi' is unknown"),
    "metric": (lambda: pairwise.triplet_margin_loss(x, x, metric="l1"), ValueError, "metric 'l1' is unknown"),
    "margin": (lambda: pairwise.triplet_margin_loss(x, x, margin="wide"), TypeError, "margin must be a number"),
    "backend": (
        lambda: pairwise.triplet_margin_loss(x, x, mining="hardest", backend="cuda"),
        ValueError,
        "backend 'cuda' is unknown",
    ),
    "float ids": (lambda: pairwise.triplet_margin_loss(x, x, ids=x[:, 0]), TypeError, "ids has dtype torch.float32"),
    "weight": (lambda: pairwise.triplet_margin_loss(x, x, weight=x[:7, 0]), ValueError, "weight (7,)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert message in str(caught.value)


def test_modules_are_their_functions(backend):
    x, y = torch.randn(2, 12, 16, device=device_of(backend))
    weight, ids = torch.rand(12, device=x.device), torch.arange(12, device=x.device) // 2
    loss = SigLipLoss(normalize=True, reduction="none", backend=backend)
    expected = pairwise.siglip_loss(
        x, y, 5.0, -2.0, normalize=True, reduction="none", weight=weight, ids=ids, backend=backend
    )
    assert torch.equal(loss(x, y, 5.0, -2.0, weight=weight, ids=ids), expected)
    assert "normalize=True" in repr(loss)
    negatives = pairwise.siglip_loss(x, y, 5.0, negative_only=True, normalize=True, reduction="none", backend=backend)
    assert torch.equal(loss(x, y, 5.0, negative_only=True), negatives)
    triplet = TripletMarginLoss(torch.nn.Parameter(torch.tensor(0.3)), mining="hardest", backend=backend).to(x.device)
    value = triplet(x, y, ids=ids)
    assert torch.equal(
        value, pairwise.triplet_margin_loss(x, y, margin=triplet.margin, mining="hardest", ids=ids, backend=backend)
    )
    value.backward()
    assert triplet.margin.grad > 0
