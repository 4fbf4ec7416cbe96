"""Rows of unit norm and products of paired rows: the operators, and the primitives around them."""

import math
import os

import pytest
import torch

from contrastive_kernels.engine.operators import operator
from contrastive_kernels.primitives import row_dot, unit_rows
from tests.support.testing import HALF, assert_matches, backends, device_of, dtype_id, supports

SHAPES = [(1, 1), (7, 3), (65, 24), (130, 200), (3, 1500), (4, 5, 33), (0, 8), (3, 0)]


def dense(x):
    """Return the unit rows in float64; a row of zeros stays a row of zeros, without gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm < 1e-12, 0 * x, x / norm.clamp(min=1e-12))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, backend, poison):
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    x = torch.randn(shape, dtype=torch.float64, device=device_of(backend)).to(dtype)
    grad = torch.randn(shape, dtype=torch.float64, device=device_of(backend)).to(dtype)
    unit, norm = operator(backend, "unit_rows")(x)
    dx = operator(backend, "unit_rows_backward")(grad, x, norm)
    exact = x.double().requires_grad_()
    expected = dense(exact)
    assert (unit.dtype, dx.dtype) == (dtype, dtype)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_matches(unit, expected.detach(), dtype, "rows")
    assert_matches(norm, torch.linalg.vector_norm(exact, dim=-1, keepdim=True).detach(), torch.float32, "norms")
    if x.numel():
        assert_matches(dx, torch.autograd.grad(expected, exact, grad.double())[0], dtype, "gradient", 1.0)


@pytest.mark.parametrize("length", [1e-10, 1e13, 1e15, 1e17])
def test_the_gradient_of_short_and_long_rows(length, backend):
    """The cube of their inverse norm is not in the range of float32."""
    x, grad = torch.randn(2, 7, 24, dtype=torch.float64, device=device_of(backend)).unbind(0)
    x = (length * x).float()
    _, norm = operator(backend, "unit_rows")(x)
    dx = operator(backend, "unit_rows_backward")(grad.float(), x, norm)
    exact = x.double().requires_grad_()
    expected = torch.autograd.grad(dense(exact), exact, grad)[0]
    assert_matches(length * dx.double(), length * expected, torch.float32, "gradient")


def test_rows_without_direction(backend, poison):
    """Zeros and rows below epsilon have gradient 0; a NaN or an infinity spoils its whole row."""
    x = torch.randn(5, 24, device=device_of(backend))
    x[0], x[1], x[2, 3], x[3, 4] = 0, 1e-14, math.nan, math.inf
    unit, norm = operator(backend, "unit_rows")(x)
    dx = operator(backend, "unit_rows_backward")(torch.ones_like(x), x, norm)
    assert not unit[0].any()
    assert not dx[:2].any()
    assert unit[2].isnan().all()
    assert dx[2].isnan().all()
    assert unit[3, 4].isnan()
    assert unit[4].isfinite().all()
    assert dx[4].isfinite().all()


@pytest.mark.parametrize("layout", ["transposed", "every second", "expanded"])
def test_strides(layout, backend, poison):
    device = device_of(backend)
    x = {
        "transposed": lambda: torch.randn(24, 33, device=device).T,
        "every second": lambda: torch.randn(66, 48, device=device)[::2, ::2],
        "expanded": lambda: torch.randn(1, 24, device=device).expand(33, 24),
    }[layout]()
    grad = torch.randn(24, device=device).expand(33, 24)
    unit, norm = operator(backend, "unit_rows")(x)
    dx = operator(backend, "unit_rows_backward")(grad, x, norm)
    dense_unit, dense_norm = operator(backend, "unit_rows")(x.contiguous())
    torch.testing.assert_close(unit, dense_unit, rtol=1e-6, atol=1e-7)
    dense_dx = operator(backend, "unit_rows_backward")(grad.contiguous(), x.contiguous(), dense_norm)
    torch.testing.assert_close(dx, dense_dx, rtol=1e-5, atol=1e-6)
    assert unit.is_contiguous() and norm.is_contiguous() and dx.is_contiguous()  # as the fake versions are


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="float64 is not the interpreter's")
def test_first_and_second_derivatives():
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unit_rows(x), x)
    assert torch.autograd.gradgradcheck(lambda x: unit_rows(x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_opcheck(dtype, backend):
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    x = torch.randn(4, 5, 8, device=device_of(backend)).to(dtype)
    torch.library.opcheck(operator(backend, "unit_rows"), (x,))
    _, norm = operator(backend, "unit_rows")(x)
    torch.library.opcheck(operator(backend, "unit_rows_backward"), (x, x, norm))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
def test_products_against_float64(shape, dtype, needs, backend, poison):
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    x, y = (
        torch.randn(shape, dtype=torch.float64, device=device_of(backend)).to(dtype).requires_grad_(need)
        for need in needs
    )
    out = row_dot(x, y, backend)
    grad = torch.randn(shape[:-1], dtype=out.dtype, device=x.device)
    grads = torch.autograd.grad(out, [v for v, need in zip((x, y), needs, strict=True) if need], grad)
    exact = (x.detach().double() * y.detach().double()).sum(-1)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_matches(out, exact, out.dtype, "products")
    for g, other in zip(grads, [v for v, need in zip((y, x), needs, strict=True) if need], strict=True):
        assert g.dtype == dtype
        assert_matches(g, grad.double().unsqueeze(-1) * other.detach().double(), dtype, "gradient")


def test_products_of_any_layout(backend, poison):
    device = device_of(backend)
    x, y = torch.randn(24, 33, device=device).T.requires_grad_(), torch.randn(66, 48, device=device)[::2, ::2]
    out = row_dot(x, y, backend)
    (dx,) = torch.autograd.grad(out, x, torch.ones(1, device=device).expand(33))
    torch.testing.assert_close(out, (x.detach() * y).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, y.contiguous())


def test_products_with_nan_and_infinity(backend, poison):
    x = torch.ones(4, 24, device=device_of(backend))
    x[1, 3], x[2, 4] = math.nan, math.inf
    out = row_dot(x, torch.ones_like(x), backend)
    assert out[1].isnan()
    assert out[2].isposinf()
    assert out[::3].isfinite().all()


def test_second_derivatives_of_products(backend):
    """Second derivatives are those of plain PyTorch on every backend."""
    x, y = torch.randn(2, 5, 7, device=device_of(backend)).unbind(0)

    def penalty(x, y, product):
        (dx,) = torch.autograd.grad(product(x, y).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, y))

    x, y = x.requires_grad_(), y.requires_grad_()
    ours, dense = (
        penalty(x, y, product) for product in (lambda x, y: row_dot(x, y, backend), lambda x, y: (x * y).sum(-1))
    )
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_opcheck_of_products():
    x = torch.randn(4, 5, 8)
    if "triton" not in backends():
        pytest.skip("no TRITON_INTERPRET=1 and no GPU")
    x = x.to(device_of("triton"))
    torch.library.opcheck(operator("triton", "row_dot"), (x, x))
    torch.library.opcheck(operator("triton", "row_dot_backward"), (x[..., 0].contiguous(), x, x, [True, False]))


def test_whether_a_device_has_autocast_is_not_asked_in_a_call(monkeypatch):
    """torch.compile of torch 2.9 to 2.11 cannot trace that question."""

    def asked(device):
        raise AssertionError("asked in a call")

    monkeypatch.setattr(torch.amp, "is_autocast_available", asked)
    x = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert unit_rows(x).dtype == torch.bfloat16
    assert unit_rows(x).dtype == torch.float32
