"""``torchrun --nproc-per-node 2 -m benchmarks.distributed``: losses over all rows of a group, ours and published ones.

A case is a whole batch of N rows, of which every rank has an equal share. Timed are forward and backward of the loss,
from when all ranks begin until the last has finished. The same batch in one process, on rank 0 while the others wait,
tells the efficiency: its time over the number of ranks times theirs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table

from . import report
from .cases import (
    CHECK_ROWS,
    LOSSES,
    Case,
    Inputs,
    LossFunction,
    exact_results,
    gradients,
    unexplained,
    value_and_gradients,
)
from .eager import Unavailable
from .measure import Step, peak_extra_mib, spreads_of, time_once
from .options import add_without_cpp, at_least, refuse_without_cpp
from .peers import loss_function, version
from .published import PEERS
from .ranks import joined
from .run import Grid, Row, Settings, environment, first_line, row_of

OURS, ONE = "ours", "one-process"
PROVIDERS = (OURS, ONE, *PEERS)
CORE = ("clip", "nt_xent", "info_nce", "siglip")
SIZES, DIMS, DTYPES = (1024, 4096, 16384), (128, 512), ("float32", "bfloat16", "float64")
MOST_ROUNDS = 100

T = TypeVar("T")


def on_all_ranks(function: Callable[[], T]) -> list[T]:
    """Return what a function returns on every rank; raise `Unavailable` on all of them if it raises on any."""
    outcome: T | Unavailable
    try:
        outcome = function()
    except Unavailable as reason:
        outcome = reason
    except Exception as error:  # whatever it is, the other ranks wait for an answer
        outcome = Unavailable(first_line(error))
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    for outcome in outcomes:
        if isinstance(outcome, Unavailable):
            raise outcome
    return outcomes


def share(values: Inputs) -> Inputs:
    """Return this rank's rows of some tensors, copied; a scalar is the same on all ranks."""
    world, rank = dist.get_world_size(), dist.get_rank()
    return {
        name: (value.detach().chunk(world)[rank] if value.ndim else value.detach())
        .clone()
        .requires_grad_(value.requires_grad)
        for name, value in values.items()
    }


def function_of(provider: str, loss: str) -> LossFunction:
    """Return the function by which a provider computes a loss over the rows of all ranks."""
    if provider == OURS:
        return partial(LOSSES[loss].ours, group="world")
    return loss_function(provider, loss, PEERS)


def check(provider: str, case: Case, device: torch.device) -> None:
    """Raise `Unavailable` unless the mean over the ranks is the value of one process in float64, and the gradients."""
    world = dist.get_world_size()
    small = replace(case, n=-(-CHECK_ROWS // (2 * world)) * 2 * world)
    inputs, exact = small.inputs(device), share(exact_results(small, device))
    allowed = share(value_and_gradients(LOSSES[case.loss].eager, inputs))
    found = value_and_gradients(function_of(provider, case.loss), share(inputs))
    for value in found.values():
        if not value.ndim:
            dist.all_reduce(value)
    found = {name: value / world for name, value in found.items()}
    if wrong := unexplained(found, allowed, exact, case.dtype):
        raise Unavailable(f"differs from float64 on rank {dist.get_rank()}: {wrong}")


def step_of(provider: str, case: Case, device: torch.device) -> Step:
    """Return forward and backward of a provider on this rank; only rank 0 has something to do in one process."""
    alone = provider == ONE
    if alone and dist.get_rank() > 0:
        return Step(lambda: torch.zeros(()), lambda loss: {})
    inputs = case.inputs(device)
    if not alone:
        inputs = share(inputs)
    function = LOSSES[case.loss].ours if alone else function_of(provider, case.loss)
    return Step(lambda: function(**inputs), lambda loss: gradients(loss, inputs))


def prepare(provider: str, case: Case, settings: Settings) -> tuple[Step, float]:
    """Return a provider's step, checked and run once, and the largest of the ranks' peaks of memory."""
    if reason := case.refusal():
        raise Unavailable(reason)
    if case.n % (2 * dist.get_world_size()):
        raise Unavailable(f"N = {case.n:,} gives {dist.get_world_size()} ranks no equal shares of pairs")
    if provider in PEERS and (needed := case.dense_gib(provider)) > settings.memory_limit_gib:
        raise Unavailable(f"N = {case.n:,} needs about {needed:.0f} GiB on all ranks together")
    if provider != ONE:
        on_all_ranks(partial(check, provider, case, settings.device))
    step = step_of(provider, case, settings.device)
    return step, max(on_all_ranks(partial(peak_extra_mib, step, settings.device)))


Times = dict[str, list[tuple[float, float]]]


def time_together(steps: Mapping[str, Step], settings: Settings) -> tuple[Times, dict[str, str]]:
    """Return the slowest rank's milliseconds of forward and backward by provider, and the reasons of those that raised.

    The providers run in turn, round after round; the ranks know the same times and so end with the same round.
    """
    samples: Times = {name: [] for name in steps}
    notes: dict[str, str] = {}
    for finished in range(MOST_ROUNDS):
        spent = sum(sum(times) for found in samples.values() for times in found)
        if finished >= settings.min_rounds and spent > 1e3 * settings.seconds:
            break
        for name in list(samples):
            try:
                found = on_all_ranks(partial(time_once, steps[name], settings.device))
            except Unavailable as reason:
                notes[name] = str(reason)
                del samples[name]
                continue
            forward, backward = zip(*(times for (times,) in found), strict=True)
            samples[name].append((max(forward), max(backward)))
    return samples, notes


def measure_case(case: Case, providers: Sequence[str], settings: Settings, where: Mapping[str, str | int]) -> list[Row]:
    """Check and time the providers of a case; return the rows, the same on all ranks."""
    steps, peaks, notes = {}, {}, {}
    for provider in providers:
        try:
            steps[provider], peaks[provider] = prepare(provider, case, settings)
        except Unavailable as reason:
            notes[provider] = str(reason)
    times, raised = time_together(steps, settings)

    def row(provider: str, mode: str, **measured: Any) -> Row:
        ranks = 1 if provider == ONE else dist.get_world_size()
        return row_of(case, provider, mode, where | {"ranks": ranks, "version": version(provider, PEERS)}, **measured)

    rows = [
        row(provider, mode, spread=spread, peak_mib=peaks[provider])
        for provider, samples in times.items()
        for mode, spread in spreads_of(samples).items()
    ]
    return rows + [row(provider, "both", note=note) for provider, note in (notes | raised).items()]


def efficiency(row: Row, rows: Sequence[Row]) -> float | None:
    """Return the time of one process over that of all ranks together; None if it was not measured."""
    one = [other for other in rows if other.provider == ONE and (other.case, other.mode) == (row.case, row.mode)]
    return one[0].ms_50 / (row.ranks * row.ms_50) if one and one[0].ms_50 and row.provider != ONE else None


def main_table(rows: Sequence[Row]) -> Table:
    """Return time, memory and efficiency of every provider, one section per case."""
    first = rows[0]
    versions = "".join(dict.fromkeys(f", {row.provider} {row.version}" for row in rows if row.version))
    table = Table(
        title=f"{first.device}, {max(row.ranks for row in rows)} ranks, CPU threads of each: {first.threads}, torch "
        f"{first.torch}{versions}",
        caption="Medians (20–80 %), the slowest rank. Peak: of a rank, beyond inputs and gradients. Efficiency: the "
        "time of one process over ranks × time.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("loss\n  provider")
    headers = "N, D, dtype\nforward ms", "\nforward + backward ms", "\n× ours", "peak\nMiB", "effi-\nciency"
    for header in headers:
        table.add_column(header, justify="right")
    for (loss, n, d, dtype), group in groupby(report.timed(rows), key=lambda row: row.case):
        both = list(group)
        forward = {row.provider: row.ms_50 for row in report.timed(rows, "fwd") if row.case == (loss, n, d, dtype)}
        ours = next((row.ms_50 for row in both if row.provider == OURS), None)
        table.add_section()
        table.add_row(loss, f"{n:,}, {d}, {dtype}", style="cyan")
        for row in both:
            found = efficiency(row, both)
            median, low, high = (report.milliseconds(ms) for ms in (row.ms_50, row.ms_20, row.ms_80))
            table.add_row(
                f"  {row.provider}",
                report.milliseconds(forward[row.provider]),
                f"{median} ({low}–{high})",
                f"{row.ms_50 / ours:.2f}" if ours else "",
                f"{row.peak_mib:,.1f}",
                f"{found:.0%}" if found else "",
                style="bold" if row.provider == OURS else None,
            )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and measure; rank 0 prints the table and writes the files. Return the exit status."""
    parser = argparse.ArgumentParser(prog="torchrun -m benchmarks.distributed", description=__doc__.splitlines()[0])
    parser.add_argument("--losses", nargs="+", choices=CORE, metavar="LOSS", default=CORE, help=", ".join(CORE))
    parser.add_argument("--sizes", nargs="+", type=int, metavar="N", default=SIZES, help="rows of all ranks together")
    parser.add_argument("--dims", nargs="+", type=at_least(1, int), metavar="D", default=DIMS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES[:1])
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=PROVIDERS)
    parser.add_argument(
        "--seconds", type=at_least(0, float), default=5.0, help="timing budget of a case, shared by its providers"
    )
    parser.add_argument("--min-rounds", type=at_least(1, int), default=3, help="least runs of each provider")
    parser.add_argument(
        "--memory-limit", type=at_least(0, float), default=8.0, help="GiB that all ranks of a peer may take together"
    )
    parser.add_argument("--output", type=Path, default=Path("results/distributed"), help="folder of the files")
    add_without_cpp(parser)
    options = parser.parse_args(arguments)
    try:
        earlier = report.read(options.output)
    except (OSError, ValueError, TypeError) as error:  # no folder, no JSON, or columns of another version
        parser.error(f"--output {options.output} cannot be read: {error}")

    dtypes = [getattr(torch, dtype) for dtype in options.dtypes]
    rows: list[Row] = []
    with joined() as device:
        refuse_without_cpp(parser, options, device)
        first = dist.get_rank() == 0
        console = Console(width=None if sys.stdout.isatty() else 100, quiet=not first)
        settings = Settings(device, options.seconds, options.min_rounds, options.memory_limit)
        where = environment(device)
        for case, providers in Grid(options.losses, options.sizes, options.dims, dtypes, options.providers):
            # a peer that is for another loss needs no row
            mine = [name for name in providers if name not in PEERS or case.loss in PEERS[name].losses]
            rows += (found := measure_case(case, mine, settings, where))
            times = [f"{row.provider} {row.ms_50:,.1f} ms" for row in report.timed(found)]
            console.print(f"{case}: {', '.join(times)}", highlight=False, soft_wrap=True)
            if first:
                report.write(report.merge(earlier, rows), options.output)
    if first:
        if report.timed(rows):
            console.print(main_table(rows))
        for line in report.not_timed(rows):
            console.print(line, highlight=False)
        written = [options.output / "results.csv", *report.draw(rows, options.output, console)]
        console.print(f"Written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
    return 0 if report.timed(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
