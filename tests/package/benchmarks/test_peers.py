"""The adapters of other packages, with stand-ins: dense losses with the documented signatures.

Those of libraries are checked where they are installed, in `tests/package/test_peers.py`.
"""

import importlib.machinery
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from benchmarks import __main__ as command
from benchmarks import cases, peers, run
from tests.support.benchmarks import CPU

pytestmark = pytest.mark.usefixtures("short_queue")


def _rows_mean(query, key, target):
    return F.cross_entropy(query @ key.T, target)


def _flash_loss(q, k, labels=None, scale=None, head_dim=256):
    assert q.shape[1] % head_dim == 0
    q = q if scale is None else q * scale
    return F.cross_entropy(q @ k.T, torch.arange(len(q)), reduction="none")


class _LigerLoss:
    def __init__(self, accum_dtype=None):
        assert accum_dtype == torch.float32

    def __call__(self, lin_weight, _input, target):
        return _rows_mean(_input, lin_weight, target)


def _cut_loss(e, c, targets, *, filter_eps="auto"):
    assert filter_eps is None
    return _rows_mean(e, c, targets)


class _MemeffLoss:
    def __init__(self, temperature=0.07, normalized_inputs=False, stable=True):
        assert normalized_inputs and not stable
        self.temperature = temperature

    def __call__(self, image, text):
        target = torch.arange(len(image))
        logits = image @ text.T / self.temperature
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _siglip_loss(img, txt, log_temperature, bias):
    sign = 2 * torch.eye(len(img), dtype=img.dtype) - 1
    return -F.logsigmoid(sign * (log_temperature.exp() * img @ txt.T + bias)).sum() / len(img)


STAND_INS = {
    "inf-cl": ("inf_cl", {"cal_flash_loss": _flash_loss}),
    "liger": ("liger_kernel.transformers", {"LigerFusedLinearCrossEntropyLoss": _LigerLoss}),
    "cce": ("cut_cross_entropy", {"linear_cross_entropy": _cut_loss}),
    "quack": ("quack.linear_cross_entropy", {"chunked_linear_cross_entropy": _rows_mean}),
    "memeff": ("memeff", {"MemoryEfficientCLIPLoss": _MemeffLoss}),
    "siglip-kernel": ("siglip_kernel", {"fused_siglip_loss": _siglip_loss}),
}
PEER_LOSSES = [(name, loss) for name, peer in peers.KERNELS.items() for loss in peer.losses]


def _install(monkeypatch, name, **contents):
    path, own = STAND_INS[name]
    for depth in range(1, path.count(".") + 2):
        module = types.ModuleType(".".join(path.split(".")[:depth]))
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    module.__dict__.update(own | contents)


@pytest.mark.parametrize(("name", "loss"), PEER_LOSSES)
@pytest.mark.parametrize("d", [128, 72, 768])
def test_peer_adapter(name, loss, d, monkeypatch):
    _install(monkeypatch, name)
    assert name in peers.importable()
    cases.check(name, cases.Case(loss, 192, d, torch.float64), CPU)


def test_peer_that_is_wrong(monkeypatch):
    _install(monkeypatch, "inf-cl", cal_flash_loss=lambda *arguments, **options: 2 * _flash_loss(*arguments, **options))
    with pytest.raises(cases.Unavailable, match="differs from float64"):
        cases.check("inf-cl", cases.Case("clip", 192, 128, torch.float32), CPU)


def test_peer_that_is_absent():
    assert "inf-cl" not in peers.importable()
    with pytest.raises(cases.Unavailable, match="inf_cl is not installed"):
        cases.check("inf-cl", cases.Case("clip", 192, 128, torch.float32), CPU)


def test_peer_without_this_loss(monkeypatch):
    _install(monkeypatch, "siglip-kernel")
    with pytest.raises(cases.Unavailable, match="does not compute"):
        cases.check("siglip-kernel", cases.Case("clip", 192, 128, torch.float32), CPU)


def test_libraries_are_measured_where_they_compute_a_loss():
    cells = [(case.loss, names) for grid in command.PRESETS["peers"] for case, names in grid]
    measured = {(provider, loss) for loss, names in cells for provider in names}
    theirs = {(name, loss) for name, library in peers.LIBRARIES.items() for loss in library.losses}
    assert {pair for pair in measured if pair[0] in peers.LIBRARIES} == theirs
    assert {("ours", loss) for _, loss in theirs} <= measured


def test_library_that_holds_a_matrix_for_every_pair():
    """One that would take the machine's memory is not begun."""
    case = cases.Case("nt_xent", 4096, 8, torch.float32)
    settings = run.Settings(CPU, 0.0, 1, memory_limit_gib=8.0)
    (row,) = run.measure_case(case, ["metric-learning"], settings, run.environment(CPU), print)
    assert "N = 4,096 needs about" in row.note
    assert row.ms_50 is None
