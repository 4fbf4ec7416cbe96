"""``python -m benchmarks.gpu``: check, GPU tests, compute-sanitizer and GPU benchmark, all results in one folder.

The command has parts. Each part adds to the folder, row by row; the same command again runs the unfinished parts.
``--parts d128`` repeats that part.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO

import torch
from rich.console import Console

from . import aims, peers, plot, report
from .aims import AIM_N, BASELINES, DIMS, LARGE_N, MILLION, PAIR, SMALL_PROVIDERS, SMALL_SIZES
from .cases import SAVED, Case, Unavailable
from .measure import kernel_launches
from .run import Grid, Settings, environment, make_step, measure

BF16 = (torch.bfloat16,)
OTHERS = (*BASELINES, *peers.importable())
GRIDS = {
    **{f"d{d}": [Grid(PAIR, [AIM_N], [d], BF16, ["ours", *([SAVED] if d > 256 else []), *OTHERS])] for d in DIMS},
    "large": [
        Grid(["siglip"], [LARGE_N], [768], BF16, ["ours", "ours-512MB", "compile", *peers.importable()]),
        Grid(PAIR, [LARGE_N], DIMS, BF16, ["ours", "ours-128MB", "compile"]),
    ],
    "million": [Grid(["clip"], [MILLION], [512], BF16, ["ours"])],
    "small": [Grid(PAIR, SMALL_SIZES, [128], BF16, SMALL_PROVIDERS)],
}
# The counts of launches come last: the profiler slows down all later launches.
PARTS = ("check", "tests", "sanitize", *GRIDS, "launches")

# Most of the time of the tests is the compilation of kernels, which runs in parallel.
ABREAST = ["-n", "8"] if importlib.util.find_spec("xdist") else []
TEST_COMMAND = ["-m", "pytest", "-m", "gpu", "-q", *ABREAST]
CHECK_COMMAND = ["-m", "contrastive_kernels", "check"]
CHECK_DTYPES = ("bfloat16", "float16", "float32", "float64")
CHECK_SECONDS, TEST_SECONDS, SANITIZE_SECONDS = 240.0, 180.0, 60.0
SANITIZERS = ("memcheck", "racecheck", "initcheck")


@dataclass(frozen=True)
class Run:
    """One call of the command: the folder of the results, the settings, and the deadline for the start of a case."""

    folder: Path
    settings: Settings
    console: Console
    deadline: float
    tiny: bool = False
    without: tuple[str, ...] = ()

    def size(self, n: int) -> int:
        """Return the N at which a case of N rows is run."""
        return max(64, n // 512) if self.tiny else n

    def cases(self, part: str) -> Iterator[tuple[Case, list[str]]]:
        """Yield the cases of a part and their providers."""
        found = {replace(case, n=self.size(case.n)): providers for grid in GRIDS[part] for case, providers in grid}
        for case, providers in found.items():
            yield case, [provider for provider in providers if provider not in self.without]

    def seconds_left(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Ended:
    """The end of a part; ``status`` is an exit status."""

    summary: str
    status: int = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen parts and write the report; return the exit status, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=[*PARTS, "report"],
        help=f"{', '.join(PARTS)}, or report for the report alone (default: the unfinished parts)",
    )
    parser.add_argument("--output", type=Path, default=Path("results/gpu"), help="folder of all results")
    parser.add_argument("--minutes", type=float, default=8.0, help="no case begins later; the last may take a minute")
    parser.add_argument("--without", nargs="+", default=[], metavar="PROVIDER", help="providers to leave out")
    parser.add_argument("--device", default="cuda", help="cpu to rehearse the command")
    parser.add_argument("--tiny", action="store_true", help="every N divided by 512, for a rehearsal")
    options = parser.parse_args(arguments)

    device = torch.device(options.device)
    missing = device.type == "cuda" and not torch.cuda.is_available()
    on_cuda = device.type == "cuda" and not missing
    memory_gib = torch.cuda.get_device_properties(device).total_memory / 2**30 if on_cuda else 8.0
    # Three rounds and a second per case on a GPU; the times of a rehearsal mean nothing.
    settings = Settings(device, *((0.0, 1) if options.tiny else (1.0, 3)), memory_gib)
    console = Console(width=None if sys.stdout.isatty() else 100)
    deadline = time.monotonic() + 60 * options.minutes
    run = Run(options.output, settings, console, deadline, options.tiny, tuple(options.without))

    options.output.mkdir(parents=True, exist_ok=True)
    chosen = options.parts or [part for part in PARTS if part not in _read_finished(run.folder)]
    wanted = [part for part in PARTS if part in chosen]
    status = 0
    try:
        for part in [] if missing else list(wanted):
            if run.seconds_left() <= 0:
                break
            console.rule(part)
            try:
                ended = run_part(part, run)
            except Exception as error:
                # The failure ends this part, so that the next command goes on after it. It ends this command too:
                # nothing runs on a GPU after an illegal access.
                _finish(part, Ended(f"FAILED: {type(error).__name__}: {error}", 1), run)
                raise
            if ended is None:
                break
            _finish(part, ended, run)
            status = max(status, ended.status)
            wanted.remove(part)
    finally:
        finished = _read_finished(run.folder)
        rows = report.read(run.folder)
        unfinished = [part for part in PARTS if part not in finished]
        (run.folder / "report.md").write_text(aims.markdown(rows, finished, run.size, unfinished))
    console.print(f"Written: {run.folder / 'report.md'}", highlight=False, soft_wrap=True)
    if missing and (wanted or not rows):
        print(f"benchmarks.gpu: torch {torch.__version__} sees no CUDA device here; nothing measured", file=sys.stderr)
        return 2
    if wanted:
        console.print(f"Out of time before: {', '.join(wanted)}. The same command goes on there.", highlight=False)
    return status


def _read_finished(folder: Path) -> dict[str, dict]:
    file = folder / "parts.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _finish(part: str, ended: Ended, run: Run) -> None:
    run.console.print(f"{part}: {ended.summary}", highlight=False, soft_wrap=True)
    finished = _read_finished(run.folder) | {part: asdict(ended)}
    (run.folder / "parts.json").write_text(json.dumps(finished, indent=1))


def run_part(part: str, run: Run) -> Ended | None:
    """Run one part; return None if time ran out before its end."""
    own: dict[str, Callable[[Run], Ended | None]] = {
        "check": run_check,
        "tests": run_tests,
        "sanitize": run_sanitizers,
        "launches": count_launches,
    }
    return own[part](run) if part in own else measure_part(part, run)


def measure_part(part: str, run: Run) -> Ended | None:
    """Measure the cases of a part and write the rows of each; a case that ours cannot compute counts as failed."""
    cases, failed, timed = list(run.cases(part)), [], 0
    for rows in measure(cases, run.settings, run.console):
        failed += [f"{row.loss} D = {row.d}: {row.note}" for row in rows if row.provider == "ours" and row.note]
        timed += sum(row.mode == "both" and not row.note for row in rows)
        everything = report.merge(report.read(run.folder), rows)
        report.write(everything, run.folder)
        cases = cases[1:]
        if cases and run.seconds_left() <= 0:
            return None
    device = environment(run.settings.device)["device"]
    plot.draw([row for row in everything if row.device == device], run.folder)
    return Ended(f"{timed} timings" + "".join(f"; FAILED {failure}" for failure in failed), int(bool(failed)))


def count_launches(run: Run) -> Ended | None:
    """Count the kernels of the small cases that have been timed."""
    if run.settings.device.type != "cuda":
        return Ended("kernels are counted on a GPU")
    device = environment(run.settings.device)["device"]
    rows = report.read(run.folder)
    timed = {(row.case, row.provider): row for row in report.timed(rows) if row.device == device}
    counted = 0
    for case, providers in run.cases("small"):
        inputs = case.inputs(run.settings.device)
        for provider in providers:
            row = timed.get(((case.loss, case.n, case.d, "bfloat16"), provider))
            if row is None:
                continue
            try:
                launches = kernel_launches(make_step(provider, case, inputs, run.settings.device))
            except (Unavailable, RuntimeError) as reason:
                run.console.print(f"{case}, {provider}: {reason}", highlight=False)
                continue
            rows[rows.index(row)] = replace(row, launches=launches)
            counted += 1
        report.write(rows, run.folder)
        if run.seconds_left() <= 0:
            return None
    return Ended(f"{counted} counts" if counted else "no small batch has been timed yet")


def run_check(run: Run) -> Ended:
    """Compare every loss on the device with float64, all dtypes at once: most of the time kernels are compiled."""
    seconds = min(CHECK_SECONDS, run.seconds_left())

    def check(dtype: str) -> tuple[int, str]:
        command = [sys.executable, *CHECK_COMMAND, "--device", run.settings.device.type, "--dtype", dtype]
        with (run.folder / f"check-{dtype}.txt").open("w") as log:
            status, last = run_logged(command, log, seconds, prefix=f"{dtype}: ")
        return status, f"{dtype}: {last}"

    with ThreadPoolExecutor() as pool:
        statuses, summaries = zip(*pool.map(check, CHECK_DTYPES), strict=True)
    return Ended("; ".join(summaries), max(statuses))


def run_tests(run: Run) -> Ended:
    """Run the tests marked ``gpu``."""
    with (run.folder / "tests.txt").open("w") as log:
        status, last = run_logged([sys.executable, *TEST_COMMAND], log, min(TEST_SECONDS, run.seconds_left()))
    return Ended(last, status)


def run_sanitizers(run: Run) -> Ended:
    """Compare the small shapes with float64, then run them under every tool of compute-sanitizer."""
    places = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in [os.environ.get("CUDA_HOME")] if home)]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    script = [sys.executable, "-m", "benchmarks.small_shapes", "--device", run.settings.device.type]
    # Each tensor needs its own allocation, or an access beyond it would hit memory in use.
    apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    commands = {"small shapes": [*script, "--check"]}
    if program:
        commands |= {tool: [program, "--tool", tool, "--error-exitcode", "9", *script] for tool in SANITIZERS}
    status, summaries = 0, []
    with (run.folder / "sanitize.txt").open("w") as log:
        for name, command in commands.items():
            seconds = max(1.0, min(SANITIZE_SECONDS, run.seconds_left()))
            found, last = run_logged(command, log, seconds, **(apart if name in SANITIZERS else {}))
            status, summaries = max(status, found), [*summaries, f"{name}: {last}"]
    return Ended("; ".join(summaries) + ("" if program else "; compute-sanitizer is not installed"), status)


def run_logged(
    command: Sequence[str], log: TextIO, seconds: float, prefix: str = "", **environment: str
) -> tuple[int, str]:
    """Run a command for at most ``seconds``, output to screen and ``log``; return its status and last line."""
    stopped = threading.Event()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment},
        start_new_session=True,
    ) as process:  # fmt: skip

        def stop() -> None:
            stopped.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer, last = threading.Timer(seconds, stop), ""
        timer.start()
        for line in process.stdout:
            print(prefix + line, end="")
            log.write(line)
            last = line.strip("= \n") or last
        timer.cancel()
    if stopped.is_set():
        last = f"stopped after {seconds:.0f} s; {last}"
    return abs(process.returncode), last


if __name__ == "__main__":
    sys.exit(main())
