"""Spectral contrastive, Barlow Twins and VICReg: values, gradients, both forms of the moments, invariants."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from testing import (
    Outcome,
    assert_matches,
    assert_outcomes_match,
    device_of,
    differentiate,
    dtype_id,
    precise,
    supports,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import python_ref as reference
from contrastive_kernels.functional import moments
from contrastive_kernels.modules.moments import BarlowTwinsLoss, SpectralContrastiveLoss, VICRegLoss

# (N, D) and what it is for.
SHAPES = {
    (2, 1): "the fewest rows with a variance, one column",
    (2, 63): "the N x N form at its smallest",
    (33, 100): "N x N, no multiple of 8",
    (24, 24): "as many rows as columns: N x N",
    (129, 24): "D x D",
    (520, 3): "many rows, few columns",
}
GRID = [
    *((shape, torch.float32) for shape in SHAPES),
    *((shape, dtype) for shape in ((33, 100), (129, 24)) for dtype in (torch.float16, torch.bfloat16, torch.float64)),
]
CASES = {
    "spectral": ("spectral_contrastive_loss", {}),
    "spectral-gram": ("spectral_contrastive_loss", {"method": "gram", "reduction": "none"}),
    "spectral-tile": ("spectral_contrastive_loss", {"method": "tile", "reduction": "none"}),
    "spectral-all_pairs": ("spectral_contrastive_loss", {"include_diagonal": True, "mu": 3.0}),
    "spectral-unit": ("spectral_contrastive_loss", {"normalize": True, "reduction": "sum"}),
    "barlow_twins": ("barlow_twins_loss", {}),
    "barlow_twins-unbiased": ("barlow_twins_loss", {"std": "unbiased", "lambd": 0.1}),
    "barlow_twins-unit": ("barlow_twins_loss", {"normalize": True}),
    "vicreg": ("vicreg_loss", {}),
    "vicreg-weights": ("vicreg_loss", {"sim_weight": 2.0, "var_weight": 3.0, "cov_weight": 5.0, "eps": 0.1}),
    "vicreg-unit": ("vicreg_loss", {"normalize": True}),
}
FORMS = {"spectral": "spectral-gram", "barlow_twins": "barlow_twins", "vicreg": "vicreg"}
cases = pytest.mark.parametrize("case", CASES)


def draw(n, d, dtype=torch.float64, device="cpu"):
    """Two correlated views with columns of different size."""
    first = torch.randn(n, d, dtype=torch.float64) * torch.linspace(0.5, 1.5, d, dtype=torch.float64) + 0.3
    second = first + 0.5 * torch.randn(n, d, dtype=torch.float64)
    return {name: x.to(dtype).to(device) for name, x in (("z0", first), ("z1", second))}


def ours(case, tensors, backend=None, **options):
    name, fixed = CASES[case]
    where = {"backend": backend} if name == "spectral_contrastive_loss" else {}
    return getattr(moments, name)(**{**fixed, **options}, **tensors, **where)


def oracle(case, tensors, **options):
    name, fixed = CASES[case]
    options = {k: v for k, v in {**fixed, **options}.items() if k != "method"}
    return getattr(reference, name)(**options, **tensors)


def check(case, tensors, dtype, backend, scale=20.0, bound=None, **options):
    """Against the reference in float64 on the same rounded inputs."""
    out = differentiate(lambda **t: ours(case, t, backend, **options), tensors)
    wide = {k: v.cpu().double() for k, v in tensors.items()}
    expected = differentiate(lambda **t: oracle(case, t, **options), wide)
    assert out.value.dtype == (dtype if dtype == torch.float64 else torch.float32)
    for name in ("z0", "z1"):
        assert out.gradients[name].dtype == dtype
    assert_outcomes_match(out, expected, bound or dtype, scale)
    return out


@pytest.mark.parametrize(("shape", "dtype"), [pytest.param(s, t, id=f"N{s[0]}-D{s[1]}-{dtype_id(t)}") for s, t in GRID])
@cases
def test_loss_and_gradients(case, shape, dtype, backend, poison):
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    # two rows have standardised columns of 1 and -1 whatever they were: a gradient of nothing but rounding, divided by
    # a standard deviation that may be small; what the epsilon leaves of it has the last digits only
    scale, bound = (2e3, torch.float16 if dtype == torch.float32 else None) if shape[0] == 2 else (20.0, None)
    check(case, draw(*shape, dtype, device_of(backend)), dtype, backend, scale, bound)


@pytest.mark.parametrize("method", ["gram", "tile"])
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
def test_spectral_options(weighted, options, method, backend, poison):
    """The projection with rows on both sides of the ball; weights and their gradient."""
    tensors = draw(65, 24, torch.float32, device_of(backend))
    for z in tensors.values():
        z[::3] *= 0.05
        z[1] = 0
    if weighted:
        tensors["weight"] = torch.rand(65, dtype=torch.float64, device=device_of(backend))
    check("spectral", tensors, torch.float32, backend, method=method, **options)


def test_a_scalar_weight_is_differentiable():
    tensors = {**draw(33, 24), "lambd": torch.tensor(0.1, dtype=torch.float64)}
    check("barlow_twins", tensors, torch.float64, None)
    weights = {name: torch.tensor(2.0, dtype=torch.float64) for name in ("sim_weight", "var_weight", "cov_weight")}
    check("vicreg", {**draw(33, 24), **weights}, torch.float64, None)


@pytest.mark.parametrize("include_diagonal", [False, True], ids=["off", "all"])
def test_spectral_forms_and_sides_agree(include_diagonal, backend):
    """Tile = Gram, value and gradient; L(X, Y) = L(Y, X)."""
    dtype = precise(backend)
    for n, d in ((65, 24), (24, 65)):
        tensors = draw(n, d, dtype, device_of(backend))

        def loss(z0, z1, method):
            return moments.spectral_contrastive_loss(
                z0, z1, method=method, include_diagonal=include_diagonal, backend=backend
            )

        gram, tile = (differentiate(lambda **t: loss(**t, method=m), tensors) for m in ("gram", "tile"))  # noqa: B023
        assert_outcomes_match(gram, tile, dtype, 20.0)
        swapped = differentiate(lambda z0, z1: loss(z1, z0, "auto"), tensors)
        assert_outcomes_match(swapped, tile, dtype, 20.0)


@pytest.mark.parametrize("rows", [17, 65])
def test_small_and_large_products_agree(rows):
    """Constant columns leave the other moments alone: enough of them turn the D x D form into the N x N form."""
    n, d, extra = rows, 16, 80
    tensors = draw(n, d)

    def padded(z0, z1):
        return F.pad(z0, (0, extra)), F.pad(z1, (0, extra))

    narrow = differentiate(lambda **t: moments.barlow_twins_loss(**t), tensors)
    # a constant column correlates with nothing, not even itself
    wide = differentiate(lambda **t: moments.barlow_twins_loss(*padded(**t)) - extra, tensors)
    assert_outcomes_match(wide, narrow, torch.float64, extra)
    narrow = differentiate(lambda **t: d * moments.vicreg_loss(**t), tensors)
    # it has no spread either, which the variance term counts in both views
    spread = 25.0 * extra * (1 - math.sqrt(1e-4))
    wide = differentiate(lambda **t: (d + extra) * moments.vicreg_loss(*padded(**t)) - spread, tensors)
    assert_outcomes_match(wide, narrow, torch.float64, 25.0 * extra)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.parametrize(("n", "d"), [(300, 16), (16, 300)])
@pytest.mark.parametrize("case", ["spectral", "barlow_twins", "vicreg"])
def test_no_product_is_larger_than_the_features(case, n, d):
    """Neither N x N nor D x D where it is the larger one, in the forward and in the backward."""
    tensors = {k: v.requires_grad_() for k, v in draw(n, d, torch.float32).items()}
    with Largest() as largest:
        ours(case, tensors).backward()
    assert largest.elements <= n * d


@pytest.mark.parametrize("case", ["spectral", "spectral-tile", "barlow_twins", "vicreg"])
def test_autocast_rounds_the_features_only(case):
    """bfloat16 features, float32 moments."""
    for n, d in ((65, 24), (24, 65)):
        tensors = draw(n, d, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            loss = ours(case, tensors)
        expected = oracle(case, {k: v.bfloat16().double() for k, v in tensors.items()})
        assert loss.dtype == torch.float32
        assert_matches(loss, expected, torch.float32, scale=1.0)


def test_decorrelated_features_keep_the_digits_of_the_rest():
    """Orthogonal columns with a little noise: the squares off the diagonal are a millionth of those on it."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(6):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    z = (hadamard[:, 1:17] + 1e-3 * torch.randn(64, 16, dtype=torch.float64)).float()
    loss = moments.barlow_twins_loss(z, z.clone(), lambd=1.0)
    expected = reference.barlow_twins_loss(z.double(), z.double(), lambd=1.0)
    assert expected < 1e-3
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=0)


def test_values_by_hand(backend):
    eye = torch.eye(2, device=device_of(backend))
    for method in ("gram", "tile"):
        assert moments.spectral_contrastive_loss(eye, eye.clone(), method=method, backend=backend) == -2
        everything = moments.spectral_contrastive_loss(
            eye, eye.clone(), include_diagonal=True, method=method, backend=backend
        )
        assert everything == -2 + 0.5
    orthogonal = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert moments.barlow_twins_loss(orthogonal, orthogonal.clone()) < 1e-8
    assert moments.barlow_twins_loss(orthogonal, -orthogonal) == pytest.approx(8.0, rel=1e-4)
    assert moments.vicreg_loss(orthogonal, orthogonal.clone()) == 0
    assert moments.vicreg_loss(orthogonal, -orthogonal) == 100


def test_one_sample(backend, poison):
    """Spectral: no pair, the alignment alone. The others need a variance."""
    z0, z1 = draw(1, 24, torch.float32, device_of(backend)).values()
    for method in ("gram", "tile"):
        loss = moments.spectral_contrastive_loss(z0, z1, mu=2.0, method=method, backend=backend)
        torch.testing.assert_close(loss, -(z0 * z1).sum())
    for loss in (moments.barlow_twins_loss, moments.vicreg_loss):
        with pytest.raises(ValueError, match=r"z0 \(1, 24\) must have at least 2 rows"):
            loss(z0, z1)


@pytest.mark.parametrize("method", ["gram", "tile"])
def test_projected_and_zero_rows_have_finite_gradients(method, backend, poison):
    tensors = draw(65, 24, torch.float32, device_of(backend))
    for z in tensors.values():
        z[3] = 0
    out = differentiate(
        lambda **t: moments.spectral_contrastive_loss(**t, project=True, method=method, backend=backend), tensors
    )
    assert all(g.isfinite().all() for g in out.gradients.values())
    out = differentiate(
        lambda **t: moments.spectral_contrastive_loss(**t, normalize=True, method=method, backend=backend), tensors
    )
    assert not any(g[3].any() for g in out.gradients.values())


@cases
def test_nan_and_infinity_are_not_hidden(case, backend):
    for n, d in ((65, 24), (24, 65)):
        for bad in (math.nan, math.inf):
            for name in ("z0", "z1"):
                tensors = draw(n, d, torch.float32, device_of(backend))
                tensors[name][3, 2] = bad
                loss = ours(case, tensors, backend).sum()
                assert not loss.isfinite()
                assert loss.isnan() or bad == math.inf


@cases
def test_order_of_samples_is_irrelevant(case, backend):
    dtype = precise(backend)
    tensors = draw(65, 24, dtype, device_of(backend))
    order = torch.randperm(65, device=device_of(backend))
    loss = ours(case, tensors, backend)
    shuffled = ours(case, {k: v[order] for k, v in tensors.items()}, backend)
    assert_matches(shuffled, loss[order] if loss.dim() else loss, dtype, scale=20.0)


@cases
def test_inputs_stay_as_they_were_and_bits_repeat(case, backend, poison):
    tensors = draw(65, 24, torch.float32, device_of(backend))
    before = {k: v.clone() for k, v in tensors.items()}
    strided = {k: v.T.contiguous().T for k, v in tensors.items()}

    def run(tensors):
        return differentiate(lambda **t: ours(case, t, backend), tensors)

    first, again = run(tensors), run(tensors)
    assert all(torch.equal(before[k], tensors[k]) for k in tensors)
    assert torch.equal(first.value, again.value)
    assert all(torch.equal(first.gradients[k], again.gradients[k]) for k in tensors)
    wide = Outcome(first.value.double(), first.gradients)
    assert_outcomes_match(run(strided), wide, torch.float32, 20.0)


@pytest.mark.parametrize(("n", "d"), [(7, 3), (3, 7)])
@pytest.mark.parametrize("case", ["spectral", "spectral-gram", "spectral-tile", "barlow_twins", "vicreg"])
def test_gradcheck(case, n, d):
    """First and second derivatives."""
    tensors = [z.requires_grad_() for z in draw(n, d).values()]

    def loss(z0, z1):
        return ours(case, {"z0": z0, "z1": z1}, "torch")

    assert torch.autograd.gradcheck(loss, tensors)
    assert torch.autograd.gradgradcheck(loss, tensors)


MODULES = {
    "SpectralContrastiveLoss": (SpectralContrastiveLoss, "spectral_contrastive_loss", {"mu": 2.0, "project": True}),
    "BarlowTwinsLoss": (BarlowTwinsLoss, "barlow_twins_loss", {"lambd": 0.01, "std": "unbiased"}),
    "VICRegLoss": (VICRegLoss, "vicreg_loss", {"sim_weight": 1.0, "eps": 1e-3}),
}


@pytest.mark.parametrize("name", MODULES)
def test_module_is_its_function(name):
    module, function, options = MODULES[name]
    inputs = draw(12, 16, torch.float32).values()
    loss = module(**options)
    assert torch.equal(loss(*inputs), getattr(moments, function)(*inputs, **options))
    assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(loss)))(*inputs), loss(*inputs))
    for option, value in options.items():
        assert f"{option}={value}" in repr(loss)
    with pytest.raises(TypeError, match="tau"):
        module(tau=0.1)


def f(*shape):
    return torch.randn(*shape)


BAD = {
    "rows": (lambda loss: loss(f(8, 16), f(7, 16)), ValueError, "z0 (8, 16) and z1 (7, 16) must have the same first"),
    "columns": (lambda loss: loss(f(8, 16), f(8, 15)), ValueError, "z0 (8, 16) and z1 (8, 15) must have the same last"),
    "a vector": (lambda loss: loss(f(8), f(8)), ValueError, "z0 (8,) must have shape (N, D)"),
    "empty": (lambda loss: loss(f(0, 16), f(0, 16)), ValueError, "z0 (0, 16) is an empty batch"),
    "integers": (lambda loss: loss(f(8, 16).long(), f(8, 16)), TypeError, "z0 has dtype torch.int64"),
    "mixed": (lambda loss: loss(f(8, 16), f(8, 16).double()), TypeError, "z0 is torch.float32 and z1 is torch.float64"),
    "devices": (lambda loss: loss(f(8, 16), f(8, 16).to("meta")), RuntimeError, "z0 is on cpu and z1 on meta"),
    "option": (lambda loss: loss(f(8, 16), f(8, 16), tau=1.0), TypeError, "tau"),
}
BAD_OPTIONS = {
    "mu": ("spectral_contrastive_loss", {"mu": 0.0}, ValueError, "mu 0.0 must be positive"),
    "mu type": ("spectral_contrastive_loss", {"mu": "1"}, TypeError, "mu must be a number"),
    "method": ("spectral_contrastive_loss", {"method": "dense"}, ValueError, "method 'dense' is unknown"),
    "reduction": ("spectral_contrastive_loss", {"reduction": "row"}, ValueError, "reduction 'row' is unknown"),
    "weight": ("spectral_contrastive_loss", {"weight": torch.ones(9)}, ValueError, "weight (9,) must have shape (8,)"),
    "std": ("barlow_twins_loss", {"std": "batch"}, ValueError, "std 'batch' is unknown"),
    "lambd": ("barlow_twins_loss", {"lambd": torch.ones(2)}, ValueError, "lambd (2,)"),
    "eps": ("vicreg_loss", {"eps": -1.0}, ValueError, "eps -1.0"),
    "sim_weight": ("vicreg_loss", {"sim_weight": "high"}, TypeError, "sim_weight must be a number"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("loss", ["spectral_contrastive_loss", "barlow_twins_loss", "vicreg_loss"])
def test_bad_input(loss, name):
    call, error, message = BAD[name]
    with pytest.raises(error) as caught:
        call(getattr(moments, loss))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(name):
    loss, options, error, message = BAD_OPTIONS[name]
    with pytest.raises(error) as caught:
        getattr(moments, loss)(f(8, 16), f(8, 16), **options)
    assert message in str(caught.value)
