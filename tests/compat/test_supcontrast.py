"""SupConLoss beside the formula of the paper with the conventions of SupContrast, which no index has."""

import copy
import inspect
import pickle
import types

import numpy as np
import pytest
import torch
from torch import nn

import python_ref
from contrastive_kernels.compat import _small, supcontrast
from contrastive_kernels.compat.check.case import TOLERANCE, Draw, difference, outcome
from contrastive_kernels.compat.check.supcontrast import CASES
from contrastive_kernels.compat.supcontrast import SupConLoss
from tests.support import adapters

ROWS = 2048


class Dense(nn.Module):
    """The mean over the anchors of the weighted mean of ``log sum_{k != a} exp(u_ak) - u_aj`` over the rows j != a."""

    def __init__(self, temperature=0.07, contrast_mode="all", base_temperature=0.07):
        super().__init__()
        self.temperature, self.contrast_mode, self.base_temperature = temperature, contrast_mode, base_temperature

    def forward(self, features, labels=None, mask=None):
        """Return the loss from all logits."""
        features = features.flatten(2)
        n, views, _ = features.shape
        rows = features.transpose(0, 1).reshape(n * views, -1)
        anchors = torch.arange(n if self.contrast_mode == "one" else n * views)
        if mask is not None:
            of_samples = mask.float().double()
        else:
            labels = torch.arange(n) if labels is None else labels.reshape(-1)
            of_samples = (labels[:, None] == labels).double()
        others = anchors[:, None] != torch.arange(n * views)
        weights = of_samples.repeat(views, views)[anchors] * others
        logits = rows[anchors] @ rows.T / self.temperature
        lse = logits.masked_fill(~others, -torch.inf).logsumexp(1)
        total = weights.sum(1)
        losses = (weights * (lse[:, None] - logits)).sum(1) / total.where(total >= 1e-6, torch.ones_like(total))
        return self.temperature / self.base_temperature * losses.mean()


DENSE = types.SimpleNamespace(SupConLoss=Dense)
each_path = pytest.mark.parametrize("largest", [0, _small._largest], ids=["sweep", "formula"])


@each_path
@pytest.mark.parametrize("n", [1, 7, 130])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees(case, n, largest):
    with _small.largest(largest):
        found = outcome(case, supcontrast, Draw(n))
    assert difference(found, outcome(case, DENSE, Draw(n))) <= TOLERANCE


def test_signature():
    assert [(p.name, p.default) for p in inspect.signature(SupConLoss).parameters.values()] == [
        ("temperature", 0.07),
        ("contrast_mode", "all"),
        ("base_temperature", 0.07),
    ]
    assert list(inspect.signature(SupConLoss.forward).parameters) == ["self", "features", "labels", "mask"]


@each_path
def test_reference(largest):
    features, labels = torch.randn(9, 2, 5, dtype=torch.float64), torch.randint(3, (9,))
    expected = python_ref.sup_con_loss(features, labels, temperature=0.2, base_temperature=0.07, normalize=False)
    with _small.largest(largest):
        torch.testing.assert_close(SupConLoss(0.2)(features, labels), expected)


@each_path
@pytest.mark.filterwarnings("error")  # of strided labels
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.float64])
def test_labels_of_any_dtype_and_shape(dtype, largest):
    """Every value is a class, and any shape with an entry per sample will do."""
    features, labels = torch.randn(12, 2, 5, dtype=torch.float64), torch.randint(2, (12,))
    with _small.largest(largest):
        loss = SupConLoss(0.5)
        expected = loss(features, labels)
        torch.testing.assert_close(loss(features, labels.to(dtype).view(3, 4)), expected)
        torch.testing.assert_close(loss(features, (labels - 1).view(-1, 1)), expected)
        torch.testing.assert_close(loss(features, labels.repeat_interleave(2)[::2]), expected)


@each_path
@pytest.mark.parametrize("n", [1, 6])
def test_without_positives(n, largest):
    """An anchor without positives contributes 0, also the only row that there is."""
    features = torch.randn(n, 1, 5, dtype=torch.float64, requires_grad=True)
    for inputs in ({}, {"labels": torch.arange(n)}, {"mask": torch.zeros(n, n)}, {"mask": torch.eye(n)}):
        with _small.largest(largest):
            loss = SupConLoss()(features, **inputs)
        (grad,) = torch.autograd.grad(loss, features)
        assert loss == 0 and not grad.any(), inputs


@each_path
def test_weights_with_gradient(largest):
    """A mask may be learnt: it weighs the positives."""
    features, mask = torch.randn(6, 2, 5, dtype=torch.float64), torch.rand(6, 6, dtype=torch.float64)
    grads = []
    for module in (SupConLoss, Dense):
        leaf = mask.clone().requires_grad_()
        with _small.largest(largest):
            grads += torch.autograd.grad(module(0.5)(features, mask=leaf), leaf)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)  # the weights are float32


@each_path
@pytest.mark.parametrize("n", [1, 2])
def test_weights_with_gradient_of_few_rows(n, largest):
    """A large factor T / T_0 leaves it finite."""
    features, mask = torch.randn(n, 2, 5, dtype=torch.float64), torch.rand(n, n, dtype=torch.float64)
    grads = []
    for module in (SupConLoss, Dense):
        leaf = mask.clone().requires_grad_()
        with _small.largest(largest):
            grads += torch.autograd.grad(module(10.0, base_temperature=0.01)(features, mask=leaf), leaf)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@each_path
def test_beside_another_default_device(largest):
    """What the loss makes is where the rows are."""
    features = torch.randn(6, 2, 5)
    with _small.largest(largest), torch.device("meta"):
        found = SupConLoss()(features)
    torch.testing.assert_close(found, SupConLoss()(features))


@each_path
@pytest.mark.parametrize("temperature", [torch.tensor(0.3), np.float32(0.3)], ids=type)
def test_temperature_of_float32(temperature, largest):
    """It is taken as it is beside rows of float64, its inverse too."""
    features, mask = torch.randn(6, 2, 5, dtype=torch.float64), torch.ones(6, 6)
    for inputs in ({}, {"mask": mask}):
        with _small.largest(largest):
            found = SupConLoss(temperature, base_temperature=1.0)(features, **inputs)
        torch.testing.assert_close(found, Dense(float(temperature), base_temperature=1.0)(features, **inputs))


def test_attributes():
    """They are read at every call; a temperature may become a parameter."""
    features, labels = torch.randn(6, 2, 5), torch.randint(3, (6,))
    loss = SupConLoss()
    loss.temperature, loss.contrast_mode, loss.base_temperature = 0.5, "one", 0.1
    torch.testing.assert_close(loss(features, labels), Dense(0.5, "one", 0.1)(features, labels).float())
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert other(features, labels) == loss(features, labels)
        assert not other.state_dict()
    loss.temperature = nn.Parameter(torch.tensor([0.5]))
    loss(features, labels).backward()
    assert loss.temperature.grad.shape == (1,)
    del loss.temperature
    loss.temperature = torch.tensor(0.5, dtype=torch.float64)
    assert loss(features, labels).dtype == torch.float32


@pytest.mark.parametrize(
    ("inputs", "error"),
    [
        ({"features": torch.randn(4, 5)}, ValueError),
        ({"features": torch.randn(0, 2, 5)}, ValueError),
        ({"labels": torch.arange(3)}, ValueError),
        ({"labels": torch.arange(4), "mask": torch.eye(4)}, ValueError),
        ({"mask": torch.eye(3)}, RuntimeError),
        ({"contrast_mode": "two"}, ValueError),
    ],
)
def test_errors(inputs, error):
    """They come at the call."""
    loss = SupConLoss(contrast_mode=inputs.pop("contrast_mode", "all"))
    with pytest.raises(error):
        loss(**{"features": torch.randn(4, 2, 5), **inputs})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("inputs", [{}, {"labels": torch.arange(300) % 9}, {"mask": torch.ones(300, 300)}])
def test_half_precision(dtype, inputs):
    """Logits of 100 and more overflow nothing; the loss is float32."""
    features = torch.randn(300, 2, 16).to(dtype)
    loss = SupConLoss(0.07)(features, **inputs)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), Dense(0.07)(features.double(), **inputs), rtol=2e-5, atol=0)


def test_autocast():
    """The sum of weighted rows is not rounded to the dtype of autocast."""
    features, mask = torch.randn(64, 2, 16), torch.rand(64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = SupConLoss(0.5)(features, mask=mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, SupConLoss(0.5)(features, mask=mask), rtol=5e-3, atol=0)


@pytest.mark.parametrize("inputs", [{}, {"labels": torch.arange(8) % 3}, {"mask": torch.eye(8)}])
def test_compiles(inputs):
    features, loss = torch.randn(8, 2, 5), SupConLoss(0.5)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(features, **inputs), loss(features, **inputs))


@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("kind", ["unlabelled", "labels", "mask"])
def test_no_matrix(kind, mode):
    """Nothing as large as the logits, nor larger than the mask that is given."""
    features, n = torch.randn(ROWS // 2, 2, 8, requires_grad=True), ROWS // 2
    inputs = {"unlabelled": {}, "labels": {"labels": torch.arange(n) % 9}, "mask": {"mask": torch.ones(n, n)}}[kind]
    with adapters.NoMatrix(n + 1):
        SupConLoss(contrast_mode=mode)(features, **inputs).backward()
