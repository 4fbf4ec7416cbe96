"""The results of a run: the tables on the screen, the CSV and the JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.table import Table

from .cases import LOSSES, Case
from .measure import MIB
from .run import COLUMNS, Row


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write ``results.csv`` and ``results.json`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    (folder / "results.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))


def read(folder: Path) -> list[Row]:
    """Return the rows that `write` wrote into ``folder``, none if there is no such file."""
    file = folder / "results.json"
    return [Row(**row) for row in json.loads(file.read_text())] if file.exists() else []


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Return ``old`` and ``new`` without the old rows that have a case, provider and device of ``new``."""
    again = {(row.case, row.provider, row.device) for row in new}
    return [*(row for row in old if (row.case, row.provider, row.device) not in again), *new]


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
    for header in ("N × M\nforward ms", "D, dtype\nforward + backward ms", "\n× eager", "peak\nMiB", "% of\nmatmul"):
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
                _ms(forward[row.provider].ms_50),
                f"{_ms(row.ms_50)} ({_ms(row.ms_20)}–{_ms(row.ms_80)})",
                f"{gain:.1f}" if gain else "",
                f"{row.peak_mib:,.0f}" if row.peak_mib is not None else "",
                f"{row.matmul_fraction:.0%}" if row.matmul_fraction else "",
                style="bold" if row.ms_50 == min(other.ms_50 for other in both) else None,
            )
    return table


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def not_timed(rows: Sequence[Row]) -> list[str]:
    """Return a line for each provider and reason, with the losses that were not timed."""
    losses: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        if row.note:
            losses.setdefault((row.provider, row.note), {})[row.loss] = None
    return [f"not timed: {provider} ({', '.join(names)}): {note}" for (provider, note), names in losses.items()]


def largest_batch(rows: Sequence[Row], limit_gib: float) -> float:
    """Return the N that fits into ``limit_gib`` by the measured peaks of one provider, inputs and gradients included.

    The fit is the slowest growth in N, with no negative coefficient, that meets all peaks within a third, else c·N².
    Two sizes distinguish N from N².
    """
    sizes, peaks = (
        np.array(values, dtype=float) for values in zip(*((row.n, row.peak_mib) for row in rows), strict=True)
    )
    weights = 1 / np.maximum(peaks, 4.0)  # MiB; smaller peaks are noise of the heap
    powers = sizes[:, None] ** np.arange(3)
    coefficients = np.zeros(3)
    for chosen in ([0, 1], [1], [1, 2], [2]):
        fitted, *_ = np.linalg.lstsq(powers[:, chosen] * weights[:, None], peaks * weights, rcond=None)
        if (fitted >= 0).all() and (abs(powers[:, chosen] @ fitted - peaks) * weights < 1 / 3).all():
            break
    coefficients[chosen] = fitted
    largest = rows[-1]
    held = [held_mib(largest.loss, n, largest.d, largest.dtype) for n in (256, 512)]
    per_row = (held[1] - held[0]) / 256
    coefficients += (held[0] - 256 * per_row - limit_gib * 1024, per_row, 0)
    return max(np.polynomial.Polynomial(coefficients).trim().roots().real)


def held_mib(loss: str, n: int, d: int, dtype: str) -> float:
    """Return the MiB of the inputs and gradients of a loss, which every provider holds."""
    inputs = Case(loss, n, d, getattr(torch, dtype)).inputs(torch.device("cpu")).values()
    return sum(value.nbytes * (1 + value.requires_grad) for value in inputs) / MIB


def batch_table(rows: Sequence[Row], limit_gib: float) -> Table | None:
    """Return the largest batch in ``limit_gib`` of each provider measured at two sizes or more; None without any."""
    table = Table(
        title=f"Largest batch in {limit_gib:g} GiB",
        caption="Rows N whose inputs, gradients and peak fit; ≈ extrapolated from the measured peaks.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for header in ("loss", "D", "dtype", "provider"):
        table.add_column(header)
    for header in ("largest N", "measured up to N", "peak MiB there"):
        table.add_column(header, justify="right")
    series: dict[tuple[str, int, str, str], list[Row]] = {}
    for row in sorted(timed(rows), key=lambda row: list(LOSSES).index(row.loss)):
        if row.peak_mib is not None:
            series.setdefault((row.loss, row.d, row.dtype, row.provider), []).append(row)
    for (loss, d, dtype, provider), group in series.items():
        if len(group) > 1:
            last = group[-1]
            largest = f"≈ {int(float(f'{largest_batch(group, limit_gib):.2g}')):,}"
            table.add_row(loss, str(d), dtype, provider, largest, f"{last.n:,}", f"{last.peak_mib:,.0f}")
    return table if table.row_count else None
