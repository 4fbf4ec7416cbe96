"""The primitives against the dense reference: values, every gradient, masks, strides, empty inputs, repeatability."""

import math

import pytest
import torch
import torch.nn.functional as F
from testing import SHAPES as RAGGED
from testing import (
    assert_matches,
    assert_outcomes_match,
    device_of,
    differentiate,
    dtype_id,
    shape_id,
    supports,
)

import contrastive_kernels as ck
import python_ref
from contrastive_kernels import similarity, sweep

SHAPES = [*RAGGED, (1000, 1000, 24)]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SCALE = 5.0


def compare(function, tensors, backend, dtype=torch.float64, scale=1.0, **options):
    """A primitive on `backend` in `dtype` against the reference in float64 on the same rounded tensors."""
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    device = device_of(backend)
    # features are in `dtype`; scalars and vectors keep the precision of the statistics
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def rounded(x):
        return x.to(dtype if x.dim() > 1 else wide) if x.is_floating_point() else x

    tensors = {name: rounded(x) for name, x in tensors.items()}
    ours = differentiate(
        lambda **t: function(ck, backend=backend, **t, **options), {k: v.to(device) for k, v in tensors.items()}
    )
    reference = differentiate(
        lambda **t: function(python_ref, **t, **options),
        {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()},
    )
    assert ours.value.dtype == wide
    assert all(ours.gradients[k].dtype == tensors[k].dtype for k in ours.gradients)
    assert_outcomes_match(ours, reference, dtype, scale)


def logsumexp(module, **arguments):
    """The rows of the primitive, and its columns after them."""
    out = module.similarity_logsumexp(**arguments)
    return torch.cat(out) if isinstance(out, tuple) else out


def term_sum(module, term, constants=(), backend=None, **arguments):
    """The sum of a term built from its differentiable operands, which are tensors among the arguments."""
    operands = {k: arguments.pop(k) for k in ("scale", "bias", "margin") if k in arguments}
    options = {} if backend is None else {"backend": backend}
    return module.similarity_sum(term=term(*constants, **operands), **arguments, **options)


def pair(shape, columns_like_rows=False):
    n, m, d = shape
    return {
        "x": F.normalize(torch.randn(n, d, dtype=torch.float64), dim=1),
        "y": F.normalize(torch.randn(n if columns_like_rows else m, d, dtype=torch.float64), dim=1),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_logsumexp(shape, dtype, backend, poison):
    compare(logsumexp, {**pair(shape), "scale": torch.tensor(SCALE)}, backend, dtype, SCALE)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_logsumexp_of_x_with_itself(shape, dtype, backend, poison):
    """Upper triangle only: a row takes from the tiles left of the diagonal as well."""
    n = shape[0]
    tensors = {"x": pair(shape)["x"], "scale": torch.tensor(SCALE), "x_ids": torch.arange(n) // 2}
    compare(logsumexp, tensors, backend, dtype, SCALE)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_logsumexp_of_columns(shape, dtype, backend, poison):
    n, m, _ = shape
    tensors = {
        **pair(shape),
        "scale": torch.tensor(SCALE),
        "x_ids": torch.randint(9, (n,)),
        "y_ids": torch.randint(9, (m,)),
    }
    compare(logsumexp, tensors, backend, dtype, SCALE, columns=True)


def option(name, shape):
    """The optional tensors of `similarity_logsumexp`, each alone and together."""
    n, m, _ = shape
    ids = {"x_ids": torch.randint(5, (n,)), "y_ids": torch.randint(5, (m,))}
    bias = {"y_bias": torch.randn(m, dtype=torch.float64)}
    cutoff = {"cutoff": torch.randn(n, dtype=torch.float64) / 20}
    return {
        "ids": ids,
        "small ids": {k: v.to(torch.int32) for k, v in ids.items()},
        "negative and huge ids": {k: (v - 2) * 2**61 for k, v in ids.items()},
        "bias": bias,
        "cutoff": cutoff,
        "everything": {**ids, **bias, **cutoff},
    }[name]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("name", ["ids", "small ids", "negative and huge ids", "bias", "cutoff", "everything"])
def test_logsumexp_options(name, dtype, backend, poison):
    shape = (65, 129, 24)
    tensors = {**pair(shape), "scale": torch.tensor(SCALE), **option(name, shape)}
    cutoff = tensors.pop("cutoff", None)
    options = {} if cutoff is None else {"cutoff": cutoff.float().to(device_of(backend))}
    compare(logsumexp, tensors, backend, dtype, SCALE, **options)


@pytest.mark.parametrize("name", ["bias", "cutoff"])
def test_logsumexp_of_x_with_itself_where_the_mask_is_not_symmetric(name, backend, poison):
    n = 129
    x = pair((n, 1, 24))["x"]
    tensors = {"x": x, "scale": torch.tensor(SCALE), "x_ids": torch.arange(n) // 2}
    if name == "bias":
        compare(logsumexp, {**tensors, "y_bias": torch.randn(n, dtype=torch.float64)}, backend, scale=SCALE)
    else:
        cutoff = torch.randn(n, dtype=torch.float64, device=device_of(backend)) / 20
        compare(logsumexp, tensors, backend, scale=SCALE, cutoff=cutoff)


@pytest.mark.parametrize("scale", [200.0, 0.1, -5.0, 0.0])
def test_logsumexp_scales(scale, backend, poison):
    """Cold, warm, negative and no temperature."""
    compare(logsumexp, {**pair((65, 129, 24)), "scale": torch.tensor(scale)}, backend, torch.float32, 200.0)


def test_logsumexp_of_large_and_very_negative_logits(backend, poison):
    """Raw rows: no shift fixed in advance survives logits from -4000 to 4000."""
    x = 20 * torch.randn(65, 24, dtype=torch.float64)
    below = -x.abs()
    for y in (20 * torch.randn(129, 24, dtype=torch.float64), x.abs().mean(0) * torch.ones(129, 1)):
        compare(logsumexp, {"x": below, "y": y}, backend, torch.float32, 40.0)


def test_logsumexp_rows_without_pairs(backend, poison):
    """-inf with exactly zero gradient, for rows, columns and the scale."""
    device = device_of(backend)
    x = torch.randn(5, 8, device=device, requires_grad=True)
    scale = torch.tensor(2.0, device=device, requires_grad=True)
    ids = torch.zeros(5, dtype=torch.int64, device=device)
    for arguments in ({"x": x, "x_ids": ids}, {"x": x, "y": x.detach()[:3], "cutoff": -1e4}):
        rows = ck.similarity_logsumexp(scale=scale, backend=backend, **arguments)
        assert rows.tolist() == [-math.inf] * 5
        for gradient in torch.autograd.grad(rows.sum(), (x, scale)):
            assert torch.equal(gradient, torch.zeros_like(gradient))
    rows, columns = ck.similarity_logsumexp(x, x.detach()[:3], x_ids=ids, y_ids=ids[:3], columns=True, backend=backend)
    assert columns.tolist() == [-math.inf] * 3


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
    """The sum over the rows too, whose gradients are computed beside the value."""
    term, constants, operands = TERMS[name]
    tensors = {**pair((65, 129, 24)), "x_ids": torch.randint(9, (65,)), "y_ids": torch.randint(9, (129,)), **operands}
    if itself:
        del tensors["y"], tensors["y_ids"]
    compare(term_sum, tensors, backend, dtype, 10.0, term=term, constants=constants, reduction="sum")


def test_total_is_one_sweep(backend, monkeypatch):
    """With gradients there is no forward sweep, without them no backward one; asked twice, they are the same."""
    device, calls, operator = device_of(backend), [], similarity.operator
    monkeypatch.setattr(similarity, "operator", lambda *names: calls.append(names[1]) or operator(*names))
    x, y = (z.to(device, torch.float32).requires_grad_() for z in pair((65, 129, 24)).values())
    total = ck.similarity_sum(x, y, term=ck.Softplus(10.0, -1.0), reduction="sum", backend=backend)
    first = torch.autograd.grad(total, (x, y), retain_graph=True)
    second = torch.autograd.grad(2 * total, (x, y))
    assert calls == ["backward"]
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))
    with torch.no_grad():
        again = ck.similarity_sum(x, y, term=ck.Softplus(10.0, -1.0), reduction="sum", backend=backend)
    assert calls == ["backward", "forward"]
    torch.testing.assert_close(again, total.detach())


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
    """A gradient below the range of float16 survives where the loss is scaled up, as mixed-precision training does."""
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
    return (1 + torch.where(v < 0, v - v.detach(), v)) ** -2.5  # below 0 the value of 0 with its slope


# The terms that the losses of distances use: (term, constants, operands, the same from the matrix).
DISTANCE_TERMS = {
    "distance_hinge": (sweep.DistanceHinge, (), {"margin": torch.linspace(1.0, 1.6, 65)}, distance_hinge),
    "student": (
        sweep.Student,
        (2.5,),
        {"scale": torch.tensor(-2.0), "offset": torch.linspace(-0.5, 3.0, 65)},
        student,
    ),
}


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
    """Equal rows and rows closer than rounding tells: the distance is 1e-6."""
    x = torch.eye(3, device=device_of(backend), requires_grad=True)
    y = torch.cat([x.detach(), 1.1 * x.detach()])
    out = ck.similarity_sum(x, y, term=sweep.DistanceHinge(0.5), backend=backend)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("reduce", ["min", "mean"])
@pytest.mark.parametrize("shape", [(1, 2, 1), (63, 3, 24), (129, 6, 100)], ids=lambda s: f"N{s[0]}-V{s[1]}-D{s[2]}")
def test_min_view_similarity(shape, reduce, dtype, backend, poison):
    views = F.normalize(torch.randn(shape, dtype=torch.float64), dim=-1)

    def values(module, **arguments):
        return module.min_view_similarity(**arguments, reduce=reduce)[0]

    compare(values, {"views": views}, backend, dtype)
    if reduce == "min":
        views = views.to(dtype)
        pairs = ck.min_view_similarity(views.to(device_of(backend)), backend=backend)[1]
        assert pairs.dtype == torch.int64
        assert torch.equal(pairs.cpu(), python_ref.min_view_similarity(views.double())[1])


def test_min_view_similarity_takes_the_first_on_a_tie(backend):
    views = torch.eye(4, device=device_of(backend)).repeat(3, 1, 1).requires_grad_()
    values, pairs = ck.min_view_similarity(views, backend=backend)
    assert pairs.tolist() == [[0, 1]] * 3
    values.sum().backward()
    assert not views.grad[:, 2:].any()
    assert ck.min_view_similarity(views, reduce="mean", backend=backend)[1] is None


def strided(x, kind):
    """The same rows with other strides."""
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
    """Bitwise what contiguous inputs give, the gradient of the sum included."""
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
    """No rows, no columns or no features: the sums over nothing."""
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
    """The gradient that is wanted is the same whether the others are or not."""
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
    """In every term and behind every cutoff, in the rows it touches and in no other."""
    device = device_of(backend)
    x, y = torch.randn(65, 24, device=device), torch.randn(129, 24, device=device)
    x[40, 3] = math.nan
    hit = [40]
    terms = [ck.Identity(), ck.Square(), ck.Band(0.1, 0.5), ck.Softplus(), ck.Hinge(-0.5), ck.Gaussian()]
    for term in (*terms, sweep.DistanceHinge(0.5), sweep.Student(3.0)):
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
    """Also after a call of another size, and the inputs stay as they were."""
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


@pytest.mark.skipif(torch.get_num_threads() == 1, reason="one thread is all there is")
def test_thread_count_changes_roundings_only(backend):
    if device_of(backend) != "cpu":
        pytest.skip("threads are the CPU's")
    tensors = {k: v.float() for k, v in pair((1000, 129, 24)).items()}

    def run():
        return differentiate(lambda x, y: logsumexp(ck, x=x, y=y, scale=SCALE, columns=True, backend=backend), tensors)

    threads = torch.get_num_threads()
    many = run()
    try:
        torch.set_num_threads(1)
        one = run()
    finally:
        torch.set_num_threads(threads)
    assert_matches(one.value, many.value, torch.float32)
    for k in tensors:
        assert_matches(one.gradients[k], many.gradients[k], torch.float32)


def test_autocast_casts_the_features_only(backend):
    """The features are rounded to the autocast dtype; the result is float32 and exact for the rounded features."""
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


def test_a_loss_of_your_own(backend):
    """Gradients flow through the primitives into anything: a decoupled loss in three lines."""
    device = device_of(backend)
    z = F.normalize(torch.randn(32, 16, dtype=torch.float64), dim=1)
    ids = torch.arange(16).repeat(2)

    def loss(module, z, ids, **options):
        lse = module.similarity_logsumexp(z, scale=10.0, x_ids=ids, **options)
        return (lse - 10 * (z * z.roll(16, 0)).sum(1)).mean()

    ours = differentiate(lambda z: loss(ck, z, ids.to(device), backend=backend), {"z": z.to(device, torch.float32)})
    reference = differentiate(lambda z: loss(python_ref, z, ids), {"z": z.float().double()})
    assert_outcomes_match(ours, reference, torch.float32, 1.0)
