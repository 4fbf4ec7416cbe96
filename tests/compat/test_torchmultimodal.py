"""What the cases of TorchMultimodal do not say, beside the library."""

import inspect
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.support import adapters

adapters.require_peers()
pytestmark = pytest.mark.peers

ours, theirs = adapters.modules("torchmultimodal")
EXACT = {"rtol": 1e-10, "atol": 1e-12}
KINDS = ("GLOBAL", "LOCAL", "NONE")
OPTIONS = (None, {"label_smoothing": 0.1}, {"reduction": "sum"}, {"reduction": "none"}, {"ignore_index": 2})


def on_rank(group, kind, masked, options, part):
    """Return values and gradients of ours and of the peer on one rank."""
    rank, found = dist.get_rank(), []
    for module in (ours, theirs):
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(3, 2, 5, 4, generator=generator, dtype=torch.float64)[rank].requires_grad_()
        mask = (torch.arange(5) + rank) % 2 == 0 if masked else None
        scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        output = module.contrastive_loss_with_temperature(
            *rows, scale, mask, getattr(module.BackpropType, kind), options
        )
        values = [output.loss, output.loss_a, output.loss_b, output.logits_a, output.logits_b]
        values[3:] = [logits.square().mean() for logits in values[3:]]
        total = values[0].sum() if part == "loss" else values[3] + 2 * values[4]
        total.backward()
        found.append([*(value.detach() for value in values), rows.grad, scale.grad])
    return found


def check(kind, of_ranks):
    """Compare every rank with the peer; the last is the gradient of the scale.

    With GLOBAL that one is the peer's after averaging: a rank has the part of the pairs that it computes.
    """
    for found, expected in of_ranks:
        for a, b in zip(found[:-1], expected[:-1], strict=True):
            torch.testing.assert_close(a, b, **EXACT)
    scales = torch.tensor([[found[-1], expected[-1]] for found, expected in of_ranks], dtype=torch.float64)
    scales = scales.mean(0, keepdim=True) if kind == "GLOBAL" else scales
    torch.testing.assert_close(scales[:, 0], scales[:, 1], **EXACT)


@pytest.mark.parametrize(("part", "options"), [("logits", None), *(("loss", options) for options in OPTIONS)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks(ranks, kind, masked, options, part):
    check(kind, ranks.run(3, on_rank, kind, masked, options, part))


def module_on_rank(group, kind):
    """Return the loss of the module and its gradients, of ours and of the peer."""
    found = []
    for module in (ours, theirs):
        rows = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(dist.get_rank())).double().requires_grad_()
        loss_module = module.ContrastiveLossWithTemperature().double()
        # either library takes the members of the other
        loss = loss_module(*rows, backprop_type=ours.BackpropType[kind])
        loss.backward()
        found.append((loss.detach(), rows.grad, loss_module.logit_scale.grad))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_module_on_ranks(ranks, kind):
    check(kind, ranks.run(3, module_on_rank, kind))


def read_on_one_rank(group):
    """Read logits where the other ranks do not."""
    output = ours.contrastive_loss_with_temperature(*torch.randn(2, 5, 4), torch.tensor(0.5))
    return output.logits_a.shape if dist.get_rank() == 1 else None


def test_logits_are_read_alone(ranks):
    """The other ranks need not take part in it."""
    assert ranks.run(3, read_on_one_rank) == [None, (5, 15), None]


def test_group_of_one():
    """Rows that are gathered have no gradient with NONE, also those of a single rank."""
    a, b = torch.randn(2, 6, 4, dtype=torch.float64).unbind()
    grads = []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for module in (ours, theirs):
            leaf = a.clone().requires_grad_()
            output = module.contrastive_loss_with_temperature(
                leaf, b, torch.tensor(0.5), None, module.BackpropType.NONE
            )
            grads += torch.autograd.grad(output.loss, leaf)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(*grads, **EXACT)


def test_members_are_those_of_the_peer():
    for kind in KINDS:
        mine, other = ours.BackpropType[kind], theirs.BackpropType[kind]
        assert mine == other and other == mine and hash(mine) == hash(other) and mine.value == other.value
    assert ours.BackpropType.GLOBAL != theirs.BackpropType.LOCAL
    assert list(inspect.signature(ours.BackpropType).parameters) == list(
        inspect.signature(theirs.BackpropType).parameters
    )


def test_state():
    """The parameter moves through steps and back into its bounds as the peer's, and loads into the other."""
    a, b = torch.nn.functional.normalize(torch.randn(2, 8, 4), dim=-1)
    modules = [module.ContrastiveLossWithTemperature(4.5) for module in (ours, theirs)]
    for module in modules:
        optimiser = torch.optim.SGD(module.parameters(), lr=2.0)
        for _ in range(5):
            optimiser.zero_grad()
            module(a, b).backward()
            optimiser.step()
    mine, other = modules
    torch.testing.assert_close(mine.logit_scale, other.logit_scale)
    assert mine.state_dict().keys() == other.state_dict().keys() == {"logit_scale"}
    for module, source in ((ours, other), (theirs, mine)):
        fresh = module.ContrastiveLossWithTemperature()
        fresh.load_state_dict(source.state_dict())
        assert fresh.logit_scale == source.logit_scale


@pytest.mark.parametrize("module", [ours, theirs])
def test_attributes(module):
    """Bounds may be assigned; a parameter that is given is that parameter."""
    scale = nn.Parameter(torch.tensor(3.0))
    loss = module.ContrastiveLossWithTemperature(scale)
    assert loss.logit_scale is scale and (loss.logit_scale_min, loss.logit_scale_max) == (0.0, math.log(100))
    loss.logit_scale_max = 1.0
    loss(*torch.randn(2, 5, 4))
    assert scale == 1.0
    loss.logit_scale_min = None
    loss(*torch.randn(2, 5, 4))
    for low, high in ((None, None), (0, None), (None, 0.0), (0, 0)):
        with pytest.raises(ValueError, match="logit_scale_min"):
            module.ContrastiveLossWithTemperature(logit_scale_min=low, logit_scale_max=high)


@pytest.mark.parametrize("module", [ours, theirs])
@pytest.mark.parametrize(
    ("inputs", "error"),
    [
        ({"mask": torch.ones(4, dtype=torch.bool)}, IndexError),
        ({"cross_entropy_kwargs": {"reduction": "median"}}, ValueError),
        ({"cross_entropy_kwargs": {"smoothing": 0.1}}, TypeError),
    ],
)
def test_errors(module, inputs, error):
    with pytest.raises(error):
        module.contrastive_loss_with_temperature(*torch.randn(2, 300, 4), torch.tensor(0.5), **inputs)


@pytest.mark.parametrize("module", [ours, theirs])
def test_arguments_of_other_types(module):
    """In one process nothing asks for the kind of gathering; a scale that is no tensor is refused."""
    rows = torch.randn(2, 5, 4)
    loss = module.ContrastiveLossWithTemperature()
    assert loss(*rows, backprop_type=None) == loss(*rows)
    with pytest.raises(TypeError):
        module.contrastive_loss_with_temperature(*rows, 0.5)


@pytest.mark.parametrize("masked", ["nothing", "indices"])
def test_other_masks(masked):
    """A mask that keeps nothing has no mean; indices choose rows, as often as they name them."""
    a, b = torch.randn(2, 300, 4, dtype=torch.float64)
    mask = torch.zeros(300, dtype=torch.bool) if masked == "nothing" else torch.tensor([3, 3, 7])
    for options in (None, {"reduction": "sum"}, {"reduction": "none"}):
        found, expected = (
            module.contrastive_loss_with_temperature(a, b, torch.tensor(0.5), mask, cross_entropy_kwargs=options)
            for module in (ours, theirs)
        )
        torch.testing.assert_close(found.loss, expected.loss, equal_nan=True)


def test_other_names():
    assert ours.gather_tensor is theirs.gather_tensor
    assert ours.DEFAULT_LOGIT_SCALE == theirs.DEFAULT_LOGIT_SCALE
