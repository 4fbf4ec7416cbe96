"""SimCLR under Lightning with the loss of lightly and with ours."""

import importlib

import pytest

from benchmarks import libraries
from tests.support import adapters

adapters.require_peers()
pytestmark = pytest.mark.peers


def test_curves_are_one(capsys):
    importlib.import_module("pytorch_lightning")  # which asks a package that it finds for its version
    with libraries.stand_ins():
        digits_simclr = importlib.import_module("examples.compat.digits_simclr")
    assert digits_simclr.main(["--steps", "4", "--batch-size", "64"]) < 1e-4
    assert "largest difference" in capsys.readouterr().out
