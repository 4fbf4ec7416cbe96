"""`similarity_sum` of every term against the dense reference: rows and totals, values and every gradient."""

import pytest
import torch

import contrastive_kernels as ck
import python_ref
from contrastive_kernels.engine import autograd, terms
from tests.support.primitives import DTYPES, SHAPES, compare, pair, term_sum
from tests.support.testing import device_of, differentiate, dtype_id, shape_id

TERMS = {
    "identity": (ck.Identity, (), {}),
    "count": (ck.Count, (), {}),
    "square": (ck.Square, (), {}),
    "band": (ck.Band, (0.4, 0.55), {}),
    "softplus": (ck.Softplus, (), {"scale": torch.tensor(10.0), "bias": torch.tensor(-1.0)}),
    "hinge": (ck.Hinge, (), {"margin": torch.tensor(0.05)}),
    "hinge-per-row": (ck.Hinge, (), {"margin": torch.linspace(-0.2, 0.2, 65)}),
    "gaussian": (ck.Gaussian, (2.0,), {}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("itself", [False, True], ids=["two", "self"])
@pytest.mark.parametrize("name", TERMS)
def test_sum(name, itself, dtype, backend, poison):
    term, constants, operands = TERMS[name]
    shape = (65, 129, 24)
    tensors = {**pair(shape), "x_ids": torch.randint(9, (65,)), "y_ids": torch.randint(9, (129,)), **operands}
    if itself:
        del tensors["y"], tensors["y_ids"]
    if name == "count":  # integers, and no gradient
        out = ck.similarity_sum(
            term=term(), backend=backend, **{k: v.to(device_of(backend)) for k, v in tensors.items()}
        )
        expected = python_ref.similarity_sum(term=term(), **tensors)
        assert torch.equal(out.cpu().double(), expected)
        return
    compare(term_sum, tensors, backend, dtype, 10.0, term=term, constants=constants)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("itself", [False, True], ids=["two", "self"])
@pytest.mark.parametrize("name", [name for name in TERMS if name != "count"])
def test_total(name, itself, dtype, backend, poison):
    """With the sum over the rows the gradients are computed together with the value."""
    term, constants, operands = TERMS[name]
    tensors = {**pair((65, 129, 24)), "x_ids": torch.randint(9, (65,)), "y_ids": torch.randint(9, (129,)), **operands}
    if itself:
        del tensors["y"], tensors["y_ids"]
    compare(term_sum, tensors, backend, dtype, 10.0, term=term, constants=constants, reduction="sum")


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("itself", [False, True], ids=["two", "self"])
def test_sum_over_equal_ids(itself, reduction, backend, poison):
    """The other pairs than by default, but a row with itself; a row without such a pair has 0, and no gradient."""
    tensors = {**pair((65, 129, 24)), "x_ids": torch.arange(65) // 2, "y_ids": torch.randint(40, (129,))}
    tensors |= {"scale": torch.tensor(10.0), "bias": torch.linspace(-1, 1, 65)}
    if itself:
        del tensors["y"], tensors["y_ids"]
    options = {"same": True, "exclude_diagonal": True, "reduction": reduction}
    compare(term_sum, tensors, backend, torch.float32, 10.0, term=ck.Softplus, **options)
    if itself:  # row 64 has an id of its own
        x = tensors["x"].to(device_of(backend), torch.float32).requires_grad_()
        sums = term_sum(ck, ck.Square, x=x, x_ids=tensors["x_ids"].to(x.device), backend=backend, **options)
        sums.sum().backward()
        assert not x.grad[64].any()
        assert reduction == "sum" or (sums[64] == 0 and sums[:64].all())


def test_total_is_one_sweep(backend, monkeypatch):
    """With gradients or without them there is no forward sweep; a second backward gives the same."""
    device, calls, call = device_of(backend), [], autograd.call
    monkeypatch.setattr(autograd, "call", lambda *names: calls.append(names[1]) or call(*names))
    x, y = (z.to(device, torch.float32).requires_grad_() for z in pair((65, 129, 24)).values())
    total = ck.similarity_sum(x, y, term=ck.Softplus(10.0, -1.0), reduction="sum", backend=backend)
    first = torch.autograd.grad(total, (x, y), retain_graph=True)
    second = torch.autograd.grad(2 * total, (x, y))
    assert calls == ["backward"]
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))
    with torch.no_grad():
        again = ck.similarity_sum(x, y, term=ck.Softplus(10.0, -1.0), reduction="sum", backend=backend)
    assert calls == ["backward", "backward"]
    torch.testing.assert_close(again, total.detach())
    assert backend == "triton" or torch.equal(again, total.detach())


@pytest.mark.parametrize("wanted", ["x", "y", "scale", "bias"])
def test_total_with_one_gradient(wanted, backend, poison):
    device = device_of(backend)
    operands = {"scale": torch.tensor(10.0), "bias": torch.linspace(-1, 1, 65)}
    tensors = {k: v.to(device, torch.float32) for k, v in {**pair((65, 129, 24)), **operands}.items()}

    def total(**t):
        return term_sum(ck, ck.Softplus, backend=backend, reduction="sum", **{**tensors, **t})

    full = differentiate(total, tensors).gradients[wanted]
    alone = differentiate(total, {wanted: tensors[wanted]}).gradients[wanted]
    torch.testing.assert_close(alone, full, rtol=1e-6, atol=1e-6)


def test_total_of_float16_does_not_underflow(backend):
    """A gradient below the range of float16 survives if the loss is scaled up, as in mixed-precision training."""
    x, y = (torch.randn(2, 64, 8, device=device_of(backend)) / 64).half().unbind(0)
    x.requires_grad_()
    ck.siglip_loss(x, y, 1e-6, -10.0, backend=backend).backward()
    assert not x.grad.any()
    (2.0**30 * ck.siglip_loss(x, y, 1e-6, -10.0, backend=backend)).backward()
    assert x.grad.all()


def distance_hinge(s, margin):
    return (margin[:, None] - (2 - 2 * s).clamp(min=1e-12).sqrt()).relu()


def student(s, scale, offset):
    v = scale * s + offset[:, None]
    return (1 + torch.where(v < 0, v - v.detach(), v)) ** -2.5  # below 0: the value and the slope of 0


# The terms of distances: (term, constants, operands, the same from the matrix).
DISTANCE_TERMS = {
    "distance_hinge": (ck.DistanceHinge, (), {"margin": torch.linspace(1.0, 1.6, 65)}, distance_hinge),
    "student": (
        ck.Student,
        (2.5,),
        {"scale": torch.tensor(-2.0), "offset": torch.linspace(-0.5, 3.0, 65)},
        student,
    ),
}


def test_every_term_is_tested():
    tested = {TERMS[name][0] for name in TERMS} | {DISTANCE_TERMS[name][0] for name in DISTANCE_TERMS}
    assert tested == set(terms.TERMS.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("itself", [False, True], ids=["two", "self"])
@pytest.mark.parametrize("name", DISTANCE_TERMS)
def test_sum_of_distances(name, itself, dtype, backend, poison):
    term, constants, operands, function = DISTANCE_TERMS[name]

    def total(module, x, y=None, backend=None, **operands):
        if module is ck:
            ids = torch.arange(65, device=x.device) if y is None else None
            return ck.similarity_sum(x, y, term=term(*constants, **operands), x_ids=ids, backend=backend)
        terms = function(x @ (x if y is None else y).mT, **operands)
        return (terms if y is not None else terms.masked_fill(torch.eye(65, dtype=torch.bool), 0.0)).sum(1)

    tensors = pair((65, 129, 24))
    if itself:
        del tensors["y"]
    compare(total, {**tensors, **operands}, backend, dtype, 1.0)


def test_least_distance_has_no_slope(backend):
    """Equal rows, and rows whose squared distance rounds below 0, have the distance 1e-6."""
    x = torch.eye(3, device=device_of(backend), requires_grad=True)
    y = torch.cat([x.detach(), 1.1 * x.detach()])
    out = ck.similarity_sum(x, y, term=ck.DistanceHinge(0.5), backend=backend)
    out.sum().backward()
    torch.testing.assert_close(out, torch.full_like(out, 2 * (0.5 - 1e-6)), rtol=1e-6, atol=0)
    assert not x.grad.any()


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_sum_shapes(shape, backend, poison):
    compare(
        term_sum,
        {**pair(shape), "scale": torch.tensor(3.0), "bias": torch.tensor(-1.0)},
        backend,
        torch.float32,
        3.0,
        term=ck.Softplus,
    )


def test_sum_with_cutoff(backend, poison):
    cutoff = torch.linspace(-0.2, 0.2, 65, device=device_of(backend))
    compare(term_sum, pair((65, 129, 24)), backend, torch.float32, 1.0, term=ck.Square, cutoff=cutoff)


def test_band_is_strict(backend):
    """Distances at, inside and outside the band (0.25, 0.5); an edge has no gradient."""
    y = torch.tensor([[0.5, 0.0], [0.0, 1.0], [0.25, 0.5]], device=device_of(backend), requires_grad=True)
    x = torch.tensor([[1.0, 0.0]], device=device_of(backend))
    out = ck.similarity_sum(x, y, term=ck.Band(0.25, 0.5), backend=backend)
    out.sum().backward()
    assert out.tolist() == [0.125 * 0.125]
    assert y.grad[:2].tolist() == [[0, 0], [0, 0]]
