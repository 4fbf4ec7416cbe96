"""The sentence encoder that is trained with the losses of sentence-transformers and with ours."""

import importlib

import pytest

from tests.support import adapters

adapters.require_peers()
pytestmark = pytest.mark.peers


@pytest.fixture
def sentence_pairs():
    return importlib.import_module("examples.compat.sentence_pairs")


def test_curves_are_one(sentence_pairs, capsys):
    differences = sentence_pairs.main(["--steps", "4", "--batch-size", "24"])
    assert set(differences) == {"MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"}
    assert max(differences.values()) < 1e-4
    assert capsys.readouterr().out.count("largest difference") == 2


def test_learns(sentence_pairs):
    curve = sentence_pairs.train(sentence_pairs.ours, cached=True, steps=12, batch_size=24)
    assert curve[-1] < curve[0] - 0.5
