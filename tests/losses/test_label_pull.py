"""The pull to label embeddings: its two forms and labels without embedding; test_every_loss.py has the rest."""

import inspect

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
import python_ref
from tests.support.losses import assert_module_is_function, assert_refused
from tests.support.testing import Case, case_params, check, device_of
from tests.support.variants import EVERY

CASES = {name: EVERY[name] for name in ("label_pull-partial", "label_pull-softmax-partial")}
both_forms = pytest.mark.parametrize("form", ["pull", "softmax"])


def some_labels(n, m):
    labels = torch.randint(m, (n,))
    labels[torch.rand(n) < 0.25] = -1
    return labels


@pytest.mark.parametrize("case", case_params(CASES))
def test_no_label_at_all(case, backend, poison):
    def shapes(n, m, d):
        return {"z": (n, d), "label_embeddings": (m, d)}

    labels = torch.full((65,), -1)
    check(Case(case.loss, shapes, case.options), (65, 7, 24), torch.float32, backend, labels=labels)


def test_forms_are_half_the_squared_distance_and_cross_entropy(backend):
    z, w = torch.randn(33, 8, device=device_of(backend)), torch.randn(5, 8, device=device_of(backend))
    labels = some_labels(33, 5).to(z.device)
    unit_z, unit_w, known = F.normalize(z), F.normalize(w), labels >= 0
    distances = (unit_z[known] - unit_w[labels[known]]).square().sum(1)
    torch.testing.assert_close(ck.label_pull_loss(z, labels, w, backend=backend), distances.mean() / 2)
    expected = F.cross_entropy(unit_z @ unit_w.T / 0.2, labels, ignore_index=-1)
    torch.testing.assert_close(
        ck.label_pull_loss(z, labels, w, form="softmax", temperature=0.2, backend=backend), expected
    )


@both_forms
def test_labels_that_have_no_embedding_give_nan(form, backend):
    """No wrong number, and no index error from a kernel."""
    z, w = torch.randn(9, 8, device=device_of(backend)), torch.randn(5, 8, device=device_of(backend))
    for bad in (5, -2, 2**60, -(2**60)):
        labels = torch.arange(9, device=z.device) % 5
        labels[3] = bad
        each = ck.label_pull_loss(z, labels, w, form=form, reduction="none", backend=backend)
        assert each[3].isnan() and each.isfinite().sum() == 8
        assert ck.label_pull_loss(z, labels, w, form=form, backend=backend).isnan()


@both_forms
def test_nan_gives_nan(form, backend):
    """Also in a row without label."""
    labels = torch.tensor([-1, 0, 1], device=device_of(backend))
    for row in (0, 1):
        z, w = torch.randn(3, 8, device=labels.device), torch.randn(2, 8, device=labels.device)
        z[row, 2] = torch.nan
        assert ck.label_pull_loss(z, labels, w, form=form, backend=backend).isnan()


@pytest.mark.parametrize("options", [{}, {"form": "softmax", "temperature": 0.3}], ids=["pull", "softmax"])
def test_module_is_its_function(options, backend):
    z, w = torch.randn(12, 8, device=device_of(backend)), torch.randn(5, 8, device=device_of(backend))
    inputs = (z, some_labels(12, 5).to(z.device), w)
    assert_module_is_function(ck.LabelPullLoss, ck.label_pull_loss, inputs, options, backend)


def f(*shape):
    return torch.randn(*shape)


def ids(*shape):
    return torch.zeros(*shape, dtype=torch.int64)


BAD = {
    "dimensions": (
        lambda: ck.label_pull_loss(f(8, 4), ids(8), f(3, 5)),
        ValueError,
        "z (8, 4) and label_embeddings (3, 5) must have the same last dimension",
    ),
    "no embeddings": (lambda: ck.label_pull_loss(f(8, 4), ids(8), f(0, 4)), ValueError, "label_embeddings (0, 4) is"),
    "no rows": (lambda: ck.label_pull_loss(f(0, 4), ids(0), f(3, 4)), ValueError, "z (0, 4) is an empty batch"),
    "mixed": (
        lambda: ck.label_pull_loss(f(8, 4), ids(8), f(3, 4).double()),
        TypeError,
        "label_embeddings is torch.float",
    ),
    "float classes": (lambda: ck.label_pull_loss(f(8, 4), f(8), f(3, 4)), TypeError, "labels has dtype torch.float32"),
    "classes": (lambda: ck.label_pull_loss(f(8, 4), ids(7), f(3, 4)), ValueError, "labels (7,) must have shape (8,)"),
    "form": (lambda: ck.label_pull_loss(f(8, 4), ids(8), f(3, 4), form="push"), ValueError, "form 'push' is unknown"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    assert_refused(*BAD[name])


def test_reference_has_the_same_arguments():
    ours = {*inspect.signature(ck.label_pull_loss).parameters} - {"backend", "group"}
    assert {*inspect.signature(python_ref.label_pull_loss).parameters} == ours
