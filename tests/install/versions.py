"""`make test-versions`: the fast tests with several pairs of Python and torch, each in an environment of its own.

Builds the C++ backend with each pair, runs what `make test-fast` runs, and writes what came out to `versions.json` and
to the table of `docs/versions.md`. A pair whose Python is not here is left as it was. The exit status says whether all
pairs passed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.install import environments
from tests.install.environments import Failed, call, copy_checkout, python_of
from tests.support.testing import ROOT

RESULTS = Path(__file__).with_name("versions.json")
PAGE = ROOT / "docs" / "versions.md"
BEGIN, END = "<!-- made by `make test-versions` -->", "<!-- end -->"


@dataclass(frozen=True)
class Pair:
    """A Python and a torch; the Triton is the one that torch asks for, or this one where it asks for none."""

    python: str
    torch: str
    triton: str


PAIRS = (
    Pair("3.10", "2.9.1", "3.5.1"),  # the oldest of both
    Pair("3.11", "2.13.0", "3.6.0"),  # that of requirements-dev.txt
    Pair("3.12", "2.11.0", "3.6.0"),
    Pair("3.13", "2.15.0", "3.9.0"),  # the newest of all three
)


@dataclass(frozen=True)
class Result:
    """What came out for a pair."""

    python: str
    torch: str
    triton: str
    numpy: str
    extension: str  # how it was built
    passed: int
    failed: int
    skipped: int
    seconds: int
    commit: str
    date: str
    system: str


def result_of(pair: Pair, results: Sequence[Result]) -> Result | None:
    """Return the result of a pair."""
    return next((r for r in results if r.python.startswith(f"{pair.python}.") and r.torch == pair.torch), None)


def stored() -> list[Result]:
    """Return the results of earlier runs."""
    return [Result(**entry) for entry in json.loads(RESULTS.read_text())] if RESULTS.exists() else []


def table(results: Sequence[Result]) -> str:
    """Return the table of the page, a row for every pair."""
    lines = [
        "| Python | torch | Triton | numpy | C++ backend | fast tests | when, where |",
        "|---|---|---|---|---|---|---|",
    ]
    for pair in PAIRS:
        r = result_of(pair, results)
        if r is None:
            lines.append(f"| {pair.python} | {pair.torch} | {pair.triton} | | | not run yet | |")
            continue
        tests = f"{r.passed:,} passed, {r.skipped} skipped" + (f", **{r.failed} failed**" if r.failed else "")
        where = f"{r.date}, {r.commit}, {r.system}"
        lines.append(f"| {r.python} | {r.torch} | {r.triton} | {r.numpy} | {r.extension} | {tests} | {where} |")
    return "\n".join(lines)


def page_with(text: str, results: Sequence[Result]) -> str:
    """Return the page with the table of these results."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{after}"


def install(pair: Pair, python: Path, folder: Path) -> Path:
    """Create the environment of a pair, unless one was kept that has its pins, and return its interpreter."""
    # Exact versions are asked for: constraints of the machine do not take part. Some torch pin setuptools themselves.
    env = environments.variables(PIP_CONSTRAINT=os.devnull)
    pins = environments.pins("torch", "setuptools", "clang-format", "mypy", "pyright", "ruff")
    requirements = [*pins, "setuptools>=77", f"torch=={pair.torch}"]
    own, installed = folder / "bin" / "python", folder / "installed.json"
    if installed.exists() and json.loads(installed.read_text()) == requirements:
        return own
    own = environments.create(python, folder)
    call(own, "-m", "pip", "install", *requirements, env=env)
    if call(own, "-c", "import importlib.util; print(importlib.util.find_spec('triton'))").strip() == "None":
        call(own, "-m", "pip", "install", f"triton=={pair.triton}", env=env)
    installed.write_text(json.dumps(requirements))
    return own


def run_tests(own: Path, checkout: Path, workers: int, more: Sequence[str]) -> tuple[int, int, int, list[str]]:
    """Run the fast tier and return the numbers of passed, failed and skipped tests, and which failed."""
    report = checkout / "report.xml"
    command = [own, "-m", "pytest", "-q", "-m", "not slow", f"--junitxml={report}", *more]
    command += ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else []
    with (checkout / "pytest.log").open("w") as log:
        subprocess.run(command, cwd=checkout, env=environments.variables(), stdout=log, stderr=log, check=False)
    if not report.exists():
        raise Failed((checkout / "pytest.log").read_text()[-2000:])
    passed, skipped, failed = 0, 0, []
    for test in ElementTree.parse(report).iter("testcase"):
        if test.find("failure") is not None or test.find("error") is not None:
            failed.append(f"{test.get('classname')}::{test.get('name')}")
        elif test.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return passed, len(failed), skipped, failed


def try_pair(pair: Pair, python: Path, folder: Path, workers: int, more: Sequence[str], console: Console) -> Result:
    """Return the result of a pair; raise `Failed` where the environment or the extension cannot be made."""
    own = install(pair, python, folder / "venv")
    git = ["git", "-c", "safe.directory=*", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    checkout = copy_checkout(folder / "checkout")
    env = environments.variables(CONTRASTIVE_KERNELS_CACHE=str(folder / "cache"))
    call(own, "-m", "contrastive_kernels", "build", cwd=checkout, env=env)
    report = call(own, "-m", "contrastive_kernels", cwd=checkout)
    extension = re.search(r"C\+\+ extension: built for torch \S+ as (\S+) with ([^;]+);", report)
    if extension is None:
        raise Failed(f"the C++ backend is not there:\n{report}")
    numbers = "import importlib.metadata as m; print(*map(m.version, ('torch', 'triton', 'numpy')))"
    torch, triton, numpy = call(own, "-c", numbers).split()
    version = call(own, "-c", "import platform; print(platform.python_version())").strip()
    start = time.monotonic()
    passed, failed, skipped, names = run_tests(own, checkout, workers, more)
    for name in names:
        console.print(f"  failed: {name}", markup=False, highlight=False)
    return Result(
        python=version,
        torch=torch.partition("+")[0],
        triton=triton,
        numpy=numpy,
        extension=f"{extension[1]}, {extension[2]}",
        passed=passed,
        failed=failed,
        skipped=skipped,
        seconds=round(time.monotonic() - start),
        commit=commit,
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        system=f"{platform.system()} {platform.machine()}",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the pairs, write the results and print them; return 1 if a pair failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="Pythons, as 3.12; default: all pairs")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-versions", help="where to work")
    parser.add_argument("--keep", action="store_true", help="keep the environments, of several gigabytes each")
    parser.add_argument("--workers", type=int, default=2, help="processes of pytest (default: %(default)s)")
    parser.add_argument("--pytest", nargs="*", default=[], help="arguments of pytest; the results are then not written")
    options = parser.parse_args(arguments)
    console, results, failures = Console(), stored(), []
    for pair in PAIRS:
        if options.only and pair.python not in options.only:
            continue
        name = f"Python {pair.python}, torch {pair.torch}"
        python = python_of(pair.python)
        if python is None:
            console.print(f"{name}: this Python is not here, the result of an earlier run stays")
            continue
        console.print(f"[bold]{name}[/bold]")
        folder = options.folder.resolve() / f"{pair.python}-{pair.torch}"
        try:
            result = try_pair(pair, python, folder, options.workers, options.pytest, console)
        except Failed as error:
            console.print(str(error), markup=False, highlight=False)
            failures.append(name)
            continue
        finally:
            if not options.keep:
                shutil.rmtree(folder / "venv", ignore_errors=True)
        failures += [name] if result.failed else []
        earlier = result_of(pair, results)
        results = [*(r for r in results if r is not earlier), result]
        console.print(f"  {result.passed} passed, {result.failed} failed, {result.skipped} skipped")
        if not options.pytest:
            order = [result_of(pair, results) for pair in PAIRS]
            results = [r for r in order if r is not None]
            RESULTS.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
            PAGE.write_text(page_with(PAGE.read_text(), results))
    shown = Table("Python", "torch", "Triton", "numpy", "passed", "failed", "skipped", "seconds", "commit")
    for r in results:
        row = (r.python, r.torch, r.triton, r.numpy, r.passed, r.failed, r.skipped, r.seconds, r.commit)
        shown.add_row(*map(str, row))
    console.print(shown)
    console.print("All pairs passed." if not failures else f"Failed: {'; '.join(failures)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
