"""A CLIP of open_clip and one of transformers, trained with their losses and with ours."""

import importlib

import pytest

from benchmarks import libraries
from contrastive_kernels.compat import _small
from tests.support import adapters

adapters.require_peers()
pytestmark = pytest.mark.peers


@pytest.mark.parametrize("largest", [0, _small._largest], ids=["sweep", "formula"])
@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_twenty_steps_of_open_clip(name, largest, capsys):
    with libraries.stand_ins():
        two_towers = importlib.import_module("examples.compat.two_towers")
    options = ["--loss", name, "--steps", "20", "--batch-size", "48", "--dtype", "float64"]
    with _small.largest(largest):
        assert two_towers.main(options) <= 1e-12
    assert "largest difference" in capsys.readouterr().out


def test_open_clip_learns():
    """The curves agree because they show one loss that goes down, not because nothing happens."""
    with libraries.stand_ins():
        two_towers = importlib.import_module("examples.compat.two_towers")
    ours = adapters.modules("open_clip")[0]
    curve = two_towers.train(ours, "ClipLoss", 30, 64, two_towers.torch.float32)
    assert min(curve[-3:]) < curve[0] - 0.2


def test_trainer_of_transformers(capsys):
    pytest.importorskip("accelerate")
    clip_trainer = importlib.import_module("examples.compat.clip_trainer")
    assert clip_trainer.main(["--steps", "6", "--batch-size", "32"]) < 1e-5
    assert "largest difference" in capsys.readouterr().out
    curve = clip_trainer.train(True, 6, 32)
    assert len(curve) == 6
    assert curve[0] > 3
