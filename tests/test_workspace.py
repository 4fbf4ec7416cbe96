"""The limit of scratch memory: where it comes from, and that results do not depend on it."""

import pytest
import torch
from testing import device_of

import contrastive_kernels as ck
from contrastive_kernels import workspace
from contrastive_kernels.backends import torch as torch_backend


@pytest.fixture(autouse=True)
def default_afterwards(monkeypatch):
    monkeypatch.delenv(workspace.ENVIRONMENT_VARIABLE, raising=False)
    yield
    ck.set_workspace_limit(None)


def test_the_function_wins_over_the_environment_over_the_default(monkeypatch):
    assert ck.workspace_limit() == 512 << 20
    monkeypatch.setenv(workspace.ENVIRONMENT_VARIABLE, "64")
    assert ck.workspace_limit() == 64 << 20
    ck.set_workspace_limit(1000)
    assert ck.workspace_limit() == 1000
    ck.set_workspace_limit(None)
    assert ck.workspace_limit() == 64 << 20


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_size_that_is_none(size, error):
    with pytest.raises(error, match="size"):
        ck.set_workspace_limit(size)


@pytest.mark.parametrize("text", ["0", "-3", "much", "nan", "inf"])
def test_an_environment_that_is_no_number(text, monkeypatch):
    monkeypatch.setenv(workspace.ENVIRONMENT_VARIABLE, text)
    with pytest.raises(ValueError, match=workspace.ENVIRONMENT_VARIABLE):
        ck.workspace_limit()


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
