"""The benchmarked losses: their eager forms, the check before the timing, and the providers."""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

import contrastive_kernels as ck
from benchmarks import cases, eager, run
from tests.support.benchmarks import CPU
from tests.support.testing import ROOT

pytestmark = pytest.mark.usefixtures("short_queue")


def test_every_loss_is_measured():
    """The keys are the names of the losses; ours and the eager form are the functions of that name."""
    functions = {name.removesuffix("_loss"): getattr(ck, name) for name in ck.__all__ if name.endswith("_loss")}
    functions |= {"distance_polarization": ck.distance_polarization, "lmcl": ck.nt_xent_loss}
    assert set(cases.LOSSES) == set(functions)
    for name, loss in cases.LOSSES.items():
        ours = loss.ours
        while isinstance(ours, partial):
            ours = ours.func
        assert ours is functions[name]
        assert loss.eager is getattr(eager, name)


def test_lmcl_is_its_module():
    case = cases.Case("lmcl", 64, 8, torch.float64)
    band = {name: getattr(cases.BAND, name) for name in ("lower", "upper", "weight")}
    module = ck.LMCLLoss("nt_xent", temperature=cases.TEMPERATURE, **band)
    inputs = case.inputs(CPU)
    assert module(*inputs.values()).item() == cases.LOSSES["lmcl"].ours(**inputs).item()


@pytest.mark.parametrize("loss", cases.LOSSES)
def test_ours_is_the_eager_form(loss):
    cases.check("ours", cases.Case(loss, 192, 64, torch.float64), CPU)


MMCL_FORMS = {
    "eager": "from benchmarks.eager import mmcl as loss",
    "reference": "from python_ref import mmcl_loss as loss",
    "check": "from contrastive_kernels.check.dense import mmcl\n"
    "loss = lambda x, z: mmcl(x, z, sigma=torch.tensor(50.0), C=100.0, reg=0.1)",
}


@pytest.mark.parametrize("form", MMCL_FORMS)
def test_dense_mmcl_ends_on_several_threads(form):
    """A batched LU factorisation of this size does not, in torch 2.13."""
    code = f"""
import torch
torch.set_num_threads(2)
{MMCL_FORMS[form]}
rows = torch.nn.functional.normalize(torch.randn(2, 192, 64, dtype=torch.float64), dim=-1)
assert loss(*rows).isfinite().all()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize("loss", cases.LOSSES)
def test_check_notices(loss, monkeypatch):
    """The check rejects a value off by a percent with right gradients, and wrong gradients with the right value."""
    right = cases.LOSSES[loss]
    case = cases.Case(loss, 256, 64, torch.float32)

    def wrong_value(**inputs):
        value = right.ours(**inputs)
        return value + 0.01 * value.detach().abs()

    def wrong_gradient(**inputs):
        value = right.ours(**inputs)
        return 1.01 * value - 0.01 * value.detach()

    for wrong, what in ((wrong_value, "value"), (wrong_gradient, "gradient")):
        monkeypatch.setitem(cases.LOSSES, loss, replace(right, ours=wrong))
        cases.objections.cache_clear()
        with pytest.raises(cases.Unavailable, match=f"differs from float64: {what}"):
            cases.check("ours", case, CPU)


def test_dense_forms_are_bounded():
    """An eager form whose estimate exceeds the limit is left out; that of MMCL counts N matrices."""
    settings = run.Settings(CPU, 0.0, 1, memory_limit_gib=0.01)
    for loss, n in (("clip", 2048), ("mmcl", 128)):
        rows = run.measure_case(cases.Case(loss, n, 8, torch.float32), ["eager"], settings, run.environment(CPU), print)
        assert [row.ms_50 for row in rows] == [None]
        assert "needs about" in rows[0].note


def test_a_provider_that_raises_is_noted(monkeypatch):
    def broken(**inputs):
        raise AssertionError("no such device\nand more")

    monkeypatch.setitem(cases.LOSSES, "clip", replace(cases.LOSSES["clip"], ours=broken))
    settings = run.Settings(CPU, 0.0, 1, 1.0)
    rows = run.measure_case(
        cases.Case("clip", 64, 8, torch.float32), ["ours", "eager"], settings, run.environment(CPU), print
    )
    assert [row.note for row in rows if row.provider == "ours"] == ["AssertionError: no such device"]
    assert [row.mode for row in rows if row.provider == "eager"] == ["fwd", "bwd", "both"]


def test_workspace_limit_holds_in_both_halves(monkeypatch):
    """The limit holds in forward and backward, and is reset after them."""
    limits, seen = [None], []
    monkeypatch.setattr(ck, "set_workspace_limit", limits.append, raising=False)

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(("forward", limits[-1]))
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            seen.append(("backward", limits[-1]))
            return grad.expand(64, 8)

    def ours(image_features, text_features, logit_scale):
        return Spy.apply(image_features) + text_features.sum() * logit_scale

    monkeypatch.setitem(cases.LOSSES, "clip", replace(cases.LOSSES["clip"], ours=ours))
    case = cases.Case("clip", 64, 8, torch.float32)
    for provider, limit in (("ours-128MB", 128 * 10**6), ("ours", None)):
        seen.clear()
        run.make_step(provider, case, case.inputs(CPU), CPU).run()
        assert seen == [("forward", limit), ("backward", limit)]
        assert limits[-1] is None


def test_saved_scores_are_those_of_one_provider():
    """This provider saves scores without limit, others by the default."""
    case, saved = cases.Case("clip", 64, 8, torch.float32), {}
    for provider in ("ours", "ours-saved"):
        sizes = []
        with (
            cases.memory_of(provider),
            torch.autograd.graph.saved_tensors_hooks(lambda x, to=sizes: to.append(x.numel()), lambda x: x),
        ):
            assert ck.saved_scores_limit() == (2**62 if provider == "ours-saved" else None)
            cases.provider_function(provider, case, CPU)(**case.inputs(CPU))
        saved[provider] = sizes
    assert ck.saved_scores_limit() is None
    assert max(saved["ours-saved"]) == 64 * 64


def test_graph_takes_the_inputs_in_order(monkeypatch):
    """The capture is replaced by one that replays the function itself."""
    captured = []

    def capture(function, sample):
        captured.append(sample)
        return function

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    case = cases.Case("siglip", 64, 8, torch.float64)
    monkeypatch.setattr(cases.Case, "inputs", lambda self, device, inputs=cases.Case.inputs: inputs(self, CPU))
    replay = cases.provider_function("graph", case, torch.device("cuda"))
    inputs = case.inputs(CPU)
    assert replay(**inputs).item() == cases.LOSSES["siglip"].ours(**inputs).item()
    assert [value.shape for value in captured[0]] == [value.shape for value in inputs.values()]


def test_graph_needs_a_gpu():
    with pytest.raises(cases.Unavailable, match="CUDA device"):
        cases.provider_function("graph", cases.Case("clip", 64, 8, torch.float32), CPU)
