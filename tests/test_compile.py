"""torch.compile, opcheck, and first and second derivatives checked numerically."""

import pytest
import torch
import torch.nn.functional as F
from testing import (
    CASES,
    OPTIONS,
    assert_outcomes_match,
    backends,
    case_params,
    device_of,
    differentiate,
    precise,
    supports,
)
from torch.autograd import gradcheck, gradgradcheck

import contrastive_kernels as ck

COMPILED = {
    "info_nce": {},
    "info_nce-shared": {"label_smoothing": 0.1},
    "nt_xent": {"cutoff_margin": 0.1},
    "clip": {},
    "nt_xent-polarized": {},
    "arcl": {},
}
PREFERRED = backends()[-1]  # what the others do differently is inside one opaque operator


def compiled_matches(case, backend, compiler, **options):
    """One graph for the forward, at two sizes; the second may make it dynamic."""
    torch._dynamo.reset()

    def loss(scale, **features):
        return case(ck, features, logit_scale=scale, backend=backend, **options)

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    device = device_of(backend)
    for shape in ((33, 17, 24), (40, 21, 24)):
        features = {**case.features(shape, torch.float32, device), "scale": torch.tensor(5.0, device=device)}
        ours, eager = differentiate(compiled, features), differentiate(loss, features)
        assert_outcomes_match(ours, eager, torch.float32, 5.0)


@pytest.mark.parametrize("backend", [PREFERRED])
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_to_one_graph(name, backend):
    compiled_matches(CASES[name], backend, "aot_eager", **COMPILED[name])


@pytest.mark.parametrize("backend", backends()[:-1])
def test_every_backend_compiles(backend):
    compiled_matches(CASES["nt_xent-polarized"], backend, "aot_eager")


@pytest.mark.parametrize("backend", [PREFERRED])
def test_compiles_with_ids_weights_and_statistics(backend):
    torch._dynamo.reset()
    device = device_of(backend)
    z0, z1 = torch.randn(2, 33, 24, device=device)
    ids, weight = torch.arange(33, device=device) // 2, torch.rand(33, device=device)

    def loss(z0, z1):
        options = {"ids": ids, "weight": weight, "label_smoothing": 0.1, "return_stats": True}
        return ck.nt_xent_loss(z0, z1, **options, backend=backend)

    value, stats = torch.compile(loss, fullgraph=True, backend="aot_eager")(z0, z1)
    expected, statistics = loss(z0, z1)
    torch.testing.assert_close((value, *stats), (expected, *statistics))


@pytest.mark.parametrize("backend", [PREFERRED])
def test_compiles_with_inductor(backend):
    compiled_matches(CASES["nt_xent"], backend, "inductor")


@pytest.mark.parametrize("backend", [PREFERRED])
def test_module_compiles(backend):
    """MoCo writes its queue in the compiled graph."""
    torch._dynamo.reset()
    device = device_of(backend)
    loss = ck.MoCoLoss(dim=24, queue_size=64, backend=backend).to(device)
    reference = ck.MoCoLoss(dim=24, queue_size=64, backend=backend).to(device)
    reference.load_state_dict(loss.state_dict())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        query, key = torch.randn(2, 33, 24, device=device)
        torch.testing.assert_close(compiled(query, key), reference(query, key))
        torch.testing.assert_close(loss.queue, reference.queue)


def sweep_arguments(kind, dtype, device):
    """Arguments of the forward operator, whose schema is in contrastive_kernels.sweep."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    n, m, d = {"empty": (0, 3, 4), "no columns": (3, 0, 4), "one": (1, 1, 1)}.get(kind, (17, 9, 24))
    x, y = torch.randn(n, d, dtype=dtype, device=device), torch.randn(m, d, dtype=dtype, device=device)
    if kind == "transposed":
        x, y = x.T.contiguous().T, y.T.contiguous().T

    def vector(size):
        return torch.randn(size, dtype=wide, device=device)

    scale = torch.tensor(2.0, dtype=wide, device=device)
    plain = [x, y, scale, None, None, None, None, None, None, [1.0], True, "", [], False, False, True]
    ids = torch.arange(n, device=device) % 5
    options = [scale, vector(m), ids, torch.arange(m, device=device), vector(n), scale, vector(n)]
    of_itself = [None, scale, None, ids, None, None, None, None]
    return {
        "options": [x, y, *options, [1.0], False, "softplus", [], False, False, True],
        "self": [x, *of_itself, [1.0, 2.0], False, "band", [0.1, 0.5], False, True, False],
        "term": [x, y, *options, [], False, "softplus", [], False, False, False],
    }.get(kind, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "transposed", "empty", "no columns", "one", "options", "self", "term"])
def test_opcheck(kind, dtype, backend):
    """Schema, fake version and dynamic shapes of both operators of a backend."""
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    forward, backward, _ = operators(backend)
    arguments = sweep_arguments(kind, dtype, device_of(backend))
    torch.library.opcheck(forward, arguments)
    statistics = forward(*arguments)
    tensors, description = arguments[:9], arguments[9:15]
    needs = [True, arguments[1] is not None, True, arguments[3] is not None, *(a is not None for a in arguments[7:9])]
    needs.append(not description[0])
    wide = arguments[2].dtype
    grads = [torch.randn_like(s, dtype=wide) for s in statistics[:3]]
    torch.library.opcheck(backward, (*grads, *statistics[:2], *tensors, *description, needs))


def operators(backend):
    namespace = torch.ops.contrastive_kernels
    return [getattr(namespace, f"{backend}_{name}").default for name in ("forward", "backward", "views")]


def test_opcheck_of_the_views(backend):
    for shape in ((5, 3, 8), (0, 2, 4), (1, 2, 1)):
        torch.library.opcheck(operators(backend)[2], (torch.randn(shape, device=device_of(backend)),))


DERIVATIVES = {
    name: case for name, case in CASES.items() if name not in ("arcl-positive+one_view", "moco_arcl-mean_loss")
}


@pytest.mark.parametrize("case", case_params(DERIVATIVES))
def test_first_and_second_derivatives(case, backend):
    """Features and scale, with weights and duplicates; the second derivative comes from the differentiable backend."""
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
    """The loss inside a recomputed region gives the same gradients."""
    device = device_of(backend)
    z = torch.randn(2, 33, 24, device=device)

    def loss(z):
        return ck.nt_xent_loss(F.normalize(z[0], dim=1), z[1], backend=backend)

    plain = differentiate(loss, {"z": z})
    recomputed = differentiate(lambda z: torch.utils.checkpoint.checkpoint(loss, z, use_reentrant=False), {"z": z})
    assert torch.equal(plain.value, recomputed.value)
    assert torch.equal(plain.gradients["z"], recomputed.gradients["z"])


@pytest.mark.parametrize("name", ["cutoff per anchor", "ids", "weight"])
def test_nothing_flows_into_what_is_no_variable(name, backend):
    """Ids, cutoffs and masks have no gradient; a weight has one."""
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


def test_ids_that_serve_both_sides_compile(backend):
    """The same ids for rows and columns are one tensor, which Dynamo would refuse twice."""
    torch.compiler.reset()
    x, y = (F.normalize(torch.randn(12, 8, device=device_of(backend)), dim=1) for _ in range(2))
    ids = torch.arange(12, device=x.device) % 5

    def loss(x, y):
        return ck.clip_loss(x, y, 10.0, ids=ids, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), loss(x, y))
