"""The results of a run: the tables on the screen, the CSV and the JSON."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from .cases import LOSSES, Case
from .measure import MIB
from .run import COLUMNS, Row

# Up to 4 MiB of similarities are saved for the backward, and chunks and strips have a least size: below these rows the
# memory of a provider says nothing about larger batches.
LEAST_ROWS = 4096


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write ``results.csv`` and ``results.json`` into ``folder``; an interrupt leaves the files that were there."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "results.csv.new").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    (folder / "results.json.new").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    for name in ("results.csv", "results.json"):
        os.replace(folder / f"{name}.new", folder / name)


def read(folder: Path) -> list[Row]:
    """Return the rows that `write` wrote into ``folder``, none if there is no such file."""
    file = folder / "results.json"
    return [Row(**row) for row in json.loads(file.read_text())] if file.exists() else []


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Return ``old`` and ``new`` without the old rows of a case, provider, device, ranks and threads of ``new``."""

    def key(row: Row) -> tuple[object, ...]:
        return row.case, row.provider, row.device, row.ranks, row.threads

    again = {key(row) for row in new}
    return [*(row for row in old if key(row) not in again), *new]


def draw(rows: Sequence[Row], folder: Path, console: Console) -> list[Path]:
    """Write the pictures and return their files; say so and return none where matplotlib is missing."""
    try:
        from . import plot
    except ImportError as error:
        console.print(f"No picture: {error}", highlight=False)
        return []
    return plot.draw(rows, folder)


def speed_up(row: Row, rows: Sequence[Row]) -> float | None:
    """Return the time of eager over that of ``row`` in the same case and mode; None if eager was not timed."""
    eager = [other for other in rows if other.provider == "eager" and (other.case, other.mode) == (row.case, row.mode)]
    return eager[0].ms_50 / row.ms_50 if eager and eager[0].ms_50 else None


def timed(rows: Sequence[Row], mode: str = "both") -> list[Row]:
    """Return the rows of ``mode`` that have a time."""
    return [row for row in rows if row.mode == mode and row.ms_50 is not None]


def significant(value: float, units: Sequence[tuple[float, str]]) -> str:
    """Format ``value`` with three digits in the largest of ``units`` (size, name; descending) not above it."""
    size, name = next((unit for unit in units if value >= unit[0]), units[-1])
    return f"{value / size:,.0f} {name}" if value >= 100 * size else f"{value / size:.3g} {name}"


def main_table(rows: Sequence[Row]) -> Table:
    """Return the time, memory and efficiency of every provider, one section per case; the fastest is bold."""
    first = rows[0]
    table = Table(
        title=f"{first.device}, {first.threads} threads, torch {first.torch}",
        caption="Medians (20–80 %). Peak: beyond inputs and gradients. % of matmul: the products that the loss needs, "
        "at the rate of torch.mm at the same N, M, D in the same run.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("loss\n  provider")
    headers = (
        "N × M\nforward ms",
        "D, dtype\nforward + backward ms",
        "ns a\npair",
        "\n× eager",
        "peak\nMiB",
        "% of\nmatmul",
    )
    for header in headers:
        table.add_column(header, justify="right")
    for (loss, n, d, dtype), group in groupby(timed(rows), key=lambda row: row.case):
        both = list(group)
        forward = {row.provider: row for row in timed(rows, "fwd") if row.case == (loss, n, d, dtype)}
        table.add_section()
        table.add_row(loss, f"{n:,} × {both[0].m:,}", f"D = {d}, {dtype}", style="cyan")
        for row in both:
            gain = speed_up(row, both)
            table.add_row(
                f"  {row.provider}",
                milliseconds(forward[row.provider].ms_50),
                f"{milliseconds(row.ms_50)} ({milliseconds(row.ms_20)}–{milliseconds(row.ms_80)})",
                f"{1e6 * row.ms_50 / (row.n * row.m):.2f}",
                f"{gain:.1f}" if gain else "",
                f"{row.peak_mib:,.0f}" if row.peak_mib is not None else "",
                f"{row.matmul_fraction:.0%}" if row.matmul_fraction else "",
                style="bold" if row.ms_50 == min(other.ms_50 for other in both) else None,
            )
    return table


def milliseconds(value: float) -> str:
    """Format a time with three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def not_timed(rows: Sequence[Row]) -> list[str]:
    """Return a line for each provider and reason, with the losses that were not timed."""
    losses: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        if row.note:
            losses.setdefault((row.provider, row.note), {})[row.loss] = None
    return [f"not timed: {provider} ({', '.join(names)}): {note}" for (provider, note), names in losses.items()]


def largest_batch(rows: Sequence[Row], limit_gib: float) -> float | None:
    """Return the N that fits into ``limit_gib`` with inputs and gradients, from the peaks of one provider, else None.

    The peak of a dense provider is a multiple of its matrices. That of the others is a constant and a multiple of
    N, the line through the two largest sizes; a constant below zero means that it grows faster, which has no figure.
    """
    *before, last = sorted(rows, key=lambda row: row.n)
    case = Case(last.loss, last.n, last.d, getattr(torch, last.dtype))
    if dense_gib := case.dense_gib(last.provider):

        def peak(n: float) -> float:
            return last.peak_mib * replace(case, n=int(n)).dense_gib(last.provider) / dense_gib

    else:
        if not before:
            return None
        step = (last.peak_mib - before[-1].peak_mib) / (last.n - before[-1].n)
        per_row = step if step >= 0 else last.peak_mib / last.n
        constant = last.peak_mib - per_row * last.n
        if constant < -0.05 * last.peak_mib:
            return None

        def peak(n: float) -> float:
            return constant + per_row * n

    held = [held_mib(case.loss, n, case.d, last.dtype) for n in (256, 512)]
    held_per_row = (held[1] - held[0]) / 256

    def total(n: float) -> float:
        return held[0] + held_per_row * (n - 256) + peak(n)

    fits, beyond = 0.0, 1.0
    while total(beyond) <= 1024 * limit_gib:
        fits, beyond = beyond, 2 * beyond
    while beyond - fits > 1e-6 * beyond:
        middle = (fits + beyond) / 2
        fits, beyond = (middle, beyond) if total(middle) <= 1024 * limit_gib else (fits, middle)
    return fits


def held_mib(loss: str, n: int, d: int, dtype: str) -> float:
    """Return the MiB of the inputs and gradients of a loss, which every provider holds."""
    inputs = Case(loss, n, d, getattr(torch, dtype)).inputs(torch.device("cpu")).values()
    return sum(value.nbytes * (1 + value.requires_grad) for value in inputs) / MIB


def batch_table(rows: Sequence[Row], limit_gib: float) -> Table | None:
    """Return the largest batch in ``limit_gib`` of each provider with two sizes that tell it; None without any."""
    table = Table(
        title=f"Largest batch in {limit_gib:g} GiB",
        caption=f"Rows N whose inputs, gradients and peak fit, from peaks at {LEAST_ROWS:,} rows or more; "
        "≈ extrapolated, ? where the memory grows faster than the rows.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for header in ("loss", "D", "dtype", "provider"):
        table.add_column(header)
    for header in ("largest N", "measured up to N", "peak MiB there"):
        table.add_column(header, justify="right")
    series: dict[tuple[str, int, str, str], list[Row]] = {}
    for row in sorted(timed(rows), key=lambda row: list(LOSSES).index(row.loss)):
        if row.peak_mib is not None and row.n >= LEAST_ROWS:
            series.setdefault((row.loss, row.d, row.dtype, row.provider), []).append(row)
    for (loss, d, dtype, provider), group in series.items():
        if len({row.n for row in group}) > 1:
            last = max(group, key=lambda row: row.n)
            largest = largest_batch(group, limit_gib)
            shown = "?" if largest is None else f"≈ {int(float(f'{largest:.2g}')):,}"
            table.add_row(loss, str(d), dtype, provider, shown, f"{last.n:,}", f"{last.peak_mib:,.0f}")
    return table if table.row_count else None
