"""The adapters that patch, without open_clip and transformers."""

import importlib
import subprocess
import sys

import pytest
import torch

import python_ref
from contrastive_kernels import compat
from contrastive_kernels.compat import _distill, _small, _towers

PEERS = {"open_clip": "open-clip-torch", "transformers": "transformers"}


@pytest.fixture
def absent(monkeypatch):
    """Return a function that takes a library away."""

    def remove(name):
        for module in list(sys.modules):
            if module == f"contrastive_kernels.compat.{name}" or module.partition(".")[0] == name:
                monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)

    return remove


@pytest.mark.parametrize(("name", "distribution"), PEERS.items())
def test_says_what_to_install(name, distribution, absent):
    absent(name)
    with pytest.raises(ImportError, match=f"pip install {distribution}"):
        importlib.import_module(f"contrastive_kernels.compat.{name}")
    with pytest.raises(ImportError, match=f"pip install {distribution}"):
        getattr(compat, f"patch_{name}")()
    assert f"contrastive_kernels.compat.{name}" not in sys.modules


def test_the_package_imports_no_library():
    code = (
        "import sys, contrastive_kernels; compat = contrastive_kernels.compat; compat.patch_transformers; "
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {*compat.ADAPTERS, 'torchvision'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.fixture(params=[0, _small._largest], ids=["sweep", "formula"])
def largest(request):
    with _small.largest(request.param):
        yield


@pytest.fixture
def towers():
    x, y = (torch.randn(9, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return x, y, torch.tensor([3.0], dtype=torch.float64, requires_grad=True)


def same(found, expected, *leaves):
    """Assert that values and gradients agree."""
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("negative_only", [False, True])
def test_siglip_is_the_reference(towers, negative_only, largest):
    bias = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    x, y, scale = towers
    options = dict(negative_only=negative_only)
    same(_towers.siglip(*towers, bias, **options), python_ref.siglip_loss(x, y, scale[0], bias, **options), *towers)


def test_clip_is_the_reference(towers, largest):
    x, y, scale = towers
    same(_towers.clip(*towers), python_ref.clip_loss(x, y, scale[0]), *towers)


def test_bias_of_clip_has_no_gradient(towers, largest):
    bias = torch.tensor([5.0], dtype=torch.float64, requires_grad=True)
    loss = _towers.clip(*towers, bias)
    torch.testing.assert_close(loss, _towers.clip(*towers))
    assert torch.autograd.grad(loss, bias)[0].tolist() == [0.0]


@pytest.mark.parametrize("bias", [float("nan"), torch.tensor(float("nan"))])
def test_bias_of_clip_that_is_not_a_number(towers, bias, largest):
    assert _towers.clip(*towers, bias).isnan()


def test_own_rows_of_all_are_the_whole(towers, largest):
    """The mean over the ranks of the loss of each rank's rows is that of all rows."""
    x, y, scale = towers
    bias = torch.tensor(1.0, dtype=torch.float64)
    parts = [_towers.clip_own_rows(x[i : i + 3], y[i : i + 3], x, y, i, scale, bias) for i in (0, 3, 6)]
    same(torch.stack(parts).mean(), python_ref.clip_loss(x, y, scale[0]), *towers)


@pytest.mark.parametrize("learns", [False, True], ids=["constant teacher", "teacher with gradient"])
@pytest.mark.parametrize("chunk", [1, 36, 1000], ids=lambda numbers: f"chunks of {numbers}")
def test_distillation_is_the_dense_formula(towers, learns, chunk, largest, monkeypatch):
    monkeypatch.setattr(_distill, "_chunk", lambda x: chunk)
    x, y, scale = towers
    teacher = [torch.randn(9, 4, dtype=torch.float64, requires_grad=learns) for _ in range(2)]
    teacher_scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=learns)
    contrastive, distilled = _distill.distilled_clip(*towers, *teacher, teacher_scale)
    logits, targets = scale * x @ y.T, teacher_scale * teacher[0] @ teacher[1].T
    expected = -sum((targets.softmax(i) * logits.log_softmax(i)).sum() for i in (0, 1)) / 18
    leaves = [*towers, *teacher, teacher_scale] if learns else towers
    torch.testing.assert_close(distilled, expected)
    same(2 * distilled + contrastive, 2 * expected + python_ref.clip_loss(x, y, scale[0]), *leaves)


def test_a_teacher_of_half_precision_is_widened(largest):
    x, y = torch.randn(2, 9, 6).unbind()
    teacher = torch.randn(2, 9, 4, dtype=torch.bfloat16).unbind()
    _, found = _distill.distilled_clip(x, y, 3.0, *teacher, 2.0)
    _, expected = _distill.distilled_clip(x.double(), y.double(), 3.0, *(t.double() for t in teacher), 2.0)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.ones(3, 2), torch.ones(2, 2)),
        (torch.ones(3, 2), torch.ones(3, 3)),
        (torch.ones(0, 2), torch.ones(0, 2)),
        (torch.ones(3), torch.ones(3)),
        (torch.ones(3, 2), torch.ones(3, 2).double()),
        (torch.ones(3, 2).long(), torch.ones(3, 2).long()),
    ],
)
def test_what_does_not_fit(x, y):
    assert not _towers.fit(x, y)
    assert _towers.fit(torch.ones(3, 2), torch.ones(3, 2))
