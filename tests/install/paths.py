"""`make test-install`: every ordinary way of installing, each in a new environment.

Each ends with the C++ backend, or the first loss says in one sentence which command is missing, and that command ends
with it. A loss then runs outside the checkout, and inside where the installation was made there. Prints a table; the
exit status says whether all hold. Files are compiled without optimisation, by ccache where it is installed; torch comes
from one folder that the environments share, but where a way installs torch itself.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.install import environments
from tests.install.environments import Failed, call, copy_checkout
from tests.support.testing import ROOT

# What a user sees of the first two losses: the warnings, the backend, and whether it is right.
LOSSES = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("default")
    import torch, contrastive_kernels as ck
    from contrastive_kernels.engine.backends import choose
    z = torch.nn.functional.normalize(torch.arange(60.0).sin().reshape(2, 10, 3), dim=2)
    losses = [ck.nt_xent_loss(*z) for _ in range(2)]
    close = torch.allclose(losses[0], ck.nt_xent_loss(*z, backend="torch"))
    found = {"backend": choose(z[0]).name, "close": close, "file": ck.__file__}
said = [str(warning.message) for warning in caught if "contrastive_kernels" in str(warning.message)]
print(json.dumps(found | {"said": said}))
"""
COMMAND = re.compile(r"`python -m (contrastive_kernels \w+)`")
NO_COMPILER = "there is no C++ compiler"


@dataclass(frozen=True)
class Way:
    """Lines of a shell, and where they are typed."""

    name: str
    lines: Sequence[str]
    outside: bool = False  # typed in an empty folder; {checkout} is the path of the checkout
    own_torch: bool = False  # the lines install torch
    compiler: bool = True  # on the path
    built: bool = False  # whether what the lines install has the C++ backend


def readme_lines() -> list[str]:
    """Return the first block of the README's section on installing."""
    section = (ROOT / "README.md").read_text().partition("\n## Install\n")[2]
    block = re.search(r"```\w*\n(.*?)```", section, re.DOTALL)
    assert block
    return block[1].strip().splitlines()


def ways(old: str, new: str) -> list[Way]:
    """Return all ways; `old` and `new` are two versions of torch."""
    tools = 'pip install ninja pybind11 "setuptools>=77" wheel'
    readme = readme_lines()
    outside = [re.sub(r"^pip install \.", "pip install {checkout}", line) for line in readme]
    return [
        Way("the README's lines, in the checkout", readme, own_torch=True, built=True),
        Way("the README's lines, outside", outside, outside=True, own_torch=True, built=True),
        Way("pip install .", ["pip install ."]),
        Way("pip install -e .", ["pip install -e ."]),
        Way("pip install <path>, outside", ["pip install {checkout}"], outside=True),
        Way("pip install --no-build-isolation .", [tools, "pip install --no-build-isolation ."], built=True),
        Way("pip install --no-build-isolation -e .", [tools, "pip install --no-build-isolation -e ."], built=True),
        Way("sdist", ["pip install build", "python -m build --sdist", "pip install dist/*.tar.gz"]),
        Way("wheel", ["pip wheel --no-deps -w dist .", "pip install dist/*.whl"]),
        Way("uv pip install .", ["pip install uv", "uv pip install ."], own_torch=True),
        Way("pip install ., no compiler", ["pip install ."], compiler=False),
        Way(
            "pip install --no-build-isolation ., no compiler",
            [tools, "pip install --no-build-isolation ."],
            compiler=False,
        ),
        Way(
            f"an upgrade from torch {old} to {new}",
            [f"pip install torch=={old}", tools, "pip install --no-build-isolation .", f"pip install torch=={new}"],
            own_torch=True,
        ),
    ]


class Place:
    """The folders and variables of one way."""

    reason = ""  # why the C++ backend was missing, as the last sentence said it

    def __init__(self, way: Way, python: Path, folder: Path, shared: Path, torch: str) -> None:
        self.way, self.folder = way, folder
        self.python = environments.create(python, folder / "venv")
        self.checkout = copy_checkout(folder / "contrastive_kernels")
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        if not way.own_torch:
            site = call(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
            (Path(site) / "torch-of-all.pth").write_text(f"{shared}\n")
        constraints = folder / "constraints.txt"
        constraints.write_text("" if "upgrade" in way.name else f"torch=={torch}\n")
        self.env = environments.variables(
            PIP_CONSTRAINT=str(constraints),
            UV_CONSTRAINT=str(constraints),
            UV_FIND_LINKS=os.environ.get("PIP_FIND_LINKS", ""),
            CONTRASTIVE_KERNELS_CXXFLAGS="-O0",
            XDG_CACHE_HOME=str(folder / "cache"),
            PIP_CACHE_DIR=call(self.python, "-m", "pip", "cache", "dir").splitlines()[-1],
            CCACHE_DIR=str(folder.parent / "ccache"),
            CCACHE_NOHASHDIR="1",
            CCACHE_BASEDIR=str(folder),
            VIRTUAL_ENV=str(folder / "venv"),
        )

    def path(self, compiler: bool) -> dict[str, str]:
        """Return the variables with the environment's programs first, with or without a compiler behind them."""
        folders = [str(self.folder / "venv" / "bin")]
        if compiler:
            folders += [str(self.folder.parent / "compilers"), os.environ["PATH"]]
        else:
            folders.append(str(self.folder.parent / "without-compilers"))
        return self.env | {"PATH": os.pathsep.join(folders)}

    def type(self, lines: Sequence[str], *, compiler: bool) -> str:
        """Let a shell read the lines."""
        script = "set -euo pipefail\n" + "\n".join(lines).replace("{checkout}", str(self.checkout))
        where = self.elsewhere if self.way.outside else self.checkout
        return call("bash", "-c", script, cwd=where, env=self.path(compiler))

    def losses(self, where: Path) -> dict:
        """Return what the first losses of a program in that folder say."""
        said = call(self.python, "-c", LOSSES, cwd=where, env=self.path(True))
        found = json.loads(said.splitlines()[-1])
        if not found["close"]:
            raise Failed(f"the loss is wrong: {said}")
        return found

    def command_missing(self, where: Path) -> str | None:
        """Return None if the C++ backend is there, or the command that the one sentence names."""
        found = self.losses(where)
        if found["backend"] == "cpp":
            if found["said"]:
                raise Failed(f"the C++ backend is there, but: {found['said']}")
            return None
        if len(found["said"]) != 1:
            raise Failed(f"expected one sentence, not {found['said']}")
        command = COMMAND.search(found["said"][0])
        if command is None or found["said"][0].count("`") != 2:
            raise Failed(f"no command in: {found['said'][0]}")
        self.reason = found["said"][0].partition(": ")[2].partition(";")[0]
        return command[1]

    def follow(self, command: str, where: Path) -> None:
        """Run the command that was named, first without a compiler if the way has none."""
        arguments = (self.python, "-m", *command.split())
        if not self.way.compiler:
            try:
                call(*arguments, cwd=where, env=self.path(False))
            except Failed as error:
                if str(error).count(NO_COMPILER) != 1 or "Traceback" in str(error):
                    raise
            else:
                raise Failed("a build without a compiler did not fail")
        call(*arguments, cwd=where, env=self.path(True))


def try_way(place: Place) -> tuple[str, str]:
    """Return what the lines ended with and what was said; raise `Failed` if the way does not hold."""
    way = place.way
    place.type(way.lines, compiler=way.compiler)
    folders = [place.elsewhere] if way.outside else [place.elsewhere, place.checkout]
    missing = {folder: place.command_missing(folder) for folder in folders}
    if way.built != (missing[place.elsewhere] is None):
        raise Failed(f"expected the C++ backend to be {'there' if way.built else 'missing'}")
    for folder in folders:
        if command := place.command_missing(folder):
            place.follow(command, folder)
        if place.command_missing(folder) is not None:
            raise Failed(f"the C++ backend is still missing: {place.reason}")
        report = call(place.python, "-m", "contrastive_kernels", cwd=folder, env=place.path(True))
        if not re.search(r"cpp +available", report):
            raise Failed(f"the report disagrees:\n{report}")
    return (place.reason, next(filter(None, missing.values()))) if any(missing.values()) else ("C++", "")


def prepare(folder: Path, python: Path, torch: str) -> Path:
    """Make what the environments share: torch, ccache in the place of the compilers, and a path without any."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = folder / f"torch-{torch}-{python.resolve().parent.parent.name}"
    if not (shared / "torch").exists():
        env = environments.variables(PIP_CONSTRAINT=os.devnull)
        call(python, "-m", "pip", "install", "--target", shared, f"torch=={torch}", env=env)
    compilers, without = folder / "compilers", folder / "without-compilers"
    for made in (compilers, without):
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
    names = ("c++", "g++", "cc", "gcc")
    if ccache := shutil.which("ccache"):
        for name in names:
            if shutil.which(name):
                (compilers / name).symlink_to(ccache)
    for name in ("bash", "git", "env", "uname", "which"):
        if program := shutil.which(name):
            (without / name).symlink_to(program)
    return shared


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the ways and print the table; return 1 if one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pinned = next(pin for pin in environments.pins() if pin.startswith("torch==")).partition("==")[2]
    parser.add_argument("--torch", default=pinned, help="the version of torch (default: %(default)s)")
    parser.add_argument("--old-torch", default="2.12.1", help="the version before the upgrade (default: %(default)s)")
    parser.add_argument("--only", nargs="*", default=[], help="ways whose names contain one of these")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-install", help="where to work")
    options = parser.parse_args(arguments)
    console = Console()
    python = Path(sys.executable).resolve()
    shared = prepare(options.folder.resolve(), python, options.torch)
    table = Table(
        "way", "without more", "said", "seconds", title=f"Python {sys.version.split()[0]}, torch {options.torch}"
    )
    failures = []
    for way in ways(options.old_torch, options.torch):
        if options.only and not any(part in way.name for part in options.only):
            continue
        console.print(f"[bold]{way.name}[/bold]")
        start = time.monotonic()
        with tempfile.TemporaryDirectory(dir=options.folder.resolve()) as folder:
            try:
                after, command = try_way(Place(way, python, Path(folder), shared, options.torch))
                row = (after, f"python -m {command}" if command else "")
            except Failed as error:
                failures.append(way.name)
                console.print(str(error), markup=False, highlight=False)
                row = ("[red]does not hold[/red]", "")
        table.add_row(way.name, *row, f"{time.monotonic() - start:.0f}")
    console.print(table)
    console.print("All ways hold." if not failures else f"Do not hold: {'; '.join(failures)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
