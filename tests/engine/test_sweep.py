"""The function `sweep`: its pairs and exponents, strides, empty inputs, few gradients, NaN, the same bits, autocast."""

import math

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
import python_ref
from contrastive_kernels.primitives import Pairs, sweep, weighted_total
from tests.support.primitives import SCALE, logsumexp, pair
from tests.support.testing import (
    assert_matches,
    assert_outcomes_match,
    device_of,
    differentiate,
    dtype_id,
    shape_id,
    supports,
    thread_count,
)


@pytest.mark.parametrize("views", [1, 2, 5, 20])
def test_diagonals_are_ids(views, backend, poison):
    """Dropping the views of a sample by their diagonals is dropping them by equal ids; one view drops i = j."""
    device, samples = device_of(backend), 260 // views
    z = F.normalize(torch.randn(samples * views, 24), dim=1).to(device)
    ids = torch.arange(samples, device=device).repeat(views)

    def run(pairs):
        return differentiate(lambda z: sweep(z, None, pairs, scale=SCALE, backend=backend).row_lse[0], {"z": z})

    by_diagonals, by_ids = run(Pairs(diagonals=views)), run(Pairs(x_ids=ids))
    torch.testing.assert_close(by_diagonals.value, by_ids.value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(by_diagonals.gradients["z"], by_ids.gradients["z"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("itself", [False, True], ids=["two", "self"])
def test_equal_and_other_ids_are_all_pairs(itself, backend, poison):
    device = device_of(backend)
    x, y = (v.to(device, torch.float32) for v in pair((65, 129, 24)).values())
    x_ids, y_ids = torch.arange(65, device=device) % 7, torch.arange(129, device=device) % 9
    y, y_ids = (None, None) if itself else (y, y_ids)
    equal, other, every = (
        sweep(x, y, pairs, scale=SCALE, term=ck.Square(), maximum=True, backend=backend)
        for pairs in (Pairs(x_ids, y_ids, keep_equal_ids=True), Pairs(x_ids, y_ids), Pairs())
    )
    torch.testing.assert_close(torch.logaddexp(equal.row_lse, other.row_lse), every.row_lse)
    torch.testing.assert_close(equal.row_sum + other.row_sum, every.row_sum)
    assert torch.equal(torch.maximum(equal.row_max, other.row_max), every.row_max)


@pytest.mark.parametrize("itself", [False, True], ids=["two", "self"])
def test_two_exponents_are_two_sweeps(itself, backend, poison):
    """I18 closed gradient: two log-sum-exps of one sweep are those of two sweeps, and so are their gradients."""
    tensors = {k: v.to(device_of(backend), torch.float32) for k, v in pair((65, 129, 24)).items()}
    if itself:
        del tensors["y"]

    def together(x, y=None):
        return sweep(x, y, scale=SCALE, exponents=(1.0, 2.5), backend=backend).row_lse

    def apart(x, y=None):
        return torch.cat([sweep(x, y, scale=SCALE * q, backend=backend).row_lse for q in (1.0, 2.5)])

    ours, expected = differentiate(together, tensors), differentiate(apart, tensors)
    assert_outcomes_match(ours, expected, torch.float32, SCALE)


def test_weighted_total(backend, poison):
    """The weights of the rows, without and with a gradient of their own."""
    tensors = {k: v.to(device_of(backend), torch.float32) for k, v in pair((65, 129, 24)).items()}
    weight = torch.rand(65, device=device_of(backend))

    def total(x, y, weight=weight):
        return weighted_total(x, y, term=ck.Softplus(3.0, -1.0), weight=weight, backend=backend)

    def summed(x, y, weight=weight):
        return (weight * ck.similarity_sum(x, y, term=ck.Softplus(3.0, -1.0), backend=backend)).sum()

    for given in (tensors, {**tensors, "weight": weight}):
        assert_outcomes_match(differentiate(total, given), differentiate(summed, given), torch.float32, 1.0)


def strided(x, kind):
    """Return the same rows with other strides."""
    if kind == "transposed":
        return x.T.contiguous().T
    if kind == "sliced":
        return torch.cat([x, x + 1], 1)[:, : x.shape[1]]
    if kind == "every second row":
        return x.repeat_interleave(2, 0)[::2]
    if kind == "every second column":
        return x.repeat_interleave(2, 1)[:, ::2]
    return x[:1].expand_as(x)


@pytest.mark.parametrize("kind", ["transposed", "sliced", "every second row", "every second column", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_strided_inputs(kind, dtype, backend, poison):
    """Values and gradients are bitwise those of contiguous inputs."""
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    features = {k: v.to(device_of(backend), dtype) for k, v in pair((65, 129, 24)).items()}
    odd = {k: strided(v, kind) for k, v in features.items()}
    assert not all(v.is_contiguous() for v in odd.values())

    def run(tensors):
        return differentiate(lambda x, y: logsumexp(ck, x=x, y=y, scale=SCALE, columns=True, backend=backend), tensors)

    ours, contiguous = run(odd), run({k: v.contiguous() for k, v in odd.items()})
    assert torch.equal(ours.value, contiguous.value)
    assert all(torch.equal(ours.gradients[k], contiguous.gradients[k]) for k in "xy")
    itself = ck.similarity_logsumexp(odd["x"], scale=SCALE, backend=backend)
    assert torch.equal(itself, ck.similarity_logsumexp(odd["x"].contiguous(), scale=SCALE, backend=backend))


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (0, 0, 4), (3, 2, 0)], ids=shape_id)
def test_empty_inputs(shape, backend, poison):
    """No rows, no columns or no features: empty sums."""
    n, m, d = shape
    x = torch.randn(n, d, device=device_of(backend), requires_grad=True)
    y = torch.randn(m, d, device=device_of(backend), requires_grad=True)
    rows, columns = ck.similarity_logsumexp(x, y, columns=True, backend=backend)
    total = ck.similarity_sum(x, y, term=ck.Softplus(), backend=backend)
    assert rows.tolist() == pytest.approx([math.log(m) if m else -math.inf] * n)
    assert columns.tolist() == pytest.approx([math.log(n) if n else -math.inf] * m)
    assert total.tolist() == pytest.approx([m * math.log(2)] * n)
    gradients = torch.autograd.grad(rows.sum() + columns.sum() + total.sum(), (x, y))
    assert [g.shape for g in gradients] == [x.shape, y.shape]
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("wanted", ["x", "y", "scale", "y_bias"])
def test_only_one_input_needs_a_gradient(wanted, backend, poison):
    """A gradient does not depend on which others are wanted."""
    device = device_of(backend)
    tensors = {**pair((65, 129, 24)), "scale": torch.tensor(SCALE), "y_bias": torch.randn(129)}
    tensors = {k: v.to(device, torch.float32) for k, v in tensors.items()}
    full = differentiate(lambda **t: logsumexp(ck, backend=backend, **t), tensors).gradients[wanted]
    alone = differentiate(
        lambda **t: logsumexp(ck, backend=backend, **{**tensors, **t}), {wanted: tensors[wanted]}
    ).gradients[wanted]
    torch.testing.assert_close(alone, full, rtol=1e-6, atol=1e-6)


def test_without_gradients_nothing_is_saved(backend):
    saved = []
    x = torch.randn(65, 24, device=device_of(backend))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = ck.similarity_logsumexp(x, x + 1, backend=backend)
        with torch.no_grad():
            ck.similarity_logsumexp(x.requires_grad_(), backend=backend)
    assert not out.requires_grad
    assert not saved


def test_nan_survives(backend):
    """NaN survives every term and cutoff, in its own row and column and nowhere else."""
    device = device_of(backend)
    x, y = torch.randn(65, 24, device=device), torch.randn(129, 24, device=device)
    x[40, 3] = math.nan
    hit = [40]
    terms = [ck.Identity(), ck.Square(), ck.Band(0.1, 0.5), ck.Softplus(), ck.Hinge(-0.5), ck.Gaussian()]
    for term in (*terms, ck.DistanceHinge(0.5), ck.Student(3.0)):
        out = ck.similarity_sum(x, y, term=term, backend=backend)
        assert out.isnan().nonzero().flatten().tolist() == hit, term
    for options in ({}, {"cutoff": 0.5}, {"y_bias": torch.zeros(129, device=device)}):
        out = ck.similarity_logsumexp(x, y, backend=backend, **options)
        assert out.isnan().nonzero().flatten().tolist() == hit, options
    rows, columns = ck.similarity_logsumexp(y, x, columns=True, backend=backend)
    assert rows.isnan().all()
    assert columns.isnan().nonzero().flatten().tolist() == hit
    assert ck.similarity_logsumexp(x, backend=backend).isnan().all()


def test_same_call_gives_the_same_bits(backend, poison):
    """A call of another size in between changes nothing; the inputs stay unchanged."""
    device = device_of(backend)
    tensors = {k: v.to(device, torch.float32) for k, v in pair((1000, 129, 24)).items()}
    before = {k: v.clone() for k, v in tensors.items()}

    def run(tensors):
        return differentiate(lambda x, y: logsumexp(ck, x=x, y=y, scale=SCALE, columns=True, backend=backend), tensors)

    first = run(tensors)
    run({k: v[:65, :7] for k, v in tensors.items()})
    second = run(tensors)
    assert torch.equal(first.value, second.value)
    assert all(torch.equal(first.gradients[k], second.gradients[k]) for k in tensors)
    assert all(torch.equal(before[k], tensors[k]) for k in tensors)


@pytest.mark.skipif(torch.get_num_threads() == 1, reason="there is one thread")
def test_thread_count_changes_roundings_only(backend):
    if device_of(backend) != "cpu":
        pytest.skip("threads are the CPU's")
    tensors = {k: v.float() for k, v in pair((1000, 129, 24)).items()}

    def run():
        return differentiate(lambda x, y: logsumexp(ck, x=x, y=y, scale=SCALE, columns=True, backend=backend), tensors)

    many = run()
    with thread_count(1):
        one = run()
    assert_matches(one.value, many.value, torch.float32)
    for k in tensors:
        assert_matches(one.gradients[k], many.gradients[k], torch.float32)


def test_autocast_casts_the_features_only(backend):
    """The features are rounded to the autocast dtype; the result is that of the rounded features, in float32."""
    if not supports(backend, torch.bfloat16):
        pytest.skip(f"{backend} does not take bfloat16")
    device = device_of(backend)
    tensors = {k: v.to(device, torch.float32) for k, v in pair((65, 129, 24)).items()}
    with torch.autocast(device, torch.bfloat16):
        ours = differentiate(lambda x, y: ck.similarity_logsumexp(x, y, scale=SCALE, backend=backend), tensors)
    plain = ck.similarity_logsumexp(*(t.to(torch.bfloat16) for t in tensors.values()), scale=SCALE, backend=backend)
    assert ours.value.dtype == torch.float32
    assert torch.equal(ours.value, plain)
    assert ours.gradients["x"].dtype == torch.float32


def test_own_loss(backend):
    """A decoupled loss in three lines around a primitive has the right gradient."""
    device = device_of(backend)
    z = F.normalize(torch.randn(32, 16, dtype=torch.float64), dim=1)
    ids = torch.arange(16).repeat(2)

    def loss(module, z, ids, **options):
        lse = module.similarity_logsumexp(z, scale=10.0, x_ids=ids, **options)
        return (lse - 10 * (z * z.roll(16, 0)).sum(1)).mean()

    ours = differentiate(lambda z: loss(ck, z, ids.to(device), backend=backend), {"z": z.to(device, torch.float32)})
    reference = differentiate(lambda z: loss(python_ref, z, ids), {"z": z.float().double()})
    assert_outcomes_match(ours, reference, torch.float32, 1.0)
