"""The CLIP loss of TorchMultimodal without the library."""

import copy
import pickle
import sys
from collections import OrderedDict

import pytest
import torch

import python_ref
from contrastive_kernels.compat import _peer, _small, torchmultimodal
from contrastive_kernels.compat.torchmultimodal import (
    BackpropType,
    ContrastiveLossOutput,
    ContrastiveLossWithTemperature,
    contrastive_loss_with_temperature,
)
from tests.support import adapters

ROWS = 2048
each_path = pytest.mark.parametrize("largest", [0, _small._largest], ids=["sweep", "formula"])


@each_path
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_reference(largest, smoothing):
    a, b = torch.randn(2, 9, 5, dtype=torch.float64)
    expected = python_ref.clip_loss(a, b, torch.tensor(0.5).double().exp(), label_smoothing=smoothing, reduction="none")
    with _small.largest(largest):
        output = contrastive_loss_with_temperature(
            a, b, torch.tensor(0.5).double(), cross_entropy_kwargs={"label_smoothing": smoothing}
        )
        loss = ContrastiveLossWithTemperature(0.5)(a, b, BackpropType.LOCAL, {"label_smoothing": smoothing})
    torch.testing.assert_close(torch.stack([output.loss_a, output.loss_b]), expected.mean(1))
    torch.testing.assert_close(output.loss, expected.mean())
    torch.testing.assert_close(loss, expected.mean())


def test_logits_are_computed_when_read():
    """The losses hold no matrix; logits that were read are kept."""
    a, b = torch.randn(2, ROWS, 4).requires_grad_().unbind()
    with adapters.NoMatrix(ROWS):
        output = contrastive_loss_with_temperature(a, b, torch.tensor(0.5))
        output.loss.backward()
    logits = output.logits_a
    assert logits.shape == (ROWS, ROWS) and output.logits_a is logits
    torch.testing.assert_close(output.logits_b, logits.T)


@each_path
def test_output(largest):
    """It has the peer's fields, by position too, and can be copied; it is an ordered dictionary without entries."""
    a, b = torch.randn(2, 5, 4)
    with _small.largest(largest):
        output = contrastive_loss_with_temperature(a, b, torch.tensor(0.5))
    for other in (copy.copy(output), copy.deepcopy(output), pickle.loads(pickle.dumps(output))):
        assert torch.equal(other.logits_b, output.logits_b) and other.loss == output.loss
    assert isinstance(output, OrderedDict) and not output
    with pytest.raises(AttributeError, match="logits_c"):
        _ = output.logits_c
    assert ContrastiveLossOutput(*torch.arange(5)).loss_b == 4


def test_warns_of_the_matrix(monkeypatch):
    """Once for each option that only the logits serve."""
    monkeypatch.setattr(_peer, "_warned", set())
    a, b = torch.randn(2, 5, 4)

    def call(**options):
        return contrastive_loss_with_temperature(a, b, torch.tensor(0.5), cross_entropy_kwargs=options)

    with pytest.warns(UserWarning, match="ignore_index.*matrix") as record:
        call(ignore_index=1)
    assert [warning.filename for warning in record] == [__file__]
    with pytest.warns(UserWarning, match="weight"):
        torch.compile(call, backend="eager", fullgraph=True)(weight=torch.ones(5))
    torch.testing.assert_close(call(ignore_index=-100).loss, call(weight=None, reduction="mean").loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    a, b = torch.nn.functional.normalize(torch.randn(2, 40, 8), dim=-1).to(dtype)
    for options in (None, {"weight": torch.ones(40)}):
        loss = ContrastiveLossWithTemperature()(a, b, cross_entropy_kwargs=options)
        assert loss.dtype == torch.float32
        exact = ContrastiveLossWithTemperature()(a.double(), b.double())
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5 if options is None else 2e-2, atol=0)


@pytest.mark.parametrize("inputs", [{}, {"mask": torch.arange(8) < 5}, {"cross_entropy_kwargs": {"reduction": "sum"}}])
def test_compiles(inputs):
    a, b = torch.randn(2, 8, 5)
    loss = ContrastiveLossWithTemperature()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(a, b, **inputs), loss(a, b, **inputs))


def test_copies():
    loss = ContrastiveLossWithTemperature(1.5, None, 3.0)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert other.logit_scale == 1.5 and other.logit_scale_max == 3.0
    assert pickle.loads(pickle.dumps(BackpropType.LOCAL)) is BackpropType.LOCAL


def test_other_names_need_the_library(monkeypatch):
    module = "torchmultimodal.modules.losses.contrastive_loss_with_temperature"
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="pip install torchmultimodal-nightly"):
        _ = torchmultimodal.gather_tensor
