"""`similarity_logsumexp` against the dense reference: values, every gradient, masks, scales, rows without pairs."""

import math

import pytest
import torch

import contrastive_kernels as ck
from tests.support.primitives import DTYPES, SCALE, SHAPES, compare, logsumexp, pair
from tests.support.testing import device_of, dtype_id, precise, shape_id


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_logsumexp(shape, dtype, backend, poison):
    compare(logsumexp, {**pair(shape), "scale": torch.tensor(SCALE)}, backend, dtype, SCALE)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_logsumexp_of_x_with_itself(shape, dtype, backend, poison):
    """A sweep of the upper triangle only: a row sums over the tiles left of the diagonal as well."""
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
    """Return optional tensors of `similarity_logsumexp`, one of them or all together."""
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


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("form", ["two", "self", "bias", "columns", "columns of itself"])
@pytest.mark.parametrize("exclude_diagonal", [False, True], ids=["", "not itself"])
def test_logsumexp_of_equal_ids(form, exclude_diagonal, dtype, backend, poison):
    """The other pairs than by default; some rows have none, others only themselves."""
    n, m = 65, 129
    tensors = {**pair((n, m, 24)), "scale": torch.tensor(SCALE)}
    tensors |= {"x_ids": torch.arange(n) // 2, "y_ids": torch.randint(40, (m,)) // 2}
    if "itself" in form or form == "self":
        del tensors["y"], tensors["y_ids"]
    if form == "bias":
        tensors["y_bias"] = torch.randn(m, dtype=torch.float64)
    options = {"same": True, "exclude_diagonal": exclude_diagonal, "columns": "columns" in form}
    compare(logsumexp, tensors, backend, dtype, SCALE, **options)


@pytest.mark.parametrize("itself", [False, True], ids=["two", "self"])
def test_equal_and_different_ids_are_all_pairs(itself, backend):
    """Their log-sum-exps add up to that of all pairs, or of all but the diagonal; ids need not be given for that."""
    x, y = (z.to(device_of(backend), precise(backend)) for z in pair((65, 129, 24)).values())
    x_ids, y_ids = (torch.randint(9, (len(z),), device=x.device) for z in (x, y))
    rows, ids = ((x,), {"x_ids": x_ids}) if itself else ((x, y), {"x_ids": x_ids, "y_ids": y_ids})
    for exclude in (False, True):
        options = {"scale": SCALE, "exclude_diagonal": exclude, "backend": backend}
        parts = [ck.similarity_logsumexp(*rows, **ids, same=same, **options) for same in (False, True)]
        torch.testing.assert_close(torch.logaddexp(*parts), ck.similarity_logsumexp(*rows, **options))


@pytest.mark.parametrize("scale", [200.0, 0.1, -5.0, 0.0])
def test_logsumexp_scales(scale, backend, poison):
    """The scales of cold, warm and negative temperatures, and 0."""
    compare(logsumexp, {**pair((65, 129, 24)), "scale": torch.tensor(scale)}, backend, torch.float32, 200.0)


def test_logsumexp_of_large_and_very_negative_logits(backend, poison):
    """Raw rows have logits from -4000 to 4000, where no shift fixed in advance is safe."""
    x = 20 * torch.randn(65, 24, dtype=torch.float64)
    below = -x.abs()
    for y in (20 * torch.randn(129, 24, dtype=torch.float64), x.abs().mean(0) * torch.ones(129, 1)):
        compare(logsumexp, {"x": below, "y": y}, backend, torch.float32, 40.0)


def test_logsumexp_rows_without_pairs(backend, poison):
    """A row or column without pairs is -inf, and its gradients are exactly 0."""
    device = device_of(backend)
    x = torch.randn(5, 8, device=device, requires_grad=True)
    scale = torch.tensor(2.0, device=device, requires_grad=True)
    ids = torch.zeros(5, dtype=torch.int64, device=device)
    alone = {"x": x, "x_ids": torch.arange(5, device=device), "same": True, "exclude_diagonal": True}
    for arguments in ({"x": x, "x_ids": ids}, {"x": x, "y": x.detach()[:3], "cutoff": -1e4}, alone):
        rows = ck.similarity_logsumexp(scale=scale, backend=backend, **arguments)
        assert rows.tolist() == [-math.inf] * 5
        for gradient in torch.autograd.grad(rows.sum(), (x, scale)):
            assert torch.equal(gradient, torch.zeros_like(gradient))
    rows, columns = ck.similarity_logsumexp(x, x.detach()[:3], x_ids=ids, y_ids=ids[:3], columns=True, backend=backend)
    assert columns.tolist() == [-math.inf] * 3
