"""Derivatives of losses, primitives and operators, checked numerically, and inside checkpoints; ids have none."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import contrastive_kernels as ck
from contrastive_kernels.engine.backends import BACKENDS
from contrastive_kernels.engine.operators import operator
from contrastive_kernels.engine.spec import Description, Inputs, Upstream, Wanted
from tests.support.testing import CASES, OPTIONS, case_params, device_of, differentiate, precise
from tests.support.variants import ALL

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


def test_bare_operators_have_their_derivatives(backend):
    """An exported program calls the operators, not the functions around them."""
    if precise(backend) != torch.float64:
        pytest.skip(f"{backend} has no float64")
    options = {"dtype": torch.float64, "device": device_of(backend), "requires_grad": True}
    x, y, scale = torch.randn(4, 3, **options), torch.randn(5, 3, **options), torch.rand((), **options)
    weight, offset = (torch.rand(4, **options) for _ in range(2))
    what = Description((1.0,), True, "softplus", (), False, 0)

    def inputs(x, y, scale, offset):
        return Inputs(x, y, scale, None, None, None, None, scale, offset)

    def statistics(x, y, scale, offset):
        return operator(backend, "forward")(*inputs(x, y, scale, offset), *what, False)[:3]

    def total(weight, x, y, scale, offset):
        none, empty = weight.new_empty(0, 4), weight.new_empty(0)
        wanted = [*Wanted(True, True, False, False, True, True, True)]
        term = what._replace(exponents=(), column_lse=False)
        upstream = Upstream(none, empty, weight, none, empty)
        return operator(backend, "backward")(*upstream, *inputs(x, y, scale, offset), *term, wanted)

    def total_alone(x, y, scale, offset):
        return total(weight.detach(), x, y, scale, offset)[-1]

    def rows(x):
        return operator(backend, "unit_rows")(x)[0]

    def rows_backward(grad, x):
        return operator(backend, "unit_rows_backward")(grad, x, x.norm(dim=-1, keepdim=True))

    for function, arguments in (
        (statistics, (x, y, scale, offset)),
        (lambda *a: [out for out in total(*a) if out.numel()], (weight, x, y, scale, offset)),
        (total_alone, (x, y, scale, offset)),
        (rows, (x,)),
        (rows_backward, (torch.randn(4, 3, **options), x)),
    ):
        assert gradcheck(function, arguments), function.__name__
        assert gradgradcheck(function, arguments), function.__name__


def test_selections_have_no_derivative(backend):
    x = torch.randn(4, 3, 8, device=device_of(backend), requires_grad=True)
    assert not operator(backend, "views")(x).requires_grad
    if "select" in BACKENDS[backend].operators:
        values, columns = operator(backend, "select")(x[:, 0], None, 2, True, None, None, True)
        assert not values.requires_grad
        assert not columns.requires_grad


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("case", case_params(ALL))
def test_activation_checkpointing(case, use_reentrant, backend):
    """The gradients are the same where the loss is recomputed in the backward."""
    features = case.features((33, 17, 24), torch.float32, device_of(backend))
    names = list(features)

    def loss(*tensors):
        return case(ck, dict(zip(names, tensors, strict=True)), backend=backend)

    def recomputed(**tensors):
        return torch.utils.checkpoint.checkpoint(loss, *tensors.values(), use_reentrant=use_reentrant)

    plain, again = (
        differentiate(lambda **tensors: loss(*tensors.values()), features),
        differentiate(recomputed, features),
    )
    assert torch.equal(plain.value, again.value)
    for name, gradient in plain.gradients.items():
        assert (gradient is None) == (again.gradients[name] is None), name
        assert gradient is None or torch.equal(gradient, again.gradients[name]), name


def test_compiled_autograd(backend):
    """The backward of an uncompiled loss as a compiled graph of its own."""
    case = CASES["nt_xent-polarized"]
    features = case.features((33, 17, 24), torch.float32, device_of(backend))
    features["z0"].requires_grad_()
    value = case(ck, features, backend=backend)
    (expected,) = torch.autograd.grad(value, features["z0"], retain_graph=True)
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: value.backward(), backend="aot_eager")()
    torch.testing.assert_close(features["z0"].grad, expected)


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
