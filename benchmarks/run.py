"""Measurement of a list of cases: the providers of a case are timed in turn; each provider and mode has a row."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import metadata
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from . import peers
from .cases import (
    LOSSES,
    PROVIDERS,
    Case,
    Inputs,
    Unavailable,
    check,
    dtype_name,
    gradients,
    memory_of,
    provider_function,
)
from .measure import Spread, Step, matmul_step, peak_extra_mib, time_interleaved


@dataclass(frozen=True)
class Row:
    """A line of the CSV. ``note`` is the reason of a missing time.

    ``peak_mib`` and ``launches``, the number of kernels on a GPU, belong to the whole iteration (mode ``both``);
    ``version`` is that of another package whose loss the provider is.
    """

    loss: str
    provider: str
    mode: str
    n: int
    m: int
    d: int
    dtype: str
    device: str
    threads: int
    ms_50: float | None
    ms_20: float | None
    ms_80: float | None
    peak_mib: float | None
    tflops: float | None
    matmul_fraction: float | None
    torch: str
    triton: str
    commit: str
    date: str
    note: str
    launches: int | None = None
    ranks: int = 1
    version: str = ""

    @property
    def case(self) -> tuple[str, int, int, str]:
        """Loss, N, D and dtype."""
        return self.loss, self.n, self.d, self.dtype


COLUMNS = [field.name for field in fields(Row)]


@dataclass(frozen=True)
class Grid:
    """All combinations of losses, sizes, dims and dtypes, with the same providers; without sizes those of each loss."""

    losses: Sequence[str]
    sizes: Sequence[int] | None = None
    dims: Sequence[int] = (128,)
    dtypes: Sequence[torch.dtype] = (torch.float32,)
    providers: Sequence[str] = PROVIDERS

    def __iter__(self) -> Iterator[tuple[Case, Sequence[str]]]:
        for loss, dtype, d in product(self.losses, self.dtypes, self.dims):
            for n in self.sizes or LOSSES[loss].sizes:
                yield Case(loss, n, d, dtype), self.providers


@dataclass(frozen=True)
class Settings:
    """Device, timing budget and least rounds of a case, and the memory that a provider may take."""

    device: torch.device
    seconds: float
    min_rounds: int
    memory_limit_gib: float


def environment(device: torch.device) -> dict[str, str | int]:
    """Return device and versions, as every row records them."""
    root = Path(__file__).parent
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = ""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def measure(cases: Iterable[tuple[Case, Sequence[str]]], settings: Settings, console: Console) -> Iterator[list[Row]]:
    """Measure one case after the other: yield its rows, show the progress and print a line."""
    cases = list(cases)
    bar = SpinnerColumn(), MofNCompleteColumn(), BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}")
    where = environment(settings.device)
    with Progress(*bar, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(cases))

        def report(doing: str) -> None:
            progress.update(task, description=doing)

        for case, providers in cases:
            try:
                found = measure_case(case, providers, settings, where, report)
            except Exception as error:
                if settings.device.type == "cuda":  # nothing runs on a GPU after an illegal access
                    raise
                found = [row_of(case, provider, "both", where, note=first_line(error)) for provider in providers]
            progress.advance(task)
            times = [f"{row.provider} {row.ms_50:,.1f} ms" for row in found if row.mode == "both" and row.ms_50]
            console.print(f"{case}: {', '.join(times)}", highlight=False, soft_wrap=True)
            yield found


def measure_case(
    case: Case,
    providers: Sequence[str],
    settings: Settings,
    where: Mapping[str, str | int],
    report: Callable[[str], None],
) -> list[Row]:
    """Check, warm up and time all providers of one case; pass each stage to ``report``. Return the rows."""
    if reason := case.refusal():
        return [row_of(case, provider, "both", where, note=reason) for provider in providers]
    inputs = case.inputs(settings.device)
    steps, peaks, notes = {}, {}, {}
    for provider in providers:
        report(f"{case}: checking {provider}")
        try:
            steps[provider], peaks[provider] = _prepare(provider, case, inputs, settings)
        except Unavailable as reason:
            notes[provider] = str(reason)
    report(f"{case}: timing")
    yardstick, yardstick_flop = matmul_step(case.n, case.m, case.d, case.dtype, settings.device)
    yardstick.run()
    spreads, errors = time_interleaved(
        steps | {"matmul": yardstick}, settings.device, seconds=settings.seconds, min_rounds=settings.min_rounds
    )
    notes |= {provider: first_line(error) for provider, error in errors.items()}
    matmul = spreads.pop("matmul")
    matmul_tflops = yardstick_flop / min(matmul["fwd"].ms_50, matmul["bwd"].ms_50) / 1e9

    rows = [
        row_of(case, provider, mode, where, spread, peaks[provider], matmul_tflops)
        for provider, modes in spreads.items()
        for mode, spread in modes.items()
    ]
    return rows + [row_of(case, provider, "both", where, note=note) for provider, note in notes.items()]


def row_of(
    case: Case,
    provider: str,
    mode: str,
    where: Mapping[str, str | int],
    spread: Spread | None = None,
    peak_mib: float | None = None,
    matmul_tflops: float | None = None,
    note: str = "",
) -> Row:
    """Return the row of a provider and mode; without a spread it has no time."""
    tflops = case.flop(mode) / spread.ms_50 / 1e9 if spread else None
    return Row(
        loss=case.loss,
        provider=provider,
        mode=mode,
        n=case.n,
        m=case.m,
        d=case.d,
        dtype=dtype_name(case.dtype),
        **(spread or Spread(None, None, None))._asdict(),
        peak_mib=peak_mib if mode == "both" else None,
        tflops=tflops and round(tflops, 4),
        matmul_fraction=round(tflops / matmul_tflops, 4) if tflops and matmul_tflops else None,
        note=note,
        **{"version": peers.version(provider), **where},
    )


def first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its text."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _prepare(provider: str, case: Case, inputs: Inputs, settings: Settings) -> tuple[Step, float | None]:
    """Return a provider's checked and warmed-up step and its peak memory; raise `Unavailable` with the reason."""
    if (needed := case.dense_gib(provider)) > settings.memory_limit_gib:
        raise Unavailable(f"N = {case.n:,} needs about {needed:.0f} GiB")
    try:
        check(provider, case, settings.device)
        step = make_step(provider, case, inputs, settings.device)
        if provider == "compile":
            step.run()  # compiling takes memory of its own
        # The memory of a graph was allocated at its capture.
        return step, None if provider == "graph" else peak_extra_mib(step, settings.device)
    except Unavailable:
        raise
    except Exception as error:  # out of memory, no compiler, no kernel for this device, ...
        raise Unavailable(first_line(error)) from error


def make_step(provider: str, case: Case, inputs: Inputs, device: torch.device) -> Step:
    """Return one iteration of a provider on ``inputs``; raise `Unavailable` with the reason."""
    function = provider_function(provider, case, device)

    def forward() -> Tensor:
        with memory_of(provider):
            return function(**inputs)

    def backward(loss: Tensor) -> Inputs:
        with memory_of(provider):
            return gradients(loss, inputs)

    return Step(forward, backward)
