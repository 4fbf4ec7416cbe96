"""Train an encoder of handwritten digits without labels: NT-Xent, with polarization, ArCL, and the dense NT-Xent.

``python -m examples.digits`` trains four copies of one small network on the same batches and the same random views,
each copy with its own loss. The first two losses are NT-Xent, in plain PyTorch and from this package: their curves must
be one curve. Then linear probes on the frozen features measure how well digits are recognised: after all labels, in
clean and in augmented test images, and after five labels a class, where the losses differ most.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.gridspec import GridSpec
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import contrastive_kernels as ck

TEMPERATURE = 0.2
LEARNING_RATE = 2e-3
# Distances (1 - cos) / 2 of negatives are pushed out of this band. The weight is large enough for a visible effect
# (with 1 the two runs are nearly equal); no setting here was tuned for accuracy.
POLARIZATION = ck.Polarization(lower=0.1, upper=0.5, weight=10.0)
VIEWS = 4
AUGMENTED_COPIES = 10
# Labels of a class, and how often they are drawn, for the probe that tells the losses apart.
FEW, FEW_DRAWS = 5, 8
LAST = 10  # the final loss is the mean of these steps
AGREEMENT_STEPS = 20
ROUNDING = torch.finfo(torch.float32).eps

DENSE, FUSED, POLARIZED, ARCL = "NT-Xent, dense PyTorch", "NT-Xent", "NT-Xent + polarization", f"ArCL, {VIEWS} views"


def dense_nt_xent(z0: Tensor, z1: Tensor) -> Tensor:
    """Return NT-Xent in plain PyTorch, with the 2N x 2N matrix of similarities."""
    z = F.normalize(torch.cat([z0, z1]), dim=1)
    logits = (z @ z.T / TEMPERATURE).fill_diagonal_(-math.inf)
    other_view = torch.arange(len(z)).roll(len(z0))
    return F.cross_entropy(logits, other_view)


# How many views each loss takes, and the loss as a function of their embeddings (V, N, D).
LOSSES: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    DENSE: (2, lambda z: dense_nt_xent(z[0], z[1])),
    FUSED: (2, lambda z: ck.nt_xent_loss(z[0], z[1], temperature=TEMPERATURE)),
    POLARIZED: (2, lambda z: ck.nt_xent_loss(z[0], z[1], temperature=TEMPERATURE, polarization=POLARIZATION)),
    ARCL: (VIEWS, lambda z: ck.arcl_loss(z.transpose(0, 1), temperature=TEMPERATURE)),
}


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 8, 8) in [0, 1] and their labels, for training and for test."""

    train: Tensor
    train_labels: np.ndarray
    test: Tensor
    test_labels: np.ndarray


@dataclass
class Run:
    """A network and its training: the loss of each step, the seconds of each step and of its loss."""

    model: nn.Sequential
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss_seconds: list[float] = field(default_factory=list)

    @property
    def final_loss(self) -> float:
        """Mean of the last losses."""
        return float(np.mean(self.losses[-LAST:]))


@dataclass(frozen=True)
class Probe:
    """Accuracy of linear probes, with standard errors.

    On clean and augmented test images after all labels of the training images, and on clean ones after a few labels.
    """

    clean: float
    clean_error: float
    augmented: float
    augmented_error: float
    few: float
    few_error: float


@dataclass(frozen=True)
class Result:
    """The contents of the table and the picture."""

    runs: dict[str, Run]
    probes: dict[str, Probe]
    test: Tensor
    augmented: Sequence[Tensor]

    def relative_difference(self) -> np.ndarray:
        """Return the relative difference between the losses of the fused and the dense NT-Xent at each step."""
        dense, fused = (np.array(self.runs[name].losses) for name in (DENSE, FUSED))
        return np.abs(fused - dense) / dense


def load(seed: int) -> Digits:
    """Return the digits of scikit-learn, three quarters for training."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    train, test = train_test_split(np.arange(len(images)), test_size=0.25, stratify=digits.target, random_state=seed)
    return Digits(images[train], digits.target[train], images[test], digits.target[test])


# What `augment` changes, in the order in which the sets of examples/tables.py lose them.
CHANGES = ("noise", "contrast", "erasing", "shear", "rotation", "zoom", "shift")


def augment(images: Tensor, generator: torch.Generator, changes: Collection[str] = CHANGES) -> Tensor:
    """Return a random view of each image: rotated, sheared, scaled, shifted; contrast, an erased patch, noise.

    Other `changes` leave the random numbers of the rest as they are.
    """
    n, size = len(images), images.shape[-1]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    def applied(name: str, value: Tensor, none: float) -> Tensor:
        return value if name in changes else torch.full_like(value, none)

    angle, shear = applied("rotation", uniform(-0.3, 0.3), 0), applied("shear", uniform(-0.2, 0.2), 0)
    zoom = applied("zoom", uniform(0.85, 1.15, 1, 1), 1)
    cos, sin = angle.cos(), angle.sin()
    linear = torch.stack([cos, shear * cos - sin, sin, shear * sin + cos], 1).view(n, 2, 2) / zoom
    # up to a pixel; the grid runs from -1 to 1
    shift = applied("shift", uniform(-1, 1, 2, 1) * 2 / size, 0)
    grid = F.affine_grid(torch.cat([linear, shift], 2), list(images.shape), align_corners=False)
    view = F.grid_sample(images, grid, align_corners=False) * applied("contrast", uniform(0.7, 1.3, 1, 1, 1), 1)

    patch, pixel = 2, torch.arange(size)
    corner = uniform(1 - patch, size, 2, 1).floor()
    inside = (pixel >= corner) & (pixel < corner + patch)  # [n, 2, size]
    if "erasing" in changes:
        view = view.masked_fill((inside[:, 0, :, None] & inside[:, 1, None, :]).unsqueeze(1), 0)
    noise = 0.05 * torch.randn(view.shape, generator=generator)
    return view + noise if "noise" in changes else view


def make_model() -> nn.Sequential:
    """Return a convolutional encoder with 256 features and a projection head with 64.

    The activations are smooth: at the kink of a ReLU two runs that differ by one rounding get different gradients, and
    after some ten steps the curves of two equal losses would differ.
    """

    def convolution(channels: int, out_channels: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(out_channels), nn.SiLU()]

    encoder = nn.Sequential(*convolution(1, 16, 1), *convolution(16, 32, 2), *convolution(32, 64, 2), nn.Flatten())
    head = nn.Sequential(nn.Linear(256, 128, bias=False), nn.BatchNorm1d(128), nn.SiLU(), nn.Linear(128, 64))
    return nn.Sequential(encoder, head)


def train_step(run: Run, views: Tensor, loss_of: Callable[[Tensor], Tensor]) -> None:
    """Train one network for one step on views (V, N, 1, 8, 8)."""
    start = time.perf_counter()
    z = run.model(views.flatten(0, 1)).unflatten(0, views.shape[:2])
    # The graph is cut at the embeddings, to time forward and backward of the loss without the network.
    embeddings = z.detach().requires_grad_()
    loss_start = time.perf_counter()
    loss = loss_of(embeddings)
    loss.backward()
    loss_end = time.perf_counter()
    run.optimizer.zero_grad()
    z.backward(embeddings.grad)
    run.optimizer.step()
    run.seconds.append(time.perf_counter() - start)
    run.loss_seconds.append(loss_end - loss_start)
    run.losses.append(loss.item())


def train(images: Tensor, steps: int, batch_size: int, seed: int) -> tuple[nn.Sequential, dict[str, Run]]:
    """Return the untrained network and, for each loss, a copy trained with it on the same batches and views."""
    torch.manual_seed(seed)
    untrained = make_model()
    runs = {}
    for name in LOSSES:
        model = copy.deepcopy(untrained)
        runs[name] = Run(model, torch.optim.Adam(model.parameters(), LEARNING_RATE))
    generator = torch.Generator().manual_seed(seed)
    for _ in track(range(steps), "Training", transient=True, disable=not sys.stdout.isatty()):
        batch = images[torch.randperm(len(images), generator=generator)[:batch_size]]
        views = torch.stack([augment(batch, generator) for _ in range(VIEWS)])
        for name, (count, loss_of) in LOSSES.items():
            train_step(runs[name], views[:count], loss_of)
    return untrained, runs


@torch.no_grad()
def probe(features_of: Callable[[Tensor], Tensor], digits: Digits, augmented: Sequence[Tensor]) -> Probe:
    """Fit a logistic regression to features of the clean training images, test it on clean and augmented images."""
    train = features_of(digits.train).numpy()
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    classifier.fit(train, digits.train_labels)

    def accuracy(copies: Sequence[Tensor]) -> tuple[float, float]:
        hits = [classifier.predict(features_of(images).numpy()) == digits.test_labels for images in copies]
        per_image = np.mean(hits, axis=0)  # copies of one image are not independent samples
        return per_image.mean(), per_image.std() / math.sqrt(len(per_image))

    return Probe(*accuracy([digits.test]), *accuracy(augmented), *few_labels(train, features_of(digits.test), digits))


def few_labels(train: np.ndarray, test: Tensor, digits: Digits) -> tuple[float, float]:
    """Return the mean accuracy on the test images after FEW labels a class, and the standard error over their draws."""
    found = []
    for seed in range(FEW_DRAWS):
        order = np.random.default_rng(seed).permutation(len(train))
        chosen = np.concatenate([order[digits.train_labels[order] == label][:FEW] for label in range(10)])
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        classifier.fit(train[chosen], digits.train_labels[chosen])
        found.append((classifier.predict(test.numpy()) == digits.test_labels).mean())
    return float(np.mean(found)), float(np.std(found, ddof=1) / math.sqrt(len(found)))


def evaluate(
    untrained: nn.Sequential, runs: dict[str, Run], digits: Digits, augmented: Sequence[Tensor]
) -> dict[str, Probe]:
    """Return the probes of raw pixels, of the untrained encoder and of the trained ones."""
    models = {"untrained encoder": untrained, **{name: run.model for name, run in runs.items()}}
    probes = {"raw pixels": probe(lambda images: images.flatten(1), digits, augmented)}
    for name, model in models.items():
        probes[name] = probe(model.eval()[0], digits, augmented)
    return probes


def main_table(result: Result) -> Table:
    """Return the losses, probe accuracies and times, one row per representation."""
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption=f"Loss: the first step → the mean of the last {LAST}; different losses are not comparable. Accuracy: "
        f"± one standard error over the test images ({FEW} labels a class: over {FEW_DRAWS} draws of them), one seed. "
        "Times: medians.",
    )
    table.add_column("representation")
    probes = f"probe %\n{FEW} labels", "probe %\nall labels", "probe %\naugmented"
    for header in ("\nloss", *probes, "step\nms", "of it loss\nms"):
        table.add_column(header, justify="right")
    for name, accuracy in result.probes.items():
        cells = [
            f"{100 * accuracy.few:.1f} ± {100 * accuracy.few_error:.1f}",
            f"{100 * accuracy.clean:.1f} ± {100 * accuracy.clean_error:.1f}",
            f"{100 * accuracy.augmented:.1f} ± {100 * accuracy.augmented_error:.1f}",
        ]
        if name not in result.runs:
            table.add_row(name, "", *cells)
            continue
        run = result.runs[name]
        step, loss = (1e3 * float(np.median(seconds)) for seconds in (run.seconds, run.loss_seconds))
        change = f"{run.losses[0]:.3f} → {run.final_loss:.3f}"
        table.add_row(name, change, *cells, f"{step:.0f}", f"{loss:.1f} ({loss / step:.0%})")
    return table


INK, GREY, PALE = "#222222", "#777777", "#e2e2e2"
# The colours of Okabe and Ito are distinct for any colour vision.
COLORS = {DENSE: "#E69F00", FUSED: "#0072B2", POLARIZED: "#CC79A7", ARCL: "#009E73"}


def draw(result: Result, digits: Digits, subtitle: str, file: Path) -> None:
    """Draw the loss curves, dense against fused, the probe accuracies and some views into a PNG."""
    figure = plt.figure(figsize=(11, 8.4))
    figure.text(0.02, 0.978, "Handwritten digits learned without labels", va="top", fontsize=15, fontweight="bold")
    figure.text(0.02, 0.941, subtitle, va="top", fontsize=9.5, color=GREY)
    curves = figure.add_gridspec(
        2, 2, height_ratios=[1.6, 1], left=0.06, right=0.975, top=0.87, bottom=0.5, hspace=0.35
    )
    probes = figure.add_gridspec(1, 1, left=0.185, right=0.6, top=0.395, bottom=0.075)
    views = figure.add_gridspec(5, VIEWS + 1, left=0.66, right=0.975, top=0.385, bottom=0.06, hspace=0.1, wspace=0.1)
    _draw_losses(figure.add_subplot(curves[:, 0]), result)
    overlay = figure.add_subplot(curves[0, 1])
    _draw_agreement(overlay, figure.add_subplot(curves[1, 1], sharex=overlay), result)
    _draw_probes(figure.add_subplot(probes[0]), result, digits)
    _draw_views(views, result)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(which="both", labelsize=8.5, color=GREY, labelcolor=INK)
    axes.grid(color=PALE, linewidth=0.7)
    axes.set_axisbelow(True)


def _draw_losses(axes: Axes, result: Result) -> None:
    for name in (FUSED, POLARIZED, ARCL):
        losses = result.runs[name].losses
        axes.plot(range(1, len(losses) + 1), losses, color=COLORS[name], linewidth=1.6, label=name)
    _style(axes, "Loss (the three are different quantities)")
    axes.set_xlabel("step", fontsize=8.5, color=GREY, loc="left")
    axes.legend(frameon=False, fontsize=9, labelcolor="linecolor")


def _draw_agreement(overlay: Axes, difference: Axes, result: Result) -> None:
    steps = range(1, len(result.runs[DENSE].losses) + 1)
    overlay.plot(steps, result.runs[DENSE].losses, color=COLORS[DENSE], linewidth=5, alpha=0.55, label=DENSE)
    overlay.plot(steps, result.runs[FUSED].losses, color=COLORS[FUSED], linewidth=1.3, label="NT-Xent, this package")
    _style(overlay, "NT-Xent trained twice: the dense loss and ours")
    overlay.tick_params(labelbottom=False)
    overlay.legend(frameon=False, fontsize=9)

    relative = result.relative_difference()
    # The axis is linear below a tenth of a rounding, to show an exact zero.
    difference.set_yscale("symlog", linthresh=ROUNDING / 10)
    difference.plot(steps, relative, color=COLORS[FUSED], linewidth=0, marker=".", markersize=3.5)
    difference.axhline(ROUNDING, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    difference.text(1, ROUNDING * 1.25, "float32 rounding", transform=difference.get_yaxis_transform(), fontsize=8,
                    color=GREY, ha="right")  # fmt: skip
    decades = range(-7, max(-6, math.ceil(math.log10(max(relative.max(), ROUNDING)))) + 1)
    difference.set_yticks([0, *(10.0**decade for decade in decades)])
    difference.set_ylim(-ROUNDING / 20, 10.0 ** decades[-1])
    difference.minorticks_off()
    _style(difference, f"Their relative difference: at most {relative.max():.1e}")
    difference.set_xlabel("step", fontsize=8.5, color=GREY, loc="left")


def _draw_probes(axes: Axes, result: Result, digits: Digits) -> None:
    names = list(result.probes)
    positions = np.arange(len(names))[::-1]
    for name, y in zip(names, positions, strict=True):
        accuracy = result.probes[name]
        for value, error, offset, strength in (
            (accuracy.clean, accuracy.clean_error, 0.28, 0.25),
            (accuracy.augmented, accuracy.augmented_error, 0.0, 0.55),
            (accuracy.few, accuracy.few_error, -0.28, 1.0),
        ):
            color = 1 - strength * (1 - np.array(to_rgb(COLORS.get(name, GREY))))
            axes.barh(y + offset, 100 * value, 0.26, color=color)
            axes.errorbar(100 * value, y + offset, xerr=100 * error, color=INK, linewidth=1)
            axes.text(100 * (value + error) + 1, y + offset, f"{100 * value:.1f}", va="center", fontsize=8, color=INK)
    _style(axes, f"Linear probe: accuracy on {len(digits.test)} test images, %")
    axes.set_yticks(positions, names)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 108)
    axes.set_xticks(range(0, 101, 20))
    note = f"pale: all labels; middle: augmented images; full: {FEW} labels a class; whiskers: one standard error"
    axes.set_xlabel(note, fontsize=8.5, color=GREY, loc="left")
    axes.grid(visible=False, axis="y")


def _draw_views(grid: GridSpec, result: Result) -> None:
    for row in range(grid.nrows):
        for column in range(grid.ncols):
            pixels = result.test[row] if column == 0 else result.augmented[column - 1][row]
            axes = grid.figure.add_subplot(grid[row, column])
            axes.imshow(pixels[0].numpy(), cmap="gray_r", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color(INK if column == 0 else PALE)
            if row == 0:
                axes.set_title("image" if column == 0 else f"view {column}", fontsize=8.5, color=INK)


def main(arguments: Sequence[str] | None = None) -> Result:
    """Parse the command line, train, probe, print the tables and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="training steps of every network (default 200)")
    parser.add_argument("--batch-size", type=int, default=512, help="images a step (default 512)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of the picture")
    options = parser.parse_args(arguments)

    digits = load(options.seed)
    if not 2 <= options.batch_size <= len(digits.train):
        parser.error(f"--batch-size must be from 2 to {len(digits.train)}, the number of training images")
    console = Console(width=None if sys.stdout.isatty() else 100)
    start = time.perf_counter()
    untrained, runs = train(digits.train, options.steps, options.batch_size, options.seed)
    generator = torch.Generator().manual_seed(options.seed + 1)
    augmented = [augment(digits.test, generator) for _ in range(AUGMENTED_COPIES)]
    probes = evaluate(untrained, runs, digits, augmented)
    result = Result(runs, probes, digits.test, augmented)

    console.print(main_table(result))
    relative = result.relative_difference()
    first = relative[:AGREEMENT_STEPS]
    console.print(
        f"Dense and fused NT-Xent, trained apart: relative difference of the losses at most {first.max():.1e} in the "
        f"first {len(first)} steps, {relative.max():.1e} in all {len(relative)} (float32 rounding: "
        f"{ROUNDING:.1e}).",
        highlight=False,
    )
    title = (
        f"{options.steps} steps of {options.batch_size} of {len(digits.train)} images, seed {options.seed}, "
        f"T = {TEMPERATURE}; torch {torch.__version__}, CPU threads: {torch.get_num_threads()}, "
        f"{time.perf_counter() - start:.0f} s"
    )
    file = options.output / "digits.png"
    draw(result, digits, title, file)
    console.print(f"{title}\nWritten: {file}", highlight=False, soft_wrap=True)
    return result


if __name__ == "__main__":
    main()
