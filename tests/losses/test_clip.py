"""CLIP: what is its own; tests/losses/test_every_loss.py has what it shares with the other losses."""

import math

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
import python_ref
from tests.support.losses import assert_exact, assert_module_is_function, double
from tests.support.testing import device_of


def test_bias_has_no_gradient_and_no_effect(backend):
    x, y = torch.randn(2, 65, 24, device=device_of(backend))
    bias = torch.tensor(-10.0, device=x.device, requires_grad=True)
    with_bias, stats = ck.clip_loss(x, y, 2.0, bias, return_stats=True, backend=backend)
    without, plain = ck.clip_loss(x, y, 2.0, return_stats=True, backend=backend)
    torch.testing.assert_close(with_bias, without)
    torch.testing.assert_close(stats.positive_logit, plain.positive_logit - 10)
    torch.testing.assert_close(stats.lse, plain.lse - 10)
    torch.testing.assert_close(stats.logit_max, plain.logit_max - 10)
    if with_bias.requires_grad:
        (gradient,) = torch.autograd.grad(with_bias, bias, allow_unused=True)
        assert gradient is None or abs(gradient) < 1e-5


def test_module_is_its_function(backend):
    inputs = tuple(torch.randn(shape, device=device_of(backend)) for shape in ((12, 16), (12, 16), ()))
    assert_module_is_function(ck.ClipLoss, ck.clip_loss, inputs, {"normalize": True}, backend)


@double
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_reference_is_two_cross_entropies(smoothing):
    """Both directions, with a bias that cancels, and as symmetric InfoNCE."""
    x, y = F.normalize(torch.randn(2, 7, 5), dim=-1)
    target = torch.arange(7)
    logits = 9 * x @ y.T
    expected = (
        F.cross_entropy(logits, target, label_smoothing=smoothing)
        + F.cross_entropy(logits.T, target, label_smoothing=smoothing)
    ) / 2
    for loss in (
        python_ref.clip_loss(x, y, 9.0, label_smoothing=smoothing),
        python_ref.clip_loss(x, y, 9.0, -4.0, label_smoothing=smoothing),
        python_ref.info_nce_loss(x, y, logit_scale=9.0, symmetric=True, label_smoothing=smoothing),
    ):
        assert_exact(loss, expected)
    assert python_ref.clip_loss(x, y, 9.0, reduction="none").shape == (2, 7)


@pytest.mark.parametrize("loss", [ck.clip_loss, ck.siglip_loss])
def test_statistics_show_raw_rows_and_the_logarithm_of_a_scale(loss):
    """Of unit rows, logits end at the scale, plus the bias."""
    x, y = torch.randn(2, 40, 6).unbind()
    x, y = (F.normalize(z, dim=1) for z in (x, x + 0.01 * y))
    largest = [
        loss(*rows, scale, 0.5, return_stats=True)[1].logit_max.max().item()
        for rows, scale in (((x, y), 50.0), ((3 * x, 3 * y), 50.0), ((x, y), math.log(50.0)))
    ]
    assert 49 < largest[0] <= 50.5 < largest[1]
    assert largest[2] < 5
