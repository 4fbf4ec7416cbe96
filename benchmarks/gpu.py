"""``python -m benchmarks.gpu``: smoke test, check, GPU tests, benchmark, compute-sanitizer; all results in one folder.

The command has parts, each in a process of its own and with a limit of its own: one that fails or hangs takes no other
with it. Each part adds to the folder, row by row; the same command again goes on where it stopped. All of them take
about half an hour of a GPU with 16 cores beside it, in calls of at most ten minutes. ``--parts d128`` repeats that
part.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO

import torch
from rich.console import Console

from contrastive_kernels.engine.backends.triton import tiles

from . import aims, peers, report, smoke
from .aims import AIM_N, BASELINES, BATCH, DIMS, LARGE_N, MILLION, PAIR, QUERIES, SMALL_PROVIDERS, SMALL_SIZES
from .cases import SAVED, Case, Unavailable, dtype_name, gradients, provider_function
from .measure import kernel_launches
from .run import Grid, Row, Settings, environment, make_step, measure

BF16 = (torch.bfloat16,)
OTHERS = (*BASELINES, *peers.importable())
GRIDS = {
    **{f"d{d}": [Grid(BATCH, [AIM_N], [d], BF16, ["ours", *([SAVED] if d > 256 else []), *OTHERS])] for d in DIMS},
    "large": [
        Grid(["siglip"], [LARGE_N], [768], BF16, ["ours", "ours-512MB", "compile", *peers.importable()]),
        Grid(PAIR, [LARGE_N], DIMS, BF16, ["ours", "ours-128MB", "compile"]),
    ],
    "million": [Grid(["clip"], [MILLION], [512], BF16, ["ours"])],
    "queue": [Grid(["moco"], [QUERIES], [128], BF16, ["ours", "graph", "eager", "compile"])],
    "small": [Grid(PAIR, SMALL_SIZES, [128], BF16, SMALL_PROVIDERS)],
}
# What is worth most comes first, what may disturb others last: the profiler, the sanitizers.
PARTS = ("smoke", "check", "tests", "compile", *GRIDS, "tests-ptxas", "launches", "sanitize")
# Seconds that a part may take. It begins if they are left; one that can go on later needs a minute.
LIMITS = {
    "smoke": 120, "check": 240, "tests": 480, "compile": 120, "large": 300, "tests-ptxas": 480, "sanitize": 240,
}  # fmt: skip
OTHER_LIMIT, LEAST_SECONDS = 180, 60
# The exit status of a part that goes on in the next call.
UNFINISHED = 75
WORKER = ["-m", "benchmarks.gpu", "--worker"]

# Most of the time of all but the benchmark is the compilation of kernels, which runs on all cores.
CORES = os.cpu_count() or 1
ABREAST = ["-n", str(min(CORES, 16))] if importlib.util.find_spec("xdist") else []
TEST_COMMAND = ["-m", "pytest", "-m", "gpu", "-q", *ABREAST]
CHECK_COMMAND = ["-m", "contrastive_kernels", "check"]
CHECK_DTYPES = ("bfloat16", "float16", "float32", "float64")
SMOKE_SECONDS, SANITIZE_SECONDS = 90.0, 60.0
SANITIZERS = ("memcheck", "racecheck", "initcheck")
# Rows at which kernels are compiled ahead: Triton compiles the same for all multiples of 16.
COMPILED_ROWS = 1024


@dataclass(frozen=True)
class Run:
    """One call of the command: the folder of the results, the settings, and the deadline for the start of a case."""

    folder: Path
    settings: Settings
    console: Console
    deadline: float
    tiny: bool = False
    without: tuple[str, ...] = ()
    resume: bool = False

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
    parser.add_argument("--minutes", type=float, default=9.0, help="what still runs then is stopped")
    parser.add_argument("--without", nargs="+", default=[], metavar="PROVIDER", help="providers to leave out")
    parser.add_argument("--device", default="cuda", help="cpu to rehearse the command")
    parser.add_argument("--tiny", action="store_true", help="every N divided by 512, for a rehearsal")
    parser.add_argument("--worker", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)

    device = torch.device(options.device)
    missing = device.type == "cuda" and not torch.cuda.is_available()
    on_cuda = device.type == "cuda" and not missing
    memory_gib = torch.cuda.get_device_properties(device).total_memory / 2**30 if on_cuda else 8.0
    # Three rounds and a second per case on a GPU; the times of a rehearsal mean nothing.
    settings = Settings(device, *((0.0, 1) if options.tiny else (1.0, 3)), memory_gib)
    console = Console(width=None if sys.stdout.isatty() else 100)
    deadline = time.monotonic() + 60 * options.minutes
    resume = not options.parts
    run = Run(options.output, settings, console, deadline, options.tiny, tuple(options.without), resume)

    options.output.mkdir(parents=True, exist_ok=True)
    if options.worker:
        return work(options.worker, run)
    chosen = options.parts or [part for part in PARTS if part not in _read_finished(run.folder)]
    wanted = [part for part in PARTS if part in chosen]
    status = 0
    try:
        for part in [] if missing else list(wanted):
            limit = LIMITS.get(part, OTHER_LIMIT)
            if run.seconds_left() < (LEAST_SECONDS if part in GRIDS else limit):
                continue
            console.rule(part)
            ended = start(part, run, min(limit, run.seconds_left()))
            if ended != UNFINISHED:
                status = max(status, ended)
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
        console.print(f"Out of time for: {', '.join(wanted)}. The same command goes on there.", highlight=False)
    return status


def start(part: str, run: Run, seconds: float) -> int:
    """Run a part in a process of its own, stopped after so many seconds; return its status, perhaps `UNFINISHED`."""
    command = [sys.executable, *WORKER, part, "--output", str(run.folder)]
    command += ["--device", run.settings.device.type, *["--tiny"] * run.tiny]
    command += ["--without", *run.without] if run.without else []
    # The part ends by itself if it can.
    command += ["--minutes", str(0.9 * seconds / 60), *([] if run.resume else ["--parts", part])]
    _forget(part, run)
    with (run.folder / f"part-{part}.txt").open("w") as log:
        status, last = run_logged(command, log, seconds)
    cut = seconds < LIMITS.get(part, OTHER_LIMIT) and run.seconds_left() <= 1
    if part in _read_finished(run.folder) or status == UNFINISHED:
        return status
    if cut:  # by the end of the call, not by its own limit
        return UNFINISHED
    _finish(part, Ended(f"FAILED: {last}", max(status, 1)), run)
    return max(status, 1)


def work(part: str, run: Run) -> int:
    """Run a part in this process and keep its end; return its status, `UNFINISHED` if time ran out."""
    signal.signal(signal.SIGTERM, _stop_commands)
    try:
        ended = run_part(part, run)
    except Exception as error:  # one part that fails leaves the others their time
        ended = Ended(f"FAILED: {type(error).__name__}: {error}", 1)
        traceback.print_exc()
    if ended is None:
        return UNFINISHED
    _finish(part, ended, run)
    return ended.status


def _read_finished(folder: Path) -> dict[str, dict]:
    file = folder / "parts.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _finish(part: str, ended: Ended, run: Run) -> None:
    run.console.print(f"{part}: {ended.summary}", highlight=False, soft_wrap=True)
    finished = _read_finished(run.folder) | {part: asdict(ended)}
    (run.folder / "parts.json").write_text(json.dumps(finished, indent=1))


def _forget(part: str, run: Run) -> None:
    """Take the end of an earlier run of the part away."""
    finished = _read_finished(run.folder)
    if finished.pop(part, None):
        (run.folder / "parts.json").write_text(json.dumps(finished, indent=1))


def run_part(part: str, run: Run) -> Ended | None:
    """Run one part; return None if time ran out before its end."""
    own: dict[str, Callable[[Run], Ended | None]] = {
        "smoke": run_smoke,
        "check": run_check,
        "tests": run_tests,
        "tests-ptxas": run_tests_with_newer_ptxas,
        "compile": compile_kernels,
        "sanitize": run_sanitizers,
        "launches": count_launches,
    }
    return own[part](run) if part in own else measure_part(part, run)


def measure_part(part: str, run: Run) -> Ended | None:
    """Measure the cases of a part and write the rows of each; a case that ours cannot compute counts as failed."""
    where = environment(run.settings.device)
    cases, rows = list(run.cases(part)), report.read(run.folder)
    if part == "small":  # ours is the kernels at every size
        tiles.CROSSOVER.clear()
    if run.resume:
        own = [row for row in rows if (row.device, row.commit) == (where["device"], where["commit"])]
        known = {(row.case, row.provider) for row in own}
        cases = [one for one in cases if not known >= {(_identity(one[0]), provider) for provider in one[1]}]
    for found in measure(cases, run.settings, run.console):
        rows = report.merge(rows, found)
        report.write(rows, run.folder)
        cases = cases[1:]
        if cases and run.seconds_left() <= 0:
            return None
    report.draw([row for row in rows if row.device == where["device"]], run.folder, run.console)
    wanted = {_identity(case) for case, _ in run.cases(part)}
    own = [row for row in rows if row.device == where["device"] and row.case in wanted and row.mode == "both"]
    failed = [f"{row.loss} D = {row.d}: {row.note}" for row in own if row.provider == "ours" and row.note]
    timed = sum(not row.note for row in own)
    summary = f"{timed} timings" + (f"; {crossover(own)}" if part == "small" else "")
    return Ended(summary + "".join(f"; FAILED {failure}" for failure in failed), int(bool(failed)))


def crossover(rows: Sequence[Row]) -> str:
    """Return what `tiles.CROSSOVER` should be, by the times of small batches with N = M: no loss is slower there."""
    times = {(row.loss, row.n, row.provider): row.ms_50 for row in rows if row.ms_50 is not None}
    both = {(loss, n) for loss, n, provider in times if provider == "ours" and (loss, n, "ours-torch") in times}
    slower = {n for loss, n in both if times[loss, n, "ours"] > times[loss, n, "ours-torch"]}
    faster = {n for _, n in both if n > max(slower, default=-1)}
    if not faster:
        return f"crossover above {max(slower) ** 2:,} pairs" if slower else "no crossover measured"
    return f"crossover at {min(faster) ** 2:,} pairs" if slower else "crossover below the smallest batch: leave it out"


def _identity(case: Case) -> tuple[str, int, int, str]:
    """Return a case as `Row.case` names it."""
    return case.loss, case.n, case.d, dtype_name(case.dtype)


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


def run_smoke(run: Run) -> Ended:
    """Compare every kernel with float64, each kind of sweep and dtype in a process of its own; print one screen."""
    cells = [(call, dtype) for call in smoke.CALLS for dtype in smoke.DTYPES]

    def one(call: str, dtype: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "benchmarks.smoke", "--call", call, "--dtype", dtype]
        with (run.folder / f"smoke-{call}-{dtype}.txt").open("w") as log:
            seconds = min(SMOKE_SECONDS, run.seconds_left())
            return run_logged([*command, "--device", run.settings.device.type], log, seconds, echo=False)

    with ThreadPoolExecutor(CORES) as pool:
        ends = dict(zip(cells, pool.map(one, *zip(*cells, strict=True)), strict=True))
    print(f"{'':<12}" + "".join(f"{dtype:<14}" for dtype in smoke.DTYPES))
    for call in smoke.CALLS:
        print(f"{call:<12}" + "".join(f"{'WRONG' if ends[call, d][0] else ends[call, d][1]:<14}" for d in smoke.DTYPES))
    wrong = [f"{call} in {dtype}: {last}" for (call, dtype), (status, last) in ends.items() if status]
    print(*wrong, sep="\n", flush=True)
    right = len(cells) - len(wrong)
    return Ended("; ".join([f"{right} of {len(cells)} kinds of call right", *wrong]), int(bool(wrong)))


def run_check(run: Run) -> Ended:
    """Compare every loss on the device with float64, all dtypes at once: most of the time kernels are compiled."""

    def check(dtype: str) -> tuple[int, str]:
        command = [sys.executable, *CHECK_COMMAND, "--device", run.settings.device.type, "--dtype", dtype]
        with (run.folder / f"check-{dtype}.txt").open("w") as log:
            status, last = run_logged(command, log, run.seconds_left(), prefix=f"{dtype}: ")
        return status, f"{dtype}: {last}"

    with ThreadPoolExecutor() as pool:
        statuses, summaries = zip(*pool.map(check, CHECK_DTYPES), strict=True)
    return Ended("; ".join(summaries), max(statuses))


def run_tests(run: Run, **environment: str) -> Ended:
    """Run the tests marked ``gpu``."""
    with (run.folder / f"tests{'-ptxas' if environment else ''}.txt").open("w") as log:
        status, last = run_logged([sys.executable, *TEST_COMMAND], log, run.seconds_left(), **environment)
    return Ended(last, status)


def run_tests_with_newer_ptxas(run: Run) -> Ended:
    """Run them once more on code from a newer assembler than Triton's: a difference is a fault of one of the two."""
    bundled, found = _bundled_ptxas(), _newest_ptxas()
    if bundled is None or found is None or found[0] <= bundled:
        return Ended("no ptxas newer than that of Triton here: pip install nvidia-cuda-nvcc brings one")
    version, path = found
    # The second name is that for sm_100 and later, since Triton 3.9 for sm_90 too.
    variables = dict(TRITON_PTXAS_PATH=path, TRITON_PTXAS_BLACKWELL_PATH=path)
    if version >= (13,):
        variables["PTXAS_OPTIONS"] = "--regAllocOptLevel=2"  # as Triton 3.7 and later call it, for a fault of 13.x
    ended = run_tests(run, **variables)
    text = f"ptxas {'.'.join(map(str, version))}, Triton's is {'.'.join(map(str, bundled))}: {ended.summary}"
    return Ended(text, ended.status)


def _bundled_ptxas() -> tuple[int, ...] | None:
    """Return the version of the assembler that Triton takes for this device, an H100 without one; None without any."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas
    except ImportError:
        return None
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return ptxas_version(get_ptxas(10 * major + minor).path)


def _newest_ptxas() -> tuple[tuple[int, ...], str] | None:
    """Return version and path of the newest assembler on this machine outside Triton, None without one."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    paths = [shutil.which("ptxas"), *(f"{home}/bin/ptxas" for home in homes if home)]
    paths += [str(path) for place in sys.path for path in Path(place or ".").glob("nvidia/*/bin/ptxas")]
    found = [(version, path) for path in paths if path and (version := ptxas_version(path))]
    return max(found, default=None)


def ptxas_version(path: str) -> tuple[int, ...] | None:
    """Return the version that an assembler tells, None if it does not run."""
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"release \d+\.\d+, V([\d.]+)", text)
    return tuple(map(int, found[1].split("."))) if found else None


def compile_kernels(run: Run) -> Ended:
    """Compile the kernels of ours that the benchmark runs, on all cores; Triton's cache keeps them."""
    wanted = {(case.loss, case.d, case.dtype): case for part in GRIDS for case, _ in run.cases(part)}
    cases = [replace(case, n=min(case.n, COMPILED_ROWS)) for case in wanted.values()]

    def one(case: Case) -> tuple[int, str]:
        command = [sys.executable, "-c", COMPILE, case.loss, str(case.n), str(case.d), dtype_name(case.dtype)]
        with (run.folder / f"compile-{case.loss}-{case.d}.txt").open("w") as log:
            return run_logged([*command, run.settings.device.type], log, run.seconds_left(), echo=False)

    with ThreadPoolExecutor(CORES) as pool:
        ends = list(pool.map(one, cases))
    failed = [f"{case}: {last}" for case, (status, last) in zip(cases, ends, strict=True) if status]
    return Ended("; ".join([f"{len(cases) - len(failed)} of {len(cases)} cases compiled", *failed]), int(bool(failed)))


def compile_case(loss: str, n: str, d: str, dtype: str, device: str) -> None:
    """Run one step of ours."""
    case, where = Case(loss, int(n), int(d), getattr(torch, dtype)), torch.device(device)
    inputs = case.inputs(where)
    gradients(provider_function("ours", case, where)(**inputs), inputs)


COMPILE = "import sys; from benchmarks.gpu import compile_case; compile_case(*sys.argv[1:])"


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


_commands: set[int] = set()


def _stop_commands(*_: object) -> None:
    """Stop the commands that this process runs, and end it."""
    for group in _commands:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    os._exit(1)


def run_logged(
    command: Sequence[str], log: TextIO, seconds: float, prefix: str = "", echo: bool = True, **environment: str
) -> tuple[int, str]:
    """Run a command for at most ``seconds``, output to ``log`` and screen; return its status and last line."""
    stopped = threading.Event()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment},
        start_new_session=True,
    ) as process:  # fmt: skip
        _commands.add(process.pid)

        def stop() -> None:
            stopped.set()
            # A worker stops what it has started; what hangs in a driver does not hear it.
            for number, pause in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 0.0)):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                    time.sleep(pause)

        timer, last = threading.Timer(seconds, stop), ""
        timer.start()
        for line in process.stdout:
            if echo:
                print(prefix + line, end="", flush=True)
            log.write(line)
            last = line.strip("= \n") or last
        timer.cancel()
    _commands.discard(process.pid)
    if stopped.is_set():
        last = f"stopped after {seconds:.0f} s; {last}"
    return abs(process.returncode), last


if __name__ == "__main__":
    sys.exit(main())
