"""The distance polarization by itself; tests/losses/test_lmcl.py has it inside other losses."""

import math

import pytest
import torch

import contrastive_kernels as ck
import python_ref
from tests.support.losses import assert_exact, assert_module_is_function, double
from tests.support.testing import assert_outcomes_match, device_of, differentiate, grid_params, supports


@pytest.mark.parametrize(("shape", "dtype"), grid_params())
@pytest.mark.parametrize("reduction", ["mean", "sum", "row", "none"])
@pytest.mark.parametrize("ids", [False, True], ids=["self-pairs", "ids"])
def test_loss_and_gradients(shape, ids, reduction, dtype, backend, poison):
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


def test_rows_are_normalised(backend):
    z = torch.randn(65, 24, dtype=torch.float64)
    ours = differentiate(
        lambda z: ck.distance_polarization(z, backend=backend), {"z": z.to(device_of(backend)).float()}
    )
    reference = differentiate(lambda z: python_ref.distance_polarization(z), {"z": z.float().double()})
    assert reference.gradients["z"].any()
    assert_outcomes_match(ours, reference, torch.float32)


def test_nothing_in_the_band_means_nothing(backend):
    """I12 band: orthogonal rows have the distance 0.5, the band's upper end."""
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


def test_module_is_its_function(backend):
    z = torch.randn(12, 16, device=device_of(backend))
    options = {"lower": 0.2, "upper": 0.6}
    assert_module_is_function(ck.DistancePolarization, ck.distance_polarization, (z,), options, backend)


# The reference


def at_cosine(*cosines):
    """Return unit rows in the plane whose cosine with the first one, (1, 0), is given."""
    return torch.tensor([[1.0, 0.0]] + [[c, math.sqrt(1 - c * c)] for c in cosines])


@double
@pytest.mark.parametrize(
    ("cosine", "h"),
    [(0.4, 0.04), (0.8, 0.0), (0.9, 0.0), (0.0, 0.0), (-0.5, 0.0)],
    ids=["mid-band", "at-lower", "below", "at-upper", "above"],
)
def test_reference_of_one_pair(cosine, h):
    """D = (1 - cosine) / 2 in the band (0.1, 0.5), whose ends count as outside."""
    z = at_cosine(cosine)
    for reduction, expected in {"mean": h, "sum": 2 * h, "row": h}.items():
        assert_exact(python_ref.distance_polarization(z, reduction=reduction), expected)
    assert_exact(python_ref.distance_polarization(z, reduction="none"), [h, h])


@double
def test_reference_leaves_out_equal_ids():
    z = at_cosine(0.4, 0.4)
    assert python_ref.distance_polarization(z, torch.tensor([3, 3, 3])) == 0
    # pairs (0, 1), (1, 2) and their mirror images: h = 0.04 and, the two others being equal, 0
    assert_exact(python_ref.distance_polarization(z, torch.tensor([0, 1, 0]), reduction="sum"), 2 * 0.04)
    assert_exact(python_ref.distance_polarization(z, torch.tensor([0, 1, 0])), 2 * 0.04 / 4)
