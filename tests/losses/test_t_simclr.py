"""t-SimCLR: its own options; tests/losses/test_uniformity.py has what it shares with the other loss of distances."""

import math

import pytest
import torch

import contrastive_kernels as ck
from tests.support.losses import assert_module_is_function, assert_refused
from tests.support.testing import check, device_of, differentiate
from tests.support.variants import EVERY

SHAPE = (65, 65, 24)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": torch.tensor([4.0]).double()},
        {"df": 1.0, "temperature": 1.0},
        {"df": 0.5, "temperature": 0.05},
        {"df": 50.0},
    ],
    ids=str,
)
def test_options(options, backend, poison):
    ours, _ = check(EVERY["t_simclr"], SHAPE, torch.float32, backend, **options)
    if "temperature" in ours.gradients:
        assert ours.gradients["temperature"].dtype == torch.float64
        assert ours.gradients["temperature"].any()


def test_equal_rows(backend):
    """The logarithm of the number of pairs, and no gradient."""
    z = torch.full((9, 24), 0.7, device=device_of(backend))
    out = differentiate(lambda z0, z1: ck.t_simclr_loss(z0, z1, backend=backend), {"z0": z, "z1": z.clone()})
    assert out.value.item() == pytest.approx(math.log(18 * 17), rel=1e-6)
    assert max(g.abs().max() for g in out.gradients.values()) < 1e-6


Z = torch.randn(8, 16)
BAD = {
    "one sample": (lambda: ck.t_simclr_loss(Z[:1], Z[:1]), ValueError, "z0 (1, 16) must have at least 2 rows"),
    "rows differ": (
        lambda: ck.t_simclr_loss(Z, Z[:7]),
        ValueError,
        "z0 (8, 16) and z1 (7, 16) must have the same first dimension",
    ),
    "dtypes differ": (lambda: ck.t_simclr_loss(Z, Z.double()), TypeError, "z0 is torch.float32 and z1 is"),
    "devices differ": (lambda: ck.t_simclr_loss(Z, Z.to("meta")), RuntimeError, "z0 is on cpu and z1 on meta"),
    "temperature": (lambda: ck.t_simclr_loss(Z, Z, temperature=-1.0), ValueError, "temperature -1.0 must be pos"),
    "df": (lambda: ck.t_simclr_loss(Z, Z, df=0.0), ValueError, "df 0.0 must be positive"),
    "df of a string": (lambda: ck.t_simclr_loss(Z, Z, df="five"), TypeError, "df must be a number"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    assert_refused(*BAD[name])


def test_module_is_its_function(backend):
    inputs = torch.randn(2, 12, 16, device=device_of(backend)).unbind(0)
    options = {"temperature": 2.0, "df": 1.0}
    assert_module_is_function(ck.TSimCLRLoss, ck.t_simclr_loss, inputs, options, backend)


def test_module_trains_its_temperature(backend):
    z0, z1 = torch.randn(2, 12, 16, device=device_of(backend))
    loss = ck.TSimCLRLoss(torch.nn.Parameter(torch.tensor(2.0)), df=1.0, backend=backend).to(z0.device)
    value = loss(z0, z1)
    assert torch.equal(value, ck.t_simclr_loss(z0, z1, temperature=2.0, df=1.0, backend=backend))
    value.backward()
    assert loss.temperature.grad.abs() > 0
