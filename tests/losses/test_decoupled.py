"""The decoupled loss: its weights of positives; test_every_loss.py has what it shares with the other losses."""

import math

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
import python_ref
from tests.support.losses import assert_exact, assert_module_is_function, assert_refused
from tests.support.testing import assert_outcomes_match, check, device_of, differentiate, dtype_id, supports
from tests.support.variants import EVERY, mises_fisher

SHAPE = (65, 129, 24)
CASE = EVERY["decoupled"]


def views(backend):
    return CASE.features(SHAPE, torch.float32, device_of(backend))


def test_decoupled_is_nt_xent_without_its_softplus(backend):
    """log(1 + e^x) of the decoupled loss x is NT-Xent."""
    z = views(backend)
    losses = ck.decoupled_loss(**z, temperature=0.3, reduction="none", backend=backend)
    expected = ck.nt_xent_loss(**z, temperature=0.3, reduction="none", backend=backend)
    torch.testing.assert_close(losses.exp().log1p(), expected, rtol=1e-5, atol=1e-6)


def test_positive_weight_as_a_tensor_and_as_a_callable(backend):
    """Weights are of unit views and have no gradient; 1 is none at all."""
    z = views(backend)
    weights = mises_fisher(*(F.normalize(x, dim=1) for x in z.values()))
    options = dict(reduction="none", backend=backend)
    called = differentiate(lambda **z: ck.decoupled_loss(**z, positive_weight=mises_fisher, **options), z)
    given = differentiate(lambda **z: ck.decoupled_loss(**z, positive_weight=weights, **options), z)
    assert_outcomes_match(called, given, torch.float32, 10.0)
    plain = differentiate(lambda **z: ck.decoupled_loss(**z, **options), z)
    ones = differentiate(lambda **z: ck.decoupled_loss(**z, positive_weight=torch.ones_like(weights), **options), z)
    assert_outcomes_match(ones, plain, torch.float32)
    assert not torch.allclose(called.value, plain.value)
    check(CASE, SHAPE, torch.float32, backend, positive_weight=torch.rand(65).double(), label_smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
def test_a_pair_of_weights_is_one_for_each_view_and_is_differentiated(dtype, backend):
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    z0, z1, w0, w1 = (*torch.randn(2, 65, 24).unbind(), *(2 * torch.rand(2, 65)).unbind())
    tensors = {"z0": z0, "z1": z1, "w0": w0, "w1": w1, "temperature": torch.tensor(0.3)}

    def loss(module, w0, w1, **arguments):
        return module.decoupled_loss(**arguments, positive_weight=(w0, w1), reduction="none")

    given = {name: x.to(device_of(backend), dtype) for name, x in tensors.items()}
    ours = differentiate(lambda **t: loss(ck, **t, backend=backend), given)
    expected = differentiate(lambda **t: loss(python_ref, **t), {name: x.double() for name, x in given.items()})
    assert_outcomes_match(ours, expected, dtype, 4.0)
    assert ours.gradients["w0"].any() and ours.gradients["w1"].any()


def test_a_pair_of_equal_weights_is_one_weight_for_both_views():
    z0, z1, w = *torch.randn(2, 12, 8).unbind(), torch.rand(12)
    pair = ck.decoupled_loss(z0, z1, positive_weight=(w, w), reduction="none")
    assert torch.equal(pair, ck.decoupled_loss(z0, z1, positive_weight=w, reduction="none"))
    other = ck.decoupled_loss(z0, z1, positive_weight=(w, 2 * w), reduction="none")
    assert torch.equal(other[:12], pair[:12]) and not torch.isclose(other[12:], pair[12:]).any()


def weighted_on_a_rank(group, sizes, tensors):
    mine = {name: x.split(sizes)[group.rank()].clone().requires_grad_() for name, x in tensors.items()}
    weights = mine["w0"], mine["w1"]
    loss = ck.decoupled_loss(mine["z0"], mine["z1"], positive_weight=weights, group=group)
    return loss.detach(), dict(zip(mine, torch.autograd.grad(loss, [*mine.values()]), strict=True))


def test_a_pair_of_weights_over_ranks(ranks):
    """The ranks agree on the kind of a pair of tensors, not on their numbers."""
    sizes = [4, 1, 6]
    z0, z1, w0, w1 = (*torch.randn(2, 11, 5).double(), *torch.rand(2, 11).double())
    tensors = {"z0": z0, "z1": z1, "w0": w0, "w1": w1}
    whole = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    expected = python_ref.decoupled_loss(whole["z0"], whole["z1"], positive_weight=(whole["w0"], whole["w1"]))
    gradients = torch.autograd.grad(expected, [*whole.values()])
    found = ranks.run(3, weighted_on_a_rank, sizes, tensors)
    assert_exact(torch.stack([loss for loss, _ in found]).mean(), expected.detach())
    for name, gradient in zip(tensors, gradients, strict=True):
        assert_exact(torch.cat([of_rank[name] for _, of_rank in found]) / 3, gradient)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.3, "label_smoothing": 0.1}, {"positive_weight": mises_fisher, "reduction": "none"}],
    ids=["plain", "weighted"],
)
@pytest.mark.parametrize("with_ids", [False, True], ids=["all", "ids"])
def test_module_is_its_function(with_ids, options, backend):
    inputs = torch.randn(2, 12, 8, device=device_of(backend)).unbind()
    ids = {"ids": torch.arange(12, device=inputs[0].device) // 2} if with_ids else {}
    assert_module_is_function(ck.DecoupledLoss, ck.decoupled_loss, inputs, options, backend, **ids)


X = torch.ones(8, 16)


def decoupled(**options):
    return ck.decoupled_loss(X, X, **options)


BAD = {
    "rows": (lambda: ck.decoupled_loss(X, X[:7]), ValueError, "z0 (8, 16) and z1 (7, 16) must have the same"),
    "empty": (lambda: ck.decoupled_loss(X[:0], X[:0]), ValueError, "z0 (0, 16) is an empty batch"),
    "dtypes": (lambda: ck.decoupled_loss(X, X.double()), TypeError, "z0 is torch.float32 and z1"),
    "weight too long": (
        lambda: decoupled(positive_weight=torch.ones(16)),
        ValueError,
        "positive_weight (16,) must have shape (8,)",
    ),
    "weight too short": (
        lambda: decoupled(positive_weight=lambda z0, z1: z0[:7, 0]),
        ValueError,
        "positive_weight (7,) must have shape (8,)",
    ),
    "weight a number": (lambda: decoupled(positive_weight=2.0), TypeError, "positive_weight must be a ten"),
    "one of a pair": (
        lambda: decoupled(positive_weight=(torch.ones(8),)),
        ValueError,
        "positive_weight has 1 entries; a pair has one for each view",
    ),
    "pair too long": (
        lambda: decoupled(positive_weight=(torch.ones(8), torch.ones(9))),
        ValueError,
        "positive_weight[1] (9,) must have shape (8,)",
    ),
    "pair of numbers": (lambda: decoupled(positive_weight=(1.0, 2.0)), TypeError, "positive_weight[0] must be a ten"),
    "smoothing": (lambda: decoupled(label_smoothing=2), ValueError, "label_smoothing 2"),
    "both cutoffs": (lambda: decoupled(cutoff=0.1, cutoff_margin=0.1), ValueError, "cutoff and cutoff_m"),
    "temperature": (lambda: decoupled(temperature=0.0), ValueError, "temperature 0.0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    assert_refused(*BAD[name])


def test_reference_by_hand():
    """Two orthogonal pairs at T = 1."""
    eye = torch.eye(2).double()
    assert_exact(python_ref.decoupled_loss(eye, eye, temperature=1.0), math.log(2) - 1)


def test_reference_is_nt_xent_without_the_positive():
    z0, z1 = torch.randn(2, 9, 5).double()
    z = F.normalize(torch.cat([z0, z1]))
    logits = z @ z.T / 0.1
    positive = torch.cat([logits.diagonal(9), logits.diagonal(-9)])
    sample = torch.arange(18) % 9
    expected = logits.masked_fill(sample[:, None] == sample, -math.inf).logsumexp(1) - positive
    torch.testing.assert_close(python_ref.decoupled_loss(z0, z1, reduction="none"), expected)
