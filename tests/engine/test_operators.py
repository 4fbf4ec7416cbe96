"""The sweep, the view minimum and the selection of every backend: schemas, fake versions and dynamic shapes."""

import pytest
import torch

from contrastive_kernels.engine import spec
from contrastive_kernels.engine.backends import BACKENDS
from contrastive_kernels.engine.operators import operator
from tests.support.testing import device_of, supports

KINDS = ("plain", "transposed", "empty", "no columns", "one", "options", "self", "term")


def sweep_arguments(kind, dtype, device):
    """Return the inputs and the description of a sweep, and whether its maxima are wanted."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    n, m, d = {"empty": (0, 3, 4), "no columns": (3, 0, 4), "one": (1, 1, 1)}.get(kind, (17, 9, 24))
    x, y = torch.randn(n, d, dtype=dtype, device=device), torch.randn(m, d, dtype=dtype, device=device)
    if kind == "transposed":
        x, y = x.T.contiguous().T, y.T.contiguous().T

    def vector(size):
        return torch.randn(size, dtype=wide, device=device)

    scale = torch.tensor(2.0, dtype=wide, device=device)
    plain = spec.Inputs(x, y, scale, *[None] * 6)
    ids = {"x_ids": torch.arange(n, device=device) % 5, "y_ids": torch.arange(m, device=device)}
    options = plain._replace(bias=vector(m), cutoff=vector(n), term_scale=scale, term_offset=vector(n), **ids)
    itself = plain._replace(y=None, x_ids=ids["x_ids"])
    return {
        "options": (options, spec.Description([1.0], False, "softplus", [], False, 0), True),
        "self": (itself, spec.Description([1.0, 2.0], False, "band", [0.1, 0.5], False, 1), False),
        "term": (options, spec.Description([], False, "softplus", [], False, 0), False),
    }.get(kind, (plain, spec.Description([1.0], True, "", [], False, 0), True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sweep(kind, dtype, backend):
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    forward, backward = operator(backend, "forward"), operator(backend, "backward")
    inputs, what, maximum = sweep_arguments(kind, dtype, device_of(backend))
    torch.library.opcheck(forward, (*inputs, *what, maximum))
    statistics = forward(*inputs, *what, maximum)
    wanted = [getattr(inputs, name) is not None for name in spec.DERIVATIVES]
    grads = [torch.randn_like(s, dtype=inputs.scale.dtype) for s in statistics[:3]]
    torch.library.opcheck(backward, (*grads, *statistics[:2], *inputs, *what, [*wanted, not what.exponents]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "options", "self", "empty"])
def test_float32_gradients(kind, dtype, backend):
    """They are what is otherwise rounded to half precision; nothing else changes."""
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    backward = operator(backend, "backward")
    inputs, what, _ = sweep_arguments(kind, dtype, device_of(backend))
    statistics = operator(backend, "forward")(*inputs, *what, False)
    wanted = [getattr(inputs, name) is not None for name in spec.DERIVATIVES] + [False]
    grads = [torch.randn_like(s, dtype=inputs.scale.dtype) for s in statistics[:3]]
    arguments = (*grads, *statistics[:2], *inputs, *what, wanted, None)
    torch.library.opcheck(backward, (*arguments, True), test_utils=("test_schema", "test_faketensor"))
    narrow, wide = spec.Gradients(*backward(*arguments)), spec.Gradients(*backward(*arguments, True))
    assert (narrow.x.dtype, wide.x.dtype, wide.y.dtype) == (dtype, torch.float32, torch.float32)
    for before, after in zip(narrow, wide, strict=True):
        assert torch.equal(before, after.to(before.dtype))
    if dtype != torch.float32 and wide.x.numel():
        assert not torch.equal(wide.x, narrow.x.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "transposed", "empty", "no columns", "ids", "self"])
def test_softmax_total(kind, dtype, backend):
    if "softmax_total" not in BACKENDS[backend].operators:
        pytest.skip(f"{backend} has no softmax_total")
    inputs, *_ = sweep_arguments("options" if kind == "ids" else kind, dtype, device_of(backend))
    inputs = inputs._replace(bias=None, term_scale=None, term_offset=None)
    weight, own = torch.randn(2, inputs.x.shape[0], dtype=inputs.scale.dtype, device=inputs.x.device).unbind(0)
    what = spec.Description([1.0], False, "", [], False, 0)
    for wanted in ([True, inputs.y is not None, True], [False, False, False]):
        arguments = (weight, own, *inputs, *what, wanted)
        torch.library.opcheck(operator(backend, "softmax_total"), arguments)


def test_sweep_with_saved_scores(backend):
    forward, backward = operator(backend, "forward"), operator(backend, "backward")
    inputs, what, maximum = sweep_arguments("plain", torch.float32, device_of(backend))
    torch.library.opcheck(forward, (*inputs, *what, maximum, True))
    *statistics, scores = forward(*inputs, *what, maximum, True)
    assert scores.numel() == (17 * 9 if BACKENDS[backend].score_dtype(inputs.x, inputs.y) else 0)
    grads = [torch.randn_like(s, dtype=inputs.scale.dtype) for s in statistics[:3]]
    wanted = [True, True, True, False, False, False, False]
    saved = scores if scores.numel() else None
    torch.library.opcheck(backward, (*grads, *statistics[:2], *inputs, *what, wanted, saved))


def test_views(backend):
    for shape in ((5, 3, 8), (0, 2, 4), (1, 2, 1)):
        torch.library.opcheck(operator(backend, "views"), (torch.randn(shape, device=device_of(backend)),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_select(dtype, backend):
    if "select" not in BACKENDS[backend].operators or not supports(backend, dtype):
        pytest.skip(f"{backend} does not select, or not from {dtype}")
    x, y = (torch.randn(n, 8).to(device_of(backend), dtype) for n in (17, 9))
    x_ids, y_ids = (torch.arange(n, device=x.device) % 5 for n in (17, 9))
    for arguments in ((x, y, 3, True, x_ids, y_ids, True), (x, None, 20, False, None, None, False)):
        torch.library.opcheck(operator(backend, "select"), arguments)
