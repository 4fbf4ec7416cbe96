"""Train two towers with batches whose activations would not fit: images of handwritten digits and distorted twins.

``python -m examples.large_batch`` learns which image a distorted view shows, with the loss of CLIP, at several batch
sizes. Each size is trained twice from the same weights on the same batches: with the activations of all rows in memory,
and with `contrastive_kernels.encode_in_chunks`, which holds those of one chunk. The curves must be one curve; the
memory is not. A large batch has more rows than there are images, and so several views of an image: ids leave them out
of each other's negatives.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import contrastive_kernels as ck
from benchmarks.measure import Step, peak_extra_mib
from benchmarks.options import at_least

from .digits import GREY, Digits, _style, augment, load

LEARNING_RATE = 2e-3
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass
class Run:
    """A model and its training: the loss of each step, the seconds of all, the peak MiB of one, the accuracy."""

    model: nn.ModuleDict
    peak_mib: float
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    accuracy: float = 0.0
    accuracy_error: float = 0.0


Runs = dict[tuple[int, bool], Run | None]


def make_model() -> nn.ModuleDict:
    """Return a tower for images and one for views, to 64 features each, without layers in which rows meet."""

    def tower() -> nn.Sequential:
        return nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.SiLU()),
            *(nn.Flatten(), nn.Linear(512, 128), nn.SiLU(), nn.Linear(128, 64)),
        )

    model = nn.ModuleDict({"image": tower(), "view": tower()})
    model.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.1)))
    return model


@dataclass(frozen=True)
class Batch:
    """Images, a distorted view of each, and ids that are equal where rows show the same image."""

    images: Tensor
    views: Tensor
    ids: Tensor


def make_batch(images: Tensor, n: int, generator: torch.Generator) -> Batch:
    """Return n rows in which every image occurs as often as the others but for one."""
    rounds = [torch.randperm(len(images), generator=generator) for _ in range(-(-n // len(images)))]
    ids = torch.cat(rounds)[:n]
    return Batch(images[ids], augment(images[ids], generator), ids)


def embeddings_of(model: nn.ModuleDict, batch: Batch, chunk_size: int | None) -> list[Tensor]:
    """Return the unit features of images and views, all rows at once or chunk by chunk."""
    towers = (model["image"], batch.images), (model["view"], batch.views)
    return [
        F.normalize(ck.encode_in_chunks(tower, rows, chunk_size) if chunk_size else tower(rows), dim=1)
        for tower, rows in towers
    ]


def loss_of(model: nn.ModuleDict, batch: Batch, chunk_size: int | None) -> Tensor:
    """Return the loss of CLIP of a batch."""
    return ck.clip_loss(*embeddings_of(model, batch, chunk_size), model.log_scale.exp(), ids=batch.ids)


def peak_mib(model: nn.ModuleDict, batch: Batch, chunk_size: int | None) -> float:
    """Return the peak memory of forward and backward of a step beyond the batch and the gradients."""
    parameters = dict(model.named_parameters())
    step = Step(
        lambda: loss_of(model, batch, chunk_size),
        lambda loss: dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)),
    )
    return peak_extra_mib(step, torch.device("cpu"))


def train(model: nn.ModuleDict, digits: Digits, n: int, chunk_size: int | None, steps: int, seed: int) -> Run:
    """Train a copy of the model on the batches of the seed, and test it."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    run = Run(model, peak_mib(model, make_batch(digits.train, n, torch.Generator().manual_seed(seed)), chunk_size))
    name = f"{n:,} rows, " + (f"chunks of {chunk_size}" if chunk_size else "all at once")
    for _ in track(range(steps), name, transient=True, disable=not sys.stdout.isatty()):
        batch = make_batch(digits.train, n, generator)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = loss_of(model, batch, chunk_size)
        loss.backward()
        optimizer.step()
        run.seconds += time.perf_counter() - start
        run.losses.append(loss.item())
    run.accuracy, run.accuracy_error = test(model, digits)
    return run


@torch.no_grad()
def test(model: nn.ModuleDict, digits: Digits) -> tuple[float, float]:
    """Return how often the test image nearest to a view is the one it shows, and the standard error."""
    batch = make_batch(digits.test, len(digits.test), torch.Generator().manual_seed(0))
    return retrieval(*embeddings_of(model, batch, None))


def retrieval(images: Tensor, views: Tensor) -> tuple[float, float]:
    """Return how often the nearest of the images to a view is its own, and the standard error."""
    hits = ((views @ images.T).argmax(1) == torch.arange(len(views), device=views.device)).double()
    return hits.mean().item(), (hits.std() / math.sqrt(len(hits))).item()


def main_table(runs: Runs, digits: Digits, chunk_size: int) -> Table:
    """Return memory, time, final loss and accuracy of every run."""
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption="Peak memory of forward + backward beyond batch and gradients. Loss: the mean of the last ten steps. "
        f"Retrieval: the image of a view among {len(digits.test)} test images, ± one standard error, one seed.",
    )
    for header in ("batch", "activations of"):
        table.add_column(header)
    for header in ("peak\nMiB", "step\nms", "loss", "retrieval\n%"):
        table.add_column(header, justify="right")
    for (n, chunked), run in runs.items():
        cells = [f"{n:,}", f"a chunk of {chunk_size}" if chunked else "the batch"]
        if run is None:
            table.add_row(*cells, "beyond the limit")
            continue
        retrieval = f"{100 * run.accuracy:.1f} ± {100 * run.accuracy_error:.1f}"
        ms = 1e3 * run.seconds / len(run.losses)
        table.add_row(*cells, f"{run.peak_mib:,.1f}", f"{ms:,.0f}", f"{np.mean(run.losses[-10:]):.3f}", retrieval)
    return table


def draw(runs: Runs, chunk_size: int, subtitle: str, file: Path) -> None:
    """Draw the loss curves with and without chunks, and the memory of both, into a PNG."""
    figure, (curves, memory) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=[1.5, 1])
    figure.text(0.02, 0.97, "Large batches in the memory of a chunk", va="top", fontsize=15, fontweight="bold")
    figure.text(0.02, 0.895, subtitle, va="top", fontsize=9.5, color=GREY)
    sizes = list(dict.fromkeys(n for n, _ in runs))
    for index, n in enumerate(sizes):
        color = COLORS[index % len(COLORS)]
        whole, chunked = runs[n, False], runs[n, True]
        steps = range(1, len(chunked.losses) + 1)
        if whole:
            curves.plot(steps, whole.losses, color=color, linewidth=5, alpha=0.35)
        curves.plot(steps, chunked.losses, color=color, linewidth=1.3, label=f"{n:,} rows")
    _style(curves, "Loss: wide and pale all rows at once, thin in chunks")
    curves.set_xlabel("step", fontsize=8.5, color=GREY, loc="left")
    curves.legend(frameon=False, fontsize=9, labelcolor="linecolor")
    panels: list[tuple[bool, str, str]] = [(False, GREY, "all rows"), (True, COLORS[0], f"chunks of {chunk_size}")]
    for chunks, color, label in panels:
        found = [(n, run.peak_mib) for (n, chunked), run in runs.items() if chunked is chunks and run]
        if found:
            memory.plot(*zip(*found, strict=True), color=color, marker="o", label=label)
    memory.set(xscale="log", yscale="log")
    memory.set_xticks(sizes, [f"{n:,}" for n in sizes])
    memory.minorticks_off()
    memory.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f} MiB")
    _style(memory, "Peak memory of forward + backward")
    memory.set_xlabel("rows of the batch", fontsize=8.5, color=GREY, loc="left")
    memory.legend(frameon=False, fontsize=9, labelcolor="linecolor")
    figure.tight_layout(rect=(0, 0, 1, 0.85))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> Runs:
    """Parse the command line, train, print the table and draw the picture; return the runs by size and chunks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--batch-sizes",
        nargs="+",
        type=at_least(2, int),
        default=[512, 2048, 8192],
        help="rows (default 512 2048 8192)",
    )
    parser.add_argument("--chunk-size", type=at_least(1, int), default=256, help="rows of a chunk (default 256)")
    parser.add_argument("--steps", type=at_least(1, int), default=60, help="training steps of every run (default 60)")
    parser.add_argument(
        "--memory-limit", type=float, default=math.inf, metavar="MIB",
        help="train without chunks only where a step takes at most this (default: always)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of the picture")
    options = parser.parse_args(arguments)

    digits = load(options.seed)
    torch.manual_seed(options.seed)
    model = make_model()
    # A step of few rows tells the memory of one with all rows without taking it.
    rows = 128
    few = make_batch(digits.train, rows, torch.Generator().manual_seed(options.seed))
    per_row = peak_mib(model, few, None) / rows
    console = Console(width=None if sys.stdout.isatty() else 100)
    start = time.perf_counter()
    runs: Runs = {}
    for n in options.batch_sizes:
        for chunk_size in (None, options.chunk_size):
            fits = chunk_size or n * per_row <= options.memory_limit
            run = train(model, digits, n, chunk_size, options.steps, options.seed) if fits else None
            runs[n, chunk_size is not None] = run
    console.print(main_table(runs, digits, options.chunk_size))
    title = (
        f"{options.steps} steps on views of {len(digits.train)} images, seed {options.seed}; torch "
        f"{torch.__version__}, CPU threads: {torch.get_num_threads()}, {time.perf_counter() - start:.0f} s"
    )
    file = options.output / "large_batch.png"
    draw(runs, options.chunk_size, title, file)
    console.print(f"{title}\nWritten: {file}", highlight=False, soft_wrap=True)
    return runs


if __name__ == "__main__":
    main()
