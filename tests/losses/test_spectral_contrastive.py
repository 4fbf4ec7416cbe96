"""The spectral contrastive loss: its two forms, the projection, and the size of products of moments."""

import math

import pytest
import torch

import contrastive_kernels as ck
import python_ref
from tests.support.losses import Largest, assert_module_is_function, assert_refused
from tests.support.testing import Case, assert_outcomes_match, case_params, check, device_of, differentiate, precise
from tests.support.variants import EVERY, MOMENTS

CASE = EVERY["spectral_contrastive-correlated"]
methods = pytest.mark.parametrize("method", ["gram", "tile"])


@methods
@pytest.mark.parametrize(
    "options",
    [
        {"project": True},
        {"project": True, "mu": 10.0, "include_diagonal": True},
        {"project": True, "mu": 0.01},
        {"reduction": "sum"},
        {"reduction": "none", "include_diagonal": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_options(weighted, options, method, backend, poison):
    """The projection with rows on both sides of the ball; weights and their gradient."""

    class SomeShort(type(CASE)):
        def features(self, *arguments):
            features = super().features(*arguments)
            for z in features.values():
                z[::3] *= 0.05
                z[1] = 0
            return features

    case = SomeShort(CASE.loss, CASE.shapes, {"method": method})
    weight = {"weight": torch.rand(65, dtype=torch.float64)} if weighted else {}
    check(case, (65, 65, 24), torch.float32, backend, **options, **weight)


@pytest.mark.parametrize("include_diagonal", [False, True], ids=["off", "all"])
def test_forms_and_sides_agree(include_diagonal, backend):
    """I6 spectral forms: tile = gram, value and gradient; L(X, Y) = L(Y, X)."""
    dtype = precise(backend)
    for n, d in ((65, 24), (24, 65)):
        tensors = CASE.features((n, n, d), dtype, device_of(backend))

        def loss(z0, z1, method):
            return ck.spectral_contrastive_loss(
                z0, z1, method=method, include_diagonal=include_diagonal, backend=backend
            )

        gram, tile = (differentiate(lambda **t: loss(**t, method=m), tensors) for m in ("gram", "tile"))  # noqa: B023
        assert_outcomes_match(gram, tile, dtype, 20.0)
        swapped = differentiate(lambda z0, z1: loss(z1, z0, "auto"), tensors)
        assert_outcomes_match(swapped, tile, dtype, 20.0)


def test_values_by_hand(backend):
    eye = torch.eye(2, device=device_of(backend))
    for method in ("gram", "tile"):
        assert ck.spectral_contrastive_loss(eye, eye.clone(), method=method, backend=backend) == -2
        everything = ck.spectral_contrastive_loss(
            eye, eye.clone(), include_diagonal=True, method=method, backend=backend
        )
        assert everything == -2 + 0.5


@methods
def test_one_sample(method, backend, poison):
    """No pair, the alignment alone."""
    z0, z1 = CASE.features((1, 1, 24), torch.float32, device_of(backend)).values()
    loss = ck.spectral_contrastive_loss(z0, z1, mu=2.0, method=method, backend=backend)
    torch.testing.assert_close(loss, -(z0 * z1).sum())


@methods
def test_projected_zero_rows_have_finite_gradients(method, backend, poison):
    tensors = CASE.features((65, 65, 24), torch.float32, device_of(backend))
    for z in tensors.values():
        z[3] = 0
    out = differentiate(
        lambda **t: ck.spectral_contrastive_loss(**t, project=True, method=method, backend=backend), tensors
    )
    assert all(g.isfinite().all() for g in out.gradients.values())


# Second moments, also those of Barlow Twins and VICReg


@pytest.mark.parametrize(("n", "d"), [(300, 16), (16, 300)])
@pytest.mark.parametrize("name", ["spectral_contrastive-correlated", "barlow_twins-correlated", "vicreg-correlated"])
def test_no_product_is_larger_than_the_features(name, n, d):
    """Neither N x N nor D x D where it is the larger one, in the forward and in the backward."""
    tensors = {k: v.requires_grad_() for k, v in EVERY[name].features((n, n, d), torch.float32).items()}
    with Largest() as largest:
        EVERY[name](ck, tensors).backward()
    assert largest.elements <= n * d


@pytest.mark.parametrize("case", case_params(MOMENTS))
def test_nan_and_infinity_are_not_hidden(case, backend):
    """In raw rows, of which there are more and fewer than columns."""
    for n, d in ((65, 24), (24, 65)):
        for bad in (math.nan, math.inf):
            for name in ("z0", "z1"):
                tensors = case.features((n, n, d), torch.float32, device_of(backend))
                tensors[name][3, ..., 2] = bad
                loss = case(ck, tensors, backend=backend).sum()
                assert not loss.isfinite()
                assert loss.isnan() or bad == math.inf


@pytest.mark.parametrize("length", [1e2, 1e3])
@pytest.mark.parametrize("name", ["spectral_contrastive", "vicreg"])
def test_a_long_vector_leaves_the_digits_of_the_others(name, length):
    """One row in more rows than columns, or one column in more columns: its own square is no part of the loss."""
    x = torch.randn(128, 32, dtype=torch.float64)
    x[3] *= length
    y = x + 0.1 * torch.randn_like(x)
    z = (x, y) if name == "spectral_contrastive" else (x.T, y.T)
    options = {"reduction": "none"} if name == "spectral_contrastive" else {"sim_weight": 0.0, "var_weight": 0.0}
    tensors = {"z0": z[0].float(), "z1": z[1].float()}
    case = Case(f"{name}_loss", CASE.shapes, options)
    ours = differentiate(lambda **t: case(ck, t), tensors)
    reference = differentiate(lambda **t: case(python_ref, t), {k: v.double() for k, v in tensors.items()})
    assert_outcomes_match(ours, reference, torch.float32)


def f(*shape):
    return torch.randn(*shape)


def spectral(**options):
    return ck.spectral_contrastive_loss(f(8, 16), f(8, 16), **options)


BAD = {
    "mu": (lambda: spectral(mu=0.0), ValueError, "mu 0.0 must be positive"),
    "mu type": (lambda: spectral(mu="1"), TypeError, "mu must be a number"),
    "method": (lambda: spectral(method="dense"), ValueError, "method 'dense' is unknown"),
    "reduction": (lambda: spectral(reduction="row"), ValueError, "reduction 'row' is unknown"),
    "weight": (lambda: spectral(weight=torch.ones(9)), ValueError, "weight (9,) must have shape (8,)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    assert_refused(*BAD[name])


BAD_VIEWS = {
    "rows": (lambda loss: loss(f(8, 16), f(7, 16)), ValueError, "z0 (8, 16) and z1 (7, 16) must have the same first"),
    "columns": (lambda loss: loss(f(8, 16), f(8, 15)), ValueError, "z0 (8, 16) and z1 (8, 15) must have the same last"),
    "a vector": (lambda loss: loss(f(8), f(8)), ValueError, "z0 (8,) must have shape (N, D)"),
    "empty": (lambda loss: loss(f(0, 16), f(0, 16)), ValueError, "z0 (0, 16) is an empty batch"),
    "integers": (lambda loss: loss(f(8, 16).long(), f(8, 16)), TypeError, "z0 has dtype torch.int64"),
    "mixed": (lambda loss: loss(f(8, 16), f(8, 16).double()), TypeError, "z0 is torch.float32 and z1 is torch.float64"),
    "devices": (lambda loss: loss(f(8, 16), f(8, 16).to("meta")), RuntimeError, "z0 is on cpu and z1 on meta"),
    "option": (lambda loss: loss(f(8, 16), f(8, 16), tau=1.0), TypeError, "tau"),
}


@pytest.mark.parametrize("name", BAD_VIEWS)
@pytest.mark.parametrize("loss", ["spectral_contrastive_loss", "barlow_twins_loss", "vicreg_loss"])
def test_bad_views(loss, name):
    call, error, message = BAD_VIEWS[name]
    assert_refused(lambda: call(getattr(ck, loss)), error, message)


def test_module_is_its_function():
    inputs = tuple(CASE.features((12, 12, 16), torch.float32).values())
    options = {"mu": 2.0, "project": True}
    assert_module_is_function(ck.SpectralContrastiveLoss, ck.spectral_contrastive_loss, inputs, options)
