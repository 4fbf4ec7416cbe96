"""Train two towers on several processes: the loss over all their rows, and what comes of it without ``group=``.

``torchrun --nproc-per-node 2 -m examples.distributed`` trains the towers of `large_batch` three times from the same
weights on the same batches. One process has the whole batch. Then every rank has its share of the rows, and
DistributedDataParallel (with ``--fsdp``: FSDP2) averages the gradients: once with ``group="world"``, whose curve must
be that of one process, and once without, as somebody does who forgets it. A row's negatives are then those of its own
rank, an easier task with a smaller loss. It runs on CPUs (gloo), and on GPUs (NCCL) where every process has one.
"""

from __future__ import annotations

import argparse
import copy
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
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import contrastive_kernels as ck
from benchmarks.options import at_least
from benchmarks.ranks import joined

from .digits import GREY, Digits, _style, load
from .large_batch import LEARNING_RATE, Batch, embeddings_of, make_batch, make_model, retrieval

ONE, ALL, OWN = "one process", 'group="world"', "no group"
COLORS = {ONE: "#E69F00", ALL: "#0072B2", OWN: "#CC79A7"}


class TwoTowers(nn.Module):
    """The towers of `large_batch` and their scale with one forward, as data parallelism wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = make_model()
        # FSDP2 shards no parameter without dimensions
        self.towers.log_scale = nn.Parameter(self.towers.log_scale.detach()[None])

    def forward(self, images: Tensor, views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the unit features of images and views, and the scale."""
        first, second = embeddings_of(self.towers, Batch(images, views, images), None)
        return first, second, self.towers.log_scale.exp().sum()  # FSDP2 warns about views


@dataclass
class Run:
    """The loss of each step, the seconds of all, and the retrieval accuracy with its standard error."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    accuracy: tuple[float, float] = (0.0, 0.0)


Runs = dict[str, Run]


def share(batch: Batch) -> Batch:
    """Return the rows of this rank; the shares of two ranks differ by at most one row."""
    parts = (value.tensor_split(dist.get_world_size())[dist.get_rank()] for value in vars(batch).values())
    return Batch(*parts)


def train(model: nn.Module, name: str, digits: Digits, options: argparse.Namespace, device: torch.device) -> Run:
    """Train the model on the batches of the seed, alone or with the other ranks, and test it."""
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    generator = torch.Generator().manual_seed(options.seed)
    run = Run()
    steps = range(options.steps)
    for _ in track(steps, name, transient=True, disable=not sys.stdout.isatty() or dist.get_rank() > 0):
        # Every rank draws the whole batch, for the comparison with one process.
        batch = make_batch(digits.train, options.batch_size, generator)
        if name != ONE:
            batch = share(batch)
        start = time.perf_counter()
        optimizer.zero_grad()
        features = model(batch.images.to(device), batch.views.to(device))
        loss = ck.clip_loss(*features, ids=batch.ids.to(device), group="world" if name == ALL else None)
        loss.backward()
        optimizer.step()
        value = loss.detach()
        if name != ONE:
            dist.all_reduce(value)
            value /= dist.get_world_size()
        run.losses.append(value.item())
        run.seconds += time.perf_counter() - start
    with torch.no_grad():
        test = make_batch(digits.test, len(digits.test), torch.Generator().manual_seed(0))
        run.accuracy = retrieval(*model(test.images.to(device), test.views.to(device))[:2])
    return run


def in_parallel(model: TwoTowers, fsdp: bool, device: torch.device) -> nn.Module:
    """Return a copy of the model whose gradients are averaged over the ranks."""
    model = copy.deepcopy(model)
    if fsdp:
        return fully_shard(model, mesh=init_device_mesh(device.type, (dist.get_world_size(),)))
    return DistributedDataParallel(model)


def difference(runs: Runs) -> float:
    """Return the largest relative difference of a step's loss between the ranks together and one process."""
    one, together = (np.array(runs[name].losses) for name in (ONE, ALL))
    return float((np.abs(together - one) / one).max())


def main_table(runs: Runs, digits: Digits) -> Table:
    """Return the losses, the accuracy and the time of the three trainings."""
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption="Loss: the first step → the mean of the last ten; without a group it has fewer negatives. Retrieval: "
        f"the image of a view among {len(digits.test)} test images, ± one standard error, one seed.",
    )
    table.add_column("trained")
    for header in ("loss", "retrieval %", "step ms"):
        table.add_column(header, justify="right")
    for name, run in runs.items():
        accuracy, error = run.accuracy
        table.add_row(
            name,
            f"{run.losses[0]:.4f} → {np.mean(run.losses[-10:]):.4f}",
            f"{100 * accuracy:.1f} ± {100 * error:.1f}",
            f"{1e3 * run.seconds / len(run.losses):.0f}",
        )
    return table


def draw(runs: Runs, subtitle: str, file: Path) -> None:
    """Draw the three loss curves into a PNG."""
    figure, axes = plt.subplots(figsize=(7.5, 4.6))
    figure.text(0.02, 0.97, "Several processes, one batch", va="top", fontsize=15, fontweight="bold")
    figure.text(0.02, 0.895, subtitle, va="top", fontsize=9.5, color=GREY)
    for name, width, alpha in ((ONE, 5, 0.55), (ALL, 1.3, 1), (OWN, 1.3, 1)):
        losses, label = runs[name].losses, f"{name}: retrieval {100 * runs[name].accuracy[0]:.1f} %"
        axes.plot(range(1, len(losses) + 1), losses, color=COLORS[name], linewidth=width, alpha=alpha, label=label)
    _style(axes, f'Loss; group="world" and one process differ by at most {difference(runs):.0e}')
    axes.set_xlabel("step", fontsize=8.5, color=GREY, loc="left")
    axes.legend(frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.85))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> Runs:
    """Parse the command line and train; rank 0 prints the table and draws the picture. Return the rank's runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 instead of DistributedDataParallel")
    parser.add_argument("--batch-size", type=at_least(2, int), default=512, help="rows of all ranks (default 512)")
    parser.add_argument("--steps", type=at_least(1, int), default=60, help="training steps of every run (default 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of the picture")
    options = parser.parse_args(arguments)

    digits = load(options.seed)
    torch.manual_seed(options.seed)
    model = TwoTowers()
    with joined() as device:
        world, first = dist.get_world_size(), dist.get_rank() == 0
        console = Console(width=None if sys.stdout.isatty() else 100, quiet=not first)
        if world == 1:
            console.print(
                "One process: there is nobody to gather from, and the three curves are one. For two, start it with\n"
                "torchrun --nproc-per-node 2 -m examples.distributed",
                highlight=False,
            )
        model.to(device)
        runs: Runs = {}
        if first:
            runs[ONE] = train(copy.deepcopy(model), ONE, digits, options, device)
        for name in (ALL, OWN):
            runs[name] = train(in_parallel(model, options.fsdp, device), name, digits, options, device)
    if first:
        wrapper = "FSDP2" if options.fsdp else "DistributedDataParallel"
        title = (
            f"{options.steps} steps of {options.batch_size} rows, {world} process{'es' * (world > 1)}, {wrapper}, "
            f"{device.type}; torch {torch.__version__}"
        )
        file = options.output / "distributed.png"
        draw(runs, title, file)
        console.print(main_table(runs, digits))
        console.print(
            f'group="world" and one process: relative difference of the losses at most {difference(runs):.1e} in '
            f"{options.steps} steps.\n{title}\nWritten: {file}",
            highlight=False,
            soft_wrap=True,
        )
    return runs


if __name__ == "__main__":
    main()
