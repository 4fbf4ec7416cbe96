"""MMCL against N naive solves and the batched iteration of the official code; its options, edges and refusals."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
import python_ref
from contrastive_kernels import mmcl_loss
from contrastive_kernels.losses import _svm, mmcl
from tests.support.losses import assert_module_is_function, assert_refused
from tests.support.testing import (
    HALF,
    TOLERANCE,
    Case,
    assert_matches,
    assert_outcomes_match,
    case_params,
    differentiate,
    dtype_id,
    two,
)

D = 12
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]
PGD = {"solver": "pgd", "max_iterations": 150}


def case(**options):
    return Case("mmcl_loss", two("z0", "z1"), options)


# A kernel matrix that is far from singular, so that the two ways to the inverse agree to rounding.
KERNELS = {
    "rbf": case(sigma=2.0),
    "rbf-wide": case(sigma=50.0),
    "rbf-narrow": case(sigma=0.3),
    "linear": case(kernel="linear"),
    "poly": case(kernel="poly", kxx="exact"),
    "tanh": case(kernel="tanh", sigma=0.5, kxx="exact"),
    "min": case(kernel="min", kxx="exact"),
}
OPTIONS = {
    "kxx one": case(kernel="poly", C=2.0),
    "kxx exact": case(kxx="exact", sigma=2.0),
    "no bound": case(C=-1, sigma=5.0),
    "bound that binds": case(C=0.7, sigma=5.0),
    "little regularisation": case(reg=0.01, sigma=2.0),
    "gamma": case(gamma="auto"),
    "raw rows": case(normalize=False, kernel="linear", kxx="exact"),
    "blocks": case(block_size=8, sigma=2.0),
    "ragged blocks": case(block_size=13, sigma=2.0),
    "one large block": case(block_size=100, sigma=2.0),
}
SOLVERS = {
    "normed": case(**PGD, sigma=2.0),
    "fixed step": case(**PGD, sigma=2.0, use_norm=False, eta=0.02),
    "plain descent": case(**PGD, sigma=2.0, nesterov=False),
    "another momentum": case(**PGD, sigma=2.0, a0=0.3),
    "official stop": case(**PGD, sigma=2.0, stop="change", tolerance=0.01),
    "bound": case(**PGD, sigma=5.0, C=0.3),
    "no bound": case(**PGD, sigma=5.0, C=-1),
    "linear": case(**PGD, kernel="linear"),
    "poly": case(**PGD, kernel="poly", C=1.0),
    "tanh": case(**PGD, kernel="tanh", sigma=0.5, kxx="exact"),
    "min": case(**PGD, kernel="min", kxx="exact"),
    "blocks": case(**PGD, sigma=2.0, block_size=7),
}
CASES = {**KERNELS, **OPTIONS, **SOLVERS}


@pytest.fixture(params=DEVICES)
def device(request):
    """Return where the loss is computed, by PyTorch's own operations."""
    return request.param


@pytest.fixture(autouse=True)
def quiet():
    """The descents of these tests are cut short on purpose; the warning has a test of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="mmcl_loss: solver='pgd' did not converge")
        yield


def compare(loss, shape, dtype, device, bound=None, **options):
    """Compare `loss` in `dtype` with the reference in float64 on the same rounded features; return both statistics."""
    features = loss.features(shape, dtype, device)
    found = []

    def run(module, tensors):
        value, stats = loss(module, tensors, **options, return_stats=True)
        found.append(stats)
        return value

    ours = differentiate(lambda **t: run(ck, t), features)
    expected = differentiate(lambda **t: run(python_ref, t), {k: v.cpu().double() for k, v in features.items()})
    assert ours.value.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert all(gradient.dtype == dtype for gradient in ours.gradients.values())
    assert_outcomes_match(ours, expected, bound or dtype, scale=1.0)
    return found


@pytest.mark.parametrize("loss", case_params(CASES))
def test_loss_and_gradients(loss, device, poison):
    """I9 MMCL solvers: in float64 the steps of both descents agree, so that even their number is the same."""
    ours, expected = compare(loss, (21, 0, D), torch.float64, device, reduction="none")
    assert ours.iterations == expected.iterations
    assert (ours.iterations > 0) == (loss.options.get("solver") == "pgd")
    for name in ("zero_fraction", "bound_fraction", "objective"):
        assert_matches(getattr(ours, name), getattr(expected, name), torch.float64, name, 1e3)
    # what is left after the descent is a small difference
    torch.testing.assert_close(ours.kkt_residual.cpu(), expected.kkt_residual, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("loss", case_params({**KERNELS, "pgd": SOLVERS["normed"]}))
def test_other_dtypes(loss, dtype, device, poison):
    """Unit rows are rounded to the dtype of the features: half precision shows in the loss, not only in gradients."""
    bound = torch.float16 if dtype == torch.float32 else torch.bfloat16
    # rounded once more, another feature of two rows would be the smaller one
    options = {}
    if loss.options.get("kernel") == "min" and dtype in HALF:
        loss, options = replace(loss, unit=True), {"normalize": False}
    # the narrow kernel magnifies the rounding of a similarity by 2 / sigma, and a clip moves with it
    compare(loss, (21, 0, D), dtype, device, bound, **options)


@pytest.mark.parametrize("shape", [(2, 0, 1), (2, 0, 5), (3, 0, 200), (65, 0, 3)], ids=str)
@pytest.mark.parametrize("solver", ["inverse", "pgd"])
def test_shapes(shape, solver, device, poison):
    iterations = {"max_iterations": 50} if solver == "pgd" else {}
    compare(case(sigma=2.0, solver=solver, **iterations), shape, torch.float64, device)


@pytest.mark.parametrize("sigma", [0.07, 0.5, 5.0, 50.0])
def test_float32_keeps_its_digits(sigma):
    """At sigma = 50 all entries of the kernel are within 4 % of 1: it must not be centred by subtraction."""
    features = {k: v.float() for k, v in case().features((128, 0, 32)).items()}
    ours = differentiate(lambda **t: mmcl_loss(**t, sigma=sigma), features)
    wide = differentiate(lambda **t: mmcl_loss(**t, sigma=sigma), {k: v.double() for k, v in features.items()})
    assert_outcomes_match(ours, wide, torch.float32)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weight_and_reduction(reduction, device):
    weight = torch.rand(21, dtype=torch.float64).to(device)
    compare(KERNELS["rbf"], (21, 0, D), torch.float64, device, reduction=reduction, weight=weight)


def test_a_start_of_ones_own(device):
    """As the official code draws it; a diagonal and values outside of the box do not matter."""
    alpha0 = torch.randn(21, 21, dtype=torch.float64) * 2
    ours, expected = compare(SOLVERS["official stop"], (21, 0, D), torch.float64, device, alpha0=alpha0, C=1.5)
    assert ours.iterations == expected.iterations > 0
    z0, z1 = case().features((21, 0, D)).values()
    again = alpha0.clamp(0, 1.5).fill_diagonal_(7.0)
    options = {**SOLVERS["official stop"].options, "C": 1.5}
    assert torch.equal(mmcl_loss(z0, z1, alpha0=alpha0, **options), mmcl_loss(z0, z1, alpha0=again, **options))


def test_pgd_finds_the_optimum():
    """Its objective is below that of the clipped inverse, which at a small sigma can be above 0, that of nothing."""
    z0, z1 = case().features((64, 0, 128)).values()
    stats = {solver: mmcl_loss(z0, z1, sigma=5.0, solver=solver, return_stats=True)[1] for solver in ("inverse", "pgd")}
    assert stats["pgd"].kkt_residual.max() <= 1e-4
    assert stats["inverse"].kkt_residual.min() > 0.01
    assert (stats["pgd"].objective <= stats["inverse"].objective).all()
    assert stats["inverse"].objective.mean() > 0 > stats["pgd"].objective.mean()
    # the optimum does not depend on the start
    start = torch.rand(64, 64, dtype=torch.float64)
    other = mmcl_loss(z0, z1, sigma=5.0, solver="pgd", alpha0=start, return_stats=True)[1]
    torch.testing.assert_close(other.objective, stats["pgd"].objective, rtol=1e-4, atol=1e-4)


def test_the_norm_of_every_program():
    """I9 MMCL solvers: the step from sums of the kernel matrix is that from the matrix of every anchor's program."""
    x = F.normalize(torch.randn(17, D, dtype=torch.float64), dim=1)
    K = (x @ x.T + 0.5) ** 3
    for kxx in ("one", "exact"):
        norms = []
        for i in range(17):
            others = [j for j in range(17) if j != i]
            own, kappa = K[i, others], 1.0 if kxx == "one" else K[i, i]
            delta = K[others][:, others] + kappa - own[:, None] - own + 0.3 * torch.eye(16, dtype=x.dtype)
            norms.append(torch.linalg.matrix_norm(delta))
        step = _svm.Problem.of(x, _svm.Solver(kernel="poly", reg=0.3, kxx=kxx)).step()[:, 0]
        torch.testing.assert_close(1 / step, torch.stack(norms), rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", case_params({**KERNELS, "pgd": case(sigma=2.0, solver="pgd", max_iterations=5)}))
def test_gradcheck(loss):
    """Of the second view, on which the coefficients do not depend."""
    z0, z1 = loss.features((5, 0, 3)).values()
    assert torch.autograd.gradcheck(lambda z1: loss(ck, {"z0": z0, "z1": z1}), z1.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda z1: loss(ck, {"z0": z0, "z1": z1}), z1)


def test_closed_form_of_the_gradient():
    """I9 MMCL solvers: ``G_ai = K'(s_ai) (alpha_ia - [a = i] sum alpha_i) / N`` of unit rows, ``K' = 2 K / sigma``."""
    x, z = F.normalize(torch.randn(2, 20, D, dtype=torch.float64), dim=-1).unbind(0)
    x.requires_grad_(), z.requires_grad_()
    mmcl_loss(x, z, sigma=3.0, normalize=False).backward()
    alpha = _svm.solve(_svm.Problem.of(x.detach(), _svm.Solver(sigma=3.0)), _svm.Solver(sigma=3.0)).alpha
    s = (x @ z.T).detach()
    g = 2 / 3 * torch.exp(-(2 - 2 * s) / 3) * (alpha.T - torch.diag(alpha.sum(1))) / 20
    torch.testing.assert_close(x.grad, g @ z.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(z.grad, g.T @ x.detach(), rtol=1e-9, atol=1e-12)


def test_a_differentiable_sigma(device):
    loss = case()
    features = loss.features((21, 0, D), torch.float64, device)
    sigma = torch.tensor(2.0, dtype=torch.float64)
    ours = differentiate(mmcl_loss, {**features, "sigma": sigma.to(device)})
    cpu = {k: v.cpu() for k, v in features.items()}
    assert ours.gradients["sigma"].abs() > 0
    assert_outcomes_match(ours, differentiate(python_ref.mmcl_loss, {**cpu, "sigma": sigma}), torch.float64, 1.0)


@pytest.mark.parametrize("solver", ["inverse", "pgd"])
@pytest.mark.parametrize("kernel", ["rbf", "linear", "poly", "tanh", "min"])
def test_one_sample_means_nothing(kernel, solver, device, poison):
    features = case().features((1, 0, D), torch.float32, device)
    for options in ({}, {"C": -1}, {"reg": 0.0}):
        out = differentiate(lambda **t: mmcl_loss(**t, kernel=kernel, solver=solver, **options), features)  # noqa: B023
        assert out.value == 0
        assert not any(g.nan_to_num(1.0).any() for g in out.gradients.values())
        # the last block of three is of one sample
    z0, z1 = case().features((7, 0, D)).values()
    rows = mmcl_loss(z0, z1, kernel=kernel, solver=solver, block_size=3, C=1.0, reduction="none")
    assert rows[6] == 0 and rows.isfinite().all()


@pytest.mark.parametrize("view", ["z0", "z1"])
@pytest.mark.parametrize("solver", ["inverse", "pgd"])
def test_nan_gives_nan(view, solver, device):
    features = case().features((21, 0, D), torch.float32, device)
    features[view][7, 7] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mmcl_loss(**features, solver=solver, sigma=2.0).isnan()
        features[view][7, 7] = torch.inf
        assert mmcl_loss(**features, solver=solver, sigma=2.0).isnan()


def test_equal_rows_and_a_zero_row(device):
    """Duplicates make the kernel matrix singular, the regularisation does not; a zero row has no gradient."""
    z0, z1 = case().features((20, 0, D), torch.float64, device).values()
    z0[3], z0[5], z1[5] = z0[2], 0, 0
    compare_options = {"sigma": 2.0, "kxx": "exact"}
    ours = differentiate(lambda **t: mmcl_loss(**t, **compare_options), {"z0": z0, "z1": z1})
    expected = differentiate(lambda **t: python_ref.mmcl_loss(**t, **compare_options), {"z0": z0.cpu(), "z1": z1.cpu()})
    assert_outcomes_match(ours, expected, torch.float64, 1.0)
    assert not ours.gradients["z0"][5].any() and ours.gradients["z0"][4].any()
    collapsed = mmcl_loss(z0[:1].expand(20, D), z1[:1].expand(20, D))
    assert collapsed.abs() < 1e-9


def test_a_singular_matrix_is_nan_not_an_error():
    z = torch.zeros(5, 3)
    assert mmcl_loss(z, z, kernel="linear", kxx="exact", reg=0.0).isnan()


def test_permuting_samples_permutes_the_rows():
    z0, z1 = case().features((21, 0, D)).values()
    order = torch.randperm(21)
    for options in ({"sigma": 2.0}, SOLVERS["normed"].options):
        rows = mmcl_loss(z0, z1, **options, reduction="none")
        torch.testing.assert_close(
            mmcl_loss(z0[order], z1[order], **options, reduction="none"), rows[order], rtol=1e-9, atol=1e-10
        )


def test_blocks_are_batches_of_their_own():
    z0, z1 = case().features((20, 0, D)).values()
    rows = mmcl_loss(z0, z1, sigma=2.0, block_size=8, reduction="none")
    parts = [mmcl_loss(z0[i : i + 8], z1[i : i + 8], sigma=2.0, reduction="none") for i in (0, 8, 16)]
    assert torch.equal(rows, torch.cat(parts))


def test_inputs_are_not_written_and_calls_repeat():
    z0, z1 = case().features((21, 0, D), torch.float32).values()
    alpha0 = torch.rand(21, 21)
    before = [x.clone() for x in (z0, z1, alpha0)]
    for options in ({}, {**PGD, "alpha0": alpha0}):
        first = mmcl_loss(z0, z1, **options, normalize=False)
        assert torch.equal(mmcl_loss(z0, z1, **options, normalize=False), first)
    assert all(torch.equal(x, y) for x, y in zip((z0, z1, alpha0), before, strict=True))


def test_no_convergence_warns_with_the_residual():
    z0, z1 = case().features((21, 0, D)).values()
    with pytest.warns(
        RuntimeWarning, match=r"did not converge in 3 iterations: the KKT residual is \de[-+]\d\d"
    ) as seen:
        _, stats = mmcl_loss(z0, z1, solver="pgd", max_iterations=3, block_size=11, sigma=2.0, return_stats=True)
    assert len(seen) == 1
    assert stats.iterations == 3
    assert seen[0].filename == __file__
    assert f"{stats.kkt_residual.max():.0e}" in str(seen[0].message)
    with pytest.warns(RuntimeWarning, match="the relative change is"):
        mmcl_loss(z0, z1, solver="pgd", max_iterations=3, stop="change", sigma=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mmcl_loss(z0, z1, solver="pgd", tolerance=1e-2, sigma=2.0)


def test_a_stopped_descent_keeps_its_coefficients(monkeypatch):
    """A GPU runs the loop to its end, the CPU leaves it: the result is the same."""
    z0, z1 = case().features((21, 0, D)).values()
    for stop in ("kkt", "change"):
        options = dict(solver="pgd", sigma=2.0, stop=stop, tolerance=1e-2, max_iterations=200, return_stats=True)
        loss, stats = mmcl_loss(z0, z1, **options)
        assert 0 < stats.iterations < 200
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            again, others = mmcl_loss(z0, z1, **options)
        assert torch.equal(again, loss)
        assert others.iterations == stats.iterations


def test_more_than_the_memory_is_refused_before_anything_is_built(monkeypatch):
    z = torch.zeros(1 << 20, 1).expand(-1, 2)
    with pytest.raises(ValueError, match=r"N = 1048576 .* needs about \d+ bytes and \d+ are available on cpu"):
        mmcl_loss(z, z)
    z = torch.zeros(4096, 2)
    monkeypatch.setattr(mmcl, "available_bytes", lambda device: 500 << 20)
    with pytest.raises(ValueError, match=f"N = 4096 .* {500 << 20} are available"):
        mmcl_loss(z, z)
    assert mmcl_loss(z, z, block_size=64).isfinite()


BAD = {
    "shapes": (dict(z1=torch.zeros(7, 4)), ValueError, r"z0 (8, 4) and z1 (7, 4) must have the same first dimension"),
    "empty": (dict(z0=torch.zeros(0, 4), z1=torch.zeros(0, 4)), ValueError, "z0 (0, 4) is an empty batch"),
    "a vector": (dict(z0=torch.zeros(8)), ValueError, "z0 (8,) must have shape (N, D)"),
    "integers": (dict(z0=torch.zeros(8, 4).long()), TypeError, "z0 has dtype torch.int64"),
    "mixed": (dict(z1=torch.zeros(8, 4).double()), TypeError, "z0 is torch.float32 and z1 is torch.float64"),
    "kernel": (dict(kernel="gauss"), ValueError, "kernel 'gauss' is unknown"),
    "solver": (dict(solver="newton"), ValueError, "solver 'newton' is unknown"),
    "kxx": (dict(kxx="two"), ValueError, "kxx 'two' is unknown"),
    "stop": (dict(stop="never"), ValueError, "stop 'never' is unknown"),
    "gamma": (dict(gamma=0.1), ValueError, "gamma 0.1 is unknown"),
    "sigma": (dict(sigma=0.0), ValueError, "sigma 0.0 must be positive"),
    "sigma of two": (dict(sigma=torch.ones(2)), ValueError, "sigma (2,)"),
    "C": (dict(C=0.0), ValueError, "C 0.0 must be positive, or -1"),
    "C of a string": (dict(C="none"), TypeError, "C must be a number"),
    "reg": (dict(reg=-0.1), ValueError, "reg -0.1 must not be negative"),
    "eta": (dict(eta=0.0), ValueError, "eta 0.0 must be positive"),
    "a0": (dict(a0=1.5), ValueError, "a0 1.5 must be above 0 and at most 1"),
    "tolerance": (dict(tolerance=-1.0), ValueError, "tolerance -1.0"),
    "max_iterations": (dict(max_iterations=0), ValueError, "max_iterations 0"),
    "block_size": (dict(block_size=0), ValueError, "block_size 0"),
    "block_size of a float": (dict(block_size=4.0), ValueError, "block_size 4.0"),
    "reduction": (dict(reduction="row"), ValueError, "reduction 'row' is unknown"),
    "weight": (dict(weight=torch.ones(9)), ValueError, "weight (9,) must have shape (8,)"),
    "alpha0 of the inverse": (dict(alpha0=torch.ones(8, 8)), ValueError, "alpha0 is where solver='pgd' starts"),
    "alpha0 of another shape": (
        dict(solver="pgd", alpha0=torch.ones(8, 7)),
        ValueError,
        "alpha0 (8, 7) must have shape (8, 8)",
    ),
    "alpha0 of integers": (
        dict(solver="pgd", alpha0=torch.ones(8, 8).long()),
        TypeError,
        "alpha0 has dtype torch.int64",
    ),
    "alpha0 of blocks": (
        dict(solver="pgd", alpha0=torch.ones(8, 8), block_size=4),
        ValueError,
        "alpha0 and block_size",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    options, error, message = BAD[name]
    zeros = torch.zeros(8, 4)
    assert_refused(lambda: mmcl_loss(**{"z0": zeros, "z1": zeros, **options}), error, message)


def test_module_is_its_function():
    inputs, weight = tuple(case().features((12, 0, D), torch.float32).values()), torch.rand(12)
    options = {"kernel": "tanh", "sigma": 0.5, "C": 3.0, "solver": "pgd", "reduction": "none"}
    assert_module_is_function(ck.MMCLLoss, mmcl_loss, inputs, options)
    assert_module_is_function(ck.MMCLLoss, mmcl_loss, inputs, options, weight=weight)
    loss = ck.MMCLLoss(**options)
    loss.sigma = 0.05
    assert torch.equal(loss(*inputs), mmcl_loss(*inputs, **{**options, "sigma": 0.05}))


def test_module_trains_its_sigma():
    loss = ck.MMCLLoss(sigma=torch.nn.Parameter(torch.tensor(2.0)))
    loss(*case().features((12, 0, D), torch.float32).values()).backward()
    assert loss.sigma.grad.abs() > 0


def test_autocast_keeps_the_algebra_in_float32():
    features = case().features((21, 0, D), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = mmcl_loss(**features, sigma=2.0)
    assert loss.dtype == torch.float32
    rounded = {k: F.normalize(v).bfloat16() for k, v in features.items()}
    expected = python_ref.mmcl_loss(**{k: v.double() for k, v in rounded.items()}, sigma=2.0, normalize=False)
    torch.testing.assert_close(loss.double(), expected, rtol=100 * TOLERANCE[torch.float32], atol=0)


def test_compile():
    """In one graph; nothing is read back while tracing."""
    features = case().features((9, 0, D), torch.float32)
    for options in ({}, {"solver": "pgd", "max_iterations": 2}):
        compiled = torch.compile(mmcl_loss, fullgraph=True, backend="aot_eager")
        ours = differentiate(lambda **t: compiled(**t, sigma=2.0, **options), features)  # noqa: B023
        plain = differentiate(lambda **t: mmcl_loss(**t, sigma=2.0, **options), features)  # noqa: B023
        assert_outcomes_match(ours, plain, torch.float32, 1.0)
