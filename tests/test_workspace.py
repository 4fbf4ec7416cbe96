"""The limits of scratch memory and of saved scores: where they come from, and that results do not depend on them."""

import pytest
import torch
from testing import device_of, supports

import contrastive_kernels as ck
from contrastive_kernels import similarity
from contrastive_kernels.backends import torch as torch_backend
from contrastive_kernels.sweep import Pairs

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
def test_the_function_wins_over_the_environment_over_the_default(set_limit, limit, variable, default, monkeypatch):
    assert limit() == default
    monkeypatch.setenv(variable, "64")
    assert limit() == 64 << 20
    set_limit(1000)
    assert limit() == 1000
    set_limit(None)
    assert limit() == 64 << 20


@LIMITS
@pytest.mark.parametrize(("size", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_size_that_is_none(set_limit, limit, variable, default, size, error):
    with pytest.raises(error, match="size"):
        set_limit(size)


def test_nothing():
    """No workspace is no size; no saved scores are."""
    with pytest.raises(ValueError, match="size"):
        ck.set_workspace_limit(0)
    ck.set_saved_scores_limit(0)
    assert ck.saved_scores_limit() == 0


@LIMITS
@pytest.mark.parametrize("text", ["-3", "much", "nan", "inf"])
def test_an_environment_that_is_no_number(set_limit, limit, variable, default, text, monkeypatch):
    monkeypatch.setenv(variable, text)
    with pytest.raises(ValueError, match=variable):
        limit()


def test_a_limit_of_nothing_takes_a_row_at_a_time():
    ck.set_workspace_limit(1)
    assert torch_backend._chunks(3, 100) == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_results_do_not_depend_on_it(backend):
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
    """Half of the limit, half of the rows at a time."""
    ck.set_workspace_limit(torch_backend.ELEMENT_BYTES * 1000)
    assert torch_backend._chunks(100, 100)[0] == slice(0, 10)
    ck.set_workspace_limit(torch_backend.ELEMENT_BYTES * 500)
    assert torch_backend._chunks(100, 100)[0] == slice(0, 5)


def test_rounded_scores_are_not_saved_with_a_cutoff():
    """A pair at the cutoff would be dropped by the forward and not by the backward."""
    ck.set_saved_scores_limit(1 << 20)
    cutoff = Pairs(cutoff=torch.zeros(4))
    for dtype, saved in ((torch.float16, False), (torch.float32, True)):
        x = torch.zeros(4, 300, dtype=dtype)
        assert similarity._may_be_saved(x, None, Pairs(), "triton")
        assert similarity._may_be_saved(x, None, cutoff, "triton") == saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", ["clip", "info_nce", "nt_xent"])
def test_gradients_do_not_depend_on_saved_scores(loss, dtype, backend):
    """Up to the 2^-16 that half precision saves them with."""
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
