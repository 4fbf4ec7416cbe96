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
        dg.plot_class_similarity(torch.randn(45, 6), [f"class {i}" for i in range(45)]),
        dg.plot_rank_distribution(dg.positive_rank(z, z + torch.randn(40, 6)), 40),
        dg.plot_rank_distribution(torch.ones(1, dtype=torch.int64), 1),
    ]
    for i, a in enumerate(axes):
        assert a.get_title() and (a.get_xlabel() or a.get_xticklabels())
        a.figure.savefig(tmp_path / f"{i}.png")
    assert [text.get_text() for text in axes[1].get_legend().get_texts()] == ["one", "two"]
    own = agg.subplots()[1]
    assert dg.plot_rank_distribution(torch.tensor([1, 3]), 5, axes=own) is own


def test_no_figure_stays_open(agg):
    dg.plot_rank_distribution(torch.tensor([1, 3]), 5)
    dg.plot_class_similarity(torch.eye(3))
    dg.plot_distance_histogram(torch.eye(3))
    assert agg.get_fignums() == []


def test_pairs_without_a_distance_are_missing(agg):
    """The area is the part of the pairs that have a distance, and the legend counts the others."""
    z = torch.randn(40, 6)
    z[:20] = torch.nan
    axes = dg.plot_distance_histogram({"run": z}, bins=9)
    close(torch.tensor(axes.patches[0].get_data().values).sum() / 9, 20 * 19 / (40 * 39), rtol=1e-6)
    assert axes.get_legend().get_texts()[0].get_text() == "run (1180 of 1560 pairs without a distance)"
    lonely = dg.plot_distance_histogram(z * torch.nan)
    assert lonely.get_legend().get_texts()[0].get_text() == "1560 of 1560 pairs without a distance"
    assert dg.plot_distance_histogram(z[20:]).get_legend() is None


def test_every_curve_looks_different(agg):
    curves = dg.plot_distance_histogram({f"run {i}": torch.randn(9, 3) for i in range(16)}).patches
    looks = {(curve.get_edgecolor(), curve.get_linestyle()) for curve in curves}
    assert len(looks) == 16


@pytest.mark.parametrize("classes", [1, 20, 21, 45, 1000])
def test_names_are_thinned(agg, classes):
    axes = dg.plot_class_similarity(torch.randn(classes, 4), [f"class {i}" for i in range(classes)])
    shown = [text.get_text() for text in axes.get_yticklabels()]
    assert shown == [f"class {i}" for i in axes.get_yticks()] == [text.get_text() for text in axes.get_xticklabels()]
    assert len(shown) == classes if classes <= 20 else 10 < len(shown) <= 20


@pytest.mark.parametrize("classes", [5, 30])
def test_classes_without_a_similarity_stand_out(agg, classes):
    means = torch.randn(classes, 6)
    means[1], means[3, 2] = 0, torch.nan
    axes = dg.plot_class_similarity(means)
    (image,) = axes.images
    colors = image.to_rgba(image.get_array())
    empty, broken, usual = (tuple(colors[i, i]) for i in (1, 3, 0))
    assert len({empty, broken, usual}) == 3
    for i in set(range(classes)) - {1}:
        assert tuple(colors[1, i]) == tuple(colors[i, 1]) == empty
        assert tuple(colors[3, i]) == tuple(colors[i, 3]) == broken
    assert axes.get_title().splitlines()[1:] == [f"1 of {classes} without samples", f"1 of {classes} not finite"]
    assert "nan" in {text.get_text() for text in axes.texts} or classes > 12


def test_the_heights_are_those_of_the_data(agg):
    z = torch.randn(40, 6)
    for bins in (9, 40):
        found = dg.distance_histogram(z, bins=bins)
        (stairs,) = dg.plot_distance_histogram(z, bins=bins).patches
        heights = torch.tensor(stairs.get_data().values)
        close(heights, bins * found.counts / found.counts.sum(), rtol=1e-5)
        close((heights / bins).sum(), 1.0, rtol=1e-6)
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
