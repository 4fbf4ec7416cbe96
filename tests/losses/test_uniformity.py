"""Uniformity: distances of any size; tests/losses/test_every_loss.py has what it shares with the other losses."""

import math

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
import python_ref
from tests.support.losses import assert_module_is_function, assert_refused
from tests.support.testing import (
    assert_matches,
    assert_outcomes_match,
    case_params,
    check,
    device_of,
    differentiate,
    precise,
)
from tests.support.variants import EVERY

SHAPE = (65, 65, 24)
# t-SimCLR is the other loss of distances between raw rows.
DISTANCES = ("uniformity", "t_simclr")
every_distance = pytest.mark.parametrize("case", case_params({name: EVERY[name] for name in DISTANCES}))


def outcome_of_both(case, features, backend):
    """Return ours and the reference's outcome on the same rounded features."""
    on_device = {k: v.to(device_of(backend)) for k, v in features.items()}
    ours = differentiate(lambda **t: case(ck, t, backend=backend), on_device)
    wide = {k: v.double() for k, v in features.items()}
    return ours, differentiate(lambda **t: case(python_ref, t), wide)


@pytest.mark.parametrize("t", [2.0, torch.tensor(0.2).double(), 0.05], ids=str)
def test_options(t, backend, poison):
    ours, _ = check(EVERY["uniformity"], SHAPE, torch.float32, backend, t=t)
    if "t" in ours.gradients:
        assert ours.gradients["t"].dtype == torch.float64
        assert ours.gradients["t"].any()


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "unit"])
def test_loss_is_its_definition(normalize, backend):
    """I13 uniformity definition: the logarithm of the mean of exp(-t d^2) over all pairs."""
    z = torch.randn(33, 24, dtype=precise(backend))
    distances = torch.pdist(F.normalize(z) if normalize else z)
    expected = (-0.3 * distances.square()).exp().mean().log()
    loss = ck.uniformity_loss(z.to(device_of(backend)), t=0.3, normalize=normalize, backend=backend)
    assert_matches(loss, expected, loss.dtype, scale=10.0)


def test_unit_rows(backend):
    """Also without the bias: 2 t s - 2 t from every other row."""
    z = F.normalize(torch.randn(65, 24, dtype=precise(backend)), dim=1).to(device_of(backend))
    loss = ck.uniformity_loss(z, t=2.0, backend=backend)
    lse = ck.similarity_logsumexp(z, scale=4.0, x_ids=torch.arange(65, device=z.device), backend=backend) - 4
    torch.testing.assert_close(loss, lse.logsumexp(0) - math.log(65 * 64))
    torch.testing.assert_close(loss, ck.uniformity_loss(3 * z, normalize=True, backend=backend))


@every_distance
def test_rows_far_from_the_origin(case, backend):
    """Norms of 50 and distances of 1: what the squares lose to each other must not be seen in float32."""
    features = {k: (0.2 * v + 10).float() for k, v in case.features(SHAPE).items()}
    ours, reference = outcome_of_both(case, features, backend)
    assert_outcomes_match(ours, reference, torch.float32)


@pytest.mark.parametrize(
    ("name", "size"), [("uniformity", 1e-3), ("uniformity", 10), ("t_simclr", 1e-3), ("t_simclr", 1e3)]
)
def test_rows_of_any_size(name, size, backend):
    """Distances that the kernel does not see, and such that all but vanish under it."""
    case = EVERY[name]
    features = {k: (size * v).float() for k, v in case.features(SHAPE).items()}
    ours, reference = outcome_of_both(case, features, backend)
    torch.testing.assert_close(ours.value.cpu().double(), reference.value, rtol=1e-6, atol=1e-6)
    for k, expected in reference.gradients.items():
        error = (ours.gradients[k].cpu().double() - expected).norm() / expected.norm()
        assert error <= 1e-3, k


@every_distance
def test_the_origin_is_irrelevant(case, backend):
    """The gradients of all rows add up to nothing."""
    features = case.features(SHAPE, precise(backend), device_of(backend))
    out = differentiate(lambda **t: case(ck, t, backend=backend), features)
    total = sum(g.sum(0) for g in out.gradients.values())
    assert total.abs().max() <= 1e-5 * max(g.abs().sum(0).max() for g in out.gradients.values())
    moved = case(ck, {k: v + 3 for k, v in features.items()}, backend=backend)
    torch.testing.assert_close(moved, out.value, rtol=1e-5, atol=1e-6)


@every_distance
def test_infinity_in_raw_rows_gives_nan(case, backend):
    """Infinite distances are no pairs far apart."""
    for bad in (math.nan, math.inf):
        for name in case.shapes(*SHAPE):
            features = case.features(SHAPE, torch.float32, device_of(backend))
            features[name][3, 5] = bad
            assert case(ck, features, backend=backend).isnan(), f"{bad} in {name}"


def test_equal_rows(backend):
    """Loss 0 and no gradient."""
    z = torch.full((9, 24), 0.7, device=device_of(backend))
    out = differentiate(lambda z: ck.uniformity_loss(z, backend=backend), {"z": z})
    assert out.value.abs() < 1e-6
    assert out.gradients["z"].abs().max() < 1e-6


def test_scale_gradient_of_the_kernel(backend):
    """I10 scale gradient: with the bias, which has the norms and its own scale, held."""
    x = torch.randn(33, 24, dtype=precise(backend), device=device_of(backend))
    bias = -0.3 * x.square().sum(1)
    scale = torch.tensor(0.6, dtype=x.dtype, device=x.device)
    ids = torch.arange(33, device=x.device)
    got = differentiate(
        lambda x, scale: ck.similarity_logsumexp(x, scale=scale, x_ids=ids, y_bias=bias, backend=backend).logsumexp(0),
        {"x": x, "scale": scale},
    ).gradients
    assert_matches(scale * got["scale"], (x * got["x"]).sum() / 2, x.dtype, scale=10.0)


Z = torch.randn(8, 16)
BAD = {
    "one row": (lambda: ck.uniformity_loss(Z[:1]), ValueError, "z (1, 16) must have at least 2 rows"),
    "no rows": (lambda: ck.uniformity_loss(Z[:0]), ValueError, "z (0, 16) must have at least 2 rows"),
    "a vector": (lambda: ck.uniformity_loss(Z[0]), ValueError, "z (16,) must have shape (N, D)"),
    "integers": (lambda: ck.uniformity_loss(Z.long()), TypeError, "z has dtype torch.int64"),
    "t of two": (lambda: ck.uniformity_loss(Z, t=torch.ones(2)), ValueError, "t (2,)"),
    "backend": (lambda: ck.uniformity_loss(Z, backend="cuda"), ValueError, "backend 'cuda' is unknown"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    assert_refused(*BAD[name])


def test_module_is_its_function(backend):
    z = torch.randn(12, 16, device=device_of(backend))
    options = {"t": 3.0, "normalize": True}
    assert_module_is_function(ck.UniformityLoss, ck.uniformity_loss, (z,), options, backend)
