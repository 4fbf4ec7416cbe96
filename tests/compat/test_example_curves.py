"""The table of two curves that the examples of the adapters print."""

import pytest
import torch

from examples.compat._curves import ROWS, side_by_side


@pytest.mark.parametrize("steps", [1, 5, 100])
def test_side_by_side(steps, capsys):
    curves = {"original": [1.0] * steps, "ours": [1.0] * (steps - 1) + [1.25]}
    assert side_by_side("A loss", curves.__getitem__, "original", "ours") == 0.25
    out = capsys.readouterr().out
    assert "A loss" in out and "largest difference: 2.5e-01" in out
    assert out.count("1.000000") == 2 * min(steps, ROWS) - 1


def test_both_from_one_seed():
    assert side_by_side("", lambda loss: torch.rand(3).tolist(), None, None) == 0


def test_curves_of_two_lengths():
    with pytest.raises(ValueError, match="zip"):
        side_by_side("", lambda n: [0.0] * n, 2, 3)
