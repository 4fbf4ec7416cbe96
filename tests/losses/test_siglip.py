"""SigLIP: its scale, bias and negatives only; tests/losses/test_every_loss.py has what it shares with other losses."""

import math

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
from tests.support.losses import assert_module_is_function, assert_refused
from tests.support.testing import check, device_of, differentiate, precise
from tests.support.variants import VARIANTS

SHAPE = (65, 129, 24)
SIGLIP = VARIANTS["siglip-mild"]


def unit(*shape, dtype=torch.float32):
    return F.normalize(torch.randn(shape, dtype=torch.float64), dim=-1).to(dtype)


OPTIONS = {
    "float scale": {"logit_scale": 7.0, "logit_bias": None},
    "tensors": {"logit_scale": torch.tensor(7.0).double(), "logit_bias": torch.tensor([-2.0]).double()},
    "temperature": {"temperature": torch.tensor(0.2).double(), "logit_scale": None},
    "negative only": {"negative_only": True, "logit_bias": torch.tensor(-2.0).double()},
    "negative only, cutoff": {"negative_only": True, "cutoff": 0.1},
    "other rows": {"normalize": True},
    "cutoff margin": {"cutoff_margin": 0.05, "reduction": "none"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, backend, poison):
    ours, _ = check(SIGLIP, SHAPE, torch.float32, backend, **OPTIONS[name])
    for argument in ("logit_scale", "logit_bias", "temperature"):
        if argument in ours.gradients:
            assert ours.gradients[argument].dtype == torch.float64
            assert ours.gradients[argument].any()


def test_loss_is_its_definition(backend):
    """I5 SigLIP closed form: -log sigmoid(z u) over all pairs; one softplus a pair with the trace taken off."""
    x, y = unit(2, 65, 24, dtype=precise(backend)).to(device_of(backend))
    loss = ck.siglip_loss(x, y, 10.0, -10.0, backend=backend)
    logits = 10 * x @ y.T - 10
    signs = 2 * torch.eye(65, device=x.device, dtype=x.dtype) - 1
    torch.testing.assert_close(loss, -F.logsigmoid(signs * logits).sum() / 65)
    torch.testing.assert_close(loss, (torch.logaddexp(logits, 0 * logits).sum() - logits.trace()) / 65)


def test_trained_pairs_keep_their_digits(backend):
    """The losses of trained pairs are far below the rounding of 1."""
    x = torch.eye(24, device=device_of(backend), dtype=torch.float32)
    loss = ck.siglip_loss(x, x, 60.0, -30.0, reduction="none", backend=backend)
    torch.testing.assert_close(loss.cpu().double(), torch.full((24,), 24 * math.exp(-30)).double(), rtol=1e-5, atol=0)
    loss = ck.siglip_loss(x, x, 100.0, -10.0, negative_only=True, backend=backend)
    torch.testing.assert_close(loss.cpu().double().item(), 90 + 23 * math.exp(-10), rtol=1e-6, atol=0)


def test_a_batch_on_two_devices(backend):
    """Each has its own texts, and the other's as negatives only."""
    x, y = unit(2, 64, 24).to(device_of(backend))
    scale, bias = 10.0, -3.0
    options = dict(reduction="sum", backend=backend)
    whole = ck.siglip_loss(x, y, scale, bias, **options)
    (x0, x1), (y0, y1) = x.chunk(2), y.chunk(2)
    parts = [
        ck.siglip_loss(a, b, scale, bias, negative_only=negative_only, **options)
        for a, b, negative_only in ((x0, y0, False), (x1, y1, False), (x0, y1, True), (x1, y0, True))
    ]
    torch.testing.assert_close(whole, sum(parts))


def test_scale_gradient_is_that_of_the_rows(backend):
    """I10 scale gradient: <X, dX> = <Y, dY> = a dL/da."""
    x, y = unit(2, 65, 24, dtype=precise(backend)).to(device_of(backend))
    scale = torch.tensor(10.0, dtype=x.dtype, device=x.device)
    out = differentiate(
        lambda x, y, scale: ck.siglip_loss(x, y, scale, -3.0, backend=backend), {"x": x, "y": y, "scale": scale}
    ).gradients
    torch.testing.assert_close((x * out["x"]).sum(), scale * out["scale"])
    torch.testing.assert_close((y * out["y"]).sum(), scale * out["scale"])


X = torch.randn(8, 16)
BAD = {
    "rows differ": (
        lambda: ck.siglip_loss(X, X[:7], 1.0),
        ValueError,
        "image_features (8, 16) and text_features (7, 16) must have the same first dimension",
    ),
    "integers": (lambda: ck.siglip_loss(X.long(), X, 1.0), TypeError, "image_features has dtype torch.int64"),
    "devices": (lambda: ck.siglip_loss(X, X.to("meta"), 1.0), RuntimeError, "image_features is on cpu"),
    "no scale": (lambda: ck.siglip_loss(X, X), ValueError, "logit_scale"),
    "two scales": (lambda: ck.siglip_loss(X, X, 1.0, temperature=1.0), ValueError, "temperature and logit_scale"),
    "bias of two": (lambda: ck.siglip_loss(X, X, 1.0, torch.zeros(2)), ValueError, "logit_bias (2,)"),
    "no positives: ids": (
        lambda: ck.siglip_loss(X, X, 1.0, negative_only=True, ids=torch.arange(8)),
        ValueError,
        "ids refers to the positive pairs",
    ),
    "no positives: margin": (
        lambda: ck.siglip_loss(X, X, 1.0, negative_only=True, cutoff_margin=0.1),
        ValueError,
        "cutoff_margin refers",
    ),
    "no positives: stats": (
        lambda: ck.siglip_loss(X, X, 1.0, negative_only=True, return_stats=True),
        ValueError,
        "return_stats refers",
    ),
    "reduction": (
        lambda: ck.siglip_loss(X, X, 1.0, reduction="nonzero_mean"),
        ValueError,
        "reduction 'nonzero_mean' is unknown",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    assert_refused(*BAD[name])


def test_module_is_its_function(backend):
    """The scale and the bias come with the call, for they are the model's."""
    x, y = torch.randn(2, 12, 16, device=device_of(backend))
    weight, ids = torch.rand(12, device=x.device), torch.arange(12, device=x.device) // 2
    inputs = (x, y, torch.tensor(5.0, device=x.device), torch.tensor(-2.0, device=x.device))
    options = {"normalize": True, "reduction": "none"}
    assert_module_is_function(ck.SigLipLoss, ck.siglip_loss, inputs, options, backend, weight=weight, ids=ids)
    negatives = ck.siglip_loss(x, y, 5.0, negative_only=True, **options, backend=backend)
    assert torch.equal(ck.SigLipLoss(**options, backend=backend)(x, y, 5.0, negative_only=True), negatives)
