"""The pictures are drawn and show the data."""

import sys

import pytest
import torch

from contrastive_kernels import diagnostics as dg
from tests.support.diagnostics import close


@pytest.fixture
def agg():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def test_pictures_draw(agg, tmp_path):
    z = torch.randn(40, 6)
    axes = [
        dg.plot_distance_histogram(z, lower=0.2, upper=0.4),
        dg.plot_distance_histogram({"one": z, "two": dg.distance_histogram(z, bins=9)}),
        dg.plot_class_similarity(torch.randn(4, 6), ["a", "b", "c", "d"]),
        dg.plot_class_similarity(torch.randn(40, 6), normalize=False),
        dg.plot_rank_distribution(dg.positive_rank(z, z + torch.randn(40, 6)), 40),
        dg.plot_rank_distribution(torch.ones(1, dtype=torch.int64), 1),
    ]
    for i, a in enumerate(axes):
        assert a.get_title() and (a.get_xlabel() or a.get_xticklabels())
        a.figure.savefig(tmp_path / f"{i}.png")
    assert [text.get_text() for text in axes[1].get_legend().get_texts()] == ["one", "two"]
    own = agg.subplots()[1]
    assert dg.plot_rank_distribution(torch.tensor([1, 3]), 5, axes=own) is own


def test_the_heights_are_those_of_the_data(agg):
    z = torch.randn(40, 6)
    found = dg.distance_histogram(z, bins=9)
    (stairs,) = dg.plot_distance_histogram(z, bins=9).patches
    close(torch.tensor(stairs.get_data().values), found.counts / found.counts.sum(), rtol=1e-6)
    ranks = torch.tensor([4, 1, 1, 9])
    line = dg.plot_rank_distribution(ranks, 10).lines[0]
    for k in (1, 2, 4, 9):
        reached = max(y for x, y in zip(*line.get_data(), strict=True) if x <= k)
        assert reached == (ranks <= k).float().mean()


def test_without_matplotlib_the_error_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        dg.plot_rank_distribution(torch.tensor([1, 2]), 4)
