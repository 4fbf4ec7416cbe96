"""NT-Xent: what is its own; tests/losses/test_every_loss.py has what it shares with the other losses."""

import math

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
import python_ref
from tests.support.losses import assert_exact, assert_module_is_function, double
from tests.support.testing import BAND, Case, assert_matches, check, device_of, two

SHAPE = (65, 129, 24)


def test_sum_directions_is_twice_the_mean(backend):
    """I4 constant factors: the official code's value."""
    z0, z1 = torch.randn(2, 65, 24, device=device_of(backend))
    weight = torch.rand(65, device=z0.device)
    for options in ({}, {"weight": weight}):
        mean = ck.nt_xent_loss(z0, z1, backend=backend, **options)
        torch.testing.assert_close(
            ck.nt_xent_loss(z0, z1, reduction="sum_directions", backend=backend, **options), 2 * mean
        )


def test_sum_directions_adds_the_polarization_once(backend):
    """The two directions have one regulariser, as in the reference."""
    case = Case("nt_xent_loss", two("z0", "z1"), {"polarization": BAND})
    check(case, SHAPE, torch.float32, backend, reduction="sum_directions")


def test_pairs_of_views(backend, poison):
    """The mean of the two-view loss over the three pairs."""
    case = Case("nt_xent_loss", lambda n, m, d: {"z0": (n, 3, d)}, {"multi_view": "pairs"})
    check(case, SHAPE, torch.float32, backend)
    check(case, SHAPE, torch.float32, backend, reduction="sum", weight=torch.rand(65).double(), label_smoothing=0.1)


@pytest.mark.parametrize("argument", ["cutoff", "cutoff_margin"])
def test_a_threshold_per_anchor_or_per_sample(argument, backend):
    z = {"z0": torch.randn(65, 24).double(), "z1": torch.randn(65, 24).double()}
    values = torch.linspace(-0.3, 0.3, 130).double()
    for threshold in (values, values[:65]):
        ours = ck.nt_xent_loss(
            *(x.to(device_of(backend)).float() for x in z.values()),
            **{argument: threshold.to(device_of(backend))},
            reduction="none",
            backend=backend,
        )
        expected = python_ref.nt_xent_loss(**z, **{argument: threshold}, reduction="none")
        assert_matches(ours, expected, torch.float32, scale=20)


@pytest.mark.parametrize(
    ("shapes", "options"),
    [([(12, 16)] * 2, {"temperature": 0.3, "reduction": "none"}), ([(12, 3, 16)], {"logit_scale": 4.0})],
    ids=["two", "views"],
)
def test_module_is_its_function(shapes, options, backend):
    inputs = tuple(torch.randn(shape, device=device_of(backend)) for shape in shapes)
    assert_module_is_function(ck.NTXentLoss, ck.nt_xent_loss, inputs, options, backend)


def test_module_takes_the_inputs_of_a_batch_with_the_call(backend):
    z = torch.randn(2, 12, 16, device=device_of(backend)).unbind(0)
    weight, ids = torch.rand(12, device=z[0].device), torch.arange(12, device=z[0].device) // 2
    options = {"temperature": 0.3}
    assert_module_is_function(ck.NTXentLoss, ck.nt_xent_loss, z, options, backend, weight=weight, ids=ids)


def test_module_trains_its_temperature(backend):
    z0, z1 = torch.randn(2, 12, 16, device=device_of(backend))
    loss = ck.NTXentLoss(torch.nn.Parameter(torch.tensor(0.3)), backend=backend).to(z0.device)
    assert [name for name, _ in loss.named_parameters()] == ["temperature"]
    loss(z0, z1).backward()
    assert loss.temperature.grad.abs() > 0


# The reference


@double
def test_reference_is_cross_entropy_without_self():
    z0, z1 = torch.randn(2, 6, 4)
    z = F.normalize(torch.cat([z0, z1]))
    logits = (z @ z.T / 0.5).fill_diagonal_(-math.inf)
    target = torch.arange(12).roll(6)
    loss = python_ref.nt_xent_loss
    assert_exact(loss(z0, z1), F.cross_entropy(logits, target))
    assert_exact(loss(z0, z1, reduction="none"), F.cross_entropy(logits, target, reduction="none"))
    assert_exact(loss(z0, z1, reduction="sum_directions"), 2 * F.cross_entropy(logits, target))


@double
def test_reference_of_two_identical_pairs():
    """Row 0 sees its positive at 1 and two negatives at 0: log(e + 2) - 1."""
    eye = torch.eye(2)
    assert_exact(python_ref.nt_xent_loss(eye, eye, temperature=1.0), math.log(math.e + 2) - 1)


@double
def test_reference_weights_both_views_of_a_sample():
    x, y, weight = torch.randn(5, 3), torch.randn(5, 3), torch.rand(5)
    rows = python_ref.nt_xent_loss(x, y, reduction="none").reshape(2, 5)
    assert_exact(python_ref.nt_xent_loss(x, y, weight=weight), (weight * rows).sum() / (2 * weight.sum()))
