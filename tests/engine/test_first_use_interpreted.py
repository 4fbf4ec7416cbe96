"""The first use of the real Triton kernels, in the interpreter."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

import contrastive_kernels as ck
from benchmarks import smoke
from contrastive_kernels.engine.backends import triton as backend
from contrastive_kernels.engine.backends.triton import comparison, first_use, tiles
from tests.support import kernels
from tests.support.first_use import arguments_of, warned
from tests.support.testing import ROOT

pytestmark = pytest.mark.usefixtures("unseen_device")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def interpreted(test):
    """Mark a test that runs the kernels in the interpreter."""
    test = pytest.mark.skipif(not kernels.INTERPRETING, reason="no TRITON_INTERPRET=1")(test)
    # numpy warns of one-element arrays in the interpreter
    return pytest.mark.interpret(pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")(test))


@needs_triton
@pytest.mark.skipif(kernels.INTERPRETING, reason="is interpreting already")
def test_in_the_interpreter():
    """The tests below pass in a process in which the kernels are imported with TRITON_INTERPRET=1."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "interpret", __file__]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


class Counted:
    """A function and how often it was called."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.function(*arguments)


# Terms with a kink or a pole, whole views and all options at once; the smoke test has the other kinds of sweep.
@pytest.mark.parametrize(
    ("name", "dtype", "d"),
    [
        ("columns-ids-cutoff", torch.float16, 300), ("self-exponents-band", torch.float16, 300),
        ("self-same", torch.float32, 24), ("self-views-cutoff", torch.float16, 64), ("everything", torch.float32, 24),
        ("distance_hinge", torch.float32, 3), ("student", torch.float16, 64), ("hinge-alone", torch.float32, 24),
        ("gaussian-alone", torch.float16, 300), ("places-same-columns", torch.float32, 24),
    ],
)  # fmt: skip
@interpreted
def test_the_kernels_are_right(name, dtype, d):
    """No false alarm."""
    for operator in ("forward", "backward"):
        arguments, options = arguments_of(operator, 33, 47, d, dtype, name)
        run = backend.operators[operator].__wrapped__
        assert comparison.objection(operator, run, arguments, options) == ""


@interpreted
def test_the_smoke_test_runs_every_kernel_of_the_table(capsys):
    """And finds all of them right."""
    with tiles.noted() as rows:
        for call in smoke.CALLS:
            assert smoke.main(["--call", call, "--dtype", "float16", "--device", "cpu"]) == 0
    assert {row.kernel for row in rows} == {row.kernel for row in tiles.TABLE}
    assert capsys.readouterr().out.count("right") == len(smoke.CALLS)


def loss(features, name="triton"):
    z0, z1 = (z.detach().clone().requires_grad_() for z in features)
    loss = ck.nt_xent_loss(z0, z1, backend=name)
    loss.backward()
    return loss.detach(), z0.grad, z1.grad


@pytest.fixture
def wrong_forward(monkeypatch):
    from contrastive_kernels.engine.backends.triton import forward as module

    right = module.forward
    monkeypatch.setattr(module, "forward", lambda *a: (1.1 * right(*a)[0], *right(*a)[1:]))


@pytest.fixture
def wrong_backward(monkeypatch):
    from contrastive_kernels.engine.backends.triton import backward as module
    from contrastive_kernels.engine.backends.triton import chunks

    for one in (module, chunks):
        right = one.backward
        change = lambda *a, right=right: {key: 1.1 * value for key, value in right(*a).items()}  # noqa: E731
        monkeypatch.setattr(one, "backward", change)


@pytest.mark.parametrize("what", ["forward", "backward"])
@pytest.mark.parametrize("d", [24, 300])
@interpreted
def test_a_loss_on_a_wrong_kernel(what, d, request):
    """Value and gradients are right, at the first call and later, with one warning."""
    request.getfixturevalue(f"wrong_{what}")
    dtype = torch.float32 if d == 24 else torch.float16
    features = torch.randn(2, 21, d).to(dtype)
    expected = loss(features, "torch")
    results, caught = warned(lambda: [loss(features) for _ in range(2)])
    for result in results:
        for found, exact in zip(result, expected, strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-5 if d == 24 else 2e-3, atol=1e-6)
    assert len(caught) == 1
    assert re.search(rf"kernel of {what} \(.*x32 for interpreter", caught[0])


@interpreted
def test_switched_off(wrong_forward, monkeypatch):
    """So that the tests above say something."""
    monkeypatch.setenv(first_use.ENVIRONMENT_VARIABLE, "0")
    features = torch.randn(2, 21, 24)
    assert abs(loss(features)[0] - loss(features, "torch")[0]) > 0.01


@interpreted
def test_compiled(wrong_forward, monkeypatch):
    """Nothing is compared while a program is traced; its first run does."""
    monkeypatch.setattr(first_use, "objection", compare := Counted(first_use.objection))
    z0, z1 = torch.randn(2, 21, 24)
    traced = []

    def compiler(graph, inputs):
        traced.append(compare.calls)
        return graph.forward

    loss = torch.compile(ck.nt_xent_loss, backend=compiler, fullgraph=True)
    with pytest.warns(RuntimeWarning, match="kernel of forward") as record:
        found = loss(z0, z1, backend="triton")
    torch.testing.assert_close(found, ck.nt_xent_loss(z0, z1, backend="torch"))
    assert traced == [0] and compare.calls > 0
    assert [w.filename for w in record if "kernel of forward" in str(w.message)] == [__file__]


@interpreted
def test_transforms(wrong_forward):
    """A gradient by torch.func comes from PyTorch too."""
    z0, z1 = torch.randn(2, 21, 24)
    for transform in (torch.func.grad, lambda loss: lambda z: torch.func.vmap(loss)(torch.stack([z, z1]))):
        found, expected = (
            transform(lambda z, name=name: ck.nt_xent_loss(z, z1, backend=name))(z0) for name in ("triton", "torch")
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
