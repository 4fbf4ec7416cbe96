"""The limits of scratch memory and of saved scores: where they come from; results do not depend on them."""

import pytest
import torch

import contrastive_kernels as ck
from contrastive_kernels.engine.backends import BACKENDS
from contrastive_kernels.engine.backends import torch as torch_backend
from contrastive_kernels.engine.spec import Inputs
from contrastive_kernels.primitives.sweep import _may_be_saved
from tests.support.testing import device_of, supports

WORKSPACE = (ck.set_workspace_limit, ck.workspace_limit, "CONTRASTIVE_KERNELS_WORKSPACE_MB", 512 << 20)
SAVED_SCORES = (ck.set_saved_scores_limit, ck.saved_scores_limit, "CONTRASTIVE_KERNELS_SAVED_SCORES_MB", None)
LIMITS = pytest.mark.parametrize(
    ("set_limit", "limit", "variable", "default"), [WORKSPACE, SAVED_SCORES], ids=["workspace", "saved_scores"]
)


@pytest.fixture(autouse=True)
def default_afterwards(monkeypatch):
    for set_limit, _, variable, _ in (WORKSPACE, SAVED_SCORES):
        monkeypatch.delenv(variable, raising=False)
        set_limit(None)
    yield
    for set_limit, *_ in (WORKSPACE, SAVED_SCORES):
        set_limit(None)


@LIMITS
def test_function_before_environment_before_default(set_limit, limit, variable, default, monkeypatch):
    assert limit() == default
    monkeypatch.setenv(variable, "64")
    assert limit() == 64 << 20
    set_limit(1000)
    assert limit() == 1000
    set_limit(None)
    assert limit() == 64 << 20


@LIMITS
@pytest.mark.parametrize(("size", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_bad_size(set_limit, limit, variable, default, size, error):
    with pytest.raises(error, match="size"):
        set_limit(size)


def test_zero():
    """A workspace of 0 bytes is an error; 0 bytes of saved scores are not."""
    with pytest.raises(ValueError, match="size"):
        ck.set_workspace_limit(0)
    ck.set_saved_scores_limit(0)
    assert ck.saved_scores_limit() == 0


@LIMITS
@pytest.mark.parametrize("text", ["-3", "much", "nan", "inf"])
def test_bad_environment(set_limit, limit, variable, default, text, monkeypatch):
    monkeypatch.setenv(variable, text)
    with pytest.raises(ValueError, match=variable):
        limit()


def test_a_tiny_limit_takes_a_row_at_a_time():
    ck.set_workspace_limit(1)
    assert torch_backend._chunks(3, 100, torch.float32) == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_results_do_not_depend_on_the_workspace(backend):
    x, y = torch.randn(2, 70, 24, device=device_of(backend)).unbind(0)
    results = []
    for size in (None, 1):
        ck.set_workspace_limit(size)
        leaf = x.clone().requires_grad_()
        loss = ck.clip_loss(leaf, y, 5.0, normalize=True, backend=backend)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_the_limit_bounds_the_chunks_of_plain_pytorch():
    """Half the limit gives half the rows at a time."""
    ck.set_workspace_limit(torch_backend.ELEMENT_BYTES * 1000)
    assert torch_backend._chunks(100, 100, torch.float32)[0] == slice(0, 10)
    ck.set_workspace_limit(torch_backend.ELEMENT_BYTES * 500)
    assert torch_backend._chunks(100, 100, torch.float32)[0] == slice(0, 5)


def test_rounded_scores_are_not_saved_with_a_cutoff():
    """The forward would drop a pair at the cutoff that the backward keeps."""
    ck.set_saved_scores_limit(1 << 20)
    for dtype, saved in ((torch.float16, False), (torch.float32, True)):
        inputs = Inputs(torch.zeros(4, 300, dtype=dtype), None, torch.ones(()), *[None] * 6)
        assert _may_be_saved(inputs, BACKENDS["triton"])
        assert _may_be_saved(inputs._replace(cutoff=torch.zeros(4)), BACKENDS["triton"]) == saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", ["clip", "info_nce", "nt_xent"])
def test_gradients_do_not_depend_on_saved_scores(loss, dtype, backend):
    """Half precision saves them rounded to 2^-16."""
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    x, y = torch.randn(2, 70, 300, device=device_of(backend)).to(dtype).unbind(0)
    gradients = []
    for size in (0, 1 << 20):
        ck.set_saved_scores_limit(size)
        leaves = [v.clone().requires_grad_() for v in (x, y)]
        options = dict(normalize=True) if loss == "clip" else {}
        getattr(ck, f"{loss}_loss")(*leaves, temperature=0.05, backend=backend, **options).backward()
        gradients.append([leaf.grad.float() for leaf in leaves])
    for a, b in zip(*gradients, strict=True):
        tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(a.abs().max()))
