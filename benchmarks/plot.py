"""Pictures of time and memory over the batch, two panels for each loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from .measure import MIB
from .report import significant, timed
from .run import Row

# The colours of Okabe and Ito are distinct for any colour vision, the markers in black and white.
STYLES = {
    "ours": ("#0072B2", "o", "contrastive_kernels"),
    "ours-torch": ("#56B4E9", "v", "ours, torch backend"),
    "eager": ("#D55E00", "s", "eager PyTorch"),
    "autocast": ("#E69F00", "D", "eager, autocast"),
    "compile": ("#CC79A7", "^", "torch.compile"),
    "linear_cross_entropy": ("#009E73", "P", "linear_cross_entropy"),
    "open_clip": ("#0F8A8A", "h", "open_clip"),
    "lightly": ("#8B5A2B", "<", "lightly"),
    "metric-learning": ("#8064A2", ">", "pytorch-metric-learning"),
    "sentence-transformers": ("#B8860B", "d", "sentence-transformers"),
    "sentence-transformers-cached": ("#6B8E23", "*", "sentence-transformers, cached"),
    "graph": ("#000000", "x", "ours, CUDA graph"),
    "one-process": ("#56B4E9", "v", "ours, one process"),
}
# The first of these that was measured is what ours is compared with in words.
RIVALS = ("eager", "open_clip", "lightly", "sentence-transformers")
INK, GREY, PALE = "#222222", "#777777", "#e2e2e2"
PANEL_INCHES, PANELS_ABREAST = (4.6, 2.9), 3
MOST_SIZES = 5  # more have no room for their numbers
TIME_UNITS = (1000, "s"), (1, "ms"), (1e-3, "µs")
MEMORY_UNITS = (1024, "GiB"), (1, "MiB"), (1 / 1024, "KiB")


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write a PNG for each D and dtype with a loss measured at three sizes or more; return the files."""
    files = []
    rows = timed(rows)
    for d, dtype in dict.fromkeys((row.d, row.dtype) for row in rows):
        by_loss: dict[str, list[Row]] = {}
        for row in rows:
            if (row.d, row.dtype) == (d, dtype):
                by_loss.setdefault(row.loss, []).append(row)
        series = {loss: group for loss, group in by_loss.items() if len({row.n for row in group}) > 2}
        if series:
            files.append(folder / f"scaling-d{d}-{dtype}.png")
            _draw_figure(series, files[-1])
    return files


def _draw_figure(series: dict[str, list[Row]], file: Path) -> None:
    bands = -(-len(series) // PANELS_ABREAST)
    abreast = -(-len(series) // bands)
    width = PANEL_INCHES[0] * abreast
    title, source = (wrap(line, int(width * letters)) for line, letters in zip(_header(series), (8.5, 13), strict=True))
    top = 0.1 + 0.25 * len(title) + 0.16 * len(source)
    height = PANEL_INCHES[1] * 2 * bands + top + 0.2
    figure, grid = plt.subplots(2 * bands, abreast, figsize=(width, height), squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for i, (loss, rows) in enumerate(series.items()):
        band, column = divmod(i, abreast)
        _draw_panel(grid[2 * band, column], rows, "ms_50", f"{loss}: time forward + backward", TIME_UNITS)
        gauged = [row for row in rows if row.peak_mib is not None]
        if gauged:
            _draw_panel(grid[2 * band + 1, column], gauged, "peak_mib", f"{loss}: peak extra memory", MEMORY_UNITS)
    inch = 1 / height
    figure.text(0.1 / width, 1 - 0.1 * inch, "\n".join(title), va="top", fontsize=14, fontweight="bold", color=INK)
    place = 1 - (0.17 + 0.25 * len(title)) * inch
    figure.text(0.1 / width, place, "\n".join(source), va="top", fontsize=9, color=GREY)
    figure.tight_layout(rect=(0, 0, 1, 1 - top * inch), h_pad=1.8, w_pad=1.5)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _header(series: dict[str, list[Row]]) -> tuple[str, str]:
    """Return the title of a figure, and where its rows are from."""
    first = next(iter(series.values()))[0]
    ranks = max(row.ranks for rows in series.values() for row in rows)
    together, each = (f" of {ranks} processes", " each") if ranks > 1 else ("", "")
    return f"Contrastive losses over the batch{together}, D = {first.d}, {first.dtype}", (
        f"{first.device}, {first.threads} thread{'s' * (first.threads > 1)}{each}, torch {first.torch}, {first.date}. "
        "Medians, bands 20–80 %. Memory is beyond inputs and gradients."
    )


def _draw_panel(axes: Axes, rows: Sequence[Row], value: str, title: str, units: Sequence[tuple[float, str]]) -> None:
    axes.set_visible(True)
    sizes = sorted({row.n for row in rows})
    axes.set(xscale="log", yscale="log", xlim=(sizes[0] / 1.15, sizes[-1] * (sizes[-1] / sizes[0]) ** 0.55))
    ends = []
    if value == "peak_mib":
        matrix = {row.n: row.n * row.m * getattr(torch, row.dtype).itemsize / MIB for row in rows}
        axes.plot(sizes, [matrix[n] for n in sizes], color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        ends.append((sizes[-1], matrix[sizes[-1]], "one N × M matrix", GREY, None))
    # Ours is drawn last, above the others.
    names = dict.fromkeys([*STYLES, *(row.provider for row in rows)])
    for provider in reversed(names):
        line = sorted((row for row in rows if row.provider == provider), key=lambda row: row.n)
        if not line:
            continue
        ours = provider == "ours"
        color, marker, label = STYLES.get(provider, (GREY, ".", provider))
        x, y = [row.n for row in line], [getattr(row, value) for row in line]
        axes.plot(x, y, color=color, marker=marker, markersize=4.5, linewidth=2.4 if ours else 1.5)
        if value == "ms_50":
            axes.fill_between(
                x, [row.ms_20 for row in line], [row.ms_80 for row in line], color=color, alpha=0.18, lw=0
            )
        ends.append((x[-1], y[-1], label, color, "bold" if ours else None))
    _set_axes(axes, sizes, units)
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK, pad=20)
    axes.text(0, 1.03, _comparison(rows, value), transform=axes.transAxes, fontsize=8.5, color=GREY)
    _label_ends(axes, ends)


def _set_axes(axes: Axes, sizes: Sequence[int], units: Sequence[tuple[float, str]]) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.12)  # room for the names of lines that end together
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0,) if high / low > 150 else (1.0, 2.0, 5.0), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: significant(value, units)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    named = sizes[:: 1 + len(sizes) // (MOST_SIZES + 1)]
    axes.set_xticks(sizes, [f"{n:,}" if n in named else "" for n in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("rows N of the similarity matrix", fontsize=8.5, color=GREY, loc="left")
    axes.grid(color=PALE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(which="both", labelsize=8, color=GREY, labelcolor=INK)


def _comparison(rows: Sequence[Row], value: str) -> str:
    """Return a sentence that compares ours with a rival at the largest size where both were measured, else ``""``."""
    ours, *others = ({row.n: getattr(row, value) for row in rows if row.provider == name} for name in ("ours", *RIVALS))
    found = next(
        ((name, other) for name, other in zip(RIVALS, others, strict=True) if ours.keys() & other.keys()), None
    )
    if found is None:
        return ""
    name, rival = found
    n = max(ours.keys() & rival.keys())
    if value == "ms_50":
        return f"{rival[n] / ours[n]:.1f} × as fast as {name} at N = {n:,}"
    return f"{significant(ours[n], MEMORY_UNITS)} instead of {significant(rival[n], MEMORY_UNITS)} at N = {n:,}"


def _label_ends(axes: Axes, ends: Sequence[tuple[int, float, str, str, str | None]]) -> None:
    """Write the name of each line right of its end, higher where two names would overlap."""
    right = max(n for n, *_ in ends) * 1.12
    gap = 10 * axes.figure.dpi / 72
    lowest = -float("inf")
    for n, value, text, color, weight in sorted(ends, key=lambda end: end[1]):
        lowest = max(axes.transData.transform((n, value))[1], lowest + gap)
        _, height = axes.transData.inverted().transform((0, lowest))
        axes.annotate(
            text,
            (n, value),
            (right, height),
            va="center",
            fontsize=8,
            color=color,
            fontweight=weight,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.7, "alpha": 0.6, "shrinkA": 1, "shrinkB": 4},
        )
