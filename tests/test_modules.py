"""The modules are their functions with the hyper-parameters held; MoCo's queue is first in, first out."""

import copy
import pickle

import pytest
import torch
from testing import device_of

import contrastive_kernels as ck

N, D = 12, 16


def features(*shapes, device):
    return [torch.randn(shape, device=device) for shape in shapes]


PAIRS = {
    "InfoNCELoss": (ck.InfoNCELoss, ck.info_nce_loss, [(N, D)] * 2, {"temperature": 0.2, "symmetric": True}),
    "InfoNCELoss-shared": (ck.InfoNCELoss, ck.info_nce_loss, [(N, D), (N, D), (5, D)], {"label_smoothing": 0.1}),
    "NTXentLoss": (ck.NTXentLoss, ck.nt_xent_loss, [(N, D)] * 2, {"temperature": 0.3, "reduction": "none"}),
    "NTXentLoss-views": (ck.NTXentLoss, ck.nt_xent_loss, [(N, 3, D)], {"logit_scale": 4.0}),
    "ClipLoss": (ck.ClipLoss, ck.clip_loss, [(N, D), (N, D), ()], {"normalize": True}),
    "ArCLLoss": (ck.ArCLLoss, ck.arcl_loss, [(N, 4, D)], {"denominator": "one_view"}),
    "DistancePolarization": (ck.DistancePolarization, ck.distance_polarization, [(N, D)], {"lower": 0.2, "upper": 0.6}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_module_is_its_function(name, backend):
    module, function, shapes, options = PAIRS[name]
    inputs = features(*shapes, device=device_of(backend))
    loss = module(**options, backend=backend)
    assert torch.equal(loss(*inputs), function(*inputs, **options, backend=backend))
    again = pickle.loads(pickle.dumps(copy.deepcopy(loss)))
    assert torch.equal(again(*inputs), loss(*inputs))
    for option, value in options.items():
        assert f"{option}={value}" in repr(loss)


@pytest.mark.parametrize("base", ["nt_xent", "info_nce"])
def test_lmcl_is_the_polarized_base(base, backend):
    inputs = features((N, D), (N, D), device=device_of(backend))
    function = {"nt_xent": ck.nt_xent_loss, "info_nce": ck.info_nce_loss}[base]
    loss = ck.LMCLLoss(base, lower=0.2, upper=0.7, weight=2.0, temperature=0.3, backend=backend)
    expected = function(*inputs, temperature=0.3, polarization=ck.Polarization(0.2, 0.7, 2.0), backend=backend)
    assert torch.equal(loss(*inputs), expected)


def test_lmcl_default_is_nt_xent():
    inputs = features((N, D), (N, D), device="cpu")
    torch.testing.assert_close(ck.LMCLLoss()(*inputs), ck.nt_xent_loss(*inputs, polarization=ck.Polarization()))


def test_unknown_arguments_are_refused_at_construction():
    with pytest.raises(TypeError, match="tau"):
        ck.NTXentLoss(tau=0.1)
    with pytest.raises(ValueError, match="base 'clip' is unknown"):
        ck.LMCLLoss("clip")
    with pytest.raises(ValueError, match="queue_size"):
        ck.MoCoLoss(dim=4, queue_size=0)


def test_inputs_of_a_batch_come_with_the_call(backend):
    z0, z1 = features((N, D), (N, D), device=device_of(backend))
    weight, ids = torch.rand(N, device=z0.device), torch.arange(N, device=z0.device) // 2
    assert torch.equal(
        ck.NTXentLoss(0.3, backend=backend)(z0, z1, weight=weight, ids=ids),
        ck.nt_xent_loss(z0, z1, temperature=0.3, weight=weight, ids=ids, backend=backend),
    )


def test_a_temperature_parameter_is_trained(backend):
    z0, z1 = features((N, D), (N, D), device=device_of(backend))
    loss = ck.NTXentLoss(torch.nn.Parameter(torch.tensor(0.3)), backend=backend).to(z0.device)
    assert [name for name, _ in loss.named_parameters()] == ["temperature"]
    loss(z0, z1).backward()
    assert loss.temperature.grad.abs() > 0


def moco(queue_size=30, backend=None, **options):
    return ck.MoCoLoss(dim=D, queue_size=queue_size, temperature=0.2, backend=backend, **options).to(device_of(backend))


def test_moco_uses_the_queue_as_it_was(backend):
    """The batch's own keys are no negatives."""
    loss = moco(backend=backend)
    query, key = features((N, D), (N, D), device=loss.queue.device)
    torch.testing.assert_close(loss.queue.norm(dim=1), torch.ones(30, device=query.device))
    before = loss.queue.clone()
    value = loss(query, key)
    torch.testing.assert_close(value, ck.moco_loss(query, key, before, temperature=0.2, backend=backend))


def test_moco_queue_is_first_in_first_out(backend):
    """12 keys a batch into 30 places: the third batch wraps around and overwrites the oldest six."""
    loss = moco(backend=backend)
    keys = features(*[(N, D)] * 3, device=loss.queue.device)
    start = loss.queue.clone()
    for key in keys:
        loss(torch.randn_like(key), key)
    unit = torch.nn.functional.normalize(torch.cat(keys), dim=1)
    expected = torch.cat([unit[30:], unit[6:30]])
    torch.testing.assert_close(loss.queue, expected)
    assert not torch.equal(loss.queue, start)
    assert not loss.queue.requires_grad


def test_moco_queue_takes_the_last_of_too_many(backend):
    loss = moco(queue_size=5, backend=backend)
    key = torch.randn(N, D, device=loss.queue.device)
    loss(torch.randn_like(key), key)
    kept = {tuple(row.tolist()) for row in torch.nn.functional.normalize(key[-5:], dim=1).cpu().mul(1e4).round()}
    assert {tuple(row.tolist()) for row in loss.queue.cpu().mul(1e4).round()} == kept


def test_moco_in_evaluation_leaves_the_queue(backend):
    loss = moco(backend=backend).eval()
    before = loss.queue.clone()
    loss(*features((N, D), (N, D), device=before.device))
    assert torch.equal(loss.queue, before)


def test_moco_backward_after_the_enqueue(backend):
    """The queue is written in place after the forward: the backward must not see the new keys."""
    loss = moco(backend=backend)
    query, key = features((N, D), (N, D), device=loss.queue.device)
    before = loss.queue.clone()
    query.requires_grad_()
    loss(query, key.requires_grad_()).backward()
    (expected,) = torch.autograd.grad(ck.moco_loss(query, key, before, temperature=0.2, backend=backend), query)
    torch.testing.assert_close(query.grad, expected)
    assert key.grad is None


def test_moco_state_is_saved_and_restored():
    loss, other = moco(), moco()
    query, key = features((N, D), (N, D), device="cpu")
    loss(query, key)
    assert {"queue", "position"} <= set(loss.state_dict())
    other.load_state_dict(loss.state_dict())
    assert torch.equal(loss(query, key), other(query, key))
    assert torch.equal(loss.queue, other.queue)
    assert loss.position == other.position


def test_moco_arcl_is_its_function(backend):
    loss = ck.MoCoArCLLoss(dim=D, queue_size=30, temperature=0.2, positive="mean", backend=backend).to(
        device_of(backend)
    )
    query, keys = features((N, D), (N, 3, D), device=loss.queue.device)
    before = loss.queue.clone()
    expected = ck.moco_arcl_loss(query, keys, before, temperature=0.2, positive="mean", backend=backend)
    torch.testing.assert_close(loss(query, keys), expected)
    torch.testing.assert_close(loss.queue[:N], torch.nn.functional.normalize(keys[:, 0], dim=1))
