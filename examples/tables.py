"""Three tables of the literature, made small: trends on 8 x 8 digits, mean and spread over seeds.

- ``augmentations``: richer augmentations give better features, for losses of every kind (Huang, Yi, Zhao, Jiang, ICLR
  2023, who take them away one after another);
- ``views``: ArCL's minimum over 2, 4 and 6 views under augmentations that training has not seen (Zhao, Du, Wang, Yao,
  Huang, ICLR 2023);
- ``margin``: the distance polarization regulariser added to contrastive losses (Chen, Niu, Gong, Li, Yang, Sugiyama,
  ICML 2021), and the histogram of distances that it changes.

Two entries of a table are compared by the differences of their trainings with the same seed: a trend shows where the
mean difference is more than twice its standard error.

``python -m examples.tables`` takes about seven minutes. Networks, images and training are far smaller than the papers',
so that the table says which trends show at this size, not what the accuracies are elsewhere.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import contrastive_kernels as ck

from . import digits
from .digits import CHANGES, GREY, INK, Digits, augment, few_labels, load, make_model

TEMPERATURE, LEARNING_RATE = 0.2, 2e-3
MOMENTUM, QUEUE = 0.99, 1024
FEATURES = 64
# From the richest set to the poorest.
SETS = {
    "all": CHANGES,
    "no noise, no contrast": CHANGES[2:],
    "shear, rotation, zoom, shift": CHANGES[3:],
    "zoom, shift": CHANGES[5:],
    "shift": CHANGES[6:],
}
VIEWS = (2, 4, 6)
# Of the weights 10, 100, 1000 and 10,000 that one which leaves the fewest distances in the band.
BAND = ck.Polarization(lower=0.1, upper=0.45, weight=100.0)


class Learner(nn.Module):
    """An encoder with its projection head, and what some methods have beside it: a predictor, a target, a queue."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()
        hidden = FEATURES // 2
        self.predictor = nn.Sequential(
            nn.Linear(FEATURES, hidden, bias=False), nn.BatchNorm1d(hidden), nn.SiLU(), nn.Linear(hidden, FEATURES)
        )
        self.target = copy.deepcopy(self.model).requires_grad_(False)
        self.moco = ck.MoCoLoss(FEATURES, QUEUE, TEMPERATURE)

    def embed(self, views: Tensor) -> Tensor:
        """Return (V, N, D), the projections of views (V, N, 1, 8, 8)."""
        z: Tensor = self.model(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        return z

    @torch.no_grad()
    def target_of(self, views: Tensor) -> Tensor:
        """Move the target towards the model, and return its projections."""
        for own, other in zip(self.target.parameters(), self.model.parameters(), strict=True):
            own.lerp_(other, 1 - MOMENTUM)
        z: Tensor = self.target(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        return z

    def predict(self, z: Tensor) -> Tensor:
        """Return the predictions of projections (V, N, D)."""
        p: Tensor = self.predictor(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        return p


Method = Callable[[Learner, Tensor], Tensor]


def simclr(learner: Learner, views: Tensor) -> Tensor:
    z = learner.embed(views)
    return ck.nt_xent_loss(z[0], z[1], temperature=TEMPERATURE)


def moco(learner: Learner, views: Tensor) -> Tensor:
    loss: Tensor = learner.moco(learner.embed(views[:1])[0], learner.target_of(views[1:])[0])
    return loss


def barlow_twins(learner: Learner, views: Tensor) -> Tensor:
    z = learner.embed(views)
    return ck.barlow_twins_loss(z[0], z[1])


def simsiam(learner: Learner, views: Tensor) -> Tensor:
    z = learner.embed(views)
    p = learner.predict(z)
    return ck.simsiam_loss(p[0], z[0], p[1], z[1])


def byol(learner: Learner, views: Tensor) -> Tensor:
    p, z = learner.predict(learner.embed(views)), learner.target_of(views)
    return ck.byol_loss(p[0], z[0], p[1], z[1])


def arcl(learner: Learner, views: Tensor) -> Tensor:
    return ck.arcl_loss(learner.embed(views).transpose(0, 1), temperature=TEMPERATURE)


def simclr_margin(learner: Learner, views: Tensor) -> Tensor:
    z = learner.embed(views)
    return ck.nt_xent_loss(z[0], z[1], temperature=TEMPERATURE, polarization=BAND)


def info_nce(learner: Learner, views: Tensor) -> Tensor:
    z = learner.embed(views)
    return ck.info_nce_loss(z[0], z[1], temperature=TEMPERATURE)


def info_nce_margin(learner: Learner, views: Tensor) -> Tensor:
    z = learner.embed(views)
    return ck.info_nce_loss(z[0], z[1], temperature=TEMPERATURE, polarization=BAND)


METHODS: dict[str, Method] = {
    "SimCLR": simclr, "MoCo": moco, "Barlow Twins": barlow_twins, "SimSiam": simsiam, "BYOL": byol
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """An accuracy in percent for each seed."""

    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return float(np.mean(self.accuracies))

    @property
    def spread(self) -> float:
        """The standard deviation over the seeds; 0 for one."""
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else 0.0

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.spread:.1f}"


def verdict(larger: Entry, smaller: Entry) -> str:
    """Return whether one entry is larger, as predicted: the mean difference of equal seeds, and its standard error."""
    differences = np.subtract(larger.accuracies, smaller.accuracies)
    mean, count = float(differences.mean()), len(differences)
    if count < 2:
        return f"{mean:+.1f}, one seed"
    error = float(differences.std(ddof=1)) / math.sqrt(count)
    said = "within the spread" if abs(mean) <= 2 * error else "holds" if mean > 0 else "does not hold"
    return f"{said}: {mean:+.1f} ± {error:.1f}"


@dataclass(frozen=True)
class Outcome:
    """A row of a table: the entries in the order of its columns, and the published trend."""

    name: str
    entries: tuple[Entry, ...]
    published: str
    verdict: str


@dataclass(frozen=True)
class Training:
    """How long, on how much, and how often."""

    steps: int
    batch_size: int
    seeds: int
    done: Callable[[], None] = lambda: None

    def run(self, seed: int, method: Method, changes: Sequence[str], views: int = 2) -> tuple[Learner, Digits]:
        """Return a learner trained on the digits of a seed."""
        data = load(seed)
        torch.manual_seed(seed)
        learner = Learner()
        trained = [p for p in learner.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, LEARNING_RATE)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.steps):
            batch = data.train[torch.randperm(len(data.train), generator=generator)[: self.batch_size]]
            loss = method(learner, torch.stack([augment(batch, generator, changes) for _ in range(views)]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.done()
        return learner.eval(), data

    def entry(self, score: Callable[[Learner, Digits], float], method: Method, **options: object) -> Entry:
        """Return the scores of all seeds, in percent."""
        return Entry(tuple(100 * score(*self.run(seed, method, **options)) for seed in range(self.seeds)))  # type: ignore[arg-type]


@torch.no_grad()
def accuracy(learner: Learner, data: Digits, test: Tensor | None = None) -> float:
    """Return the accuracy of a linear probe after a few labels a class, on test images or on changed ones."""
    encoder = learner.model[0]
    return few_labels(encoder(data.train).numpy(), encoder(data.test if test is None else test), data)[0]


def shifted(learner: Learner, data: Digits) -> float:
    """Return the accuracy on test images that are moved further and turned further than any view of the training."""
    generator = torch.Generator().manual_seed(1)
    far = augment(augment(data.test, generator, ("shift", "rotation")), generator, ("shift", "rotation", "shear"))
    return accuracy(learner, data, far)


def augmentations(training: Training) -> list[Outcome]:
    """Train every method with every set of augmentations."""
    found = []
    for name, method in METHODS.items():
        entries = tuple(training.entry(accuracy, method, changes=changes) for changes in SETS.values())
        found.append(Outcome(name, entries, "falls as augmentations go", verdict(entries[0], entries[-1])))
    return found


def views(training: Training) -> list[Outcome]:
    """Train SimCLR, and ArCL with more and more views; test under augmentations beyond those of the training."""
    base = training.entry(shifted, simclr, changes=CHANGES)
    arcls = tuple(training.entry(shifted, arcl, changes=CHANGES, views=count) for count in VIEWS)
    published = f"above SimCLR with {VIEWS[-1]} views"
    return [
        Outcome("SimCLR", (base,), "", ""),
        Outcome("SimCLR + ArCL", arcls, published, verdict(arcls[-1], base)),
    ]


@dataclass(frozen=True)
class Margin:
    """The table of the margin, and for each method the distances of its negatives."""

    outcomes: list[Outcome]
    distances: dict[str, np.ndarray]


def margin(training: Training) -> Margin:
    """Train two losses without and with the regulariser."""
    outcomes, distances = [], {}
    pairs = {"SimCLR": (simclr, simclr_margin), "InfoNCE": (info_nce, info_nce_margin)}
    for name, methods in pairs.items():
        entries, inside = [], list[Entry]()
        for method, label in zip(methods, (name, f"{name} + margin"), strict=True):
            of_negatives: list[np.ndarray] = []

            def score(learner: Learner, data: Digits, of_negatives: list[np.ndarray] = of_negatives) -> float:
                of_negatives.append(negative_distances(learner, data))
                return accuracy(learner, data)

            entries.append(training.entry(score, method, changes=CHANGES))
            distances[label] = np.concatenate(of_negatives)
            shares = (((each > BAND.lower) & (each < BAND.upper)).mean() for each in of_negatives)
            inside.append(Entry(tuple(100 * float(share) for share in shares)))
        outcomes += [
            Outcome(f"{name}, accuracy", tuple(entries), "above the base", verdict(entries[1], entries[0])),
            Outcome(f"{name}, in the band", tuple(inside), "below the base", verdict(inside[0], inside[1])),
        ]
    return Margin(outcomes, distances)


@torch.no_grad()
def negative_distances(learner: Learner, data: Digits) -> np.ndarray:
    """Return (1 - cos) / 2 of all pairs of different test images."""
    z = F.normalize(learner.model(data.test), dim=1)
    rows, columns = torch.triu_indices(len(z), len(z), 1)
    distances: np.ndarray = ((1 - (z @ z.T)[rows, columns]) / 2).numpy()
    return distances


def table_of(title: str, headers: Sequence[str], outcomes: Sequence[Outcome]) -> Table:
    """Return a table of accuracies, the published trend and whether it shows."""
    found = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    found.add_column("method")
    for header in headers:
        found.add_column(header, justify="right", max_width=12)
    found.add_column("published")
    found.add_column("here, in that direction")
    for outcome in outcomes:
        cells = [*map(str, outcome.entries), *[""] * (len(headers) - len(outcome.entries))]
        found.add_row(outcome.name, *cells, outcome.published, outcome.verdict)
    return found


COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00")


def _style(axes: Axes, title: str) -> None:
    digits._style(axes, title)
    axes.set_ylabel("")


def draw(found: dict[str, list[Outcome] | Margin], caption: str, file: Path) -> None:
    """Draw the tables that were made."""
    figure, grid = plt.subplots(1, len(found), figsize=(5.2 * len(found), 4.6), squeeze=False)
    for axes, (name, result) in zip(grid[0], found.items(), strict=True):
        {"augmentations": _draw_augmentations, "views": _draw_views, "margin": _draw_margin}[name](axes, result)
    figure.text(0.01, 0.98, caption, va="top", fontsize=8.5, color=GREY)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _draw_augmentations(axes: Axes, outcomes: list[Outcome]) -> None:
    for outcome, color in zip(outcomes, COLORS, strict=False):
        means, spreads = [e.mean for e in outcome.entries], [e.spread for e in outcome.entries]
        axes.errorbar(range(len(SETS)), means, spreads, color=color, marker="o", capsize=2, label=outcome.name)
    axes.set_xticks(range(len(SETS)), [name.replace(", ", ",\n") for name in SETS])
    axes.legend(frameon=False, fontsize=8, labelcolor="linecolor")
    _style(axes, f"Accuracy after {digits.FEW} labels a class, %: fewer augmentations →")


def _draw_views(axes: Axes, outcomes: list[Outcome]) -> None:
    shown = [("SimCLR", outcomes[0].entries[0])]
    shown += [(f"ArCL,\n{count} views", entry) for count, entry in zip(VIEWS, outcomes[1].entries, strict=True)]
    for place, (_, entry) in enumerate(shown):
        color = COLORS[0] if place else GREY
        axes.errorbar(place, entry.mean, entry.spread, color=color, marker="o", capsize=3)
        axes.plot([place + 0.12] * len(entry.accuracies), entry.accuracies, ".", color=color, alpha=0.5)
        axes.annotate(
            f"{entry.mean:.1f}",
            (place, entry.mean),
            (-8, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8,
            color=INK,
        )
    axes.set_xticks(range(len(shown)), [name for name, _ in shown])
    axes.set_xlim(-0.6, len(shown) - 0.4)
    _style(axes, "Accuracy on images changed beyond the training, %")


def _draw_margin(axes: Axes, result: Margin) -> None:
    for (name, distances), color in zip(result.distances.items(), COLORS, strict=False):
        style = "-" if "margin" in name else "--"
        axes.hist(distances, 60, range=(0, 1), density=True, histtype="step", color=color, label=name, linestyle=style)
    axes.axvspan(BAND.lower, BAND.upper, color=GREY, alpha=0.12, lw=0)
    axes.legend(frameon=False, fontsize=8, labelcolor="linecolor")
    axes.set_xlabel("distance (1 − cos) / 2 of test images; grey: the band to be emptied", fontsize=8.5, color=GREY)
    _style(axes, "Distances without and with the regulariser, density")


TABLES: dict[str, Callable[[Training], list[Outcome] | Margin]] = {
    "augmentations": augmentations,
    "views": views,
    "margin": margin,
}
RUNS = {"augmentations": len(METHODS) * len(SETS), "views": 1 + len(VIEWS), "margin": 4}


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Outcome] | Margin]:
    """Train, print the tables and draw the picture; return what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--steps", type=int, default=100, help="training steps of every network (default 100)")
    parser.add_argument("--batch-size", type=int, default=256, help="images a step (default 256)")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each entry (default 5)")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of the picture")
    options = parser.parse_args(arguments)
    if not 2 <= options.batch_size <= 1347 or options.seeds < 1 or options.steps < 1:
        parser.error("--batch-size must be from 2 to 1347, --seeds and --steps at least 1")
    console = Console(width=None if sys.stdout.isatty() else 140)
    found: dict[str, list[Outcome] | Margin] = {}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Training", total=options.seeds * sum(RUNS[name] for name in options.only))
        training = Training(options.steps, options.batch_size, options.seeds, lambda: progress.advance(task))
        for name in options.only:
            found[name] = TABLES[name](training)
    headers = {"augmentations": list(SETS), "views": [f"{n} views" for n in VIEWS], "margin": ["base", "with margin"]}
    titles = {
        "augmentations": f"Accuracy after {digits.FEW} labels a class, %",
        "views": "Accuracy on test images changed further than in training, %",
        "margin": f"Accuracy after {digits.FEW} labels a class, and distances in ({BAND.lower}, {BAND.upper}), %",
    }
    for name, result in found.items():
        outcomes = result.outcomes if isinstance(result, Margin) else result
        console.print(table_of(titles[name], headers[name], outcomes))
    caption = (
        f"Mean ± standard deviation over {options.seeds} seeds; {options.steps} steps of {options.batch_size} images, "
        f"torch {torch.__version__}."
    )
    file = options.output / "tables.png"
    draw(found, caption, file)
    console.print(f"{caption}\nWritten: {file}", highlight=False, soft_wrap=True)
    return found


if __name__ == "__main__":
    main()
