"""The distance polarization, alone and inside a loss."""

import pytest
import torch
from testing import (
    POLARIZED,
    assert_outcomes_match,
    case_params,
    check,
    check_statistics,
    device_of,
    differentiate,
    grid_params,
    matching_ids,
    option_params,
    supports,
)

import contrastive_kernels as ck
import python_ref

SHAPE = (65, 129, 24)


@pytest.mark.parametrize(("shape", "dtype"), grid_params())
@pytest.mark.parametrize("reduction", ["mean", "sum", "row", "none"])
@pytest.mark.parametrize("ids", [False, True], ids=["self-pairs", "ids"])
def test_distance_polarization(shape, ids, reduction, dtype, backend, poison):
    """A wide band for D = 1, where the distances are 0 and 1; the rows are unit in float64 and rounded after."""
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    n, _, d = shape
    z = torch.nn.functional.normalize(torch.randn(n, d, dtype=torch.float64), dim=1).to(dtype)
    ids = torch.randint(max(n // 2, 1), (n,)) if ids else None

    def loss(module, z, ids, **options):
        return module.distance_polarization(
            z, ids, lower=0.3, upper=0.6, reduction=reduction, normalize=False, **options
        )

    device = device_of(backend)
    ours = differentiate(
        lambda z: loss(ck, z, None if ids is None else ids.to(device), backend=backend), {"z": z.to(device)}
    )
    reference = differentiate(lambda z: loss(python_ref, z, ids), {"z": z.double()})
    assert_outcomes_match(ours, reference, dtype, 1.0)


def test_distance_polarization_normalises(backend):
    z = torch.randn(65, 24, dtype=torch.float64)
    ours = differentiate(
        lambda z: ck.distance_polarization(z, backend=backend), {"z": z.to(device_of(backend)).float()}
    )
    reference = differentiate(lambda z: python_ref.distance_polarization(z), {"z": z.float().double()})
    assert reference.gradients["z"].any()
    assert_outcomes_match(ours, reference, torch.float32)


@pytest.mark.parametrize(("shape", "dtype"), grid_params())
@pytest.mark.parametrize("case", case_params(POLARIZED))
def test_loss_and_gradients(case, shape, dtype, backend, poison):
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    check(case, shape, dtype, backend, reduction="none")


@pytest.mark.parametrize(("case", "options"), option_params(POLARIZED))
def test_options(case, options, backend, poison):
    check(case, SHAPE, torch.float32, backend, **options(case, *SHAPE[:2]))


@pytest.mark.parametrize("case", case_params(POLARIZED))
def test_statistics(case, backend):
    check_statistics(case, SHAPE, torch.float32, backend, **matching_ids(case, *SHAPE[:2]))


@pytest.mark.parametrize("case", case_params(POLARIZED))
def test_the_fused_term_is_the_separate_one(case, backend):
    """weight times distance_polarization over the loss's negatives, whatever the temperature."""
    n = SHAPE[0]
    features = case.features(SHAPE, torch.float32, device_of(backend))
    plain = case(ck, features, polarization=None, backend=backend)
    strong = ck.Polarization(0.1, 0.5, weight=5.0)
    extra = case(ck, features, polarization=strong, backend=backend) - plain
    if case.loss == "nt_xent_loss":
        ids = torch.arange(n, device=extra.device).repeat(2)
        alone = ck.distance_polarization(torch.cat(list(features.values())), ids, backend=backend)
        torch.testing.assert_close(extra, 5 * alone, rtol=1e-4, atol=1e-6)
    warm = case(ck, features, polarization=strong, temperature=10.0, backend=backend)
    torch.testing.assert_close(
        warm - case(ck, features, polarization=None, temperature=10.0, backend=backend), extra, rtol=1e-4, atol=1e-6
    )


def test_the_temperature_gradient_is_the_losss_alone(backend):
    """The band is a function of the unscaled similarity: <X, dX> / a would count it."""
    z0, z1 = torch.randn(2, 65, 24, device=device_of(backend))

    def gradient(polarization):
        scale = torch.tensor(3.0, device=z0.device, requires_grad=True)
        ck.nt_xent_loss(z0, z1, logit_scale=scale, polarization=polarization, backend=backend).backward()
        return scale.grad

    torch.testing.assert_close(gradient(ck.Polarization(weight=100.0)), gradient(None), rtol=1e-5, atol=1e-6)


def test_nothing_in_the_band_means_nothing(backend):
    """Orthogonal rows, distance 0.5, the band's upper end."""
    z = torch.eye(24, device=device_of(backend))
    out = differentiate(lambda z: ck.distance_polarization(z, backend=backend), {"z": z})
    assert out.value == 0
    assert not out.gradients["z"].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "row", "none"])
def test_no_pairs_means_nothing(reduction, backend, poison):
    for rows, ids in ((1, None), (5, torch.zeros(5, dtype=torch.int64, device=device_of(backend)))):
        z = torch.randn(rows, 24, device=device_of(backend))
        out = differentiate(
            lambda z: ck.distance_polarization(z, ids, reduction=reduction, backend=backend),  # noqa: B023
            {"z": z},
        )
        assert not out.value.nan_to_num(1.0).any()
        assert not out.gradients["z"].nan_to_num(1.0).any()


def test_nan_gives_nan(backend):
    z = torch.randn(65, 24, device=device_of(backend))
    z[7, 7] = torch.nan
    assert ck.distance_polarization(z, backend=backend).isnan()
