"""Uniformity and t-SimCLR: values, gradients and edges against the reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from testing import (
    Case,
    assert_matches,
    assert_outcomes_match,
    case_params,
    check,
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
from contrastive_kernels.functional import distance
from contrastive_kernels.modules.distance import TSimCLRLoss, UniformityLoss

SHAPE = (65, 65, 24)


class DistanceCase(Case):
    """The losses by the files that they are in."""

    def __call__(self, module, features, **options):
        return super().__call__(distance if module is ck else module, features, **options)


CASES = {
    "uniformity": DistanceCase("uniformity_loss", lambda n, m, d: {"z": (n, d)}, {"t": 0.3}),
    "uniformity-unit": DistanceCase("uniformity_loss", lambda n, m, d: {"z": (n, d)}, {"normalize": True}),
    "t_simclr": DistanceCase("t_simclr_loss", two("z0", "z1")),
    "t_simclr-unit": DistanceCase("t_simclr_loss", two("z0", "z1"), {"normalize": True, "temperature": 0.1, "df": 1.0}),
}
SHAPES = [point for point in grid_params() if point.values[0][0] > 1]


def outcome_of_both(case, features, backend, **options):
    """Ours and the reference's on the same rounded features."""
    on_device = {k: v.to(device_of(backend)) for k, v in features.items()}
    ours = differentiate(lambda **t: case(ck, t, backend=backend, **options), on_device)
    wide = {k: v.double() for k, v in features.items()}
    return ours, differentiate(lambda **t: case(python_ref, t, **options), wide)


@pytest.mark.parametrize(("shape", "dtype"), SHAPES)
@pytest.mark.parametrize("case", case_params(CASES))
def test_loss_and_gradients(case, shape, dtype, backend, poison):
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    check(case, shape, dtype, backend)


OPTIONS = {
    "uniformity": [{"t": 2.0}, {"t": torch.tensor(0.2)}, {"t": 0.05}],
    "t_simclr": [
        {"temperature": torch.tensor([4.0])},
        {"df": 1.0, "temperature": 1.0},
        {"df": 0.5, "temperature": 0.05},
        {"df": 50.0},
    ],
}


@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name, every in OPTIONS.items() for options in every], ids=str
)
def test_options(name, options, backend, poison):
    options = {k: v.double() if torch.is_tensor(v) else v for k, v in options.items()}
    ours, _ = check(CASES[name], SHAPE, torch.float32, backend, **options)
    for argument in ("t", "temperature"):
        if argument in ours.gradients:
            assert ours.gradients[argument].dtype == torch.float64
            assert ours.gradients[argument].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("case", case_params({k: v for k, v in CASES.items() if "unit" not in k}))
def test_half_precision_rounds_the_gradients_only(case, dtype, backend, poison):
    """Rows as they are: the loss has the accuracy of float32, the gradient that of its dtype."""
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    ours, reference = outcome_of_both(case, case.features(SHAPE, dtype), backend)
    assert_matches(ours.value, reference.value, torch.float32)
    for name, expected in reference.gradients.items():
        error = (ours.gradients[name].cpu().double() - expected).norm() / expected.norm()
        # uniformity: the rounded weights of a sum of differences
        assert error <= 4 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("name", ["uniformity", "t_simclr"])
def test_rows_far_from_the_origin(name, backend):
    """Norms of 50 and distances of 1: what the squares lose to each other must not be seen in float32."""
    case = CASES[name]
    features = {k: (0.2 * v + 10).float() for k, v in case.features(SHAPE).items()}
    ours, reference = outcome_of_both(case, features, backend)
    assert_outcomes_match(ours, reference, torch.float32)


@pytest.mark.parametrize(
    ("name", "size"), [("uniformity", 1e-3), ("uniformity", 10), ("t_simclr", 1e-3), ("t_simclr", 1e3)]
)
def test_rows_of_any_size(name, size, backend):
    """Distances that the kernel does not see, and such that all but vanish under it."""
    case = CASES[name]
    features = {k: (size * v).float() for k, v in case.features(SHAPE).items()}
    ours, reference = outcome_of_both(case, features, backend)
    torch.testing.assert_close(ours.value.cpu().double(), reference.value, rtol=1e-6, atol=1e-6)
    for k, expected in reference.gradients.items():
        error = (ours.gradients[k].cpu().double() - expected).norm() / expected.norm()
        assert error <= 1e-3, k


def test_uniformity_of_unit_rows(backend):
    """Also without the bias: 2 t s - 2 t from every other row."""
    z = F.normalize(torch.randn(65, 24, dtype=precise(backend)), dim=1).to(device_of(backend))
    loss = distance.uniformity_loss(z, t=2.0, backend=backend)
    lse = ck.similarity_logsumexp(z, scale=4.0, x_ids=torch.arange(65, device=z.device), backend=backend) - 4
    torch.testing.assert_close(loss, lse.logsumexp(0) - math.log(65 * 64))
    torch.testing.assert_close(loss, distance.uniformity_loss(3 * z, normalize=True, backend=backend))


def test_losses_of_equal_rows(backend):
    """Uniformity 0, t-SimCLR the logarithm of the number of pairs, and no gradient."""
    z = torch.full((9, 24), 0.7, device=device_of(backend))
    out = differentiate(lambda z: distance.uniformity_loss(z, backend=backend), {"z": z})
    assert out.value.abs() < 1e-6
    assert out.gradients["z"].abs().max() < 1e-6
    out = differentiate(lambda z0, z1: distance.t_simclr_loss(z0, z1, backend=backend), {"z0": z, "z1": z.clone()})
    assert out.value.item() == pytest.approx(math.log(18 * 17), rel=1e-6)
    assert max(g.abs().max() for g in out.gradients.values()) < 1e-6


@pytest.mark.parametrize("case", case_params(CASES))
def test_distances_do_not_change_with_the_origin(case, backend):
    """The gradients of all rows add up to nothing."""
    if case.options.get("normalize"):
        pytest.skip("unit rows have an origin")
    features = case.features(SHAPE, precise(backend), device_of(backend))
    out = differentiate(lambda **t: case(ck, t, backend=backend), features)
    total = sum(g.sum(0) for g in out.gradients.values())
    assert total.abs().max() <= 1e-5 * max(g.abs().sum(0).max() for g in out.gradients.values())
    moved = case(ck, {k: v + 3 for k, v in features.items()}, backend=backend)
    torch.testing.assert_close(moved, out.value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", case_params(CASES))
def test_autocast_rounds_the_features_only(case, backend):
    if not supports(backend, torch.bfloat16):
        pytest.skip(f"{backend} does not take bfloat16")
    device = device_of(backend)
    features = case.features(SHAPE, torch.float32, device)
    options = {"normalize": False, "backend": backend}
    with torch.autocast(device, torch.bfloat16):
        ours = differentiate(lambda **t: case(ck, t, **options), features)
    assert ours.value.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in ours.gradients.values())
    rounded = {k: v.bfloat16().double() for k, v in features.items()}
    reference = differentiate(
        lambda **t: case(python_ref, t, normalize=False), {k: v.cpu() for k, v in rounded.items()}
    )
    torch.testing.assert_close(ours.value.cpu().double(), reference.value, rtol=2e-6, atol=0)


@pytest.mark.parametrize("case", case_params(CASES))
def test_nan_and_infinity_give_nan(case, backend):
    for bad in (math.nan, math.inf):
        for name in case.shapes(*SHAPE):
            features = case.features(SHAPE, torch.float32, device_of(backend))
            features[name][3, 5] = bad
            assert case(ck, features, backend=backend).isnan(), f"{bad} in {name}"


@pytest.mark.parametrize("case", case_params(CASES))
def test_inputs_stay_as_they_were_and_bits_repeat(case, backend, poison):
    features = case.features(SHAPE, torch.float32, device_of(backend))
    before = {k: v.clone() for k, v in features.items()}

    def run():
        return differentiate(lambda **t: case(ck, t, backend=backend), features)

    first, again = run(), run()
    assert all(torch.equal(before[k], features[k]) for k in features)
    assert torch.equal(first.value, again.value)
    assert all(torch.equal(g, again.gradients[k]) for k, g in first.gradients.items())


@pytest.mark.parametrize("case", case_params(CASES))
def test_derivatives(case, backend):
    if precise(backend) != torch.float64:
        pytest.skip(f"{backend} has no float64")
    features = case.features((5, 5, 3), torch.float64, device_of(backend))
    scalar = torch.tensor(0.7, dtype=torch.float64, device=device_of(backend), requires_grad=True)
    names = tuple(features)

    def loss(scalar, *tensors):
        option = "t" if case.loss == "uniformity_loss" else "temperature"
        return case(ck, dict(zip(names, tensors, strict=True)), backend=backend, **{option: scalar})

    inputs = (scalar, *(x.requires_grad_() for x in features.values()))
    assert gradcheck(loss, inputs)
    assert gradgradcheck(loss, inputs)


z = torch.randn(8, 16)
BAD = {
    "one row": (lambda: distance.uniformity_loss(z[:1]), ValueError, "z (1, 16) must have at least 2 rows"),
    "no rows": (lambda: distance.uniformity_loss(z[:0]), ValueError, "z (0, 16) must have at least 2 rows"),
    "one sample": (lambda: distance.t_simclr_loss(z[:1], z[:1]), ValueError, "z0 (1, 16) must have at least 2 rows"),
    "a vector": (lambda: distance.uniformity_loss(z[0]), ValueError, "z (16,) must have shape (N, D)"),
    "integers": (lambda: distance.uniformity_loss(z.long()), TypeError, "z has dtype torch.int64"),
    "t of two": (lambda: distance.uniformity_loss(z, t=torch.ones(2)), ValueError, "t (2,)"),
    "rows differ": (
        lambda: distance.t_simclr_loss(z, z[:7]),
        ValueError,
        "z0 (8, 16) and z1 (7, 16) must have the same first dimension",
    ),
    "dtypes differ": (lambda: distance.t_simclr_loss(z, z.double()), TypeError, "z0 is torch.float32 and z1 is"),
    "devices differ": (lambda: distance.t_simclr_loss(z, z.to("meta")), RuntimeError, "z0 is on cpu and z1 on meta"),
    "temperature": (lambda: distance.t_simclr_loss(z, z, temperature=-1.0), ValueError, "temperature -1.0 must be pos"),
    "df": (lambda: distance.t_simclr_loss(z, z, df=0.0), ValueError, "df 0.0 must be positive"),
    "df of a string": (lambda: distance.t_simclr_loss(z, z, df="five"), TypeError, "df must be a number"),
    "backend": (lambda: distance.uniformity_loss(z, backend="cuda"), ValueError, "backend 'cuda' is unknown"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert message in str(caught.value)


def test_modules_are_their_functions(backend):
    z0, z1 = torch.randn(2, 12, 16, device=device_of(backend))
    loss = UniformityLoss(3.0, normalize=True, backend=backend)
    assert torch.equal(loss(z0), distance.uniformity_loss(z0, t=3.0, normalize=True, backend=backend))
    assert "t=3.0" in repr(loss)
    loss = TSimCLRLoss(torch.nn.Parameter(torch.tensor(2.0)), df=1.0, backend=backend).to(z0.device)
    value = loss(z0, z1)
    assert torch.equal(value, distance.t_simclr_loss(z0, z1, temperature=2.0, df=1.0, backend=backend))
    value.backward()
    assert loss.temperature.grad.abs() > 0
