"""The run over small shapes notices a wrong kernel."""

from dataclasses import replace

import pytest
import torch

from benchmarks import cases, small_shapes

pytestmark = pytest.mark.usefixtures("short_queue")


def test_small_shapes_notice_a_wrong_kernel(monkeypatch, capsys):
    right = cases.LOSSES["clip"]
    monkeypatch.setitem(cases.LOSSES, "clip", replace(right, ours=lambda **inputs: 1.1 * right.ours(**inputs)))
    monkeypatch.setattr(small_shapes, "SHAPES", [(24, torch.float32, ("clip", "nt_xent"))])
    assert small_shapes.main(["--device", "cpu", "--check"]) == 1
    assert "2 cases ran, 1 differ from float64" in capsys.readouterr().out
    assert small_shapes.main(["--device", "cpu"]) == 0
