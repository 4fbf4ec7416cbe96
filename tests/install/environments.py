"""Environments of their own for `paths` and `versions`: a Python, a copy of the repository, commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.testing import ROOT


class Failed(Exception):
    """Raised when a command fails; the message is the end of what it said."""


def python_of(version: str) -> Path | None:
    """Return the interpreter of a version as "3.12" that runs here, None if there is none."""
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        return Path(sys.executable)
    on_path = shutil.which(f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [*([on_path] if on_path else []), *sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True)]
    for candidate in map(Path, candidates):  # a shim of pyenv is on the path and may not run
        run = subprocess.run([candidate, "-c", "import venv"], capture_output=True, check=False)
        if run.returncode == 0:
            return candidate
    return None


def create(python: Path, folder: Path) -> Path:
    """Create an environment and return its interpreter."""
    shutil.rmtree(folder, ignore_errors=True)
    call(python, "-m", "venv", folder)
    return folder / "bin" / "python"


def tracked() -> list[str]:
    """Return the files of the repository, without what git ignores."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in names.splitlines() if (ROOT / name).is_file()]


def copy_checkout(folder: Path) -> Path:
    """Copy the repository as a fresh checkout would be, without a trace of an earlier build."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def variables(**more: str) -> dict[str, str]:
    """Return the environment without what changes an import, a build or a choice of this package."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CONTRASTIVE_KERNELS_")}
    for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "TRITON_INTERPRET"):
        kept.pop(name, None)
    return kept | more


def call(*command: object, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 3600) -> str:
    """Run a command and return what it said; raise `Failed` with the end of it."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=variables() if env is None else env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=timeout,
    )
    if done.returncode:
        shown = " ".join(str(part) for part in command)
        raise Failed(f"{shown} ended with {done.returncode}:\n{_end(done.stdout)}")
    return done.stdout


def _end(text: str, lines: int = 25) -> str:
    return "\n".join(text.rstrip().splitlines()[-lines:])


def pins(*leave_out: str) -> Iterator[str]:
    """Yield the lines of requirements-dev.txt, without comments and without the packages named."""
    for line in (ROOT / "requirements-dev.txt").read_text().splitlines():
        requirement = line.partition("#")[0].strip()
        name = requirement.partition("==")[0].partition("[")[0]
        if requirement and name not in leave_out:
            yield requirement
