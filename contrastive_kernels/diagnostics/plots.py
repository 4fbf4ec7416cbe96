"""Pictures of the diagnostics; matplotlib is imported when one is drawn.

A new figure is not registered in pyplot, so that none stays open: the result has it as ``.figure``, to save or to show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle, product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from contrastive_kernels.diagnostics.classes import class_similarity
from contrastive_kernels.diagnostics.common import check_range
from contrastive_kernels.diagnostics.distances import DistanceHistogram, distance_histogram
from contrastive_kernels.primitives import Band, checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_class_similarity", "plot_distance_histogram", "plot_rank_distribution"]

# Okabe and Ito's colours, told apart with any colour vision.
BLUE = "#0072B2"
COLORS = (BLUE, "#D55E00", "#009E73", "#CC79A7")
BAND, GREY = "#E69F00", "#777777"
# What has no similarity to draw, lighter than the numbers on it.
EMPTY, BROKEN = "#BBBBBB", "#F0E442"
LINES = ("solid", "dashed", "dotted", "dashdot")
# The most names on an axis, and the most classes whose similarities are written out.
NAMES, NUMBERS = 20, 12


def _axes(axes: Axes | None) -> Axes:
    """The axes given, or those of a new figure."""
    if axes is not None:
        return axes
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = "the plots of contrastive_kernels.diagnostics need matplotlib: pip install matplotlib"
        raise ImportError(message) from error
    return Figure(layout="constrained").subplots()


def _without_frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def plot_distance_histogram(
    z: Tensor | DistanceHistogram | dict[str, Tensor | DistanceHistogram],
    *,
    bins: int = 50,
    lower: float | None = None,
    upper: float | None = None,
    normalize: bool = True,
    axes: Axes | None = None,
) -> Axes:
    """Draws how the pairwise distances (1 - s) / 2 are distributed: their density, whatever the number of bins.

    The area under a curve is the part of its pairs that have a distance; if some have none, as with NaN, the legend
    says how many.

    Args:
        z: ``(N, D)`` features, whose pairs are all counted, or a `distance_histogram`; or several of them by name, for
            example those of the pairs of one class (``same=True``) and of two.
        bins: bins of the histogram of features.
        lower, upper: the band of the distance polarization, shaded; both or none.
        normalize: rows of features to unit norm first.
        axes: matplotlib axes to draw in; None: those of a new figure, which pyplot does not hold open.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: only one end of the band, or bounds that are no band.

    Example:
        >>> import torch
        >>> from contrastive_kernels import diagnostics
        >>> diagnostics.plot_distance_histogram(torch.randn(64, 8), lower=0.2, upper=0.4).get_xlabel()
        'distance (1 − s) / 2'
    """
    if (lower is None) != (upper is None):
        raise ValueError("lower and upper go together: they are the ends of the band")
    bins = checks.count("bins", bins)
    band = None
    if lower is not None and upper is not None:
        band = Band(checks.positive("lower", lower, zero=True), checks.positive("upper", upper))
    several = z if isinstance(z, dict) else {"": z}
    axes = _axes(axes)
    if band is not None:
        axes.axvspan(band.lower, band.upper, color=BAND, alpha=0.2, linewidth=0, label="band")
    for (name, data), (line, color) in zip(several.items(), cycle(product(LINES, COLORS)), strict=False):
        if isinstance(data, DistanceHistogram):
            found = data
        else:
            found = distance_histogram(data, bins=bins, normalize=normalize)
        counts, edges, pairs = found.counts.double(), found.edges.double(), found.counts.sum() + found.invalid
        density = counts / edges.diff() / pairs.clamp(min=1)
        if found.invalid > 0:
            missing = f"{found.invalid.item()} of {pairs.item()} pairs without a distance"
            name = f"{name} ({missing})" if name else missing
        axes.stairs(
            density.cpu().tolist(), edges.cpu().tolist(), label=name, color=color, linestyle=line, linewidth=1.5
        )
    axes.set(xlabel="distance (1 − s) / 2", ylabel="density of pairs", xlim=(0, 1), title="Pairwise distances")
    axes.set_ylim(bottom=0)
    _without_frame(axes)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)
    return axes


def plot_class_similarity(
    means: Tensor, names: Sequence[str] | None = None, *, normalize: bool = True, axes: Axes | None = None
) -> Axes:
    """Draws the similarity of every pair of class means; with up to 12 classes the numbers too.

    A class without samples, whose mean is 0, is grey, what is not finite yellow; the title counts both.

    Args:
        means: ``(K, D)``, of `class_means`.
        names: of the classes; of more than 20 some are left out.
        normalize: means to unit norm first.
        axes: matplotlib axes to draw in; None: those of a new figure, which pyplot does not hold open.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: another number of names than of classes, or no class.

    Example:
        >>> import torch
        >>> from contrastive_kernels import diagnostics
        >>> diagnostics.plot_class_similarity(torch.eye(2), ["cat", "dog"]).get_title()
        'Similarity of the class means'
    """
    similarity = class_similarity(means, normalize=normalize).cpu()
    classes = len(similarity)
    if not classes:
        raise ValueError(f"means {checks.shape(means)} must have at least one class")
    if names is not None and len(names) != classes:
        raise ValueError(f"names has {len(names)} entries and means {checks.shape(means)} has {classes} classes")
    empty = (means == 0).all(1).cpu()
    blank = empty | empty[:, None]
    broken = ~similarity.isfinite() & ~blank
    limit = max([1.0, *similarity[~(blank | broken)].abs().tolist()])
    axes = _axes(axes)
    # The colour map knows values that are missing, and those above its range.
    values = similarity.masked_fill(broken, 2 * limit).masked_fill(blank, torch.nan)
    image = axes.imshow(values.tolist(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    image.set_cmap(image.get_cmap().with_extremes(bad=EMPTY, over=BROKEN))
    axes.figure.colorbar(image, ax=axes, label="cosine" if normalize else "inner product", shrink=0.8)
    counted = ((empty.sum().item(), "without samples"), ((~means.isfinite()).any(1).sum().item(), "not finite"))
    notes = [f"{number} of {classes} {what}" for number, what in counted if number]
    axes.set_title("\n".join(["Similarity of the class means", *notes]))
    if names is not None:
        step = -(-classes // NAMES)
        axes.set_xticks(range(0, classes, step), names[::step], rotation=45, ha="right")
        axes.set_yticks(range(0, classes, step), names[::step])
    else:
        axes.set(xlabel="class", ylabel="class")
    if classes <= NUMBERS:
        for i, j in (~blank).nonzero().tolist():
            value = similarity[i, j].item()
            color = "white" if abs(value) > 0.6 * limit else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
    return axes


def plot_rank_distribution(ranks: Tensor, keys: int, *, axes: Axes | None = None) -> Axes:
    """Draws the retrieval accuracy at every k, that is how the ranks are distributed, beside that of chance.

    Args:
        ranks: ``(N,)`` int64, of `positive_rank`.
        keys: the number of keys among which they were found.
        axes: matplotlib axes to draw in; None: those of a new figure, which pyplot does not hold open.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: ranks are not integers.
        ValueError: ranks of another shape or empty, or not from 1 to keys, keys not positive.

    Example:
        >>> import torch
        >>> from contrastive_kernels import diagnostics
        >>> diagnostics.plot_rank_distribution(torch.tensor([1, 1, 3, 8]), 8).get_ylabel()
        'fraction of positives among the k nearest'
    """
    checks.tensor("ranks", ranks)
    if ranks.dim() != 1 or not len(ranks):
        raise ValueError(f"ranks {checks.shape(ranks)} must have shape (N,), N >= 1")
    checks.ids("ranks", ranks, len(ranks), ranks)
    keys = checks.count("keys", keys)
    check_range("ranks", ranks, 1, keys + 1, f"the ranks among {keys} keys")
    axes = _axes(axes)
    ordered = ranks.sort().values.cpu()
    heights = [(i + 1) / len(ordered) for i in range(len(ordered))]
    axes.step([1, *ordered.tolist(), keys], [0, *heights, 1], where="post", color=BLUE, label="positives")
    places = torch.logspace(0, math.log10(keys), 50).tolist()
    axes.plot(places, [k / keys for k in places], color=GREY, linestyle=(0, (4, 3)), linewidth=1, label="chance")
    median = ordered[(len(ordered) - 1) // 2].item()
    axes.set(
        xscale="log", xlim=(1, max(keys, 2)), ylim=(0, 1.02), xlabel=f"k, of {keys} keys",
        ylabel="fraction of positives among the k nearest", title=f"Rank of the positive, median {median}",
    )  # fmt: skip
    _without_frame(axes)
    axes.legend(frameon=False)
    return axes
