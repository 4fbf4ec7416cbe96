"""First and second derivatives of losses and primitives, checked numerically; ids and cutoffs have none."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import contrastive_kernels as ck
from tests.support.testing import CASES, OPTIONS, case_params, device_of, differentiate, precise

DERIVATIVES = {
    name: case for name, case in CASES.items() if name not in ("arcl-positive+one_view", "moco_arcl-mean_loss")
}


@pytest.mark.parametrize("case", case_params(DERIVATIVES))
def test_first_and_second_derivatives(case, backend):
    """Derivatives by features and scale, with weights; the second ones come from the PyTorch backend."""
    if precise(backend) != torch.float64:
        pytest.skip(f"{backend} has no float64")
    features = case.features((4, 3, 3), torch.float64, device_of(backend))
    names = [name for name in features if name not in case.detached]
    scale = torch.tensor(2.0, dtype=torch.float64, device=device_of(backend), requires_grad=True)
    upstream = torch.rand(4, dtype=torch.float64, device=device_of(backend))

    def loss(scale, *differentiated):
        tensors = {**features, **dict(zip(names, differentiated, strict=True))}
        return case(ck, tensors, logit_scale=scale, weight=upstream, label_smoothing=0.1, backend=backend)

    inputs = (scale, *(features[name].requires_grad_() for name in names))
    assert gradcheck(loss, inputs)
    assert gradgradcheck(loss, inputs)


def test_derivatives_of_the_primitives(backend):
    if precise(backend) != torch.float64:
        pytest.skip(f"{backend} has no float64")
    device = device_of(backend)
    options = {"dtype": torch.float64, "device": device, "requires_grad": True}
    x, y = torch.randn(4, 3, **options), torch.randn(5, 3, **options)
    scale, bias, margin = torch.rand((), **options), torch.randn(5, **options), torch.randn(4, **options)

    def lse(x, y, scale, bias):
        return ck.similarity_logsumexp(x, y, scale=scale, y_bias=bias, backend=backend)

    def columns(x, y, scale):
        return ck.similarity_logsumexp(x, y, scale=scale, columns=True, backend=backend)

    def itself(x, scale):
        ids = torch.tensor([0, 0, 1, 2], device=device)
        return ck.similarity_logsumexp(x, scale=scale, x_ids=ids, backend=backend)

    def softplus(x, y, scale, bias):
        return ck.similarity_sum(x, y, term=ck.Softplus(scale, bias), backend=backend)

    def hinge(x, y, margin):
        return ck.similarity_sum(x, y, term=ck.Hinge(margin), backend=backend)

    def views(x):
        return ck.min_view_similarity(x, backend=backend)[0]

    for function, inputs in (
        (lse, (x, y, scale, bias)),
        (columns, (x, y, scale)),
        (itself, (x, scale)),
        (softplus, (x, y, scale, torch.tensor(0.3, **options))),
        (hinge, (x, y, margin)),
        (views, (torch.randn(3, 4, 3, **options),)),
    ):
        assert gradcheck(function, inputs), function.__name__
        assert gradgradcheck(function, inputs), function.__name__


def test_activation_checkpointing(backend):
    """The gradients are the same where the loss is recomputed in the backward."""
    device = device_of(backend)
    z = torch.randn(2, 33, 24, device=device)

    def loss(z):
        return ck.nt_xent_loss(F.normalize(z[0], dim=1), z[1], backend=backend)

    plain = differentiate(loss, {"z": z})
    recomputed = differentiate(lambda z: torch.utils.checkpoint.checkpoint(loss, z, use_reentrant=False), {"z": z})
    assert torch.equal(plain.value, recomputed.value)
    assert torch.equal(plain.gradients["z"], recomputed.gradients["z"])


@pytest.mark.parametrize("name", ["cutoff per anchor", "ids", "weight"])
def test_only_a_weight_has_a_gradient(name, backend):
    """Ids and cutoffs have none."""
    case = CASES["info_nce"]
    features = case.features((16, 16, 24), torch.float32, device_of(backend))
    options = {
        k: (v.to(device_of(backend)).requires_grad_() if v.is_floating_point() else v.to(device_of(backend)))
        for k, v in OPTIONS[name](case, 16, 16).items()
    }
    (tensor,) = options.values()
    features["query"].requires_grad_()
    case(ck, features, **options, backend=backend).backward()
    assert features["query"].grad.any()
    assert (tensor.grad is not None) == (name == "weight")
