"""``python -m benchmarks.adapters``: every adapter of `contrastive_kernels.compat` beside the loss it stands in for."""

from __future__ import annotations

import argparse
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from contrastive_kernels.compat.check.case import TOLERANCE, difference
from contrastive_kernels.compat.check.command import Library

from . import libraries, report
from .cases import gradients
from .libraries import Rows, sentences
from .measure import MIB, Spread, Step, peak_extra_mib, time_interleaved
from .options import add_without_cpp, at_least, refuse_without_cpp
from .run import Row, environment, first_line

SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
OURS, ORIGINAL = "ours", "original"
TEMPERATURE = 0.1
BANK = 4096
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Adapter:
    """A loss of a library, from a batch of N samples.

    Args:
        module: the name of the adapter's module.
        name: the public name.
        inputs: makes the inputs from N and D.
        make: returns the loss, a function of the inputs, from the adapter or the library.
        dims: the D that are measured.
        matrices: about how many N x N matrices the original holds at its peak.
    """

    module: str
    name: str
    inputs: Callable[[int, int], Inputs]
    make: Callable[[Any], Callable[..., Tensor]]
    dims: tuple[int, ...] = (128,)
    matrices: Callable[[int], float] = lambda n: 20.0

    def __str__(self) -> str:
        return f"{self.module} {self.name}"


def _unit(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(shape), dim=-1)


def _pair(n: int, d: int) -> Inputs:
    first = _unit(n, d)
    return {"a": first, "b": torch.nn.functional.normalize(first + 0.65 * _unit(n, d), dim=-1)}


def _scaled(n: int, d: int) -> Inputs:
    return _pair(n, d) | {"scale": torch.tensor(1 / 0.07)}


def _biased(n: int, d: int) -> Inputs:
    return _pair(n, d) | {"scale": torch.tensor(10.0), "bias": torch.tensor(-10.0)}


def _distilled(n: int, d: int) -> Inputs:
    teacher = {f"teacher_{name}": x for name, x in _pair(n, d).items()}
    return _scaled(n, d) | teacher


def _distillation(module: Any) -> Callable[..., Tensor]:
    loss = module.DistillClipLoss()

    def function(a: Tensor, b: Tensor, scale: Tensor, teacher_a: Tensor, teacher_b: Tensor) -> Tensor:
        return sum(loss(a, b, scale, teacher_a, teacher_b, 1 / 0.07))

    return function


def _of_both(loss: Callable[..., Tensor], per_class: int = 2) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a loss of the rows of both views with labels: as many rows of a class as said."""

    def function(a: Tensor, b: Tensor) -> Tensor:
        labels = torch.arange(2 * len(a)) % max(1, 2 * len(a) // per_class)
        return loss(torch.cat([a, b]), labels)

    return function


def _ranking(name: str, **options: Any) -> Callable[[Any], Callable[[Tensor, Tensor], Tensor]]:
    def make(module: Any) -> Callable[[Tensor, Tensor], Tensor]:
        loss = getattr(module, name)(Rows(), scale=1 / TEMPERATURE, **options)
        if "Cached" not in name:
            return lambda a, b: loss(sentences(a, b), None)
        return lambda a, b: libraries.by_backward(lambda *rows: loss(sentences(*rows), None), a, b)

    return make


def _simclr(module: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return solo-learn's SimCLR, of which older releases take both views apart."""
    if "indexes" not in inspect.signature(module.simclr_loss_func).parameters:
        return lambda a, b: module.simclr_loss_func(a, b, TEMPERATURE)
    return lambda a, b: module.simclr_loss_func(torch.cat([a, b]), torch.arange(len(a)).repeat(2), TEMPERATURE)


# Where every positive pair holds a row of the matrix of its own.
def _cubic(n: int) -> float:
    return 4.3 * n


ADAPTERS = (
    Adapter("info_nce", "InfoNCE", _pair, lambda m: m.InfoNCE(TEMPERATURE)),
    Adapter("lightly", "NTXentLoss", _pair, lambda m: m.NTXentLoss(TEMPERATURE)),
    Adapter(
        "lightly", "NTXentLoss with a bank", _pair, lambda m: m.NTXentLoss(TEMPERATURE, memory_bank_size=(BANK, 128))
    ),
    Adapter("lightly", "DCLLoss", _pair, lambda m: m.DCLLoss(TEMPERATURE)),
    Adapter("lightly", "BarlowTwinsLoss", _pair, lambda m: m.BarlowTwinsLoss()),
    Adapter("lightly", "VICRegLoss", _pair, lambda m: m.VICRegLoss()),
    Adapter("open_clip", "ClipLoss", _scaled, lambda m: m.ClipLoss()),
    Adapter("open_clip", "SigLipLoss", _biased, lambda m: m.SigLipLoss()),
    Adapter("open_clip", "DistillClipLoss", _distilled, _distillation),
    Adapter(
        "pytorch_metric_learning", "NTXentLoss", _pair, lambda m: _of_both(m.NTXentLoss(TEMPERATURE)), (128,), _cubic
    ),
    Adapter(
        "pytorch_metric_learning",
        "SupConLoss",
        _pair,
        lambda m: _of_both(m.SupConLoss(TEMPERATURE), 16),
        matrices=lambda n: 52.0,
    ),
    Adapter(
        "sentence_transformers",
        "MultipleNegativesRankingLoss",
        _pair,
        _ranking("MultipleNegativesRankingLoss"),
        (384, 768),
    ),
    Adapter(
        "sentence_transformers",
        "CachedMultipleNegativesRankingLoss",
        _pair,
        _ranking("CachedMultipleNegativesRankingLoss", mini_batch_size=256),
        (384,),
        lambda n: 0.0,
    ),
    Adapter(
        "solo",
        "simclr_loss_func",
        _pair,
        _simclr,
    ),
    Adapter("stable_pretraining", "NTXEntLoss", _pair, lambda m: m.NTXEntLoss(TEMPERATURE)),
    Adapter("torchmultimodal", "ContrastiveLossWithTemperature", _pair, lambda m: m.ContrastiveLossWithTemperature()),
)


def inputs_of(adapter: Adapter, n: int, d: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Return inputs from a fixed seed; a teacher's have no gradient."""
    torch.manual_seed(0)
    inputs = {name: x.to(dtype) for name, x in adapter.inputs(n, d).items()}
    return {name: x.requires_grad_("teacher" not in name) for name, x in inputs.items()}


def step_of(adapter: Adapter, module: Any, inputs: Inputs) -> Step:
    """Return one iteration of a loss."""
    function = adapter.make(module)
    return Step(lambda: function(*inputs.values()), lambda loss: gradients(loss, inputs))


def disagreement(adapter: Adapter, ours: Any, original: Any) -> float:
    """Return how far value and gradients are apart in float64, relative."""
    found = []
    for module in (ours, original):
        dtype = torch.float32 if "bank" in adapter.name else torch.float64  # lightly's bank is float32
        inputs = inputs_of(adapter, 33, 128, dtype)
        torch.manual_seed(0)
        step = step_of(adapter, module, inputs)
        loss = step.forward()
        found.append({"loss": loss.detach()} | dict(step.backward(loss)))
    return difference(*found)


def tolerance(adapter: Adapter) -> float:
    """Return how far they may be apart: a rounding of float32 times a few, where lightly's bank takes nothing else."""
    return 1e-5 if "bank" in adapter.name else TOLERANCE


def measure(
    adapters: Sequence[Adapter], sizes: Sequence[int], seconds: float, limit_gib: float, console: Console
) -> Iterator[list[Row]]:
    """Time adapter and original in turn, round after round; yield the rows of each size."""
    where = environment(torch.device("cpu"))
    for adapter in adapters:
        library = Library(adapter.module)
        try:
            modules = dict(zip((OURS, ORIGINAL), libraries.adapter_and_original(adapter.module), strict=True))
        except ImportError as error:
            console.print(f"{adapter}: {first_line(error)}", highlight=False)
            continue
        if (apart := disagreement(adapter, *modules.values())) > tolerance(adapter):
            console.print(f"{adapter}: not timed, it differs by {apart:.1e}", highlight=False)
            continue
        where["version"] = library.version or ""
        for d in adapter.dims:
            for n in sizes:
                yield _measure_size(adapter, modules, n, d, seconds, limit_gib, where)


def _measure_size(
    adapter: Adapter,
    modules: Mapping[str, Any],
    n: int,
    d: int,
    seconds: float,
    limit_gib: float,
    where: Mapping[str, str | int],
) -> list[Row]:
    inputs = inputs_of(adapter, n, d)
    needed = adapter.matrices(n) * n * n * 4 / 2**30
    steps = {
        provider: step_of(adapter, module, inputs)
        for provider, module in modules.items()
        if provider == OURS or needed <= limit_gib
    }
    peaks = {provider: peak_extra_mib(step, torch.device("cpu")) for provider, step in steps.items()}
    for step in steps.values():
        step.run()
    times, errors = time_interleaved(steps, torch.device("cpu"), seconds=seconds, min_rounds=3, max_rounds=400)
    notes = {provider: first_line(error) for provider, error in errors.items()}
    notes |= {provider: f"needs about {needed:.0f} GiB" for provider in modules if provider not in steps}

    def row(provider: str, mode: str, spread: Spread | None = None, note: str = "") -> Row:
        return Row(
            loss=str(adapter),
            provider=provider,
            mode=mode,
            n=n,
            m=n,
            d=d,
            dtype="float32",
            **(spread or Spread(None, None, None))._asdict(),
            peak_mib=peaks.get(provider) if mode == "both" else None,
            tflops=None,
            matmul_fraction=None,
            note=note,
            **where,
        )

    rows = [row(provider, mode, spread) for provider, modes in times.items() for mode, spread in modes.items()]
    return rows + [row(provider, "both", note=note) for provider, note in notes.items()]


def largest_batch(row: Row, limit_gib: float) -> float:
    """Return the N that fits beside its inputs and gradients, by the peak of the largest N measured.

    That of the original grows with N², ours with N.
    """
    held = 4 * row.n * row.d * 4 / MIB
    if row.provider == OURS:
        return 1024 * limit_gib * row.n / (held + row.peak_mib)
    # peak n² + held n = limit, in units of the measured N
    return row.n * (math.sqrt(held**2 + 4 * row.peak_mib * 1024 * limit_gib) - held) / (2 * row.peak_mib)


def table(rows: Sequence[Row], limit_gib: float) -> Table:
    """Return the time of each original over ours at every size, and the memory at the largest."""
    sizes = sorted({row.n for row in rows})
    first = rows[0]
    found = Table(
        title=f"Time of the original over ours, {first.device}, {first.threads} threads, torch {first.torch}",
        caption="Medians of forward + backward, float32. MiB: peak beyond inputs and gradients at the largest N "
        f"measured of both. Batch: N that fits into {limit_gib:g} GiB, extrapolated from there.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    found.add_column("adapter, D")
    for n in sizes:
        found.add_column(f"N =\n{n:,}", justify="right")
    for header in ("original\nMiB", "ours\nMiB", "original\nbatch", "ours\nbatch"):
        found.add_column(header, justify="right")
    both = sorted(report.timed(rows), key=lambda row: (row.loss, row.d))
    for (loss, d), group in groupby(both, key=lambda row: (row.loss, row.d)):
        by_n: dict[int, dict[str, Row]] = {}
        for row in group:
            by_n.setdefault(row.n, {})[row.provider] = row
        ratios = {n: at[ORIGINAL].ms_50 / at[OURS].ms_50 for n, at in by_n.items() if len(at) == 2}
        cells = [f"{ratios[n]:.2f}" if n in ratios else "" for n in sizes]
        largest = by_n[max(ratios)] if ratios else {}
        memory = [f"{largest[p].peak_mib:,.0f}" if largest else "" for p in (ORIGINAL, OURS)]
        batches = [
            f"{int(float(f'{largest_batch(largest[p], limit_gib):.2g}')):,}" if largest else ""
            for p in (ORIGINAL, OURS)
        ]
        found.add_row(f"{loss}, {d}", *cells, *memory, *batches)
    return found


def draw(rows: Sequence[Row], folder: Path) -> Path:
    """Draw over the batch how many times as long the originals take as ours, and how much more memory."""
    both = report.timed(rows)
    pairs: dict[tuple[str, int], dict[int, dict[str, Row]]] = {}
    for row in both:
        pairs.setdefault((row.loss, row.d), {}).setdefault(row.n, {})[row.provider] = row
    figure, (time, memory) = plt.subplots(1, 2, figsize=(11, 6.6), sharex=True)
    colors, every_n = plt.get_cmap("tab20").colors, sorted({row.n for row in both})
    for k, ((loss, d), by_n) in enumerate(pairs.items()):
        sizes = sorted(n for n, at in by_n.items() if len(at) == 2)
        ratios = [by_n[n][ORIGINAL].ms_50 / by_n[n][OURS].ms_50 for n in sizes]
        # below a MiB the allocator's rounding is what is compared
        large = [n for n in sizes if by_n[n][ORIGINAL].peak_mib > 1]
        peaks = [by_n[n][ORIGINAL].peak_mib / by_n[n][OURS].peak_mib for n in large]
        style = {"color": colors[k % len(colors)], "marker": "os^v<>d"[k % 7], "markersize": 4, "linewidth": 1.4}
        library, _, name = loss.partition(" ")
        label = f"{library.replace('_', '-')} {name}" + (f", D = {d}" if d != 128 else "")
        time.plot(sizes, ratios, label=label, **style)
        memory.plot(large, peaks, **style)
    for axes, title in ((time, "Time of the original over ours"), (memory, "Peak memory of the original over ours")):
        axes.set(xscale="log", yscale="log")
        axes.axhline(1, color="#222222", linewidth=1)
        axes.set_xticks(every_n, [f"{n:,}" for n in every_n], fontsize=8)
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
        axes.set_xlabel("samples of the batch", fontsize=8.5, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e2e2e2", linewidth=0.7)
    first = rows[0]
    source = (
        f"{first.device}, {first.threads} threads, torch {first.torch}, float32, D = 128 unless said, {first.date}."
    )
    figure.text(0.01, 0.005, source, fontsize=8, color="#777777")
    figure.legend(loc="lower center", bbox_to_anchor=(0.5, 0.03), ncols=3, fontsize=7, columnspacing=1.2, frameon=False)
    figure.tight_layout(rect=(0, 0.24, 1, 1))
    file = folder / "adapters.png"
    figure.savefig(file, dpi=150)
    plt.close(figure)
    return file


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the files; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters", description=__doc__)
    known = sorted({adapter.module for adapter in ADAPTERS})
    parser.add_argument(
        "--libraries", dest="modules", nargs="+", choices=known, metavar="LIBRARY", default=known, help=", ".join(known)
    )
    parser.add_argument("--sizes", nargs="+", type=int, metavar="N", default=SIZES, help="samples of the batch")
    parser.add_argument("--seconds", type=at_least(0, float), default=1.0, help="timing budget of a size")
    parser.add_argument("--memory-limit", type=at_least(0, float), default=8.0, help="GiB that an original may take")
    parser.add_argument("--output", type=Path, default=Path("results/adapters"), help="folder of the files")
    add_without_cpp(parser)
    options = parser.parse_args(arguments)
    refuse_without_cpp(parser, options, torch.device("cpu"))
    console = Console(width=None if sys.stdout.isatty() else 140)
    earlier, rows = report.read(options.output), list[Row]()
    chosen = [adapter for adapter in ADAPTERS if adapter.module in options.modules]
    for found in measure(chosen, options.sizes, options.seconds, options.memory_limit, console):
        rows += found
        times = [f"{row.provider} {row.ms_50:,.2f} ms" for row in report.timed(found)]
        console.print(f"{found[0].loss} N={found[0].n:,} D={found[0].d}: {', '.join(times)}", highlight=False)
        report.write(report.merge(earlier, rows), options.output)
    if report.timed(rows):
        console.print(table(rows, options.memory_limit))
    for line in report.not_timed(rows):
        console.print(line, highlight=False)
    written = [options.output / "results.csv", draw(report.merge(earlier, rows), options.output)]
    console.print(f"Written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
    return 0 if report.timed(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
